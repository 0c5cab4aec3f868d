"""The plan of an adapter as JSON: what each of its leaves is, apart from its numbers.

Kept beside the numbers, so that a checkpoint can be read, checked and converted without the
model, and another plan on the same model is told from this one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import array
from lora_jax.checkpoint.flat import name_of

_SHOWN = 3


def outline(lora_params: Any) -> dict[str, dict]:
    """What every leaf that trains is: its class, the shape and dtype of its weight, its roles.

    Returns:
      By the leaf's name (`lora_jax.checkpoint.flat`), JSON values; `scale` as nested lists.
    """
    leaves = jax.tree_util.tree_leaves_with_path(lora_params, is_leaf=array.is_lora)
    return {name_of(path): _leaf(x) for path, x in leaves if array.is_lora(x)}


def _leaf(x: Any) -> dict:
    fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    static = {n: _json(v) for n, v in fields.items() if v is None or _is_static(v)}
    scale = {"scale": np.asarray(x.scale).tolist()} if "scale" in fields else {}
    weight = {"kind": type(x).__name__, "shape": list(x.shape), "dtype": str(x.dtype)}
    return {**weight, **static, **scale}


def _is_static(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | tuple)


def _json(value: Any) -> Any:
    return [_json(v) for v in value] if isinstance(value, tuple) else value


def check_outline(expected: Mapping[str, dict], lora_params: Any, *, where: str) -> None:
    """Refuses a tree whose plan is not the one of a checkpoint.

    Raises:
      ValueError: leaves are missing, left over, or of another kind, roles or scale.
    """
    got = outline(lora_params)
    phrases = [f"`{n}` has no adapter" for n in expected if n not in got]
    phrases += [f"`{n}` has one that is not there" for n in got if n not in expected]
    for name in expected.keys() & got.keys():
        for field in sorted(expected[name].keys() | got[name].keys()):
            was, now = expected[name].get(field), got[name].get(field)
            if was != now:
                phrases.append(f"`{name}`: {field} was {was} and is {now}")
    if phrases:
        more = f"; and {len(phrases) - _SHOWN} more" if len(phrases) > _SHOWN else ""
        raise ValueError(
            f"{where} was made with another plan: {'; '.join(phrases[:_SHOWN])}{more}; use the "
            "config and the version that it was made with"
        )


def leaf_from(described: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    """A leaf from its outline and its trained arrays; of its weight there is the shape only.

    Args:
      described: one value of `outline`.
      arrays: the trained arrays by field.

    Raises:
      ValueError: the outline is of a kind that is not known.
    """
    kinds = {c.__name__: c for c in (array.LoraArray, array.SavedArray, array.RowsArray)}
    if described.get("kind") not in kinds:
        raise ValueError(f"an adapter's leaf of the unknown kind {described.get('kind')!r}")
    weight = jax.ShapeDtypeStruct(tuple(described["shape"]), jnp.dtype(described["dtype"]))
    names = {f.name for f in dataclasses.fields(kinds[described["kind"]])}
    static = {n: _tuples(v) for n, v in described.items() if n in names and v is not None}
    if "scale" in static:
        static["scale"] = np.asarray(described["scale"], np.float32)
    if "window" in static:
        static["window"] = array.Window(*static["window"])
    return kinds[described["kind"]](**{**static, "w": weight, **arrays})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
