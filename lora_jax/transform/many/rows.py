"""Choosing each row's adapter, and running a function row by row in one batch.

A row's result is by definition what the function gives for a batch of that row alone with its own
adapter; `jax.vmap` turns all rows into batched operations. The base weights are not batched, so
every base product is one matmul over all rows; the factors, gathered for the rows, meet the
activations in batched thin products. No weight is materialized and there is no loop over adapters.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import checkify
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import compat
from lora_jax.array import Gain, LoraArray, LoraStack, SavedStack, count, is_lora, is_stack
from lora_jax.config.arguments import kind_of
from lora_jax.dims import checked_index
from lora_jax.quant import sharding as quant_sharding
from lora_jax.transform.dora import gains
from lora_jax.transform.many.grouped import nan_outside, take_adapters


def select(stacked: Any, ids: Any) -> Any:
    """Gathers the adapters of a batch's rows: a stack with one adapter a row, in their order.

    `lorafy(fn)(select(stacked, ids), ...)` is `lorafy(fn)(stacked, ..., adapter_ids=ids)`; where
    the same rows run many times (decoding), the gathering is done once.

    Args:
      stacked: from `stack`.
      ids: int (rows,), an adapter index for each row; -1 for the plain base.

    Returns:
      The tree; its size is one adapter a row.

    Raises:
      ValueError: an id out of range, or ids that are no vector of integers. The values of traced
        ids are unknown: one out of range gives NaN in its row, and an error under
        `jax.experimental.checkify.checkify`.
    """
    ids = checked(stacked, ids)
    if ids.ndim != 1:
        raise ValueError(
            f"`adapter_ids` must be of shape (rows,) to choose rows, got shape {ids.shape}"
        )
    return jax.tree.map(
        lambda x: select_leaf(x, ids) if is_stack(x) else x, stacked, is_leaf=is_lora
    )


def checked(stacked: Any, ids: Any) -> Any:
    """Ids of rows or tokens as an array.

    Raises:
      ValueError: no integers of one or two dims, or one out of range (unless they are traced).
    """
    try:
        ids = jnp.asarray(ids)
    except (TypeError, ValueError):  # names of adapters, or None in place of -1
        raise ValueError(
            f"`adapter_ids` must be integers of shape (rows,) or (rows, tokens), got {ids!r}"
        ) from None
    if ids.ndim not in (1, 2) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            "`adapter_ids` must be integers of shape (rows,) or (rows, tokens), got "
            f"{ids.dtype} of shape {ids.shape}"
        )
    if not any(is_stack(x) for x in jax.tree.leaves(stacked, is_leaf=is_lora)):
        raise ValueError(
            "`adapter_ids` is given, and the parameters hold no stack of adapters: pass "
            "`lora.stack([adapter, ...])` as parameters, or leave `adapter_ids` out"
        )
    number = count(stacked)
    if not isinstance(ids, jax.core.Tracer):
        known = np.asarray(ids)
        if len(bad := known[(known < -1) | (known >= number)]):
            raise ValueError(
                f"`adapter_ids` has {sorted(set(bad.tolist()))}, but the stack has adapters 0 to "
                f"{number - 1} (-1 is the plain base)"
            )
    else:
        # Outside `checkify.checkify` nothing is left of this in the program.
        checkify.debug_check(
            jnp.all((ids >= -1) & (ids < number)),
            f"`adapter_ids` has {{ids}}, but the stack has adapters 0 to {number - 1} (-1 is the "
            "plain base)",
            ids=ids,
        )
    return ids


def select_leaf(x: LoraStack | SavedStack, ids: Any) -> Any:
    """One leaf of `select`; the ids have been checked."""
    # A stack's parts have the adapters after their stack dims, on `x.axis`.
    number = x.count
    # The base and ids out of range read nothing: another's numbers never reach their rows.
    where = checked_index(ids, number)
    poison = nan_outside(ids, number)

    def pick(array: Array, fill: float = 0) -> Array:
        return take_adapters(array, where, x.axis, fill)

    if isinstance(x, SavedStack):
        # One number a row against the leaf's dims.
        shape = (-1,) + (1,) * len(x.shape)
        value = jnp.where((where < number).reshape(shape), pick(x.value), x.w)
        value = value + poison.reshape(shape).astype(value.dtype)
        return dataclasses.replace(x, value=value, chosen=True)
    # DoRA's norms depend on factors and base: one for each adapter, then chosen as they are.
    gain = gains(x)
    return dataclasses.replace(
        x,
        a=pick(x.a),
        b=pick(x.b),
        scale=pick(x.scale) + poison.astype(x.scale.dtype),
        m=None,
        gain=None if gain is None else pick(gain, 1),
        bias=None if x.bias is None else pick(x.bias),
        chosen=True,
    )


class Rows(NamedTuple):
    """A tree of chosen adapters, taken apart into what differs between rows and what does not.

    Attributes:
      arrays: what differs.
      axes: for each of them the axis that numbers the rows.
      base: the leaves that all rows share.
      join: `(one row's arrays, base)` to the tree of that row, with `LoraArray`s.
    """

    arrays: list
    axes: list[int]
    base: list
    join: Callable[[list, list], Any]


def by_row(chosen: Any) -> Rows:
    """Takes a tree of chosen adapters (from `select`) apart; other stacks are the rows' base."""
    flat, tree = jax.tree.flatten(chosen, is_leaf=is_lora)
    fields = {LoraStack: ("a", "b", "scale", "gain", "bias"), SavedStack: ("value",)}
    where = [
        (i, name)
        for i, x in enumerate(flat)
        if _is_chosen(x)
        for name in fields[type(x)]
        if getattr(x, name) is not None
    ]
    # What `jax.vmap` maps; the base stays out of it, so that its product is one for all rows.
    arrays = [getattr(flat[i], name) for i, name in where]

    # A stack's static data is all that is needed to make a row's leaf of its arrays.
    forms = [dataclasses.replace(x, w=None, **dict.fromkeys(fields[type(x)]))
             if _is_chosen(x) else None for x in flat]  # fmt: skip

    def join(row: list, base: list) -> Any:
        own: dict[int, dict] = {}
        for (i, name), array in zip(where, row, strict=True):
            own.setdefault(i, {})[name] = array
        leaves = [
            w if form is None else _row_leaf(form, w, own[i])
            for i, (form, w) in enumerate(zip(forms, base, strict=True))
        ]
        return jax.tree.unflatten(tree, leaves)

    base = [x.w if _is_chosen(x) else x for x in flat]
    return Rows(arrays, [flat[i].axis for i, _ in where], base, join)


