"""Kernels for NVIDIA GPUs, in Pallas with the Triton lowering.

`decode` writes the matrix to memory for the library's product. XLA cannot see into the call, and in
the backward pass it has another name: otherwise XLA would decode once for both passes and keep the
decoded matrix of every layer. `matmul` decodes in registers, between loading codes and
multiplying. It reads a quarter of the bytes, for few rows (decoding text). On an H200 it is up to
twice as fast as decoding first with int4, and slower with NF4.
Both work on superblocks, see `lora_jax.quant.formats`.

Formats with a table look values up in its 16 float32 entries (7 instructions a weight on sm_90; a
tree of selects takes 19); those of integers compute them. Arithmetic is float32, rounded once.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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

_COLUMNS = (128, 64, 32, 16)  # outputs of one program: the first that divides them all
_ROWS = 64  # of a superblock's half that one program decodes
_FUSED_BLOCKS = (16, 32, 64, 128)
_SMS = 132  # streaming multiprocessors of an H100 or H200


def _triton(warps: int, stages: int) -> Any:
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=warps, num_stages=stages)


def _columns(outputs: int) -> int:
    return next((n for n in _COLUMNS if outputs % n == 0), 0)


def obstacle(form: formats.Format, block: int, packed: tuple[int, ...]) -> str:
    """Why no kernel takes a matrix with codes of shape `packed`, or ""."""
    if not _columns(packed[-1]):
        return f"{packed[-1]} outputs are no multiple of {_COLUMNS[-1]}"
    return ""


def fused_obstacle(
    form: formats.Format, block: int, packed: tuple[int, ...], dtype: DTypeLike
) -> str:
    """Why `matmul` does not take it, or ""."""
    if form.packing != formats.NIBBLES:
        return "codes of other than 4 bits are multiplied after decoding"
    if block not in _FUSED_BLOCKS:
        return f"blocks of {block} do not fit the registers"
    if jnp.dtype(dtype).itemsize != 2:
        return f"{jnp.dtype(dtype).name} has no tensor-core product that keeps its precision"
    return ""


def _table(form: formats.Format) -> Float[np.ndarray, "16"]:
    """The codebook in float32, or zeros where it is computed."""
    return np.asarray(form.table or [0.0] * 16, np.float32)


def _values(codes: Array, form: formats.Format, table_ref: Ref) -> Array:
    """The value of each code in float32."""
    if form.table is None:
        return formats.code_values(codes, form)
    return _load(table_ref, codes.astype(jnp.int32))


def _load(table_ref: Ref, index: Array) -> Array:
    from jax.experimental.pallas import triton

    return triton.load(table_ref.at[index])


def _slabs(
    codes: list[Integer[Array, "b n"]],
    form: formats.Format,
    *,
    scale: list[Array],
    bias: list[Array] | None,
    table_ref: Ref,
) -> list[Array]:
    """The slabs of a superblock as float32, each with its own row of scales."""
    halves = form.packing.split(codes)
    out = []
    for i, half in enumerate(halves):
        # The halves are stored as slabs so that one row of scales fits each.
        values = _values(half, form, table_ref) * scale[i].astype(jnp.float32)[None, :]
        if bias is not None:
            values = values + bias[i].astype(jnp.float32)[None, :]
        out.append(values)
    return out


def _call(
    kernel: Callable, *, warps: int, stages: int, interpret: bool, **options: Any
) -> Callable:
    """`pl.pallas_call` through Triton, which later releases call deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # Named parameters choose Triton: some releases of JAX lower to Mosaic GPU without them.
        run = pl.pallas_call(
            kernel, compiler_params=_triton(warps, stages), interpret=interpret, **options
        )

    def quietly(*args: Array) -> Array:
        # The call warns as well as its making.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return run(*args)

    return quietly


def _decode_kernel(
    packed_ref: Ref,
    scale_ref: Ref,
    bias_ref: Ref | None,
    table_ref: Ref,
    *,
    out_ref: Ref,
    form: formats.Format,
) -> None:
    bias = None if bias_ref is None else [bias_ref[i, :] for i in range(bias_ref.shape[0])]
    scale = [scale_ref[i, :] for i in range(scale_ref.shape[0])]
    # Planes apart: Triton cuts no array in registers.
    codes = [packed_ref[i, :, :] for i in range(packed_ref.shape[0])]
    slabs = _slabs(codes, form, scale=scale, bias=bias, table_ref=table_ref)
    for i, slab in enumerate(slabs):
        out_ref[i, :, :] = slab.astype(out_ref.dtype)


