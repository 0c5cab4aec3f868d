"""A causal language model small enough to compile in a moment, and data for it."""

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax import train

VOCAB, WIDTH = 23, 16
TOKENS = jax.ShapeDtypeStruct((1, 4), jnp.int32)
CONFIG = lora.LoraConfig(rank=2, alpha=4, target_modules=("mix",), dropout=0.2)


class Toy(NamedTuple):
    """The running mean of embeddings through one dense layer, and a tied head."""

    tokenizer: None = None

    def apply(self, params, tokens, return_hidden=False):
        embedded = params["embed"]["embedding"][tokens]
        hidden = jnp.cumsum(embedded, 1) / jnp.arange(1, tokens.shape[1] + 1)[None, :, None]
        hidden = jnp.tanh(hidden @ params["mix"]["kernel"])
        return hidden if return_hidden else self.head(params, hidden)

    def head(self, params, hidden):
        return hidden @ params["embed"]["embedding"].T


def toy_params(seed=0, width=WIDTH):
    rng = np.random.default_rng(seed)
    embed, mix = rng.normal(size=(VOCAB, width)), rng.normal(size=(width, width)) / width**0.5
    return {
        "embed": {"embedding": jnp.asarray(embed, jnp.float32)},
        "mix": {"kernel": jnp.asarray(mix, jnp.float32)},
    }


def toy_lora(config=CONFIG, seed=0, width=WIDTH):
    params = toy_params(seed, width)
    plan = lora.plan(config, Toy().apply, params, TOKENS)
    return lora.init(jax.random.key(1), plan, params)


def toy_data(count=24, seed=0):
    rng = np.random.default_rng(seed)
    return [_example(rng, int(n)) for n in rng.integers(4, 33, count)]


def _example(rng, length):
    mask = np.arange(length) >= max(1, length // 2)
    return train.Example(rng.integers(0, VOCAB, length).astype(np.int32), mask, "toy")


def toy_config(output_dir=None, **options):
    defaults = {
        "steps": 12, "batch_size": 4, "learning_rate": 0.05, "buckets": 1, "save_every": 4,
        "eval_every": 6, "progress": False,
    }  # fmt: skip
    return train.TrainConfig(output_dir=output_dir, **{**defaults, **options})


def toy_fit(output_dir=None, *, hooks=None, lora_params=None, data=None, evals=5, **options):
    data = toy_data() if data is None else data
    params = toy_lora() if lora_params is None else lora_params
    config = toy_config(output_dir, **options)
    return train.fit(Toy(), params, data, data[:evals], config, lora_config=CONFIG, hooks=hooks)


def numbers(history):
    """What of a history must not depend on the clock."""
    timed = ("seconds", "tokens_per_second", "flops_per_second")
    return [{k: v for k, v in record.items() if k not in timed} for record in history]


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@contextlib.contextmanager
def compiled_once(directory):
    """Equal programs of many runs are compiled once; gives the JAX options that say so."""
    options = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    try:
        yield options
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