def _is_chosen(x: Any) -> bool:
    return is_stack(x) and x.chosen


def _row_leaf(form: LoraStack | SavedStack, w: Any, own: dict) -> Any:
    if isinstance(form, SavedStack):
        return own["value"]
    gain = own.pop("gain", None)
    m = None if gain is None else Gain(gain)
    return LoraArray(w, m=m, roles=form.roles, dropout=form.dropout, window=form.window, **own)


def rowwise(
    call: Callable,
    chosen: Any,
    ids: Any,
    *,
    args: tuple,
    kwargs: dict,
    key: Any,
    row_axes: Any,
    out_axes: Any,
) -> Any:
    """Runs `call(row's ids, tree, args=, kwargs=, key=)` on every row with its own adapter.

    Args:
      call: a function that accepts LoRA parameters and a batch of one row.
      chosen: from `select`, or with stacks of which `call` chooses by the ids.
      ids: (rows, ...), anything that differs between rows.
      args, kwargs: of the call; arrays hold all rows along the axes that `row_axes` names.
      key: dropout key, or None.
      row_axes: a prefix of `(args, kwargs)`: where each array numbers the rows, None for what all
        rows share. An int leaves arrays without dims and what is no array to all rows alike.
      out_axes: a prefix of the output: where a batch of one row has its axis of size 1. Outputs
        without dims come as one number a row.

    Returns:
      The outputs with the rows along `out_axes`.
    """
    parts = by_row(chosen)
    rows = ids.shape[0]
    flat, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda x: x is None)
    axes = axes_of(row_axes, flat, tree, rows)
    # Arguments that all rows share are closed over, not copied.
    mapped = {i: axis for i, axis in enumerate(axes) if axis is not None}
    seen: dict = {}

    def one(number: Any, own_ids: Any, own: Any, given: Sequence) -> Any:
        full = list(flat)
        for (i, axis), x in zip(mapped.items(), given, strict=True):
            # The function sees a batch of one row.
            full[i] = lax.expand_dims(x, [axis])
        args, kwargs = jax.tree.unflatten(tree, full)
        # A mask of its own for each row.
        own_key = None if key is None else jax.random.fold_in(key, number)
        tree_of_row = parts.join(own, parts.base)
        out = call(own_ids, tree_of_row, args=args, kwargs=kwargs, key=own_key)
        return _split_outputs(out, out_axes, seen)

    given = [flat[i] for i in mapped]
    in_axes = (0, 0, parts.axes, list(mapped.values()))
    inputs = _together((jnp.arange(rows), ids, parts.arrays, given), in_axes)
    own_rows, shared = jax.vmap(one, in_axes=in_axes, out_axes=(0, None))(*inputs)
    # `jax.vmap` puts the rows first; a list of axes for its outputs would have to be known before.
    own_rows = iter(
        jnp.moveaxis(x, 0, axis) for x, axis in zip(own_rows, seen["axes"], strict=True)
    )
    # The output's leaves in their order, each from the list of its kind.
    found = {"row": own_rows, "shared": iter(shared), "static": iter(seen["static"])}
    return jax.tree.unflatten(seen["tree"], [next(found[kind]) for kind in seen["kinds"]])


