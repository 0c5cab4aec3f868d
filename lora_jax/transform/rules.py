"""From a function of weights to the rule of a primitive, `rule(context, eqn, values)`."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from lora_jax.transform import rules_gather, rules_rearrange
from lora_jax.transform.implicit import Implicit, Unsupported, is_implicit
from lora_jax.transform.interpret import Context
from lora_jax.transform.primitive import Rule, binder


def rearranging(rule: Callable) -> Rule:
    """A rule of the weight (first operand), further operands being indices."""

    def apply(context: Context, eqn: Any, values: list) -> Any:
        if not is_implicit(values[0]) or any(is_implicit(x) for x in values[1:]):
            raise Unsupported("the weight is not the first operand")
        return rule(*values, **eqn.params)

    return apply


def binding(rule: Callable) -> Rule:
    """A rule that binds the original primitive to the weight and its factors."""
    return lambda context, eqn, values: rule(values[0], binder(eqn))


def consuming(rule: Callable) -> Rule:
    """A rule that contracts the weight with an activation."""

    def apply(context: Context, eqn: Any, values: list) -> Any:
        weights = [x for x in values if is_implicit(x)]
        use = context.next_use(weights[0])
        return rule(*values, binder(eqn), use, **eqn.params)

    return apply


def gather(context: Context, eqn: Any, values: list) -> Any:
    v, indices = values
    return rules_gather.gather(v, indices, binder(eqn), **eqn.params)


def product(context: Context, eqn: Any, values: list) -> Any:
    left, right = values
    if is_implicit(left) and is_implicit(right):
        raise Unsupported("elementwise product of two weights")
    v, factor = (left, right) if is_implicit(left) else (right, left)
    return _shaped(eqn, rules_rearrange.scale_by(v, factor))


def quotient(context: Context, eqn: Any, values: list) -> Any:
    if not is_implicit(values[0]) or is_implicit(values[1]):
        raise Unsupported("division by a weight")
    return _shaped(eqn, rules_rearrange.scale_by(*values, divide=True))


def _shaped(eqn: Any, v: Implicit) -> Implicit:
    if tuple(eqn.outvars[0].aval.shape) != v.shape:
        raise Unsupported("broadcasting product")
    return v


def concatenate(context: Context, eqn: Any, values: list) -> Any:
    return rules_rearrange.concatenate(values, eqn.params["dimension"])


def stack(context: Context, eqn: Any, values: list) -> Any:
    return rules_rearrange.stack(values, eqn.params["axis"])


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
