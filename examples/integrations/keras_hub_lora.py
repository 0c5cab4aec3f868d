"""keras-hub: an adapter of its `save_lora_weights` here, and one of ours in `load_lora_weights`."""

import os
import tempfile

import jax
import numpy as np

import lora_jax as lora

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported
import keras_hub  # noqa: E402

INPUTS = {"token_ids": np.arange(24).reshape(3, 8) % 61, "padding_mask": np.ones((3, 8), np.int32)}
SIZES = dict(num_layers=2, num_query_heads=4, num_key_value_heads=2, hidden_dim=32)
NAMES = ["query", "value", "attention_output", "feedforward_gate_dense"]


def backbone(weights=None):
    made = keras_hub.models.LlamaBackbone(vocabulary_size=64, intermediate_dim=64, **SIZES)
    made.set_weights(weights or made.get_weights())
    return made


def main():
    base = backbone()
    weights, every = base.get_weights(), base._flatten_layers(include_self=False)
    every = enumerate(layer for layer in every if layer.weights)
    layers = {i: layer.kernel.path for i, layer in every if hasattr(layer, "kernel")}
    fixed = [v.value for v in base.non_trainable_variables]

    def call(params, inputs):
        values = [params[v.path] for v in base.trainable_variables]
        return base.stateless_call(values, fixed, inputs)[0]

    params = {v.path: v.value for v in base.trainable_variables}
    theirs, other, key = backbone(weights), backbone(weights), jax.random.key(0)
    theirs.enable_lora(3, NAMES)
    for v in theirs.trainable_variables:
        v.assign(jax.random.normal(jax.random.fold_in(key, len(v.path)), v.shape) / 4)
    config = lora.LoraConfig(rank=2, target_modules=NAMES, init="random")
    tree = lora.init(key, lora.plan(config, call, params, INPUTS), params)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_lora_weights(name := f"{folder}/theirs.lora.h5")
        read, _ = lora.hf.load_keras_lora(name, call, params, INPUTS, layers=layers)
        rank = lora.hf.save_keras_lora(f"{folder}/ours.lora.h5", tree, layers=layers)
        other.enable_lora(rank, NAMES)
        other.load_lora_weights(f"{folder}/ours.lora.h5")
    here, start = jax.jit(lora.lorafy(call)), call(params, INPUTS)
    return {
        "read_difference": float(abs(here(read, INPUTS) - theirs(INPUTS)).max()),
        "written_difference": float(abs(here(tree, INPUTS) - other(INPUTS)).max()),
        "moved": [float(abs(y(INPUTS) - start).max()) for y in (theirs, other)],
        "rank": rank,
    }


if __name__ == "__main__":
    print(main())
