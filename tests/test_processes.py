"""What processes do together, played by threads that meet where JAX's processes would.

`tests/train/test_processes.py` runs real ones, which takes a minute each.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lora_jax import processes

pytestmark = pytest.mark.once


@pytest.fixture
def in_each(monkeypatch):
    """`in_each(f, g)`: what process 0 returns from `f()` or raises, and process 1 from `g()`."""
    own = threading.local()

    def run(*programs):
        meeting = threading.Barrier(len(programs))
        rows: list = [None] * len(programs)

        def gather(x):
            rows[own.number] = np.asarray(x)
            meeting.wait(timeout=10)
            # As JAX's, it needs one shape in all processes.
            found = np.stack(rows)
            meeting.wait(timeout=10)
            return found

        def start(number, program):
            own.number = number
            try:
                return program()
            except Exception as error:
                return error

        monkeypatch.setattr(processes, "several", lambda: True)
        monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
        with ThreadPoolExecutor(len(programs)) as pool:
            return list(pool.map(start, range(len(programs)), programs))

    return run


def failing():
    raise PermissionError("no\nplace")


def test_values_of_any_length_reach_all_in_the_order_of_the_processes(in_each):
    got = in_each(lambda: processes.exchange({"a": 1}), lambda: processes.exchange("é" * 50))
    assert got == [[{"a": 1}, "é" * 50]] * 2


def test_values_that_only_one_process_has_are_different(in_each):
    same = {"data": "x"}
    assert in_each(*[lambda: processes.check_same(same)] * 2) == [None, None]
    got = in_each(
        lambda: processes.check_same(same), lambda: processes.check_same({**same, "seed": "1"})
    )
    assert [str(error) for error in got] == [
        "the processes disagree: `seed` is None in process 0 and 1 in process 1; start all of them "
        "with the same arguments and files"
    ] * 2


def test_an_error_in_one_process_is_raised_in_all(in_each):
    assert in_each(*[lambda: processes.together(lambda: 3)] * 2) == [3, 3]
    one, other = in_each(lambda: processes.together(lambda: 3),
                         lambda: processes.together(failing))  # fmt: skip
    assert type(one) is OSError and str(one) == "process 1: no place"
    assert type(other) is PermissionError


def test_bytes_that_one_process_has_reach_all(in_each):
    rows = np.asarray([[1, 0, 255], [0, 7, 0]], np.uint8)
    for got in in_each(*[lambda row=row: processes.summed(row) for row in rows]):
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, [1, 7, 255])


def test_one_process_writes_what_all_make(in_each, monkeypatch):
    first = threading.local()
    monkeypatch.setattr(processes, "is_first", lambda: first.here)

    def program(here, written, *, room=3, bad=None):
        def values():
            for n in range(3):
                # Each value takes all processes.
                (n,) = {*processes.exchange(n)}
                if n == bad:
                    raise ValueError(f"{n} is not finite")
                yield n

        def write(found):
            for n in found:
                if len(written) == room:
                    raise OSError("disk full")
                written.append(n)

        def run():
            first.here = here
            return processes.write_in_first(values(), write)

        return run

    one, two = [], []
    assert in_each(program(True, one), program(False, two)) == [None, None]
    assert one == [0, 1, 2] and two == []
    # The first one's disk is full: the other is not left waiting, and fails too.
    own, other = in_each(program(True, [], room=1), program(False, []))
    assert str(own) == "disk full" and str(other) == "process 0: disk full"
    # A value that cannot be made fails in all.
    errors = in_each(program(True, [], bad=1), program(False, [], bad=1))
    assert [str(e) for e in errors] == ["1 is not finite"] * 2


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_broken_connection_is_explained_whatever_its_type(kind, monkeypatch):
    monkeypatch.setattr(processes, "several", lambda: True)
    with pytest.raises(ConnectionError, match=r"another process of the run has ended .* Gloo"):
        with processes.reachable():
            raise kind("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    for other in (ValueError("`batch_size` is 3"), OSError("No connection to the disk: Gloo")):
        with pytest.raises(type(other), match=str(other)):
            with processes.reachable():
                raise other
