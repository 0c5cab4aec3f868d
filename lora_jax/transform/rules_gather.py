"""The rule of `gather`: rows of a weight by index, or the choice of layers and experts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax.transform import base_weight
from lora_jax.transform.implicit import Implicit, Unsupported, owned, wide_dtype
from lora_jax.transform.labels import PARTS, RANK, expand_to, labels, reorder
from lora_jax.transform.low_rank import contract


def gather(
    v: Any,
    indices: Any,
    bind: Callable,
    *,
    keep: bool,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    **params: Any,
) -> Implicit | Array:
    """Rows of a weight by index: an embedding lookup, or the choice of layers or experts.

    Indexing a stack dim gives another implicit array, with one adapter for each index.

    Args:
      v, indices: the operands.
      bind: binds the original primitive to dense operands.
      keep: whether the result is a weight with permuted or chosen rows, not features.
      dimension_numbers, slice_sizes: of the primitive.
      **params: its other parameters.
    """
    if not isinstance(v, Implicit):
        raise Unsupported("a weight used as indices")
    if dimension_numbers.operand_batching_dims:
        raise Unsupported("batched gather")
    # Copies that are indexed are a stack of equal weights.
    v = owned(v, [d for d in dimension_numbers.start_index_map if v.roles[d] == "u"], "s")
    base = base_weight.rows(
        v,
        indices,
        bind,
        dimension_numbers=dimension_numbers,
        slice_sizes=slice_sizes,
        mode=params.get("mode"),
        fill_value=params.get("fill_value"),
    )
    indices, dimension_numbers = _clamped(
        v, indices, dimension_numbers, slice_sizes=slice_sizes, params=params
    )
    roles = {v.roles[d] for d in dimension_numbers.start_index_map}
    if len(roles) != 1:
        raise Unsupported("gather over dims of different roles")
    out = _gather_labels(v, indices, dimension_numbers)

    def pick(part: str) -> tuple[Array, list]:
        return _gather_part(
            getattr(v, part),
            labels(v.roles, part),
            indices,
            numbers=dimension_numbers,
            slice_sizes=slice_sizes,
            params=params,
        )

    if roles == {"s"}:
        return _gather_stack(v, base, out, pick)
    if not v.rank:
        return base
    if keep and roles in ({"i"}, {"o"}):
        return _gather_weight(v, base, out, pick=pick, role=roles.pop(), numbers=dimension_numbers)
    return _gather_rows(v, base, out, pick=pick, roles=roles, slice_sizes=slice_sizes)


def _gather_rows(
    v: Implicit, base: Array, out: list, *, pick: Callable, roles: set, slice_sizes: Sequence[int]
) -> Array:
    """Rows as features: `W[ids] + s·A[ids]·B`, or `W[:, ids] + s·A·B[:, ids]`."""
    if v.bias is not None:
        raise Unsupported("lookup of a weight whose adapter has a bias")
    owner, other = ("a", "b") if roles <= {"i"} else ("b", "a")
    whole = set(labels(v.roles, other)) - {RANK}
    if any(slice_sizes[d] != v.shape[d] for d in whole) or not roles <= {"i", "o"}:
        raise Unsupported("gather that slices both factors")
    # Rows of the factor that has the indexed dim, (…, r), times the whole of the other one.
    rows, have = pick(owner)
    wide = wide_dtype(rows.dtype)
    scale_labels = labels(v.roles, "scale")
    rows = rows.astype(wide) * expand_to(v.scale.astype(wide), scale_labels, have)
    change, have = contract(
        rows,
        have,
        getattr(v, other).astype(wide),
        labels(v.roles, other),
        keep=set(out),
        precision=lax.Precision.HIGHEST,
    )
    change = reorder(change, have, [label for label in out if label in have])
    y = base + change.reshape(base.shape).astype(base.dtype)
    return _gain_rows(v, y, out, owner=owner, pick=pick)


def _clamped(
    v: Implicit,
    indices: Any,
    numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    params: Mapping,
) -> tuple[Any, lax.GatherDimensionNumbers]:
    """Drops the indices of dims taken whole: clamped, they can only be 0 (vmap of a slice)."""
    where = numbers.start_index_map
    kept = [k for k, d in enumerate(where) if slice_sizes[d] != v.shape[d]]
    modes = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    if not kept or len(kept) == len(where) or params.get("mode") not in modes:
        return indices, numbers
    # The dims themselves stay in the slice: only their (constant) starts go.
    numbers = lax.GatherDimensionNumbers(
        offset_dims=numbers.offset_dims,
        collapsed_slice_dims=numbers.collapsed_slice_dims,
        start_index_map=tuple(where[k] for k in kept),
    )
    return indices[..., jnp.array(kept)], numbers


def _gain_rows(v: Implicit, y: Array, out: Sequence, owner: str, pick: Callable) -> Array:
    """DoRA's gain over the rows that were gathered (out dims indexed) or over the whole rows."""
    if v.gain is None:
        return y
    gain, have = (v.gain, labels(v.roles, "gain")) if owner == "a" else pick("gain")
    return y * expand_to(gain, have, out).astype(y.dtype)


