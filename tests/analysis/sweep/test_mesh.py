"""A sweep of a base that is spread over eight devices."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import analysis, models

from tests.support.sweep_task import CONFIG, PARAMS, TASK, TRAIN

pytestmark = pytest.mark.once
SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=SLOW)])
def test_a_sweep_on_a_mesh_finds_what_one_device_finds(kind, tmp_path):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(kind,) * 2)
    spread = NamedSharding(mesh, P("fsdp", None))
    task = TASK._replace(params=jax.tree.map(lambda x: jax.device_put(x, spread), PARAMS))
    settings = analysis.SweepConfig(
        ranks=(1, 2), learning_rates=(1e-2, 3e-2), full_learning_rates=(3e-2,), save_every=None
    )
    config = dataclasses.replace(TRAIN, steps=3, epsilon=1e-3)
    one = analysis.rank_sweep(TASK, settings, CONFIG, config, log=lambda text: None)
    config = dataclasses.replace(config, output_dir=tmp_path)
    eight = analysis.rank_sweep(task, settings, CONFIG, config, log=lambda text: None)
    assert len(one.runs) == len(eight.runs) == 6
    for want, got in zip(one.runs, eight.runs, strict=True):
        np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5)
        if want.values is not None:
            assert got.values is not None
            np.testing.assert_allclose(got.values, want.values, rtol=1e-5)


def test_factors_of_a_stack_lie_like_their_weight():
    mesh = models.make_mesh(fsdp=8)
    stacked = lora.stack([lora.init(jax.random.key(0), _plan(), PARAMS)] * 2)
    leaf = stacked["layer"]["kernel"]
    w = jax.device_put(leaf.w, NamedSharding(mesh, P("fsdp", None)))
    moved = lora.sharding.follow({"w": dataclasses.replace(leaf, w=w)})["w"]
    assert moved.a.sharding.spec == P(None, "fsdp", None)
    assert moved.b.sharding.is_fully_replicated


def _plan():
    return lora.plan(CONFIG, TASK.loss, PARAMS, next(iter(TASK.batches(0))))
