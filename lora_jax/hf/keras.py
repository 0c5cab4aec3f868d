"""Adapters of keras-hub's backbones: `save_lora_weights` and `load_lora_weights`, `*.lora.h5`.

    lora/vars/rank                      one rank for all layers
    lora/I/vars/lora_kernel_a           kernel.shape[:-1] + (r,)
    lora/I/vars/lora_kernel_b           (r, kernel.shape[-1])

    kernel + a · b                      over the last dimension of a and the first of b

I is the layer's place among the backbone's layers that have weights. Of a kernel (in, heads, size)
there is an A for each head and one B for all: roles `iso` here, with the same B in every index.

Source: `keras_hub/src/models/backbone.py` of keras-hub 0.32, `EinsumDense.enable_lora` of Keras.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import processes
from lora_jax.array import LoraArray, check_whole, delta, is_lora, leaves_by_path
from lora_jax.compat import require
from lora_jax.config.arguments import check_argument, check_count, check_function
from lora_jax.config.lora import LoraConfig
from lora_jax.dims import in_dims, stack_dims
from lora_jax.files import replacing
from lora_jax.multi.single import check_single
from lora_jax.paths import module_of, spell
from lora_jax.plan.decide import plan as make_plan
from lora_jax.tree import init

_SUFFIX = ".lora.h5"


class _Pair(NamedTuple):
    """A layer's factors: kernel.shape[:-1] + (r,), and (r, kernel.shape[-1])."""

    a: np.ndarray
    b: np.ndarray


def save_keras_lora(path: str | os.PathLike, lora_params: Any, *, layers: Mapping[int, str]) -> int:
    """Writes an adapter as keras-hub's `backbone.load_lora_weights` reads it, whole or not at all.

    Keras multiplies by no scale, which goes into B, and has one rank, to which others are filled up
    with zeros. A kernel (in, heads, size) has one B for all heads there: an adapter with one A for
    all heads takes up to `size` ranks, which are found by a singular value decomposition.

    Args:
      path: the file, which must end in ".lora.h5"; an existing one is replaced.
      lora_params: tree with the adapter.
      layers: the path of a kernel in the tree by its layer's place, as keras-hub numbers them.

    Returns:
      The rank in the file. Call `backbone.enable_lora(rank, names)` with the names of all adapted
      layers before `load_lora_weights`, which else enables query and value and passes over others.

    Raises:
      ValueError: a leaf that trains is no kernel of `layers`, or has what Keras has no place for.

    Example:
      every = [x for x in backbone._flatten_layers(include_self=False) if x.weights]
      layers = {i: x.kernel.path for i, x in enumerate(every) if hasattr(x, "kernel")}
      rank = lora.hf.save_keras_lora("mine.lora.h5", lora_params, layers=layers)
    """
    order = "hf.save_keras_lora(path, lora_params, layers=layers)"
    check_argument(order, "path", path, (str, os.PathLike))
    check_whole(lora_params)
    check_single(lora_params)
    if not str(path).endswith(_SUFFIX):
        raise ValueError(f"`path` must end in `{_SUFFIX}`, as keras-hub requires, got `{path}`")
    places = {_spelled(name): place for place, name in layers.items()}
    trained = {n: x for n, x in leaves_by_path(lora_params).items() if is_lora(x)}
    pairs = {_place(name, places): _pair(name, leaf) for name, leaf in trained.items()}
    if not pairs:
        raise ValueError("`lora_params` has no leaf with an adapter: make one with `lora.init`")
    rank = max(pair.b.shape[0] for pair in pairs.values())
    processes.by_first(lambda: _write(path, pairs, rank))
    return rank


def _spelled(name: str) -> str:
    """A variable's path, `block/query/kernel`, as a tree with such keys spells it."""
    return spell((jax.tree_util.DictKey(name),))


def _place(name: str, places: Mapping[str, int]) -> int:
    if name not in places:
        raise ValueError(
            f"leaf `{name}` trains and is no kernel of `layers`: keras-hub's files hold kernels "
            "of layers with `enable_lora` alone"
        )
    return places[name]


def _pair(name: str, leaf: Any) -> _Pair:
    """A leaf's change in Keras' two factors."""
    if not isinstance(leaf, LoraArray) or leaf.m is not None or leaf.bias is not None:
        raise ValueError(
            f"leaf `{name}`: keras-hub's files have no place for DoRA, biases or whole weights: "
            "merge the adapter (lora.merge) and assign the kernels"
        )
    last = leaf.shape[-1]
    if set(leaf.roles[:-1]) == {"i"} and leaf.roles[-1] == "o":
        return _Pair(np.asarray(leaf.a), np.asarray(leaf.b) * np.asarray(leaf.scale))
    change = np.asarray(delta(leaf), np.float32)
    u, s, v = np.linalg.svd(change.reshape(-1, last), full_matrices=False)
    # Singular values below float32's rounding of the largest are none.
    rank = max(1, int((s > s[0] * max(u.shape[0], last) * np.finfo(np.float32).eps).sum()))
    return _Pair((u[:, :rank] * s[:rank]).reshape(*leaf.shape[:-1], rank), v[:rank])


