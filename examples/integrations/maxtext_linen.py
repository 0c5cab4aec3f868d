"""MaxText: its decoder as a linen module, adapted; the numbers are those of its NNX module."""

import jax
from maxtext.configs import pyconfig
from maxtext.utils.model_creation_utils import from_config
from maxtext_decoder import AT, CONFIG, PARAMS, SIZES, TOKENS, logits

import lora_jax as lora
from lora_jax.array import is_lora


def main():
    key = jax.random.key(1)
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape), PARAMS)
    config = lora.LoraConfig(rank=4, target_modules=CONFIG.target_modules, init="random")
    tree = lora.init(key, lora.plan(config, logits, params, TOKENS), params)

    module = from_config(pyconfig.initialize(**SIZES))  # without `rngs` it is linen's
    rngs = dict(zip(("params", "dropout", "aqt"), jax.random.split(key, 3), strict=True))
    variables = module.init(rngs, TOKENS, AT, enable_dropout=False)
    call, own, _ = lora.linen.functional(module, variables)

    def linen(params, tokens):
        return call(params, tokens, AT, enable_dropout=False)

    # The paths are those of the NNX module, whose leaves go into linen's tree.
    leaves = jax.tree.leaves(tree, is_leaf=is_lora)
    same = jax.tree.unflatten(jax.tree.structure(own), leaves)
    here, there = (lora.lorafy(f)(t, TOKENS) for f, t in ((logits, tree), (linen, same)))
    plan = lora.plan(config, linen, own, TOKENS)
    moved = float(abs(there - logits(params, TOKENS)).max())
    return {
        "difference": float(abs(here - there).max()),
        "moved": moved,
        "adapted": len(plan.adapted),
    }


if __name__ == "__main__":
    print(main())
