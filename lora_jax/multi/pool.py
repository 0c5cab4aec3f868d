"""Adapters paged between host and device: as many on the device as a byte budget holds.

The device holds one stack with a fixed number of slots, so shapes stay when adapters come and go,
and nothing is compiled again. The adapter that was not used for longest gives up its slot.
"""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from lora_jax.array import is_lora, is_stack
from lora_jax.multi.single import stack_of_one
from lora_jax.multi.stack import adapter_fields, stack


class AdapterPool:
    """Named adapters, loaded at their first use; those used last are on the device.

    Example:
      pool = AdapterPool(template, load, byte_budget=2 << 30)
      ids = pool.ids(["ann", "bob", None, "ann"])        # None is the plain base
      y = run(pool.stacked, tokens, adapter_ids=ids)

    Attributes:
      stacked: the tree for `lorafy(fn)(stacked, ..., adapter_ids=)`; `ids` replaces it.
      slots: how many adapters the device holds at once.
      loads: how many adapters have been put on the device so far.
    """

    def __init__(
        self,
        template: Any,
        load: Callable[[str], Any],
        *,
        byte_budget: int,
        rank: int | None = None,
        host: int = 4096,
        workers: int = 2,
    ):
        """Allocates the stack; no adapter is loaded yet.

        Args:
          template: a tree over the shared base, with a LoRA leaf wherever an adapter may have
            one; its numbers are not used.
          load: `f(name)` that gives an adapter's tree, such as
            `lambda name: load_peft(folder / name, ...)[0]`; it is called in other threads.
          byte_budget: bytes of the device for adapters, without the base.
          rank: the largest rank an adapter may have; the template's by default.
          host: how many adapters are kept in the host's memory.
          workers: threads that load.

        Raises:
          ValueError: the budget does not hold one adapter.
        """
        blank = _emptied(stack([template], rank=rank))
        size = sum(x.nbytes for x in _arrays(blank))
        if byte_budget < size:
            raise ValueError(
                f"`byte_budget` is {byte_budget:,} bytes, but one adapter of this form takes "
                f"{size:,}: raise the budget, or lower the rank or the number of targets"
            )
        # Ranks are padded, so every adapter takes the same number of bytes.
        self.slots = byte_budget // size
        self.stacked = _widened(blank, self.slots)
        self.loads = 0
        # For the loading threads: `stacked` itself is donated when an adapter is put into it.
        self._form = blank
        self._load, self._host_room = load, host
        self._where: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._host: OrderedDict[str, list[np.ndarray]] = OrderedDict()
        self._coming: dict[str, Future] = {}
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="adapters")
        # Donated: the new stack takes the old one's memory, and the budget is not needed twice.
        self._put = jax.jit(functools.partial(_put, _axes(blank)), donate_argnums=(0,))

    def prefetch(self, names: Sequence[str | None]) -> None:
        """Starts to load adapters into the host's memory, in other threads."""
        # A set that keeps its order: loads start in the order of the rows.
        for name in dict.fromkeys(names):
            if name is None or name in self._where or name in self._host or name in self._coming:
                continue
            self._coming[name] = self._threads.submit(self._read, name)

    def ids(self, names: Sequence[str | None], *, keep: Sequence[str] = ()) -> np.ndarray:
        """The slot of each adapter; those that are not on the device are put there first.

        Args:
          names: one a row; None is the plain base.
          keep: adapters that must keep their slots, such as those of rows still running.

        Returns:
          int32 (rows,), for `adapter_ids`.

        Raises:
          ValueError: there are more adapters than slots, or one does not fit the template; no
            slot has changed then.
        """
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        held = {*wanted, *(name for name in keep if name in self._where)}
        if len(held) > self.slots:
            raise ValueError(
                f"{len(held)} different adapters are needed at once, but the byte budget holds "
                f"{self.slots}: raise `byte_budget`, or serve fewer at a time"
            )
        self.prefetch(wanted)
        # All are loaded and checked before the first slot changes.
        ready = {name: self._on_host(name) for name in wanted if name not in self._where}
        for name, arrays in ready.items():
            self._place(name, arrays, held)
        for name in wanted:
            self._where.move_to_end(name)
        return np.array([-1 if name is None else self._where[name] for name in names], np.int32)

    def resident(self) -> list[str]:
        """The adapters on the device, least recently used first."""
        return list(self._where)

    def _read(self, name: str) -> list[np.ndarray]:
        one = stack_of_one(self._form, self._load(name))
        # On the host, in the stack's form: putting it on the device is one copy.
        return [np.asarray(x) for x in _arrays(one)]

    def _on_host(self, name: str) -> list[np.ndarray]:
        if name in self._coming:
            self._host[name] = self._coming.pop(name).result()
        self._host.move_to_end(name)
        while len(self._host) > self._host_room:
            self._host.popitem(last=False)
        return self._host[name]

    def _place(self, name: str, arrays: list[np.ndarray], held: set[str]) -> None:
        if len(self._where) < self.slots:
            slot = len(self._where)
        else:
            # The first is the one that was not used for longest.
            old = next(other for other in self._where if other not in held)
            slot = self._where.pop(old)
        mine = self._put(_arrays(self.stacked), arrays, jnp.int32(slot))
        self.stacked = _with_arrays(self.stacked, mine)
        self._where[name] = slot
        self.loads += 1


def _stacks(stacked: PyTree) -> list:
    return [x for x in jax.tree.leaves(stacked, is_leaf=is_lora) if is_stack(x)]


def _arrays(stacked: PyTree) -> list:
    """The arrays of a stack that belong to adapters, in a fixed order."""
    return [getattr(x, name) for x in _stacks(stacked) for name in adapter_fields(x)]


def _axes(stacked: PyTree) -> list[int]:
    return [x.axis for x in _stacks(stacked) for _ in adapter_fields(x)]


def _with_arrays(stacked: PyTree, arrays: Sequence) -> PyTree:
    rest = iter(arrays)

    def fill(x: Any) -> Any:
        if not is_stack(x):
            return x
        return dataclasses.replace(x, **{name: next(rest) for name in adapter_fields(x)})

    return jax.tree.map(fill, stacked, is_leaf=is_lora)


def _put(axes: Sequence[int], arrays: list, new: list, slot: Array) -> list:
    return [
        lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), slot, axis)
        for x, y, axis in zip(arrays, new, axes, strict=True)
    ]


def _emptied(stacked: PyTree) -> PyTree:
    """A stack of one with its slot emptied: zeros, and gains of 1."""
    blank = [
        jnp.full_like(x, 1 if name == "gain" else 0)
        for leaf in _stacks(stacked)
        for name, x in ((name, getattr(leaf, name)) for name in adapter_fields(leaf))
    ]
    return _with_arrays(stacked, blank)


def _widened(blank: PyTree, slots: int) -> PyTree:
    axes = _axes(blank)
    return _with_arrays(
        blank, [jnp.repeat(x, slots, axis) for x, axis in zip(_arrays(blank), axes, strict=True)]
    )
