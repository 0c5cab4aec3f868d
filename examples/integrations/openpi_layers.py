"""Layers by openpi's equations, with its LoRA leaves, small and random, and their results."""

import re

import jax
import jax.numpy as jnp

LAYERS, RANK, ALPHA = 3, 2, 8.0
# The tokens, the weight and the result of a layer; layers come first in every leaf.
EQUATIONS = {
    ("attn", "q_einsum", "w"): ("BTD,NDH->BTNH", (4, 8, 6)),
    ("attn", "kv_einsum", "w"): ("BTD,2KDH->2BTKH", (2, 1, 8, 6)),
    ("attn", "attn_vec_einsum", "w"): ("BTNH,NHD->BTD", (4, 6, 8)),
    ("mlp", "gating_einsum"): ("BTD,2DF->2BTF", (2, 8, 16)),
    ("mlp", "linear"): ("BTF,FD->BTD", (16, 8)),
}


def layers(key):
    """Leaves by path, and by the path of a weight the tokens that it meets and its result."""
    keys, leaves, results = iter(jax.random.split(key, 99)), {}, {}
    for path, (equation, shape) in EQUATIONS.items():
        given, w, out = equation.replace("->", ",").split(",")
        a, b, middle = w.replace(w[-1], "L"), w.replace(w[-2], "L"), out.replace(w[-1], "L")
        sizes = dict(zip(w, shape, strict=True)) | dict(Z=LAYERS, B=2, T=3, L=RANK)
        given, w, a, b, middle, out = (f"Z{term}" for term in (given, w, a, b, middle, out))
        terms = (given, w, a, b)
        x, base, *factors = (jax.random.normal(next(keys), [sizes[i] for i in t]) for t in terms)
        stem = "" if path[-1] == "w" else f"{path[-1]}_"
        names = path, (*path[:-1], f"{stem}lora_a"), (*path[:-1], f"{stem}lora_b")
        leaves |= {("layers", *n): leaf for n, leaf in zip(names, (base, *factors), strict=True)}
        low = jnp.einsum(f"{given},{a}->{middle}", x, factors[0])
        change = jnp.einsum(f"{middle},{b}->{out}", low, factors[1])
        scale = 1.0 if stem else ALPHA / RANK
        results[("layers", *path)] = x, jnp.einsum(f"{given},{w}->{out}", x, base) + scale * change
    return leaves, results


def difference(results, rules, tensors):
    """The largest difference of `results` from those of exported tensors, (out, in)."""
    found = []
    for path, name, _ in rules:
        x, expected = results[tuple(path.split("."))]
        two = re.search(r"{(\w+),(\w+)}", name)
        names = [name.replace(two[0], part) for part in two.groups()] if two else [name]
        for layer in range(LAYERS):
            there = [tensors[n.format(layer)] for n in names]
            y = jnp.stack([x[layer].reshape(2, 3, -1) @ w.T for w in there])
            found.append(abs(y.reshape(expected[layer].shape) - expected[layer]).max())
    return float(max(found))
