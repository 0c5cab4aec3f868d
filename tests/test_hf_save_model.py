"""A saved model is the same model when it is loaded, here and by transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lora_jax as lora
from lora_jax import models
from lora_jax.hf.save_model import save_model

TEXT = [{"role": "user", "content": "Booking for Iris: 4 guests, 19:30, Friday."}]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "head of its own"])
def pair(request, tmp_path_factory):
    """A model and the directory it was saved to."""
    model = tiny.tiny_model(tied=request.param)
    directory = tmp_path_factory.mktemp("models") / "deep" / "tiny"
    save_model(directory, model, model.params)
    return model, directory


def test_what_is_loaded_is_what_was_saved(pair):
    model, directory = pair
    loaded = models.load(directory)
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    ids = model.tokenizer.apply_chat_template(TEXT, add_generation_prompt=True)
    assert loaded.tokenizer.apply_chat_template(TEXT, add_generation_prompt=True) == ids
    assert loaded.tokenizer.eos_id == model.tokenizer.eos_id


def test_layers_that_are_not_stacked_are_saved_the_same(pair, tmp_path):
    _, directory = pair
    apart = models.load(directory, scan=False)
    save_model(tmp_path / "again", apart, apart.params)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


@pytest.mark.torch
def test_transformers_gives_the_same_logits(pair):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, directory = pair
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(TEXT, add_generation_prompt=True)["input_ids"]
    assert ids == model.tokenizer.apply_chat_template(TEXT, add_generation_prompt=True)
    assert tokenizer.eos_token_id == model.tokenizer.eos_id
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    logits = model.apply(model.params, jnp.asarray([ids]))
    np.testing.assert_allclose(logits, expected, atol=1e-4)  # float32 in another order


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(pair, tmp_path, dtype):
    model, _ = pair
    save_model(tmp_path / "half", model, model.params, dtype=dtype)
    loaded = models.load(tmp_path / "half")
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), model.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, rounded)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == dtype


def test_nothing_is_overwritten(pair):
    model, directory = pair
    with pytest.raises(FileExistsError, match="there is something already; give another"):
        save_model(directory, model, model.params)


def test_an_unknown_dtype(pair, tmp_path):
    with pytest.raises(ValueError, match="`dtype` must be one of float32, bfloat16, float16, got"):
        save_model(tmp_path / "x", pair[0], pair[0].params, dtype="int4")


def test_adapters_must_be_merged_first(pair, tmp_path):
    model, _ = pair
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    plan = lora.plan(lora.LoraConfig(rank=2), model.apply, model.params, tokens)
    params = lora.init(jax.random.key(0), plan, model.params)
    with pytest.raises(ValueError, match=r"`model.layers.*` still has an adapter; merge first"):
        save_model(tmp_path / "x", model, params)
    assert not list(tmp_path.iterdir())


def test_a_number_too_large_for_the_dtype(pair, tmp_path):
    model, _ = pair
    params = jax.tree.map(lambda x: x, model.params)
    params["model"]["norm"]["scale"] = params["model"]["norm"]["scale"] * 1e6
    with pytest.raises(ValueError, match="`model.norm.weight` has a number that float16 cannot"):
        save_model(tmp_path / "x", model, params, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing(pair, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tmp_path / "x", pair[0], pair[0].params)
    assert not list(tmp_path.iterdir())
