"""Models loaded into quantized leaves: from float checkpoints, GGUF's and bitsandbytes' blocks."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import checkpoint, models, quant
from lora_jax.hf.checkpoint.weights import Blocks
from lora_jax.hf.gguf.file import open_gguf
from lora_jax.hf.gguf.weights import weights_of
from lora_jax.quant.array import is_quant

from tests.support.tiny import write_tiny

pytestmark = pytest.mark.once

TOKENS = jnp.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model", tied=False)


@pytest.fixture(scope="module")
def plain(directory):
    return models.load(directory)


@pytest.fixture(scope="module")
def quantized(directory):
    return models.load(directory, quantize=quant.QuantConfig(block_size=16))


def leaves(params):
    return jax.tree.leaves(params, is_leaf=is_quant)


def test_a_checkpoint_is_quantized_as_the_loaded_tree_would_be(plain, quantized):
    kernels = [x for x in leaves(quantized.params) if is_quant(x)]
    assert len(kernels) == 7
    assert not is_quant(quantized.params["lm_head"]["kernel"])
    want = lora.quantize(plain.params, r"model\.layers\..*kernel", block_size=16)
    jax.tree.map(np.testing.assert_array_equal, quantized.params, want)
    both = jax.jit(lambda p, t: (quantized.apply(p, t), plain.apply(lora.dequantize(p), t)))
    np.testing.assert_allclose(*both(quantized.params, TOKENS), atol=1e-4)


def test_layers_apart_are_those_of_the_stack(directory, quantized):
    got = models.load(directory, scan=False, quantize=quant.QuantConfig(block_size=16))
    kernels = [x for x in leaves(got.params) if is_quant(x)]
    assert len(kernels) == 14
    assert not is_quant(got.params["lm_head"]["kernel"])
    whole, apart = (m.params["model"]["layers"] for m in (quantized, got))
    for number in ("0", "1"):
        jax.tree.map(
            lambda a, b, i=int(number): np.testing.assert_array_equal(a[i], b),
            jax.tree.leaves(whole),
            jax.tree.leaves(apart[number]),
        )


@pytest.mark.parametrize(
    "options, form, scale",
    [
        ({"double_quant": True}, "nf4", "uint8"),
        ({"scale_dtype": "float32"}, "nf4", "float32"),
        ({"format": "int8"}, "int8", "bfloat16"),
    ],
)
def test_every_option_reaches_the_weights(directory, options, form, scale):
    got = models.load(directory, quantize=quant.QuantConfig(block_size=16, **options))
    kernels = [x for x in leaves(got.params) if is_quant(x)]
    assert {(q.format, q.block, str(q.scale.dtype)) for q in kernels} == {(form, 16, scale)}


def test_no_more_than_one_tensor_is_held_as_floats(directory, monkeypatch):
    """What is read is quantized before the next tensor is read."""
    from lora_jax.quant import loading

    order = []
    original = loading.quantize_array
    monkeypatch.setattr(
        loading, "quantize_array", lambda w, **k: (order.append(k["name"]), original(w, **k))[1]
    )
    opened = models.loading.open_directory

    def watched(path):
        weights = opened(path)
        return weights._replace(
            read=lambda name, *part: (order.append(name), weights.read(name, *part))[1]
        )

    monkeypatch.setattr(models.loading, "open_directory", watched)
    models.load(directory, quantize=quant.QuantConfig(block_size=16))
    linear = [name for name in order if "proj" in name]
    assert linear[::2] == linear[1::2] and len(linear) == 28


def test_adapters_over_a_quantized_model_train_save_and_merge(quantized, plain, tmp_path):
    config = lora.LoraConfig(rank=2, target_modules=("q_proj", "down_proj"), init="random")
    plan = lora.plan(config, quantized.apply, quantized.params, TOKENS)
    params = lora.init(jax.random.key(0), plan, quantized.params)
    trainable, frozen = lora.split(params)

    def loss(trainable):
        logits = lora.lorafy(quantized.apply)(lora.combine(trainable, frozen), TOKENS)
        return jnp.mean(logits**2)

    value, grads = jax.jit(jax.value_and_grad(loss))(trainable)
    merged = lora.merge(params)
    assert not any(is_quant(x) for x in leaves(merged))
    want = jnp.mean(jax.jit(plain.apply)(merged, TOKENS) ** 2)
    np.testing.assert_allclose(value, want, rtol=1e-4)
    assert all(float(jnp.max(jnp.abs(g))) > 0 for g in jax.tree.leaves(grads))
    lora.hf.save_peft(tmp_path / "peft", params, config)
    back, _ = lora.hf.load_peft(tmp_path / "peft", quantized.apply, quantized.params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, lora.split(back)[0], trainable)
    checkpoint.save(tmp_path / "orbax", params, config)
    again, _ = checkpoint.restore(tmp_path / "orbax", quantized.apply, quantized.params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, lora.split(again)[0], trainable)


def test_an_adapter_knows_the_quantized_base_it_was_trained_on(quantized, plain, tmp_path):
    marks = checkpoint.fingerprint(quantized.params)
    path = "model.layers.mlp.up_proj.kernel"
    assert marks[path].startswith("nf4-16:float32[2,32,64] ")
    other = lora.quantize(plain.params, r"model\.layers\..*kernel", block_size=16, format="int4")
    assert checkpoint.fingerprint(other)[path] != marks[path]
    config = lora.LoraConfig(rank=2, target_modules=("q_proj",))
    plan = lora.plan(config, quantized.apply, quantized.params, TOKENS)
    params = lora.init(jax.random.key(0), plan, quantized.params)
    checkpoint.save(tmp_path / "adapter", params, config)
    with pytest.raises(
        ValueError, match='base model: one quantized with format="nf4", block_size=16'
    ):
        checkpoint.restore(tmp_path / "adapter", plain.apply, plain.params, TOKENS)


def test_gguf_blocks_of_smollm2_are_its_numbers(smollm2):
    """Rows of queries and keys put back in Hugging Face's order, blocks and all."""
    weights = weights_of(open_gguf(smollm2))
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        name = f"model.layers.7.{name}.weight"
        assert weights.formats is not None and weights.blocks is not None
        assert weights.formats[name] == Blocks("uint4", 32)
        held = weights.blocks(name)
        assert (held.format, held.block, held.roles) == ("uint4", 32, "oi")
        np.testing.assert_array_equal(held.dequantize(), weights.read(name))
    assert "model.norm.weight" not in weights.formats


