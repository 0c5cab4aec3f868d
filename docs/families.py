"""Writes the table of model families into docs/reference/families.md.

    python docs/families.py

Every column is what tests run: outputs, greedy text and PEFT by the answers of transformers and
PEFT in tests/golden/oracles, the others by the families that a test is parametrized with.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "reference" / "families.md"
START, END = "<!-- table -->\n", "<!-- end of the table -->\n"
COLUMNS = ("`model_type`", "outputs", "greedy text", "PEFT", "GGUF", "quantized base", "mesh")


# What is spread, and over which axis of the mesh; rows over `data` as well.
PARTS = (("rows", "fsdp"), ("tokens", "context"), ("fsdp", "fsdp"), ("tensor", "tensor"))


def main() -> None:
    """Writes the table."""
    before, rest = PAGE.read_text("utf-8").split(START)
    after = rest.split(END)[1]
    PAGE.write_text(before + START + table() + END + after, "utf-8")


def table() -> str:
    """The rows of all model types but those of models of images and texts."""
    from lora_jax.models.registry import ARCHITECTURES
    from lora_jax.models.wrapped import WRAPPERS

    from tests.models.test_every_decoder import SPREAD
    from tests.models.test_vit import SPREAD as IMAGES
    from tests.support.decoders import FAMILIES
    from tests.support.gguf_families import CASES, ENCODERS
    from tests.train.test_encoder_decoders import SPREAD as BOTH
    from tests.train.test_encoders import HELD
    from tests.train.test_encoders import SPREAD as ON_MESHES

    outputs, greedy, peft = (tested(*kind) for kind in KINDS)
    meshes = {**SPREAD, **ON_MESHES, **BOTH, **IMAGES}
    held = {*FAMILIES, *BOTH, *IMAGES, *(kind for kind, _ in HELD)}
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for kind in sorted(set(ARCHITECTURES) - set(WRAPPERS)):
        columns = (outputs, greedy, peft, {*CASES, *ENCODERS}, held)
        mesh = ", ".join(part for part, axis in PARTS if axis in meshes.get(kind, ()))
        rows.append((f"`{kind}`", *("yes" if kind in of else "" for of in columns), mesh))
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
