"""GGUF files of tiny models of many families, written as llama.cpp's converter does."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, quants
from gguf.tensor_mapping import get_tensor_name_map

import lora_jax as lora
from lora_jax import models
from lora_jax.hf.checkpoint.safetensors import load_file
from lora_jax.hf.gguf.architectures import GGUF_ARCHITECTURES
from lora_jax.hf.gguf.file import open_gguf
from lora_jax.hf.gguf.lora_read import load_gguf_lora
from lora_jax.hf.gguf.lora_write import save_gguf_lora
from lora_jax.hf.gguf.names import ARCHITECTURE_OF
from lora_jax.models.gguf import base_of
from lora_jax.models.registry import config_from_hf
from lora_jax.models.rope import RopeScaling, static_frequencies
from lora_jax.models.saving import save_model

from tests.support.gguf_files import adapted, writing

TOKENS = jnp.arange(16).reshape(2, 8) % 64
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)  # fmt: skip
GROUPED = dict(SIZES, num_key_value_heads=2)
MOE = dict(GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
DELTA = dict(
    GROUPED, num_hidden_layers=3, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=16, linear_conv_kernel_dim=3,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
)  # fmt: skip
LATENT = dict(
    SIZES, kv_lora_rank=32, q_lora_rank=32, qk_nope_head_dim=24, qk_rope_head_dim=8,
    v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
    n_shared_experts=2, first_k_dense_replace=1, routed_scaling_factor=1.7, n_group=1,
    topk_group=1,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7,
    mscale_all_dim=0.7,
)  # fmt: skip
SCALED: Any = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
# Families whose models are read, with fields that are no defaults.
CASES = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": dict(GROUPED, head_dim=8),
    "mixtral": dict(GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(MOE, shared_expert_intermediate_size=64, norm_topk_prob=False),
    "qwen3_moe": dict(MOE, head_dim=8, norm_topk_prob=True),
    "olmoe": dict(GROUPED, num_experts=4, num_experts_per_tok=2),
    "glm4_moe": dict(
        GROUPED, head_dim=8, use_qk_norm=True, attention_bias=True,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, n_group=1,
        topk_group=1, routed_scaling_factor=1.7, first_k_dense_replace=1,
        num_nextn_predict_layers=0,
    ),
    "starcoder2": GROUPED,
    "cohere": dict(GROUPED, use_qk_norm=True, logit_scale=0.5, tie_word_embeddings=True),
    "nemotron": dict(GROUPED, attention_bias=True),
    "jais2": GROUPED,
    "apertus": dict(GROUPED, rope_parameters=dict(SCALED, rope_theta=5e5)),
    "dots1": dict(
        GROUPED, head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        n_shared_experts=1, first_k_dense_replace=1, sliding_window=None,
        num_nextn_predict_layers=0, routed_scaling_factor=1.7,
    ),
    "cohere2": dict(GROUPED, sliding_window=4, num_hidden_layers=4, logit_scale=0.5),
    "granite": dict(
        GROUPED, embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=1.5,
        attention_multiplier=0.2,
    ),
    "arcee": GROUPED,
    "smollm3": dict(GROUPED, num_hidden_layers=4),
    "ernie4_5": dict(GROUPED, head_dim=8),
    "olmo": dict(GROUPED, clip_qkv=0.5, layer_norm_eps=1e-5),
    "olmo2": GROUPED,
    "seed_oss": dict(GROUPED, head_dim=8),
    "stablelm": dict(GROUPED, partial_rotary_factor=0.5, use_qkv_bias=True),
    "gpt_neox": dict(SIZES, rotary_pct=0.5),
    "phi3": dict(GROUPED, partial_rotary_factor=0.5, sliding_window=4),
    "gemma": dict(GROUPED, head_dim=16),
    "gemma2": dict(
        GROUPED, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0, sliding_window=4,
    ),
    # No key states the bases of the blocks that slide, and which do: their defaults.
    "gemma3_text": dict(
        GROUPED, head_dim=16, query_pre_attn_scalar=16, sliding_window=4, num_hidden_layers=7,
        rope_theta=500.0,
    ),
    # Values that are keys, keys shared by blocks, wide MLPs after those, and experts.
    "gemma4_text": dict(
        GROUPED, head_dim=8, global_head_dim=16, num_global_key_value_heads=1, num_hidden_layers=4,
        attention_k_eq_v=True, num_kv_shared_layers=2, use_double_wide_mlp=True,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=4,
        hidden_size_per_layer_input=32, vocab_size_per_layer_input=64, final_logit_softcapping=3.0,
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=64,
        rope_parameters={
            "full_attention": dict(
                rope_type="proportional", partial_rotary_factor=0.5, rope_theta=500.0
            ),
            "sliding_attention": dict(rope_type="default", rope_theta=300.0),
        },
    ),
    "llama4_text": dict(
        GROUPED, head_dim=8, num_hidden_layers=4, num_local_experts=4, num_experts_per_tok=1,
        intermediate_size_mlp=96, interleave_moe_layer_step=2, rope_theta=5e5,
        rope_scaling=dict(
            rope_type="llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "phi": dict(SIZES, num_key_value_heads=4, partial_rotary_factor=0.5),
    "gpt2": dict(
        vocab_size=64, n_embd=32, n_inner=96, n_layer=2, n_head=4, n_positions=64, eos_token_id=2
    ),
    "qwen3_next": dict(
        DELTA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        shared_expert_intermediate_size=64, rope_theta=500.0,
    ),
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": dict(
        DELTA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    ),
    "deepseek_v2": dict(
        LATENT, q_lora_rank=None, rope_scaling=YARN, num_nextn_predict_layers=0
    ),
    # llama.cpp has no architecture of its own for it: its files are read as DeepSeek-V3's.
    "glm4_moe_lite": dict(LATENT, num_nextn_predict_layers=0),
    "deepseek_v3": dict(LATENT, n_group=2, num_nextn_predict_layers=0),
}  # fmt: skip
# llama.cpp's key of each size -> config.json's field.
STATED = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.value_length": "head_dim",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta", "block_count": "num_hidden_layers",
}  # fmt: skip
DELTA_KEYS = {
    "ssm.conv_kernel": 3, "ssm.state_size": 8, "ssm.group_count": 2, "ssm.time_step_rank": 4,
    "ssm.inner_size": 64, "attention.recurrent_layers": [True, False, True],
    "rope.dimension_sections": [1, 1, 0, 0],
}  # fmt: skip
LATENT_KEYS = {
    "attention.key_length": 40, "attention.value_length": 32, "attention.key_length_mla": 32,
    "attention.value_length_mla": 16, "attention.head_count_kv": 1, "rope.dimension_count": 8,
}  # fmt: skip
# What the converter writes otherwise than config.json has it.
OWN = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), DELTA_KEYS),
    "deepseek_v2": {
        **LATENT_KEYS, "expert_gating_func": 1, "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
        "rope.scaling.yarn_log_multiplier": 0.07,
    },
    "deepseek_v3": {**LATENT_KEYS, "expert_gating_func": 2},
    "dots1": {"expert_gating_func": 2},
    "glm4_moe_lite": LATENT_KEYS,
    "gemma4_text": {
        "feed_forward_length": [64, 64, 128, 128], "attention.head_count_kv": [2, 1, 2, 1],
        "attention.key_length": 16, "attention.value_length": 16, "attention.key_length_swa": 8,
        "attention.value_length_swa": 8, "rope.dimension_count": 16, "rope.dimension_count_swa": 8,
        "rope.freq_base": 500.0, "rope.freq_base_swa": 300.0, "attention.shared_kv_layers": 2,
        "attention.sliding_window_pattern": [True, False, True, False], "expert_count": 4,
        "expert_used_count": 2, "expert_feed_forward_length": 64,
    },
    "llama4_text": {"feed_forward_length": 96, "expert_feed_forward_length": 64,
                    "interleave_moe_layer_step": 2},
}  # fmt: skip
# The divisors of the frequencies.
DIVISORS = {
    "apertus": static_frequencies(8, 5e5, None) / static_frequencies(8, 5e5, RopeScaling(**SCALED)),
    "gemma4_text": [1.0] * 4 + [1e30] * 4,
    "llama4_text": [1.0, 1.0, 1.0, 16.0],
}
# Tensors that are no weight of a module there.
ODD = {
    "layer_scalar": "layer_output_scale.weight", "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
}  # fmt: skip
PARTIAL = ("partial_rotary_factor", "rotary_pct")


# Architectures whose files have 1 + the scales of norms.
ADDED = ("nemotron", "gemma", "gemma2", "gemma3", "qwen3next", "qwen35", "qwen35moe")


def apart(name, x, config, arch):
    """A tensor as those of a file, under the names that the gguf package's table knows."""
    module, _, last = name.partition(".linear_attn.")
    if name.endswith("kv_b_proj.weight"):
        each = x.reshape(config.num_attention_heads, -1, x.shape[1])
        key = config.head_dim - config.rotary_dim
        halves = {"k_b_proj": each[:, :key].swapaxes(1, 2), "v_b_proj": each[:, key:]}
        return {name.replace("kv_b_proj", half): y for half, y in halves.items()}
    if not last:
        return {name: x}
    heads, name = config.delta, name.replace("dt_bias", "dt_proj.bias")
    x = -np.exp(x) if last == "A_log" else x[:, 0] if last == "conv1d.weight" else x
    if last == "in_proj_qkvz.weight":
        values = heads.value_heads // heads.key_heads * heads.value_dim
        each = x.reshape(heads.key_heads, -1, x.shape[1])
        ends = np.cumsum((heads.key_dim, heads.key_dim, values))
        *qkv, gate = (y.reshape(-1, x.shape[1]) for y in np.split(each, ends, axis=1))
        halves = {"qkv": np.concatenate(qkv), "z": gate}
        return {name.replace("qkvz", half): y for half, y in halves.items()}
    if arch == "qwen3next" or last == "norm.weight":
        return {name: x}
    # The first value heads of all key heads, then the second ones.
    axis = int(last == "out_proj.weight")
    size = heads.value_dim if last.startswith(("in_proj_qkv", "in_proj_z", "conv", "out")) else 1
    rows = np.moveaxis(x, axis, 0)
    first = len(rows) - heads.value_heads * size
    turned = rows[first:].reshape(heads.key_heads, -1, size, *rows.shape[1:]).swapaxes(0, 1)
    rows = np.concatenate((rows[:first], turned.reshape(rows[first:].shape)))
    return {name: np.moveaxis(rows, 0, axis)}


