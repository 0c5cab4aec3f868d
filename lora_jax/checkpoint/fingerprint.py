"""A fingerprint of a base model: enough to tell whether an adapter belongs to it.

It has for each leaf the name, shape, dtype, and a hash of 64 evenly spaced elements. Reading 64
elements per leaf is cheap on any device, and no two trained models share them; a change of a few
single elements may go unnoticed.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Shaped

from lora_jax import compat, processes
from lora_jax.array import is_lora
from lora_jax.checkpoint.flat import describe, flatten, quantization, summary
from lora_jax.config.arguments import check_tree
from lora_jax.dims import AnyArray
from lora_jax.hf.peft.base import described, flags_of
from lora_jax.quant.array import arrays, default_roles, is_quant

_SAMPLES = 64


class OtherFormError(ValueError):
    """A base that is quantized otherwise than the one of a checkpoint."""


def fingerprint(params: Any) -> dict[str, str]:
    """The fingerprint of a params tree, or of the base under a LoRA tree.

    Args:
      params: nested arrays; of a `LoraArray` or `SavedArray` only the base `w` counts, so an
        adapted tree has its base's fingerprint.

    Returns:
      By leaf name, `float32[30,576,576] 9f86d081884c7d65`; a quantized leaf is one leaf, with
      its format and block size. Values for JSON.

    Raises:
      TypeError: no tree of arrays.
    """
    check_tree("params", params)
    leaves = flatten(base_of(params), is_leaf=is_quant)
    # An Equinox module has activation functions and numbers of Python among its leaves.
    leaves = {name: x for name, x in leaves.items() if is_quant(x) or compat.is_array(x)}
    # All leaves in one transfer: on an accelerator each would wait for the device.
    samples = jax.device_get({name: _samples(leaf) for name, leaf in sorted(leaves.items())})
    _complete(leaves, samples)
    return {n: f"{_kind(x)} {_hash(samples[n])}" for n, x in sorted(leaves.items())}


def _complete(leaves: Mapping[str, Any], samples: dict[str, list]) -> None:
    """Adds the elements that other processes hold, in one exchange for all leaves."""
    shared = [
        sample
        for name in samples
        for x, sample in zip(_arrays(leaves[name]), samples[name], strict=True)
        if isinstance(x, jax.Array) and not x.is_fully_addressable and x.size and x.ndim
    ]
    if not shared:
        return
    # Bytes, which need no arithmetic in the dtype: all but one process have zeros in a place.
    own = [x.reshape(-1).view(np.uint8) for x in shared]
    added = processes.summed(np.concatenate(own))
    for x, data in zip(own, np.split(added, np.cumsum([len(x) for x in own])[:-1]), strict=True):
        x[:] = data


def _kind(leaf: Any) -> str:
    """Dtype and shape, and how it is quantized: `nf4-64:float32[30,576,576]`."""
    if not is_quant(leaf):
        return describe(leaf)
    usual = leaf.roles == default_roles(leaf.ndim)
    roles = "" if usual else f"-{leaf.roles}"
    return f"{leaf.format}-{leaf.block}{roles}:{describe(leaf)}"


def kinds(params: Any) -> dict[str, str]:
    """Dtype, shape and quantization of every leaf by name; abstract leaves are accepted."""
    return {name: _kind(leaf) for name, leaf in flatten(params, is_leaf=is_quant).items()}


def _samples(leaf: Any) -> list:
    """Elements of the leaf, or of each array of a quantized one."""
    return [_sample(x) for x in _arrays(leaf)]


def _arrays(leaf: Any) -> list:
    return list(arrays(leaf)) if is_quant(leaf) else [leaf]


def base_of(tree: Any) -> Any:
    """The tree with `w` in place of each `LoraArray` and `SavedArray`."""
    return jax.tree.map(lambda x: x.w if is_lora(x) else x, tree, is_leaf=is_lora)


def _sample(leaf: Any) -> Any:
    if leaf.size == 0 or leaf.ndim == 0:
        return leaf
    # `linspace` on the host, in float64: in float32 the positions in a large leaf would be inexact.
    places = np.linspace(0, leaf.size - 1, min(_SAMPLES, leaf.size)).astype(np.int64)
    where = np.unravel_index(places, leaf.shape)
    return _from_shards(leaf, where) if isinstance(leaf, jax.Array) else leaf[where]


def _from_shards(leaf: jax.Array, where: tuple[np.ndarray, ...]) -> np.ndarray:
    """The elements at `where`, each read on the device that holds it; no other data moves.

    Those that other processes hold are zero.
    """
    out = np.zeros(len(where[0]), leaf.dtype)
    for shard in leaf.addressable_shards:
        # Positions within the shard; those outside it belong to another one.
        starts = [s.indices(size)[0] for s, size in zip(shard.index, leaf.shape, strict=True)]
        local = [i - start for i, start in zip(where, starts, strict=True)]
        ends = zip(local, shard.data.shape, strict=True)
        inside = np.all([(i >= 0) & (i < end) for i, end in ends], axis=0)
        # Replicas hold the same elements: one of them is enough.
        if shard.replica_id == 0 and inside.any():
            with _alone(shard.device):
                out[inside] = _picked(shard.data, tuple(i[inside] for i in local))
    return out


@jax.jit
def _picked(x: AnyArray, places: tuple[Int[AnyArray, " n"], ...]) -> Shaped[Array, " n"]:
    return x[places]


def _alone(device: jax.Device) -> contextlib.AbstractContextManager:
    """Lets an operation run on one device under a `jax.set_mesh` of several."""
    if jax.sharding.get_mesh().empty:
        return contextlib.nullcontext()
    return jax.set_mesh(Mesh(np.asarray([device]), ("device",)))


def _hash(samples: list) -> str:
    joined = b"".join(np.ascontiguousarray(x).tobytes() for x in samples)
    return hashlib.sha256(joined).hexdigest()[:16]


def check_base(expected: Mapping[str, str], params: Any, *, where: str) -> None:
    """Checks that a base is the one of a checkpoint.

    Args:
      expected: the fingerprint in the checkpoint.
      params: the params tree to check.
      where: the checkpoint, for error messages.

    Raises:
      ValueError: leaves are missing or unexpected, or differ in shape, dtype or content.
    """
    got = fingerprint(params)
    if got != expected:
        _check_quantized(expected, got, where)
    # All differences are collected: their number shows whether it is another model or a few leaves.
    phrases = [f"`{n}` is missing" for n in expected if n not in got]
    phrases += [f"`{n}` is new" for n in got if n not in expected]
    for name in expected:
        if name in got and got[name] != expected[name]:
            was, now = expected[name].split(" ")[0], got[name].split(" ")[0]
            change = f"is {now}, was {was}" if was != now else f"({now}) holds other numbers"
            phrases.append(f"`{name}` {change}")
    if phrases:
        raise ValueError(
            f"{where} was made over another base model: {summary(phrases)}; load the base it was"
            " trained on, in the same dtype"
        )


def _check_quantized(expected: Mapping[str, str], got: Mapping[str, str], where: str) -> None:
    """Says that two bases are quantized in other ways, whose leaves may have other names too."""
    was, now = (described(filter(None, map(quantization, x.values()))) for x in (expected, got))
    if was != now:
        then, here = (f"quantized with {x}" if x else "in floats" for x in (was, now))
        how = flags_of(was) if was else "leave `quantize` out"
        raise OtherFormError(
            f"{where} was made over another base model: one {then}, and this one is {here}; load "
            f"the base it was trained on in the same form: {how}"
        )
