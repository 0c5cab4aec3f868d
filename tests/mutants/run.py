"""Puts faults into a copy of the package, one at a time, and reports those that no test notices.

    python tests/mutants/run.py [WORD ...] [--jobs N]

A word chooses the faults whose file has it in its path. The status is 1 if one survives, or if the
tests notice one that the list calls equivalent: then they fail without a fault too, or it is none.

Importing JAX and what the tests need takes longer than most tests do. This process imports it all
once, but neither the package nor its tests; each fault's tests run in a fork of it, which imports
those from its copy.
"""

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutants.fault import Fault  # noqa: E402
from tests.mutants.faults import FAULTS  # noqa: E402

# A fault may make a loop endless.
MOST_SECONDS = 600
COPIED = ("lora_jax", "tests", "docs", "pyproject.toml", "README.md")
# What the package and its tests import, as far as it is installed.
LIBRARIES = (
    "jax.experimental.pallas", "jax.experimental.checkify", "jax.experimental.custom_partitioning",
    "flax.nnx", "flax.linen", "optax", "orbax.checkpoint", "jaxtyping", "beartype", "safetensors",
    "tokenizers", "jinja2", "gguf", "hypothesis", "ml_dtypes", "huggingface_hub",
    "matplotlib.figure", "tqdm", "grain", "regex",
)  # fmt: skip


class Run(NamedTuple):
    """The tests of one fault while they run.

    Attributes:
      fault: what was put in.
      copy: the folder it was put in.
      ends: when it counts as endless, by `time.monotonic`.
    """

    fault: Fault
    copy: Path
    ends: float


def main() -> int:
    """Runs the chosen faults, and prints a line for each and how many the tests saw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    chosen = [f for f in FAULTS if is_named(f, arguments.words)]
    import_libraries()
    right = 0
    with tempfile.TemporaryDirectory() as scratch:
        copies = [copy(Path(scratch) / str(number)) for number in range(arguments.jobs)]
        for fault, status in statuses(chosen, copies):
            found = {0: "survived", 1: "noticed", None: "noticed (no end)"}
            word = found.get(status, "noticed (broken)")
            expected = bool(fault.equivalent) == (status == 0)
            word = f"{word} (equivalent)" if fault.equivalent else word
            word = word if expected else word.upper()
            print(f"{word:24}{fault.file}: {fault.old!r} -> {fault.new!r}", flush=True)
            right += expected
    print(f"{right} of {len(chosen)} faults were as expected")
    return 0 if right == len(chosen) else 1


def is_named(fault: Fault, words: list[str]) -> bool:
    """Whether a fault was chosen; without words every one is."""
    return not words or any(word in fault.file for word in words)


def import_libraries() -> None:
    """Imports what the forks share, under the settings of the tests."""
    # The compiled programs of the suite serve here too: those that a fault leaves alone are read.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".pytest_cache" / "compiled")
    # Sets JAX's variables before it imports JAX. JAX starts no threads before its first array.
    importlib.import_module("tests.conftest")
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    early = [name for name in sys.modules if name.partition(".")[0] == "lora_jax"]
    if early:
        raise RuntimeError(f"{early} must be imported in the forks only, with their faults")


def copy(folder: Path) -> Path:
    """A copy of what the tests need, in which faults can be put."""
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        # With what Python has compiled: it is looked up by the time of the source, which a fault
        # changes.
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
    return folder


def statuses(faults: list[Fault], copies: list[Path]) -> Iterator[tuple[Fault, int | None]]:
    """The status of pytest for each fault, None where it came to no end, as they come."""
    waiting, free = list(faults), list(copies)
    running: dict[int, Run] = {}
    try:
        while waiting or running:
            while waiting and free:
                fault, folder = waiting.pop(0), free.pop()
                running[start(fault, folder)] = Run(fault, folder, time.monotonic() + MOST_SECONDS)
            time.sleep(0.05)
            for process, run in list(running.items()):
                done, status = os.waitpid(process, os.WNOHANG)
                if not done and time.monotonic() < run.ends:
                    continue
                end(process)
                del running[process]
                put_back(run)
                free.append(run.copy)
                yield run.fault, os.waitstatus_to_exitcode(status) if done else None
    finally:
        for process in running:
            end(process)


def start(fault: Fault, folder: Path) -> int:
    """Puts a fault into a copy and starts its tests in a fork; gives the process."""
    path = folder / "lora_jax" / fault.file
    bad = with_fault(path.read_text("utf-8"), fault)
    shutil.copy2(path, whole(path))
    path.write_text(bad, "utf-8")
    process = os.fork()
    if process:
        return process
    status = 3
    try:
        status = run_tests(folder, fault.tests)
    finally:
        # Nothing of this process's own is cleaned up, such as the copies.
        os._exit(status)


def whole(path: Path) -> Path:
    """Where the file of a fault is kept as it was."""
    return path.with_suffix(".whole")


def put_back(run: Run) -> None:
    """Takes a fault out again: the file has its old time too, by which Python has it compiled."""
    path = run.copy / "lora_jax" / run.fault.file
    os.replace(whole(path), path)


def end(process: int) -> None:
    """Ends a fork and what its tests have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process, 0)


def run_tests(folder: Path, tests: str) -> int:
    """The status of pytest in this process, which must not have imported the package."""
    # A group of its own, so that it can be ended with the processes that tests start.
    os.setsid()
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [str(folder), *(p for p in sys.path if p != str(ROOT))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.dont_write_bytecode = True
    pytest = importlib.import_module("pytest")
    # What is imported already cannot be rewritten; of these modules no assertion need be.
    plain = ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-p", "no:cacheprovider"]
    plain += ["-p", "no:xdist"]
    return int(pytest.main(["-x", "-q", *plain, "-m", "not slow", *tests.split()]))


def with_fault(text: str, fault: Fault) -> str:
    """The text of a file with its fault.

    Raises:
      ValueError: the file changed, and the fault no longer fits.
    """
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.file} has {fault.old!r} {text.count(fault.old)} times, and not once: change "
            "the fault in tests/mutants/faults.py"
        )
    return text.replace(fault.old, fault.new)


if __name__ == "__main__":
    sys.exit(main())
