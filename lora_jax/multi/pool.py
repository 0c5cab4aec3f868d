"""Adapters paged between host and device: as many on the device as a byte budget holds.

The device holds one stack with a fixed number of slots, so shapes stay when adapters come and go,
and nothing is compiled again. A new adapter replaces the least recently used one.
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
from lora_jax.config.arguments import check_count, kind_of
from lora_jax.multi.single import stack_of_one
from lora_jax.multi.stack import adapter_fields, stack


class AdapterPool:
    """Named adapters, loaded at their first use; the most recently used are on the device.

    Threads may share a pool: every method may be called at any time.

    - The tree and the slots that `lookup` returns belong together, whatever other threads load or
      evict later. While the tree is referenced, the next adapter goes into a copy of the stack, so
      drop the tree after use: each one that is kept takes `byte_budget` again. Keep no single array
      of a tree that is dropped: the next adapter overwrites it.
    - `ids` and `stacked` are two calls. If another thread changes the slots between them, `stacked`
      raises.
    - An adapter that cannot be loaded, does not fit, or holds NaN or an infinity raises in the call
      that needs it, and changes nothing. The next call that needs it loads it again.
    - `load` runs in the pool's own threads, once for all callers that wait for the same adapter.

    Example:
      pool = AdapterPool(template, load, byte_budget=2 << 30)
      stacked, ids = pool.lookup(["ann", "bob", None, "ann"])        # None is the plain base
      y = run(stacked, tokens, adapter_ids=ids)

    Attributes:
      slots: how many adapters the device holds at once.
      loads: how many adapters have been copied to the device so far.
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
    ) -> None:
        """Allocates the stack; no adapter is loaded yet.

        Args:
          template: a tree over the shared base, with a LoRA leaf wherever an adapter may have
            one; its numbers are not used.
          load: `f(name)` that returns an adapter's tree, such as
            `lambda name: load_peft(folder / name, ...)[0]`; it is called in other threads.
          byte_budget: bytes of device memory for adapters, without the base.
          rank: the largest rank an adapter may have; the template's by default.
          host: how many adapters are kept in the host's memory.
          workers: number of threads that load.

        Raises:
          ValueError: the budget does not hold one adapter, or a number is no integer in range.
          TypeError: `load` is no function.
        """
        if not callable(load):
            raise TypeError(f"`load` must be a function of a name, got {kind_of(load)}")
        byte_budget = check_count("byte_budget", byte_budget)
        rank = rank if rank is None else check_count("rank", rank)
        host, workers = check_count("host", host, least=0), check_count("workers", workers)
        blank = _emptied(stack([template], rank=rank))
        size = sum(x.nbytes for x in _arrays(blank))
        if byte_budget < size:
            raise ValueError(
                f"`byte_budget` is {byte_budget:,} bytes, but one adapter like `template` takes "
                f"{size:,}: raise the budget, or lower `rank` or the number of targets"
            )
        # Ranks are padded, so every adapter takes the same number of bytes.
        self.slots = byte_budget // size
        self.loads = 0
        # A stack of one adapter, for its shapes. Its arrays are never donated.
        self._form = blank
        self._device = [
            jnp.repeat(x, self.slots, axis)
            for x, axis in zip(_arrays(blank), _axes(blank), strict=True)
        ]
        # Leaves in the hands of callers whose arrays are those of `_device`.
        self._handed_out: list[weakref.ref] = []
        self._where: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._free = list(range(self.slots))
        # Adapters in the host's memory, and those still loading.
        self._host: OrderedDict[str, Future[list[np.ndarray]]] = OrderedDict()
        self._load, self._host_room = load, host
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="adapters")
        # Guards all of the above. It is released while a call waits for a load.
        self._lock = threading.RLock()
        self._evictions = 0
        self._used = threading.local()  # `loads` at the thread's last call of `ids`
        self._ids_called = False
        put = functools.partial(_put, _axes(blank))
        self._put_copy = jax.jit(put)
        # Donated, so that the new stack uses the old one's memory, not the budget twice.
        self._put_in_place = jax.jit(put, donate_argnums=(0,))

    @property
    def stacked(self) -> PyTree:
        """The stack for `lorafy(fn)(stacked, ..., adapter_ids=)`.

        Raises:
          RuntimeError: slots have changed since this thread called `ids`.
        """
        with self._lock:
            if self._ids_called and getattr(self._used, "loads", None) != self.loads:
                raise RuntimeError(
                    "`pool.stacked` was read after another thread put an adapter on the device, so "
                    "the slots from this thread's `pool.ids` may hold other adapters now: where "
                    "threads share a pool, use `stacked, ids = pool.lookup(names)`"
                )
            return self._hand_out()

    def prefetch(self, names: Sequence[str | None]) -> dict[str, Future]:
        """Starts to load adapters into the host's memory, in other threads.

        Returns:
          A future for each adapter that is not on the device, pending or done.
        """
        with self._lock:
            # A dict keeps its order, so loads start in the order of the rows.
            wanted = _wanted(names)
            futures = {name: self._future(name) for name in wanted if name not in self._where}
            self._trim_host()
            return futures

    def lookup(
        self, names: Sequence[str | None], *, keep: Sequence[str] = ()
    ) -> tuple[PyTree, np.ndarray]:
        """The stack and each adapter's slot in it; those not on the device are put there first.

        Args:
          names: one for each row of the batch; None is the plain base.
          keep: adapters that must keep their slots, if they have one.

        Returns:
          The stack, which later calls do not change, and int32 (rows,) for `adapter_ids`.

        Raises:
          ValueError: there are more adapters than slots; or one does not fit the template, or
            holds NaN or an infinity. No slot changes.
          Exception: what `load` raised.
        """
        with self._lock:
            self._make_room(names, keep)
            return self._hand_out(), self._slots_of(names)

    def ids(self, names: Sequence[str | None], *, keep: Sequence[str] = ()) -> np.ndarray:
        """The slots of `lookup` alone; the same thread reads `stacked` next."""
        with self._lock:
            self._make_room(names, keep)
            self._ids_called, self._used.loads = True, self.loads
            return self._slots_of(names)

    def evict(self, name: str) -> None:
        """Drops an adapter, such as one whose file has changed: its next use loads it again.

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
        """Puts adapters on the device. The caller holds the lock once; loads release it."""
        wanted = _wanted(names)
        loaded: dict[str, list[np.ndarray]] = {}
        evictions = self._evictions
        while True:
            held = {*wanted, *(name for name in keep if name in self._where)}
            if len(held) > self.slots:
                raise ValueError(
                    f"{len(held)} different adapters are needed at once, but the byte budget holds "
                    f"{self.slots}: raise `byte_budget`, or serve fewer at a time"
                )
            if evictions != self._evictions:  # what was loaded before may be out of date
                loaded, evictions = {}, self._evictions
            missing = [x for x in wanted if x not in self._where and x not in loaded]
            if not missing:
                break
            futures = {name: self._future(name) for name in missing}
            # Other threads may change every slot meanwhile, hence the loop.
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
        """The loading of an adapter, which starts if it is not in the host's memory."""
        future = self._host.get(name)
        # A load that failed is tried again: the file may have been repaired.
        if future is None or (future.done() and future.exception() is not None):
            future = self._host[name] = self._threads.submit(self._read, name)
        self._host.move_to_end(name)
        return future

    def _trim_host(self) -> None:
        # Loads under way stay: a caller waits for them.
        done = [name for name, future in self._host.items() if future.done()]
        for name in done[: max(len(done) - self._host_room, 0)]:
            del self._host[name]

    def _read(self, name: str) -> list[np.ndarray]:
        try:
            tree = self._load(name)
        except KeyError as error:  # whose text is the key alone
            raise KeyError(f"adapter `{name}` cannot be loaded: {error!r}") from error
        except Exception:
            raise
        except BaseException as error:
            # SystemExit would end the thread that waits for the adapter.
            raise RuntimeError(f"loading adapter `{name}` ended with {error!r}") from error
        try:
            return _on_host(self._form, tree)
        except Exception as error:
            raise ValueError(f"adapter `{name}` cannot be used: {error}") from error

    def _place(self, name: str, arrays: list[np.ndarray], held: set[str]) -> None:
        # The first is the least recently used.
        old = None if self._free else next(x for x in self._where if x not in held)
        slot = self._free[0] if old is None else self._where[old]
        # A caller still holds the stack: it must not change under it.
        shared = any(ref() is not None for ref in self._handed_out)
        put = self._put_copy if shared else self._put_in_place
        self._device = put(self._device, arrays, jnp.int32(slot))
        self._handed_out = []
        if old is None:
            self._free.pop(0)
        else:
            del self._where[old]
        self._where[name] = slot
        self.loads += 1

    def _hand_out(self) -> PyTree:
        """The stack as a new tree, whose leaves `_place` keeps weak references to."""
        stacked = _with_arrays(self._form, self._device)
        self._handed_out = [ref for ref in self._handed_out if ref() is not None]
        self._handed_out += [weakref.ref(x) for x in _stacks(stacked)]
        return stacked