def _gather_labels(v: Implicit, indices: Any, numbers: lax.GatherDimensionNumbers) -> list:
    """Axes of a gather's result: `("n", i)` for index axes, dims of the weight for offsets."""
    survive = [d for d in range(v.ndim) if d not in numbers.collapsed_slice_dims]
    out: list = [None] * (indices.ndim - 1 + len(survive))
    for axis, d in zip(numbers.offset_dims, survive, strict=True):
        out[axis] = d
    index_axes = [i for i, label in enumerate(out) if label is None]
    for n, axis in enumerate(index_axes):
        out[axis] = ("n", n)
    return out


def _gather_part(
    array: Array,
    dims: list,
    indices: Any,
    numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    params: Mapping,
) -> tuple[Array, list]:
    """Gathers a factor along the dims it owns.

    Rows out of range give zeros, not the base's fill (NaN by default): the base has the fill.

    Returns:
      The rows, and their labels: index axes first, then the factor's surviving axes.
    """
    survive = [d for d in dims if d == RANK or d not in numbers.collapsed_slice_dims]
    front = indices.ndim - 1
    # Index axes first, whatever the order in the base: labels keep track of it.
    own = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(front, front + len(survive))),
        collapsed_slice_dims=tuple(
            sorted(dims.index(d) for d in dims if d in numbers.collapsed_slice_dims)
        ),
        start_index_map=tuple(dims.index(d) for d in numbers.start_index_map),
    )
    # The rank is taken whole, as are dims that are not indexed.
    window = tuple(array.shape[i] if d == RANK else slice_sizes[d] for i, d in enumerate(dims))
    rows = lax.gather(array, indices, own, window, mode=params.get("mode"), fill_value=0)
    return rows, [("n", i) for i in range(front)] + survive


def _gather_weight(
    v: Implicit,
    base: Any,
    out: list,
    pick: Callable,
    role: str,
    numbers: lax.GatherDimensionNumbers,
) -> Implicit:
    """Rows or columns of a weight as a weight: their factor is indexed, the other one stays."""
    roles = "".join(role if isinstance(label, tuple) else v.roles[label] for label in out)
    parts = {}
    for part in PARTS:
        array, have = getattr(v, part), labels(v.roles, part)
        # Only the factor (and DoRA's gain, and the bias) with the indexed dim is gathered.
        if array is not None and set(numbers.start_index_map) & set(have):
            array, have = pick(part)
        if array is not None:
            have = [label if label == RANK else out.index(label) for label in have]
            array = reorder(array, have, labels(roles, part))
        parts[part] = array
    return dataclasses.replace(v, w=base, roles=roles, derived=True, **parts)


def _gather_stack(v: Implicit, base: Any, out: list, pick: Callable) -> Implicit:
    """Layers or experts of a stack, with one adapter for each index."""
    roles = "".join("s" if isinstance(label, tuple) else v.roles[label] for label in out)
    parts = {}
    for part in ("a", "b", "scale", "gain", "bias"):
        if getattr(v, part) is None:
            parts[part] = None
            continue
        rows, have = pick(part)
        have = [label if label == RANK else out.index(label) for label in have]
        parts[part] = reorder(rows, have, labels(roles, part))
    key = v.key
    if key is not None:  # each chosen layer or expert draws a mask of its own
        key = jax.random.split(key.reshape(-1)[0], parts["scale"].shape)
    return dataclasses.replace(v, w=base, **parts, key=key, roles=roles)
