"""Checks of arguments: their order, their types, the fields and the numbers of configurations."""

import functools
import inspect
import operator
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lora_jax.config.elsewhere import ELSEWHERE
from lora_jax.config.peft import CARRIED, MAPPED, REFUSED
from lora_jax.paths import nearest

_Class = TypeVar("_Class", bound=type)


class SettingsError(ValueError):
    """A setting that a recipe needs is missing, or two settings contradict each other."""


def check_argument(call: str, name: str, value: Any, kinds: type | tuple[type, ...]) -> None:
    """Checks the type of an argument that is easily confused with another.

    Args:
      call: the function with its arguments in order, for the message: `init(key, plan, params)`.
      name: of the argument.
      value: of the argument.
      kinds: the class it must have, or several.

    Raises:
      TypeError: it has none of the classes.
    """
    if not isinstance(value, kinds):
        classes = kinds if isinstance(kinds, tuple) else (kinds,)
        raise TypeError(
            f"`{name}` must be {' or '.join(f'`{kind.__name__}`' for kind in classes)}, got "
            f"{kind_of(value)}: call `lora.{call}` with the arguments in this order"
        )


def check_tree(name: str, value: Any, *, state: bool = False) -> None:
    """Checks that an argument is a tree, and not what holds or makes one.

    Args:
      name: of the argument.
      value: of the argument.
      state: whether it may be an optimizer's state.

    Raises:
      TypeError: it is a function, a model, a module with adapters inside, an optimizer's state, or
        holds no number.
    """
    if not state and (found := _state_in(value)):
        raise TypeError(
            f"`{name}` must be a tree of parameters, got the state of an optimizer (`{found}`): "
            "pass the parameters it updates"
        )
    # An `nnx.Adapted` is a tree too, of Flax's variables, in which no leaf of ours would be found.
    if callable(getattr(type(value), "lora_params", None)):
        raise TypeError(
            f"`{name}` must be a tree of parameters, got `{type(value).__name__}`: pass what its "
            "method `lora_params()` returns"
        )
    # A state of the user's own that is a tree with a field of this name is fine.
    if isinstance(getattr(value, "params", None), Mapping) and jax.tree_util.all_leaves([value]):
        kind = type(value).__name__
        raise TypeError(f"`{name}` must be a tree of parameters, got `{kind}`: pass its `params`")
    if inspect.isroutine(value):
        raise TypeError(f"`{name}` must be a tree of parameters, got {kind_of(value)}: call it")
    leaves, structure = jax.tree.flatten(value)
    check_arrays(f"`{name}`", leaves)
    # Half a tree may be None at every leaf, and an empty dict or tuple is a tree too.
    empty = structure.num_nodes == 1 and not isinstance(value, Mapping | list | tuple)
    if not any(map(_is_number, leaves)) if leaves else empty:
        raise TypeError(
            f"`{name}` must be a tree of parameters, got {kind_of(value)}, which holds no array"
        )


def check_arrays(what: str, leaves: Iterable) -> None:
    """Checks that no array is one of torch or TensorFlow, which JAX does not take.

    Raises:
      TypeError: one is.
    """
    for x in leaves:
        package = type(x).__module__.partition(".")[0]
        if package in ("torch", "tensorflow"):
            raise TypeError(
                f"{what} must hold arrays of JAX or numpy, got a `{type(x).__name__}` of "
                f"{package}: convert it, `jax.numpy.asarray(x.numpy())`"
            )


def _state_in(value: Any) -> str | None:
    """The class of the first state of optax's in a tree."""

    def is_state(x: Any) -> bool:
        return isinstance(x, tuple) and type(x).__module__.startswith("optax.")

    found = (x for x in jax.tree.leaves(value, is_leaf=is_state) if is_state(x))
    return next((type(x).__name__ for x in found), None)


def _is_number(x: Any) -> bool:
    """Whether a leaf may be a parameter, a gradient or a mark: no text, class or PRNG key."""
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        return isinstance(x, bool | int | float | complex)
    return not jnp.issubdtype(dtype, jax.dtypes.prng_key)


def check_function(call: str, fn: Any) -> None:
    """Checks that a model is a function of its parameters, and no module of Flax.

    Raises:
      TypeError: it cannot be called, or takes no parameters.
    """
    # Flax need not be imported: whoever has a module of it has done so.
    for flax, way_out in (
        ("flax.linen", "pass `module.apply`, or the function of `lora.linen.functional`"),
        ("flax.nnx", "use `lora.nnx.adapt`, or pass the function of `lora.nnx.functional`"),
    ):
        known = sys.modules.get(flax)
        if known is not None and isinstance(fn, known.Module):
            raise TypeError(
                f"`fn` must be a function of the parameters, got the module "
                f"`{type(fn).__name__}`: {way_out}"
            )
    if not callable(fn):
        raise TypeError(
            f"`fn` must be a function of the parameters, got {kind_of(fn)}: call `lora.{call}` "
            "with the arguments in this order"
        )


