"""The decoder against transformers on the same random weights, in float32."""

import copy
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import hf, models, train

from tests.support.decoder_checks import check_greedy_text
from tests.support.oracle import oracle
from tests.support.tiny import SMALLEST
from tests.support.torch_models import (
    DECODER_SIZES,
    TOLERANCE,
    both_paddings,
    saver,
    texts,
    theirs,
)

PLACE = "models/llama"

SIZES = DECODER_SIZES
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
CASES = {
    "plain": {},
    "tied": dict(tie_word_embeddings=True),
    "every query head its own key head": dict(num_key_value_heads=4),
    "one key head": dict(num_key_value_heads=1),
    "wide heads": dict(head_dim=16),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "theta and eps": dict(rope_parameters=dict(rope_theta=500.0), rms_norm_eps=1e-3),
    "linear": dict(rope_parameters=dict(rope_type="linear", factor=3.0)),
    "dynamic": dict(
        rope_parameters=dict(rope_type="dynamic", factor=2.0), max_position_embeddings=8
    ),
    "llama3": dict(rope_parameters=LLAMA3),
    "yarn": dict(rope_parameters=YARN),
    "yarn told all": dict(
        rope_parameters=dict(
            **YARN, beta_fast=8.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=1.3, truncate=False
        )
    ),
    "yarn with its length": dict(rope_parameters=dict(**YARN, attention_factor=1.5)),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "mistral that sees 3 tokens": dict(model_type="mistral", sliding_window=3),
    "qwen2": dict(model_type="qwen2"),
    "qwen2 that sees 5 tokens": dict(
        model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=0
    ),
    "qwen3": dict(model_type="qwen3", head_dim=16, tie_word_embeddings=True),
    "qwen3 with biases": dict(model_type="qwen3", head_dim=8, attention_bias=True),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Makes and saves a random transformers model of a case, once."""
    cases = {case: {**SIZES, **fields} for case, fields in CASES.items()}
    return saver(PLACE, cases, tmp_path_factory)


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES)
def test_logits_are_transformers(saved, case):
    there, directory = saved(case)
    model = models.load(directory)
    tokens, mask = both_paddings()
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    want = oracle(f"{PLACE}/{case}.logits", lambda: theirs(there(), tokens, mask, positions))
    got = np.asarray(jax.jit(model.apply)(model.params, tokens, mask=jnp.asarray(mask)))
    assert got.dtype == np.float32
    assert np.abs(got - want)[mask].max() <= TOLERANCE


@pytest.mark.parametrize("case", ["plain", "biases", "qwen3"])
def test_unstacked_blocks_compute_the_same(saved, case):
    _, directory = saved(case)
    tokens, mask = texts("left")
    stacked, apart = (models.load(directory, scan=scan) for scan in (True, False))
    a, b = (
        np.asarray(jax.jit(m.apply)(m.params, tokens, mask=jnp.asarray(mask)))
        for m in (stacked, apart)
    )
    # The same operations; XLA may fuse them differently.
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert set(apart.params["model"]["layers"]) == {"0", "1", "2"}


def test_padding_on_the_right_needs_no_mask(saved):
    _, directory = saved("plain")
    model = models.load(directory)
    tokens, mask = texts("right")
    apply = jax.jit(model.apply)
    with_mask = np.asarray(apply(model.params, tokens, mask=jnp.asarray(mask)))
    without = np.asarray(apply(model.params, tokens))
    np.testing.assert_allclose(with_mask[mask], without[mask], atol=1e-5)


@pytest.mark.oracle
def test_bfloat16_stays_near_transformers_in_bfloat16(saved):
    there, directory = saved("plain")
    model = models.load(directory, dtype="bfloat16")
    assert model.params["lm_head"]["kernel"].dtype == jnp.bfloat16
    tokens, mask = texts("right")

    def both():
        import torch

        exact = theirs(there(), tokens, mask, None)
        coarse = copy.deepcopy(there()).to(torch.bfloat16)
        with torch.no_grad():
            rounded = coarse(torch.tensor(tokens), torch.tensor(mask)).logits
        return {"exact": exact, "rounding": float(np.abs(rounded.float() - exact)[mask].max())}

    want = oracle(f"{PLACE}/plain.bfloat16", both)
    got = np.asarray(jax.jit(model.apply)(model.params, tokens, mask=jnp.asarray(mask)))
    assert got.dtype == np.float32
    # No farther from the exact logits than twice what torch's own rounding costs.
    assert np.abs(got - want["exact"])[mask].max() <= 2 * want["rounding"]


@pytest.mark.oracle
def test_a_saved_bfloat16_model_loads_exactly(saved, tmp_path):
    there, directory = saved("tied")

    def save():
        import torch

        copy.deepcopy(there()).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
        stored = load_file(tmp_path / "theirs" / "model.safetensors")
        config = json.loads((tmp_path / "theirs" / "config.json").read_text())
        return {"config": config, "dtypes": {name: str(x.dtype) for name, x in stored.items()}}

    written = oracle(f"{PLACE}/tied.bfloat16", save)
    (tmp_path / "config.json").write_text(json.dumps(written["config"]))
    exact = load_file(directory / "model.safetensors")
    assert written["dtypes"].keys() == exact.keys()
    rounded = {name: x.astype(jnp.dtype(written["dtypes"][name])) for name, x in exact.items()}
    save_file(rounded, tmp_path / "model.safetensors", {"format": "pt"})
    table = np.float32(rounded["model.embed_tokens.weight"])
    kernel = np.float32(rounded["model.layers.1.mlp.up_proj.weight"])
    assert not np.array_equal(table, exact["model.embed_tokens.weight"])
    model = models.load(tmp_path)
    np.testing.assert_array_equal(model.params["model"]["embed_tokens"]["embedding"], table)
    loaded = model.params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(loaded[1], kernel.T)


@pytest.mark.oracle
@pytest.mark.parametrize("case", ["llama3", "mistral that sees 3 tokens", "qwen3"])
def test_greedy_text_is_transformers(saved, case):
    check_greedy_text(saved, PLACE, case, count=20)


@pytest.mark.oracle
@pytest.mark.parametrize("case", ["llama3", "mistral that sees 3 tokens", "qwen2", "qwen3"])
def test_the_written_config_is_read_by_transformers(saved, case, tmp_path):
    _, directory = saved(case)
    config = models.load(directory).config
    written = config.to_hf()
    assert models.LlamaConfig.from_hf(written) == config

    def read():
        from transformers import AutoConfig

        raw = AutoConfig.from_pretrained(directory).to_dict()
        raw["_name_or_path"] = ""  # the directory's, which is another in each run
        # transformers fills in the dict it is given.
        again = AutoConfig.for_model(**copy.deepcopy(written)).to_dict()
        return {"from": written, "raw": raw, "again": again}

    there = oracle(f"{PLACE}/{case}.config", read)
    # What was recorded is transformers' reading of this very config.
    assert there["from"] == json.loads(json.dumps(written))
    for name in ("sliding_window", "rope_parameters", "layer_types", "attention_bias", *SIZES):
        assert there["again"].get(name) == there["raw"].get(name), name


@pytest.mark.oracle
def test_shards_load_as_one(saved, tmp_path):
    there, directory = saved("plain")

    def save():
        there().save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
        return json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())

    index = oracle(f"{PLACE}/plain.shards", save)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(directory / "config.json", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    shards = set(index["weight_map"].values())
    assert len(shards) > 1 and index["weight_map"].keys() == tensors.keys()
    for shard in shards:
        part = {name: x for name, x in tensors.items() if index["weight_map"][name] == shard}
        save_file(part, tmp_path / shard, {"format": "pt"})
    one, many = models.load(directory), models.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, one.params, many.params)


def _used(name, model, params, folder):
    tokens = jnp.zeros((1, 4), jnp.int32)
    row = train.Example(np.arange(4, dtype=np.int32), np.ones(4, bool), "a row")
    job = train.TrainConfig(steps=1, batch_size=1, progress=False)
    calls = {
        "apply": lambda: model.apply(params, tokens),
        "generate": lambda: models.generate(model, params, [[1, 2]], max_new_tokens=2),
        "evaluate": lambda: train.evaluate(model, params, [row]),
        "fit": lambda: train.fit(model, params, [row], None, job, full=True),
        "save_merged": lambda: hf.save_merged(folder, model, params),
    }
    return calls[name]()


@pytest.mark.parametrize("name", ["apply", "generate", "evaluate", "fit", "save_merged"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"intermediate_size": 9},
            r"has an array of shape \(2, 9, 4\) at `model.layers.mlp|the shape \(4, 9\)",
        ),
        (
            {"num_hidden_layers": 3},
            r"has an array of shape \(3, 4\) at `model.layers.input_l|the shape \(4,\), ex",
        ),
        (
            None,
            "has nothing at `lm_head.kernel`, expected an array|nothing to train|shape None, ex",
        ),
    ],
)
def test_parameters_of_another_model_are_refused(name, change, text, tmp_path):
    model = models.init(jax.random.key(0), SMALLEST)
    params: dict = {}
    if change is not None:
        params = models.init(jax.random.key(0), dataclasses.replace(SMALLEST, **change)).params
    with pytest.raises(ValueError, match=text):
        _used(name, model, params, tmp_path / "merged")
