"""A saved model is the same model when it is loaded, here and by transformers."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax import models
from lora_jax.array import dense, is_lora
from lora_jax.hf.checkpoint.shards import size_of
from lora_jax.models.saving import save_merged, save_model
from lora_jax.quant.array import is_quant
from lora_jax.quant.encode import quantize_array

from tests.support import tiny
from tests.support.oracle import oracle
from tests.support.torch_models import written

pytestmark = pytest.mark.once

CONFIG = tiny.tiny_model().config
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


GENERATION = {"eos_token_id": [1, 0], "temperature": 0.6, "top_p": 0.9, "do_sample": True,
              "transformers_version": "5.0"}  # fmt: skip
KEPT = {
    "generation_config.json": json.dumps(GENERATION),
    "tokenizer_config.json": json.dumps({"padding_side": "left", "model_max_length": 99,
                                         "extra_special_tokens": {"end_token": "<|im_end|>"},
                                         "chat_template": [{"name": "default", "template": "d"}]}),
    "special_tokens_map.json": '{"eos_token": "<|im_end|>"}',
    "added_tokens.json": '{"<|im_end|>": 1}',
    "additional_chat_templates/tool_use.jinja": "t",
}  # fmt: skip


def test_settings_of_the_base_are_kept_whole(pair, tmp_path):
    directory = shutil.copytree(pair[1], tmp_path / "base")
    (directory / "chat_template.jinja").unlink()
    for name, text in KEPT.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    model = models.load(directory)
    save_model(tmp_path / "again", model, model.params)
    kept = {name: (tmp_path / "again" / name).read_text() for name in KEPT}
    generation = json.loads(kept.pop("generation_config.json"))
    assert kept == {name: KEPT[name] for name in kept}
    assert {name: generation[name] for name in GENERATION} == GENERATION
    assert not (tmp_path / "again" / "chat_template.jinja").exists()
    # A template that was changed in Python is the one that is saved.
    other = dataclasses.replace(model.tokenizer, chat_template="other", templates={})
    save_model(tmp_path / "other", dataclasses.replace(model, tokenizer=other), model.params)
    assert models.load(tmp_path / "other").tokenizer.render_chat(TEXT) == "other"


@pytest.mark.oracle
def test_transformers_gives_the_same_logits(pair):
    model, directory = pair
    tied = model.config.tie_word_embeddings

    def read():
        import torch
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        ids = tokenizer.apply_chat_template(TEXT, add_generation_prompt=True)["input_ids"]
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits.numpy()
        end = tokenizer.eos_token_id
        return {"from": written(directory), "ids": ids, "end": end, "logits": logits}

    there = oracle(f"models/saving/{'tied' if tied else 'apart'}", read)
    assert there["from"] == written(directory)
    ids = model.tokenizer.apply_chat_template(TEXT, add_generation_prompt=True)
    assert (there["ids"], there["end"]) == (ids, model.tokenizer.eos_id)
    logits = model.apply(model.params, jnp.asarray([ids]))
    np.testing.assert_allclose(logits, there["logits"], atol=1e-4)  # float32 in another order


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
    with pytest.raises(FileExistsError, match="exists already; choose another directory"):
        save_model(directory, model, model.params)


def test_arguments_in_another_order(pair, tmp_path):
    model = pair[0]
    with pytest.raises(
        TypeError, match=r"`model` must be `Model`, got .*save_merged\(directory, m"
    ):
        save_merged(tmp_path / "a", model.params, model)  # the other way round
    # Not its arrays and its vocabulary.
    assert repr(model).startswith("<Model: `llama`, ") and len(repr(model)) < 120


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


def test_shards_hold_what_one_file_holds(pair, tmp_path):
    model, directory = pair
    save_model(tmp_path / "cut", model, model.params, max_shard_size="8KB")
    files = sorted((tmp_path / "cut").glob("model-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    whole = load_file(directory / "model.safetensors")
    shards = [load_file(file) for file in files]
    held = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert len(held) == sum(map(len, shards))
    jax.tree.map(np.testing.assert_array_equal, held, whole)
    for shard in shards:
        assert len(shard) == 1 or sum(x.nbytes for x in shard.values()) <= 8000
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    assert index["weight_map"] == {
        name: file.name for file, shard in zip(files, shards, strict=True) for name in shard
    }
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path / "cut").params, model.params)


@pytest.mark.parametrize("size", [0, -3, "5 apples", "", "0.1B"])
def test_a_size_that_is_none(size):
    with pytest.raises(ValueError, match="`max_shard_size` must be bytes or like `5GB` or `2GiB`"):
        size_of(size)


def test_sizes():
    texts = (7, "7", "5GB", "1.5 kB", "2GiB", "3MB")
    assert [size_of(text) for text in texts] == [7, 7, 5 * 10**9, 1500, 2 * 2**30, 3 * 10**6]


@pytest.mark.parametrize("scan", [True, False], ids=["stacked", "apart"])
def test_adapters_are_merged_as_they_are_written(tmp_path, scan):
    """Low-rank leaves, DoRA's magnitudes and a norm trained whole, against `lora.merge`."""
    fresh = models.init(jax.random.key(0), CONFIG, scan=scan)
    config = lora.LoraConfig(
        rank=2, target_modules=("q_proj", "up_proj"), use_dora=True, modules_to_save=("norm",)
    )
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    plan = lora.plan(config, fresh.apply, fresh.params, tokens)
    trainable, frozen = lora.split(lora.init(jax.random.key(1), plan, fresh.params))
    params = lora.combine(jax.tree.map(lambda x: x + 0.1, trainable), frozen)
    save_merged(tmp_path / "merged", fresh, params, dtype="bfloat16")
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lora.merge(params))
    got = models.load(tmp_path / "merged", dtype="bfloat16", scan=scan).params
    # The same float32 sums for one block instead of all; a rounding may fall the other way.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-7), got, want)
    changed = jax.tree.map(lambda a, b: bool((a != b.astype(a.dtype)).any()), got, fresh.params)
    assert sum(jax.tree.leaves(changed)) == (5 if scan else 9)


