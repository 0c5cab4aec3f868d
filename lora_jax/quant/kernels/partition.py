"""Kernels under automatic sharding: XLA cannot split an opaque call, so these rules describe how.

Decoding has no sums: every superblock and every output is independent. In a program of several
devices the call is wrapped in `custom_partitioning`, with codes, scales and result sharded alike;
the product that follows is XLA's own, and XLA partitions it. A fused product returns the sums of
its parts, of which each device has its own, and XLA adds them up.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float

from lora_jax import compat
from lora_jax.dims import AnyArray
from lora_jax.quant.formats import Coded, Format


def sharded_decode(run: functools.partial, *parts: AnyArray) -> jax.Array:
    """`run(codes (S, p, B, N), scales (S, t, N), ...) -> (S, t, B, N)`, on shards of S and N.

    Args:
      run: a `functools.partial` of a kernel, with hashable options.
      *parts: codes, scales, perhaps biases, and perhaps a table `(16,)`.
    """
    if jax.device_count() == 1 or _inside_shard_map():
        return run(*parts)
    dims = tuple(part.ndim for part in parts)
    return _partitioned(run.func, tuple(sorted(run.keywords.items())), dims)(*parts)


def _inside_shard_map() -> bool:
    # In a `shard_map` over all axes each device already has its own part: the call runs as it is.
    mesh = jax.sharding.get_abstract_mesh()
    left = compat.open_axes(mesh)
    return not mesh.empty and AxisType.Manual in mesh.axis_types and not left


def spread_mesh() -> AbstractMesh | None:
    """The context's mesh if it has several devices, outside of a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or _inside_shard_map() else mesh


# Axes of `lora_jax.models.sharding` along which the devices have other rows or tokens, and use
# weights whole.
_ROWS = ("data", "fsdp", "expert", "context")


def used_whole(mesh: AbstractMesh) -> bool:
    """Whether every device of the mesh uses the weights whole."""
    others = (n for axis, n in mesh.shape.items() if axis not in _ROWS)
    return all(n == 1 for n in others) and AxisType.Explicit not in mesh.axis_types


def whole_decode(run: Callable, *parts: AnyArray) -> jax.Array:
    """`run(*parts)` by every device of the context's mesh, to which all parts are brought."""
    mesh, whole = jax.sharding.get_abstract_mesh(), PartitionSpec()
    mapped = jax.shard_map(
        run,
        in_specs=whole,
        out_specs=whole,
        axis_names=set(mesh.axis_names),
        # A kernel's results are not typed by the axes that they differ along.
        check_vma=False,
    )
    return mapped(*parts)


@functools.cache
# Cached, so that equal options give one function: jit would compile for another one again.
def _partitioned(run: Callable, options: tuple, dims: tuple[int, ...]) -> Callable:
    def kernel(*parts: AnyArray) -> jax.Array:
        return run(*parts, **dict(options))

    wrapped = custom_partitioning(kernel)

    def result_of(mesh: Mesh, arguments: tuple) -> NamedSharding:
        # Rows of a superblock stay together: `t` and `B` are never sharded.
        spec = tuple(arguments[0].sharding.spec) + (None,) * 4
        return NamedSharding(mesh, PartitionSpec(spec[0], None, None, spec[3]))

    def infer(mesh: Mesh, arguments: tuple, result: Any) -> NamedSharding:
        return result_of(mesh, arguments)

    def partition(mesh: Mesh, arguments: tuple, result: Any) -> tuple:
        # A result's spec may leave out trailing dims.
        spec = tuple(result.sharding.spec) + (None,) * 4
        own = {
            n: NamedSharding(mesh, PartitionSpec(spec[0], *[None] * (n - 2), spec[3]))
            for n in (3, 4)
        }
        out = NamedSharding(mesh, PartitionSpec(spec[0], None, None, spec[3]))
        whole = NamedSharding(mesh, PartitionSpec())
        return mesh, kernel, out, tuple(whole if n == 1 else own[n] for n in dims)

    # GSPMD calls `infer` and `partition`; Shardy reads the rule, then calls `partition`.
    wrapped.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=_rule(dims),
    )
    return wrapped


def _rule(dims: tuple[int, ...]) -> str:
    """Shardy's rule: superblocks `s` and outputs `n` may be sharded, no other dim."""
    operands = ["s p b n", *("s t n" if n == 3 else "c" for n in dims[1:])]
    return f"{', '.join(operands)} -> s t b n"


