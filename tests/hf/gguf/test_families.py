"""GGUF bases of many families, written under the gguf package's names as the converter does."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

import lora_jax as lora
from lora_jax import models
from lora_jax.array import leaves_by_path
from lora_jax.hf.gguf.architectures import GGUF_ARCHITECTURES
from lora_jax.hf.gguf.experts import FactorPair, multipliers, together
from lora_jax.hf.gguf.fields import Stated, short
from lora_jax.hf.gguf.file import open_gguf, read_tensor
from lora_jax.hf.gguf.lora_read import load_gguf_lora, read_gguf_lora
from lora_jax.hf.gguf.lora_write import save_gguf_lora, to_gguf, write_gguf_lora
from lora_jax.hf.gguf.names import ARCHITECTURE_OF, TIED_BY_DEFAULT, Base, read_base
from lora_jax.hf.gguf.places import stated_numbers
from lora_jax.models.families import DIALECTS
from lora_jax.models.gguf import base_of
from lora_jax.models.requantizing import save_requantized
from lora_jax.quant.array import is_quant

from tests.support.gguf_families import (
    ADDED,
    CASES,
    DIVISORS,
    ENCODERS,
    OWN,
    TOKENS,
    exported,
    write,
    write_encoder,
)
from tests.support.gguf_files import adapted, config_with

pytestmark = pytest.mark.once

QUICK = ("mixtral", "glm4_moe", "gpt_neox", "gpt2", "deepseek_v3")
EACH = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]
SLOW = ("qwen3_moe", "gemma4_text", "llama4_text")
EXPERTS = ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def test_every_family_is_tested():
    rows = GGUF_ARCHITECTURES.values()
    others = {"mixtral", "deepseek_v2", "glm4_moe_lite"}
    assert {*CASES, "modernbert", "bert"} == {r.model_type for r in rows if r.keys} | others


def test_families_whose_tables_are_heads_by_default():
    tied = {n for n, d in DIALECTS.items() if d.defaults.get("tie_word_embeddings")}
    assert set(TIED_BY_DEFAULT) == {"gpt2"} | tied & set(ARCHITECTURE_OF)


@pytest.mark.parametrize("family", EACH)
def test_a_base_is_the_model_it_was_made_of(family, tmp_path):
    model, params = write(tmp_path / "m.gguf", family)
    loaded = models.load(tmp_path / "m.gguf")
    # float32: a file may have 1 + scale, and the exponential of a delta net's rates.
    off = 2**-22 if ARCHITECTURE_OF[family] in ADDED else 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=off), loaded.params, params
    )
    got, want = loaded.apply(loaded.params, TOKENS), model.apply(params, TOKENS)
    # float32; the file rounds factors to it.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    base = base_of(loaded.config)
    # DeepSeek's file counts one head of keys, whose rows it does not reorder.
    assert read_base(tmp_path / "m.gguf")._replace(kv_heads=base.kv_heads) == base
    row = GGUF_ARCHITECTURES[ARCHITECTURE_OF[family]]
    applied = [module for module in row.linears if module not in row.unadapted]
    config = config_with(target_modules=applied[:2])
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
    with_experts = 2 if family == "llama4_text" else blocks
    assert result.weights == blocks + with_experts * 4 and 0 < result.error < 0.02
    back = models.load(tmp_path / "out.gguf")
    for got, want in zip(
        jax.tree.leaves(back.params), jax.tree.leaves(lora.merge(tree)), strict=True
    ):
        # Q8_0 rounds to 1/254 of the largest number of a block, by a scale in float16.
        np.testing.assert_allclose(got, want, atol=float(jnp.abs(want).max()) / 250)


@pytest.mark.parametrize("family", EXPERTS)
def test_adapters_of_experts_are_those_of_their_tensors(family, tmp_path):
    """Each expert's matrix in the file is changed by its own B·A, as `ggml_mul_mat_id` does."""
    config = config_with(
        target_modules=("q_proj",), target_parameters=("gate_up_proj", "experts.down_proj"),
        rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 3},
    )  # fmt: skip
    file, adapter, theirs = exported(tmp_path, family, config)
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