def _together(arrays: Any, axes: Any) -> Any:
    """The arrays with the rows of all, along these axes, where explicit mesh axes have any's.

    `jax.vmap` needs one place for the rows of all its inputs.
    """
    flat, tree = jax.tree.flatten(arrays)
    numbers = jax.tree.leaves(axes)
    specs = [compat.spec_of(x) or (None,) * np.ndim(x) for x in flat]
    spread = ((x, spec[d]) for x, spec, d in zip(flat, specs, numbers, strict=True) if spec[d])
    first, rows = next(spread, (None, None))
    if first is None:
        return arrays
    # A traced array's mesh is abstract, which no operation outside of a trace takes.
    mesh = getattr(first, "sharding", jax.typeof(first).sharding).mesh
    taken = quant_sharding.axes_of(rows)

    def there(x: Any, spec: tuple, d: int) -> Any:
        own = [tuple(a for a in quant_sharding.axes_of(s) if a not in taken) for s in spec]
        # Factors give up axes on features for those on rows; XLA warns of both in one step.
        free = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*own)))
        own[d] = taken
        return jax.sharding.reshard(free, NamedSharding(mesh, PartitionSpec(*own)))

    return jax.tree.unflatten(tree, map(there, flat, specs, numbers))


def axes_of(row_axes: Any, flat: list, tree: Any, rows: int) -> list[int | None]:
    """For each of the flat arguments the axis that numbers the rows, or None.

    Raises:
      ValueError: an argument has another number of entries there.
    """
    full = jax.tree.unflatten(tree, flat)
    axes = _axis_of_each("row_axes", row_axes, full, "`(args, kwargs)`")
    found: list[int | None] = []
    for x, axis in zip(flat, axes, strict=True):
        shape = getattr(x, "shape", None)
        # A default for all arrays does not mean scalars and what is no array.
        loose = isinstance(row_axes, int) and (shape is None or not len(shape))
        if axis is None or loose:
            found.append(None)
            continue
        if shape is None or not -len(shape) <= axis < len(shape) or shape[axis] != rows:
            raise ValueError(
                f"`adapter_ids` has {rows} rows, but an argument of shape {shape} does not "
                f"have that many along axis {axis}; pass `row_axes` to state where arguments "
                "number their rows (a prefix of (args, kwargs), None for what all rows share)"
            )
        found.append(axis)
    return found


def _axis_of_each(name: str, axes: Any, whole: Any, what: str) -> list[int | None]:
    """The axis of each leaf of `whole`, from a prefix of it.

    Raises:
      ValueError: `axes` is no prefix.
      TypeError: something in it is no axis.
    """
    try:
        spread = jax.tree.broadcast(axes, whole, is_leaf=lambda x: x is None)
    except ValueError:
        raise ValueError(
            f"`{name}` must be a prefix of {what}, got {axes!r}: pass one integer for all arrays, "
            f"or a tree that begins like {what}, with an integer or None (what all rows share)"
        ) from None
    found = jax.tree.leaves(spread, is_leaf=lambda x: x is None)
    for axis in found:
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
            raise TypeError(
                f"`{name}` must hold integers or None, got {kind_of(axis)}: give the axis that "
                "numbers the rows, None for what all rows share"
            )
    return found


def _split_outputs(out: Sequence, out_axes: Any, seen: dict) -> tuple[list, list]:
    """The outputs that differ by row, and those that all rows share; notes how to join them."""
    flat, tree = jax.tree.flatten(out, is_leaf=lambda x: x is None)
    axes = _axis_of_each("out_axes", out_axes, out, "the output")
    row: list = []
    shared: list = []
    seen.update(tree=tree, kinds=[], axes=[], static=[])
    for x, axis in zip(flat, axes, strict=True):
        if not compat.is_traceable(x):
            seen["kinds"].append("static")
            seen["static"].append(x)
        elif axis is None:
            seen["kinds"].append("shared")
            shared.append(x)
        else:
            seen["kinds"].append("row")
            # A number for each row comes out as a vector.
            seen["axes"].append(axis if x.ndim else 0)
            row.append(_one_row(x, axis))
    return row, shared


def _one_row(x: Any, axis: int) -> Any:
    if not x.ndim:
        return x
    if not -x.ndim <= axis < x.ndim or x.shape[axis] != 1:
        raise ValueError(
            f"an output of shape {x.shape} for a batch of one row has no axis of size 1 at {axis}: "
            "set `out_axes` to where outputs number their rows (None for what all rows share)"
        )
    return lax.squeeze(x, [axis])
