"""openpi: its LoRA leaves (`w`, `lora_a`, `lora_b`) read, merged and exported, none left out.

The output projection contracts its heads in `lora_a` and sums them out of `lora_b`: its change is
one product over all heads, not one a head. The feed-forward takes no alpha / rank.
"""

import tempfile

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from openpi_layers import ALPHA, difference, layers
from safetensors.numpy import load_file

import lora_jax as lora

# Names in openpi's port to PyTorch. The action expert's leaves end in `_1`, and its names begin
# with "paligemma_with_expert.gemma_expert.model.".
THERE = "paligemma_with_expert.paligemma.model.language_model.layers.{}."
TABLE = """attn.q_einsum.w : self_attn.q_proj : (n h) d -> l n d h
attn.kv_einsum.w : self_attn.{k,v}_proj : (k h) d -> l c k d h
attn.attn_vec_einsum.w : self_attn.o_proj : d (n h) -> l n h d
mlp.gating_einsum : mlp.{gate,up}_proj : o i -> l c i o
mlp.linear : mlp.down_proj : o i -> l i o"""
RULES = [line.split(" : ") for line in TABLE.splitlines()]
RULES = [(f"layers.{a}", f"{THERE}{b}.weight", layout) for a, b, layout in RULES]
MAP = lora.hf.name_map("openpi", RULES)


def read(params):
    """openpi's tree with a `LoraArray` for each weight that has factors."""
    flat = flatten_dict(params)
    for path in [path for path in flat if path[-1].endswith("lora_a")]:
        stem = path[-1].removesuffix("lora_a")  # "", or "linear_" and the like in the feed-forward
        base = (*path[:-1], stem.removesuffix("_") or "w")
        w, a, b = flat[base], flat.pop(path), flat.pop((*path[:-1], f"{stem}lora_b"))
        roles, rank = "s" * (w.ndim - 2) + "io", a.shape[-1]
        if path[-2].startswith("attn_vec_einsum"):
            roles, b = roles.replace("sio", "iio"), b.sum(axis=-3)
        scale = np.full(w.shape[: roles.count("s")], 1 if stem else ALPHA / rank, np.float32)
        flat[base] = lora.LoraArray(w, a, b, scale, roles=roles)
    if left := [path for path in flat if "lora" in path[-1]]:
        raise ValueError(f"factors without a weight: {left}")
    return unflatten_dict(flat)


def main():
    leaves, results = layers(jax.random.key(0))
    merged = lora.merge(read(unflatten_dict(leaves)))
    with tempfile.TemporaryDirectory() as folder:
        lora.hf.save_weights(f"{folder}/merged", merged, MAP)
        there = load_file(f"{folder}/merged/model.safetensors")
    apart = difference(results, RULES, there)
    return {"difference": apart, "read": len(leaves), "exported": len(there)}


if __name__ == "__main__":
    print(main())
