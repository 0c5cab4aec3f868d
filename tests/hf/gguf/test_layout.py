"""Weights that llama.cpp has in another order or in two tensors: their blocks and adapters."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType

import lora_jax as lora
from lora_jax import models
from lora_jax.hf.gguf.file import open_gguf, read_tensor
from lora_jax.hf.gguf.layout import DeltaHeads, row_order
from lora_jax.hf.gguf.lora_read import read_gguf_lora
from lora_jax.hf.gguf.lora_write import Content, to_gguf, write_gguf_lora
from lora_jax.hf.gguf.names import Base
from lora_jax.hf.gguf.weights import weights_of
from lora_jax.models.requantizing import save_requantized

from tests.support.gguf_families import apart, exported, write
from tests.support.gguf_files import adapted, config_with, writing

HEADS = DeltaHeads(2, 4, 32, 64)
FIELDS = dict(key_heads=2, value_heads=4, key_dim=32, value_dim=64)
Q4_K, Q5_K, Q6_K = (GGMLQuantizationType[name] for name in ("Q4_K", "Q5_K", "Q6_K"))


def k_quants(draw, rows, blocks, kind):
    """Random blocks, whose scales are finite."""
    size, scales = {Q4_K: (144, [0, 2]), Q5_K: (176, [0, 2]), Q6_K: (210, [208])}[kind]
    raw = draw.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in scales:
        raw[..., at : at + 2] = (
            draw.normal(size=(rows, blocks, 1)).astype(np.float16).view(np.uint8)
        )
    return raw.reshape(rows, -1)


def delta_file(path, arch, tensors):
    """A file with the heads of its delta nets, and some tensors."""
    with writing(path, arch) as writer:
        writer.add_block_count(1)
        writer.add_head_count(4)
        writer.add_ssm_state_size(HEADS.key_dim)
        writer.add_ssm_group_count(HEADS.keys)
        writer.add_ssm_time_step_rank(HEADS.values)
        writer.add_ssm_inner_size(HEADS.values * HEADS.value_dim)
        for name, (raw, kind) in tensors.items():
            writer.add_tensor(f"blk.0.{name}.weight", raw, raw_dtype=kind)
    return weights_of(open_gguf(path))


@pytest.mark.parametrize("gate", [Q4_K, Q5_K, Q6_K])
def test_two_tensors_are_held_as_one_where_one_type_has_both(gate, tmp_path):
    """Q4_K_M has the first in Q5_K and the second in Q4_K."""
    draw, name = np.random.default_rng(0), "model.layers.0.linear_attn.in_proj_qkvz.weight"
    rows = 2 * HEADS.keys * HEADS.key_dim + HEADS.values * HEADS.value_dim
    tensors = {
        "attn_qkv": (k_quants(draw, rows, 2, Q5_K), Q5_K),
        "attn_gate": (k_quants(draw, HEADS.values * HEADS.value_dim, 2, gate), gate),
    }
    weights = delta_file(tmp_path / "m.gguf", "qwen3next", tensors)
    assert list(weights.shapes) == [name]
    if gate == Q6_K:
        assert not weights.formats
        return
    assert weights.formats[name].format == "q5_k"
    part = slice(100, 300), slice(256, 512)
    for each in ((), part):
        held = weights.blocks(name, each).dequantize()
        np.testing.assert_array_equal(held, weights.read(name, each))
    # The file's own numbers in Hugging Face's order, taken apart again.
    config = SimpleNamespace(delta=SimpleNamespace(**FIELDS))
    parts = apart(name, weights.read(name), config, "qwen3next").values()
    file = open_gguf(tmp_path / "m.gguf")
    for got, theirs in zip(parts, file.tensors, strict=True):
        np.testing.assert_array_equal(got, read_tensor(file, theirs))


def test_inputs_in_the_order_of_llama_cpp_are_held(tmp_path):
    draw, name = np.random.default_rng(0), "model.layers.0.linear_attn.out_proj.weight"
    weights = delta_file(
        tmp_path / "m.gguf", "qwen35", {"ssm_out": (k_quants(draw, 8, 1, Q4_K), Q4_K)}
    )
    for part in ((), (slice(2, 5), slice(0, 256))):
        held = weights.blocks(name, part)
        assert held.order is not None
        np.testing.assert_array_equal(held.dequantize(), weights.read(name, part))
    np.testing.assert_array_equal(
        weights.read(name, (slice(2, 5), slice(7, 90))), weights.read(name)[2:5, 7:90]
    )
    with pytest.raises(ValueError, match="ssm_out.weight has its inputs in llama.cpp's order"):
        weights.blocks(name, (slice(0, 8), slice(0, 128)))


@pytest.mark.parametrize(("module", "rows"), [("qkv", 384), ("z", 256), ("b", 4)])
def test_rows_are_in_the_order_of_the_converter(module, rows):
    name = f"model.layers.0.linear_attn.in_proj_{module}"
    numbers = np.arange(rows)[:, None]
    config = SimpleNamespace(delta=SimpleNamespace(**FIELDS))
    (want,) = apart(f"{name}.weight", numbers, config, "qwen35").values()
    order = row_order("qwen35", name, rows, heads=4, kv_heads=2, delta=HEADS)
    np.testing.assert_array_equal(order, want[:, 0])


def test_norms_of_delta_nets_are_as_they_are_and_further_blocks_are_left_out(tmp_path):
    raw = np.random.default_rng(0).normal(size=64).astype(np.float32)
    with writing(tmp_path / "m.gguf", "qwen35") as writer:
        writer.add_block_count(2)
        writer.add_uint32("qwen35.nextn_predict_layers", 1)
        writer.add_head_count(4)
        for name in ("0.ssm_norm", "0.attn_norm", "1.attn_norm"):
            writer.add_tensor(f"blk.{name}.weight", raw)
    weights, start = weights_of(open_gguf(tmp_path / "m.gguf")), "model.layers.0."
    norms = f"{start}linear_attn.norm.weight", f"{start}input_layernorm.weight"
    assert set(weights.shapes) == set(norms)
    for name, added in zip(norms, (0, 1), strict=True):
        np.testing.assert_array_equal(weights.read(name), raw - np.float32(added))


@pytest.mark.parametrize(
    ("arch", "tensor", "module"),
    [
        ("qwen3next", "ssm_in", "linear_attn.in_proj_qkvz"),
        ("deepseek2", "attn_kv_b", "self_attn.kv_b_proj"),
    ],
)
def test_older_files_have_one_tensor(arch, tensor, module, tmp_path):
    raw = np.random.default_rng(0).normal(size=(640, 32)).astype(np.float32)
    weights = delta_file(tmp_path / "m.gguf", arch, {tensor: (raw, None)})
    np.testing.assert_array_equal(weights.read(f"model.layers.0.{module}.weight"), raw)


def test_a_tensor_without_its_other_half_is_named(tmp_path):
    tensors = {"attn_qkv": (np.zeros((384, 32), np.float32), None)}
    with pytest.raises(ValueError, match="tensor `blk.0.attn_qkv.weight` has no other half"):
        delta_file(tmp_path / "m.gguf", "qwen3next", tensors)


@pytest.mark.parametrize(
    ("family", "modules", "tensor"),
    [
        ("qwen3_next", ("in_proj_qkvz", "in_proj_ba", "out_proj"), "attn_gate"),
        ("qwen3_5_text", ("in_proj_qkv", "in_proj_a", "out_proj"), "ssm_out"),
        ("deepseek_v2", ("o_proj", "shared_experts.down_proj"), "ffn_down_shexp"),
    ],
)
@pytest.mark.slow
def test_adapters_are_those_of_their_tensors(family, modules, tensor, tmp_path):
    """Each matrix in the file is changed by its own B·A."""
    config = config_with(target_modules=modules, alpha_pattern={modules[0]: 3})
    file, adapter, theirs = exported(tmp_path, family, config)
    pairs = {name.removesuffix(".lora_a") for name in adapter.tensors if name.endswith("lora_a")}
    assert any(tensor in name for name in pairs)
    for name in pairs:
        a, b = (read_tensor(adapter, f"{name}.lora_{x}") for x in "ab")
        scale = adapter.metadata["adapter.lora.alpha"] / b.shape[1]
        changed = read_tensor(file, name) + scale * (b @ a)
        np.testing.assert_allclose(changed, theirs[name], rtol=1e-5, atol=1e-5)


QWEN = Base("qwen3next", 1, 4, 2, 64, False, HEADS)
LATENT = Base("deepseek2", 1, 4, 4, 64, False)


def test_halves_with_factors_of_their_own_are_one_pair_of_both_ranks(tmp_path):
    draw, rows = np.random.default_rng(0), {"attn_qkv": 384, "attn_gate": 256}
    given = {
        f"blk.0.{name}.weight.lora_{x}": draw.normal(size=size).astype(np.float32)
        for name, n in rows.items()
        for x, size in {"a": (2, 8), "b": (n, 2)}.items()
    }
    for left_out in ("none", *rows):
        tensors = {name: x for name, x in given.items() if left_out not in name}
        write_gguf_lora(tmp_path / "a.gguf", Content(4.0, tensors), QWEN)
        config, found = read_gguf_lora(tmp_path / "a.gguf", base=QWEN)
        assert config.rank == (4 if left_out == "none" else 2)
        content = to_gguf(found, config, QWEN)
        for name, n in rows.items():
            a, b = (content.tensors[f"blk.0.{name}.weight.lora_{x}"] for x in "ab")
            want = np.zeros((n, 8))
            if name != left_out:
                want = (
                    2 * given[f"blk.0.{name}.weight.lora_b"] @ given[f"blk.0.{name}.weight.lora_a"]
                )
            np.testing.assert_allclose(content.alpha / len(a) * b @ a, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", ["self_attn.q_b_proj", "self_attn.kv_b_proj", "lm_head"])
def test_adapters_that_llama_cpp_does_not_apply_are_refused(module, tmp_path):
    start = "base_model.model." + ("" if module == "lm_head" else "model.layers.0.")
    tensors = {f"{start}{module}.lora_{x}.weight": np.ones((2, 2), np.float32) for x in "AB"}
    with pytest.raises(ValueError, match=rf"an adapter of `.*{module}` but computes without it"):
        to_gguf(tensors, config_with(target_modules=(module,), rank=2), LATENT)
    tensors = {f"blk.0.attn_q_b.weight.lora_{x}": np.ones((2, 2), np.float32) for x in "ab"}
    write_gguf_lora(tmp_path / "a.gguf", Content(4.0, tensors), LATENT)
    with pytest.raises(ValueError, match="without its adapter of `blk.0.attn_q_b`"):
        read_gguf_lora(tmp_path / "a.gguf", base=LATENT)


def test_rows_that_are_not_those_of_the_heads_are_refused():
    name = "base_model.model.model.layers.0.linear_attn.in_proj_qkvz.lora_{}.weight"
    tensors = {name.format(x): np.ones((4, 4), np.float32) for x in "AB"}
    config = config_with(target_modules=("in_proj_qkvz",), rank=4)
    with pytest.raises(ValueError, match="lora_B has 4 rows, not 320 for each of 2 key heads"):
        to_gguf(tensors, config, QWEN)
    with pytest.raises(ValueError, match="of which the model's configuration states none"):
        to_gguf(tensors, config, QWEN._replace(delta=None))


@pytest.mark.parametrize(
    ("family", "modules", "count"),
    [
        ("qwen3_next", ("in_proj_qkvz", "out_proj"), 4),
        ("qwen3_5_text", ("in_proj_qkv", "out_proj"), 4),
        ("deepseek_v3", ("kv_b_proj", "o_proj"), 4),
    ],
)
@pytest.mark.slow
def test_merges_are_written_into_their_blocks(family, modules, count, tmp_path):
    write(tmp_path / "m.gguf", family, GGMLQuantizationType.Q8_0)
    held = models.load(tmp_path / "m.gguf", quantize="file")
    floats = models.load(tmp_path / "m.gguf")
    jax.tree.map(np.testing.assert_array_equal, lora.dequantize(held.params), floats.params)
    tree = adapted(held, config_with(target_modules=modules))
    result = save_requantized(tmp_path / "out.gguf", held, tree)
    assert result.weights == count and 0 < result.error < 0.02
    back = models.load(tmp_path / "out.gguf")
    for got, want in zip(
        jax.tree.leaves(back.params), jax.tree.leaves(lora.merge(tree)), strict=True
    ):
        # Q8_0 rounds to 1/254 of the largest number of a block, by a scale in float16: 1/2048.
        np.testing.assert_allclose(got, want, atol=float(np.abs(want).max()) / 225)
