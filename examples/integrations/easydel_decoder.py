"""EasyDeL: its Llama trained in a loop of one's own; base and adapter in transformers by PEFT."""

# isort: off
import os

import torch  # noqa: F401  (before JAX: in_transformers needs it)
import easydel

# EasyDeL 0.3 sets options of XLA that a jaxlib of another release ends the process for.
os.environ["XLA_FLAGS"] = ""
# isort: on

import jax
import numpy as np
from flax import nnx
from in_transformers import compared, logits_there, trained
from transformers import LlamaConfig, LlamaForCausalLM

import lora_jax as lora

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
DTYPES = dict(dtype=jax.numpy.float32, param_dtype=jax.numpy.float32)
CONFIG = lora.LoraConfig(rank=4)  # all seven projections
# Modules have Hugging Face's names, and every parameter but the table is a kernel.
RULES = [("*norm.kernel", "*norm.weight"), ("*.kernel", "*.weight", "o i -> i o")]
MAP = lora.hf.name_map("EasyDeL", [*RULES, ("*.embedding", "*.weight")])
TOKENS = np.arange(24).reshape(2, 12) % 7 + 1


def main():
    config = easydel.LlamaConfig(**SIZES, attn_mechanism="vanilla", attn_dtype=jax.numpy.float32)
    model = easydel.LlamaForCausalLM(config, **DTYPES, rngs=nnx.Rngs(0))
    key = jax.random.key(1)
    with config.mesh:
        model(input_ids=jax.numpy.asarray(TOKENS))  # the first call adds variables: its frequencies
        call, params, _ = lora.nnx.functional(model)

        def logits(params, tokens):
            return call(params, input_ids=jax.numpy.asarray(tokens)).logits

        params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape), params)
        tree = lora.init(key, lora.plan(CONFIG, logits, params, TOKENS), params)
        tree, losses = trained(logits, tree, TOKENS)
        here = logits(params, TOKENS), lora.lorafy(logits)(tree, TOKENS)
        merged = logits(lora.merge(tree), TOKENS)
    theirs = LlamaForCausalLM, LlamaConfig(**SIZES)
    there = logits_there(*theirs, params, tree, CONFIG, MAP, TOKENS)
    found = {"merged_difference": float(abs(merged - here[1]).max()), "losses": losses}
    return compared(here, there) | found


if __name__ == "__main__":
    print(main())
