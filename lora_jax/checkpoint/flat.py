"""Trees as flat dicts of named arrays, the form in which they are written to disk.

A flat dict can be read without the classes of this package, and an error can name the array that
is missing, unexpected or of the wrong shape. `None` leaves, which stand for the base in a trainable
tree, do not appear.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import array, processes
from lora_jax.paths import component, repeated

# Phrases of an error message, before it says how many more there are.
_SHOWN = 5


def name_of(key_path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as dotted text; unlike `paths.spell` it drops no component.

    A `/` inside a key becomes a dot: Orbax would read it as a folder.
    """
    return ".".join(component(key).replace("/", ".") for key in key_path)


def flatten(tree: Any, *, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by name; `is_leaf` as in `jax.tree.leaves`.

    Raises:
      ValueError: two leaves have the same name.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    names = [name_of(path) for path, _ in leaves]
    # One of the two would be lost.
    if (twice := repeated(names)) is not None:
        raise ValueError(f"two leaves of the tree have the same name `{twice}`; rename one")
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def unflatten(like: Any, named: Mapping[str, Any]) -> Any:
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
    """A phrase for each difference between two sets of arrays.

    Args:
      expected: objects with `shape` and `dtype`, by name.
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


def describe(x: Any) -> str:
    """Dtype and shape in jaxtyping's notation: `float32[576,8]`."""
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def parse(described: str) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape from a text of `describe` or of a fingerprint."""
    # A fingerprint has a hash behind a space, and the quantization before a colon.
    kind = described.partition(" ")[0].rpartition(":")[2]
    dtype, _, sizes = kind.rstrip("]").partition("[")
    return dtype, tuple(int(n) for n in sizes.split(",") if n)


def quantization(described: str) -> tuple[str, int] | None:
    """Format and block size from a text of a fingerprint, `nf4-64:float32[8,4]`; None of floats."""
    kind, colon, _ = described.partition(" ")[0].partition(":")
    name, block, *_ = [*kind.split("-"), ""]
    return (name, int(block)) if colon else None


def summary(phrases: list[str]) -> str:
    """The first few phrases in one line, and the number of the others."""
    more = f"; and {len(phrases) - _SHOWN} more" if len(phrases) > _SHOWN else ""
    return "; ".join(phrases[:_SHOWN]) + more


def outline(lora_params: Any) -> dict[str, dict]:
    """The plan of an adapter as JSON values: class, shape, dtype, roles and rank of each leaf.

    It is stored beside the arrays, so that a checkpoint can be read, checked and converted without
    the model, and a different plan on the same model is detected.

    Returns:
      By the leaf's name (`lora_jax.checkpoint.flat`), JSON values; `scale` as nested lists.
    """
    leaves = jax.tree_util.tree_leaves_with_path(lora_params, is_leaf=array.is_lora)
    return {name_of(path): _leaf(x) for path, x in leaves if array.is_lora(x)}


def _leaf(x: Any) -> dict:
    fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    static = {n: _json(v) for n, v in fields.items() if v is None or _is_static(v)}
    # One scale per layer of a stacked leaf: an array, which JSON holds as nested lists.
    scale = {"scale": np.asarray(processes.whole(x.scale)).tolist()} if "scale" in fields else {}
    rank = {"rank": x.rank} if isinstance(x, array.LoraArray) else {}
    # The weight's own shape and dtype: the leaf can then be built without the base.
    weight = {"kind": type(x).__name__, "shape": list(x.shape), "dtype": str(x.dtype)}
    return {**weight, **static, **scale, **rank}


def _is_static(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | tuple)


def _json(value: Any) -> Any:
    return [_json(v) for v in value] if isinstance(value, tuple) else value


def check_outline(expected: Mapping[str, dict], lora_params: Any, *, where: str) -> None:
    """Checks that a tree has the plan of a checkpoint.

    Raises:
      ValueError: leaves are missing or unexpected, or differ in kind, roles or scale.
    """
    got = outline(lora_params)
    phrases = [f"`{n}` has no adapter" for n in expected if n not in got]
    phrases += [f"`{n}` has an adapter that the checkpoint lacks" for n in got if n not in expected]
    for name in expected.keys() & got.keys():
        # Another rank is an array of another shape; the error of reading it has both shapes.
        for field in sorted((expected[name].keys() | got[name].keys()) - {"rank"}):
            was, now = expected[name].get(field), got[name].get(field)
            if was != now:
                phrases.append(f"`{name}`: {field} was {was} and is {now}")
    if phrases:
        raise ValueError(
            f"{where} was made with another plan: {summary(phrases)}; use the config and the "
            "version that it was made with"
        )


def leaf_from(described: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    """A leaf from its outline and its trained arrays; its weight is only a shape.

    Args:
      described: one value of `outline`.
      arrays: the trained arrays by field.

    Raises:
      ValueError: an unknown kind of leaf.
    """
    kinds = {c.__name__: c for c in (array.LoraArray, array.SavedArray, array.RowsArray)}
    if described.get("kind") not in kinds:
        raise ValueError(f"unknown kind {described.get('kind')!r} of an adapter's leaf")
    weight = jax.ShapeDtypeStruct(tuple(described["shape"]), jnp.dtype(described["dtype"]))
    names = {f.name for f in dataclasses.fields(kinds[described["kind"]])}
    # JSON has no tuples: lists are read back as tuples, so that the leaf stays hashable.
    static = {n: tuples(v) for n, v in described.items() if n in names and v is not None}
    if "scale" in static:
        static["scale"] = np.asarray(described["scale"], np.float32)
    if "window" in static:
        static["window"] = array.Window(*static["window"])
    return kinds[described["kind"]](**{**static, "w": weight, **arrays})


def tuples(value: Any) -> Any:
    """JSON's lists as tuples, inside others too."""
    return tuple(tuples(v) for v in value) if isinstance(value, list) else value