@pytest.mark.parametrize("family", ["mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in (
    "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3", "qwen3_next", "qwen3_5_moe_text",
))])  # fmt: skip
def test_adapters_of_routers_are_those_of_their_tensors(family, tmp_path):
    """llama.cpp multiplies with a router as with every weight, by its `build_lora_mm`."""
    shared = family.startswith(("qwen2", "qwen3_n", "qwen3_5"))
    config = config_with(target_modules=("o_proj", "mlp.gate"))
    if shared:
        config = dataclasses.replace(
            config,
            target_modules=(*config.target_modules, "shared_expert_gate"),
            rank_pattern={"shared_expert_gate": 1},
        )
    file, adapter, theirs = exported(tmp_path, family, config)
    for name in ("inp", *(("inp_shexp",) if shared else ())):
        weight = f"blk.1.ffn_gate_{name}.weight"
        a, b = (read_tensor(adapter, f"{weight}.lora_{x}") for x in "ab")
        change = adapter.metadata["adapter.lora.alpha"] / b.shape[1] * (b @ a)
        assert np.abs(change).max() > 1e-3
        own = read_tensor(file, weight)
        np.testing.assert_allclose(
            own + change.reshape(own.shape), theirs[weight].reshape(own.shape), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_gate_and_up_of_experts_may_be_one_tensor_of_a_file(family, tmp_path):
    """As `convert_hf_to_gguf.py --fuse-gate-up-exps` writes them; llama.cpp adapts the one."""
    model, params = write(tmp_path / "m.gguf", family, fused=True)
    loaded = models.load(tmp_path / "m.gguf")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    base = base_of(loaded)
    assert base.fused and base == read_base(tmp_path / "m.gguf")
    assert not base_of(model.config).fused
    config = config_with(target_parameters=("gate_up_proj", "experts.down_proj"))
    tree = adapted(loaded, config)
    save_gguf_lora(tmp_path / "a.gguf", tree, config, base=base)
    file = open_gguf(tmp_path / "a.gguf", kind="adapter")
    experts = {name for name in file.tensors if name.startswith("blk.0.ffn")}
    assert experts == {
        f"blk.0.ffn_{x}_exps.weight.lora_{y}" for x in ("gate_up", "down") for y in "ab"
    }
    back, _ = load_gguf_lora(tmp_path / "a.gguf", loaded.apply, loaded.params, TOKENS, base=base)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    with pytest.raises(ValueError, match="`blk.0.ffn_gate_up_exps.weight.lora_a` has no place"):
        read_gguf_lora(tmp_path / "a.gguf", base=base_of(model.config))


def test_adapters_of_gate_and_up_apart_are_one_of_both_ranks():
    draw = np.random.default_rng(0)
    gate, up = (
        FactorPair(draw.normal(size=(4, r, 8)), draw.normal(size=(4, 6, r)), alpha)
        for r, alpha in ((2, 3.0), (3, 5.0))
    )
    alike = gate._replace(b=draw.normal(size=(4, 6, 2)), alpha=5.0)  # but for its scale
    both = [{"gate_proj": gate, "up_proj": x} for x in (up, alike)]
    for given in (*both, {"gate_proj": gate}, {"up_proj": up}):
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
    config = config_with(target_modules=("w1", "w2", "w3"), rank=2)
    alpha, found, _ = to_gguf(tensors, config, base)
    for key, want in tensors.items():
        if key.endswith("lora_A.weight"):
            expert, name = key.split(".")[-4:-2]
            part = {"w1": "gate", "w3": "up", "w2": "down"}[name]
            a, b = (found[f"blk.0.ffn_{part}_exps.weight.lora_{x}"][int(expert)] for x in "ab")
            change = tensors[key.replace("lora_A", "lora_B")] @ want * config_with().alpha / 2
            # float32
            np.testing.assert_allclose(alpha / len(a) * (b @ a), change, rtol=1e-5, atol=1e-5)


STATED_OF = {
    family: {
        "block_count": 4, "expert_count": 4, "rope.freq_base": 500.0,
        **OWN[family],
    }
    for family in ("gemma4_text", "llama4_text")
}  # fmt: skip
LATER = {"block_count": 5, "nextn_predict_layers": 1, "attention.recurrent_layers": None}


@pytest.mark.parametrize(
    ("family", "change", "want"),
    [
        ("gemma4_text", {}, {}),
        ("gemma4_text", {"feed_forward_length": 64}, {"use_double_wide_mlp": False}),
        ("llama4_text", {}, {"no_rope_layers": [1, 1, 1, 0], "use_qk_norm": True}),
        ("llama4_text", {"expert_count": 128}, {"use_qk_norm": False}),
        ("qwen3_next", {}, {"num_hidden_layers": 3}),
        (
            "qwen3_next",
            LATER,
            {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
        ),
        ("deepseek_v2", {}, {"model_type": "deepseek_v2", "topk_method": "greedy"}),
        ("deepseek_v2", {"expert_group_count": 1}, {"topk_method": "greedy"}),
        ("deepseek_v2", {"expert_group_count": 2}, {"topk_method": "group_limited_greedy"}),
        ("glm4_moe_lite", {}, {"model_type": "deepseek_v3"}),
    ],
)
def test_a_file_states_the_fields_of_config_json(family, change, want):
    own: Any = STATED_OF.get(family, OWN[family])
    facts = {"block_count": 3, "attention.head_count": 4, **own}
    facts = {key: value for key, value in {**facts, **change}.items() if value is not None}
    shapes = {"model.embed_tokens.weight": (64, 32)}
    if family == "glm4_moe_lite":  # whose older files do not say that it is a sigmoid
        shapes |= {"model.layers.1.mlp.gate.e_score_correction_bias": (4,)}
    divisors = np.array(DIVISORS.get(family, []), np.float32)
    found = GGUF_ARCHITECTURES[ARCHITECTURE_OF[family]].read(Stated(facts, shapes, divisors))
    # A head of DeepSeek's keys is what rotates of it.
    known = {k: v for k, v in CASES[family].items() if k != "head_dim" or "v_head_dim" not in found}
    want = {**known, **want}
    assert {k: v for k, v in found.items() if k in want} == {k: want[k] for k in found if k in want}


def test_a_number_is_the_shortest_with_its_float32():
    assert short(float(np.float32(1e-5))) == 1e-5


BLOCKS = "`attention.sliding_window_pattern` must have a whole number for each of 4 blocks"


@pytest.mark.parametrize(
    ("family", "change", "text"),
    [
        ("gemma4_text", {"attention.sliding_window_pattern": [1, 1, 1, 1]}, "the last block has a"),
        ("gemma4_text", {"attention.sliding_window_pattern": None}, BLOCKS),
        ("gemma4_text", {"attention.key_length_swa": 0}, "must be a whole number above 0, got 0"),
        ("gemma4_text", {"rope.dimension_count_swa": 4}, "over a part of each head of blocks"),
        ("gemma4_text", {"rope.freq_base_swa": "a"}, "`rope.freq_base_swa` must be a number"),
        ("gemma4_text", {"feed_forward_length": [64, 128, 64, 64]}, "is not supported"),
        ("gemma4_text", {"attention.head_count_kv": [2, 1, 4, 1]}, "is not supported"),
        ("gemma4_text", None, "`rope_freqs.weight` is missing"),
        ("llama4_text", {"attention.sliding_window": 0}, "cuts no text, is not supported"),
        ("llama4_text", {"expert_feed_forward_length": [1]}, "must be a whole number above 0"),
    ],
)
def test_what_a_file_states_otherwise_is_checked(family, change, text):
    read = GGUF_ARCHITECTURES[ARCHITECTURE_OF[family]].read
    divisors = np.array(DIVISORS[family], np.float32)
    facts, shapes = STATED_OF[family], {"model.embed_tokens.weight": (64, 32)}
    assert read(Stated(facts, shapes, divisors))
    divisors = None if change is None else divisors
    with pytest.raises(ValueError, match=re.escape(text)):
        read(Stated({**facts, **(change or {})}, shapes, divisors))


def test_adapters_of_gemma4s_experts_need_the_base(tmp_path):
    """llama.cpp multiplies an expert's result by a number of the base before it adds an adapter."""
    base, rng = Base("gemma4", 1, 4, 2, 64, True), np.random.default_rng(0)
    module = "base_model.model.model.layers.0.experts"
    a, b = rng.normal(size=(4 * 2, 6)), rng.normal(size=(8, 2 * 4))
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    config = config_with(target_modules=(), target_parameters=("experts.down_proj",), rank=2)
    with pytest.raises(ValueError, match="the base's weights are needed"):
        to_gguf(tensors, config, base)
    params = {"model": {"layers": {"router": {"per_expert_scale": np.array([[1.0, 2, 0, -0.5]])}}}}
    by = multipliers(params, GGUF_ARCHITECTURES["gemma4"])
    content = to_gguf(tensors, config, base, by)
    for e, number in enumerate((1, 2, 0, -0.5)):
        found = content.tensors["blk.0.ffn_down_exps.weight.lora_b"][e]
        np.testing.assert_allclose(found, number * b[:, e::4], rtol=1e-6)  # float32
    write_gguf_lora(tmp_path / "a.gguf", content, base)
    with pytest.raises(ValueError, match="the base's weights are needed"):
        read_gguf_lora(tmp_path / "a.gguf", base=base)
    _, back = read_gguf_lora(tmp_path / "a.gguf", base=base, params=params)
    want = b.copy()
    want[:, 2::4] = 0  # whatever its adapter, this expert gives nothing
    np.testing.assert_allclose(back[f"{module}.lora_B.weight"], want, rtol=1e-6)
    np.testing.assert_allclose(back[f"{module}.lora_A.weight"], a, rtol=1e-6)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_the_model_it_was_made_of(kind, tmp_path):
    model, params = write_encoder(tmp_path / "m.gguf", kind, ENCODERS[kind])
    loaded = models.load(tmp_path / "m.gguf")
    want, got = leaves_by_path(params), leaves_by_path(loaded.params)
    table = "embeddings.position_embeddings.embedding"
    if kind == "roberta":  # its first rows are of no token
        want[table] = want[table][2:]
    assert {*got} == {path for path in want if not path.startswith("pooler")}
    for path, x in got.items():
        np.testing.assert_array_equal(x, want[path])
    tokens = TOKENS + 2  # no padding, which RoBERTa's positions leave out
    ours, theirs = loaded.apply(loaded.params, tokens), model.apply(params, tokens)
    # float32, of programs with other layouts of the table.
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    base = base_of(loaded.config)
    assert (
        read_base(tmp_path / "m.gguf")
        == base
        == base_of(model.config)._replace(vocab_size=base.vocab_size)
    )
    row = GGUF_ARCHITECTURES[base.architecture]
    for targets in (row.linears, row.linears[-1:]):
        config = config_with(target_modules=rf".*\d\.({'|'.join(targets)})")
        tree = adapted(loaded, config)
        save_gguf_lora(tmp_path / "a.gguf", tree, config, base=base)
        back, _ = load_gguf_lora(
            tmp_path / "a.gguf", loaded.apply, loaded.params, TOKENS, base=base
        )
        jax.tree.map(np.testing.assert_array_equal, back, tree)
    with pytest.raises(ValueError, match="pass `fresh_head`"):
        models.load_encoder(tmp_path / "m.gguf", task="token-classification")


def test_an_encoders_file_is_held_given_a_head_and_merged(tmp_path):
    write_encoder(tmp_path / "m.gguf", "modernbert", {}, GGMLQuantizationType.Q8_0)
    head: Any = dict(labels=("a", "b", "c"), fresh_head=jax.random.key(0))
    held, floats = (models.load(tmp_path / "m.gguf", quantize=q, **head) for q in ("file", None))
    jax.tree.map(np.testing.assert_array_equal, lora.dequantize(held.params), floats.params)
    assert held.apply(held.params, TOKENS).shape == (2, 3)
    blocks = [x for x in leaves_by_path(held.params).values() if is_quant(x)]
    assert len(blocks) == 9 and {x.format for x in blocks} == {"int8"}


@pytest.mark.parametrize(
    "kind, fact, text",
    [
        ("modernbert", {"attention.causal": True}, "`attention.causal` is true"),
        ("modernbert", {"attention.sliding_window_pattern": 0}, "must be a whole number above 0"),
        ("bert", {"token_types": None}, "`token_types.weight` is missing, and `tokenizer.ggml"),
    ],
)
def test_encoders_that_are_not_read_are_refused(kind, fact, text, tmp_path):
    write_encoder(tmp_path / "m.gguf", kind, {}, facts=fact)
    with pytest.raises(ValueError, match=text):
        models.load(tmp_path / "m.gguf")


def test_adapters_of_an_encoder_have_its_names_inside_a_head(tmp_path):
    rng, base = np.random.default_rng(0), Base("modern-bert", 2, 4, 4, 64, False)
    config = config_with(target_modules=("Wqkv",), rank=2, alpha=2)
    a, b = rng.normal(size=(2, 8)), rng.normal(size=(24, 2))
    for start in ("layers", "model.layers"):  # alone, or inside a model with a head
        name = f"base_model.model.{start}.1.attn.Wqkv"
        found = to_gguf({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, config, base)
        assert set(found.tensors) == {f"blk.1.attn_qkv.weight.lora_{x}" for x in "ab"}
    write_gguf_lora(tmp_path / "a.gguf", found, base)
    _, back = read_gguf_lora(tmp_path / "a.gguf", base=base)
    assert set(back) == {f"base_model.model.layers.1.attn.Wqkv.lora_{x}.weight" for x in "AB"}


@pytest.mark.parametrize("family", ["qwen2", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_divisors_of_frequencies_that_llama_cpp_does_not_read_are_refused(family, tmp_path):
    """llama.cpp counts the tensors that it reads: it refuses a file with others."""
    write(tmp_path / "m.gguf", family, more={"rope_freqs.weight": np.ones(4, np.float32)})
    with pytest.raises(ValueError, match="tensor `rope_freqs.weight` has no place in a decoder"):
        models.load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "tensor, shape", [("attn_v_b", (64, 32)), ("attn_v_b", (4, 16, 32, 1)), ("attn_k_b", (32, 32))]
)
def test_halves_that_do_not_fit_are_one_sentence(tensor, shape, tmp_path):
    more = {f"blk.0.{tensor}.weight": np.ones(shape, np.float32)}
    write(tmp_path / "m.gguf", "deepseek_v3", more=more)
    with pytest.raises(ValueError, match=r"m.gguf: the two tensors of `self_attn.kv_b_proj` have"):
        models.load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", pytest.param("qwen3_moe", marks=pytest.mark.slow)]
)
def test_queries_keys_and_values_in_one_tensor(family, tmp_path):
    """As `convert_hf_to_gguf.py --fuse-qkv` writes them."""
    (tmp_path / "floats").mkdir()
    _, params = write(tmp_path / "floats/m.gguf", family, one_qkv=True)
    loaded = models.load(tmp_path / "floats/m.gguf")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    path = tmp_path / "m.gguf"
    write(path, family, GGMLQuantizationType.Q8_0, one_qkv=True)
    held, floats = models.load(path, quantize="file"), models.load(path)
    jax.tree.map(np.testing.assert_array_equal, lora.dequantize(held.params), floats.params)
    config = config_with(target_modules=("k_proj",))
    tree = adapted(held, config)
    save_requantized(tmp_path / "out.gguf", held, tree)
    back, merged = models.load(tmp_path / "out.gguf").params, lora.merge(tree)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(merged), strict=True):
        # Q8_0 rounds to 1/254 of the largest number of a block, by a scale in float16.
        np.testing.assert_allclose(got, want, atol=float(jnp.abs(want).max()) / 250)
    assert read_base(path).fused_qkv
    with pytest.raises(ValueError, match="in one tensor, beside which llama.cpp takes no adapter"):
        save_gguf_lora(tmp_path / "a.gguf", tree, config, base=base_of(held))


def test_one_tensor_of_other_sizes_is_refused(tmp_path):
    write(tmp_path / "m.gguf", "llama", one_qkv=True, more={
        "blk.0.attn_qkv.weight": np.ones((60, 32), np.float32)
    })  # fmt: skip
    with pytest.raises(ValueError, match="`blk.0.attn_qkv.weight` has 60 rows, expected 64, those"):
        models.load(tmp_path / "m.gguf")


def test_a_distilbert_is_read_as_a_bert_of_one_type(tmp_path):
    model, params = write_encoder(tmp_path / "m.gguf", "distilbert", {})
    loaded = models.load_encoder(tmp_path / "m.gguf")
    assert loaded.config.model_type == "bert" and loaded.config.type_vocab_size == 1
    mask = jnp.arange(8) < jnp.array([[8], [5]])
    (got, _), (want, _) = (
        m.apply(p, TOKENS, mask=mask) for m, p in ((loaded, loaded.params), (model, params))
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("value", [[0.5], [0.5, "a"], [0.5, np.inf], None])
def test_numbers_of_blocks_that_are_missing_are_refused(value, tmp_path):
    write(tmp_path / "m.gguf", "apertus")
    file = open_gguf(tmp_path / "m.gguf")
    stated = {**file.metadata, "xielu.alpha_p": value}
    with pytest.raises(ValueError, match="m.gguf: `xielu.alpha_p` must be a number for each of 2"):
        stated_numbers(file._replace(metadata=stated))
    same = stated_numbers(file._replace(metadata={**file.metadata, "xielu.alpha_p": 0.5}))
    assert same["model.layers.1.mlp.act_fn.alpha_p"] == [0.5]
