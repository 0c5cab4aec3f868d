"""How a function uses each of its weights: a walk over the base jaxpr, nothing evaluated.

Every weight is followed through the operations that only rearrange it, to those that consume it.
On the way each current dim keeps the set of the leaf's own dims that it is made of. A dim of an
activation keeps the weights' free dims that it came from, so that an expert axis that one
contraction keeps and the next one batches is recognised.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import compat
from lora_jax.plan.flow import (
    Flow,
    Track,
    Usage,
    are_vectors,
    fed_by,
    flat_size,
    free_dims,
    is_chosen,
    is_constant_matrix,
    is_gained,
    joined,
    kernel_window,
    note_masks,
    note_zero_points,
    parted,
    peeled,
    restacked,
)
from lora_jax.plan.leaf import Use, UseKind
from lora_jax.transform.dim_maps import (
    indexed_dims,
    permutes,
    spreads,
    through,
    transformed,
    whole,
)
from lora_jax.transform.primitive import Body, DimFlow, inner_jaxpr, solve_bodies
from lora_jax.transform.primitives import row_of


def usage(fn: Callable, leaves: Sequence, tree: Any, *, args: Sequence, kwargs: dict) -> Usage:
    """Traces `fn` abstractly and collects the uses of every floating-point leaf.

    Args:
      fn: `fn(params, *args, **kwargs)`.
      leaves, tree: of params; arrays or `ShapeDtypeStruct`s.
      args, kwargs: example arguments; arrays in them are traced, other values are constants.
    """
    outer, outer_tree = jax.tree.flatten((tuple(args), dict(kwargs)))
    weights = [i for i, x in enumerate(leaves) if is_weight(x)]
    # Other leaves stay concrete, so that the function may branch on them; those with a shape alone
    # must be traced.
    shapes_only = [i for i, x in enumerate(leaves) if i not in set(weights) and _is_shape(x)]
    inputs = [i for i, x in enumerate(outer) if hasattr(x, "shape") and hasattr(x, "dtype")]

    def staged(ws: list, rest: list, xs: list) -> list:
        all_leaves, all_outer = list(leaves), list(outer)
        for i, w in [*zip(weights, ws, strict=True), *zip(shapes_only, rest, strict=True)]:
            all_leaves[i] = w
        for i, x in zip(inputs, xs, strict=True):
            all_outer[i] = x
        positional, named = jax.tree.unflatten(outer_tree, all_outer)
        out = fn(jax.tree.unflatten(tree, all_leaves), *positional, **named)
        return [x for x in jax.tree.leaves(out) if compat.is_traceable(x)]

    jaxpr = jax.make_jaxpr(staged)(
        [_as_array(leaves[i]) for i in weights],
        [leaves[i] for i in shapes_only],
        [outer[i] for i in inputs],
    )
    jaxpr, consts = compat.open_jaxpr(jaxpr)
    found = Usage(tuple([] for _ in leaves), set(), closed=not inputs)
    # First all inputs as arguments of the function; those that are parameters are replaced below.
    env = {v: Flow(fed=2) for v in jaxpr.invars}
    for v, x in zip(jaxpr.constvars, consts, strict=True):
        env[v] = Flow(fed=int(_may_be_data(x)))
    for v, i in zip(jaxpr.invars, weights, strict=False):
        dims = tuple(frozenset([d]) for d in range(leaves[i].ndim))
        env[v] = Flow((Track(i, dims),), live=frozenset([i]))
    # An integer or boolean parameter is a constant, such as an index table or a mask.
    for v in jaxpr.invars[len(weights) : len(weights) + len(shapes_only)]:
        env[v] = Flow(fed=1)
    outs = _walk(found, jaxpr, env)
    # A leaf that reaches an output on another path has a gradient.
    found.stopped.difference_update(*(flow.live for flow in outs))
    return found


def _as_array(x: Any) -> Any:
    """A leaf as `make_jaxpr` takes it: a quantized weight as an array of its shape and dtype."""
    return x if compat.is_array(x) else jax.ShapeDtypeStruct(x.shape, x.dtype)


def is_weight(x: Any) -> bool:
    """Whether a leaf can be adapted at all: a floating-point array with a dimension."""
    shaped = hasattr(x, "shape") and hasattr(x, "dtype") and len(x.shape) > 0
    return shaped and bool(jnp.issubdtype(x.dtype, jnp.floating))


def _may_be_data(x: Any) -> bool:
    """Whether a constant may be the function's data, closed over.

    Scalars and vectors of floats are not, such as the factors of a resize.
    """
    return jnp.ndim(x) > 1 or (jnp.ndim(x) == 1 and not jnp.issubdtype(x.dtype, jnp.inexact))


def _is_shape(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _walk(found: Usage, jaxpr: Any, env: dict) -> list[Flow]:
    """The flows of a jaxpr's outputs; `env` has those of its inputs and constants."""

    def read(v: Any) -> Flow:
        return Flow() if isinstance(v, compat.Literal) else env.get(v, Flow())

    for eqn in jaxpr.eqns:
        flows = [read(v) for v in eqn.invars]
        # Nothing about these operands matters to a weight, so nothing about the results does.
        if any(f.tracks or f.fed or f.made or f.live or any(f.origin) for f in flows):
            found.lines.append(found.line(eqn))
            env.update(zip(eqn.outvars, _step(found, eqn, flows), strict=True))
            found.lines.pop()
    return [read(v) for v in jaxpr.outvars]


