"""Writes the table of model families into docs/reference/families.md.

    python docs/families.py

What can be done comes from the registry; what is compared with transformers and PEFT comes from
their recorded answers in tests/golden/oracles.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "reference" / "families.md"
START, END = "<!-- table -->\n", "<!-- end of the table -->\n"
COLUMNS = ("`model_type`", "outputs", "greedy text", "PEFT", "GGUF", "quantized base", "mesh")


def main() -> None:
    """Writes the table."""
    before, rest = PAGE.read_text("utf-8").split(START)
    after = rest.split(END)[1]
    PAGE.write_text(before + START + table() + END + after, "utf-8")


def table() -> str:
    """The rows of all model types but those of models of images and texts."""
    from lora_jax.hf.gguf.architectures import GGUF_ARCHITECTURES
    from lora_jax.models.families import DIALECTS
    from lora_jax.models.registry import ARCHITECTURES, CAUSAL_LM
    from lora_jax.models.wrapped import WRAPPERS

    gguf = {architecture.model_type for architecture in GGUF_ARCHITECTURES.values()} | {"mixtral"}
    outputs, greedy, peft = (tested(*kind) for kind in KINDS)
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for kind in sorted(set(ARCHITECTURES) - set(WRAPPERS)):
        decoder = ARCHITECTURES[kind].kind == CAUSAL_LM
        facts = (
            kind in outputs,
            kind in greedy,
            kind in peft,
            kind in gguf,
            decoder,
        )
        mesh = "rows, tokens, fsdp, tensor" if kind in DIALECTS else "rows, tokens, fsdp"
        # These attend in whole rows: by distance, or to the patches of an image.
        mesh = "rows, fsdp" if kind in ("deberta-v2", "vit") else mesh
        rows.append((f"`{kind}`", *("yes" if fact else "" for fact in facts), mesh))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


# Where the recorded models are, and what must be recorded of one: parts of a file's name.
KINDS = (("models", ("logits", "outputs")), ("models", ("greedy",)), ("hf/peft", ("",)))


def tested(folder: str, answers: tuple[str, ...]) -> set[str]:
    """Model types with a recorded model in a folder, and an answer of one of these names."""
    from tests.support.oracle import FOLDER, read

    found = set()
    for path in (FOLDER / folder).rglob("*.spec.safetensors"):
        case = path.name.removesuffix(".spec.safetensors")
        others = {*path.parent.glob(f"{case}.*"), *path.parent.glob(f"{case}/*")} - {path}
        names = [other.name.removeprefix(case) for other in others]
        if any(answer in name for answer in answers for name in names):
            found.add(read(path)[0]["config"]["model_type"])
    return found


if __name__ == "__main__":
    main()
