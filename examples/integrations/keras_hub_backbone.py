"""keras-hub under JAX: a backbone as a function of its variables, named by path, and adapted."""

import os

import jax
import numpy as np

import lora_jax as lora

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported
import keras_hub  # noqa: E402


def main():
    model = keras_hub.models.LlamaBackbone(
        vocabulary_size=64,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
    )
    inputs = {
        "token_ids": np.arange(24).reshape(3, 8) % 61,
        "padding_mask": np.ones((3, 8), np.int32),
    }
    fixed = [v.value for v in model.non_trainable_variables]

    def call(params, inputs):
        values = [params[v.path] for v in model.trainable_variables]
        return model.stateless_call(values, fixed, inputs)[0]

    params = {v.path: v.value for v in model.trainable_variables}
    config = lora.LoraConfig(rank=4, target_modules=("query", "value"), init="random")
    plan = lora.plan(config, call, params, inputs)
    adapted = lora.init(jax.random.key(0), plan, params)
    y = jax.jit(lora.lorafy(call))(adapted, inputs)
    merged = lora.merge(adapted)
    before = model(inputs)
    for v in model.trainable_variables:
        v.assign(merged[v.path])
    return {
        "adapted": [f"{leaf.path} {leaf.roles}" for leaf in plan.adapted],
        "merge_difference": float(abs(model(inputs) - y).max()),
        "moved": float(abs(before - y).max()),
    }


if __name__ == "__main__":
    print(main())