def _step(found: Usage, eqn: Any, flows: list[Flow]) -> list[Flow]:
    """The flows of an equation's results, from those of its operands."""
    row = row_of(compat.name_of(eqn))
    if row.body is not None:
        return _BODIES[row.body](found, eqn, flows)
    return list(flows) if row.dims.pairwise else _operation(found, eqn, flows, row.dims)


def _inside(found: Usage, inner: Any, flows: Sequence[Flow]) -> list[Flow]:
    jaxpr, _ = compat.open_jaxpr(inner)
    return _walk(found, jaxpr, dict(zip(jaxpr.invars, flows, strict=True)))


def _call(found: Usage, eqn: Any, flows: list[Flow]) -> list[Flow]:
    return _inside(found, inner_jaxpr(eqn), flows)


def _while(found: Usage, eqn: Any, flows: list[Flow]) -> list[Flow]:
    a, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = _looped(flows, flows[a + b :])
    # The condition may use weights too.
    _inside(found, eqn.params["cond_jaxpr"], [*flows[:a], *carry])
    outs = _inside(found, eqn.params["body_jaxpr"], [*flows[a : a + b], *carry])
    return _entered(found, eqn, carry, outs)


def _cond(found: Usage, eqn: Any, flows: list[Flow]) -> list[Flow]:
    # Operand 0 is the number of the branch.
    outs = [_inside(found, branch, flows[1:]) for branch in eqn.params["branches"]]
    return [joined(each) for each in zip(*outs, strict=True)]


def _scan(found: Usage, eqn: Any, flows: list[Flow]) -> list[Flow]:
    consts, carry = compat.scan_counts(eqn.params, len(flows))
    state = _looped(flows, flows[consts : consts + carry])
    inside = [*flows[:consts], *state, *(peeled(f) for f in flows[consts + carry :])]
    outs = _inside(found, eqn.params["jaxpr"], inside)
    return [*_entered(found, eqn, state, outs[:carry]), *(restacked(f) for f in outs[carry:])]


def _solve(found: Usage, eqn: Any, flows: list[Flow]) -> list[Flow]:
    solution = dataclasses.replace(joined(flows), tracks=(), origin=())
    # A product inside the solve decides the roles only where no product with features does.
    flows = [_unfactorized(found, eqn, f) for f in flows]
    for inner, given in solve_bodies(eqn, flows, [Flow(fed=1)] * len(eqn.outvars)):
        _inside(found, inner, given)
    return [solution] * len(eqn.outvars)


def _unfactorized(found: Usage, eqn: Any, flow: Flow) -> Flow:
    """What a linear solve takes, but for a matrix that is factorized for it: its use ends there."""
    known = {t: any(u.kind == "other" for u in found.uses[t.leaf]) for t in flow.tracks}
    for track in (t for t, factorized in known.items() if factorized):
        found.uses[track.leaf].append(_other(found, eqn, track, constant=False))
    return dataclasses.replace(flow, tracks=tuple(t for t in flow.tracks if not known[t]))


def _looped(flows: Sequence[Flow], carry: Sequence[Flow]) -> list[Flow]:
    """The carries of a loop: zeros at its start, they may depend on arguments from step 2 on."""
    given = joined(flows)
    return [
        dataclasses.replace(f, fed=f.fed if f.tracks else given.fed, live=given.live) for f in carry
    ]


