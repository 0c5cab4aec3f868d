"""Adapters paged between host and device: as many on the device as a byte budget holds.

The device holds one stack with a fixed number of slots, so shapes stay when adapters come and go,
and nothing is compiled again. The adapter that was not used for longest gives up its slot.
"""

import dataclasses
import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from lora_jax import paths
from lora_jax.array import LoraStack, SavedStack, is_leaf, is_lora, is_stack
from lora_jax.multi.single import stack_of_one
from lora_jax.multi.stack import adapter_fields, stack


class AdapterPool:
    """Named adapters, loaded at their first use; those used last are on the device.

    Threads may share a pool: every method may be called at any time, and

    - what `lookup` returns belongs together and stays as it is, whatever other threads load or
      evict. While the tree is referenced, the next adapter that is put on the device goes into a
      copy of it, so drop the tree after use: each one that is kept takes `byte_budget` again. Of
      a tree that has been dropped, single arrays do not stay.
    - `ids` and `stacked` are two calls, between which another thread may give the slot to another
      adapter: `stacked` is then an error.
    - an adapter that cannot be loaded, does not fit or holds NaN or an infinity raises in the call
      that needs it and changes nothing; the next call that needs it loads it again.
    - `load` runs in the pool's own threads, once for all that wait for the same adapter.

    Example:
      pool = AdapterPool(template, load, byte_budget=2 << 30)
      stacked, ids = pool.lookup(["ann", "bob", None, "ann"])        # None is the plain base
      y = run(stacked, tokens, adapter_ids=ids)

    Attributes:
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
        self.loads = 0
        # A stack of one: its shapes are an adapter's, and it is never donated.
        self._form = blank
        self._device = [
            jnp.repeat(x, self.slots, axis)
            for x, axis in zip(_arrays(blank), _axes(blank), strict=True)
        ]
        self._given: list[weakref.ref] = []  # leaves handed out whose arrays are in `_device`
        self._where: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._free = list(range(self.slots))
        # Adapters in the host's memory, those still loading among them.
        self._host: OrderedDict[str, Future[list[np.ndarray]]] = OrderedDict()
        self._load, self._host_room = load, host
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="adapters")
        # Guards all of the above. Nothing waits for a load while it is held.
        self._lock = threading.RLock()
        self._evictions = 0
        self._used = threading.local()  # `loads` at the thread's last call of `ids`
        self._ids_called = False
        put = functools.partial(_put, _axes(blank))
        self._put_copy = jax.jit(put)
        # Donated: the new stack takes the old one's memory, and the budget is not needed twice.
        self._put_in_place = jax.jit(put, donate_argnums=(0,))

    @property
    def stacked(self) -> PyTree:
        """The stack for `lorafy(fn)(stacked, ..., adapter_ids=)`.

        Raises:
          RuntimeError: `ids` has been called, and slots have changed since this thread called it.
        """
        with self._lock:
            if self._ids_called and getattr(self._used, "loads", None) != self.loads:
                raise RuntimeError(
                    "`pool.stacked` was read after another thread put an adapter on the device, so "
                    "the slots from this thread's `pool.ids` may hold other adapters now: use "
                    "`stacked, ids = pool.lookup(names)` where threads share a pool"
                )
            return self._hand_out()

    def prefetch(self, names: Sequence[str | None]) -> dict[str, Future]:
        """Starts to load adapters into the host's memory, in other threads.

        Returns:
          For each adapter that is not on the device its loading, under way or done.
        """
        with self._lock:
            # A dict keeps its order: loads start in the order of the rows.
            wanted = [name for name in dict.fromkeys(names) if name is not None]
            futures = {name: self._future(name) for name in wanted if name not in self._where}
            self._trim_host()
            return futures

    def lookup(
        self, names: Sequence[str | None], *, keep: Sequence[str] = ()
    ) -> tuple[PyTree, np.ndarray]:
        """The stack and each adapter's slot in it; those not on the device are put there first.

        Args:
          names: one a row; None is the plain base.
          keep: adapters that must keep their slots, if they have one.

        Returns:
          The stack, which later calls do not change, and int32 (rows,) for `adapter_ids`.

        Raises:
          ValueError: there are more adapters than slots; or one does not fit the template, or
            holds NaN or an infinity. No slot has changed then.
          Exception: what `load` raised.
        """
        with self._lock:
            self._make_room(names, keep)
            return self._hand_out(), self._slots_of(names)

    def ids(self, names: Sequence[str | None], *, keep: Sequence[str] = ()) -> np.ndarray:
        """The slots of `lookup` alone, for `stacked` as the same thread reads it next."""
        with self._lock:
            self._make_room(names, keep)
            self._ids_called, self._used.loads = True, self.loads
            return self._slots_of(names)

    def evict(self, name: str) -> None:
        """Forgets an adapter, such as one whose file has changed: its next use loads it again.

        Stacks that were handed out before keep it.
        """
        with self._lock:
            self._evictions += 1
            self._host.pop(name, None)
            if name in self._where:
                self._free.append(self._where.pop(name))

    def resident(self) -> list[str]:
        """The adapters on the device, least recently used first."""
        with self._lock:
            return list(self._where)

    def _make_room(self, names: Sequence[str | None], keep: Sequence[str]) -> None:
        """Puts the adapters on the device. The lock is held once, and released during loads."""
        wanted = [name for name in dict.fromkeys(names) if name is not None]
        loaded: dict[str, list[np.ndarray]] = {}
        evictions = self._evictions
        while True:
            held = {*wanted, *(name for name in keep if name in self._where)}
            if len(held) > self.slots:
                raise ValueError(
                    f"{len(held)} different adapters are needed at once, but the byte budget holds "
                    f"{self.slots}: raise `byte_budget`, or serve fewer at a time"
                )
            if evictions != self._evictions:  # what has been loaded may be out of date
                loaded, evictions = {}, self._evictions
            missing = [x for x in wanted if x not in self._where and x not in loaded]
            if not missing:
                break
            futures = {name: self._future(name) for name in missing}
            # Others may change every slot meanwhile, hence the loop.
            self._lock.release()
            try:
                loaded |= {name: future.result() for name, future in futures.items()}
            finally:
                self._lock.acquire()
        for name in wanted:
            if name not in self._where:
                self._place(name, loaded[name], held)
            self._where.move_to_end(name)
        self._trim_host()

    def _slots_of(self, names: Sequence[str | None]) -> np.ndarray:
        return np.array([-1 if name is None else self._where[name] for name in names], np.int32)

    def _future(self, name: str) -> Future[list[np.ndarray]]:
        future = self._host.get(name)
        if future is None or (future.done() and future.exception() is not None):
            future = self._host[name] = self._threads.submit(self._read, name)
        self._host.move_to_end(name)
        return future

    def _trim_host(self) -> None:
        done = [name for name, future in self._host.items() if future.done()]
        for name in done[: max(len(done) - self._host_room, 0)]:
            del self._host[name]

    def _read(self, name: str) -> list[np.ndarray]:
        try:
            tree = self._load(name)
        except Exception:
            raise
        except BaseException as error:
            # SystemExit would end the thread that waits, which did nothing wrong.
            raise RuntimeError(f"loading adapter `{name}` ended with {error!r}") from error
        try:
            return _on_host(self._form, tree)
        except Exception as error:
            raise ValueError(f"adapter `{name}` cannot be used: {error}") from error

    def _place(self, name: str, arrays: list[np.ndarray], held: set[str]) -> None:
        # The first is the one that was not used for longest.
        old = None if self._free else next(x for x in self._where if x not in held)
        slot = self._free[0] if old is None else self._where[old]
        shared = any(ref() is not None for ref in self._given)
        put = self._put_copy if shared else self._put_in_place
        self._device = put(self._device, arrays, jnp.int32(slot))
        self._given = []
        if old is None:
            self._free.pop(0)
        else:
            del self._where[old]
        self._where[name] = slot
        self.loads += 1

    def _hand_out(self) -> PyTree:
        """The stack, of leaves that tell `_place` whether anybody still holds it."""
        stacked = _with_arrays(self._form, self._device)
        self._given = [ref for ref in self._given if ref() is not None]
        self._given += [weakref.ref(x) for x in _stacks(stacked)]
        return stacked


def _on_host(form: PyTree, adapter: PyTree) -> list[np.ndarray]:
    """An adapter's arrays in the stack's form: putting them on the device is one copy.

    Raises:
      ValueError: it has no LoRA leaf, does not fit the stack, or is not finite.
    """
    if not any(is_lora(x) for x in jax.tree.leaves(adapter, is_leaf=is_lora)):
        raise ValueError(
            "`load` gave a tree without a LoRA leaf, expected one such as `load_peft` returns; the "
            "plain base is the name None"
        )
    one = stack_of_one(form, adapter)
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(one, is_leaf=is_leaf)[0]:
        for field in adapter_fields(leaf) if is_stack(leaf) else ():
            array = np.asarray(getattr(leaf, field))
            # After the cast to the stack's dtype, in which a large number may overflow.
            if not np.isfinite(array).all():
                raise ValueError(
                    f"`{field}` of `{paths.spell(path)}` holds NaN or an infinity (as "
                    f"{array.dtype}): train or export that adapter again"
                )
            found.append(array)
    return found


def _stacks(stacked: PyTree) -> list[LoraStack | SavedStack]:
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
