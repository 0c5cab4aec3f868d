"""Kernels under automatic sharding: XLA cannot split an opaque call, so it is told how.

Decoding has no sums: every superblock and every output is its own. A call in several processes'
or devices' programs is wrapped in `custom_partitioning`, with codes, scales and result sharded
alike; the product that follows is XLA's own, and partitioned by it. A fused product gives XLA the
sums of its parts to add up, of which each device has its own.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def sharded_decode(run: functools.partial, *parts):
    """`run(codes (S, B, N), scales (S, t, N), ...) -> (S, t, B, N)`, on shards of S and N.

    Args:
      run: a `functools.partial` of a kernel, with hashable options.
      *parts: codes, scales, perhaps biases, and perhaps a table `(16,)`.
    """
    if jax.device_count() == 1 or _inside_shard_map():
        return run(*parts)
    dims = tuple(part.ndim for part in parts)
    return _partitioned(run.func, tuple(sorted(run.keywords.items())), dims)(*parts)


def _inside_shard_map() -> bool:
    # In a `shard_map` each device already has its own part, and the call runs as it is.
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and jax.sharding.AxisType.Manual in mesh.axis_types


@functools.cache
# Cached, so that equal options give one function, and jit does not compile it again.
def _partitioned(run: Callable, options: tuple, dims: tuple) -> Callable:
    def kernel(*parts):
        return run(*parts, **dict(options))

    wrapped = custom_partitioning(kernel)

    def result_of(mesh, arguments) -> NamedSharding:
        # Rows of a superblock stay together: `t` and `B` are never sharded.
        spec = tuple(arguments[0].sharding.spec) + (None,) * 3
        return NamedSharding(mesh, PartitionSpec(spec[0], None, None, spec[2]))

    def infer(mesh, arguments, result):
        return result_of(mesh, arguments)

    def partition(mesh, arguments, result):
        spec = tuple(result.sharding.spec) + (None,) * 4
        own = NamedSharding(mesh, PartitionSpec(spec[0], None, spec[3]))
        out = NamedSharding(mesh, PartitionSpec(spec[0], None, None, spec[3]))
        whole = NamedSharding(mesh, PartitionSpec())
        return mesh, kernel, out, tuple(own if n == 3 else whole for n in dims)

    # GSPMD calls `infer` and `partition`; Shardy reads the rule, then calls `partition`.
    wrapped.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=_rule(dims),
    )
    return wrapped


def _rule(dims: tuple) -> str:
    """Shardy's rule: superblocks `s` and outputs `n` are shared, all else is whole."""
    operands = ["s b n", *("s t n" if n == 3 else "c" for n in dims[1:])]
    return f"{', '.join(operands)} -> s t b n"


def sharded_matmul(
    run: functools.partial, x, packed, scale, bias, *tables, supers: int, transposed: bool, dtype
):
    """`run(x, codes, scales, biases or None, *tables, dtype=)`, split by rows, inputs and outputs.

    Superblocks and outputs are cut into as many groups as devices could share them. A device's own
    sum stands in the place of its first group, and XLA adds the groups up.

    Args:
      run: a `functools.partial` of a fused kernel, with hashable options.
      x: `(M, K)`, or `(M, N)` when transposed.
      packed, scale, bias: of one matrix.
      tables: one-dimensional, the same on every device.
      supers: superblocks of the matrix.
      transposed: whether outputs are contracted.
      dtype: of the result; sums are float32.

    Returns:
      `(M, N)`, or `(M, K)` when transposed.
    """
    if jax.device_count() == 1 or _inside_shard_map():
        return run(x, packed, scale, bias, *tables, dtype=dtype)
    # The greatest numbers of groups that divide both the matrix and the devices.
    rows, outputs = math.gcd(supers, jax.device_count()), packed.shape[1]
    columns = math.gcd(outputs, jax.device_count())
    codes = [
        a.reshape(rows, a.shape[0] // rows, columns, outputs // columns)
        for a in (packed, scale, bias)
        if a is not None
    ]
    grouped = x.reshape(x.shape[0], columns if transposed else rows, -1)
    options = tuple(sorted(run.keywords.items())) + (("dtype", jnp.float32),)
    split = _partitioned_matmul(run.func, options, transposed, len(codes), len(tables))
    sums = split(grouped, *codes, *tables)
    return jnp.sum(sums, axis=0).reshape(x.shape[0], -1).astype(dtype)


@functools.cache
def _partitioned_matmul(
    run: Callable, options: tuple, transposed: bool, count: int, tables: int
) -> Callable:
    """`x (M, g, c)` and codes `(g, p, h, n)` to `(g, M, h, n)`; transposed `(M, h, n)` and codes
    to `(h, M, g, c)`."""

    def kernel(x, *operands):
        rows, _, columns, _ = operands[0].shape
        parts = [a.reshape(a.shape[0] * a.shape[1], -1) for a in operands[:count]]
        parts += [None] * (3 - count)
        y = run(x.reshape(x.shape[0], -1), *parts, *operands[count:], **dict(options))
        summed, kept = (columns, rows) if transposed else (rows, columns)
        # A device adds up all its groups inside the kernel; zeros stand for the others.
        out = jnp.zeros((summed, y.shape[0], kept, y.shape[1] // kept), y.dtype)
        return out.at[0].set(y.reshape(out.shape[1:]))

    wrapped = custom_partitioning(kernel)

    def infer(mesh, arguments, result):
        rows, *_ = (*arguments[0].sharding.spec, None)
        codes = (*arguments[1].sharding.spec, *[None] * 4)
        summed, kept = (codes[2], codes[0]) if transposed else (codes[0], codes[2])
        # One mesh axis shards at most one dim of an array.
        rows = None if rows in (summed, kept) else rows
        return NamedSharding(mesh, PartitionSpec(summed, rows, kept, None))

    def partition(mesh, arguments, result):
        summed, rows, kept, *_ = (*result.sharding.spec, *[None] * 4)
        group, column = (kept, summed) if transposed else (summed, kept)
        own = NamedSharding(mesh, PartitionSpec(group, None, column, None))
        x = NamedSharding(mesh, PartitionSpec(rows, summed, None))
        out = NamedSharding(mesh, PartitionSpec(summed, rows, kept, None))
        whole = NamedSharding(mesh, PartitionSpec())
        return mesh, kernel, out, (x, *[own] * count, *[whole] * tables)

    x, out = ("m h n", "h m g c") if transposed else ("m g c", "g m h n")
    codes = ["g p h n", "g t h n", "g t h n"][:count] + ["q"] * tables
    wrapped.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{', '.join([x, *codes])} -> {out}",
    )
    return wrapped
