"""A leaf that `plan` has not decided about yet, with all names that a config may use for it."""

import math
from typing import NamedTuple

from lora_jax import paths
from lora_jax.dims import sizes
from lora_jax.plan.leaf import LeafPlan


class Names(NamedTuple):
    """The names of a leaf, computed once.

    Attributes:
      module: dotted path of the module that holds the leaf.
      unnumbered: the leaf's path and its module's as the tree spells them, without layer numbers;
        then both without linen's collection.
      layers: for each stack index, flattened, the names of module and parameter. They have the
        layer's number if the path shows where it belongs. One entry where nothing is stacked.
    """

    module: str
    unnumbered: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]

    @property
    def every(self) -> set[str]:
        return {*self.unnumbered, *(name for layer in self.layers for name in layer)}

    @property
    def numbered(self) -> bool:
        """Whether stacked layers have names of their own."""
        return len(self.layers) == 1 or self.layers[0] != self.layers[-1]


class Draft(NamedTuple):
    """A leaf that `plan` has not finished.

    Attributes:
      leaf: as planned so far, frozen at first.
      names: of the leaf.
      roles_given: whether its roles come from the config.
    """

    leaf: LeafPlan
    names: Names
    roles_given: bool = False


def without_collection(path: str) -> str:
    """A path without the name of linen's collection of parameters."""
    return path.removeprefix("params.")


def names_of(leaf: LeafPlan) -> Names:
    """The names of a leaf that has its roles.

    A leaf without roles (a bias, a norm's scale) counts as stacked where its path has a stack's
    name without a number: a bias of stacked layers trains layer by layer too.
    """
    module = paths.module_of(leaf.path)
    short = (without_collection(module), without_collection(leaf.path))
    unnumbered = (leaf.path, module, short[1], short[0])
    if leaf.roles:
        return Names(module, unnumbered, _by_role(short, leaf))
    if not leaf.shape:
        return Names(module, unnumbered, (short,))
    # A name that ends in `layers` has no place for a number, so it has no expanded names.
    expanded = [names for name in short if (names := paths.expand(name, leaf.shape[0]))]
    return Names(module, unnumbered, tuple(zip(*expanded, strict=True)) or (short,))


def _by_role(short: tuple[str, str], leaf: LeafPlan) -> tuple[tuple[str, ...], ...]:
    """`Names.layers` of a leaf whose roles show its stack."""
    stack, _, _ = sizes(leaf.shape, leaf.roles)
    if not stack:
        return (short,)
    expanded = [paths.expand(name, stack[0]) for name in short]
    # A stack under an unknown name: all layers share the unnumbered names.
    if not all(expanded):
        return (short,) * math.prod(stack)
    inner = math.prod(stack[1:])  # experts of one layer share its names
    return tuple(names for names in zip(*expanded, strict=True) for _ in range(inner))
