"""Trees as flat dicts of named arrays: what is written to disk.

A flat dict needs no class of ours to be read again, and a missing, left-over or misshapen array
can be named. `None` leaves (the base's places in a trainable tree) do not appear.
"""

from collections.abc import Mapping
from typing import Any

import jax

_SHOWN = 5


def _component(key) -> str:
    for attribute in ("key", "name", "idx"):
        if (part := getattr(key, attribute, None)) is not None:
            return str(part)
    return str(key)


def name_of(key_path) -> str:
    """A key path of `jax.tree_util` as dotted text, every component kept (paths.spell drops some).

    A `/` inside a key stands as a dot too: Orbax would read it as a folder.
    """
    return ".".join(_component(key).replace("/", ".") for key in key_path)


def flatten(tree, *, is_leaf=None) -> dict[str, Any]:
    """The leaves of a tree by name; `is_leaf` as in `jax.tree.leaves`.

    Raises:
      ValueError: two leaves have the same name.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    named = {name_of(path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        names = [name_of(path) for path, _ in leaves]
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"two leaves of the tree are both spelled `{twice}`; rename one")
    return named


def unflatten(like, named: Mapping[str, Any]):
    """A tree shaped as `like` with the leaves of `named`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: named[name_of(path)], like)


def nested(named: Mapping[str, Any]) -> dict:
    """Dotted names as nested dicts."""
    out: dict = {}
    for name, leaf in named.items():
        *around, last = name.split(".")
        node = out
        for part in around:
            node = node.setdefault(part, {})
        node[last] = leaf
    return out


def differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """Each way in which the arrays of `got` are not those of `expected`, as a phrase.

    Args:
      expected: anything with `shape` and `dtype` by name.
      got: the same.
    """
    missing = [f"`{n}` is missing" for n in expected if n not in got]
    extra = [f"`{n}` is left over" for n in got if n not in expected]
    wrong = [
        f"`{n}` is {describe(got[n])}, expected {describe(x)}"
        for n, x in expected.items()
        if n in got and describe(got[n]) != describe(x)
    ]
    return missing + extra + wrong


def describe(x) -> str:
    """Dtype and shape as jaxtyping spells them: `float32[576,8]`."""
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def parse(described: str) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of what `describe` spells, or a fingerprint, with more around it."""
    kind = described.partition(" ")[0].rpartition(":")[2]
    dtype, _, sizes = kind.rstrip("]").partition("[")
    return dtype, tuple(int(n) for n in sizes.split(",") if n)


def summary(phrases: list[str]) -> str:
    """The first few phrases in one line, and how many more there are."""
    more = f"; and {len(phrases) - _SHOWN} more" if len(phrases) > _SHOWN else ""
    return "; ".join(phrases[:_SHOWN]) + more
