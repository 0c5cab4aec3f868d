"""haliax: a module of named axes, adapted, trained and merged."""

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp

import lora_jax as lora

Batch, In, Hidden, Out = (hax.Axis(*x) for x in (("b", 32), ("in", 8), ("hidden", 16), ("out", 4)))


class Mlp(eqx.Module):
    up: hnn.Linear
    down: hnn.Linear

    def __call__(self, x):
        return self.down(hax.tanh(self.up(x)))


def main():
    keys = jax.random.split(jax.random.key(0), 4)
    up = hnn.Linear.init(In, Hidden, key=keys[0])
    model = Mlp(up, hnn.Linear.init(Hidden, Out, key=keys[1]))
    x = hax.random.normal(keys[2], (Batch, In))
    target = hax.sin(hax.random.normal(keys[3], (Batch, Out)))

    def call(model, x):
        return model(hax.named(x, (Batch, In))).array

    config = lora.LoraConfig(rank=2, target_modules=("up", "down"), init="random")
    plan = lora.plan(config, call, model, x.array)
    adapted = lora.init(jax.random.key(1), plan, model)
    y = jax.jit(lora.lorafy(call))(adapted, x.array)
    merged = lora.merge(adapted)
    trained, frozen = lora.split(adapted)

    @jax.jit
    @jax.value_and_grad
    def loss(trained):
        out = lora.lorafy(call)(lora.combine(trained, frozen), x.array)
        return jnp.mean((out - target.array) ** 2)

    losses = []
    for _ in range(101):
        value, grads = loss(trained)
        losses.append(float(value))
        trained = jax.tree.map(lambda p, g: p - 0.01 * g, trained, grads)
    return {
        "adapted": [f"{leaf.path} {leaf.roles}" for leaf in plan.adapted],
        "merge_difference": float(abs(merged(x).array - y).max()),
        "moved": float(abs(model(x).array - y).max()),
        "losses": losses[:: len(losses) - 1],
    }


if __name__ == "__main__":
    print(main())