def _wanted(names: Sequence[str | None]) -> list[str]:
    """The adapters of a batch's rows, once each and in the rows' order."""
    if not isinstance(names, Sequence | np.ndarray) or isinstance(names, str):
        raise TypeError(f"`names` must be a list of adapters, one a row, got {kind_of(names)}")
    for name in names:
        if not isinstance(name, str | None):
            raise TypeError(f"`names` has {name!r}, which is neither an adapter's name nor None")
    return [name for name in dict.fromkeys(names) if name is not None]


def _on_host(form: PyTree, adapter: PyTree) -> list[np.ndarray]:
    """An adapter's arrays in the shapes of the stack, so that one copy puts them on the device.

    Raises:
      ValueError: the tree has no LoRA leaf, does not fit the stack, or is not finite.
    """
    if not any(is_lora(x) for x in jax.tree.leaves(adapter, is_leaf=is_lora)):
        raise ValueError(
            "`load` returned a tree without a LoRA leaf, expected one such as `load_peft` returns; "
            "for the plain base use the name None"
        )
    one = stack_of_one(form, adapter)
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(one, is_leaf=is_leaf)[0]:
        for field in adapter_fields(leaf) if is_stack(leaf) else ():
            array = np.asarray(getattr(leaf, field))
            # After the cast to the stack's dtype, in which a large number may overflow.
            if not np.isfinite(array).all():
                raise ValueError(
                    f"`{field}` of `{paths.spell(path)}` holds NaN or an infinity (in "
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
    """The adapters' axis of each array of `_arrays`."""
    return [x.axis for x in _stacks(stacked) for _ in adapter_fields(x)]


def _with_arrays(stacked: PyTree, arrays: Sequence) -> PyTree:
    """A stack with other arrays, in the order of `_arrays`."""
    rest = iter(arrays)

    def fill(x: Any) -> Any:
        if not is_stack(x):
            return x
        return dataclasses.replace(x, **{name: next(rest) for name in adapter_fields(x)})

    return jax.tree.map(fill, stacked, is_leaf=is_lora)


def _put(axes: Sequence[int], arrays: list, new: list, slot: Array) -> list:
    """The arrays with one adapter's in a slot; `slot` is traced, so one program serves all."""
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