def _write(path: str | os.PathLike, pairs: Mapping[int, _Pair], rank: int) -> None:
    with replacing(path) as new, require("h5py").File(new, "w") as file:
        file["lora/vars/rank"] = rank
        for place, (a, b) in pairs.items():
            more = rank - b.shape[0]
            file[f"lora/{place}/vars/lora_kernel_a"] = np.pad(
                a, [(0, 0)] * (a.ndim - 1) + [(0, more)]
            )
            file[f"lora/{place}/vars/lora_kernel_b"] = np.pad(b, ((0, more), (0, 0)))


def load_keras_lora(
    path: str | os.PathLike,
    fn: Callable,
    params: Any,
    *args: Any,
    layers: Mapping[int, str],
    **kwargs: Any,
) -> tuple[Any, LoraConfig]:
    """Loads an adapter of keras-hub's `backbone.save_lora_weights` onto a model.

    Args:
      path: the file, `*.lora.h5`.
      fn: the model, a function of its parameters; `backbone.stateless_call` under JAX.
      params: the base parameters.
      *args: example arguments for `fn`, shapes are enough; see `lora_jax.plan`.
      layers: as for `save_keras_lora`.
      **kwargs: more example arguments for `fn`.

    Returns:
      `params` with LoRA leaves, and a config. A kernel (in, heads, size) gets a B for each head,
      all the same; they are trained apart from then on.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged or no `.lora.h5`, or it is of another model.
    """
    check_function("hf.load_keras_lora(path, fn, params, *args)", fn)
    rank, pairs = _read(path)
    if strange := [str(i) for i in pairs if i not in layers]:
        raise ValueError(
            f"{path}: has factors of the layers {', '.join(strange)}, which `layers` does not have"
        )
    factors = {_spelled(layers[i]): pair for i, pair in pairs.items()}
    plain = LoraConfig(rank=rank, alpha=rank, target_modules=[module_of(n) for n in factors])
    inferred = make_plan(plain, fn, params, *args, **kwargs).by_path()
    roles = {f"^{re.escape(n)}$": _roles(n, inferred[n].roles, path) for n in factors}
    config = replace(plain, roles=roles)
    # The key has no effect: every factor drawn with it is replaced.
    blank = init(jax.random.key(0), make_plan(config, fn, params, *args, **kwargs), params)

    def fill(key_path: tuple, leaf: Any) -> Any:
        return _filled(leaf, factors[spell(key_path)], path) if is_lora(leaf) else leaf

    return jax.tree_util.tree_map_with_path(fill, blank, is_leaf=is_lora), config


def _read(path: str | os.PathLike) -> tuple[int, dict[int, _Pair]]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with require("h5py").File(path, "r") as file:
            rank = int(file["lora/vars/rank"][()])
            pairs = {
                int(place): _Pair(*(np.asarray(group[f"vars/lora_kernel_{x}"]) for x in "ab"))
                for place, group in file["lora"].items()
                if place != "vars"
            }
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: no adapter of keras-hub, or damaged ({error})") from None
    if not pairs or any(not np.isfinite(x).all() for pair in pairs.values() for x in pair):
        raise ValueError(f"{path}: holds no factors, or numbers that are not finite")
    return check_count("rank", rank), pairs


def _roles(name: str, roles: str, path: str | os.PathLike) -> str:
    """The roles with which a kernel has Keras' factors: an A for each index of other outputs."""
    if not roles.endswith("o"):
        raise ValueError(
            f"{path}: `{name}` has roles `{roles}`; Keras' B is over the last dimension, which has "
            "to be an output"
        )
    return roles[:-1].replace("o", "s") + "o"


def _filled(leaf: LoraArray, pair: _Pair, path: str | os.PathLike) -> LoraArray:
    wanted = (*leaf.shape[:-1], leaf.rank), (leaf.rank, leaf.shape[-1])
    if (pair.a.shape, pair.b.shape) != wanted:
        raise ValueError(
            f"{path}: factors of the shapes {pair.a.shape} and {pair.b.shape} are for another "
            f"model: a kernel {tuple(leaf.shape)} takes {wanted[0]} and {wanted[1]}"
        )
    stacks, ins = stack_dims(leaf.roles), in_dims(leaf.roles)
    a = pair.a.transpose([*stacks, *ins, len(leaf.shape) - 1])
    b = np.broadcast_to(pair.b, [*(leaf.shape[d] for d in stacks), *pair.b.shape])
    return replace(leaf, a=jnp.asarray(a, leaf.a.dtype), b=jnp.asarray(b, leaf.b.dtype))
