"""llama.cpp's names of a model's modules, and the facts about its base that an adapter needs.

The modules of each architecture are in `architectures` beside this file.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.config.arguments import check_argument
from lora_jax.files import read_json
from lora_jax.hf.gguf.architectures import (
    FUSED,
    GGUF_ARCHITECTURES,
    GgufArchitecture,
    gguf_architecture,
    their_names,
)
from lora_jax.hf.gguf.experts import expert_names
from lora_jax.hf.gguf.fields import DeltaHeads, delta_of, delta_of_file
from lora_jax.hf.gguf.file import open_gguf
from lora_jax.hf.gguf.layout import column_order, row_order
from lora_jax.hf.gguf.places import QKV, places_of

# Hugging Face's model_type -> llama.cpp's architecture.
ARCHITECTURE_OF: Mapping[str, str] = {
    **{row.model_type: name for name, row in GGUF_ARCHITECTURES.items()},
    **{"mistral": "llama", "mixtral": "llama"},
    **{"deepseek_v2": "deepseek2", "glm4_moe_lite": "deepseek2"},
    **{"qwen2_5_vl": "qwen2vl", "ministral3": "mistral3"},
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), "bert"),
}
# Families that tie head and embedding where config.json has no `tie_word_embeddings`.
TIED_BY_DEFAULT = (
    "gemma", "gemma2", "gemma3_text", "gemma4_text", "gpt2", "starcoder2", "cohere", "cohere2",
    "smollm3", "ernie4_5",
)  # fmt: skip


class Base(NamedTuple):
    """The facts about its base model that a GGUF adapter needs.

    Attributes:
      architecture: llama.cpp's name of it.
      layers: blocks.
      heads: query heads.
      kv_heads: key and value heads.
      vocab_size: rows of the embedding table.
      tied: the output head is the embedding table.
      delta: heads of its delta nets, or None without them.
      fused: gate and up of all experts are one tensor of the file.
      fused_qkv: so are queries, keys and values, of which llama.cpp then takes no adapter.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    tied: bool
    delta: DeltaHeads | None = None
    fused: bool = False
    fused_qkv: bool = False

    @property
    def row(self) -> GgufArchitecture:
        """The modules of the architecture, as this base's file has them."""
        row = GGUF_ARCHITECTURES[self.architecture]
        return row._replace(fused=row.fused or self.fused)


def base_from_hf(raw: Mapping[str, Any]) -> Base:
    """The base that a Hugging Face `config.json` describes.

    Raises:
      ValueError: a family for which llama.cpp's names are not known here, or a size is missing.
    """
    raw = _decoder_of(raw)
    kind = str(raw.get("model_type"))
    if kind not in ARCHITECTURE_OF:
        known = ", ".join(ARCHITECTURE_OF)
        raise ValueError(f"config: llama.cpp's names of model_type `{kind}` are not known: {known}")
    heads = _first(raw, "num_attention_heads", "n_head")
    # The head of words, which is the embedding table, is no part of an encoder's file.
    encoder = GGUF_ARCHITECTURES[ARCHITECTURE_OF[kind]].encoder
    tied = not encoder and bool(raw.get("tie_word_embeddings", kind in TIED_BY_DEFAULT))
    return Base(
        architecture=ARCHITECTURE_OF[kind],
        layers=_first(raw, "num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        vocab_size=_first(raw, "vocab_size"),
        tied=tied,
        delta=delta_of(raw),
    )


def _decoder_of(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the decoder in a model of images and texts, or of the model."""
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        return raw
    # Either place may tie head and embedding.
    tie = "tie_word_embeddings"
    ties = [part[tie] for part in (raw, text) if part.get(tie) is not None]
    # llama.cpp has architectures of its own for some.
    own = {name: raw[name] for name in ("model_type",) if raw[name] in ARCHITECTURE_OF}
    return {**text, **own, **({tie: any(ties)} if ties else {})}


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
    check_argument("hf.read_base(source)", "source", source, (str, os.PathLike))
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
    kind = gguf_architecture(file.metadata, path)
    facts = {k.removeprefix(f"{kind}."): v for k, v in file.metadata.items()}
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{path}: the tensor `token_embd.weight` is missing")
    heads = facts.get("attention.head_count", 0)
    layers, kv_heads = facts.get("block_count", 0), facts.get("attention.head_count_kv", heads)
    if "attention.head_count_kv" in GGUF_ARCHITECTURES[kind].own and isinstance(kv_heads, list):
        kv_heads = max(kv_heads, default=0)
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
        tied="output.weight" not in file.tensors and not GGUF_ARCHITECTURES[kind].encoder,
        delta=delta_of_file(facts),
        fused=any(name.endswith(f"{FUSED}.weight") for name in file.tensors)
        and not GGUF_ARCHITECTURES[kind].fused,
        fused_qkv=any(place.module in QKV and place.rows for place in places_of(file).values()),
    )


def gguf_names(base: Base) -> dict[str, str]:
    """llama.cpp's name of every module that may carry an adapter, by Hugging Face's name.

    Raises:
      ValueError: the architecture is not known here.
    """
    row, table = base.row, their_names(base.architecture)
    names = {module: table[module] for module in row.outer[:2] if module in table}
    blocks = {module: table[module] for module in row.linears} | row.routers
    for module, theirs in blocks.items():
        names |= {f"{row.stack}.{i}.{module}": f"blk.{i}.{theirs}" for i in range(base.layers)}
    for block in range(base.layers):
        names |= expert_names(row, block)
    return names


def row_order_of(name: str, rows: int, base: Base) -> np.ndarray | None:
    """As `row_order`, of a module of this base."""
    return row_order(
        base.architecture, name, rows, heads=base.heads, kv_heads=base.kv_heads, delta=base.delta
    )


def column_order_of(name: str, columns: int, base: Base) -> np.ndarray | None:
    """As `column_order`, of a module of this base."""
    return column_order(base.architecture, name, columns, delta=base.delta)
