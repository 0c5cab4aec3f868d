"""Quantizing a weight, on one device or where its shards are.

A block lies along the inputs of one output. So a shard of whole superblocks is quantized by itself
to the codes that the whole weight has there; nothing but the scales that are quantized again is
sent to other devices.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from lora_jax import compat
from lora_jax.config.arguments import check_arrays, kind_of
from lora_jax.dims import AnyArray, in_dims, out_dims, sizes, to_matrix
from lora_jax.quant import formats
from lora_jax.quant.array import QuantArray, default_roles
from lora_jax.quant.scales import SCALE_DTYPES, ScaleDtype, compress_scales, expand_scales
from lora_jax.quant.sharding import matrix_spec, parts_of


class _How(NamedTuple):
    """What decides the program that quantizes a weight; static under `jit`."""

    roles: str
    form: formats.Format
    block: int
    scale_dtype: np.dtype
    double: bool


def quantize_array(
    w: Any,
    *,
    format: formats.FormatName = "nf4",
    block_size: int = 64,
    scale_dtype: ScaleDtype | None = None,
    double_quant: bool = False,
    roles: str | None = None,
    pad: bool = False,
    name: str = "w",
) -> QuantArray:
    """Quantizes one weight.

    Args:
      w: floating-point array. One that is spread over a mesh stays so, and has the codes that it
        has on one device.
      format: a name of `formats.FORMATS`, such as "nf4", "int4" (signed scales), "uint4" (a scale
        and a bias a block), "int8" or "fp8".
      block_size: inputs that share a scale, a power of two of at least 16.
      scale_dtype: of the scales: "bfloat16" by default. With `double_quant` it is "float32" and
        no other, as in bitsandbytes: the scales are quantized from that.
      double_quant: quantize the scales too, to 8 bits.
      roles: one letter a dim (s stack, i in, o out); `...sio` by default: the last dim is
        produced, the one before contracted, all others stacked.
      pad: fill a block that is not whole with zeros; otherwise that is an error.
      name: of the weight, for errors.

    Returns:
      The quantized weight; works under `jit` and `eval_shape`.

    Raises:
      ValueError: an unknown format or block size, a block that does not divide the inputs,
        non-finite weights, or scales beyond the range of `scale_dtype`. (The last two not under
        `jit`, where values are unknown.)

    Warns:
      UserWarning: a dim of a weight on a mesh is gathered, because its shards cut superblocks.
    """
    check_arrays(f"`{name}`", [w])
    if not compat.is_array(w):
        raise TypeError(
            f"`{name}` must be an array, got {kind_of(w)}: see `lora.quantize` for trees"
        )
    form = formats.known_format(format)
    assumed = roles is None
    roles = default_roles(len(w.shape)) if roles is None else roles
    scale_dtype = scale_dtype or ("float32" if double_quant else "bfloat16")
    _check_format(form, block_size, scale_dtype, double_quant)
    _check_weight(w, block_size, roles=roles, assumed=assumed, pad=pad, name=name)
    how = _How(
        roles=roles,
        form=form,
        block=block_size,
        scale_dtype=jnp.dtype(scale_dtype),
        double=double_quant,
    )
    where = None if isinstance(w, jax.core.Tracer) else getattr(w, "sharding", None)
    if isinstance(where, NamedSharding) and len(where.device_set) > 1:
        parts, faults = _on_mesh(w, where, how, name)
    else:
        parts, faults = _encode(w, how)
        if double_quant:
            found, lost = _compress(parts["scale"], how, _blocks(w, how), jnp.dtype(w.dtype))
            parts, faults = {**parts, **found}, jnp.stack([faults[0], lost])
    # Values are checked outside `jit` only; a tracer has none.
    if not isinstance(faults, jax.core.Tracer):
        _check_values(np.asarray(faults), how, dtype=w.dtype, name=name)
    return QuantArray(
        **parts,
        format=form.name,
        block=block_size,
        shape=tuple(w.shape),
        roles=roles,
        dtype=jnp.dtype(w.dtype),
    )


def _blocks(w: Any, how: _How) -> int:
    """Blocks of an output; blocks of padding follow them."""
    return -(-sizes(w.shape, how.roles)[1] // how.block)


def _check_format(form: formats.Format, block: int, scale_dtype: str, double: bool) -> None:
    if block not in formats.BLOCK_SIZES:
        known = ", ".join(map(str, formats.BLOCK_SIZES))
        raise ValueError(f"`block_size` must be one of {known}, got {block!r}")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(
            f"`scale_dtype` must be one of {', '.join(SCALE_DTYPES)}, got {scale_dtype!r}"
        )
    if double and scale_dtype != "float32":
        raise ValueError(
            "`double_quant` makes 8-bit scales out of float32 ones, got "
            f"scale_dtype={scale_dtype!r}: leave `scale_dtype` out"
        )
    if double and form.scale != "absmax":
        raise ValueError(
            f"`double_quant` needs a format whose scales are magnitudes (nf4, fp4, int8, fp8), got "
            f'"{form.name}"'
        )


def _check_weight(w: Any, block: int, *, roles: str, assumed: bool, pad: bool, name: str) -> None:
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(
            f"`{name}` is {w.dtype}, and only floating-point weights are quantized: choose others"
        )
    if len(roles) != len(w.shape) or not {"i", "o"} <= set(roles) or set(roles) - set("siou"):
        raise ValueError(
            f"`roles` {roles!r} does not fit `{name}` of shape {tuple(w.shape)}: one letter a dim, "
            f"s (stack), i (in) or o (out), with an i and an o"
        )
    _, fan_in, _ = sizes(w.shape, roles)
    if fan_in % block and not pad:
        fits = [b for b in formats.BLOCK_SIZES if fan_in % b == 0]
        padded = "no block size does, and `lora.quantize(..., pad=True)` fills the last block"
        hint = f"choose {fits[-1]} or less" if fits else padded
        if assumed and len(roles) > 2:
            hint += "; the roles are assumed: if other dims are its inputs, pass a plan or `roles`"
        raise ValueError(
            f"`block_size` {block} does not divide the {fan_in} inputs of `{name}` (shape "
            f"{tuple(w.shape)}, roles {roles}): {hint}"
        )


def _check_values(faults: np.ndarray, how: _How, *, dtype: Any, name: str) -> None:
    infinite, lost = faults
    if infinite:
        raise ValueError(f"`{name}` is not finite (NaN or infinity): it cannot be quantized")
    if lost:
        held = "float32" if how.double else how.scale_dtype
        raise ValueError(
            f"the scales of `{name}` leave the range of {held}, or its weights that of "
            f'{jnp.dtype(dtype)}: use scale_dtype="bfloat16" or "float32", or wider weights'
        )


def _over_stack(
    one: Callable[[Float[Array, "k n"]], dict[str, Any]], m: Float[Array, "*s k n"]
) -> dict[str, Any]:
    """One matrix after the other: a stack in float32 would take several times its memory."""
    *stack, rows, cols = m.shape
    if not stack:
        return one(m)
    flat = lax.map(one, m.reshape(-1, rows, cols))
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), flat)


def _encoded(w: Array, how: _How) -> tuple[dict[str, Any], Bool[Array, "2"]]:
    """The arrays of a quantized weight; whether it is not finite, and whether scales are lost."""
    form, block = how.form, how.block
    m = to_matrix(w, how.roles)
    rows = formats.padded_inputs(m.shape[-2], form, block)

    def one(m: Float[Array, "k n"]) -> dict[str, Any]:
        # Scales that are quantized again stay float32 until then: no rounding comes twice.
        kept = jnp.float32 if how.double else how.scale_dtype
        codes, scale, bias = formats.encode(_fill(m.astype(jnp.float32), rows), form, block, kept)
        return {"packed": formats.pack(codes, form, block), "scale": scale, "bias": bias}

    parts = _over_stack(one, m)
    # A scale may be finite and its largest product not, for example in a float16 weight.
    lost = ~jnp.all(jnp.isfinite(_extremes(parts["scale"], parts["bias"], form, w.dtype)))
    if parts["scale"].dtype == jnp.float16:  # bfloat16 reaches as far down as float32
        least = float(jnp.finfo(jnp.float16).tiny)
        size = jnp.abs(parts["scale"].astype(jnp.float32))
        lost |= jnp.any((size < least) & (_spread(m, form, block) > 0))
    return parts, jnp.stack([~jnp.all(jnp.isfinite(w)), lost])


_encode = jax.jit(_encoded, static_argnums=1)


def _compressed(
    scale: Float[Array, "*s b n"], how: _How, blocks: int, dtype: DTypeLike
) -> tuple[dict[str, Any], Bool[Array, ""]]:
    """The fields of scales that are quantized too, and whether decoded ones are lost."""
    found = _over_stack(lambda s: compress_scales(s, blocks), scale)
    decoded = expand_scales(
        found["scale"], found["scale2"], found["offset"], found["scale_map"], blocks=blocks
    )
    return found, ~jnp.all(jnp.isfinite(_extremes(decoded, None, how.form, dtype)))


_compress = jax.jit(_compressed, static_argnums=(1, 2, 3))


def _extremes(
    scale: Float[Array, "*s b n"], bias: Any, form: formats.Format, dtype: DTypeLike
) -> Float[Array, "2 *s b n"]:
    """The lowest and the highest value that each block's codes stand for, in the weight's dtype."""
    size = jnp.abs(scale.astype(jnp.float32))
    ends = [size * v for v in form.ends]
    if bias is not None:
        ends = [end + bias.astype(jnp.float32) for end in ends]
    return jnp.stack(ends).astype(dtype)


def _spread(m: Float[Array, "*s k n"], form: formats.Format, block: int) -> Float[Array, "*s b n"]:
    """What the scale of each block is computed from: its range, or its largest magnitude."""
    # An affine block's range includes the zeros of its padding.
    filled = _fill(m.astype(jnp.float32), formats.padded_inputs(m.shape[-2], form, block))
    *stack, rows, cols = filled.shape
    blocks = filled.reshape(*stack, rows // block, block, cols)
    if form.affine:
        return jnp.max(blocks, axis=-2) - jnp.min(blocks, axis=-2)
    return jnp.max(jnp.abs(blocks), axis=-2)


def _fill(m: Float[Array, "*s k n"], rows: int) -> Float[Array, "*s m n"]:
    """The matrix with zeros below it, `rows` in all."""
    return jnp.pad(m, [(0, 0)] * (m.ndim - 2) + [(0, rows - m.shape[-2]), (0, 0)])


def _on_mesh(
    w: Array, where: NamedSharding, how: _How, name: str
) -> tuple[dict[str, Any], Bool[AnyArray, "2"]]:
    """As `_encode` and `_compress`, each device for its own shard."""
    spec = _kept_spec(w, where, how, name)
    if spec != where.spec:
        w = jax.device_put(w, NamedSharding(where.mesh, spec))
    empty = QuantArray(None, None, shape=w.shape, roles=how.roles)
    matrix = NamedSharding(where.mesh, matrix_spec(empty, spec))
    parts, flags = _encoder(NamedSharding(where.mesh, spec), matrix, how)(w)
    faults = _found(flags)
    if not how.double:
        return parts, faults
    # Groups of scales go across shards, so every device computes those of whole matrices, in the
    # program of a single device: in another order their mean would have another last bit.
    stack = NamedSharding(where.mesh, PartitionSpec(*matrix.spec[:-2]))
    found, lost = _compressor(stack, how, _blocks(w, how), jnp.dtype(w.dtype))(
        jax.device_put(parts["scale"], stack)
    )
    found["scale"] = jax.device_put(found["scale"], matrix)
    return {**parts, **found}, np.stack([faults[0], _found(lost)])


def _kept_spec(w: Array, where: NamedSharding, how: _How, name: str) -> PartitionSpec:
    """The weight's spec without what its codes cannot have."""
    full = [*where.spec, *[None] * (w.ndim - len(where.spec))]
    kept: list = list(full)
    # Dims that are stored as one follow the first of them in memory.
    for group in (in_dims(how.roles), out_dims(how.roles)):
        for d in group[1:]:
            kept[d] = None
    # The codes of a superblock share bytes, and padding is at the end of all inputs.
    first = in_dims(how.roles)[0]
    unit = how.form.rows(how.block) * parts_of(where.mesh, full[first])
    if kept[first] is not None and sizes(w.shape, how.roles)[1] % unit:
        kept[first] = None
    if kept != full:
        warnings.warn(
            f"`{name}` {tuple(w.shape)} is sharded as {where.spec}, which cuts superblocks of "
            f"{how.form.rows(how.block)} inputs or dims that are stored as one: it is quantized as "
            f"{PartitionSpec(*kept)}",
            stacklevel=4,  # the caller of `quantize_array`
        )
    return PartitionSpec(*kept)