def test_quantized_weights_are_written_as_what_they_stand_for(tmp_path):
    model = models.init(jax.random.key(0), dataclasses.replace(CONFIG, hidden_size=64, head_dim=16))
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    config = lora.LoraConfig(rank=2, target_modules=("down_proj",))
    params = lora.init(
        jax.random.key(1), lora.plan(config, model.apply, model.params, tokens), model.params
    )
    layers = params["model"]["layers"]
    for module, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        leaf = layers[module][name]["kernel"]
        weight = leaf.w if is_lora(leaf) else leaf
        held = quantize_array(weight, format="int8", block_size=16, roles="sio")
        layers[module][name]["kernel"] = (
            dataclasses.replace(leaf, w=held, b=leaf.b + 0.1) if is_lora(leaf) else held
        )
    save_merged(tmp_path / "merged", model, params)
    merged = lora.merge(params)
    want = jax.tree.map(dense, merged, is_leaf=is_quant)
    got = models.load(tmp_path / "merged").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


def test_a_sum_that_is_not_finite(pair, tmp_path):
    model, _ = pair
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    plan = lora.plan(lora.LoraConfig(rank=2), model.apply, model.params, tokens)
    params = lora.init(jax.random.key(0), plan, model.params)
    trainable, frozen = lora.split(params)
    params = lora.combine(jax.tree.map(lambda x: x + jnp.inf, trainable), frozen)
    with pytest.raises(
        ValueError, match=r"`model.layers.0.mlp.down_proj.weight` has a number that fl"
    ):
        save_merged(tmp_path / "x", model, params)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing(pair, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_jax.hf.checkpoint.shards._write", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tmp_path / "x", pair[0], pair[0].params)
    assert not list(tmp_path.iterdir())


# A fresh process, so that the peak is the export's. Writing 5 to clear_refs forgets earlier peaks.
MEASURED = """
import json, pathlib, re, sys
import jax
import jax.numpy as jnp
import lora_jax as lora
from lora_jax import models
from lora_jax.array import dense, is_lora
from lora_jax.models.saving import save_merged

def memory(key):
    found = re.search(key + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return int(found[1]) * 1024

jnp.ones(3).sum().block_until_ready()
empty = memory("VmRSS")
model = models.load(sys.argv[1])
config = lora.LoraConfig(rank=8, target_modules="all-linear")
tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
plan = lora.plan(config, model.apply, model.params, tokens)
params = lora.init(jax.random.key(0), plan, model.params)
pathlib.Path("/proc/self/clear_refs").write_text("5")
save_merged(sys.argv[2], model, params)
size = sum(x.nbytes for x in jax.tree.leaves(model.params))
print(json.dumps({"peak": (memory("VmHWM") - empty) / size}))
"""


@pytest.mark.slow
def test_an_export_needs_little_beside_the_model(smollm2, tmp_path):
    out = tmp_path / "merged"
    arguments = [sys.executable, "-c", MEASURED, smollm2, str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    peak = json.loads(done.stdout.splitlines()[-1])["peak"]
    assert 1 < peak < 1.5  # model and adapter, and one tensor: 1.35 was seen
    assert sum(x.nbytes for x in load_file(out / "model.safetensors").values()) == 538_060_032
    shutil.rmtree(out)
