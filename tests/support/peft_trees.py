"""Trees of LoRA leaves made by hand for the tests of PEFT files: no plan, no model needed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.array import (
    LoraArray,
    RowsArray,
    SavedArray,
    effective,
    is_lora,
    leaves_by_path,
)
from lora_jax.config import matching
from lora_jax.config.lora import LoraConfig
from lora_jax.dims import b_dims, factor_shapes, in_dims, out_dims, sizes
from lora_jax.hf.checkpoint import names
from lora_jax.hf.peft.index import adapts, make_index, modules_of
from lora_jax.hf.peft.tensors import TensorSpec, tensor_specs

D, HEADS, KV, HD, F, V, L = 16, 4, 2, 4, 24, 40, 3

# Shapes of one layer's weights, (in, out).
LAYER = {
    "self_attn.q_proj.kernel": (D, HEADS * HD),
    "self_attn.k_proj.kernel": (D, KV * HD),
    "self_attn.v_proj.kernel": (D, KV * HD),
    "self_attn.o_proj.kernel": (HEADS * HD, D),
    "mlp.gate_proj.kernel": (D, F),
    "mlp.up_proj.kernel": (D, F),
    "mlp.down_proj.kernel": (F, D),
    "input_layernorm.scale": (D,),
    "post_attention_layernorm.scale": (D,),
}


QV = LoraConfig(rank=4, alpha=6, target_modules=("q_proj", "v_proj"))


def equal(one, other) -> None:
    """Asserts that two trees have the same structure and the same numbers."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def nested(flat: dict) -> dict:
    """Dotted paths to nested dicts."""
    tree = {}
    for path, leaf in flat.items():
        *around, last = path.split(".")
        node = tree
        for part in around:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def llama_shapes(stacked: bool = True, biases: bool = False) -> dict[str, tuple[int, ...]]:
    """Paths and shapes of a tiny Llama's parameters."""
    layer = dict(LAYER)
    if biases:
        layer |= {f"self_attn.{p}_proj.bias": (LAYER[f"self_attn.{p}_proj.kernel"][1],)
                  for p in "qkvo"}  # fmt: skip
    if stacked:
        layers = {f"model.layers.{k}": (L, *s) for k, s in layer.items()}
    else:
        layers = {f"model.layers.{i}.{k}": s for i in range(L) for k, s in layer.items()}
    return {
        "model.embed_tokens.embedding": (V, D),
        **layers,
        "model.norm.scale": (D,),
        "lm_head.kernel": (D, V),
    }


def random_params(seed: int = 0, *, stacked: bool = True, biases: bool = False) -> dict:
    rng = np.random.default_rng(seed)
    flat = {
        path: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for path, shape in llama_shapes(stacked, biases).items()
    }
    return nested(flat)


def planted(params: dict, config: LoraConfig, *, roles: dict | None = None) -> dict:
    """`params` with zero adapters where a config means them: what plan and init would make.

    Args:
      params: nested dicts.
      roles: roles by path where they are not `s...sio`.
    """
    out = {}
    for path, w in leaves_by_path(params).items():
        role = (roles or {}).get(path) or "s" * names.stack_depth(path) + "io"
        names_here = [n for _, n in modules_of(path, w)]
        last = path.rpartition(".")[2]
        if last in ("kernel", "embedding") and _meant(config, path, names_here):
            out[path] = _adapter(w, role, config, path, names_here)
        elif _trained(config, path, w):
            out[path] = SavedArray(w=w, value=w)
        elif ids := _rows(config, path):
            axis = 0 if last == "embedding" else 1
            out[path] = RowsArray(w, jnp.moveaxis(w, axis, 0)[jnp.array(ids)], ids, axis)
        else:
            out[path] = w
    return nested(out)


def _meant(config: LoraConfig, path: str, names_here: list[str]) -> bool:
    if config.target_modules == "all-linear" and path in (
        "lm_head.kernel",
        "model.embed_tokens.embedding",
    ):
        return False
    return any(adapts(config, path, name) for name in names_here)


def _trained(config: LoraConfig, path: str, w) -> bool:
    module, _, last = path.rpartition(".")
    name = modules_of(path, w)
    if any(matching.is_saved(config, n) for _, n in name):
        return True
    return last == "bias" and config.bias != "none"


