"""optax.partition by the factors' names: LoRA+ (a larger rate for B) and LoRA-FA (A fixed)."""

import jax
import jax.numpy as jnp
import optax

import lora_jax as lora


def network(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def factor(path):
    """The name of a trained array: "a" or "b"."""
    return jax.tree_util.keystr(path[-1:], simple=True)


def main():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": {"kernel": jax.random.normal(keys[0], (8, 32)) / 8**0.5},
        "down": {"kernel": jax.random.normal(keys[1], (32, 4)) / 32**0.5},
    }
    x = jax.random.normal(keys[2], (64, 8))
    y = jnp.sin(x[:, :4] + x[:, 4:])
    plan = lora.plan(lora.LoraConfig(rank=2, target_modules="all-linear"), network, params, x)
    start, frozen = lora.split(lora.init(jax.random.key(1), plan, params))
    labels = jax.tree_util.tree_map_with_path(lambda path, _: factor(path), start)
    ways = {
        "lora": {"a": optax.adam(1e-3), "b": optax.adam(1e-3)},
        "lora_plus": {"a": optax.adam(1e-3), "b": optax.adam(16e-3)},
        "lora_fa": {"a": optax.set_to_zero(), "b": optax.adam(16e-3)},
    }

    def loss(trained):
        return jnp.mean((lora.lorafy(network)(lora.combine(trained, frozen), x) - y) ** 2)

    figures = {"first_loss": float(loss(start))}
    for way, by_factor in ways.items():
        tx = optax.partition(by_factor, labels)
        trained, state = start, tx.init(start)

        @jax.jit
        def step(trained, state, tx=tx):
            updates, state = tx.update(jax.grad(loss)(trained), state, trained)
            return optax.apply_updates(trained, updates), state

        for _ in range(100):
            trained, state = step(trained, state)
        moved = jax.tree.map(lambda new, old: float(abs(new - old).max()), trained, start)
        named = [(factor(path), move) for path, move in jax.tree_util.tree_leaves_with_path(moved)]
        figures[f"{way}_loss"] = float(loss(trained))
        figures[f"{way}_a_moved"] = max(move for name, move in named if name == "a")
    return figures


if __name__ == "__main__":
    print(main())