def check_alone(call: str, misplaced: Sequence) -> None:
    """Checks that a function which makes another one was not given that one's arguments too.

    Args:
      call: the right one, for the message: `lorafy(fn)(lora_params, ...)`.
      misplaced: further positional arguments.

    Raises:
      TypeError: there is one.
    """
    if misplaced:
        name = call.partition("(")[0]
        raise TypeError(
            f"`lora.{name}` takes the function alone, got {kind_of(misplaced[0])} behind it: call "
            f"`lora.{call}`, with the parameters in a second call"
        )


def check_key(name: str, key: Any, *, rows: bool = False) -> None:
    """Checks that a value is a PRNG key, or the uint32 data of one.

    Args:
      name: of the argument.
      key: its value.
      rows: whether it may be an array of keys, one for each row.

    Raises:
      TypeError: it is something else, such as a seed, or an array of keys.
    """
    # Flax's streams of keys (`nnx.Rngs`) have a `dtype` that is none.
    array = isinstance(key, jax.Array | np.ndarray)
    typed = array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and not (array and key.dtype == jnp.uint32 and key.ndim):
        raise TypeError(
            f"`{name}` must be a PRNG key, got {kind_of(key)}: `jax.random.key(0)` makes one"
        )
    if not rows and key.ndim > (0 if typed else 1):
        keys = key.shape if typed else key.shape[:-1]
        raise TypeError(
            f"`{name}` must be one PRNG key, got keys of shape {keys}: take one of them"
        )


def integer(value: Any) -> int:
    """A number as Python's integer, where no digit is lost.

    Raises:
      TypeError: it is a fraction, true or false, or no number.
    """
    if isinstance(value, bool):
        raise TypeError(f"got {value}")
    return operator.index(value)


def check_count(name: str, value: Any, *, least: int = 1) -> int:
    """A number of things as Python's integer.

    Raises:
      ValueError: it is no integer, or below `least`.
    """
    try:
        count = integer(value)
    except TypeError:
        count = least - 1
    if count < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}")
    return count


def check_path(name: str, value: Any) -> Path:
    """A path of a file or folder.

    Raises:
      TypeError: it is none, or an empty text, which would be the folder of the process.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise TypeError(f"`{name}` must be a path, got {kind_of(value)}")
    return Path(value)


def kind_of(value: Any) -> str:
    """A value in an error text: its class, and itself where it is short."""
    if callable(value) and hasattr(value, "__name__"):
        return f"the {'class' if isinstance(value, type) else 'function'} `{value.__name__}`"
    shown = f" {value!r}" if isinstance(value, bool | int | float | str) else ""
    return f"`{type(value).__name__}`{shown}"


def quoted(names: Iterable[str]) -> str:
    """Names in an error text, in quotation marks."""
    return ", ".join(f'"{name}"' for name in names)


def plain(value: Any) -> Any:
    """Numbers of numpy and JAX as Python's, also in lists, tuples and dicts."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return value if isinstance(value, jax.core.Tracer) else value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def set_plain_fields(config: Any) -> None:
    """Makes every field of a frozen configuration `plain`: JSON, hashes and checks need that."""
    for name in config.__dataclass_fields__:
        # A frozen dataclass has no other way to set a field.
        object.__setattr__(config, name, plain(getattr(config, name)))


def with_known_fields(cls: _Class) -> _Class:
    """Makes a configuration refuse an unknown field by name, with the field that is meant.

    Many come from PEFT's `LoraConfig(r=8, lora_alpha=16)`; Python's own error names no remedy.
    """
    made = cls.__init__

    @functools.wraps(made)
    def start(self: Any, *args: Any, **fields: Any) -> None:
        if args:
            some = ", ".join([*cls.__dataclass_fields__][:2])
            raise TypeError(f"give the fields of {cls.__name__} by name: {some}, ...")
        for name in fields:
            if name not in cls.__dataclass_fields__:
                raise TypeError(f"{cls.__name__} has no field `{name}`: {_instead(name, cls)}")
        made(self, **fields)

    cls.__init__ = start
    return cls


def _instead(name: str, cls: Any) -> str:
    if name in MAPPED and MAPPED[name][0] in cls.__dataclass_fields__:
        return f"PEFT's `{name}` is `{MAPPED[name][0]}` here"
    setting, equals, value = ELSEWHERE.get(name, "").partition("=")
    if setting in cls.__dataclass_fields__:
        return f"it is `{setting}{equals}{repr(value) * bool(value)}` here"
    if name == "task_type":
        return 'it belongs to a file, `lora.hf.save_peft(..., task_type="CAUSAL_LM")`'
    if name in CARRIED:
        return f"PEFT's `{name}` changes no numbers; leave it out, or keep it in `extra`"
    if name in REFUSED:
        return f"PEFT's `{name}` is not supported"
    return f"the nearest are {nearest(name, cls.__dataclass_fields__)}"
