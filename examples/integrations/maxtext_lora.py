"""MaxText: its own adapters (`lora_a.kernel`, `lora_b.kernel`) read, merged, none left out."""

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from maxtext.utils.lora_utils import apply_lora_on_base_params_nnx

import lora_jax as lora

# As `load_adapter` gives them: layers apart, heads a dimension of their own.
WIDTH, HEADS, SIZE, RANK, SCALE = 16, 4, 8, 2, 1.5
LAYERS = [("decoder", f"layers_{i}", "self_attention") for i in range(2)]
NAMES = [(*layer, name) for layer in LAYERS for name in ("query", "value")]


def read(params, factors, scale):
    """MaxText's tree with a `LoraArray` for each weight that has factors."""
    flat, found = flatten_dict(params), flatten_dict(factors)
    for path in [path[:-1] for path in found if path[-1] == "lora_a.kernel"]:
        a, b = found.pop((*path, "lora_a.kernel")), found.pop((*path, "lora_b.kernel"))
        w = flat[(*path, "kernel")]
        roles = "i" * (a.ndim - 1) + "o" * (b.ndim - 1)
        flat[(*path, "kernel")] = lora.LoraArray(w, a, b, np.float32(scale), roles=roles)
    if found:
        raise ValueError(f"factors without a weight: {list(found)}")
    return unflatten_dict(flat)


def main():
    keys = iter(jax.random.split(jax.random.key(0), 99))
    shapes = {"kernel": (WIDTH, HEADS, SIZE)}
    shapes |= {"lora_a.kernel": (WIDTH, RANK), "lora_b.kernel": (RANK, HEADS, SIZE)}
    flat = {(*p, x): jax.random.normal(next(keys), s) for p in NAMES for x, s in shapes.items()}
    params = unflatten_dict({path: x for path, x in flat.items() if path[-1] == "kernel"})
    factors = unflatten_dict({path: x for path, x in flat.items() if path[-1] != "kernel"})
    ours = flatten_dict(lora.merge(read(params, factors, SCALE)))
    apply_lora_on_base_params_nnx(params, factors, SCALE)  # in place
    apart = [abs(ours[path] - x).max() for path, x in flatten_dict(params).items()]
    return {"difference": float(max(apart)), "merged": len(apart)}


if __name__ == "__main__":
    print(main())
