"""A small Llama, Mixtral or GPT-2, and ten steps of it: on one device, on meshes, in processes."""

import dataclasses
import os
import signal
from functools import cache, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax import models, train
from lora_jax.models.sharding import RULES
from lora_jax.train.examples import Example

from tests.support.tiny import SMALL

# Eight devices divide every dim.
LLAMA = dataclasses.replace(
    SMALL,
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=8,
    num_key_value_heads=8,
    tie_word_embeddings=False,
    initializer_range=0.02,
)
GPT2 = models.GPT2Config(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    max_position_embeddings=64,
)
# Names of the small Llama's stacked tensors in a file.
OWN = lora.hf.name_map("own", [(f"*.{x}", "*.weight") for x in ("kernel", "embedding", "scale")])
TARGETS = ("q_proj", "down_proj")
EXPERTS = dict(target_modules=("q_proj", "experts.gate_up_proj", "experts.down_proj"))
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
    "head, dropout": ({}, dict(target_modules=("q_proj", "lm_head"), dropout=0.2), {}),
    "tied head, dropout": (
        dict(tied=True),
        dict(target_modules=("embed_tokens",), dropout=0.2),
        {},
    ),
    "packed": ({}, {}, dict(packing=True, packed_length=48, batch_size=8)),
    "layers apart": (dict(scan=False), {}, {}),
    "experts": (dict(experts=4), EXPERTS, {}),
    "experts, nf4": (dict(experts=4, quantize=True), EXPERTS, {}),
    "experts, balanced": (
        dict(experts=4, balance=0.3),
        {**EXPERTS, "modules_to_save": ("gate",)},
        dict(balance_experts=True),
    ),
    "experts, packed": (
        dict(experts=8),
        EXPERTS,
        dict(packing=True, packed_length=48, batch_size=8),
    ),
}


@lru_cache(maxsize=1)
def data() -> list[Example]:
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 128, size=n).astype(np.int32) for n in draw.integers(8, 16, size=40)]
    return [Example(row, np.arange(len(row)) > 0, f"example {i}") for i, row in enumerate(rows)]


def make(
    *, tied=False, gpt2=False, quantize=False, experts=None, balance=0.0, **options
) -> models.Model:
    config = GPT2 if gpt2 else dataclasses.replace(LLAMA, tie_word_embeddings=tied)
    if experts:
        config = dataclasses.replace(
            config, model_type="mixtral", num_experts=experts, moe_intermediate_size=64,
            router_aux_loss_coef=balance,
        )  # fmt: skip
    model = models.init(jax.random.key(0), config, **options)
    if quantize:
        model = dataclasses.replace(
            model, params=lora.quantize(model.params, r".*_proj", format="nf4")
        )
    return model


def adapted(model: models.Model, settings: dict) -> tuple[lora.LoraConfig, Any]:
    """The adapter's config, and the model's parameters with it."""
    config = lora.LoraConfig(**{"rank": 4, "target_modules": TARGETS, **settings})
    plan = lora.plan(config, model.apply, model.params, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    return config, lora.init(jax.random.key(1), plan, model.params)


def run(model, settings: dict, training: dict, mesh=None, *, stop_after: int | None = None):
    """Ten steps; returns the losses, and the trained arrays by path."""
    _, params = adapted(model, settings)
    if mesh is not None:
        params = lora.sharding.place(params, mesh, RULES)
    # Adam divides a gradient by its own size: with a small epsilon the rounding of numbers near 0,
    # which differs between meshes, is as large as any update.
    usual = dict(batch_size=16, buckets=1, learning_rate=1e-2, epsilon=1e-3, progress=False)
    config = train.TrainConfig(**{**usual, "steps": 10, **training})

    def stop(record):
        if record["step"] == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    hooks = train.Hooks(record=stop)
    result = train.fit(model, params, data(), None, config, hooks=hooks)
    losses = [r["loss"] for r in result.history if r["kind"] == "train"]
    return np.array(losses), lora.split(result.lora_params)[0]


@cache
def one_device(kind: str):
    options, settings, training = KINDS[kind]
    return run(make(**options), settings, training)


def check_mesh(kind: str, mesh: Any) -> None:
    """A kind of run has the losses and adapters of one device."""
    options, settings, training = KINDS[kind]
    losses, adapters = run(make(**options), settings, training, mesh)
    want, expected = one_device(kind)
    relative = 1e-5 if kind != "bfloat16" else 1e-2
    np.testing.assert_allclose(losses, want, rtol=relative)
    for x, y in zip(jax.tree.leaves(adapters), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= relative * np.linalg.norm(y)
