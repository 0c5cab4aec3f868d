"""The load-balancing loss of experts: against transformers, and where training adds it."""

import dataclasses

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, train
from lora_jax.models import config_from_hf
from lora_jax.train import preparation

from tests.support.decoder_checks import quick_jit
from tests.support.oracle import oracle
from tests.support.torch_models import ADAPTED_SIZES, saver

PLACE = "train/balance"
CASES = {
    "mixtral": dict(
        ADAPTED_SIZES, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2,
        router_aux_loss_coef=0.3,
    )
}  # fmt: skip


def examples():
    draw = np.random.default_rng(0)
    return [
        train.Example(draw.integers(0, 40, n).astype(np.int32), np.arange(n) > n // 3, "here")
        for n in (12, 7, 3)
    ]


def their_loss(model):
    """The loss and the slope of a router, of the examples padded on the right."""
    import torch

    mask = np.arange(12) < np.array([[12], [7], [3]])
    tokens, labels = np.zeros((3, 12), np.int64), np.full((3, 12), -100)
    for row, example in enumerate(examples()):
        count = len(example.tokens)
        tokens[row, :count] = example.tokens
        labels[row, :count] = np.where(example.learned, example.tokens, -100)
    given = {"input_ids": tokens, "labels": labels, "attention_mask": mask}
    tensors = {name: torch.tensor(x) for name, x in given.items()}
    loss = model(**tensors, output_router_logits=True).loss
    loss.backward()
    (gate,) = (p for name, p in model.named_parameters() if "layers.0.mlp.gate" in name)
    return {"loss": loss.item(), "gate": gate.grad.numpy()}


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.oracle
def test_loss_and_slope_are_transformers(tmp_path_factory):
    there, directory = saver(PLACE, CASES, tmp_path_factory)("mixtral")
    want = oracle(f"{PLACE}/mixtral.loss", lambda: their_loss(there()))
    model = models.load(directory)
    layout = train.loader(examples(), batch_size=3, buckets=1, segmented=True)
    batch = jax.tree.map(lambda x: x[0], train.once(layout)[0])
    trainable, frozen = model.params, jax.tree.map(lambda x: None, model.params)
    loss = train.lora_loss(model, balance=0.3)

    def mean(trainable):
        return loss(trainable, frozen, batch, None) / batch.weights.sum()

    got, slopes = quick_jit(jax.value_and_grad(mean))(trainable)
    assert abs(float(got) - want["loss"]) < 1e-5
    gate = slopes["model"]["layers"]["mlp"]["gate"]["kernel"][0].T
    np.testing.assert_allclose(gate, want["gate"], atol=1e-5)


def tiny():
    model = models.init(jax.random.key(0), config_from_hf(CASES["mixtral"]))
    tokens = jax.ShapeDtypeStruct((1, 2), "int32")
    config = lora.LoraConfig(rank=2, target_modules=("q_proj",))
    return model, lora.init(
        jax.random.key(1), lora.plan(config, model.apply, model.params, tokens), model.params
    )


@pytest.mark.slow
def test_training_adds_it_and_evaluation_does_not():
    model, params = tiny()
    plain, balanced = (
        train.fit(
            model, params, examples(), examples(),
            train.TrainConfig(steps=1, batch_size=3, progress=False, balance_experts=balance),
        ).history
        for balance in (False, True)
    )  # fmt: skip
    first, second = (
        [r["loss"] for r in run if r["kind"] == "train"][0] for run in (plain, balanced)
    )
    # Four experts alike have the loss 2, the number of experts of a token.
    assert second - first == pytest.approx(0.3 * 2, abs=0.1)
    assert plain[0]["eval_loss"] == balanced[0]["eval_loss"]


def test_it_grows_with_its_weight():
    model, params = tiny()
    layout = train.loader(examples(), batch_size=3, buckets=1, segmented=True)
    batch = jax.tree.map(lambda x: x[0], train.once(layout)[0])

    def losses(halves):
        return [train.lora_loss(model, balance=b)(*halves, batch, None) for b in (0.0, 0.1, 0.4)]

    none, some, more = quick_jit(losses)(lora.split(params))
    assert some - none > 0.1
    np.testing.assert_allclose(more - none, 4 * (some - none), rtol=1e-3)  # float32 sums


@pytest.mark.parametrize("without", ["num_experts", "router_aux_loss_coef"])
def test_a_model_without_it_is_refused(without):
    model, _ = tiny()
    config = dataclasses.replace(model.config, **{without: {"num_experts": None}.get(without, 0.0)})
    model = dataclasses.replace(model, forward=dataclasses.replace(model.forward, config=config))
    config = train.TrainConfig(balance_experts=True)
    with pytest.raises(ValueError, match="`balance_experts` is for a mixture of experts whose"):
        preparation.balance_of(model, config)
    assert preparation.balance_of(model, train.TrainConfig()) == 0
