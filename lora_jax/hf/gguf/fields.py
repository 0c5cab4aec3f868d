"""Fields of config.json that a GGUF file states otherwise: block by block, or by its tensors.

Source: llama.cpp's `conversion/gemma.py`, `deepseek.py` and `qwen.py`, and `src/models/gemma4.cpp`
and `llama4.cpp`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

_KINDS = ("full_attention", "sliding_attention")
# What llama.cpp divides the frequencies by that do not rotate.
_STILL = 1e30

DELTA_FIELDS = (
    "linear_num_key_heads", "linear_num_value_heads",
    "linear_key_head_dim", "linear_value_head_dim",
)  # fmt: skip
_KEYS = ("ssm.group_count", "ssm.time_step_rank", "ssm.state_size", "ssm.inner_size")
# `expert_gating_func` of a sigmoid.
SIGMOID = 2
_LINEAR, _FULL = "linear_attention", "full_attention"


class Stated(NamedTuple):
    """What a file states of a model.

    Attributes:
      facts: the architecture's keys without its prefix.
      shapes: of the tensors under Hugging Face's names.
      divisors: the tensor `rope_freqs`, if there.
    """

    facts: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    divisors: np.ndarray | None


def gemma4(stated: Stated) -> dict[str, Any]:
    """Gemma 4's fields: blocks of two kinds, whose heads differ.

    Raises:
      ValueError: a key missing, or blocks of one kind that differ.
    """
    facts, blocks = stated.facts, stated.facts["block_count"]
    slides = _each(facts, "attention.sliding_window_pattern", blocks)
    if slides[-1]:
        raise ValueError("the last block has a window, which is not supported")
    size = _whole(facts, "attention.key_length_swa")
    if facts.get("rope.dimension_count_swa", size) != size:
        raise ValueError("RoPE over a part of each head of blocks with a window is not supported")
    shared = facts.get("attention.shared_kv_layers", 0)
    first = blocks - shared
    heads = _each(facts, "attention.head_count_kv", blocks)
    inner = _each(facts, "feed_forward_length", blocks)
    wide = shared > 0 and inner[-1] == 2 * inner[0]
    if inner != [inner[0]] * first + [inner[0] * (1 + wide)] * shared:
        raise ValueError(f"`feed_forward_length` {inner} is not supported")
    own = {n for n, window in zip(heads, slides, strict=True) if window}
    if len(own) > 1:
        raise ValueError(f"`attention.head_count_kv` {heads} is not supported")
    full = [i for i, window in enumerate(slides) if not window]
    table = stated.shapes.get("model.embed_tokens_per_layer.weight")
    found = {
        "intermediate_size": inner[0],
        "use_double_wide_mlp": wide,
        "num_key_value_heads": own.pop() if own else heads[0],
        "head_dim": size,
        "per_layer_config": {
            i: {"head_dim": facts["attention.key_length"], "num_key_value_heads": heads[i]}
            for i in full
        },
        "layer_types": [_KINDS[window] for window in slides],
        "num_kv_shared_layers": shared,
        # Values are the keys where the file has none.
        "attention_k_eq_v": not _has(stated, full[0], "self_attn.v_proj"),
        "vocab_size_per_layer_input": (table or stated.shapes["model.embed_tokens.weight"])[0],
        "rope_parameters": {
            _KINDS[0]: {
                "rope_type": "proportional",
                "rope_theta": _base(facts, "rope.freq_base"),
                "partial_rotary_factor": _rotated(stated.divisors),
            },
            _KINDS[1]: {
                "rope_type": "default",
                "rope_theta": _base(facts, "rope.freq_base_swa"),
            },
        },
    }
    if facts.get("expert_count"):
        found |= {"enable_moe_block": True, "num_experts": facts["expert_count"],
                  "top_k_experts": facts.get("expert_used_count"),
                  "moe_intermediate_size": facts.get("expert_feed_forward_length")}  # fmt: skip
    return found


def latent(stated: Stated) -> dict[str, Any]:
    """DeepSeek's fields; files without the first two keys hold `kv_b_proj` whole.

    Raises:
      ValueError: a size missing.
    """
    facts = stated.facts
    ends = ("_mla",) if "attention.key_length_mla" in facts else ("",)
    key, value = (
        _whole(facts, f"attention.{name}_length{end}") for name in ("key", "value") for end in ends
    )
    rotated = _whole(facts, "rope.dimension_count")
    # Older files of GLM-4.7 Flash do not say it.
    biased = any(name.endswith("e_score_correction_bias") for name in stated.shapes)
    softmax = facts.get("expert_gating_func", SIGMOID if biased else 1) != SIGMOID
    method = "group_limited_greedy" if facts.get("expert_group_count", 1) > 1 else "greedy"
    return {
        "model_type": "deepseek_v2" if softmax else "deepseek_v3",
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": value,
        "head_dim": rotated,
        "num_key_value_heads": facts["attention.head_count"],
        **({"topk_method": method} if softmax else {}),
    }


def delta(stated: Stated) -> dict[str, Any]:
    """The sizes of delta nets, and in which blocks they are.

    Raises:
      ValueError: a size missing, or no list of the blocks.
    """
    facts = stated.facts
    heads, blocks = delta_of_file(facts), range(facts["block_count"])
    if heads is None:
        raise ValueError("metadata lacks the sizes of delta nets (`ssm.group_count` and others)")
    every = facts.get("full_attention_interval", 4)
    recurs = facts.get("attention.recurrent_layers", [(i + 1) % every != 0 for i in blocks])
    count = len(blocks) - facts.get("nextn_predict_layers", 0)
    if not isinstance(recurs, list) or len(recurs) < count:
        raise ValueError(f"`attention.recurrent_layers` must be a list of {count}, got {recurs!r}")
    return {
        "linear_conv_kernel_dim": _whole(facts, "ssm.conv_kernel"),
        **dict(zip(DELTA_FIELDS, heads, strict=True)),
        "layer_types": [_LINEAR if recurs[i] else _FULL for i in range(count)],
        "num_hidden_layers": count,
    }


class DeltaHeads(NamedTuple):
    """Numbers of heads of a delta net, and their sizes."""

    keys: int
    values: int
    key_dim: int
    value_dim: int


def delta_of(raw: Mapping[str, Any]) -> DeltaHeads | None:
    """Those of a config.json, or None."""
    sizes = [raw.get(name) for name in DELTA_FIELDS]
    return _checked(sizes, DELTA_FIELDS) if any(sizes) else None


def delta_of_file(facts: Mapping[str, Any]) -> DeltaHeads | None:
    """Those of a file's metadata, whose keys are without their prefix, or None."""
    sizes = [facts.get(key) for key in _KEYS]
    if not any(sizes):
        return None
    keys, values, key_dim, inner = _checked(sizes, _KEYS)
    return DeltaHeads(keys, values, key_dim, inner // values)


def _checked(sizes: list[Any], names: tuple[str, ...]) -> DeltaHeads:
    for name, size in zip(names, sizes, strict=True):
        if type(size) is not int or size < 1:
            raise ValueError(f"`{name}` must be a whole number above 0, got {size!r}")
    if sizes[1] % sizes[0]:
        raise ValueError(f"`{names[1]}` {sizes[1]} is not a multiple of `{names[0]}` {sizes[0]}")
    return DeltaHeads(*sizes)


def llama4(stated: Stated) -> dict[str, Any]:
    """Llama 4's fields; llama.cpp has most of them as constants.

    Raises:
      ValueError: a key missing, or a model without texts cut into pieces.
    """
    facts = stated.facts
    if facts.get("attention.sliding_window") == 0:
        raise ValueError("`attention.sliding_window` = 0, which cuts no text, is not supported")
    return {
        "intermediate_size": _whole(facts, "expert_feed_forward_length"),
        "intermediate_size_mlp": facts["feed_forward_length"],
        # By the number of experts: Maverick has 128.
        "use_qk_norm": facts.get("expert_count") != 128,
        "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(facts["block_count"])],
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    }


def modernbert(stated: Stated) -> dict[str, Any]:
    """ModernBERT's fields; without a window in the file no block slides.

    Raises:
      ValueError: a decoder, or a key that is no number.
    """
    facts, blocks = _both_ways(stated), stated.facts["block_count"]
    key = "attention.sliding_window_pattern"
    if isinstance(facts.get(key), list):
        slides = _each(facts, key, blocks)
    else:
        every = _whole({key: 3, **facts}, key)
        slides = [block % every for block in range(blocks)]
    window = facts.get("attention.sliding_window", 0)
    return {
        "layer_types": [_KINDS[bool(slide and window)] for slide in slides],
        "local_attention": _whole(facts, "attention.sliding_window") if window else 128,
        "local_rope_theta": _base(facts, "rope.freq_base_swa"),
        "global_rope_theta": _base(facts, "rope.freq_base"),
        "hidden_activation": facts.get("hidden_activation", "gelu"),
    }


def bert(stated: Stated) -> dict[str, Any]:
    """The number of types that BERT's tokens have.

    Raises:
      ValueError: a decoder, or no table of types.
    """
    _both_ways(stated)
    table = stated.shapes.get("embeddings.token_type_embeddings.weight")
    if table is None:
        raise ValueError(
            "the tensor `token_types.weight` is missing, and `tokenizer.ggml.token_type_count` is "
            "not 1, as in files of DistilBERT"
        )
    return {"type_vocab_size": table[0]}


def _both_ways(stated: Stated) -> Mapping[str, Any]:
    """The facts of an encoder, whose tokens attend to those behind them too."""
    if stated.facts.get("attention.causal", False):
        raise ValueError("`attention.causal` is true, which is no encoder's, not supported")
    return stated.facts


def apertus(stated: Stated) -> dict[str, Any]:
    """Without divisors nothing is scaled, where config.json's default is."""
    plain = stated.divisors is None and "rope.scaling.type" not in stated.facts
    base = _base(stated.facts, "rope.freq_base")
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base}} if plain else {}


