"""Small models of each kind, and ten steps of them: on one device, on meshes, in processes."""

import dataclasses
import os
import signal
from functools import cache, lru_cache
from typing import Any

import jax
import numpy as np

import lora_jax as lora
from lora_jax import models, train
from lora_jax.models.registry import ENCODER_DECODER, IMAGE_ENCODER, inputs_of, kind_of_model
from lora_jax.models.sharding import RULES
from lora_jax.recipes.fitting import with_head
from lora_jax.train.examples import Example
from lora_jax.train.goals import goal_of
from lora_jax.train.images import image_examples
from lora_jax.train.jsonl import record_of

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
SIZES = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
    initializer_range=0.05,
)  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "vit": dict(
        **SIZES, image_size=16, patch_size=4, architectures=["ViTForImageClassification"],
        id2label=dict(enumerate("abc")),
    ),
    "t5": dict(
        vocab_size=128, d_model=64, d_kv=8, d_ff=128, num_layers=2, num_heads=8,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, initializer_range=0.05,
    ),
    "bert": dict(
        **SIZES, vocab_size=128, max_position_embeddings=64,
        architectures=["BertForTokenClassification"], id2label=dict(enumerate("abcd")),
    ),
}  # fmt: skip
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
    "images": (dict(other="vit"), dict(target_modules=("q_proj", "fc1")), {}),
    "answers of t5": (dict(other="t5"), dict(target_modules=("q", "wo")), {}),
    "classes of tokens": (dict(other="bert"), dict(target_modules=("query", "output.dense")), {}),
    "questions": (dict(task="question-answering"), {}, {}),
}


@lru_cache(maxsize=1)
def data() -> list[Example]:
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 128, size=n).astype(np.int32) for n in draw.integers(8, 16, size=40)]
    return [Example(row, np.arange(len(row)) > 0, f"example {i}") for i, row in enumerate(rows)]


def data_of(model: models.Model) -> list[Example]:
    """What a model reads and learns, made of `data`."""
    goal, kind = goal_of(model.config), kind_of_model(model)
    if kind == IMAGE_ENCODER:
        shape = (40, model.config.num_channels, *model.config.image_size)
        pixels = np.asarray(jax.random.normal(jax.random.key(2), shape))
        records = [record_of({"image": x, "label": i % 3}) for i, x in enumerate(pixels)]
        return image_examples(records, model)
    if kind == ENCODER_DECODER:
        starts = [row._replace(tokens=row.tokens[:8], learned=np.arange(8) > 0) for row in data()]
        return [one._replace(read=row.tokens) for one, row in zip(starts, data(), strict=True)]
    if goal is None:
        return data()
    found = []
    for row in data():
        size = len(row.tokens)
        learned = np.arange(size) % 3 < 2 if goal.per == "token" else np.arange(size) == size - 1
        ends = np.array([[1 + size // 3, 1 + size // 2]], np.int32)
        targets = row.tokens[learned] % 4 if goal.per == "token" else ends
        found.append(row._replace(learned=learned, targets=targets))
    return found


def make(
    *, tied=False, gpt2=False, quantize=False, experts=None, balance=0.0, other=None, task=None,
    **options,
) -> models.Model:  # fmt: skip
    config: Any = GPT2 if gpt2 else dataclasses.replace(LLAMA, tie_word_embeddings=tied)
    if task:
        config = dataclasses.replace(config, task=task)
    if other:
        config = models.config_from_hf({"model_type": other, **OTHERS[other]})
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
    config = with_head(model, lora.LoraConfig(**{"rank": 4, "target_modules": TARGETS, **settings}))
    plan = lora.plan(config, model.apply, model.params, *inputs_of(model.config))
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
    result = train.fit(model, params, data_of(model), None, config, hooks=hooks)
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
        size = np.linalg.norm(y)
        # A bias of the scores of all tokens of a row has no gradient but rounding.
        most = relative * size if size > 1e-4 else 1e-4
        assert np.linalg.norm(x - y) <= most
