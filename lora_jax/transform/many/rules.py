"""Weights with many adapters inside the interpreter: one adapter for each row, or each token.

The factors of such a weight hold all adapters (`Implicit.adapter_count`). Every row sees the same
weight, only the row's ids differ. An operation that rearranges the weight rearranges every adapter
(`for_all`); a product with it sorts or gathers (`lora_jax.transform.many.grouped`). An operation
with no such form first takes the row's own adapter out (`one_for_row`); where each token has its
own adapter, that is an error.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax import compat
from lora_jax.dims import checked_index, in_dims, out_dims
from lora_jax.transform import rules_consume
from lora_jax.transform.implicit import (
    Implicit,
    has_many,
    is_implicit,
    wide_dtype,
)
from lora_jax.transform.labels import reorder
from lora_jax.transform.low_rank import compute_dtype, with_units
from lora_jax.transform.many import grouped
from lora_jax.transform.many.token_axis import Positions
from lora_jax.transform.origins import CONSTANT, origin_of
from lora_jax.transform.primitive import ManyRule, Rule, binder

# The parts of an implicit array of which each adapter has its own.
OWN = ("a", "b", "scale", "gain", "bias")


@dataclasses.dataclass(frozen=True)
class RowAdapters:
    """The adapters of one row of a batch, as its function sees them.

    Attributes:
      ids: int (), or (tokens,) where each token has its own.
      groups: all rows' ids, sorted.
      strategy: how products with them are computed.
      token_axes: for each array of the call's arguments, flat, the axis that numbers the tokens
        or None; None where the row has one adapter.
      positions: where the tokens are inside the function, known once it is traced.
    """

    ids: Any
    groups: grouped.Groups
    strategy: grouped.Strategy
    token_axes: tuple | None = None
    positions: Positions | None = None


def select_adapters(v: Implicit, ids: jax.Array, parts: Sequence[str] = OWN) -> Implicit:
    """A weight with the adapter of each of `ids` in place of all (of the parts that are named).

    Args:
      v: the weight.
      ids: int () or (n,): then the parts get `n` where they had the adapters.
      parts: which.
    """
    # Out of range: zeros for factors, one for a gain, and NaN by way of the scale.
    which = checked_index(ids, v.adapter_count)
    poison = grouped.nan_outside(ids, v.adapter_count)
    axis = v.roles.count("s")
    own = {
        part: grouped.take_adapters(getattr(v, part), which, axis, 1 if part == "gain" else 0)
        for part in parts
        if getattr(v, part) is not None
    }
    shape = (1,) * axis + poison.shape
    # The scale is in every product, so NaN there reaches the whole row and no other.
    own["scale"] = own["scale"] + poison.reshape(shape).astype(v.scale.dtype)
    return dataclasses.replace(v, **own, adapter_count=0 if "a" in parts else v.adapter_count)


def map_adapters(rule: Callable, values: Sequence) -> Any:
    """A rule of the interpreter for single adapters, applied to all adapters of a stack.

    Args:
      rule: `f(values)` to an implicit array or several; or to arrays, which must be the same for
        all adapters.
      values: operands; stacks among them hold as many adapters.
    """
    # Operands with many adapters are mapped over them, all others are the same for each.
    where = [i for i, x in enumerate(values) if has_many(x)]
    count = values[where[0]].adapter_count
    own = [[getattr(values[i], part) for part in OWN] for i in where]
    # The adapters' axis comes after the stack dims in every part.
    axes = [
        [None if x is None else values[i].roles.count("s") for x in parts]
        for i, parts in zip(where, own, strict=True)
    ]
    forms: list = []

    def one(own: Any) -> Any:
        full = list(values)
        for i, parts in zip(where, own, strict=True):
            changes = dict(zip(OWN, parts, strict=True))
            full[i] = dataclasses.replace(values[i], adapter_count=0, **changes)
        out = rule(full)
        outs = list(out) if isinstance(out, list | tuple) else [out]
        # What is left of a weight is the same for all adapters: base, key, roles.
        blank = dict.fromkeys(OWN)
        forms[:] = [isinstance(out, list | tuple)]
        shared = [dataclasses.replace(x, **blank) if is_implicit(x) else x for x in outs]
        return shared, [[getattr(x, p) for p in OWN] if is_implicit(x) else None for x in outs]

    # The base is not mapped: it is rearranged once.
    shared, own = jax.vmap(one, in_axes=(axes,), out_axes=(None, 0), axis_size=count)(own)
    outs = [_rejoined(x, parts, count) for x, parts in zip(shared, own, strict=True)]
    return outs if forms[0] else outs[0]


def _rejoined(x: Any, parts: Any, count: int) -> Any:
    if not is_implicit(x):
        return x
    axis = x.roles.count("s")
    moved = [None if p is None else jnp.moveaxis(p, 0, axis) for p in parts]
    return dataclasses.replace(x, adapter_count=count, **dict(zip(OWN, moved, strict=True)))


def row_adapter(context: Any, v: Implicit, eqn: Any, reason: str) -> Implicit:
    """The row's own adapter for an operation that has no form for many.

    Raises:
      ValueError: each token has its own.
    """
    adapters = context.row_adapters
    if adapters.token_axes is None:
        return select_adapters(v, adapters.ids)
    raise ValueError(
        f"`{v.path}` has no adapter for each token in `{compat.name_of(eqn)}` at "
        f"{compat.source_line(eqn, context.lines[-1])}: {reason}. Give `adapter_ids` one for each "
        "row, or leave the leaf without an adapter"
    )


def axis_of_tokens(
    context: Any, v: Implicit, eqn: Any, operand: int, among: Sequence[int]
) -> int | None:
    """The axis of an operand that numbers the tokens, None where the row has one adapter."""
    adapters = context.row_adapters
    if adapters.token_axes is None:
        return None
    var, positions = eqn.invars[operand], adapters.positions
    axes = set() if isinstance(var, compat.Literal) else set(positions.axes.get(var, ()))
    if len(found := axes & set(among)) == 1:
        return found.pop()
    # The reason is for the error's reader, who must find the place in the model.
    lost = "" if isinstance(var, compat.Literal) else positions.lost.get(var, "")
    why = (
        f"its axes {sorted(found)} all number tokens"
        if found
        else "its tokens' axis is summed over or batched"
        if axes
        else f"the tokens' axis was lost in {lost}"
        if lost
        else "nothing in it is numbered by the tokens of `token_axes`"
    )
    shape = getattr(var.aval, "shape", ())
    row_adapter(context, v, eqn, f"the other operand has shape {shape}, and {why}")
    return None


@dataclasses.dataclass(frozen=True)
class ManyProduct:
    """How `rules_consume.dot_general` multiplies with a weight that holds many adapters.

    Attributes:
      adapters: of the call.
      v: the weight with all of them.
      token: the axis of the activation that numbers the tokens, or None.
    """

    adapters: RowAdapters
    v: Implicit
    token: int | None

    def spread(self, v: Implicit) -> tuple[Implicit, list]:
        """The weight with scale, gain and bias chosen, and the label of the axis they then have."""
        v = select_adapters(v, self.adapters.ids, ("scale", "gain", "bias"))
        return v, [] if self.token is None else [("x", self.token)]

    def low_rank(
        self,
        v: Any,
        x: Any,
        x_labels: Sequence,
        out_labels: Sequence,
        *,
        contracted: Collection,
        dtype: Any,
        precision: Any,
    ) -> Array:
        """As `low_rank.low_rank`: `scale · (x·A)·B` with each element's own factors."""
        compute = compute_dtype(x, self.v)
        first, second, before, after = _matrices(self.v, contracted)
        # The tokens' axis first: (tokens, other free axes, summed, units).
        token = [("x", self.token)] if self.token is not None else []
        free = [s for s in x_labels if s[0] == "x" and s not in token]
        summed = [("w", d) for d in before]
        units = [s for s in x_labels if s[0] == "w" and s not in summed]
        shape = dict(zip(x_labels, x.shape, strict=True))
        x = reorder(x, x_labels, token + free + summed + units)
        # (elements, positions, k): one element for the row, or one a token.
        elements = self.adapters.ids.size
        x = x.reshape(elements, -1, first.shape[1])
        # The stack dims left here have size 1: one scale for each adapter.
        scale = self.v.scale.reshape(-1)
        dtypes = (precision, compute, wide_dtype(compute), dtype)
        y = own_product(self.adapters, v, x, factors=(first, second), scale=scale, dtypes=dtypes)
        have = token + free + [("w", d) for d in after]
        shape |= {("w", d): self.v.shape[d] for d in after}
        return with_units(y.reshape([shape[s] for s in have]), have, out_labels)