def _found(flags: Bool[Array, " devices *n"]) -> Bool[np.ndarray, " *n"]:
    """Which flags a device of this process has set; an error in one process ends the others."""
    mine = [np.asarray(shard.data)[0] for shard in flags.addressable_shards]
    return np.asarray(np.any(mine, axis=0))


@functools.lru_cache
def _encoder(where: NamedSharding, matrix: NamedSharding, how: _How) -> Callable:
    def local(w: Array) -> tuple[dict[str, Any], Bool[Array, "1 2"]]:
        parts, faults = _encoded(w, how)
        return parts, faults[None]

    # A row of flags for each device: to reduce them would make all processes wait for each other.
    rows = PartitionSpec(where.mesh.axis_names)
    mapped = jax.shard_map(
        local, mesh=where.mesh, in_specs=where.spec, out_specs=(matrix.spec, rows)
    )
    return jax.jit(mapped, out_shardings=(matrix, NamedSharding(where.mesh, rows)))


@functools.lru_cache
def _compressor(stack: NamedSharding, how: _How, blocks: int, dtype: np.dtype) -> Callable:
    def local(scale: Float[Array, "*s b n"]) -> tuple[dict[str, Any], Bool[Array, "1"]]:
        found, lost = _compressed(scale, how, blocks, dtype)
        return found, lost[None]

    rows = PartitionSpec(stack.mesh.axis_names)
    mapped = jax.shard_map(
        local, mesh=stack.mesh, in_specs=stack.spec, out_specs=(stack.spec, rows)
    )
    return jax.jit(mapped, out_shardings=(stack, NamedSharding(stack.mesh, rows)))
