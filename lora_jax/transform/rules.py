"""From a function of weights to the rule of a primitive, `rule(context, eqn, values)`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax.transform import (
    rules_consume,
    rules_gather,
    rules_join,
    rules_product,
    rules_rearrange,
    rules_reduce,
    rules_write,
)
from lora_jax.transform.implicit import Implicit, Unsupported, is_implicit
from lora_jax.transform.interpret import Context, Pair
from lora_jax.transform.origins import CLOSED, CONSTANT, DATA, origin_of
from lora_jax.transform.primitive import Rule, binder


def rearranging(rule: Callable) -> Rule:
    """A rule of the weight (first operand), further operands being indices."""

    def apply(context: Context, eqn: Any, values: list) -> Any:
        if not is_implicit(values[0]) or any(is_implicit(x) for x in values[1:]):
            raise Unsupported("the weight is not the first operand")
        return rule(*values, **eqn.params)

    return apply


# `values[0]` is a weight here: an operation on one array is only looked up where that is implicit.
def binding(rule: Callable) -> Rule:
    """A rule that binds the original primitive to the weight and its factors."""
    return lambda context, eqn, values: rule(values[0], binder(eqn))


def reducing(rule: Callable) -> Rule:
    """A rule that binds the original primitive to the weight alone, and takes its parameters."""
    return lambda context, eqn, values: rule(values[0], binder(eqn), **eqn.params)


def consuming(rule: Callable) -> Rule:
    """A rule that contracts the weight with an activation."""

    def apply(context: Context, eqn: Any, values: list) -> Any:
        weights = [x for x in values if is_implicit(x)]
        use = context.next_use(weights[0])
        return rule(*values, binder(eqn), use, **eqn.params)

    return apply


def dot_general(context: Context, eqn: Any, values: list) -> Any:
    """A product: with another weight or a constant it is a weight again, else features."""
    numbers = eqn.params["dimension_numbers"]
    if all(map(is_implicit, values)):
        left, right = values
        return rules_product.of_weights(left, right, binder(eqn), numbers)
    side = 0 if is_implicit(values[0]) else 1
    # A constant times a weight, such as a rotation that a model keeps beside it, is a weight that
    # features meet later.
    if makes_weight(context, eqn, values):
        made = rules_product.with_constant(
            values[side], values[1 - side], binder(eqn), weight_left=side == 0, **eqn.params
        )
        if made is not None:
            return made
    if not numbers[0][side] and origin_of(context.origins, eqn.invars[1 - side]) != DATA:
        return _elementwise(eqn, values, side)
    return consuming(rules_consume.dot_general)(context, eqn, values)


def _elementwise(eqn: Any, values: Sequence, side: int) -> Implicit:
    """A product that sums nothing, as of a weight and its gains, as an elementwise one."""
    _, batch = eqn.params["dimension_numbers"]
    shape, placed, count = eqn.outvars[0].aval.shape, [], len(batch[0])
    for k, x in enumerate(values):
        free = [d for d in range(x.ndim) if d not in batch[k]]
        # `dot_general` returns the batch dims first, then the free dims of each operand.
        at = [*range(len(batch[0])), *range(count, count := count + len(free))]
        sizes = [n if d in at else 1 for d, n in enumerate(shape)]
        if k == side:
            x = rules_rearrange.transpose(x, permutation=(*batch[k], *free))
            placed.append(rules_rearrange.broadcast_in_dim(x, shape=sizes, broadcast_dimensions=at))
        else:
            placed.append(x.transpose(*batch[k], *free).reshape(sizes))
    return _scaled(eqn, placed[side], placed[1 - side], divide=False)


def makes_weight(context: Context, eqn: Any, values: Sequence) -> bool:
    """Whether the other operand of a weight is a constant. With dropout it counts as features."""
    # A mask belongs to the adapter's input: a constant would have to be masked anew at each use.
    side = 0 if is_implicit(values[0]) else 1
    v = values[side]
    return v.key is None and origin_of(context.origins, eqn.invars[1 - side]) == CONSTANT


def gather(context: Context, eqn: Any, values: list) -> Any:
    v, indices = values
    keep = rearranges(context, eqn, values)
    return rules_gather.gather(v, indices, binder(eqn), keep=keep, **eqn.params)


def rearranges(context: Context, eqn: Any, values: Sequence) -> bool:
    """Whether indices are a constant permutation or choice of rows, not a lookup of tokens."""
    known = origin_of(context.origins, eqn.invars[1]) != DATA
    return is_implicit(values[0]) and known and is_matrix_after(values[0], eqn)


def is_matrix_after(v: Implicit, eqn: Any) -> bool:
    """Whether both factors of a weight have dims that are longer than 1 after a gather of rows."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    cut = [d for d in range(v.ndim) if sizes[d] != v.shape[d]]
    # A dim that is cut but not indexed is a plain slice, which both factors may have.
    if not set(cut) <= set(numbers.start_index_map):
        return False
    # Indices are (..., dims indexed): a collapsed dim comes back as the axes of the indices.
    count = math.prod(eqn.invars[1].aval.shape[:-1])
    left = {r for d, (r, n) in enumerate(zip(v.roles, sizes, strict=True)) if n != 1}
    return {"i", "o"} <= left | {v.roles[d] for d in numbers.collapsed_slice_dims if count > 1}