def _rows(config: LoraConfig, path: str) -> tuple[int, ...]:
    asked = config.trainable_token_indices
    named: Any = asked if isinstance(asked, dict) else {"embed_tokens": asked}
    return next((ids for name, ids in named.items() if path.split(".")[-2] == name), ())


def _adapter(w, roles: str, config: LoraConfig, path: str, names_here: list[str]) -> LoraArray:
    adapted = [adapts(config, path, n) for n in names_here]
    ranks = [matching.rank_of(config, n) * on for n, on in zip(names_here, adapted, strict=True)]
    scales = [
        matching.scale_of(config, max(r, 1), matching.alpha_of(config, n))
        for n, r in zip(names_here, ranks, strict=True)
    ]
    a, b = factor_shapes(w.shape, roles, max(ranks))
    stack = sizes(w.shape, roles)[0]
    m = None
    if config.use_dora:
        # What init would take: the norm over the in dims of each output.
        norm = jnp.sqrt(jnp.sum(jnp.square(w), axis=tuple(in_dims(roles))))
        m = norm.reshape(*stack, *(w.shape[d] for d in out_dims(roles)))
    return LoraArray(
        w=w,
        a=jnp.zeros(a),
        b=jnp.zeros(b),
        scale=jnp.asarray(np.reshape(scales, stack), jnp.float32),
        m=m,
        bias=jnp.zeros([w.shape[d] for d in b_dims(roles)]) if config.lora_bias else None,
        roles=roles,
        dropout=config.dropout,
    )


def specs_of(lora_params: dict, config: LoraConfig) -> list[TensorSpec]:
    """Every tensor of the PEFT file of an adapter."""
    found = tensor_specs(make_index(leaves_by_path(lora_params), config))
    return [spec for specs in found.values() for spec in specs]


def randomized(lora_params: dict, config: LoraConfig, seed: int = 1) -> dict:
    """The tree with random numbers in every trained part, zeros where the config has nothing."""
    from lora_jax.hf.peft import api

    rng = np.random.default_rng(seed)
    tensors = {
        spec.key: rng.normal(size=spec.shape).astype(np.float32)
        for spec in specs_of(lora_params, config)
        if not spec.repeats
    }
    return api.fill(lora_params, config, tensors)


def noisy(params, seed=0):
    """Noise on all that trains and means something (padding and left-out layers stay zero)."""
    rng = np.random.default_rng(seed)

    def add(x):
        if isinstance(x, SavedArray):
            moved = dataclasses.replace(x, value=x.value + rng.normal(size=x.shape).astype("f4"))
            return dataclasses.replace(x, value=effective(moved))
        if isinstance(x, RowsArray):
            return dataclasses.replace(x, rows=x.rows + rng.normal(size=x.rows.shape).astype("f4"))
        if not isinstance(x, LoraArray):
            return x
        if x.bias is not None:
            noise = rng.normal(size=x.bias.shape).astype("f4") * _on(x, x.bias.ndim)
            x = dataclasses.replace(x, bias=x.bias + noise.astype("f4"))
        b = x.b + rng.normal(size=x.b.shape).astype("f4") * _means_something(x)
        m = None if x.m is None else x.m * np.where(_on(x, x.m.ndim), 1.1, 1).astype("f4")
        return dataclasses.replace(x, b=b, m=m)

    return jax.tree.map(add, params, is_leaf=is_lora)


def _on(x, ndim: int) -> np.ndarray:
    """Whether a stack index has an adapter, as an array of `ndim` dims."""
    stack = np.asarray(x.scale) != 0
    return stack.reshape(*stack.shape, *(1,) * (ndim - stack.ndim))


def _means_something(x) -> np.ndarray:
    """1 where a row of b belongs to the rank of its layer."""
    a = np.asarray(x.a)
    stack = np.ndim(x.scale)
    used = np.any(a != 0, axis=tuple(range(stack, a.ndim - 1)))
    if not used.any():  # an embedding starts with a = 0
        used = np.ones_like(used)
    return used.reshape(*used.shape, *(1,) * (x.b.ndim - used.ndim)).astype("f4")