@pytest.mark.slow
def test_smollm2_is_loaded_in_its_own_blocks(smollm2):
    own = models.load(smollm2, quantize="file")
    floats = models.load(smollm2)
    table = own.params["model"]["embed_tokens"]["embedding"]
    assert (table.format, table.roles) == ("int8", "oi")
    kernel = own.params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert (kernel.format, kernel.block, kernel.shape) == ("uint4", 32, (30, 576, 576))
    jax.tree.map(np.testing.assert_array_equal, lora.dequantize(own.params), floats.params)
    stored = sum(x.nbytes for x in leaves(own.params))
    assert stored < 0.23 * sum(x.nbytes for x in jax.tree.leaves(floats.params))


def test_what_cannot_be_quantized_while_loading_is_refused(directory):
    with pytest.raises(ValueError, match="`quantize` must be one of nf4, .*file, .* got 'q4'"):
        models.load(directory, quantize="q4")
    with pytest.raises(ValueError, match="`block_size` 64 does not divide the 32 inputs of `model"):
        models.load(directory, quantize="nf4")
    with pytest.raises(ValueError, match="has no blocks to keep, as .* holds floats"):
        models.load(directory, quantize="file")


def test_tokens_are_generated_from_a_quantized_model(quantized):
    text = models.generate(quantized, quantized.params, [[1, 2, 3]], max_new_tokens=3)
    assert text is not None
    assert dataclasses.is_dataclass(quantized)


def test_the_train_command_fine_tunes_over_a_quantized_base(directory, tmp_path):
    from lora_jax.cli import main

    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "book a table for two"}\n' * 4, encoding="utf-8")
    out = tmp_path / "run"
    code = main(
        ["train", "--model", str(directory), "--train-data", str(data), "--output-dir", str(out),
         "--quantize", "nf4", "--quantize-block", "16", "--rank", "2", "--steps", "2",
         "--init", "loftq", "--loftq-config", "loftq_iter=2",
         "--target-modules", "q_proj", "v_proj", "--batch-size", "2"]
    )  # fmt: skip
    assert not code
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    written = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert written["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 2}
