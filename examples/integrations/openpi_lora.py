"""openpi: its LoRA leaves (`w`, `lora_a`, `lora_b`) read and merged, none left out.

The output projection contracts its heads in `lora_a` and sums them out of `lora_b`: its change is
one product over all heads, not one a head. The feed-forward takes no alpha / rank.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import lora_jax as lora

# openpi's equations, and small weights for them; layers of a scan come first in a real one.
SHAPES = {
    ("attn", "q_einsum", "w"): ("BTD,NDH->BTNH", (4, 8, 6)),
    ("attn", "kv_einsum", "w"): ("BSD,2KDH->2BSKH", (2, 1, 8, 6)),
    ("attn", "attn_vec_einsum", "w"): ("BTNH,NHD->BTD", (4, 6, 8)),
    ("mlp", "gating_einsum"): ("BTD,2DF->2BTF", (2, 8, 16)),
}


def read(params, alpha):
    """openpi's tree with a `LoraArray` for each weight that has factors."""
    flat = flatten_dict(params)
    for path in [path for path in flat if path[-1].endswith("lora_a")]:
        stem = path[-1].removesuffix("lora_a")  # "", or "linear_" and the like in the feed-forward
        base = (*path[:-1], stem.removesuffix("_") or "w")
        w, a, b = flat[base], flat.pop(path), flat.pop((*path[:-1], f"{stem}lora_b"))
        roles = "s" * (w.ndim - 2) + "io"
        if path[-2].startswith("attn_vec_einsum"):
            roles, b = roles.replace("si", "ii"), b.sum(axis=-3)
        scale = np.full(w.shape[: roles.count("s")], 1.0 if stem else alpha / a.shape[-1])
        flat[base] = lora.LoraArray(w, a, b, scale.astype(np.float32), roles=roles)
    if left := [path for path in flat if "lora" in path[-1]]:
        raise ValueError(f"factors without a weight: {left}")
    return unflatten_dict(flat)


def main(alpha=8.0, rank=2):
    keys, flat, outs = iter(jax.random.split(jax.random.key(0), 99)), {}, {}
    for path, (equation, shape) in SHAPES.items():
        given, w, out = equation.replace("->", ",").split(",")
        sizes = dict(zip(w, shape, strict=True)) | dict(B=2, T=3, S=3, L=rank)
        a, b, middle = w.replace(w[-1], "L"), w.replace(w[-2], "L"), out.replace(w[-1], "L")
        arrays = [jax.random.normal(next(keys), [sizes[x] for x in t]) for t in (given, w, a, b)]
        stem, scale = ("", alpha / rank) if path[-1] == "w" else (f"{path[-1]}_", 1.0)
        flat[path] = arrays[1]
        flat |= {(*path[:-1], f"{stem}lora_{f}"): arrays[i] for i, f in ((2, "a"), (3, "b"))}
        low = jnp.einsum(f"{given},{a}->{middle}", arrays[0], arrays[2])
        change = scale * jnp.einsum(f"{middle},{b}->{out}", low, arrays[3])
        outs[path] = equation, arrays[0], jnp.einsum(equation, *arrays[:2]) + change
    merged = flatten_dict(lora.merge(read(unflatten_dict(flat), alpha)))
    apart = [abs(jnp.einsum(e, x, merged[path]) - y).max() for path, (e, x, y) in outs.items()]
    return {"difference": float(max(apart)), "read": len(flat), "merged": len(merged)}


if __name__ == "__main__":
    print(main())
