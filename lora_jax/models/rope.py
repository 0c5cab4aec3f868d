"""Rotary position embedding (RoPE) and the variants that extend the trained context.

The first `d` dimensions of a head (by default all) form `d/2` planes; plane `j` is rotated by
`p · f_j` at position `p`, with `f_j = theta^(-2j/d)` by default. Planes pair dimension `j` with
`j + d/2` (Hugging Face's layout). The variants change `f`; YaRN and LongRoPE also scale the rotated
vector.

Sources: RoPE arXiv:2104.09864; linear arXiv:2306.15595; dynamic NTK and YaRN arXiv:2309.00071;
LongRoPE arXiv:2402.13753; llama3 as Llama 3.1's reference code does it. Numbers agree with
transformers' to float32.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models.ranges import check_raw

RopeType = Literal["linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]
# Required and optional keys of each variant.
VARIANTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
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
    "proportional": ((), ("factor", "partial_rotary_factor")),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("attention_factor", "factor"),
    ),
}
# Keys with one number per plane.
_LISTS = ("short_factor", "long_factor")
# The frequency of each plane.
Planes = Float[np.ndarray, " planes"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies change to extend the context: Hugging Face's `rope_scaling`.

    Attributes:
      rope_type: a key of `VARIANTS`.
      factor: how many times longer the context becomes; None with longrope means the ratio of
        the extended to the trained context.
      original_max_position_embeddings: the trained context, in tokens (llama3, yarn, longrope).
      low_freq_factor, high_freq_factor: edges of llama3's blend, in turns per trained context.
      beta_fast, beta_slow: edges of YaRN's blend, in turns per trained context.
      attention_factor, mscale, mscale_all_dim: scale of the rotated vectors (yarn, longrope).
      truncate: whether YaRN rounds the edges of its blend to whole planes.
      partial_rotary_factor: the share of the planes that proportional RoPE rotates, the fastest.
      short_factor, long_factor: LongRoPE's divisor of each plane's frequency, for texts up to the
        trained context and for longer ones.
    """

    rope_type: RopeType
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
    partial_rotary_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None


class Rotation(NamedTuple):
    """Cosine and sine of each token's angles, times the variant's scale.

    With fewer planes than a head has pairs, the head's last dimensions are not rotated.
    """

    cos: Float[Array, "b t 1 planes"]
    sin: Float[Array, "b t 1 planes"]


def scaling_from_hf(raw: Mapping[str, Any] | None, *, context: int) -> RopeScaling | None:
    """Reads Hugging Face's `rope_scaling` (or `rope_parameters` without its `rope_theta`).

    Args:
      raw: the JSON object, or None.
      context: `max_position_embeddings`; the default of `original_max_position_embeddings`, as
        in transformers.

    Returns:
      The scaling, or None for plain RoPE.

    Raises:
      ValueError: an unknown variant, a missing or unknown key, or a factor below 1.
    """
    given = {k: v for k, v in (raw or {}).items() if v is not None and k != "type"}
    kind = given.pop("rope_type", (raw or {}).get("type") or "default")
    if kind == "default" and not given:
        return None
    if kind == "default":
        fields = ", ".join(f"`{name}` = {value!r}" for name, value in given.items())
        raise ValueError(f"`rope_scaling`: {fields} with rope_type `default` is not supported")
    if kind not in VARIANTS:
        known = ", ".join(("default", *VARIANTS))
        raise ValueError(f"`rope_scaling`: rope_type `{kind}` is not one of {known}")
    needed, optional = VARIANTS[kind]
    if "original_max_position_embeddings" in needed:
        given.setdefault("original_max_position_embeddings", context)
    _check_keys(kind, given, needed, optional)
    given.update({name: tuple(given[name]) for name in _LISTS if name in given})
    return RopeScaling(rope_type=cast(RopeType, kind), **given)