def own_product(
    adapters: RowAdapters, v: Implicit, x: Any, factors: tuple, scale: Any, dtypes: tuple
) -> Array:
    precision, compute, wide, result = dtypes
    form = grouped.Form(
        precision=precision,
        compute=compute,
        wide=wide,
        result=result,
        strategy=grouped.on_device(adapters.strategy),
        reverse_only=v.reverse_only,
    )
    ids = jnp.reshape(adapters.ids, (-1,))
    y = grouped.product(form, x, ids, factors=factors, scale=scale, groups=adapters.groups)
    # Where an id is wrong its element is NaN and no other.
    poison = grouped.nan_outside(ids, scale.shape[0])
    return y + poison[:, None, None].astype(y.dtype)


def _matrices(v: Implicit, contracted: Collection) -> tuple:
    """Factors `(adapters, summed, r)` and `(adapters, r, kept)`, and the dims they stand for."""
    ins, outs = in_dims(v.roles), out_dims(v.roles)
    a = v.a.reshape(v.adapter_count, -1, v.rank)
    b = v.b.reshape(v.adapter_count, v.rank, -1)
    if _a_first(v, contracted):
        return a, b, ins, outs
    return jnp.swapaxes(b, 1, 2), jnp.swapaxes(a, 1, 2), outs, ins


