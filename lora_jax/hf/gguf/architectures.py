"""The llama.cpp architectures that are known here: their modules, and how files state their sizes.

llama.cpp's name of a module follows from Hugging Face's by the `gguf` package's table. What a file
has in another order is in `layout` beside this file.

Source: gguf's `tensor_mapping.py`; llama.cpp's `convert_hf_to_gguf.py`.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.compat import require
from lora_jax.hf.gguf import fields

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_DENSE = (*_ATTENTION, *_MLP)
_UNGATED = (*_ATTENTION, "mlp.up_proj", "mlp.down_proj")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_FOUR = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_AROUND = ("pre_feedforward_layernorm_2", *(f"post_feedforward_layernorm_{n}" for n in (1, 2)))
# All experts of a block are one tensor there; Hugging Face numbers them behind `experts`.
_EXPERTS = ("mlp.gate", *(f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")))
_MIXTRAL = ("block_sparse_moe.gate", *(f"block_sparse_moe.experts.w{n}" for n in (1, 2, 3)))


class GgufArchitecture(NamedTuple):
    """One architecture of llama.cpp.

    Attributes:
      model_type: Hugging Face's name of the family.
      linears: a block's modules that may carry an adapter.
      others: its other modules.
      odd: llama.cpp's names of tensors that are no weight or bias of a module -> ours.
      experts: the module with a block's experts, as PEFT names it, or None.
      fused: gate and up of all experts are one tensor, as they may be in files of any row.
      multiplier: the leaf with a number for each expert that multiplies its result, or None.
      stack: the list of blocks.
      outer: the modules around the blocks: embedding, head, and what carries no adapter.
      divided: a tensor may have divisors of the frequencies of RoPE.
      permuted: the rows of q and k are reordered in the file.
      by_head: query, key and value of each head lie side by side in Hugging Face's fused
        projection, and one kind after the other in the file.
      keys: key of the metadata, without its prefix -> the field of config.json. Without any, only
        adapters are read and written.
      own: keys that are no numbers, or that only `read` reads.
      stated: whole keys with a number of each block -> the end of the leaf's name.
      read: what reads fields that are stated otherwise than in config.json, or None.
      fixed: fields of config.json that every model of the architecture has.
      rotary: the field with the share of a head that is rotated, or None.
      added: what the file has added to the scales of norms.
      turned: the linears' weights are (in, out) under Hugging Face's names.
      in_turns: the value heads of a delta net are in llama.cpp's order, see `layout`.
      joined: a block's module -> the two modules that a file has for it.
      unadapted: modules whose adapters llama.cpp reads but does not apply.
      renamed: fields of config.json that have another name there, or None for those it lacks.
      encoder: the modules that hold an encoder in a model with a head; () of decoders.
      whole_at: the number of blocks of the one model whose queries are divided by the root of the
        width by heads, and not of the size of a head; no key states it.
    """

    model_type: str
    linears: tuple[str, ...] = _DENSE
    others: tuple[str, ...] = _NORMS
    odd: Mapping[str, str] = {}
    experts: str | None = None
    fused: bool = False
    multiplier: str | None = None
    stack: str = "model.layers"
    outer: tuple[str, ...] = ("model.embed_tokens", "lm_head", "model.norm")
    divided: bool = False
    permuted: bool = False
    by_head: bool = False
    keys: Mapping[str, str] = {}
    own: tuple[str, ...] = ()
    stated: Mapping[str, str] = {}
    read: Callable[[fields.Stated], dict[str, Any]] | None = None
    fixed: Mapping[str, Any] = {}
    rotary: str | None = None
    added: float = 0.0
    turned: bool = False
    in_turns: bool = False
    joined: Mapping[str, tuple[str, str]] = {}
    unadapted: tuple[str, ...] = ()
    renamed: Mapping[str, str | None] = {}
    encoder: tuple[str, ...] = ()
    whole_at: int | None = None

    @property
    def both(self) -> str:
        """Gate and up of experts in one, beside what others call them."""
        apart = next(module for module in self.others if ".experts." in f".{module}")
        return f"{apart.rpartition('.')[0]}.gate_up_proj"

    @property
    def routers(self) -> dict[str, str]:
        """A block's modules that weigh experts and may carry an adapter -> llama.cpp's names."""
        ends = {name.rpartition(".")[2] for name in self.others}
        return {f"mlp.{name}": theirs for name, theirs in _ROUTERS.items() if name in ends}


FUSED = "ffn_gate_up_exps"
_ROUTERS = {"gate": "ffn_gate_inp", "shared_expert_gate": "ffn_gate_inp_shexp"}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_LAYER_NORM = {"attention.layer_norm_epsilon": "layer_norm_eps"}
_CHOSEN = {**_RMS, "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_MOE = {**_CHOSEN, "expert_feed_forward_length": "moe_intermediate_size"}
_GEMMA = {
    **_RMS,
    "attention.sliding_window": "sliding_window",
    **{f"{name}_logit_softcapping": f"{name}_logit_softcapping" for name in ("attn", "final")},
}
_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_SHARED = tuple(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down"))
_SHARED_KEYS = {
    **_MOE, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"
}  # fmt: skip
# Of a gated delta net.
_DELTA = ("linear_attn.conv1d", "linear_attn.norm")
_DELTA_ODD = {"ssm_a.": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
# The last key has a position of a token in each section: of text they are equal.
_DELTA_KEYS = (
    "ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size",
    "attention.recurrent_layers", "full_attention_interval", "nextn_predict_layers",
    "rope.dimension_sections",
)  # fmt: skip
_SPLIT = tuple(f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z"))
_LINEAR = (*_SPLIT, *(f"linear_attn.{name}" for name in ("in_proj_b", "in_proj_a", "out_proj")))
# Of attention over latent vectors.
_LATENT = tuple(
    f"self_attn.{name}" for name in (
        "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "k_b_proj", "v_b_proj"
    )
)  # fmt: skip
_BIASED = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
_LATENT_NORMS = ("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm")
_SHARED_EXPERTS = tuple(f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down"))
_GROUPED_KEYS = {
    **_MOE, "expert_count": "n_routed_experts", "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_weights_scale": "routed_scaling_factor", "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group", "expert_group_used_count": "topk_group",
}  # fmt: skip
# Of encoders: how a text's vector is made of its tokens', and the classes of a reranker.
_OF_TEXTS = (
    "attention.causal", "pooling_type", "classifier.pooling_type", "classifier.output_labels",
)  # fmt: skip
_NO_DECODER: Mapping[str, str | None] = {
    "num_key_value_heads": None, "head_dim": None, "rope_theta": None,
}  # fmt: skip
_XIELU = {f"xielu.{name}": f"mlp.act_fn.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")}
_GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

GGUF_ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture(
        "llama", others=(*_NORMS, *_MIXTRAL), experts="mlp.experts", divided=True, permuted=True,
        keys=_RMS
    ),
    "qwen2": GgufArchitecture("qwen2", keys=_RMS),
    "qwen3": GgufArchitecture("qwen3", others=(*_NORMS, *_QK_NORMS), keys=_RMS),
    # Decoders of images and texts.
    "mistral3": GgufArchitecture("mistral3", permuted=True),
    "qwen2vl": GgufArchitecture("qwen2_vl"),
    "qwen3vl": GgufArchitecture("qwen3_vl", others=(*_NORMS, *_QK_NORMS)),
    "qwen2moe": GgufArchitecture(
        "qwen2_moe", (*_ATTENTION, *_SHARED), (*_NORMS, *_EXPERTS, "mlp.shared_expert_gate"),
        experts="mlp.experts", keys=_SHARED_KEYS, fixed={**_SPARSE, "norm_topk_prob": False},
    ),
    "qwen3moe": GgufArchitecture(
        "qwen3_moe", _ATTENTION, (*_NORMS, *_EXPERTS, *_QK_NORMS), experts="mlp.experts",
        keys=_MOE, fixed={**_SPARSE, "norm_topk_prob": True},
    ),
    "olmoe": GgufArchitecture(
        "olmoe", _ATTENTION, (*_NORMS, *_EXPERTS, *_QK_NORMS), experts="mlp.experts",
        keys=_CHOSEN, fixed={"norm_topk_prob": False},
    ),
    "glm4moe": GgufArchitecture(
        "glm4_moe", (*_DENSE, *_SHARED_EXPERTS), (*_NORMS, *_EXPERTS, *_QK_NORMS), _BIASED,
        experts="mlp.experts", rotary="partial_rotary_factor",
        keys={**_GROUPED_KEYS, "nextn_predict_layers": "num_nextn_predict_layers"},
    ),
    "dots1": GgufArchitecture(
        "dots1", (*_DENSE, *_SHARED_EXPERTS), (*_NORMS, *_EXPERTS, *_QK_NORMS), _BIASED,
        experts="mlp.experts", keys=_GROUPED_KEYS, fixed={"sliding_window": None},
    ),
    # V2 and V3, which differ in what their routers compute.
    "deepseek2": GgufArchitecture(
        "deepseek_v3", (*_LATENT, *_DENSE[3:], *_SHARED_EXPERTS),
        (*_NORMS, *_EXPERTS, *_LATENT_NORMS), _BIASED, experts="mlp.experts",
        keys={
            **_GROUPED_KEYS, "nextn_predict_layers": "num_nextn_predict_layers",
            "attention.kv_lora_rank": "kv_lora_rank", "attention.q_lora_rank": "q_lora_rank",
        },
        own=("attention.key_length_mla", "attention.value_length_mla", "attention.value_length",
             "rope.scaling.yarn_log_multiplier", "expert_gating_func"),
        read=fields.latent,
        # What the metadata leave out where it has no effect.
        fixed={"q_lora_rank": None, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
        joined={"self_attn.kv_b_proj": ("self_attn.k_b_proj", "self_attn.v_b_proj")},
        unadapted=("lm_head", *_LATENT),
    ),
    "qwen3next": GgufArchitecture(
        "qwen3_next",
        (*_ATTENTION, *_SPLIT, "linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba",
         "linear_attn.out_proj", *_SHARED),
        (*_NORMS, *_QK_NORMS, *_DELTA, *_EXPERTS, "mlp.shared_expert_gate"),
        _DELTA_ODD, experts="mlp.experts", keys=_SHARED_KEYS, own=_DELTA_KEYS, read=fields.delta,
        fixed={**_SPARSE, "norm_topk_prob": True}, rotary="partial_rotary_factor", added=1.0,
        joined={"linear_attn.in_proj_qkvz": (_SPLIT[0], _SPLIT[1])},
    ),
    "qwen35": GgufArchitecture(
        "qwen3_5_text", (*_ATTENTION, *_LINEAR, *_MLP), (*_NORMS, *_QK_NORMS, *_DELTA), _DELTA_ODD,
        keys=_RMS, own=_DELTA_KEYS, read=fields.delta, rotary="partial_rotary_factor", added=1.0,
        in_turns=True,
    ),
    "qwen35moe": GgufArchitecture(
        "qwen3_5_moe_text",
        (*_ATTENTION, *_LINEAR, *_SHARED),
        (*_NORMS, *_QK_NORMS, *_DELTA, *_EXPERTS, "mlp.shared_expert_gate"), _DELTA_ODD,
        experts="mlp.experts", keys=_SHARED_KEYS, own=(*_DELTA_KEYS, "feed_forward_length"),
        read=fields.delta, rotary="partial_rotary_factor", added=1.0, in_turns=True,
    ),
    "starcoder2": GgufArchitecture(
        "starcoder2", (*_ATTENTION, "mlp.c_fc", "mlp.c_proj"),
        keys={"attention.layer_norm_epsilon": "norm_epsilon"},
    ),
    "command-r": GgufArchitecture(
        "cohere", others=("input_layernorm", *_QK_NORMS), read=fields.cohere,
        keys={**_LAYER_NORM, "logit_scale": "logit_scale"},
    ),
    "nemotron": GgufArchitecture(
        "nemotron", _UNGATED, keys={"attention.layer_norm_epsilon": "norm_eps"},
        rotary="partial_rotary_factor", added=1.0,
    ),
    "apertus": GgufArchitecture(
        "apertus", _UNGATED, ("attention_layernorm", "feedforward_layernorm", *_QK_NORMS),
        keys=_RMS, stated=_XIELU, divided=True, read=fields.apertus,
    ),
    "jais2": GgufArchitecture("jais2", _UNGATED, keys=_LAYER_NORM),
    "cohere2": GgufArchitecture(
        "cohere2", others=("input_layernorm",),
        keys={**_LAYER_NORM, "logit_scale": "logit_scale",
              "attention.sliding_window": "sliding_window"},
    ),
    "granite": GgufArchitecture(
        "granite", divided=True, permuted=True,
        keys={**_RMS, "attention.scale": "attention_multiplier",
              "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
              "logit_scale": "logits_scaling"},
    ),
    "arcee": GgufArchitecture("arcee", _UNGATED, divided=True, permuted=True, keys=_RMS),
    "smollm3": GgufArchitecture("smollm3", permuted=True, keys=_RMS),
    "ernie4_5": GgufArchitecture("ernie4_5", keys=_RMS),
    "olmo": GgufArchitecture(
        "olmo", others=(), permuted=True, keys={**_LAYER_NORM, "attention.clamp_kqv": "clip_qkv"}
    ),
    "olmo2": GgufArchitecture("olmo2", others=(*_AFTER, *_QK_NORMS), keys=_RMS),
    "seed_oss": GgufArchitecture("seed_oss", keys=_RMS),
    "stablelm": GgufArchitecture(
        "stablelm", keys={**_LAYER_NORM, "use_parallel_residual": "use_parallel_residual"},
        rotary="partial_rotary_factor",
    ),
    "gptneox": GgufArchitecture(
        "gpt_neox",
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        stack="gpt_neox.layers",
        outer=("gpt_neox.embed_in", "embed_out", "gpt_neox.final_layer_norm"),
        by_head=True,
        keys={**_LAYER_NORM, "use_parallel_residual": "use_parallel_residual"}, rotary="rotary_pct",
    ),
    "phi2": GgufArchitecture(
        "phi", (*_ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2"), ("input_layernorm",),
        outer=("model.embed_tokens", "lm_head", "model.final_layernorm"),
        keys=_LAYER_NORM, rotary="partial_rotary_factor",
    ),
    "gemma": GgufArchitecture("gemma", keys=_RMS, added=1.0),
    "gemma2": GgufArchitecture("gemma2", others=_FOUR, keys=_GEMMA, added=1.0, whole_at=46),
    "gemma3": GgufArchitecture(
        "gemma3_text",
        others=(*_FOUR, *_QK_NORMS),
        keys={**_GEMMA, "rope.freq_base_swa": "rope_local_base_freq",
              "attention.sliding_window_pattern": "sliding_window_pattern"},
        added=1.0,
        whole_at=62,
    ),
    "gemma4": GgufArchitecture(
        "gemma4_text",
        (*_DENSE, "per_layer_input_gate", "per_layer_projection", "router.proj"),
        (*_FOUR, *_QK_NORMS, *_AROUND, "post_per_layer_input_norm", "experts.gate_up_proj",
         "experts.down_proj"),
        {"layer_output_scale.weight": "layer_scalar", "ffn_gate_inp.scale": "router.scale",
         "ffn_down_exps.scale": "router.per_expert_scale"},
        experts="experts", fused=True, multiplier="router.per_expert_scale",
        unadapted=("per_layer_model_projection",),
        outer=("model.embed_tokens", "lm_head", "model.norm", "model.embed_tokens_per_layer",
               "model.per_layer_model_projection", "model.per_layer_projection_norm"),
        keys={**_RMS, "attention.sliding_window": "sliding_window",
              "final_logit_softcapping": "final_logit_softcapping",
              "embedding_length_per_layer_input": "hidden_size_per_layer_input"},
        own=("attention.sliding_window_pattern", "attention.shared_kv_layers",
             "attention.key_length_swa", "attention.value_length_swa", "rope.freq_base_swa",
             "rope.dimension_count_swa", "attention.head_count_kv", "feed_forward_length",
             "expert_count", "expert_used_count", "expert_feed_forward_length"),
        read=fields.gemma4, divided=True,
    ),
    "llama4": GgufArchitecture(
        "llama4_text",
        (*_ATTENTION, *(f"feed_forward.{part}{name}_proj" for part in ("", "shared_expert.")
                        for name in ("gate", "up", "down")), "feed_forward.router"),
        (*_NORMS, *(f"feed_forward.experts.{name}_proj" for name in ("gate", "up", "down"))),
        experts="feed_forward.experts",
        keys={**_RMS, "expert_count": "num_local_experts",
              "expert_used_count": "num_experts_per_tok",
              "interleave_moe_layer_step": "interleave_moe_layer_step"},
        own=("expert_feed_forward_length", "attention.sliding_window"),
        read=fields.llama4, divided=True,
    ),
    "phi3": GgufArchitecture(
        "phi3", _FUSED, keys={**_RMS, "attention.sliding_window": "sliding_window"},
        rotary="partial_rotary_factor",
    ),
    "modern-bert": GgufArchitecture(
        "modernbert", ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"), ("attn_norm", "mlp_norm"),
        stack="layers",
        outer=("embeddings.tok_embeddings", "lm_head", "embeddings.norm", "final_norm",
               "head.dense", "head.norm", "classifier.out_proj"),
        keys={"attention.layer_norm_epsilon": "norm_eps"},
        own=(*_OF_TEXTS, "attention.sliding_window", "attention.sliding_window_pattern",
             "rope.freq_base_swa", "hidden_activation"),
        read=fields.modernbert, renamed=_NO_DECODER, encoder=("model",),
    ),
    # RoBERTa too: rows of the table of positions that no token has are left out.
    "bert": GgufArchitecture(
        "bert",
        (*(f"attention.self.{name}" for name in ("query", "key", "value")),
         "attention.output.dense", "intermediate.dense", "output.dense"),
        ("attention.output.LayerNorm", "output.LayerNorm"),
        stack="encoder.layer",
        outer=("embeddings.word_embeddings", "lm_head", "embeddings.LayerNorm",
               "embeddings.position_embeddings", "embeddings.token_type_embeddings",
               "classifier.dense", "classifier.out_proj"),
        keys=_LAYER_NORM, own=_OF_TEXTS, read=fields.bert, renamed=_NO_DECODER,
        encoder=("bert", "roberta"),
    ),
    "gpt2": GgufArchitecture(
        "gpt2", _GPT2, ("ln_1", "ln_2"), stack="transformer.h",
        outer=("transformer.wte", "lm_head", "transformer.ln_f", "transformer.wpe"),
        keys={"attention.layer_norm_epsilon": "layer_norm_epsilon"},
        turned=True,
        renamed={
            "num_hidden_layers": "n_layer", "max_position_embeddings": "n_positions",
            "hidden_size": "n_embd", "intermediate_size": "n_inner",
            "num_attention_heads": "n_head", "num_key_value_heads": None, "head_dim": None,
            "rope_theta": None,
        },
    ),
}  # fmt: skip


def gguf_architecture(metadata: Mapping[str, Any], path: Path) -> str:
    """The architecture that a file's metadata names.

    Raises:
      ValueError: it is not known here.
    """
    kind = str(metadata.get("general.architecture"))
    if kind not in GGUF_ARCHITECTURES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise ValueError(f"{path}: architecture `{kind}` is not one of {known}")
    return kind


# The gguf package fills a table of every known spelling at each call, which is slow.
@lru_cache
def their_names(architecture: str) -> dict[str, str]:
    """llama.cpp's name of each module, by Hugging Face's; those of a block without its start.

    Raises:
      ValueError: the architecture is not known here.
    """
    gguf = require("gguf")
    if architecture not in GGUF_ARCHITECTURES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise ValueError(f"architecture `{architecture}` is not one of {known}")
    row = GGUF_ARCHITECTURES[architecture]
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    # One block is enough: the names of the others differ in its number only.
    table = gguf.get_tensor_name_map(arch, 1)
    outer = {module: table[module] for module in row.outer if module in table}
    inner = (*row.linears, *row.others)
    blocks = {m: table[f"{row.stack}.0.{m}"].removeprefix("blk.0.") for m in inner}
    return {**outer, **blocks, **({row.both: FUSED} if row.experts else {})}
