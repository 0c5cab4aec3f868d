"""Rotary position embedding and its ways of reaching beyond the trained context.

The first `d` dimensions of a head (by default all) are `d/2` planes; plane `j` turns by `p · f_j`
at position `p`, with `f_j = theta^(-2j/d)` by default. Planes pair dimension `j` with `j + d/2`
(Hugging Face's layout). The variants change `f`, YaRN and LongRoPE also the length of the rotated
vector.

Sources: RoPE arXiv:2104.09864; linear arXiv:2306.15595; dynamic NTK and YaRN arXiv:2309.00071;
LongRoPE arXiv:2402.13753; llama3 as Llama 3.1's reference code does it. Numbers agree with
transformers' to float32.
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
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("attention_factor", "factor"),
    ),
}
# Values that are one number a plane.
_LISTS = ("short_factor", "long_factor")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies are changed to reach a longer context; Hugging Face's `rope_scaling`.

    Attributes:
      rope_type: a key of `VARIANTS`.
      factor: how many times longer the context is meant to be; for longrope None is the ratio of
        the contexts.
      original_max_position_embeddings: the trained context, in tokens (llama3, yarn, longrope).
      low_freq_factor, high_freq_factor: edges of llama3's blend, in turns per trained context.
      beta_fast, beta_slow: edges of YaRN's blend, in turns per trained context.
      attention_factor, mscale, mscale_all_dim: length of the rotated vectors (yarn, longrope).
      truncate: whether YaRN rounds the edges of its blend to whole planes.
      short_factor, long_factor: LongRoPE's divisor of each plane's frequency, in texts up to the
        trained context and beyond.
    """

    rope_type: str
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None


class Rotation(NamedTuple):
    """Cosine and sine of each token's angles, times the variant's length factor.

    Where there are fewer planes than a head has pairs, the head's last dimensions stay.
    """

    cos: Float[Array, "b t 1 planes"]  # noqa: F722
    sin: Float[Array, "b t 1 planes"]  # noqa: F722


def scaling_from_hf(raw: Mapping[str, Any] | None, *, context: int) -> RopeScaling | None:
    """Reads Hugging Face's `rope_scaling` (or `rope_parameters` without its `rope_theta`).

    Args:
      raw: the JSON object, or None.
      context: `max_position_embeddings`: llama3, yarn and longrope take it where their own
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
    if "original_max_position_embeddings" in needed:
        given.setdefault("original_max_position_embeddings", context)
    _check_keys(kind, given, needed, optional)
    given.update({name: tuple(given[name]) for name in _LISTS if name in given})
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
        if name in _LISTS:
            if not isinstance(value, list | tuple) or not all(map(_is_number, value)):
                raise ValueError(f"`rope_scaling`: `{name}` must list numbers, got {value!r}")
        elif isinstance(value, bool) != (name == "truncate") or not isinstance(value, int | float):
            raise ValueError(f"`rope_scaling`: `{name}` must be a number, got {value!r}")
    if given.get("factor", 1) < 1:
        raise ValueError(f"`rope_scaling`: `factor` must be at least 1, got {given['factor']}")
    if kind == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
        raise ValueError("`rope_scaling`: `low_freq_factor` must be below `high_freq_factor`")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`, without what is not set."""
    if scaling is None:
        return None
    set_ = {k: v for k, v in asdict(scaling).items() if v is not None}
    return {k: list(v) if k in _LISTS else v for k, v in set_.items()}


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
      head_dim: dimensions of a head that turn, `d`.
      theta: base wavelength.
      scaling: how the frequencies are changed, or None.
      context: `max_position_embeddings`; the dynamic variant starts to change beyond it.
    """
    if scaling is not None and scaling.rope_type in _BY_LENGTH:
        longest = positions.max() + 1
        frequencies = _BY_LENGTH[scaling.rope_type](longest, head_dim, theta, scaling, context)
    else:
        frequencies = jnp.asarray(static_frequencies(head_dim, theta, scaling))
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    length = 1.0 if scaling is None else _length(scaling, context)
    return Rotation(jnp.cos(angles) * length, jnp.sin(angles) * length)


def rotate(x: Float[Array, "b t n d"], by: Rotation | None) -> Float[Array, "b t n d"]:  # noqa: F722
    """Turns each head's planes: `(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)`.

    Args:
      x: heads.
      by: the rotation; None is none.
    """
    if by is None:
        return x
    if (size := 2 * by.cos.shape[-1]) < x.shape[-1]:
        return jnp.concatenate((rotate(x[..., :size], by), x[..., size:]), axis=-1)
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
    factor = _set(scaling.factor)
    grown = theta * (factor * ratio - (factor - 1)) ** (head_dim / (head_dim - 2))
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return 1.0 / grown**exponents


def _longrope(length, head_dim: int, theta: float, scaling: RopeScaling, context: int):
    """Every plane has a divisor of its own, and another one in texts beyond the trained context."""
    del context
    plain = _plain(head_dim, theta)
    short, long = (
        jnp.asarray(plain / np.asarray(divisors, np.float32))
        for divisors in (_set(scaling.short_factor), _set(scaling.long_factor))
    )
    return jnp.where(length > _set(scaling.original_max_position_embeddings), long, short)


def _linear(plain: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Every plane is slowed alike: positions are pressed together."""
    del head_dim, theta
    return plain / np.float32(_set(scaling.factor))


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
_BY_LENGTH = {"dynamic": _dynamic, "longrope": _longrope}


def _set(value: Any) -> Any:
    """A value that the variant needs; `scaling_from_hf` has checked that it is there."""
    if value is None:
        raise ValueError("`rope_scaling` lacks a value that its type needs")
    return value


def _length(scaling: RopeScaling, context: int) -> float:
    """The factor on the rotated vectors (YaRN's temperature); 1 where the variant has none."""
    if scaling.rope_type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    if scaling.rope_type == "longrope":
        trained = _set(scaling.original_max_position_embeddings)
        factor = context / trained if scaling.factor is None else scaling.factor
        return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    factor = _set(scaling.factor)

    def grow(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return grow(scaling.mscale) / grow(scaling.mscale_all_dim)
    return grow(1.0)
