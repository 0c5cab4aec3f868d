"""What the classes of leaves share: the pytree, a short repr, errors where an array is expected.

A leaf is a small tree of arrays with the shape of one array. A model that is called without
`lora.lorafy` uses it as an array; every such use raises an error that names `lora.lorafy`.
"""

import dataclasses
import json
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import jax.export
import numpy as np

_Class = TypeVar("_Class", bound=type)


def leaf_class(static: Sequence[str] = ()) -> Callable[[_Class], _Class]:
    """Registers a frozen dataclass as a leaf; its `static` fields are compared, not traced."""

    def register(cls: _Class) -> _Class:
        # Set here, because the house has no base classes.
        for name, method in _METHODS.items():
            setattr(cls, name, method)
        names = [f.name for f in dataclasses.fields(cls)]
        jax.tree_util.register_dataclass(
            cls, data_fields=[n for n in names if n not in static], meta_fields=list(static)
        )
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        # `jax.export` keeps trees of arguments in its files by these names.
        return jax.export.register_pytree_node_serialization(
            cls,
            serialized_name=f"lora_jax.{cls.__name__}",
            serialize_auxdata=_to_json,
            deserialize_auxdata=lambda text: _from_json(text, [kinds[n] for n in static]),
        )

    return register


def _to_json(static: tuple) -> bytes:
    """The static fields as JSON; a dtype by its name."""
    return json.dumps(static, default=lambda dtype: {"dtype": dtype.name}).encode()


def _from_json(text: bytes, kinds: Sequence) -> tuple:
    values = json.loads(text, object_hook=lambda x: np.dtype(x["dtype"]))
    return tuple(_typed(x, kind) for x, kind in zip(values, kinds, strict=True))


def _typed(value: Any, kind: Any) -> Any:
    """JSON's lists as tuples, or as the named tuple that a field's annotation names."""
    if not isinstance(value, list):
        return value
    items = [_typed(x, None) for x in value]
    named = next((t for t in typing.get_args(kind) if hasattr(t, "_fields")), None)
    return named(*items) if named else tuple(items)


def register_with_flax(*classes: type) -> None:
    """Lets `flax.serialization` read and write leaves of these classes, once it is imported.

    flax has a table of classes of its own. It is not imported for that: it takes longer than jax.
    """
    serialization = sys.modules.get("flax.serialization")
    if serialization is None:
        return
    for cls in classes:
        serialization.register_serialization_state(cls, _state_of, _with_state, override=True)


def _state_of(leaf: Any) -> dict[str, Any]:
    """The arrays of a leaf by field; fields that are None or static come from the target."""
    to_state = sys.modules["flax.serialization"].to_state_dict
    return {name: to_state(value) for name, value in _arrays(leaf).items()}


def _with_state(leaf: Any, state: Mapping[str, Any]) -> Any:
    from_state = sys.modules["flax.serialization"].from_state_dict
    arrays = _arrays(leaf)
    if state.keys() != arrays.keys():
        raise ValueError(
            f"the state of a `{type(leaf).__name__}` has the fields {sorted(state)}, expected "
            f"{sorted(arrays)}: restore into a tree of the same plan"
        )
    return dataclasses.replace(
        leaf, **{name: from_state(value, state[name], name=name) for name, value in arrays.items()}
    )


def _arrays(leaf: Any) -> dict[str, Any]:
    """The fields of a leaf that hold arrays, in their order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(leaf, is_leaf=lambda x: x is not leaf)
    names = [path[0].name for path, _ in flat]
    return {n: getattr(leaf, n) for n in names if getattr(leaf, n) is not None}


def _not_an_array(leaf: Any, use: str) -> str:
    return (
        f"{use} needs an array, got a `{type(leaf).__name__}`: call the model through "
        "`lora.lorafy(model)(lora_params, ...)`, or pass plain arrays, `lora.merge(lora_params)`"
    )


def _refusal(use: str) -> Callable:
    def refuse(self: Any, *others: Any, **options: Any) -> NoReturn:
        raise TypeError(_not_an_array(self, use))

    return refuse


def _missing(self: Any, name: str) -> NoReturn:
    # An AttributeError, so that `hasattr` and `getattr` with a default work as for any object.
    if name.startswith("_") or any(hasattr(kind, name) for kind in (np.ndarray, jax.Array)):
        raise AttributeError(_not_an_array(self, f"`{name}`"))
    fields = ", ".join(field.name for field in dataclasses.fields(self))
    raise AttributeError(f"a `{type(self).__name__}` has no `{name}`; its fields are {fields}")


def _repr(self: Any) -> str:
    """One line: `LoraArray(w=float32[16,64], a=float32[16,4], ...)`."""
    shown = []
    for field in dataclasses.fields(self):
        value = getattr(self, field.name)
        if value is not None:
            shown.append(f"{field.name}={_short(value)}")
    return f"{type(self).__name__}({', '.join(shown)})"


def _short(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if dataclasses.is_dataclass(value) or shape is None or dtype is None:
        return repr(value)
    return f"{dtype}[{','.join(map(str, shape))}]"


_OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "matmul": "@", "truediv": "/", "floordiv": "//",
    "mod": "%", "pow": "**",
}  # fmt: skip
_METHODS: dict[str, Any] = {
    "__repr__": _repr,
    # Functions of `jax.lax` look nothing up; the cause of their error holds the leaf's `str`.
    "__str__": lambda self: f"{self!r}, for `lora.lorafy(model)(lora_params, ...)`",
    "__getattr__": _missing,
    "__bool__": lambda self: True,  # else `if leaf` would call `__len__`, which raises
    "__len__": _refusal("`len`"),
    "__iter__": _refusal("iteration"),
    "__getitem__": _refusal("an index `[...]`"),
    "__neg__": _refusal("`-`"),
    "__abs__": _refusal("`abs`"),
    "__float__": _refusal("`float`"),
    # A property raises when it is looked up: some functions of JAX look it up without a call, and
    # their own error names neither the leaf nor `lora.lorafy`.
    "__jax_array__": property(_refusal("a function of JAX")),
    # Without it NumPy would make an array of one Python object.
    "__array__": _refusal("a function of NumPy"),
    # With None, `numpy_array @ leaf` calls the leaf's operator, which raises.
    "__array_ufunc__": None,
    **{
        f"__{side}{name}__": _refusal(f"`{sign}`")
        for name, sign in _OPERATORS.items()
        for side in ("", "r")
    },
}
