"""Flax linen: a Transformer block whose attention is adapted, batch statistics and all.

`lora.linen.functional` takes a module and its variables apart into a pure function and its
parameters; everything after that is as for plain JAX.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import lora_jax as lora


class Block(nn.Module):
    """Attention, a normalization that keeps running statistics, and an MLP."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return x + nn.Dense(x.shape[-1], name="down")(nn.gelu(nn.Dense(64, name="up")(x)))


def main():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (8, 12, 32))
    target = jnp.flip(x, axis=1)  # what attention can do and an MLP cannot

    module = Block()
    fn, params, state = lora.linen.functional(module, module.init(keys[1], x))
    config = lora.LoraConfig(
        rank=8, alpha=16, target_modules=("query", "key", "value", "out"), modules_to_save=("norm",)
    )
    # With `state`, the function returns the updated statistics beside its output.
    plan = lora.plan(config, fn, params, x, state=state, train=True)
    print(plan)
    trainable, frozen = lora.split(lora.init(keys[2], plan, params))
    tx = optax.adam(1e-2)

    def loss(trainable, state):
        lora_params = lora.combine(trainable, frozen)
        y, state = lora.lorafy(fn)(lora_params, x, state=state, train=True)
        return jnp.mean((y - target) ** 2), state

    @jax.jit
    def step(trainable, opt_state, state):
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(trainable, state)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(trainable, updates), opt_state, state, value

    opt_state, losses = tx.init(trainable), []
    for _ in range(60):
        trainable, opt_state, state, value = step(trainable, opt_state, state)
        losses.append(float(value))
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")

    # A plain linen module again: merged parameters and the new statistics.
    lora_params = lora.combine(trainable, frozen)
    variables = lora.linen.variables(lora.merge(lora_params), state)
    difference = jnp.abs(
        module.apply(variables, x) - lora.lorafy(fn)(lora_params, x, state=state)[0]
    )
    print(f"merged against adapted, largest difference: {difference.max():.1e}")
    return {"losses": losses, "difference": float(difference.max())}


if __name__ == "__main__":
    main()