def cohere(stated: Stated) -> dict[str, Any]:
    """Command R+ alone normalizes queries and keys."""
    return {"use_qk_norm": _has(stated, 0, "self_attn.q_norm")}


def short(value: float) -> float:
    """The shortest decimal with the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _base(facts: Mapping[str, Any], key: str) -> float:
    """A rotary base."""
    if not isinstance(found := facts.get(key, 1e4), int | float):
        raise ValueError(f"`{key}` must be a number, got {found!r}")
    return short(found)


def _has(stated: Stated, block: int, module: str) -> bool:
    return f"model.layers.{block}.{module}.weight" in stated.shapes


def _whole(facts: Mapping[str, Any], key: str) -> int:
    if type(found := facts.get(key)) is not int or found < 1:
        raise ValueError(f"`{key}` must be a whole number above 0, got {found!r}")
    return found


def _each(facts: Mapping[str, Any], key: str, blocks: int) -> list[int]:
    """A whole number for each block, where the file may state one for all."""
    found = facts.get(key)
    each: list[Any] = found if isinstance(found, list) else [found] * blocks
    if len(each) != blocks or not all(isinstance(n, int) for n in each):
        raise ValueError(f"`{key}` must have a whole number for each of {blocks} blocks: {found!r}")
    return each


def _rotated(divisors: np.ndarray | None) -> float:
    """The share of a head that rotates: other frequencies are divided by a huge number."""
    if divisors is None:
        raise ValueError("the tensor `rope_freqs.weight` is missing")
    turning = int((divisors == 1).sum())
    if not (divisors == np.where(np.arange(len(divisors)) < turning, 1, np.float32(_STILL))).all():
        raise ValueError("the tensor `rope_freqs.weight` is not Gemma 4's, not supported")
    return turning / len(divisors)
