"""What the processes of one run do together, where `jax.distributed` has joined several.

All processes run the same program on the same global arrays. The first one writes the files. What
each process finds by itself, such as its arguments, its data and a folder's content, is compared
before it is used: processes that go different ways wait for each other in the next collective.
With a single process every function here does nothing beside its own work.
"""

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.core
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

T = TypeVar("T")

# JAX's defaults are 100 and 300 s. A process that is alive answers within milliseconds, also while
# it compiles: the heartbeat is a thread of its own.
HEARTBEAT = 30
# For the exit after the last step, where process 0 may still write the adapter.
SHUTDOWN = 300
PATIENCE = 10  # seconds that a failed process waits for the others to fail too
# Seconds that a process waits for the others at the beginning, and between lines that say so.
JOINING = 300
REMINDER = 20


def join(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a run; without arguments as the cluster's scheduler describes it.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: their number.
      process_id: the number of this one, from 0.

    Raises:
      ValueError: only some of the arguments are given, the address has no port, the number is none
        of a process, or there is no scheduler that JAX detects.
      RuntimeError: JAX has started its devices already.
      SystemExit: the other processes do not come within five minutes; the process ends at once,
        as JAX waits where Python cannot raise an error.
    """
    given = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise ValueError(
                f"`{missing[0]}` is missing: give `coordinator`, `processes` and `process_id`, or "
                "none of them where a scheduler (SLURM, Open MPI, Kubernetes, a TPU pod) has them"
            )
    if processes is not None and process_id is not None and not 0 <= process_id < processes:
        raise ValueError(
            f"`process_id` is {process_id}, and `processes` is {processes}: the processes are "
            "numbered from 0 to one less than there are"
        )
    if coordinator is not None and not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise ValueError(
            f"`coordinator` must be HOST:PORT of process 0, such as host0:1234, got {coordinator!r}"
        )
    # JAX's handler of SIGTERM would swallow the signal while a model loads; `fit` has its own.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _said_to_wait(coordinator, processes, process_id):
            jax.distributed.initialize(
                coordinator_address=coordinator,
                num_processes=processes,
                process_id=process_id,
                # JAX aborts with a text of C++: not before these lines.
                initialization_timeout=JOINING + 60,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=SHUTDOWN,
            )
    except ValueError as error:
        raise ValueError(
            f"`distributed` found no cluster ({error}): give `coordinator`, `processes` and "
            "`process_id`"
        ) from error


@contextlib.contextmanager
def _said_to_wait(address: str | None, count: int | None, number: int | None) -> Iterator[None]:
    """Says on stderr what the process waits for, and ends it where that does not come."""
    joined, waited = threading.Event(), 0
    own = "this process" if number is None else f"process {number}"
    others = "the others" if count is None else f"the other {count - 1}"
    place = "" if address is None else f" at {address}"
    what = f"{own} of the run waits for {others}{place}"
    # JAX aborts a process that another one has taken the place of, and Python cannot say why then.
    print(
        f"{own} joins the run{place}; if it aborts here, another one has its process id, or other "
        "processes were given another number of processes",
        file=sys.stderr, flush=True,
    )  # fmt: skip

    def watch() -> None:
        nonlocal waited
        while waited < JOINING:
            step = min(REMINDER, JOINING - waited)
            if joined.wait(step):
                return
            waited += step
            print(f"{what}: {waited:g} of {JOINING} s", file=sys.stderr, flush=True)
        print(
            f"error: {what}, which have not come: start all of them with the same coordinator and "
            "number of processes and with process ids of their own; see whether one has failed, "
            "or a firewall is between the hosts",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        sys.stdout.flush()
        os._exit(1)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        joined.set()
        watching.join()


def several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes the files of a run."""
    return jax.process_index() == 0


def exchange(value: Any, at: str = "") -> list[Any]:
    """The JSON values that all processes pass, in the order of the processes.

    Args:
      value: of this process.
      at: the public function that calls this first, where processes may still go different ways.

    Raises:
      ValueError: the processes have reached different functions.
    """
    if not several():
        return [value]
    rows = _gathered([at, value])
    for number, (other, _) in enumerate(rows):
        if other != rows[0][0]:
            raise ValueError(
                "the processes go different ways: process 0 has reached "
                f"{_named(rows[0][0])} and process {number} {_named(other)}; all of them must call "
                "the same functions in the same order, with meshes of the same devices"
            )
    return [each for _, each in rows]


def _named(at: str) -> str:
    return f"`{at}`" if at else "something else"


def _gathered(value: Any) -> list[Any]:
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    # A gather needs one shape in all processes.
    padded = np.zeros(max(sizes), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def by_first(do: Callable[[], Any]) -> None:
    """Calls a function in process 0 alone, such as one that writes; all wait for it.

    Raises:
      Exception: what it raised; an OSError with that text in the other processes.
    """
    together(lambda: do() if is_first() else None)


def in_first(call: Callable[..., None]) -> Callable[..., None]:
    """The function itself in process 0; one that does nothing in the others, as for a log."""
    return call if is_first() else _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What the other processes do, whose texts would repeat those of the first."""


def check_same(found: Mapping[str, str], at: str = "") -> None:
    """Checks that all processes have the same values.

    Args:
      found: values by name, as this process has them.
      at: as in `exchange`.

    Raises:
      ValueError: they differ; in every process, with the first name.
    """
    first, *others = exchange(dict(found), at)
    for number, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"the processes disagree: `{name}` is {first.get(name)} in process 0 and "
                    f"{other.get(name)} in process {number}; start all of them with the same "
                    "arguments and files"
                )


def together(do: Callable[[], T], error: type[Exception] = OSError, at: str = "") -> T:
    """Calls a function in every process, and raises in all of them if it raises in any.

    Args:
      do: it must not wait for other processes.
      error: what the processes raise in which it did not raise.
      at: as in `exchange`.
    """
    if not several():
        return do()
    try:
        result, failure = do(), None
    except Exception as raised:
        result, failure = None, raised
    texts = exchange(None if failure is None else " ".join(str(failure).split()), at)
    if failure is not None:
        raise failure
    for number, text in enumerate(texts):
        if text is not None:
            raise error(f"process {number}: {text}")
    return result  # pyright: ignore[reportReturnType]


def write_in_first(values: Iterator[T], write: Callable[[Iterator[T]], None]) -> None:
    """Calls `write(values)` in the first process, where it takes all processes to make the values.

    Args:
      values: an iterator of each process, which exchanges data with the others at every value.
      write: takes the values one after the other.

    Raises:
      OSError: it failed in the first process, which raises its own error.
    """

    def do() -> None:
        try:
            if is_first():
                write(values)
        finally:
            # The others wait for this process at every value, also after a failure.
            for _ in values if several() else ():
                pass

    together(do)


def put(x: Any, where: Sharding) -> jax.Array:
    """`jax.device_put` for a mesh that may span processes, each of which has the whole of `x`.

    JAX's own compares `x` over the processes first, which sends all of it, and refuses arrays that
    are committed to a device.
    """
    traced = isinstance(x, jax.core.Tracer)
    if not traced and not getattr(x, "is_fully_addressable", True) and x.is_fully_replicated:
        # What is computed while a mesh is in use lies on all of it.
        x = x if x.sharding == where else x.addressable_data(0)
    if traced or where.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, where)
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(x), where)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def whole(x: Any) -> Any:
    """An array with all of its elements in this process; others hold parts of it before.

    All processes have to call it for the same arrays in the same order.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    return multihost_utils.process_allgather(x, tiled=True)


def summed(parts: np.ndarray) -> np.ndarray:
    """The sum over processes of an array of bytes, each of which only one of them has set."""
    if not several():
        return parts
    return multihost_utils.process_allgather(parts).sum(axis=0, dtype=np.uint8)


@contextlib.contextmanager
def reachable() -> Iterator[None]:
    """Explains the error of a collective whose other processes have ended.

    Where the collective waits instead, as on GPUs, the heartbeat ends this process, with a text of
    JAX's own.

    Raises:
      ConnectionError: in place of XLA's error.
    """
    try:
        yield
    except Exception as error:
        # JAX and Orbax raise it under several types; an OSError is what this raises.
        found = None if isinstance(error, OSError) else unreachable(error)
        if found is None:
            raise
        raise found from error


def unreachable(error: Exception) -> ConnectionError | None:
    """The error to raise in place of that of a collective whose other processes have ended."""
    text = str(error)
    if not several() or not any(word in text for word in _TRANSPORTS):
        return None
    return ConnectionError(
        f"another process of the run has ended or cannot be reached ({text[:200]}): see its "
        "output, and start all processes again with resume=True"
    )


_TRANSPORTS = ("Gloo", "NCCL", "Connection", "coordination service")  # in XLA's errors


def leave(status: int) -> None:
    """Ends a process of several after an error that the others may not have.

    They wait for it in their next collective, and JAX would let it wait for them at its exit.
    Processes that fail together leave in order, in this time; else the connection breaks, which
    ends the others.
    """
    if not jax.distributed.is_initialized():
        return
    thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
