"""What a case of the laws is, and the arrays the cases share."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tests.support import random_arrays

# Two products rounded apart (x·W and s·(x·A)·B) against one (x·(W + s·A·B)): a few float32
# roundings a layer, relative to the largest output.
FLOAT32 = 2e-5
# bfloat16 has 8 bits: one rounding of the merged weight and one of the sum, a few layers deep.
BFLOAT16 = 5e-2


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and what the plan must find in it.

    Attributes:
      name: unique.
      build: gives `(fn, params, args)`; every argument is an array.
      roles: path to roles of the leaves that are adapted, all of them targeted by their path.
      fallbacks: pairs (path, primitive) of every materialization, in the plan and in the call.
      linear: paths that "all-linear" adapts; None where they are the same as `roles`.
      config: further fields of the `LoraConfig`.
      tolerance: relative to the largest reference value.
      numerical: whether gradients are taken in float64 and checked by finite differences. Not for
        models that compute in a lower precision whatever they are given, and not where what is
        differentiated is not the derivative (`stop_gradient`, running statistics).
      reverse: whether JAX can differentiate the base model in reverse.
      dropout: whether it stays without further materializations where dropout is on.
      mapped: whether the base model itself can be vmapped over its arguments.
    """

    name: str
    build: Callable[[], tuple[Callable, Any, tuple]]
    roles: Mapping[str, str]
    fallbacks: frozenset = frozenset()
    linear: tuple[str, ...] | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tolerance: float = FLOAT32
    numerical: bool = True
    reverse: bool = True
    dropout: bool = True
    mapped: bool = True

    def __str__(self) -> str:
        return self.name


normal = functools.partial(random_arrays.normal, scale=0.4)


def filled(tree):
    """A tree of shapes with numbers in it: matrices normal, vectors positive, near one."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [_fill(i, x) for i, x in enumerate(leaves)])


def _fill(seed: int, x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(seed), x.shape)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros(x.shape, x.dtype)
    if len(x.shape) > 1:
        return normal(seed, *x.shape, dtype=x.dtype)
    return (1 + jnp.abs(normal(seed, *x.shape))).astype(x.dtype)


def features(*shape: int, seed: int = 100) -> jax.Array:
    """The activation most cases take."""
    return normal(seed, *(shape or (2, 5, 8)), scale=1.0)


def equations(jaxpr):
    """Every equation, inner jaxprs' included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
