"""What the classes of leaves share: the pytree, a short repr, an error where an array is expected.

A leaf is a small tree of arrays with the shape of one. A model that is called without `lora.lorafy`
treats it as that array; every way to do so raises an error that names `lora.lorafy`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax

_Class = TypeVar("_Class", bound=type)


def leaf_class(*static: str) -> Callable[[_Class], _Class]:
    """Registers a frozen dataclass as a leaf; its `static` fields are compared, not traced."""

    def register(cls: _Class) -> _Class:
        for name, method in _METHODS.items():
            setattr(cls, name, method)
        names = [f.name for f in dataclasses.fields(cls)]
        return jax.tree_util.register_dataclass(
            cls, data_fields=[n for n in names if n not in static], meta_fields=list(static)
        )

    return register


def _not_an_array(leaf: Any, use: str) -> str:
    return (
        f"{use} needs an array, got a `{type(leaf).__name__}`: call the model through "
        "`lora.lorafy(model)(lora_params, ...)`, or give it plain arrays, `lora.merge(lora_params)`"
    )


def _refusal(use: str) -> Callable:
    def refuse(self: Any, *others: Any, **options: Any) -> NoReturn:
        raise TypeError(_not_an_array(self, use))

    return refuse


def _missing(self: Any, name: str) -> NoReturn:
    # An AttributeError, so that `hasattr` and `getattr` with a default work as for any object.
    raise AttributeError(_not_an_array(self, f"`{name}`"))


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
    "__getattr__": _missing,
    "__bool__": lambda self: True,  # not the length's
    "__len__": _refusal("`len`"),
    "__iter__": _refusal("iteration"),
    "__getitem__": _refusal("an index `[...]`"),
    "__neg__": _refusal("`-`"),
    "__abs__": _refusal("`abs`"),
    "__float__": _refusal("`float`"),
    # A property: some functions of JAX only look whether it is there, and then name neither.
    "__jax_array__": property(_refusal("a function of JAX")),
    # Without it NumPy makes an array of one Python object.
    "__array__": _refusal("a function of NumPy"),
    # An operator of a NumPy array leaves the work to the leaf.
    "__array_ufunc__": None,
    **{
        f"__{side}{name}__": _refusal(f"`{sign}`")
        for name, sign in _OPERATORS.items()
        for side in ("", "r")
    },
}
