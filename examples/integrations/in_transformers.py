"""A training loop, and PEFT in transformers, for the programs of other libraries' decoders."""

import tempfile

import jax
import numpy as np
import optax
import torch
from peft import PeftModel

import lora_jax as lora


def trained(call, tree, tokens, steps=30):
    """The tree after some steps on next tokens, and the first and the last loss."""
    tx, losses = lora.masked(optax.adam(1e-2)), []

    @jax.jit
    @lora.value_and_grad
    def loss(tree):
        y = lora.lorafy(call)(tree, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(y, tokens[:, 1:]).mean()

    state = tx.init(tree)
    for _ in range(steps):
        value, grads = loss(tree)
        updates, state = tx.update(grads, state, tree)
        tree, losses = optax.apply_updates(tree, updates), [*losses, float(value)]
    return tree, [losses[0], losses[-1]]


def logits_there(kind, config, params, tree, lora_config, name_map, tokens):
    """A transformers class's logits of the base, and with the adapter in vLLM's form."""
    with tempfile.TemporaryDirectory() as folder:
        lora.hf.save_weights(f"{folder}/base", params, name_map)
        config.save_pretrained(f"{folder}/base")
        lora.hf.save_peft(f"{folder}/adapter", tree, lora_config, name_map=name_map, target="vllm")
        model, ids = kind.from_pretrained(f"{folder}/base"), torch.tensor(np.asarray(tokens))
        with torch.no_grad():
            base = model(ids).logits.numpy()
            adapted = PeftModel.from_pretrained(model, f"{folder}/adapter")
            return base, adapted(ids).logits.numpy()


def compared(here, there):
    """The largest differences: of both sides, and that the adapter makes."""
    pairs = {"base_difference": (here[0], there[0]), "difference": (here[1], there[1])}
    pairs |= {"moved": there}
    return {name: float(abs(x - y).max()) for name, (x, y) in pairs.items()}
