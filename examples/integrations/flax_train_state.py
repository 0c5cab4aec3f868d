"""Flax's TrainState holds the adapters alone; the frozen base is an argument of the step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import serialization
from flax.training.train_state import TrainState

import lora_jax as lora


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="out")(nn.relu(nn.Dense(64, name="hidden")(x)))


def main():
    x = jax.random.normal(jax.random.key(0), (96, 8))
    labels = jnp.argmax(x[:, :4], axis=-1)
    module = Network()
    fn, params, _ = lora.linen.functional(module, module.init(jax.random.key(1), x))
    config = lora.LoraConfig(rank=4, target_modules=("hidden", "out"))
    lora_params = lora.init(jax.random.key(2), lora.plan(config, fn, params, x), params)
    trained, frozen = lora.split(lora_params)
    state = TrainState.create(apply_fn=lora.lorafy(fn), params=trained, tx=optax.adam(1e-2))

    @jax.jit
    def step(state, frozen):
        def loss(trained):
            logits = state.apply_fn(lora.combine(trained, frozen), x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(60):
        state, value = step(state, frozen)
        losses.append(float(value))
    # Flax's own bytes of the state, read into a new one: the optimizer's moments too.
    blank = TrainState.create(apply_fn=state.apply_fn, params=trained, tx=state.tx)
    again = serialization.from_bytes(blank, serialization.to_bytes(state))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), again.params, state.params)
    return {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "moments": sum(m.size for m in jax.tree.leaves(state.opt_state[0].mu)),
        "trained": sum(p.size for p in jax.tree.leaves(trained)),
        "restored": all(jax.tree.leaves(same)),
    }


if __name__ == "__main__":
    print(main())
