"""Kernels for TPUs, in Pallas with the Mosaic lowering; the contract of `kernels.gpu`.

Values come from a tree of selects: a table look-up is a gather, which a TPU does not have. Codes
are widened to 32 bits before they are shifted. A grid step takes several whole superblocks; codes,
scales and biases have a dim for them, so that no tile has to be aligned across superblocks.
None of this was run on a TPU: it is interpreted in the tests, and compiled ahead of time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from lora_jax.dims import AnyArray
from lora_jax.quant import formats
from lora_jax.quant.kernels import reference
from lora_jax.quant.kernels.partition import (
    sharded_decode,
    sharded_matmul,
    spread_mesh,
    whole_decode,
)

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
    if form.packing != formats.NIBBLES:
        return "codes of other than 4 bits are multiplied after decoding"
    supers = packed[0] // block
    if _steps(supers) * 2 * block % _LANES and _steps(supers) != supers:
        return f"{supers} superblocks of {2 * block} inputs fill no tile of {_LANES} lanes"
    return ""


def _slabs(
    i: int, packed_ref: Ref, scale_ref: Ref, bias_ref: Ref | None, *, form: formats.Format
) -> list[Array]:
    """The slabs of superblock `i` of a tile, in float32."""
    codes = [packed_ref[i, p].astype(jnp.int32) for p in range(packed_ref.shape[1])]
    halves = form.packing.split(codes)
    out = []
    for h, half in enumerate(halves):
        values = formats.code_values(half, form)
        values = values * scale_ref[i, h : h + 1, :].astype(jnp.float32)
        if bias_ref is not None:
            values = values + bias_ref[i, h : h + 1, :].astype(jnp.float32)
        out.append(values)
    return out


def _blocks(w: formats.Coded) -> list[AnyArray]:
    """Codes `(S, planes, B, N)`, scales and biases `(S, slabs, N)`."""
    halves, planes = w.form.packing.slabs, w.form.packing.rows
    supers, cols = w.packed.shape[0] // (planes * w.block), w.packed.shape[1]
    out: list[AnyArray] = [w.packed.reshape(supers, planes, w.block, cols)]
    for x in (w.scale, w.bias):
        if x is not None:
            # A TPU has no float16.
            x = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
            out.append(x.reshape(supers, halves, cols))
    return out


def _compiler(*semantics: Any) -> Any:
    from jax.experimental.pallas import tpu

    return tpu.CompilerParams(dimension_semantics=semantics)


def decode(
    w: formats.Coded, *, dtype: DTypeLike, name: formats.Pass, interpret: bool = False
) -> Float[Array, "k n"]:
    """The matrix; arguments as of `kernels.gpu.decode`."""
    run = functools.partial(
        _decode_blocks, form=w.form, dtype=jnp.dtype(dtype), name=name, interpret=interpret
    )
    # JAX wires `custom_partitioning` to no TPU (https://github.com/jax-ml/jax/issues/38196).
    spread = not interpret and spread_mesh() is not None
    decoded = (whole_decode if spread else sharded_decode)(run, *_blocks(w))
    return decoded.reshape(-1, w.packed.shape[1])


def _decode_blocks(
    packed: Integer[AnyArray, "s p b n"],
    scale: Float[AnyArray, "s h n"],
    bias: Float[AnyArray, "s h n"] | None = None,
    *,
    form: formats.Format,
    dtype: DTypeLike,
    name: formats.Pass,
    interpret: bool,
) -> Float[Array, "s h b n"]:
    """`decode` with a dim for superblocks."""
    supers, planes, block, cols = packed.shape
    halves, bn, steps = scale.shape[1], _columns(cols), _steps(supers)
    if not bn:  # a shard may have an odd number of outputs where the whole has an even one
        return reference.decode_blocks(packed, scale, bias, form=form, dtype=dtype)

    def kernel(packed_ref: Ref, scale_ref: Ref, *rest: Ref) -> None:
        bias_ref = rest[0] if bias is not None else None
        for i in range(steps):
            slabs = _slabs(i, packed_ref, scale_ref, bias_ref, form=form)
            for h, slab in enumerate(slabs):
                rest[-1][i, h] = slab.astype(dtype)

    scales = pl.BlockSpec((steps, halves, bn), lambda s, j: (s, 0, j))
    codes = pl.BlockSpec((steps, planes, block, bn), lambda s, j: (s, 0, 0, j))
    return pl.pallas_call(
        kernel,
        grid=(supers // steps, cols // bn),
        in_specs=[codes, scales] + [scales] * (bias is not None),
        out_specs=pl.BlockSpec((steps, halves, block, bn), lambda s, j: (s, 0, 0, j)),
        out_shape=jax.ShapeDtypeStruct((supers, halves, block, cols), dtype),
        compiler_params=_compiler("parallel", "parallel"),
        interpret=interpret,
        name=f"quant_decode_{name}",
    )(packed, scale, *([] if bias is None else [bias]))


def matmul(
    x: Float[AnyArray, "m _"],
    w: formats.Coded,
    *,
    transposed: bool,
    dtype: DTypeLike,
    interpret: bool = False,
) -> Float[Array, "m _"]:
    """`x (M, K) · w`, or transposed `x (M, N) · wᵀ`; arguments as of `kernels.gpu.matmul`."""
    run = functools.partial(_fused, transposed=transposed, interpret=interpret)
    return sharded_matmul(run, x, w, transposed=transposed, dtype=dtype)


def _fused(
    x: Float[AnyArray, "m _"],
    w: formats.Coded,
    *,
    transposed: bool,
    dtype: DTypeLike,
    interpret: bool,
) -> Float[Array, "m _"]:
    """`matmul` of what one device has."""
    form, block, stored = w.form, w.block, w.packed.shape
    if obstacle(form, block, stored) or fused_obstacle(form, block, stored, x.dtype):
        # A shard may have one where the whole has none.
        return reference.matmul(x, w, transposed=transposed, dtype=dtype)
    rows, supers, cols = x.shape[0], stored[0] // block, stored[1]
    # A bfloat16 tile has 16 rows.
    bm = min(_ROWS, -(-rows // 16) * 16)
    x = jnp.pad(x, ((0, -rows % bm), (0, 0)))
    bn, steps = _columns(cols), _steps(supers)
    bk = steps * 2 * block
    m, k = x.shape[0], supers * 2 * block
    parts = _blocks(w)
    # The contraction is the last grid axis, the innermost: its steps add to one scratch tile.
    tiles = (m // bm, k // bk, cols // bn) if transposed else (m // bm, cols // bn, k // bk)

    def of_weight(i: Any, a: Any, b: Any) -> tuple:
        return (a, 0, b) if transposed else (b, 0, a)

    def codes_at(i: Any, a: Any, b: Any) -> tuple:
        return (a, 0, 0, b) if transposed else (b, 0, 0, a)

    scales = pl.BlockSpec((steps, 2, bn), of_weight)
    y = pl.pallas_call(
        functools.partial(
            _fused_kernel, form=form, steps=steps, last=tiles[2] - 1, transposed=transposed
        ),
        grid=tiles,
        in_specs=[
            pl.BlockSpec((bm, bn if transposed else bk), lambda i, a, b: (i, b)),
            pl.BlockSpec((steps, 1, block, bn), codes_at),
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


def _fused_kernel(
    x_ref: Ref,
    packed_ref: Ref,
    scale_ref: Ref,
    *rest: Ref,
    form: formats.Format,
    steps: int,
    last: int,
    transposed: bool,
) -> None:
    """One step: the products of a tile of `x` with `steps` superblocks.

    Args:
      x_ref, packed_ref, scale_ref: tiles of the operands.
      rest: a tile of the biases if the format has them, the result's, and its float32 sums.
      form: the block format.
      steps: superblocks of a tile.
      last: number of the last step of a sum.
      transposed: whether outputs are contracted.
    """
    *bias_refs, out_ref, sum_ref = rest
    bias_ref = bias_refs[0] if bias_refs else None
    rows = 2 * packed_ref.shape[2]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    for i in range(steps):
        slabs = _slabs(i, packed_ref, scale_ref, bias_ref, form=form)
        w = jnp.concatenate([slab.astype(x_ref.dtype) for slab in slabs], axis=0)
        at = pl.ds(i * rows, rows)
        if transposed:
            sum_ref[:, at] += _dot(x_ref[...], w, 1)
        else:
            sum_ref[...] += _dot(x_ref[:, at], w, 0)

    @pl.when(pl.program_id(2) == last)
    def _() -> None:
        # The sums stay in float32 scratch until the last step, and are rounded once.
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _vmem(shape: tuple[int, ...]) -> Any:
    from jax.experimental.pallas import tpu

    return tpu.VMEM(shape, jnp.float32)


def _dot(left: Float[Array, "m _"], right: Float[Array, "k n"], dim: int) -> Float[Array, "m _"]:
    """Float32 sums over the last dim of `left` and a dim of `right`."""
    return lax.dot_general(
        left, right, (((1,), (dim,)), ((), ())), preferred_element_type=jnp.float32
    )
