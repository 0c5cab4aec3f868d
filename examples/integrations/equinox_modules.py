"""Equinox: a module with strings and functions as leaves, adapted, saved and restored."""

import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp

import lora_jax as lora


class Encoder(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    name: str  # a leaf that is no array, as the MLP's activation is

    def __call__(self, x):
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h)
        return x + jax.vmap(self.mlp)(x)


def main():
    keys = jax.random.split(jax.random.key(0), 4)
    model = Encoder(
        attention=eqx.nn.MultiheadAttention(4, 32, key=keys[0]),
        norm=eqx.nn.LayerNorm(32),
        mlp=eqx.nn.MLP(32, 32, 64, 1, key=keys[1]),
        name="encoder",
    )
    x = jax.random.normal(keys[2], (6, 32))

    def call(model, x):
        return model(x)

    config = lora.LoraConfig(rank=4, target_modules="all-linear", init="random")
    plan = lora.plan(config, call, model, x)
    adapted = lora.init(keys[3], plan, model)
    y = eqx.filter_jit(lora.lorafy(call))(adapted, x)
    merged = lora.merge(adapted)
    with tempfile.TemporaryDirectory() as folder:
        lora.checkpoint.save(f"{folder}/adapter", adapted, config)
        restored, _ = lora.checkpoint.restore(f"{folder}/adapter", call, model, x)
    trained, frozen = lora.split(adapted)
    grads = eqx.filter_grad(lambda t: jnp.sum(lora.lorafy(call)(lora.combine(t, frozen), x)))(
        trained
    )
    return {
        "adapted": len(plan.adapted),
        "merge_difference": float(abs(merged(x) - y).max()),
        "moved": float(abs(model(x) - y).max()),
        "restored_difference": float(abs(lora.lorafy(call)(restored, x) - y).max()),
        "least_gradient": float(min(abs(g).max() for g in jax.tree.leaves(grads))),
        "kept": merged.name == "encoder" and merged.mlp.activation is model.mlp.activation,
    }


if __name__ == "__main__":
    print(main())
