"""Rotary position embedding and its ways of reaching beyond the trained context.

A head of size `d` is `d/2` planes; plane `j` turns by `p · f_j` at position `p`, with
`f_j = theta^(-2j/d)` by default. Planes pair dimension `j` with `j + d/2` (Hugging Face's layout).
The variants change `f`, and YaRN also the length of the rotated vector.

Sources: RoPE arXiv:2104.09864; linear arXiv:2306.15595; dynamic NTK and YaRN arXiv:2309.00071;
llama3 as Llama 3.1's reference code does it. Numbers agree with transformers' to float32.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# What each variant must be told, and what it may be told.
VARIANTS = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies are changed to reach a longer context; Hugging Face's `rope_scaling`.

    Attributes:
      rope_type: a key of `VARIANTS`.
      factor: how many times longer the context is meant to be.
      original_max_position_embeddings: the trained context, in tokens (llama3, yarn).
      low_freq_factor, high_freq_factor: edges of llama3's blend, in turns per trained context.
      beta_fast, beta_slow: edges of YaRN's blend, in turns per trained context.
      attention_factor, mscale, mscale_all_dim: YaRN's length of the rotated vectors.
      truncate: whether YaRN rounds the edges of its blend to whole planes.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None


class Rotation(NamedTuple):
    """Cosine and sine of each token's angles, times the variant's length factor."""

    cos: Float[Array, "b t 1 half"]  # noqa: F722
    sin: Float[Array, "b t 1 half"]  # noqa: F722


def scaling_from_hf(raw: Mapping[str, Any] | None, *, context: int) -> RopeScaling | None:
    """Reads Hugging Face's `rope_scaling` (or `rope_parameters` without its `rope_theta`).

    Args:
      raw: the JSON object, or None.
      context: `max_position_embeddings`: llama3 and yarn take it where their own
        `original_max_position_embeddings` is left out, as transformers does.

    Returns:
      The scaling, or None for plain RoPE.

    Raises:
      ValueError: an unknown variant, a key missing or left over, or a factor below 1.
    """
    given = {k: v for k, v in (raw or {}).items() if v is not None and k != "type"}
    kind = given.pop("rope_type", (raw or {}).get("type") or "default")
    if kind == "default" and not given:
        return None
    if kind not in VARIANTS:
        known = ", ".join(("default", *VARIANTS))
        raise ValueError(f"`rope_scaling`: rope_type `{kind}` is not one of {known}")
    needed, optional = VARIANTS[kind]
    if kind in ("llama3", "yarn"):
        given.setdefault("original_max_position_embeddings", context)
    _check_keys(kind, given, needed, optional)
    return RopeScaling(rope_type=kind, **given)


def _check_keys(kind: str, given: Mapping[str, Any], needed, optional) -> None:
    missing = [k for k in needed if k not in given]
    extra = [k for k in given if k not in (*needed, *optional)]
    if missing or extra:
        raise ValueError(
            f"`rope_scaling` of type `{kind}`: missing {missing or 'nothing'}, "
            f"not understood {extra or 'nothing'}"
        )
    for name, value in given.items():
        if isinstance(value, bool) != (name == "truncate") or not isinstance(value, int | float):
            raise ValueError(f"`rope_scaling`: `{name}` must be a number, got {value!r}")
    if given["factor"] < 1:
        raise ValueError(f"`rope_scaling`: `factor` must be at least 1, got {given['factor']}")
    if kind == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
        raise ValueError("`rope_scaling`: `low_freq_factor` must be below `high_freq_factor`")


def scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`, without what is not set."""
    if scaling is None:
        return None
    return {k: v for k, v in asdict(scaling).items() if v is not None}


def rotation(
    positions: Int[Array, "b t"],  # noqa: F722
    *,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
    context: int,
) -> Rotation:
    """Cosines and sines for tokens at the given positions, in float32.

    Args:
      positions: each token's place in its text, from 0.
      head_dim: size of a head, `d`.
      theta: base wavelength.
      scaling: how the frequencies are changed, or None.
      context: `max_position_embeddings`; the dynamic variant starts to change beyond it.
    """
    if scaling is not None and scaling.rope_type == "dynamic":
        frequencies = _dynamic(positions.max() + 1, head_dim, theta, scaling, context)
    else:
        frequencies = jnp.asarray(static_frequencies(head_dim, theta, scaling))
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    length = 1.0 if scaling is None else _length(scaling)
    return Rotation(jnp.cos(angles) * length, jnp.sin(angles) * length)


def rotate(x: Float[Array, "b t n d"], by: Rotation) -> Float[Array, "b t n d"]:  # noqa: F722
    """Turns each head's planes: `(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * by.cos - second * by.sin, second * by.cos + first * by.sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def static_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """The `d/2` frequencies of every variant whose frequencies do not depend on the text."""
    plain = _plain(head_dim, theta)
    if scaling is None:
        return plain
    return _STATIC[scaling.rope_type](plain, head_dim, theta, scaling)


def _plain(head_dim: int, theta: float) -> np.ndarray:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def _dynamic(length, head_dim: int, theta: float, scaling: RopeScaling, context: int):
    """NTK scaling that grows with the text: theta is raised once `length` exceeds the context."""
    ratio = jnp.maximum(length, context).astype(jnp.float32) / context
    grown = theta * (scaling.factor * ratio - (scaling.factor - 1)) ** (head_dim / (head_dim - 2))
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return 1.0 / grown**exponents


def _linear(plain: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Every plane is slowed alike: positions are pressed together."""
    del head_dim, theta
    return plain / np.float32(scaling.factor)


def _llama3(plain: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Slow planes are slowed by `factor`, fast ones kept, those between blended."""
    del head_dim, theta
    low, high = _set(scaling.low_freq_factor), _set(scaling.high_freq_factor)
    turns = _set(scaling.original_max_position_embeddings) * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - keep) * plain / scaling.factor + keep * plain).astype(np.float32)


def _yarn(plain: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """As llama3, with the blend linear in the plane's number instead of its frequency."""

    def plane(turns: float) -> float:
        trained = _set(scaling.original_max_position_embeddings)
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = plane(scaling.beta_fast or 32), plane(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    slow = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    return (plain / scaling.factor * slow + plain * (1 - slow)).astype(np.float32)


_STATIC = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}


def _set(value: float | None) -> float:
    """A value that the variant needs; `scaling_from_hf` has checked that it is there."""
    if value is None:
        raise ValueError("`rope_scaling` lacks a value that its type needs")
    return value


def _length(scaling: RopeScaling) -> float:
    """YaRN's factor on the rotated vectors (its temperature); 1 for every other variant."""
    if scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)

    def grow(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return grow(scaling.mscale) / grow(scaling.mscale_all_dim)
    return grow(1.0)
