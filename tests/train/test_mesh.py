"""Training on a mesh of eight devices: the losses and adapters of one device."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import models, train
from lora_jax.models.sharding import RULES
from lora_jax.train.examples import Example

pytestmark = pytest.mark.once

MESHES = {
    "data=8": dict(data=8),
    "fsdp=8": dict(fsdp=8),
    "data=2,fsdp=4": dict(data=2, fsdp=4),
    "fsdp=4,tensor=2": dict(fsdp=4, tensor=2),
    "tensor=8": dict(tensor=8),
}
MIXED = ("data=2,fsdp=4", "fsdp=4,tensor=2")
LLAMA = models.LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
GPT2 = models.GPT2Config(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    max_position_embeddings=64,
)
TARGETS = ("q_proj", "down_proj")
# Model, adapters, training: what differs from a float32 Llama with LoRA on two targets.
KINDS: dict[str, tuple[dict, dict, dict]] = {
    "lora": ({}, {}, {}),
    "bfloat16": (dict(dtype="bfloat16"), {}, {}),
    "nf4": (dict(quantize=True), {}, {}),
    "dora": ({}, dict(use_dora=True), {}),
    "tied head": (dict(tied=True), dict(target_modules=("q_proj", "embed_tokens")), {}),
    "gpt2": (dict(gpt2=True), dict(target_modules=("c_attn", "c_proj")), {}),
    "accumulation": ({}, {}, dict(batch_size=8, accumulation=2)),
    "dropout": ({}, dict(dropout=0.2), {}),
    "layers apart": (dict(scan=False), {}, {}),
}


@lru_cache(maxsize=1)
def data() -> list[Example]:
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 128, size=n).astype(np.int32) for n in draw.integers(8, 16, size=40)]
    return [Example(row, np.arange(len(row)) > 0, f"example {i}") for i, row in enumerate(rows)]


def make(*, tied=False, gpt2=False, quantize=False, **options) -> models.Model:
    config = GPT2 if gpt2 else dataclasses.replace(LLAMA, tie_word_embeddings=tied)
    model = models.init(jax.random.key(0), config, **options)
    if quantize:
        model = dataclasses.replace(
            model, params=lora.quantize(model.params, r".*_proj", format="nf4")
        )
    return model


def run(model, settings: dict, training: dict, mesh=None):
    """Ten steps; returns the losses, and the trained arrays by path."""
    config = lora.LoraConfig(**{"rank": 4, "target_modules": TARGETS, **settings})
    plan = lora.plan(config, model.apply, model.params, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    adapted = lora.init(jax.random.key(1), plan, model.params)
    if mesh is not None:
        adapted = lora.sharding.place(adapted, mesh, RULES)
    # Adam divides a gradient by its own size: with a small epsilon the rounding of numbers near 0,
    # which differs between meshes, is as large as any update.
    usual = dict(batch_size=16, buckets=1, learning_rate=1e-2, epsilon=1e-3, progress=False)
    config = train.TrainConfig(steps=10, **{**usual, **training})
    result = train.fit(model, adapted, data(), None, config)
    losses = [r["loss"] for r in result.history if r["kind"] == "train"]
    return np.array(losses), lora.split(result.lora_params)[0]


@lru_cache(maxsize=None)
def one_device(kind: str):
    options, settings, training = KINDS[kind]
    return run(make(**options), settings, training)


def cases():
    for kind in KINDS:
        for mesh in MESHES:
            quick = mesh in MIXED[:1] and kind in ("lora", "nf4", "dropout")
            quick = quick or (kind == "lora" and mesh == MIXED[1])
            yield pytest.param(kind, mesh, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "mesh"), cases())
def test_the_losses_and_adapters_are_those_of_one_device(kind, mesh):
    options, settings, training = KINDS[kind]
    sizes = MESHES[mesh]
    losses, adapters = run(make(**options), settings, training, models.make_mesh(**sizes))
    want, expected = one_device(kind)
    relative = 1e-5 if kind != "bfloat16" else 1e-2
    np.testing.assert_allclose(losses, want, rtol=relative)
    for x, y in zip(jax.tree.leaves(adapters), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= relative * np.linalg.norm(y)
