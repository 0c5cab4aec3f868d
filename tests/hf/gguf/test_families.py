"""GGUF bases of many families, written under the gguf package's names as the converter does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, quants
from gguf.tensor_mapping import get_tensor_name_map

import lora_jax as lora
from lora_jax import models
from lora_jax.hf.checkpoint.safetensors import load_file
from lora_jax.hf.gguf.architectures import GGUF_ARCHITECTURES
from lora_jax.hf.gguf.experts import FactorPair, together
from lora_jax.hf.gguf.file import open_gguf, read_tensor
from lora_jax.hf.gguf.lora_read import load_gguf_lora
from lora_jax.hf.gguf.lora_write import save_gguf_lora, to_gguf
from lora_jax.hf.gguf.names import ARCHITECTURE_OF, Base
from lora_jax.models.gguf import base_of
from lora_jax.models.registry import config_from_hf
from lora_jax.models.requantizing import save_requantized
from lora_jax.models.saving import save_model

from tests.support.gguf_files import adapted, config_with, writing

pytestmark = pytest.mark.once

TOKENS = jnp.arange(16).reshape(2, 8) % 64
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)  # fmt: skip
GROUPED = dict(SIZES, num_key_value_heads=2)
MOE = dict(GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
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
    "cohere2": dict(GROUPED, sliding_window=4, num_hidden_layers=4, logit_scale=0.5),
    "granite": dict(
        GROUPED, embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=1.5,
        attention_multiplier=0.2,
    ),
    "arcee": GROUPED,
    "smollm3": dict(GROUPED, num_hidden_layers=4),
    "ernie4_5": dict(GROUPED, head_dim=8),
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
    "phi": dict(SIZES, num_key_value_heads=4, partial_rotary_factor=0.5),
    "gpt2": dict(
        vocab_size=64, n_embd=32, n_inner=96, n_layer=2, n_head=4, n_positions=64, eos_token_id=2
    ),
}  # fmt: skip
QUICK = ("mixtral", "glm4_moe", "gpt_neox", "gpt2")
EACH = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]
SLOW = ("qwen3_moe", "gemma4_text")
EXPERTS = ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
# llama.cpp's key of each size -> config.json's field.
STATED = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.value_length": "head_dim",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta", "block_count": "num_hidden_layers",
}  # fmt: skip
# What the converter writes otherwise than config.json has it.
OWN = {
    "gemma4_text": {
        "feed_forward_length": [64, 64, 128, 128], "attention.head_count_kv": [2, 1, 2, 1],
        "attention.key_length": 16, "attention.value_length": 16, "attention.key_length_swa": 8,
        "attention.value_length_swa": 8, "rope.dimension_count": 16, "rope.dimension_count_swa": 8,
        "rope.freq_base": 500.0, "rope.freq_base_swa": 300.0, "attention.shared_kv_layers": 2,
        "attention.sliding_window_pattern": [True, False, True, False], "expert_count": 4,
        "expert_used_count": 2, "expert_feed_forward_length": 64,
    },
}  # fmt: skip
# The divisors of the frequencies that rotate, and of the others.
DIVISORS = {"gemma4_text": [1.0] * 4 + [1e30] * 4}
# Tensors that are no weight of a module there.
ODD = {
    "layer_scalar": "layer_output_scale.weight", "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
}  # fmt: skip
PARTIAL = ("partial_rotary_factor", "rotary_pct")


def as_converter(tensors, config, arch):
    """Hugging Face's tensors under llama.cpp's names, in its order of rows, experts together."""
    kind = next(a for a, name in MODEL_ARCH_NAMES.items() if name == arch)
    table = get_tensor_name_map(kind, config.num_hidden_layers)
    experts, out = {}, {}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, x in tensors.items():
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        if ".experts." in name:
            before, _, after = name.partition(".experts.")
            number, _, rest = after.partition(".")
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
        if arch in ("llama", "granite", "arcee", "smollm3") and part in heads:
            x = x.reshape(heads[part], 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        if arch == "gpt2" and part.startswith("c_") and name.endswith(".weight"):
            x = x.T
        if part == "query_key_value":
            x = x.reshape(4, 3, 8, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
        if arch in ("gemma", "gemma2", "gemma3") and name.endswith("norm.weight"):
            x = x + 1
        out[table.get_name(name, try_suffixes=(".weight", ".bias"))] = x
    for name, each in experts.items():
        stacked = np.stack([each[n] for n in sorted(each)])
        out[table.get_name(name, try_suffixes=(".weight",))] = stacked
    assert None not in out
    return out


def write(path, family, kind=GGMLQuantizationType.F32):
    """A random model, and the file of it."""
    config, arch = config_from_hf({**CASES[family], "model_type": family}), ARCHITECTURE_OF[family]
    raw, model = config.to_hf(), models.init(jax.random.key(0), config)
    keys = iter(jax.random.split(jax.random.key(1), 200))
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), model.params)
    save_model(path.parent / "hf", model, params)
    tensors = as_converter(load_file(path.parent / "hf/model.safetensors"), model.config, arch)
    row = GGUF_ARCHITECTURES[arch]
    stated = {**STATED, **{key: field for key, field in row.keys.items()}}
    if family == "mixtral":
        stated |= {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
    if family in DIVISORS:
        tensors["rope_freqs.weight"] = np.array(DIVISORS[family], np.float32)
    with writing(path, arch) as writer:
        each = {key: {**CASES[family], **raw}.get(row.renamed.get(field, field))
                for key, field in stated.items()} | OWN.get(family, {})  # fmt: skip
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
               list: writer.add_array}  # fmt: skip
        for key, value in each.items():
            if value is not None:
                add[type(value)](f"{arch}.{key}", value)
        if row.rotary:
            writer.add_rope_dimension_count(model.config.rotary_dim)
        writer.add_eos_token_id(2)
        for name, x in tensors.items():
            own = kind if x.ndim > 1 else GGMLQuantizationType.F32
            writer.add_tensor(name, quants.quantize(np.ascontiguousarray(x), own), raw_dtype=own)
    return model, params


def test_every_family_is_tested():
    rows = GGUF_ARCHITECTURES.values()
    assert set(CASES) == {row.model_type for row in rows} | {"mixtral"}


@pytest.mark.parametrize("family", EACH)
def test_a_base_is_the_model_it_was_made_of(family, tmp_path):
    model, params = write(tmp_path / "m.gguf", family)
    loaded = models.load(tmp_path / "m.gguf")
    # float32: of Gemma's norms the file has 1 + scale.
    off = 2**-23 if family in ("gemma", "gemma2", "gemma3_text") else 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=off), loaded.params, params
    )
    got, want = loaded.apply(loaded.params, TOKENS), model.apply(params, TOKENS)
    # float32; the file rounds factors to it.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    config = config_with(target_modules=GGUF_ARCHITECTURES[ARCHITECTURE_OF[family]].linears[:2])
    tree = adapted(loaded, config)
    save_gguf_lora(tmp_path / "a.gguf", tree, config, base=base_of(loaded.config))
    back, _ = load_gguf_lora(
        tmp_path / "a.gguf", loaded.apply, loaded.params, TOKENS, base=base_of(loaded.config)
    )
    jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_held_and_merged_into_their_blocks(family, tmp_path):
    write(tmp_path / "m.gguf", family, GGMLQuantizationType.Q8_0)
    held = models.load(tmp_path / "m.gguf", quantize="file")
    floats = models.load(tmp_path / "m.gguf")
    jax.tree.map(np.testing.assert_array_equal, lora.dequantize(held.params), floats.params)
    config = config_with(target_modules=("q_proj",), target_parameters=("experts.down_proj",))
    tree = adapted(held, config)
    result = save_requantized(tmp_path / "out.gguf", held, tree)
    blocks = held.config.num_hidden_layers
    assert result.weights == blocks * (1 + 4) and 0 < result.error < 0.02
    back = models.load(tmp_path / "out.gguf")
    for got, want in zip(
        jax.tree.leaves(back.params), jax.tree.leaves(lora.merge(tree)), strict=True
    ):
        # Q8_0 rounds to 1/254 of the largest number of a block, by a scale in float16.
        np.testing.assert_allclose(got, want, atol=float(jnp.abs(want).max()) / 250)


@pytest.mark.parametrize("family", EXPERTS)
def test_adapters_of_experts_are_those_of_their_tensors(family, tmp_path):
    """Each expert's matrix in the file is changed by its own B·A, as `ggml_mul_mat_id` does."""
    model, params = write(tmp_path / "m.gguf", family)
    config = config_with(
        target_modules=("q_proj",), target_parameters=("gate_up_proj", "experts.down_proj"),
        rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 3},
    )  # fmt: skip
    tree, base = adapted(models.Model(model.forward, params), config), base_of(model.config)
    save_gguf_lora(tmp_path / "a.gguf", tree, config, base=base)
    back, _ = load_gguf_lora(tmp_path / "a.gguf", model.apply, params, TOKENS, base=base)
    for got, want in zip(*(jax.tree.leaves(lora.merge(t)) for t in (back, tree)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)  # alphas are folded into B
    save_model(tmp_path / "merged", model, lora.merge(tree))
    merged = load_file(tmp_path / "merged/model.safetensors")
    theirs = as_converter(merged, model.config, base.architecture)
    file, adapter = open_gguf(tmp_path / "m.gguf"), open_gguf(tmp_path / "a.gguf", kind="adapter")
    gate_up = ("gate_up",) if family == "gemma4_text" else ("gate", "up")
    for name in (*gate_up, "down"):
        weight = f"blk.1.ffn_{name}_exps.weight"
        a, b = (read_tensor(adapter, f"{weight}.lora_{x}") for x in "ab")
        scale = adapter.metadata["adapter.lora.alpha"] / b.shape[2]
        # What llama.cpp multiplies an expert's result by before it adds the adapter's.
        by = theirs.get(weight.replace("weight", "scale"), np.ones(4))[:, None, None]
        changed = read_tensor(file, weight) + scale * (b @ a) / by
        np.testing.assert_allclose(changed, theirs[weight], rtol=1e-5, atol=1e-5)
    assert a.shape[:2] == (4, 2)


def test_adapters_of_gate_and_up_apart_are_one_of_both_ranks():
    draw = np.random.default_rng(0)
    gate, up = (
        FactorPair(draw.normal(size=(4, r, 8)), draw.normal(size=(4, 6, r)), alpha)
        for r, alpha in ((2, 3.0), (3, 5.0))
    )
    for given in ({"gate_proj": gate, "up_proj": up}, {"gate_proj": gate}, {"up_proj": up}):
        pair = together({f"mlp.experts.{name}": x for name, x in given.items()})[
            "mlp.experts.gate_up_proj"
        ]
        change = pair.alpha / pair.a.shape[1] * pair.b @ pair.a
        parts = zip(("gate_proj", "up_proj"), np.split(change, 2, axis=1), strict=True)
        for name, part in parts:
            wanted = 0.0
            if name in given:
                wanted = given[name].alpha / given[name].a.shape[1] * given[name].b @ given[name].a
            np.testing.assert_allclose(part, wanted, rtol=1e-5, atol=1e-6)  # a factor in float32


def test_an_adapter_of_each_expert_is_one_of_all():
    """As releases of transformers before 5 have them, with factors of their own for gate and up."""
    base, draw, tensors = Base("llama", 1, 4, 2, 64, False), np.random.default_rng(0), {}
    for expert in range(4):
        for name, (fan_in, fan_out) in {"w1": (8, 6), "w3": (8, 6), "w2": (6, 8)}.items():
            start = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}"
            tensors[f"{start}.lora_A.weight"] = draw.normal(size=(2, fan_in))
            tensors[f"{start}.lora_B.weight"] = draw.normal(size=(fan_out, 2))
    alpha, found = to_gguf(tensors, config_with(target_modules=("w1", "w2", "w3"), rank=2), base)
    for key, want in tensors.items():
        if key.endswith("lora_A.weight"):
            expert, name = key.split(".")[-4:-2]
            part = {"w1": "gate", "w3": "up", "w2": "down"}[name]
            a, b = (found[f"blk.0.ffn_{part}_exps.weight.lora_{x}"][int(expert)] for x in "ab")
            change = tensors[key.replace("lora_A", "lora_B")] @ want * config_with().alpha / 2
            # float32
            np.testing.assert_allclose(alpha / len(a) * (b @ a), change, rtol=1e-5, atol=1e-5)
