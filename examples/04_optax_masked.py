"""optax on the whole tree: `lora.masked` keeps state for what trains and moves nothing else.

Splitting the tree (01_quickstart.py) is the leaner way. Where a training loop exists already and
takes gradients of all parameters, masking its optimizer is all that has to change. The second
half gives A and B learning rates of their own (LoRA+).
"""

import jax
import jax.numpy as jnp
import optax

import lora_jax as lora


def network(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def size(tree):
    """Bytes of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def train(tx, lora_params, x, y, steps=100):
    """An ordinary loop over the whole tree; the base's gradients are dropped by the mask."""

    def loss(lora_params):
        return jnp.mean((lora.lorafy(network)(lora_params, x) - y) ** 2)

    @jax.jit
    def step(lora_params, state):
        value, grads = jax.value_and_grad(loss)(lora_params)
        updates, state = tx.update(grads, state, lora_params)
        return optax.apply_updates(lora_params, updates), state, value

    state, losses = tx.init(lora_params), []
    for _ in range(steps):
        lora_params, state, value = step(lora_params, state)
        losses.append(float(value))
    return lora_params, state, losses


def is_b(path):
    """Whether a path of `jax.tree_util` leads to a B matrix."""
    return getattr(path[-1], "name", None) == "b"


def main():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "up": {"kernel": jax.random.normal(keys[0], (32, 128)) / 32**0.5},
        "down": {"kernel": jax.random.normal(keys[1], (128, 8)) / 128**0.5},
    }
    x = jax.random.normal(keys[2], (64, 32))
    y = jnp.sin(x[:, :8])
    plan = lora.plan(lora.LoraConfig(rank=4, target_modules="all-linear"), network, params, x)
    start = lora.init(keys[3], plan, params)

    trained, state, losses = train(lora.masked(optax.adamw(1e-2)), start, x, y)
    adapters = size(lora.split(start)[0])
    moments = size(state) - 4  # beside the step counter
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(
        f"AdamW's moments: {moments} bytes, {moments / adapters:.0f} times the adapters' {adapters}"
    )
    unmoved = jnp.array_equal(trained["up"]["kernel"].w, params["up"]["kernel"])
    print("the base is as it was:", unmoved)

    labels = lambda tree: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: "b" if is_b(path) else "a", tree
    )
    plus = optax.multi_transform({"a": optax.adamw(1e-2), "b": optax.adamw(4e-2)}, labels)
    _, _, faster = train(lora.masked(plus), start, x, y)
    print(f"after 20 steps: {losses[20]:.3f}, with B learning 4 times as fast {faster[20]:.3f}")
    return {
        "losses": losses, "faster": faster, "ratio": moments / adapters, "unmoved": bool(unmoved)
    }  # fmt: skip


if __name__ == "__main__":
    main()
