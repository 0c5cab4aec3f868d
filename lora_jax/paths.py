"""The spelling of parameter paths, the names of stacked layers, and the nearest known names.

A *path* is the dotted spelling of where a leaf sits in a parameter tree:
`model.layers.self_attn.q_proj.kernel`. Its *module* is the path without the parameter's own
name (`model.layers.self_attn.q_proj`). A leaf that stacks layers also has one *expanded* name for
each layer (`model.layers.3.self_attn.q_proj`), which is how Hugging Face spells it. Where layers
are of several kinds, a component says which of them a leaf stacks, as Python's slices do:
`model.layers.3:61.mlp.gate.kernel`, or every second one from layer 1 on, `model.layers.1:48:2`.
"""

import difflib
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jaxtyping import PRNGKeyArray, PyTree

# The last component of a leaf's path when it names the parameter, not the module it belongs to.
PARAMETER_NAMES = frozenset(
    "kernel weight weights embedding embeddings w W scale bias b value raw_value "
    "weight_ih weight_hh".split()
)

# Components after which a stacked leaf's layer number belongs in Hugging Face's spelling.
STACK_NAMES = ("layers", "layer", "h", "blocks", "block")

# Attributes that only wrap a leaf: nnx.Variable (`value`, `raw_value`), linen boxes (`value`),
# named arrays (haliax's `array`, penzai's `data_array`).
_WRAPPERS = frozenset({"value", "raw_value", "array", "data_array"})


def component(key: Any) -> str:
    """The text of one key of a key path."""
    for attribute in ("key", "name", "idx"):
        if (part := getattr(key, attribute, None)) is not None:
            return str(part)
    return str(key)


def spell(key_path: Sequence) -> str:
    """Spells a key path of `jax.tree_util` as dotted text.

    Attribute keys that only wrap a leaf (`nnx.Variable.value`, a box's `value`) are dropped, and
    `/` inside a key (Haiku's module names) separates components as `.` does.

    Args:
      key_path: tuple of `DictKey`, `GetAttrKey`, `SequenceKey` or `FlattenedIndexKey`.

    Returns:
      The dotted path, for example `params.Dense_0.kernel`.
    """
    keys = list(key_path)
    while len(keys) > 1 and _is_wrapper(keys[-1]):
        keys.pop()
    return ".".join(component(k).replace("/", ".") for k in keys)


def _is_wrapper(key: Any) -> bool:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return key.name in _WRAPPERS
    # The first leaf of a class that names none; the others keep their numbers.
    return isinstance(key, jax.tree_util.FlattenedIndexKey) and key.key == 0


def repeated(names: Sequence[str]) -> str | None:
    """The first of several names that occurs twice, as in {"a": {"b": x}, "a.b": y}, or None."""
    if len(set(names)) == len(names):
        return None
    return next(name for name in names if names.count(name) > 1)


def module_of(path: str) -> str:
    """The module a leaf belongs to: its path without a trailing parameter name."""
    head, _, last = path.rpartition(".")
    return head if head and last in PARAMETER_NAMES else path


def bare(path: str) -> str:
    """A path without linen's collection name, as configs and checkpoints spell it."""
    return path.removeprefix("params.")


def numbers_of(part: str) -> range | None:
    """The numbers of the layers that a component such as `3:61` or `1:48:2` names, if it does."""
    found = re.fullmatch(r"(\d+):(\d+)(?::(\d+))?", part)
    return None if found is None else range(*(int(n) for n in found.groups(default="1")))


def slice_of(numbers: range) -> str:
    """The reverse of `numbers_of`."""
    step = "" if numbers.step == 1 else f":{numbers.step}"
    return f"{numbers.start}:{numbers.stop}{step}"


def expand(path: str, layers: int) -> list[str]:
    """The expanded name of each stacked layer.

    Args:
      path: dotted path of a leaf, or of its module.
      layers: length of the stack axis.

    Returns:
      `layers` paths, or an empty list when no component of the path is a known name of a stack.
    """
    parts = path.split(".")
    for i, part in enumerate(parts[:-1]):
        if part in STACK_NAMES and not parts[i + 1].isdigit():
            numbers = numbers_of(parts[i + 1])
            rest = i + 1 if numbers is None else i + 2
            head, tail = ".".join(parts[: i + 1]), ".".join(parts[rest:])
            return [f"{head}.{layer}.{tail}" for layer in numbers or range(layers)]
    return []


def fold_path(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """The PRNG key of one leaf; other leaves of the tree do not change it."""
    # crc32 and not `hash`, which differs from process to process. The mask
    # keeps it an int32.
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names most like `name`, as a phrase for an error message."""
    # Sorted, so that names which are equally near come in a fixed order.
    known = sorted(set(known))
    tail = name.rsplit(".", 1)[-1]
    scored = sorted(
        known,
        key=lambda k: -max(_similarity(name, k), _similarity(tail, k.rsplit(".", 1)[-1])),
    )
    return ", ".join(f"`{k}`" for k in scored[:count]) or "none: there are no names"


def _similarity(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def where_trees_differ(x: PyTree, y: PyTree, is_leaf: Callable[[Any], bool]) -> str:
    """The first paths that only one of two trees has, as a phrase for an error message.

    Args:
      x, y: the trees.
      is_leaf: as in `jax.tree.flatten`; None counts as a leaf too.
    """

    def names(tree: PyTree) -> set[str]:
        # The halves of a tree have None in each other's places.
        flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None or is_leaf(x))
        return {spell(key_path) for key_path, _ in flat}

    odd = sorted(names(x) ^ names(y))
    return ", ".join(f"`{path}`" for path in odd[:3]) or "their containers"
