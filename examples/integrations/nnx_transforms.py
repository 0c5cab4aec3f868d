"""Flax NNX: nnx.Optimizer, nnx.jit, nnx.split, nnx.vmap and nnx.scan over adapted modules."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lora_jax as lora


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x)))


def main():
    base, x = Block(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (64, 8))
    config = lora.LoraConfig(rank=2, target_modules=("up", "down"))
    model = lora.nnx.adapt(base, config, x, key=jax.random.key(1))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=lora.nnx.LoraParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(x) - jnp.sin(x)) ** 2)

        # The base's parameters are no `nnx.Param`s here, so `nnx.grad` needs no filter.
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(60)]

    # Two adapters of one base, side by side: the axis is the adapters' alone.
    graph, first, rest = nnx.split(model, lora.nnx.LoraParam, ...)
    second = jax.tree.map(lambda leaf: leaf + 0.1, first)
    pair = nnx.merge(graph, jax.tree.map(lambda *both: jnp.stack(both), first, second), rest)
    expected = [nnx.merge(graph, adapter, rest) for adapter in (first, second)]
    axes = nnx.StateAxes({lora.nnx.LoraParam: 0, ...: None})
    mapped = nnx.vmap(lambda model, x: model(x), in_axes=(axes, None))(pair, x)
    # One base applied twice, with another adapter each time.
    scan = nnx.scan(lambda x, m: (m(x), None), in_axes=(nnx.Carry, axes), out_axes=(nnx.Carry, 0))
    scanned, _ = scan(x, pair)
    return {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "trained": sum(leaf.size for leaf in jax.tree.leaves(first)),
        "vmap_difference": float(max(abs(mapped[i] - expected[i](x)).max() for i in (0, 1))),
        "scan_difference": float(abs(scanned - expected[1](expected[0](x))).max()),
    }


if __name__ == "__main__":
    print(main())
