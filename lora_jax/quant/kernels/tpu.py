"""Kernels for TPUs, in Pallas with the Mosaic lowering; the contract of `kernels.gpu`.

Values come from a tree of selects: a table look-up is a gather, which a TPU does not have. Codes
are widened to 32 bits before they are shifted. A grid step takes several whole superblocks; codes,
scales and biases have a dim for them, so that no tile has to be aligned across superblocks.
None of this was run on a TPU: it is interpreted in the tests, and compiled ahead of time.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from lora_jax.dims import AnyArray
from lora_jax.quant import formats
from lora_jax.quant.kernels import reference
from lora_jax.quant.kernels.partition import sharded_decode, sharded_matmul

# A block of an array in memory, as a kernel gets it; Pallas names no public type for it.
Ref = Any

_LANES = 128  # the last dim of a TPU's vector register
_COLUMNS = (512, 256, 128)  # outputs of one grid step: the first that divides them all
_STEPS = 8  # superblocks of a grid step, at most
_ROWS = 256  # rows of `x` in a tile, at most
_BLOCKS = (32, 64, 128, 256)


def _columns(outputs: int) -> int:
    return next((n for n in _COLUMNS if outputs % n == 0), 0)


def _steps(supers: int) -> int:
    return max(s for s in range(1, _STEPS + 1) if supers % s == 0)


def obstacle(form: formats.Format, block: int, packed: tuple[int, ...]) -> str:
    """Why no kernel takes a matrix with codes of shape `packed`, or ""."""
    if not _columns(packed[-1]):
        return f"{packed[-1]} outputs are no multiple of {_LANES}"
    if block not in _BLOCKS:
        return f"blocks of {block} do not fit its tiles ({', '.join(map(str, _BLOCKS))} do)"
    return ""


def fused_obstacle(
    form: formats.Format, block: int, packed: tuple[int, ...], dtype: DTypeLike
) -> str:
    """Why `matmul` does not take it, or ""."""
    if form.packing.slabs != 2:
        return "8-bit codes are multiplied after decoding"
    supers = packed[0] // block
    if _steps(supers) * 2 * block % _LANES and _steps(supers) != supers:
        return f"{supers} superblocks of {2 * block} inputs fill no tile of {_LANES} lanes"
    return ""


def _slabs(
    i: int, packed_ref: Ref, scale_ref: Ref, bias_ref: Ref | None, form: formats.Format
) -> list[Array]:
    """The halves of superblock `i` of a tile, in float32."""
    codes = packed_ref[i].astype(jnp.int32)
    halves = form.packing.split(codes)
    out = []
    for h, half in enumerate(halves):
        values = formats.code_values(half, form)
        values = values * scale_ref[i, h : h + 1, :].astype(jnp.float32)
        if bias_ref is not None:
            values = values + bias_ref[i, h : h + 1, :].astype(jnp.float32)
        out.append(values)
    return out


def _blocks(
    packed: AnyArray, scale: AnyArray, bias: AnyArray | None, form: formats.Format, block: int
) -> list[AnyArray]:
    """Codes `(S, B, N)`, scales and biases `(S, halves, N)`."""
    halves = form.rows(block) // block
    supers, cols = packed.shape[0] // block, packed.shape[1]
    out = [packed.reshape(supers, block, cols)]
    for x in (scale, bias):
        if x is not None:
            # A TPU has no float16.
            x = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
            out.append(x.reshape(supers, halves, cols))
    return out


def _compiler(*semantics: Any) -> Any:
    from jax.experimental.pallas import tpu

    return tpu.CompilerParams(dimension_semantics=semantics)


def decode(
    packed: Integer[AnyArray, "p n"],  # noqa: F722
    scale: Float[AnyArray, "g n"],  # noqa: F722
    bias: Float[AnyArray, "g n"] | None,  # noqa: F722
    *,
    form: formats.Format,
    block: int,
    dtype: DTypeLike,
    name: Literal["forward", "backward"],
    interpret: bool = False,
) -> Float[Array, "k n"]:  # noqa: F722
    """The matrix; arguments as of `kernels.gpu.decode`."""
    parts = _blocks(packed, scale, bias, form, block)
    run = functools.partial(
        _decode_blocks, form=form, dtype=jnp.dtype(dtype), name=name, interpret=interpret
    )
    return sharded_decode(run, *parts).reshape(-1, packed.shape[1])


def _decode_blocks(
    packed: AnyArray,
    scale: AnyArray,
    bias: AnyArray | None = None,
    *,
    form: formats.Format,
    dtype: DTypeLike,
    name: str,
    interpret: bool,
) -> Array:
    supers, block, cols = packed.shape
    halves, bn, steps = scale.shape[1], _columns(cols), _steps(supers)
    if not bn:  # a shard may have an odd number of outputs where the whole has an even one
        return reference.decode_blocks(packed, scale, bias, form=form, dtype=dtype)

    def kernel(packed_ref: Ref, scale_ref: Ref, *rest: Ref) -> None:
        bias_ref = rest[0] if bias is not None else None
        for i in range(steps):
            for h, slab in enumerate(_slabs(i, packed_ref, scale_ref, bias_ref, form)):
                rest[-1][i, h] = slab.astype(dtype)

    def at(s: Any, j: Any) -> tuple:
        return s, 0, j

    scales = pl.BlockSpec((steps, halves, bn), at)
    return pl.pallas_call(
        kernel,
        grid=(supers // steps, cols // bn),
        in_specs=[pl.BlockSpec((steps, block, bn), at), scales] + [scales] * (bias is not None),
        out_specs=pl.BlockSpec((steps, halves, block, bn), lambda s, j: (s, 0, 0, j)),
        out_shape=jax.ShapeDtypeStruct((supers, halves, block, cols), dtype),
        compiler_params=_compiler("parallel", "parallel"),
        interpret=interpret,
        name=f"quant_decode_{name}",
    )(packed, scale, *([] if bias is None else [bias]))


def matmul(
    x: Float[AnyArray, "m _"],  # noqa: F722
    packed: Integer[AnyArray, "p n"],  # noqa: F722
    scale: Float[AnyArray, "g n"],  # noqa: F722
    bias: Float[AnyArray, "g n"] | None,  # noqa: F722
    *,
    form: formats.Format,
    block: int,
    transposed: bool,
    dtype: DTypeLike,
    interpret: bool = False,
) -> Float[Array, "m _"]:  # noqa: F722
    """`x (M, K) · w`, or transposed `x (M, N) · wᵀ`; arguments as of `kernels.gpu.matmul`."""
    run = functools.partial(
        _fused, form=form, block=block, transposed=transposed, interpret=interpret
    )
    supers = packed.shape[0] // block
    return sharded_matmul(run, x, packed, scale, bias, supers=supers, transposed=transposed,
                          dtype=dtype)  # fmt: skip


def _fused(
    x: AnyArray,
    packed: AnyArray,
    scale: AnyArray,
    bias: AnyArray | None,
    *,
    form: formats.Format,
    block: int,
    transposed: bool,
    dtype: DTypeLike,
    interpret: bool,
) -> Array:
    """`matmul` of what one device has."""
    if obstacle(form, block, packed.shape) or fused_obstacle(form, block, packed.shape, x.dtype):
        # A shard may have one where the whole has none.
        return reference.matmul(x, packed, scale, bias, form=form, block=block,
                                transposed=transposed, dtype=dtype)  # fmt: skip
    rows, supers, cols = x.shape[0], packed.shape[0] // block, packed.shape[1]
    # A bfloat16 tile has 16 rows.
    bm = min(_ROWS, -(-rows // 16) * 16)
    x = jnp.pad(x, ((0, -rows % bm), (0, 0)))
    bn, steps = _columns(cols), _steps(supers)
    bk = steps * 2 * block
    m, k = x.shape[0], supers * 2 * block
    parts = _blocks(packed, scale, bias, form, block)
    # The contraction is the last grid axis, the innermost: its steps add to one scratch tile.
    tiles = (m // bm, k // bk, cols // bn) if transposed else (m // bm, cols // bn, k // bk)

    def kernel(x_ref: Ref, packed_ref: Ref, scale_ref: Ref, *rest: Ref) -> None:
        bias_ref = rest[0] if bias is not None else None
        out_ref, sum_ref = rest[-2:]

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            sum_ref[...] = jnp.zeros_like(sum_ref)

        for i in range(steps):
            slabs = _slabs(i, packed_ref, scale_ref, bias_ref, form)
            w = jnp.concatenate([slab.astype(x.dtype) for slab in slabs], axis=0)
            at = pl.ds(i * 2 * block, 2 * block)
            if transposed:
                sum_ref[:, at] += _dot(x_ref[...], w, 1)
            else:
                sum_ref[...] += _dot(x_ref[:, at], w, 0)

        @pl.when(pl.program_id(2) == tiles[2] - 1)
        def _() -> None:
            # The sums stay in float32 scratch until the last step, and are rounded once.
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    def of_weight(i: Any, a: Any, b: Any) -> tuple:
        return (a, 0, b) if transposed else (b, 0, a)

    scales = pl.BlockSpec((steps, 2, bn), of_weight)
    y = pl.pallas_call(
        kernel,
        grid=tiles,
        in_specs=[
            pl.BlockSpec((bm, bn if transposed else bk), lambda i, a, b: (i, b)),
            pl.BlockSpec((steps, block, bn), of_weight),
            *[scales] * (len(parts) - 1),
        ],
        out_specs=pl.BlockSpec((bm, bk if transposed else bn), lambda i, a, b: (i, a)),
        out_shape=jax.ShapeDtypeStruct((m, k if transposed else cols), dtype),
        scratch_shapes=[_vmem((bm, bk if transposed else bn))],
        # "arbitrary" keeps the steps of the contraction in order.
        compiler_params=_compiler("parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name=f"quant_matmul_{'backward' if transposed else 'forward'}",
    )(x, *parts)
    return y[:rows]


def _vmem(shape: tuple[int, ...]) -> Any:
    from jax.experimental.pallas import tpu

    return tpu.VMEM(shape, jnp.float32)


def _dot(left: Array, right: Array, dim: int) -> Array:
    return lax.dot_general(
        left, right, (((1,), (dim,)), ((), ())), preferred_element_type=jnp.float32
    )