def decode(
    w: formats.Coded, *, dtype: DTypeLike, name: formats.Pass, interpret: bool = False
) -> Float[Array, "k n"]:
    """The matrix in `dtype`, K filled up to whole superblocks.

    Args:
      w: one matrix.
      dtype: of the result.
      name: of the pass it is for, which keeps XLA from using one result in both.
      interpret: run the kernel's Python instead of compiling it.
    """
    # One for 8-bit codes, which fill a byte each.
    halves, planes = w.form.packing.slabs, w.form.packing.rows
    supers, cols = w.packed.shape[0] // (planes * w.block), w.packed.shape[1]
    run = functools.partial(
        _decode_blocks, form=w.form, dtype=jnp.dtype(dtype), name=name, interpret=interpret
    )
    parts = [w.packed.reshape(supers, planes, w.block, cols), w.scale.reshape(supers, halves, cols)]
    if w.bias is not None:
        parts.append(w.bias.reshape(supers, halves, cols))
    parts.append(jnp.asarray(_table(w.form)))
    return sharded_decode(run, *parts).reshape(supers * halves * w.block, cols)


def _decode_blocks(
    packed: Integer[AnyArray, "s p b n"],
    scale: Float[AnyArray, "s h n"],
    *rest: AnyArray,
    form: formats.Format,
    dtype: DTypeLike,
    name: formats.Pass,
    interpret: bool,
) -> Float[Array, "s h b n"]:
    """`decode` with a dim for superblocks; `rest` are perhaps biases, and the table."""
    supers, planes, block, cols = packed.shape
    halves, bn, rows = scale.shape[1], _columns(cols), min(block, _ROWS)
    if not bn:  # a shard may have an odd number of outputs where the whole has an even one
        return reference.decode_blocks(packed, scale, *rest[:-1], form=form, dtype=dtype)

    def codes_at(s: Any, r: Any, j: Any) -> tuple:
        return s, 0, r, j

    def scales_at(s: Any, r: Any, j: Any) -> tuple:
        # The rows of a block share their scale.
        return s, 0, j

    scales = pl.BlockSpec((None, halves, bn), scales_at)
    specs = [pl.BlockSpec((None, planes, rows, bn), codes_at), scales] + [scales] * (len(rest) - 1)
    specs.append(pl.BlockSpec((16,), lambda s, r, j: (0,)))

    def kernel(packed_ref: Ref, scale_ref: Ref, *refs: Ref) -> None:
        bias_ref = refs[0] if len(rest) == 2 else None
        table_ref, out_ref = refs[-2:]
        _decode_kernel(packed_ref, scale_ref, bias_ref, table_ref, out_ref=out_ref, form=form)

    run = _call(
        kernel,
        warps=4,
        # There is no loop to pipeline: a program decodes one tile.
        stages=1,
        interpret=interpret,
        grid=(supers, block // rows, cols // bn),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, halves, rows, bn), lambda s, r, j: (s, 0, r, j)),
        out_shape=jax.ShapeDtypeStruct((supers, halves, block, cols), dtype),
        name=f"quant_decode_{name}",
    )
    return run(packed, scale, *rest)


def _tile_rows(rows: int) -> int:
    """Rows of one tile; a tensor-core product has at least 16."""
    # From 64 rows the compiler takes Hopper's wgmma, which has 64.
    return min(64, max(16, 1 << math.ceil(math.log2(max(rows, 1)))))


def _split(supers: int, tiles: int) -> int:
    """Into how many parts the inputs are split, so that every multiprocessor has work."""
    # Few rows give few tiles: the aim is two programs a multiprocessor. Each part writes float32
    # sums of its own, to be added up afterwards, so there are at most 16.
    parts = [p for p in range(1, supers + 1) if supers % p == 0 and p <= 16]
    return next((p for p in parts if p * tiles >= 2 * _SMS), parts[-1])


def matmul(
    x: Float[AnyArray, "m _"],
    w: formats.Coded,
    *,
    transposed: bool,
    dtype: DTypeLike,
    interpret: bool = False,
) -> Float[Array, "m _"]:
    """`x (M, K) · w`, decoding in the same kernel, or transposed `x (M, N) · wᵀ`; float32 sums.

    The transposed product decodes first: as one kernel it took 1.5 to 9 times as long on an H200.

    Args:
      x: few rows.
      w: one matrix.
      transposed: whether outputs are contracted.
      dtype: of the result.
      interpret: run the kernel's Python instead of compiling it.
    """
    if transposed:
        dense = decode(w, dtype=x.dtype, name="backward", interpret=interpret)
        return reference.product(x, dense, transposed=True, preferred=jnp.float32).astype(dtype)
    run = functools.partial(_fused, interpret=interpret)
    table = jnp.asarray(_table(w.form))
    return sharded_matmul(run, x, w, table, transposed=False, dtype=dtype)


def _fused(
    x: Float[AnyArray, "m k"],
    w: formats.Coded,
    table: Float[AnyArray, "16"],
    *,
    dtype: DTypeLike,
    interpret: bool,
) -> Float[Array, "m n"]:
    """`matmul` of what one device has."""
    if not _columns(w.packed.shape[1]):  # as in `_decode_blocks`
        return reference.matmul(x, w, transposed=False, dtype=dtype)
    rows = x.shape[0]
    bm = _tile_rows(rows)
    # Zero rows fill the tile; their products are cut off below.
    x = jnp.pad(x, ((0, -rows % bm), (0, 0)))
    return _forward(x, w, table, bm=bm, interpret=interpret)[:rows].astype(dtype)


def _forward(
    x: Float[AnyArray, "m k"],
    w: formats.Coded,
    table: Float[AnyArray, "16"],
    *,
    bm: int,
    interpret: bool,
) -> Float[Array, "m n"]:
    """Float32 sums of tiles of `bm` rows."""
    (m, k), (stored, cols), block = x.shape, w.packed.shape, w.block
    bn, supers = _columns(cols), stored // block
    splits = _split(supers, (m // bm) * (cols // bn))
    steps = supers // splits

    def kernel(x_ref: Ref, packed_ref: Ref, *rest: Ref) -> None:
        *scale_refs, table_ref, out_ref = rest
        first = pl.program_id(2) * steps

        def body(i: Any, acc: Array) -> Array:
            j = first + i
            codes = packed_ref[pl.ds(j * block, block), :]
            read = [[ref[2 * j + h, :] for h in range(2)] for ref in scale_refs]
            bias = read[1] if len(read) > 1 else None
            slabs = _slabs([codes], w.form, scale=read[0], bias=bias, table_ref=table_ref)
            for h, slab in enumerate(slabs):
                left = x_ref[:, pl.ds((2 * j + h) * block, block)]
                # 16-bit operands for the tensor cores, sums in float32.
                acc = acc + jnp.dot(left, slab.astype(x.dtype), preferred_element_type=jnp.float32)
            return acc

        out_ref[...] = lax.fori_loop(0, steps, body, jnp.zeros((bm, bn), jnp.float32))

    scales = [part for part in (w.scale, w.bias) if part is not None]
    by_block = pl.BlockSpec((w.scale.shape[0], bn), lambda i, j, s: (0, j))
    parts = _call(
        kernel,
        warps=4,
        # Loads of the codes run two steps ahead. So do those of a table, which costs NF4 dearly:
        # each look-up becomes a copy into shared memory (see benchmarks/gpu_kernels.py).
        stages=3,
        interpret=interpret,
        grid=(m // bm, cols // bn, splits),
        in_specs=[
            pl.BlockSpec((bm, k), lambda i, j, s: (i, 0)),
            pl.BlockSpec((stored, bn), lambda i, j, s: (0, j)),
            *[by_block] * len(scales),
            pl.BlockSpec((16,), lambda i, j, s: (0,)),
        ],
        out_specs=pl.BlockSpec((None, bm, bn), lambda i, j, s: (s, i, j)),
        out_shape=jax.ShapeDtypeStruct((splits, m, cols), jnp.float32),
        name="quant_matmul_forward",
    )(x, w.packed, *scales, table)
    # The sums of the split inputs.
    return jnp.sum(parts, axis=0)