def as_converter(tensors, config, arch):
    """Hugging Face's tensors under llama.cpp's names, in its order of rows, experts together."""
    kind = next(a for a, name in MODEL_ARCH_NAMES.items() if name == arch)
    table = get_tensor_name_map(kind, config.num_hidden_layers)
    experts, out = {}, {}
    tensors = {name: x for name, x in tensors.items() if ".act_fn." not in name}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    parts = {n: y for name, x in tensors.items() for n, y in apart(name, x, config, arch).items()}
    for name, x in parts.items():
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        if ".experts." in name:
            before, _, after = name.partition(".experts.")
            number, _, rest = after.partition(".")
            if arch == "llama4":  # (in, out), gate beside up
                x = x.swapaxes(1, 2)
                parts = ("gate_proj", "up_proj") if number == "gate_up_proj" else (number,)
                for part, one in zip(parts, np.split(x, len(parts), axis=1), strict=True):
                    out[f"{table.get_name(f'{before}.experts.{part}')}.weight"] = one
                continue
            if not rest:  # all of them are one tensor
                out[f"{table.get_name(name)}.weight"] = x
                continue
            experts.setdefault(f"{before}.experts.{rest}", {})[int(number)] = x
            continue
        block = re.match(r"model\.layers\.(\d+)\.", name)
        if block and (odd := ODD.get(name[block.end() :])):
            out[f"blk.{block[1]}.{odd}"] = x
            continue
        part = name.split(".")[-2]
        if arch in ("llama", "granite", "arcee", "smollm3", "olmo") and part in heads:
            x = x.reshape(heads[part], 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        if arch == "gpt2" and part.startswith("c_") and name.endswith(".weight"):
            x = x.T
        if part == "query_key_value":
            x = x.reshape(4, 3, 8, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
        added = arch in ADDED and "linear_attn" not in name
        if added and name.endswith("norm.weight"):
            x = x + 1
        out[table.get_name(name, try_suffixes=(".weight", ".bias"))] = x
    for name, each in experts.items():
        stacked = np.stack([each[n] for n in sorted(each)])
        out[table.get_name(name, try_suffixes=(".weight",))] = stacked
    assert None not in out
    return out


def write(path, family, kind=GGMLQuantizationType.F32, *, fused=False, one_qkv=False, more=None):
    """A random model, and the file of it.

    `fused` has gate and up of experts in one tensor, `one_qkv` queries, keys and values; `more` are
    tensors beside, or in place of, its own.
    """
    config, arch = config_from_hf({**CASES[family], "model_type": family}), ARCHITECTURE_OF[family]
    raw, model = config.to_hf(), models.init(jax.random.key(0), config)
    keys = iter(jax.random.split(jax.random.key(1), 200))
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), model.params)
    save_model(path.parent / "hf", model, params)
    tensors = as_converter(load_file(path.parent / "hf/model.safetensors"), model.config, arch)
    for name in [n for n in tensors if "ffn_gate_exps" in n] if fused else ():
        pair = tensors.pop(name), tensors.pop(name.replace("gate", "up"))
        tensors[name.replace("gate", "gate_up")] = np.concatenate(pair, axis=1)
    for name in [n for n in tensors if ".attn_q." in n] if one_qkv else ():
        each = [tensors.pop(name.replace("attn_q.", f"attn_{x}.")) for x in "qkv"]
        tensors[name.replace("attn_q.", "attn_qkv.")] = np.concatenate(each)
    row = GGUF_ARCHITECTURES[arch]
    numbers = {
        key: params["model"]["layers"]["mlp"]["act_fn"][key.rpartition(".")[2]].ravel().tolist()
        for key in row.stated
    }
    stated = {**STATED, **{key: field for key, field in row.keys.items()}}
    if family == "mixtral":
        stated |= {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
    if family in DIVISORS:
        tensors["rope_freqs.weight"] = np.array(DIVISORS[family], np.float32)
    tensors |= more or {}
    with writing(path, arch) as writer:
        each = {key: {**CASES[family], **raw}.get(row.renamed.get(field, field))
                for key, field in stated.items()} | OWN.get(family, {})  # fmt: skip
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
               list: writer.add_array, str: writer.add_string}  # fmt: skip
        for key, value in each.items():
            if value is not None:
                add[type(value)](f"{arch}.{key}", value)
        for key, each in numbers.items():
            writer.add_array(key, each)
        if row.rotary:
            writer.add_rope_dimension_count(model.config.rotary_dim)
        writer.add_eos_token_id(2)
        for name, x in tensors.items():
            blocks = x.ndim > 1 and not x.shape[-1] % 32
            own = kind if blocks else GGMLQuantizationType.F32
            writer.add_tensor(name, quants.quantize(np.ascontiguousarray(x), own), raw_dtype=own)
    return model, params


