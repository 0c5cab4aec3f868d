"""A task for rank sweeps: a matrix is to be changed by one of rank 3."""

import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax import analysis
from lora_jax.train import TrainConfig

D = 16
# What is to be learned: a change of rank 3, with a clear gap behind it.
_U = np.linalg.qr(np.random.default_rng(1).normal(size=(D, 3)))[0]
_V = np.linalg.qr(np.random.default_rng(2).normal(size=(D, 3)))[0]
CHANGE = jnp.asarray(_U @ np.diag([3.0, 2.0, 1.5]) @ _V.T, jnp.float32)
PARAMS = {"layer": {"kernel": jnp.asarray(np.random.default_rng(3).normal(size=(D, D)) / 4,
                                          jnp.float32)}}  # fmt: skip
TARGET = np.asarray(PARAMS["layer"]["kernel"] + CHANGE)
TRAIN = TrainConfig(steps=60, warmup=0.1, progress=False, clip=1.0)
CONFIG = lora.LoraConfig(rank=4, alpha=8, target_modules=("layer",))


def batches(seed, count=60):
    random = np.random.default_rng(seed)
    for _ in range(count):
        x = random.normal(size=(32, D)).astype(np.float32)
        yield x, x @ TARGET


EVALUATION = list(batches(99, 4))


def apply(params, x):
    return x @ params["layer"]["kernel"]


def loss(params, batch):
    x, y = batch
    return jnp.mean((apply(params, x) - y) ** 2)


def score(params):
    return np.concatenate([np.mean((apply(params, x) - y) ** 2, axis=1) for x, y in EVALUATION])


TASK = analysis.Task(
    params=PARAMS,
    loss=loss,
    batches=batches,
    score=score,
    tuning=lambda params: float(np.mean(score(params))),
    metric="squared error",
    lower_is_better=True,
    data="rank 3",
)
SWEEP = analysis.SweepConfig(
    ranks=(1, 2, 4), learning_rates=(3e-3, 3e-2), full_learning_rates=(3e-2,), together=3,
    tolerance=0.5,
)  # fmt: skip
