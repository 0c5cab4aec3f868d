"""The rule of each primitive."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from lora_jax.transform import rules_consume, rules_rearrange
from lora_jax.transform.implicit import Implicit, Unsupported, is_implicit
from lora_jax.transform.interpret import Context, _binder


def _rearranging(rule: Callable) -> Callable:
    """A rule of the weight (first operand), further operands being indices."""

    def apply(context, eqn, values):
        if not is_implicit(values[0]) or any(is_implicit(x) for x in values[1:]):
            raise Unsupported("the weight is not the first operand")
        return rule(*values, **eqn.params)

    return apply


def _binding(rule: Callable) -> Callable:
    """A rule that binds the original primitive to the weight and its factors."""
    return lambda context, eqn, values: rule(values[0], _binder(eqn))


def _consuming(rule: Callable) -> Callable:
    """A rule that contracts the weight with an activation."""

    def apply(context, eqn, values):
        weights = [x for x in values if is_implicit(x)]
        use = context.next_use(weights[0])
        return rule(*values, _binder(eqn), use, **eqn.params)

    return apply


def _gather(context, eqn, values):
    v, indices = values
    return rules_consume.gather(v, indices, _binder(eqn), **eqn.params)


def _scalar_product(context, eqn, values):
    left, right = values
    if is_implicit(left) and is_implicit(right):
        raise Unsupported("elementwise product of two weights")
    v, factor = (left, right) if is_implicit(left) else (right, left)
    return _shaped(eqn, rules_rearrange.scale_by(v, factor))


def _scalar_quotient(context, eqn, values):
    if not is_implicit(values[0]) or is_implicit(values[1]):
        raise Unsupported("division by a weight")
    return _shaped(eqn, rules_rearrange.scale_by(*values, divide=True))


def _shaped(eqn, v: Implicit) -> Implicit:
    if tuple(eqn.outvars[0].aval.shape) != v.shape:
        raise Unsupported("broadcasting product")
    return v


def _concatenate(context, eqn, values):
    return rules_rearrange.concatenate(values, eqn.params["dimension"])


def _stack(context, eqn, values):
    return rules_rearrange.stack(values, eqn.params["axis"])


def _barrier(context, eqn, values):
    return jax.tree.unflatten(
        jax.tree.structure(values), lax.optimization_barrier(jax.tree.leaves(values))
    )


def _device_put(context, eqn, values):
    return [
        rules_rearrange.device_put(x, to) if is_implicit(x) else jax.device_put(x, to)
        for x, to in zip(values, eqn.params["devices"], strict=True)
    ]


def _constraint(context, eqn, values):
    return rules_rearrange.sharding_constraint(values[0], _binder(eqn), **eqn.params)


# One rule a primitive, by the name `compat.name_of` gives.
RULES: dict[str, Callable[[Context, Any, list], Any]] = {
    "dot_general": _consuming(rules_consume.dot_general),
    "conv_general_dilated": _consuming(rules_consume.conv),
    "ragged_dot_general": _consuming(rules_consume.ragged_dot),
    "gather": _gather,
    "transpose": _rearranging(rules_rearrange.transpose),
    "reshape": _rearranging(rules_rearrange.reshape),
    "squeeze": _rearranging(rules_rearrange.squeeze),
    "broadcast_in_dim": _rearranging(rules_rearrange.broadcast_in_dim),
    "convert_element_type": _rearranging(rules_rearrange.convert),
    "slice": _rearranging(rules_rearrange.slice_),
    "dynamic_slice": _rearranging(rules_rearrange.dynamic_slice),
    "split": _rearranging(rules_rearrange.split),
    "unstack": _rearranging(rules_rearrange.unstack),
    "reduce_sum": _rearranging(rules_rearrange.reduce_unit),
    "reshard": _rearranging(rules_rearrange.reshard),
    "neg": _rearranging(rules_rearrange.negate),
    "rev": _rearranging(rules_rearrange.reverse),
    "concatenate": _concatenate,
    "stack": _stack,
    "mul": _scalar_product,
    "div": _scalar_quotient,
    "sharding_constraint": _constraint,
    "optimization_barrier": _barrier,
    "copy": _binding(rules_rearrange.leafwise),
    "copy_p": _binding(rules_rearrange.leafwise),
    "stop_gradient": _binding(rules_rearrange.leafwise),
    "name": _binding(rules_rearrange.named),
    "reduce_precision": _binding(rules_rearrange.base_only),
    "pvary": _binding(rules_rearrange.leafwise),
    "device_put": _device_put,
}