def sharded_matmul(
    run: functools.partial,
    x: Float[AnyArray, "m _"],
    w: Coded,
    *tables: AnyArray,
    transposed: bool,
    dtype: DTypeLike,
) -> Float[jax.Array, "m _"]:
    """`run(x, w, *tables, dtype=)`, split by rows, inputs and outputs.

    Superblocks and outputs are cut into groups, as many as devices can share. A device puts its sum
    in the place of its first group, and XLA adds the groups up.

    Args:
      run: a `functools.partial` of a fused kernel, with hashable options.
      x: `(M, K)`, or `(M, N)` when transposed.
      w: one matrix.
      tables: one-dimensional, the same on every device.
      transposed: whether outputs are contracted.
      dtype: of the result; sums are float32.

    Returns:
      `(M, N)`, or `(M, K)` when transposed.
    """
    if jax.device_count() == 1 or _inside_shard_map():
        return run(x, w, *tables, dtype=dtype)
    # The greatest numbers of groups that divide both the matrix and the devices.
    supers, outputs = w.packed.shape[0] // w.block, w.packed.shape[1]
    rows, columns = math.gcd(supers, jax.device_count()), math.gcd(outputs, jax.device_count())
    codes = [
        a.reshape(rows, a.shape[0] // rows, columns, outputs // columns)
        for a in (w.packed, w.scale, w.bias)
        if a is not None
    ]
    grouped = x.reshape(x.shape[0], columns if transposed else rows, -1)
    options = (*sorted(run.keywords.items()), ("dtype", jnp.float32))
    split = _partitioned_matmul(
        run.func,
        options,
        form=w.form,
        block=w.block,
        transposed=transposed,
        count=len(codes),
        tables=len(tables),
    )
    sums = split(grouped, *codes, *tables)
    return jnp.sum(sums, axis=0).reshape(x.shape[0], -1).astype(dtype)


@functools.cache
def _partitioned_matmul(
    run: Callable,
    options: tuple,
    *,
    form: Format,
    block: int,
    transposed: bool,
    count: int,
    tables: int,
) -> Callable:
    """`x (M, g, c)` and codes `(g, p, h, n)` to `(g, M, h, n)`; transposed `(M, h, n)` and codes
    to `(h, M, g, c)`.

    Args:
      run, options: the kernel, and its keywords as pairs.
      form, block: how to read the codes.
      transposed: whether outputs are contracted.
      count: arrays of the weight: codes, scales, perhaps biases.
      tables: arrays that every device has whole.
    """

    def kernel(x: AnyArray, *operands: AnyArray) -> jax.Array:
        rows, _, columns, _ = operands[0].shape
        packed, scale, *bias = (a.reshape(a.shape[0] * a.shape[1], -1) for a in operands[:count])
        w = Coded(packed, scale, bias[0] if bias else None, form=form, block=block)
        y = run(x.reshape(x.shape[0], -1), w, *operands[count:], **dict(options))
        summed, kept = (columns, rows) if transposed else (rows, columns)
        # The kernel has added up all groups of this device: the others of its places are zero.
        out = jnp.zeros((summed, y.shape[0], kept, y.shape[1] // kept), y.dtype)
        return out.at[0].set(y.reshape(out.shape[1:]))

    wrapped = custom_partitioning(kernel)

    def infer(mesh: Mesh, arguments: tuple, result: Any) -> NamedSharding:
        rows, *_ = (*arguments[0].sharding.spec, None)
        codes = (*arguments[1].sharding.spec, *[None] * 4)
        summed, kept = (codes[2], codes[0]) if transposed else (codes[0], codes[2])
        # One mesh axis shards at most one dim of an array.
        rows = None if rows in (summed, kept) else rows
        return NamedSharding(mesh, PartitionSpec(summed, rows, kept, None))

    def partition(mesh: Mesh, arguments: tuple, result: Any) -> tuple:
        # From the result's sharding back to that of the operands.
        summed, rows, kept, *_ = (*result.sharding.spec, *[None] * 4)
        group, column = (kept, summed) if transposed else (summed, kept)
        own = NamedSharding(mesh, PartitionSpec(group, None, column, None))
        x = NamedSharding(mesh, PartitionSpec(rows, summed, None))
        out = NamedSharding(mesh, PartitionSpec(summed, rows, kept, None))
        whole = NamedSharding(mesh, PartitionSpec())
        return mesh, kernel, out, (x, *[own] * count, *[whole] * tables)

    # As in `_rule`; `q` is a table's only dim.
    x, out = ("m h n", "h m g c") if transposed else ("m g c", "g m h n")
    codes = ["g p h n", "g t h n", "g t h n"][:count] + ["q"] * tables
    wrapped.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{', '.join([x, *codes])} -> {out}",
    )
    return wrapped