def _check_keys(
    kind: str, given: Mapping[str, Any], needed: tuple[str, ...], optional: tuple[str, ...]
) -> None:
    missing = [k for k in needed if k not in given]
    extra = [k for k in given if k not in (*needed, *optional)]
    if missing or extra:
        raise ValueError(
            f"`rope_scaling` of type `{kind}`: missing {missing or 'nothing'}, "
            f"unknown {extra or 'nothing'}"
        )
    check_raw(given, prefix="config: `rope_scaling`: ")
    if kind == "llama3" and given["low_freq_factor"] > given["high_freq_factor"]:
        raise ValueError("`rope_scaling`: `low_freq_factor` must not be above `high_freq_factor`")


def scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`, without the unset keys."""
    if scaling is None:
        return None
    set_ = {k: v for k, v in asdict(scaling).items() if v is not None}
    return {k: list(v) if k in _LISTS else v for k, v in set_.items()}


def rotation(
    positions: Int[AnyArray, "b t"],
    *,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
    context: int,
) -> Rotation:
    """Cosines and sines for tokens at the given positions, in float32.

    Args:
      positions: each token's place in its text, from 0.
      head_dim: dimensions of a head that are rotated, `d`.
      theta: base wavelength.
      scaling: how the frequencies change, or None.
      context: `max_position_embeddings`; the dynamic variant changes `f` in longer texts.
    """
    if scaling is not None and scaling.rope_type in _BY_LENGTH:
        # The longest text of a batch decides for all its rows, as in transformers.
        longest = positions.max() + 1
        by_length = _BY_LENGTH[scaling.rope_type]
        frequencies = by_length(longest, head_dim, theta, scaling, context=context)
    else:
        frequencies = jnp.asarray(static_frequencies(head_dim, theta, scaling))
    # float32 whatever the compute dtype: bfloat16 rounds positions above 256.
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies  # (b, t, 1, planes)
    length = 1.0 if scaling is None else _length(scaling, context)
    return Rotation(jnp.cos(angles) * length, jnp.sin(angles) * length)


def rotate(x: Float[Array, "b t n d"], by: Rotation | None) -> Float[Array, "b t n d"]:
    """Rotates each head's planes: `(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)`.

    Args:
      x: heads.
      by: the rotation; None leaves `x` as it is.
    """
    if by is None:
        return x
    if (size := 2 * by.cos.shape[-1]) < x.shape[-1]:
        return jnp.concatenate((rotate(x[..., :size], by), x[..., size:]), axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # (b, t, n, planes)
    turned = (first * by.cos - second * by.sin, second * by.cos + first * by.sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def by_halves(x: Float[Array, "b t n h"], size: int) -> Float[Array, "b t n h"]:
    """Heads whose first `size` dims are rotated in pairs, in the order of `rotate`, by halves.

    Queries and keys in another order of dims have the same products.
    """
    pairs = x[..., :size].reshape(*x.shape[:-1], -1, 2)  # (b, t, n, planes, 2)
    return jnp.concatenate((pairs[..., 0], pairs[..., 1], x[..., size:]), axis=-1)


def static_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Planes:
    """The `d/2` frequencies of a variant that does not depend on the length of the text."""
    plain = _plain(head_dim, theta)
    if scaling is None:
        return plain
    return _STATIC[scaling.rope_type](plain, head_dim, theta, scaling)


def _plain(head_dim: int, theta: float) -> Planes:
    # float32 at every step, as in transformers: float64 would differ in the last bits.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def _dynamic(
    length: Int[AnyArray, ""],
    head_dim: int,
    theta: float,
    scaling: RopeScaling,
    *,
    context: int,
) -> Float[Array, " planes"]:
    """NTK scaling that grows with the text: theta is raised once `length` exceeds the context."""
    ratio = jnp.maximum(length, context).astype(jnp.float32) / context
    factor = _set(scaling.factor)
    # 1 at the trained context, so that f has no jump there. The exponent slows the slowest plane,
    # whose own exponent is -(d-2)/d, by exactly the bracket; the fastest plane stays.
    grown = theta * (factor * ratio - (factor - 1)) ** (head_dim / (head_dim - 2))
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return 1.0 / grown**exponents


def _longrope(
    length: Int[AnyArray, ""],
    head_dim: int,
    theta: float,
    scaling: RopeScaling,
    *,
    context: int,
) -> Float[Array, " planes"]:
    """Each plane has two divisors: for texts within the trained context and for longer ones."""
    del context
    plain = _plain(head_dim, theta)
    short, long = (
        jnp.asarray(plain / np.asarray(divisors, np.float32))
        for divisors in (_set(scaling.short_factor), _set(scaling.long_factor))
    )
    return jnp.where(length > _set(scaling.original_max_position_embeddings), long, short)


def _linear(plain: Planes, head_dim: int, theta: float, scaling: RopeScaling) -> Planes:
    """All planes are slowed by the same factor, as if positions were closer together."""
    del head_dim, theta
    return plain / np.float32(_set(scaling.factor))


def _proportional(plain: Planes, head_dim: int, theta: float, scaling: RopeScaling) -> Planes:
    """The planes behind the first few stay; the head counts whole in the wavelengths."""
    del theta
    part = 1.0 if scaling.partial_rotary_factor is None else scaling.partial_rotary_factor
    turns = np.arange(len(plain)) < int(part * head_dim // 2)
    return np.where(turns, plain / np.float32(scaling.factor or 1.0), 0).astype(np.float32)


def _llama3(plain: Planes, head_dim: int, theta: float, scaling: RopeScaling) -> Planes:
    """Slow planes are slowed by `factor`, fast ones stay, those between are blended."""
    del head_dim, theta
    low, high = _set(scaling.low_freq_factor), _set(scaling.high_freq_factor)
    # Full turns of each plane within the trained context: a plane that completes many of them
    # encodes nearby distances, which a longer context does not change.
    turns = _set(scaling.original_max_position_embeddings) * plain / (2 * math.pi)
    # Llama 4's edges are one: there is nothing between slow and fast.
    keep = turns >= low if low == high else np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - keep) * plain / scaling.factor + keep * plain).astype(np.float32)


def _yarn(plain: Planes, head_dim: int, theta: float, scaling: RopeScaling) -> Planes:
    """As llama3, but the blend is linear in the plane's index, not in its frequency."""

    # The (fractional) index j of the plane with this many turns: solves
    # trained * theta^(-2j/d) / 2 pi = turns.
    def plane(turns: float) -> float:
        trained = _set(scaling.original_max_position_embeddings)
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    # 32 and 1 are the paper's values for Llama.
    low, high = plane(scaling.beta_fast or 32), plane(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    # The upper edge as in YaRN's own code, which cuts at dimensions and not at planes.
    low, high = max(low, 0), min(high, head_dim - 1)
    # Keeps the ramp below from dividing by zero.
    high = high + 0.001 if low == high else high
    slow = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    return (plain / scaling.factor * slow + plain * (1 - slow)).astype(np.float32)


_STATIC = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "proportional": _proportional}
_BY_LENGTH = {"dynamic": _dynamic, "longrope": _longrope}


def _set(value: Any) -> Any:
    """A required value. `scaling_from_hf` checks it; a `RopeScaling` made by hand may lack it."""
    if value is None:
        raise ValueError("`rope_scaling` lacks a value that its rope_type requires")
    return value


def _length(scaling: RopeScaling, context: int) -> float:
    """The scale of the rotated vectors (YaRN's temperature); 1 for the other variants."""
    if scaling.rope_type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    if scaling.rope_type == "longrope":
        trained = _set(scaling.original_max_position_embeddings)
        factor = context / trained if scaling.factor is None else scaling.factor
        return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    factor = _set(scaling.factor)

    # 0.1 ln(s) + 1 is the paper's fit of the best softmax temperature.
    def grow(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    # DeepSeek's checkpoints set both; the ratio is what transformers applies to the vectors.
    if scaling.mscale and scaling.mscale_all_dim:
        return grow(scaling.mscale) / grow(scaling.mscale_all_dim)
    return grow(1.0)
