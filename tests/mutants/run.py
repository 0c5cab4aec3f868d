"""Puts faults into a copy of the package, one at a time, and reports those that no test notices.

    python tests/mutants/run.py [WORD ...] [--jobs N]

A word chooses the faults whose file has it in its path. The status is 1 if one survives.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutants.fault import Fault  # noqa: E402
from tests.mutants.faults import FAULTS  # noqa: E402

# A fault may make a loop endless.
MOST_SECONDS = 600
COPIED = ("lora_jax", "tests", "docs", "pyproject.toml", "README.md")


def main() -> int:
    """Runs the chosen faults, and prints a line for each and the share that was noticed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    chosen = [f for f in FAULTS if not f.equivalent and is_named(f, arguments.words)]
    with tempfile.TemporaryDirectory() as scratch:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(arguments.jobs):
            copies.put(copy(Path(scratch) / str(number)))
        with ThreadPoolExecutor(arguments.jobs) as pool:
            noticed = list(pool.map(lambda fault: is_noticed(fault, copies), chosen))
    print(f"{sum(noticed)} of {len(chosen)} faults were noticed")
    return 0 if all(noticed) else 1


def is_named(fault: Fault, words: list[str]) -> bool:
    """Whether a fault was chosen; without words every one is."""
    return not words or any(word in fault.file for word in words)


def copy(folder: Path) -> Path:
    """A copy of what the tests need, in which faults can be put."""
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        # With what Python has compiled: it is looked up by the time of the source, which a fault
        # changes.
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


def is_noticed(fault: Fault, copies: queue.Queue) -> bool:
    """Whether a test of the area fails with the fault."""
    folder = copies.get()
    path = folder / "lora_jax" / fault.file
    text = path.read_text("utf-8")
    try:
        path.write_text(with_fault(text, fault), "utf-8")
        status = run(folder, fault.tests)
    finally:
        path.write_text(text, "utf-8")
        copies.put(folder)
    found = {0: "SURVIVED", 1: "noticed", None: "noticed (no end)"}.get(status, "noticed (broken)")
    print(f"{found:16}  {fault.file}: {fault.old!r} -> {fault.new!r}", flush=True)
    return status != 0


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


def run(folder: Path, tests: str) -> int | None:
    """The status of pytest, or None where it came to no end."""
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    # The compiled programs of the suite serve here too: those that a fault leaves alone are read.
    cache = str(ROOT / ".pytest_cache" / "compiled")
    environment = {**os.environ, "PYTHONPATH": str(folder), "JAX_COMPILATION_CACHE_DIR": cache}
    try:
        done = subprocess.run(
            [*command, "-m", "not slow", *tests.split()],
            cwd=folder,
            env=environment,
            capture_output=True,
            timeout=MOST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
