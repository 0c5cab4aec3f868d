"""Adapters of weights that a GGUF file has in two tensors: one pair there, two here.

Both halves of `in_proj_qkvz` have the same inputs, and so the same A; its rows of B are split as
those of the weight. Of `kv_b_proj` llama.cpp applies no adapter.
"""

from collections.abc import Mapping

import numpy as np

from lora_jax.hf.gguf.architectures import GGUF_ARCHITECTURES
from lora_jax.hf.gguf.experts import FactorPair, side_by_side
from lora_jax.hf.gguf.fields import DeltaHeads
from lora_jax.hf.gguf.layout import join_qkvz, split_qkvz
from lora_jax.hf.gguf.names import Base


def halved(pairs: Mapping[str, FactorPair], base: Base) -> dict[str, FactorPair]:
    """The pairs of each tensor.

    Raises:
      ValueError: the rows of a B are not those of the base's heads.
    """
    out = {}
    for module, pair in pairs.items():
        start, names = _parts_of(module, base)
        if names is None:
            out[module] = pair
            continue
        try:
            parts = split_qkvz(pair.b, _delta(base))
        except ValueError as error:
            raise ValueError(f"`{module}`: lora_B has {error}") from None
        for name, part in zip(names, parts, strict=True):
            out[f"{start}{name}"] = pair._replace(b=part)
    return out


def whole(pairs: Mapping[str, FactorPair], base: Base) -> dict[str, FactorPair]:
    """The inverse of `halved`: of both ranks where the halves do not share an A."""
    out = dict(pairs)
    for module, names in GGUF_ARCHITECTURES[base.architecture].joined.items():
        ends = tuple(f".{name}" for name in names)
        for start in {name[: -len(end)] for name in pairs for end in ends if name.endswith(end)}:
            found = [out.pop(f"{start}{end}", None) for end in ends]
            qkv, gate = _both(*found, _delta(base))
            stacked = (p._replace(a=p.a[None], b=p.b[None]) for p in (qkv, gate))
            one = side_by_side(*stacked)
            rows = len(qkv.b)
            b = join_qkvz(one.b[0][:rows], one.b[0][rows:], _delta(base))
            out[f"{start}.{module}"] = one._replace(a=one.a[0], b=b)
    return out


def _parts_of(module: str, base: Base) -> tuple[str, tuple[str, str] | None]:
    """The start of a module's name, and the names of its halves, or None."""
    for name, halves in GGUF_ARCHITECTURES[base.architecture].joined.items():
        if module.endswith(f".{name}"):
            return module.removesuffix(name), halves
    return "", None


def _both(
    qkv: FactorPair | None, gate: FactorPair | None, delta: DeltaHeads
) -> tuple[FactorPair, FactorPair]:
    """Both pairs; that of a half without an adapter is 0."""
    given = qkv or gate
    assert given is not None
    values = delta.values * delta.value_dim
    rows = 2 * delta.keys * delta.key_dim + values, values
    nothing = (given._replace(b=np.zeros((n, given.b.shape[1]), given.b.dtype)) for n in rows)
    first, second = nothing
    return qkv or first, gate or second


def _delta(base: Base) -> DeltaHeads:
    if base.delta is None:
        raise ValueError("heads of a delta net, of which the model's configuration states none")
    return base.delta
