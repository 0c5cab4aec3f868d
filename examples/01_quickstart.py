"""The idea on plain JAX: a function, a parameter tree, and adapters on some of its leaves.

A small network knows sin(x). It is adapted to sin(x + 1) without touching one of its weights.
"""

import jax
import jax.numpy as jnp
import optax

import lora_jax as lora


def network(params, x):
    """Three dense layers; nothing in here knows about LoRA."""
    for name in ("first", "second"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["last"]["kernel"]


def init_network(key, width=64):
    """Random parameters as nested dictionaries; any pytree would do."""
    keys = jax.random.split(key, 4)
    return {
        "first": {
            "kernel": jax.random.normal(keys[0], (1, width)),
            "bias": jax.random.uniform(keys[1], (width,), minval=-3, maxval=3),
        },
        "second": {
            "kernel": jax.random.normal(keys[2], (width, width)) / width**0.5,
            "bias": jnp.zeros(width),
        },
        "last": {"kernel": jax.random.normal(keys[3], (width, 1)) / width**0.5},
    }


def fit(loss, params, *, steps, learning_rate):
    """Adam on whatever tree it is given."""
    tx = optax.adam(learning_rate)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def main():
    x = jnp.linspace(-3, 3, 128)[:, None]
    base = fit(
        lambda p: jnp.mean((network(p, x) - jnp.sin(x)) ** 2),
        init_network(jax.random.key(0)),
        steps=500,
        learning_rate=3e-3,
    )

    # Which leaves, and what each of their dimensions is for, is read off the function itself.
    config = lora.LoraConfig(
        rank=4, alpha=8, target_modules=("second", "last"), rank_pattern={"last": 1}
    )
    plan = lora.plan(config, network, base, x)
    print(plan)

    # The same tree, with implicit W + s·A·B at the adapted leaves. B starts at zero.
    lora_params = lora.init(jax.random.key(1), plan, base)
    adapted = lora.lorafy(network)
    print(lora.format_trainable_parameters(lora_params))
    print(
        "the same outputs at the start:", jnp.array_equal(adapted(lora_params, x), network(base, x))
    )

    # Two trees of the same structure, None in the other's places: only the first one trains.
    trainable, frozen = lora.split(lora_params)

    def loss(trainable):
        return jnp.mean((adapted(lora.combine(trainable, frozen), x) - jnp.sin(x + 1)) ** 2)

    before = loss(trainable)
    trainable = fit(loss, trainable, steps=500, learning_rate=1e-2)
    print(f"mean squared error: {before:.4f} before, {loss(trainable):.4f} after")

    # Plain parameters again, for a function that has never heard of adapters.
    merged = lora.merge(lora.combine(trainable, frozen))
    error = jnp.mean((network(merged, x) - jnp.sin(x + 1)) ** 2)
    print(f"merged into the base: {error:.4f}")
    return {"before": before, "after": loss(trainable), "merged": error}


if __name__ == "__main__":
    main()