def product(context: Context, eqn: Any, values: list) -> Any:
    left, right = values
    if is_implicit(left) and is_implicit(right):
        return Pair(left, right, eqn, eqn.outvars[0].aval.dtype)
    v, factor = (left, right) if is_implicit(left) else (right, left)
    return _scaled(eqn, v, factor, divide=False)


def square(context: Context, eqn: Any, values: list) -> Any:
    if eqn.params.get("y", 2) != 2:
        raise Unsupported("the operation has no rule")
    return Pair(values[0], values[0], eqn, eqn.outvars[0].aval.dtype)


def reduce_sum(context: Context, eqn: Any, values: list) -> Any:
    """The sum over dims of a weight, or of the product of two: a norm."""
    [v], axes = values, eqn.params["axes"]
    if isinstance(v, Pair):
        return rules_reduce.sum_of_products(v.left, v.right, axes).astype(v.dtype)
    return rules_reduce.reduce_sum(v, binder(eqn), axes=axes)


def convert(context: Context, eqn: Any, values: list) -> Any:
    """A cast, which the product of two weights does after its sum."""
    [v], dtype = values, eqn.params["new_dtype"]
    return v._replace(dtype=dtype) if isinstance(v, Pair) else rules_rearrange.convert(v, dtype)


def quotient(context: Context, eqn: Any, values: list) -> Any:
    if not is_implicit(values[0]) or is_implicit(values[1]):
        raise Unsupported("division by a weight")
    return _scaled(eqn, *values, divide=True)


def _scaled(eqn: Any, v: Implicit, factor: Any, *, divide: bool) -> Implicit:
    [v] = _broadcast(eqn, [v])
    return rules_rearrange.scale_by(v, factor, divide=divide)


def _broadcast(eqn: Any, values: Sequence) -> list:
    """The operands, weights with copies along the dims in which the result is longer."""
    shape = eqn.outvars[0].aval.shape
    return [rules_rearrange.broadcast_to(v, shape) if is_implicit(v) else v for v in values]


def add(context: Context, eqn: Any, values: list) -> Any:
    return _sum(context, eqn, values, binder(eqn))


def subtract(context: Context, eqn: Any, values: list) -> Any:
    """`left - right`, as the sum of left and the negative of right."""
    # The bases are subtracted as a sum too: `a + (-b)` is exact in floating point.
    left, right = values
    right = rules_rearrange.negate(right) if is_implicit(right) else -right
    return _sum(context, eqn, [left, right], lax.add)


def _sum(context: Context, eqn: Any, values: list, bind: Callable) -> Any:
    values = _broadcast(eqn, values)
    if all(map(is_implicit, values)):
        return rules_join.add(values, bind)
    k = 0 if is_implicit(values[0]) else 1
    v, origin = values[k], origin_of(context.origins, eqn.invars[1 - k])
    # A weight repeated along a long dim (a row for each token) is used like features already: what
    # the function closes over then counts as data.
    copied = any(r == "u" and n != 1 for r, n in zip(v.roles, v.shape, strict=True))
    if origin == DATA or (origin == CLOSED and copied):
        raise Unsupported("it is added to features")
    return rules_join.add_constant(
        v, values[1 - k], lambda w, c: bind(*((w, c) if k == 0 else (c, w)))
    )


def complex_(context: Context, eqn: Any, values: list) -> Any:
    return rules_join.complex_(_broadcast(eqn, values), binder(eqn))


def real(context: Context, eqn: Any, values: list) -> Any:
    imaginary = eqn.primitive.name == "imag"
    return rules_join.real_part(values[0], binder(eqn), imaginary=imaginary)


def conj(context: Context, eqn: Any, values: list) -> Any:
    return rules_join.conjugate(values[0], binder(eqn))


def writing(rule: Callable) -> Rule:
    """A rule of a write at indices, into a weight or of one; beside features it is no weight."""

    def apply(context: Context, eqn: Any, values: list) -> Any:
        written = is_implicit(values[2])
        if written and origin_of(context.origins, eqn.invars[0]) == DATA:
            raise Unsupported("it is written into features")
        return rule(*values, binder(eqn), **eqn.params)

    return apply


def dynamic_update_slice(context: Context, eqn: Any, values: list) -> Any:
    return rules_write.dynamic_update_slice(*values, bind=binder(eqn))


def concatenate(context: Context, eqn: Any, values: list) -> Any:
    return rules_join.concatenate(values, eqn.params["dimension"])


def stack(context: Context, eqn: Any, values: list) -> Any:
    return rules_join.stack(values, eqn.params["axis"])


def barrier(context: Context, eqn: Any, values: list) -> Any:
    return jax.tree.unflatten(
        jax.tree.structure(values), lax.optimization_barrier(jax.tree.leaves(values))
    )


def device_put(context: Context, eqn: Any, values: list) -> Any:
    return [
        rules_rearrange.device_put(x, to) if is_implicit(x) else jax.device_put(x, to)
        for x, to in zip(values, eqn.params["devices"], strict=True)
    ]


def constraint(context: Context, eqn: Any, values: list) -> Any:
    return rules_rearrange.sharding_constraint(values[0], binder(eqn), **eqn.params)
