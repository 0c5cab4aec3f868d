"""The memory of a training run by purpose."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax


class Memory(NamedTuple):
    """Bytes by purpose, on each device of a mesh.

    Attributes:
      base: the frozen weights.
      adapters: the trained parameters.
      optimizer: the optimizer's state.
      temporary: activations and gradients: what the compiled step of the largest batch shape
        allocates beside its arguments and results; None if XLA does not report it.
      devices: number of devices of the mesh.
    """

    base: int
    adapters: int
    optimizer: int
    temporary: int | None
    devices: int = 1


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays; sub-byte elements count with their bits."""
    return sum(_bytes(x) for x in jax.tree.leaves(tree))


def _bytes(x: Any) -> int:
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        return _bytes(jax.eval_shape(jax.random.key_data, x))
    # int4 elements are packed two in a byte, but their itemsize is 1.
    try:
        bits = jax.numpy.iinfo(x.dtype).bits
    except ValueError:
        bits = x.dtype.itemsize * 8
    return -(-x.size * bits // 8)


def device_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on the device that holds most of them."""
    return sum(_bytes(_part(x)) for x in jax.tree.leaves(tree))


def _part(x: Any) -> Any:
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return jax.ShapeDtypeStruct(shape, x.dtype)


def temporary_bytes(compiled: Any) -> int | None:
    """Temporary bytes of a compiled function, as XLA reports them."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def memory(trainable: Any, frozen: Any, opt_state: Any, compiled: Iterable[Any] = ()) -> Memory:
    """The memory of training.

    Args:
      trainable: tree from `lora.split`.
      frozen: the other tree.
      opt_state: optax's state.
      compiled: the compiled steps, one for each batch shape.
    """
    temporary = [b for c in compiled if (b := temporary_bytes(c)) is not None]
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves((frozen, trainable))]
    return Memory(
        base=device_bytes(frozen),
        adapters=device_bytes(trainable),
        optimizer=device_bytes(opt_state),
        temporary=max(temporary, default=None),
        devices=max((s.num_devices for s in shardings if s is not None), default=1),
    )


def peak_bytes() -> int | None:
    """The most bytes that a device of this process has held so far; None if it counts none."""
    stats = (device.memory_stats() or {} for device in jax.local_devices())
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


def format_memory(used: Memory) -> str:
    """A table with a line for each part, in MiB, small ones in KiB."""
    rows = [
        ("base (frozen)", used.base),
        ("adapters", used.adapters),
        ("optimizer state", used.optimizer),
        ("temporary (activations, gradients)", used.temporary),
    ]
    total = sum(b for _, b in rows if b is not None)
    lines = [(name, "unknown" if b is None else _size(b)) for name, b in rows]
    each = f" on each of {used.devices} devices" if used.devices > 1 else ""
    lines.append((f"total{each}", _size(total)))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {size:>12}" for name, size in lines)


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"
