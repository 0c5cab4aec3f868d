"""Kernels under automatic sharding: XLA cannot split an opaque call, so it is told how.

Decoding has no sums: every superblock and every output is its own. A call in several processes'
or devices' programs is wrapped in `custom_partitioning`, with codes, scales and result sharded
alike; the product that follows is XLA's own, and partitioned by it.
"""

import functools
from collections.abc import Callable

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def sharded_decode(run: Callable, *parts):
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
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and jax.sharding.AxisType.Manual in mesh.axis_types


@functools.cache
def _partitioned(run: Callable, options: tuple, dims: tuple) -> Callable:
    def kernel(*parts):
        return run(*parts, **dict(options))

    wrapped = custom_partitioning(kernel)

    def result_of(mesh, arguments) -> NamedSharding:
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
