"""Quantizing the leaves of a parameter tree, and dequantizing them."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from lora_jax import paths
from lora_jax.array import is_leaf
from lora_jax.compat import require
from lora_jax.config import matching
from lora_jax.config.arguments import check_tree
from lora_jax.plan.leaf import Plan
from lora_jax.quant.array import Backend, QuantArray, is_quant
from lora_jax.quant.dispatch import check_backend
from lora_jax.quant.encode import quantize_array
from lora_jax.quant.formats import FormatName
from lora_jax.quant.scales import ScaleDtype

# Names, a regular expression, a `lora_jax.Plan`, or `f(path, leaf)`.
Where = str | Sequence[str] | Plan | Callable[[str, Any], Any]
_Named = Sequence[tuple[str, Any]]  # leaves with their paths


def quantize(
    params: PyTree,
    where: Where,
    *,
    format: FormatName = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
    scale_dtype: ScaleDtype | None = None,
    roles: dict[str, str] | None = None,
    pad: bool = False,
    backend: Backend = "auto",
    progress: bool = False,
) -> PyTree:
    """Quantizes chosen leaves of a parameter tree, one after the other.

    Args:
      params: the base's parameters; arrays, numpy's included, or `ShapeDtypeStruct`s under
        `jax.eval_shape`. What is spread over a mesh stays where it is.
      where: which leaves: module names as in `LoraConfig.target_modules` (a list of names'
        ends, or one regular expression for the whole name), a `Plan` (the leaves it adapts, with
        the roles it found), or `f(path, leaf) -> bool`.
      format, block_size, double_quant, scale_dtype, pad: see `quant.quantize_array`.
      roles: roles by a pattern of the path's end, as in `LoraConfig.roles`; by default the
        plan's, else `...sio`.
      backend: which kernels multiply with the leaves, see `lora_jax.quant.dispatch`.
      progress: show a progress bar.

    Returns:
      The tree with `QuantArray`s; other leaves are as they were.

    Raises:
      ValueError: `where` matches nothing (the nearest names are listed), a leaf cannot be
        quantized in this format, or the backend is unknown.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lora
      >>> params = {"up": jnp.ones((64, 16)), "scale": jnp.ones(16)}
      >>> lora.quantize(params, ["up"])["up"].nbytes
      1088

    Source: Dettmers et al. 2023, "QLoRA", section 3.
    """
    check_backend(backend)
    check_tree("params", params)
    flat, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    named = [(paths.spell(path), leaf) for path, leaf in flat]
    chosen = _chosen(where, named)
    found = {leaf.path: leaf.roles for leaf in where.adapted} if isinstance(where, Plan) else {}
    make = functools.partial(
        quantize_array, format=format, block_size=block_size, scale_dtype=scale_dtype,
        double_quant=double_quant, pad=pad,
    )  # fmt: skip
    out = []
    for path, leaf in _shown(named, progress, len(chosen)):
        if path in chosen:
            # The caller's roles come before the plan's.
            own = _stated(roles or {}, path) or found.get(path)
            leaf = dataclasses.replace(make(leaf, roles=own, name=path), backend=backend)
        out.append(leaf)
    return jax.tree.unflatten(tree, out)


def _shown(named: _Named, progress: bool, count: int) -> Iterator[tuple[str, Any]]:
    if not progress:
        return iter(named)
    desc = f"quantizing {count} weights"
    # None: no bar in a log file.
    return iter(require("tqdm").tqdm(named, desc=desc, unit="leaf", disable=None))


def _stated(roles: dict[str, str], path: str) -> str | None:
    """The roles that a pattern gives to a leaf or its module."""
    for name in (path, paths.module_of(path)):
        pattern = matching.matched_pattern(roles, name)
        if pattern is not None:
            return roles[pattern]
    return None


def _chosen(where: Where, named: _Named) -> set[str]:
    """The paths of the leaves to quantize."""
    for path, leaf in named:
        if not is_quant(leaf) and is_leaf(leaf):
            raise ValueError(
                f"`params` has an adapter at `{path}`: quantize the base, then `lora.init`"
            )
    if isinstance(where, Plan):
        chosen = {leaf.path for leaf in where.adapted}
        unknown = chosen - {path for path, _ in named}
        if unknown:
            raise ValueError(
                f"`where` is a plan with `{sorted(unknown)[0]}`, which `params` does not have: "
                "pass the plan of these parameters"
            )
    elif isinstance(where, str | Sequence):
        chosen = _by_name(where, named)
    elif not callable(where):
        raise TypeError(
            "`where` must be module names, a regular expression, a `Plan` or "
            f"`f(path, leaf) -> bool`, got `{type(where).__name__}`"
        )
    else:
        # A function that takes every leaf should not fail on those that are quantized already.
        chosen = {path for path, leaf in named if not is_quant(leaf) and where(path, leaf)}
    done = [path for path, leaf in named if path in chosen and is_quant(leaf)]
    if done:
        raise ValueError(
            f"`{done[0]}` is quantized already; `lora.dequantize` first to choose another format"
        )
    if not chosen:
        raise ValueError(
            "`where` chooses no leaf of `params`: give module names, a regular expression, or "
            "`f(path, leaf) -> bool`"
        )
    return chosen


# Stacked over layers these have two dims, but they are still vectors.
_VECTORS = ("scale", "bias")


def _by_name(where: str | Sequence[str], named: _Named) -> set[str]:
    """Leaves of at least two dims whose path or module matches; vectors are never quantized."""
    wide = [
        path
        for path, leaf in named
        if len(getattr(leaf, "shape", ())) > 1 and path.rpartition(".")[2] not in _VECTORS
    ]
    entries = [where] if isinstance(where, str) else list(where)
    chosen: set[str] = set()
    for entry in entries:
        hits = {
            path
            for path in wide
            for name in (path, paths.module_of(path))
            # One string is a regular expression; a list has the ends of names. As in PEFT.
            if _matches(entry, name, pattern=isinstance(where, str))
        }
        if not hits:
            known = paths.nearest(entry, {paths.module_of(path) for path in wide})
            raise ValueError(f"`where` entry `{entry}` matches no matrix; nearest: {known}")
        chosen |= hits
    return chosen


def _matches(entry: str, name: str, *, pattern: bool) -> bool:
    if pattern:
        return re.fullmatch(entry, name) is not None
    return matching.ends_with(name, entry)


def dequantize(params: PyTree) -> PyTree:
    """Turns the quantized leaves of a tree into arrays of their dtype."""
    check_tree("params", params)
    return jax.tree.map(
        lambda x: x.dequantize() if isinstance(x, QuantArray) else x, params, is_leaf=is_leaf
    )