def _entered(found: Usage, eqn: Any, before: list[Flow], after: list[Flow]) -> list[Flow]:
    """A loop's results, of which weights become its carry: what later steps do is not followed."""
    for old, new in zip(before, after, strict=True):
        for track in (t for t in new.tracks if t not in old.tracks):
            found.uses[track.leaf].append(_other(found, eqn, track))
    return after


def _other(found: Usage, eqn: Any, track: Track, *, constant: bool = True) -> Use:
    name, line = track.spread_by or compat.name_of(eqn), found.lines[-1]
    return Use(name, line, "other", picked=track.picked, constant=constant)


def _operation(found: Usage, eqn: Any, flows: list[Flow], dims: DimFlow) -> list[Flow]:
    """The flows of the results of an operation that holds no jaxpr."""
    maps = [dims.maps(eqn, k) for k in range(len(flows))]
    given = joined(flows)
    made, live = given.made, given.live
    if compat.name_of(eqn) == "stop_gradient":
        found.stopped.update(live)
        live = frozenset()
    is_product = compat.name_of(eqn) == "dot_general"
    if compat.name_of(eqn) == "mul" or (is_product and maps[0]):
        note_masks(found, eqn, flows)
    elif compat.name_of(eqn) in ("add", "sub"):
        note_zero_points(found, eqn, flows)
    # A contraction with a weight: the weights that led to its operands are no output heads.
    for k, flow in enumerate(flows):
        axes = dims.contracted(eqn, k) if flow.tracks else None
        if axes is not None and axes[0]:
            found.inner.update(made)
            made |= {t.leaf for t in flow.tracks}

    outs = []
    for j, var in enumerate(eqn.outvars):
        record = j == 0  # once, however many results the operation has
        parts = []
        for k, flow in enumerate(flows):
            dim_map = None if (of_results := maps[k]) is None else of_results[j]
            followed = [
                _follow(
                    found, eqn, flows, k, track=track, dim_map=dim_map, dims=dims, record=record
                )
                for track in flow.tracks
            ]
            tracks = [track for track in followed if track is not None]
            known = dim_map if flow.origin and not is_product else None
            origin = () if known is None else through(flow.origin, known)
            parts.append(Flow(tuple(tracks), origin))
        if is_product:
            parts.append(Flow((), free_dims(found, eqn, flows, len(var.aval.shape))))
        outs.append(dataclasses.replace(joined(parts), fed=given.fed, made=made, live=live))
    return outs


def _follow(
    found: Usage,
    eqn: Any,
    flows: Sequence[Flow],
    k: int,
    *,
    track: Track,
    dim_map: Sequence | None,
    dims: DimFlow,
    record: bool,
) -> Track | None:
    """Records how an equation uses a weight, and follows the weight into its result.

    Args:
      found: collects the uses.
      eqn, flows: the equation, and the flows of its operands.
      k: the operand that is the weight.
      track: the weight.
      dim_map: from the dims of operand `k` to those of the result; None if they do not reach it.
      dims: the primitive's entry.
      record: whether a use is recorded.

    Returns:
      The weight as the result has it, or None where it is consumed.
    """
    others = [f for i, f in enumerate(flows) if i != k]
    use = _consumption(found, eqn, others, k, track=track, dims=dims)
    if use is not None:
        if record:
            _record(found, track, use)
        if use.kind == "transform":
            # The product with a constant matrix is a weight again.
            mapped = track.mapped or use.contracted
            return dataclasses.replace(track, dims=transformed(eqn, k, track.dims), mapped=mapped)
        if use.kind not in ("lookup", "rows", "picked"):
            return None
        if use.kind == "lookup":
            # The rows are followed further: a contraction of them shows that the index chose a
            # layer or an expert.
            track = dataclasses.replace(track, lookup=len(found.uses[track.leaf]) - 1)
        elif dim_map is not None and permutes(eqn, dim_map):
            return dataclasses.replace(track, dims=through(track.dims, dim_map))
        return _carry(eqn, k, track, dim_map=dim_map, dims=dims)

    # Beside a constant matrix only an argument (2) counts as data, not another constant (1).
    fed = fed_by(others) > int(is_constant_matrix(found, eqn, k, track))
    # Combined with data, the weight is consumed, unless the operation is a rearrangement by index
    # or multiplies it by gains; gains of each example let only a contraction follow.
    rearranged = dims.takes_data(eqn, k) or (track.mixed and is_gained(eqn, k, track))
    rearranged = rearranged or is_chosen(eqn, flows, track)
    consumed = (fed and not rearranged) or (track.mixed and not dims.keeps_rows(eqn, k) and not fed)
    if dim_map is None or consumed:
        if record and track.lookup < 0:
            # Data may choose between weights, which is no operation with data.
            chosen = compat.name_of(eqn) == "select_n" and k > 0
            alone = chosen and not any(f.fed for f in others[1:])
            found.uses[track.leaf].append(
                _other(found, eqn, track, constant=alone or not (fed or track.mixed))
            )
        return None
    if track.lookup >= 0 and not dims.keeps_rows(eqn, k):
        return None
    if fed and compat.name_of(eqn) in ("mul", "div", "dot_general") and spreads(eqn, k):
        track = dataclasses.replace(track, mixed=True)
    return _carry(eqn, k, track, dim_map=dim_map, dims=dims)