def _a_first(v: Implicit, contracted: Collection) -> bool:
    roles = {v.roles[d] for d in contracted}
    return "i" in roles or "o" not in roles


def _is_matrix(v: Implicit, contracted: Collection, batched: Sequence) -> bool:
    """Whether one factor is summed over as a whole and the other kept, and there is no stack."""
    ins, outs = in_dims(v.roles), out_dims(v.roles)
    before, after = (ins, outs) if _a_first(v, contracted) else (outs, ins)
    rest = [d for d in range(v.ndim) if d not in before and d not in after]
    return (
        set(before) <= set(contracted)
        and not set(after) & {*contracted, *batched}
        and all(v.shape[d] == 1 for d in rest)
    )


def dot_general(context: Any, eqn: Any, values: list, rule: Rule) -> Any:
    """A product with a weight of many adapters."""
    side = 0 if has_many(values[0]) else 1
    v, x = values[side], values[1 - side]
    bind, use = binder(eqn), context.next_use(v)
    constant = v.key is None and origin_of(context.origins, eqn.invars[1 - side]) == CONSTANT
    if constant and not is_implicit(x) and not eqn.params["dimension_numbers"][0][side]:
        return for_all(context, eqn, values, rule)  # gains, by an einsum that sums nothing
    if is_implicit(x) or constant:
        # The result's base would depend on the adapter, and there is one base for all.
        return one_for_row("it makes another weight")(context, eqn, values, rule)
    contracting, batching = eqn.params["dimension_numbers"]
    taken = {*contracting[1 - side], *batching[1 - side]}
    free = [d for d in range(x.ndim) if d not in taken]
    token = axis_of_tokens(context, v, eqn, operand=1 - side, among=free)
    adapters = context.row_adapters
    if _is_matrix(v, contracting[side], batching[side]):
        many = ManyProduct(adapters, v, token)
        return rules_consume.dot_general(values[0], values[1], bind, use, many=many, **eqn.params)

    # Any other contraction, such as one over heads of which a factor has only a part: each row's
    # (or token's) own factors, as for a single adapter.
    def one(v: Any, x: Any) -> Any:
        lhs, rhs = (v, x) if side == 0 else (x, v)
        return rules_consume.dot_general(lhs, rhs, bind, use, **eqn.params)

    if token is None:
        return one(select_adapters(v, adapters.ids), x)
    # dot_general puts batch axes first, then the left operand's free axes, then the right's.
    kept = v.ndim - len(contracting[side]) - len(batching[side])
    out = len(batching[0]) + free.index(token) + (kept if side == 0 else 0)

    def one_token(number: Any, token_id: Any, x: Any) -> Array:
        own = select_adapters(v, token_id)
        # A mask for each token.
        if v.key is not None:
            keys = jax.vmap(lambda k: jax.random.fold_in(k, number))(v.key.reshape(-1))
            own = dataclasses.replace(own, key=keys.reshape(v.key.shape))
        return lax.squeeze(one(own, lax.expand_dims(x, [token])), [out])

    run = jax.vmap(one_token, in_axes=(0, 0, token), out_axes=out)
    return run(jnp.arange(adapters.ids.size), adapters.ids, x)


def for_all(context: Any, eqn: Any, values: list, rule: Rule) -> Any:
    """The rule of an operation that rearranges a weight: it rearranges every adapter alike."""
    return map_adapters(functools.partial(rule, context, eqn), values)


def one_for_row(reason: str) -> ManyRule:
    """Takes the row's own adapter; an error with this reason where each token has its own."""

    def apply(context: Any, eqn: Any, values: list, rule: Rule) -> Any:
        values = [row_adapter(context, x, eqn, reason) if has_many(x) else x for x in values]
        return rule(context, eqn, values)

    return apply


def elementwise_product(context: Any, eqn: Any, values: list, rule: Rule) -> Any:
    """A weight that is scaled; two weights take the row's own adapters, as their sum does."""
    two = all(map(is_implicit, values))
    apply = one_for_row("it is multiplied by a weight element by element") if two else for_all
    return apply(context, eqn, values, rule)


def for_all_or_row(reason: str) -> ManyRule:
    """As `for_all` while the result's base is the same for all adapters, else as `one_for_row`."""
    alone = one_for_row(reason)

    def apply(context: Any, eqn: Any, values: list, rule: Rule) -> Any:
        # These fold gains into the base, or form a product of two weights: not the same base for
        # all adapters.
        gains = any(has_many(x) and x.gain is not None for x in values)
        if gains or compat.name_of(eqn) in ("reduce_sum", "square", "integer_pow"):
            return alone(context, eqn, values, rule)
        return for_all(context, eqn, values, rule)

    return apply