ENCODERS = {
    "modernbert": dict(
        local_attention=4, global_attn_every_n_layers=3, hidden_activation="silu",
        local_rope_theta=300.0,
    ),
    "bert": dict(type_vocab_size=2),
    "roberta": dict(type_vocab_size=1, pad_token_id=1),
}  # fmt: skip
# llama.cpp's key of each size of an encoder -> our field.
ENCODERS_KEYS = {
    "context_length": "context", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "block_count": "num_hidden_layers", "attention.layer_norm_epsilon": "layer_norm_eps",
}  # fmt: skip


def write_encoder(path, kind, fields, form=GGMLQuantizationType.F32, facts=None):
    """A random encoder, and its file as llama.cpp's converter writes it.

    `facts` are other values of keys; `token_types` None leaves that table out.
    """
    sizes = {**SIZES, "num_hidden_layers": 4, **fields}
    if kind == "distilbert":
        sizes = dict(vocab_size=64, dim=32, hidden_dim=64, n_layers=4, n_heads=4, pad_token_id=0)
    config = config_from_hf({**sizes, "model_type": kind})
    model = models.init(jax.random.key(0), config)
    keys = iter(jax.random.split(jax.random.key(1), 200))
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), model.params)
    save_model(path.parent / "hf", model, params)
    tensors = load_file(path.parent / "hf/model.safetensors")
    arch = ARCHITECTURE_OF.get(kind, "bert")
    enum = next(a for a, name in MODEL_ARCH_NAMES.items() if name == arch)
    table = get_tensor_name_map(enum, config.num_hidden_layers)
    stated = {key: getattr(config, field) for key, field in ENCODERS_KEYS.items()}
    stated |= {"attention.causal": False}
    if kind == "modernbert":
        own = config.own
        stated |= {
            "attention.sliding_window": own.window, "attention.sliding_window_pattern": 3,
            "rope.freq_base_swa": own.thetas[0], "rope.freq_base": own.thetas[1],
            "rope.scaling.type": "none", "hidden_activation": config.hidden_act,
        }  # fmt: skip
    changed = dict(facts or {})
    left_out = "token_types" in changed and changed.pop("token_types") is None
    with writing(path, arch) as writer:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
               str: writer.add_string}  # fmt: skip
        for key, value in {**stated, **changed}.items():
            add[type(value)](f"{arch}.{key}", value)
        writer.add_token_type_count(1 if kind == "distilbert" else 2)
        for name, x in tensors.items():
            if name.startswith("pooler.") or left_out and "token_type" in name:
                continue
            if kind == "roberta" and "position_embeddings" in name:
                x = x[config.pad_token_id + 1 :]
            own = form if x.ndim > 1 and not x.shape[-1] % 32 else GGMLQuantizationType.F32
            theirs = str(table.get_name(name, try_suffixes=(".weight", ".bias")))
            writer.add_tensor(theirs, quants.quantize(x, own), raw_dtype=own)
    return model, params


def exported(folder, family, config):
    """An adapter of a model of a family, in a GGUF file that reads back as the same change.

    Returns:
      The base's file, the adapter's, and the merged tensors as the converter writes them.
    """
    model, params = write(folder / "m.gguf", family)
    tree, base = adapted(models.Model(model.forward, params), config), base_of(model.config)
    save_gguf_lora(folder / "a.gguf", tree, config, base=base)
    back, _ = load_gguf_lora(folder / "a.gguf", model.apply, params, TOKENS, base=base)
    for got, want in zip(*(jax.tree.leaves(lora.merge(t)) for t in (back, tree)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)  # alphas are folded into B
    save_model(folder / "merged", model, lora.merge(tree))
    merged = load_file(folder / "merged/model.safetensors")
    theirs = as_converter(merged, model.config, base.architecture)
    return open_gguf(folder / "m.gguf"), open_gguf(folder / "a.gguf", kind="adapter"), theirs
