"""llama.cpp's names of a model's modules, and the facts about its base that an adapter needs.

llama.cpp's name of a module follows from Hugging Face's by the `gguf` package's table. Here are
the modules of each architecture, and whether llama.cpp reorders the rows of q and k for its RoPE.

Source: gguf's `tensor_mapping.py`; llama.cpp's `convert_hf_to_gguf.py` (`LlamaModel.permute`).
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.compat import require
from lora_jax.files import read_json
from lora_jax.hf.gguf.file import open_gguf

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_OUTER = ("model.embed_tokens", "lm_head")
_LLAMA = ("model.layers", (*_ATTENTION, *_MLP), _OUTER)


# llama.cpp's architecture -> the list of blocks, a block's modules, the modules around them.
MODULES: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"), _LLAMA),
    "phi3": ("model.layers", _FUSED, _OUTER),
    "gpt2": (
        "transformer.h",
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        ("transformer.wte", "lm_head"),
    ),
}


# Hugging Face's model_type -> llama.cpp's architecture.
ARCHITECTURE_OF: Mapping[str, str] = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "gpt2": "gpt2",
}  # fmt: skip
# Families that tie head and embedding where config.json has no `tie_word_embeddings`.
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text", "gpt2")


# Modules of the architecture `llama` whose rows are reordered, and whose heads count.
_REORDERED = {"q_proj": "heads", "k_proj": "kv_heads"}


class Base(NamedTuple):
    """The facts about its base model that a GGUF adapter needs.

    Attributes:
      architecture: llama.cpp's name of it.
      layers: blocks.
      heads: query heads.
      kv_heads: key and value heads.
      vocab_size: rows of the embedding table.
      tied: the output head is the embedding table.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    tied: bool


def base_from_hf(raw: Mapping[str, Any]) -> Base:
    """The base that a Hugging Face `config.json` describes.

    Raises:
      ValueError: a family for which llama.cpp's names are not known here, or a size is missing.
    """
    kind = str(raw.get("model_type"))
    if kind not in ARCHITECTURE_OF:
        known = ", ".join(ARCHITECTURE_OF)
        raise ValueError(f"config: llama.cpp's names of model_type `{kind}` are not known: {known}")
    heads = _first(raw, "num_attention_heads", "n_head")
    return Base(
        architecture=ARCHITECTURE_OF[kind],
        layers=_first(raw, "num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        vocab_size=_first(raw, "vocab_size"),
        tied=bool(raw.get("tie_word_embeddings", kind in _TIED_BY_DEFAULT)),
    )


def _first(raw: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(value := raw.get(name), int) and value > 0:
            return value
    raise ValueError(f"config: `{names[0]}` must be a whole number above 0, got none")


def read_base(source: str | Path) -> Base:
    """The base of a model on disk, without its weights.

    Args:
      source: a Hugging Face directory or its config.json, or a .gguf file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: the file is damaged, or the family not known.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        return _from_gguf(path)

    path = path / "config.json" if path.is_dir() else path
    raw = read_json(path)
    try:
        return base_from_hf(raw)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _from_gguf(path: Path) -> Base:
    file = open_gguf(path)
    kind = str(file.metadata.get("general.architecture"))
    facts = {k.removeprefix(f"{kind}."): v for k, v in file.metadata.items()}
    if kind not in MODULES:
        raise ValueError(f"{path}: architecture `{kind}` is not one of {', '.join(MODULES)}")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{path}: the tensor `token_embd.weight` is missing")
    heads = facts.get("attention.head_count", 0)
    layers, kv_heads = facts.get("block_count", 0), facts.get("attention.head_count_kv", heads)
    if any(type(size) is not int or size < 1 for size in (layers, heads, kv_heads)):
        raise ValueError(
            f"{path}: its metadata must state blocks and heads as whole numbers, got "
            f"{(layers, heads, kv_heads)}"
        )
    return Base(
        architecture=kind,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        # llama.cpp's converter writes no head where it is the embedding table.
        tied="output.weight" not in file.tensors,
    )


# The gguf package fills a table of every known spelling at each call, which is slow.
@lru_cache(maxsize=16)
def gguf_names(architecture: str, layers: int) -> dict[str, str]:
    """llama.cpp's name of every module that may carry an adapter, by Hugging Face's name.

    Raises:
      ValueError: the architecture is not known here.
    """
    gguf = require("gguf")
    if architecture not in MODULES:
        raise ValueError(f"architecture `{architecture}` is not one of {', '.join(MODULES)}")
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    # One block is enough: the names of the others differ in its number only.
    table = gguf.get_tensor_name_map(arch, 1)
    stack, inner, outer = MODULES[architecture]
    names = {module: table[module] for module in outer if module in table}
    for module in inner:
        theirs = table[f"{stack}.0.{module}"].removeprefix("blk.0.")
        names |= {f"{stack}.{i}.{module}": f"blk.{i}.{theirs}" for i in range(layers)}
    return names


def heads_of(name: str, base: Base) -> int | None:
    """Heads over which llama.cpp reorders a module's rows; None where it leaves them."""
    kind = _REORDERED.get(name.rpartition(".")[2])
    return getattr(base, kind) if kind and base.architecture == "llama" else None