def _record(found: Usage, track: Track, use: Use) -> None:
    """Adds a use to its leaf; a lookup whose rows are contracted is one that picks from a stack."""
    uses = found.uses[track.leaf]
    if track.lookup >= 0:
        uses[track.lookup] = dataclasses.replace(uses[track.lookup], kind="picked")
    uses.append(use)


def _carry(
    eqn: Any, k: int, track: Track, *, dim_map: Sequence | None, dims: DimFlow
) -> Track | None:
    """The weight after an equation that rearranges it."""
    if dim_map is None:
        return None
    picked = track.picked | whole(track.dims, dims.picked(eqn, k))
    name = compat.name_of(eqn)
    spread_by = name if name == "fft" else track.spread_by
    dims_of = through(track.dims, dim_map)
    return dataclasses.replace(track, dims=dims_of, picked=picked, spread_by=spread_by)


def _consumption(
    found: Usage, eqn: Any, others: Sequence[Flow], k: int, *, track: Track, dims: DimFlow
) -> Use | None:
    """How an equation uses the weight at operand `k`, or None if it only rearranges it."""
    name, line = compat.name_of(eqn), found.lines[-1]
    axes = dims.contracted(eqn, k)
    if axes is not None and axes[0]:  # a product that sums nothing scales the weight
        fed = fed_by(others)
        # Looked-up rows times a constant matrix are a table's still. Those that features meet may
        # be columns of a head: a contraction elsewhere decides.
        if track.lookup >= 0 and (not fed or are_vectors(found, eqn, k, track)):
            uses, dims_of = found.uses[track.leaf], [track.dims[i] for i in axes[0]]
            if fed and any(d and not d <= uses[track.lookup].contracted for d in dims_of):
                uses[track.lookup] = dataclasses.replace(uses[track.lookup], kind="rows")
            return None
        contracted = frozenset().union(*(track.dims[i] for i in axes[0]))
        # Batched here, or one index taken before.
        stacked = (whole(track.dims, axes[1]) | track.picked) - parted(eqn, k, track, axes)
        kind: UseKind = "contract" if contracted - stacked else "other"
        # Times a constant matrix it is another weight, which is contracted with features later.
        # What other weights made of constants, as in a network over positions, are features.
        with_features = fed or any(f.tracks or f.made for f in others)
        if kind == "contract" and name == "dot_general" and not with_features:
            kind = "transform"
        # The first product counts where it was of fixed positions with a kernel, and not a resize.
        if not track.mapped <= contracted:
            contracted = track.mapped
        return Use(
            name,
            line,
            kind,
            contracted=contracted - stacked,
            stacked=stacked,
            picked=track.picked,
            constant=fed < 2,
            flat=flat_size(eqn, k, track, axes[0]),
            window=kernel_window(eqn, track, name),
        )
    if name == "gather" and k == 0 and track.lookup < 0:
        rows = frozenset().union(*(track.dims[i] for i in indexed_dims(eqn)))
        # An array that the function closes over is no data where it has arguments: a permutation.
        looked_up = any(f.fed > int(not found.closed) for f in others)
        # A scalar that no argument decides, such as a loop's counter, picks a layer.
        counted = eqn.invars[1].aval.ndim == 1
        kind = "lookup" if looked_up else "picked" if counted else "rows"
        picked = track.picked - rows
        return Use(name, line, kind, contracted=rows, stacked=picked, picked=picked)
    return None


_BODIES: Mapping[Body, Callable[[Usage, Any, list[Flow]], list[Flow]]] = {
    "call": _call,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "solve": _solve,
}
