"""Flax NNX: a module with adapters inside, trained by `nnx.Optimizer` as any module is.

`lora.nnx.adapt` leaves the base module as it is and returns one that is called the same way;
what trains in it are `lora.nnx.LoraParam`s. For the pure way there is `lora.nnx.functional`.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lora_jax as lora


class Classifier(nnx.Module):
    """Two layers with dropout between them."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(8, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(64, 5, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.hidden(x))))


def main():
    base = Classifier(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (96, 8))
    labels = jnp.argmax(x[:, :5], axis=-1)

    config = lora.LoraConfig(rank=4, alpha=16, target_modules=("hidden", "out"))
    model = lora.nnx.adapt(base, config, x, key=jax.random.key(2))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=lora.nnx.LoraParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, lora.nnx.LoraParam))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(100)]
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")

    # The base was only borrowed; the merged module is a Classifier of its own.
    plain = lora.nnx.merged(model)
    for module in (base, model, plain):
        module.eval()
    right = {
        name: float(jnp.mean(jnp.argmax(module(x), axis=-1) == labels))
        for name, module in (("base", base), ("adapted", model), ("merged", plain))
    }
    print(", ".join(f"{name}: {share:.0%} right" for name, share in right.items()))
    return {"losses": losses, "right": right}


if __name__ == "__main__":
    main()
