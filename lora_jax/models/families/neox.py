"""GPT-NeoX (Pythia) and Phi-1 to 2: attention and MLP beside each other, an MLP without a gate.

Norms are those of GPT-2, and a part of each head is rotated. GPT-NeoX has a norm of its own for the
MLP, and one projection in which each head's queries, keys and values lie side by side; some of its
models put attention and MLP one after the other. Phi has one norm for both, and a bias on the head.

Sources: arXiv:2204.06745, arXiv:2306.11644.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from lora_jax.hf.checkpoint import names
from lora_jax.models.dialect import (
    BEFORE,
    PART,
    SHARED,
    Dialect,
    Modules,
    check_fixed,
    layer_norms,
    read_partial_rope,
)

# For training from the start; an adapter has its own dropout.
_DROPOUT = ("hidden_dropout", "classifier_dropout")
_DROPOUT_PHI = ("embd_pdrop", "resid_pdrop")
# GPT-NeoX's names, and those of the other families.
_ROTARY = {"rotary_pct": PART, "rotary_emb_base": "rope_theta"}
_NEOX = Modules(
    decoder="gpt_neox", table="embed_in", attention="attention", fused="query_key_value",
    output="dense", up="dense_h_to_4h", down="dense_4h_to_h", last_norm="final_layer_norm",
)  # fmt: skip
_PHI = Modules(
    output="dense", up="fc1", down="fc2", last_norm="final_layernorm", q_norm="q_layernorm",
    k_norm="k_layernorm",
)  # fmt: skip


def _read(raw: Mapping[str, Any], *, bias: bool) -> dict[str, Any]:
    """The fields of both."""
    return {
        **layer_norms(raw["layer_norm_eps"]),
        "gated_mlp": False,
        "mlp_bias": True,
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _read_neox(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_read(raw, bias=bool(raw["attention_bias"])),
        "modules": _NEOX,
        "norms": BEFORE,
        "parallel_mlp": bool(raw["use_parallel_residual"]),
        "fused_projections": True,
        "qkv_by_head": True,
    }


def _write_neox(config: Any) -> dict[str, Any]:
    return {
        "layer_norm_eps": config.rms_norm_eps,
        "attention_bias": config.qkv_bias,
        "use_parallel_residual": config.parallel_mlp,
        **{theirs: getattr(config, ours) for theirs, ours in _ROTARY.items()},
    }


def _read_neox_rope(given: Mapping[str, Any]) -> dict[str, Any]:
    # Old files have its own names, transformers 5 writes `rope_parameters`.
    own = {ours: given[theirs] for theirs, ours in _ROTARY.items() if theirs in given}
    return read_partial_rope({**given, **own}, share=0.25)


def _read_phi(raw: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(raw, {"tie_word_embeddings": False})
    return {
        **_read(raw, bias=True),
        "modules": _PHI,
        "qk_norm": bool(raw["qk_layernorm"]),
        "norms": SHARED,
        "parallel_mlp": True,
        "head_bias": True,
    }


def _write_phi(config: Any) -> dict[str, Any]:
    return {
        "layer_norm_eps": config.rms_norm_eps,
        "qk_layernorm": config.qk_norm,
        PART: config.partial_rotary_factor,
    }


GPT_NEOX = Dialect(
    architecture="GPTNeoXForCausalLM",
    fields=(*_DROPOUT, *_ROTARY, "attention_bias", "layer_norm_eps", "use_parallel_residual"),
    read=_read_neox,
    write=_write_neox,
    defaults={
        "layer_norm_eps": 1e-5,
        "attention_bias": True,
        "use_parallel_residual": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    act="gelu",
    rope=_read_neox_rope,
    names=names.NEOX,
)

PHI = Dialect(
    architecture="PhiForCausalLM",
    fields=(*_DROPOUT_PHI, PART, "layer_norm_eps", "qk_layernorm"),
    read=_read_phi,
    write=_write_phi,
    defaults={"layer_norm_eps": 1e-5, "qk_layernorm": False, "bos_token_id": 1, "eos_token_id": 2},
    act="gelu_new",
    rope=partial(read_partial_rope, share=0.5),
)
