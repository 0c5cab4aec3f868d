"""The names a planned leaf goes by: its module's and its own, one for each layer of a stack."""

import math
from typing import TYPE_CHECKING

from lora_jax import paths
from lora_jax.array import sizes

if TYPE_CHECKING:
    from lora_jax.plan.decide import LeafPlan


def names_of(leaf: "LeafPlan") -> list[list[str]]:
    """The names each stack index goes by, flattened over the stack; one entry when unstacked.

    Args:
      leaf: with its roles.

    Returns:
      For each index the module's name and the parameter's, with the layer number where the path
      says where it belongs, else without.
    """
    stack, _, _ = sizes(leaf.shape, leaf.roles) if leaf.roles else ((), 0, 0)
    short = [strip(paths.module_of(leaf.path)), strip(leaf.path)]
    if not stack:
        return [short]
    expanded = [paths.expand(name, stack[0]) for name in short]
    repeat = math.prod(stack[1:])
    if not all(expanded):
        return [short] * math.prod(stack)
    return [[m, p] for m, p in zip(*expanded, strict=True) for _ in range(repeat)]


def strip(path: str) -> str:
    """A path without linen's collection name."""
    return path.removeprefix("params.")


def unnumbered(leaf: "LeafPlan") -> list[str]:
    """A leaf's path and its module's, layers not numbered, with and without a collection."""
    return [leaf.path, paths.module_of(leaf.path), *map(strip, _both(leaf.path))]


def _both(path: str) -> tuple[str, str]:
    return path, paths.module_of(path)


def every_name(leaf: "LeafPlan") -> list[str]:
    """All that a leaf goes by."""
    return [*(n for each in names_of(leaf) for n in each), *unnumbered(leaf)]
