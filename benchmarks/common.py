"""What every benchmark needs: interleaved timing, the machine's name, a table and a JSON file."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data"


def add_data_option(parser: argparse.ArgumentParser, files: str) -> None:
    """The option `--data`: by default `$LORA_JAX_DATA`, else `../shared/data` by the repository.

    Args:
      parser: to add it to.
      files: what must lie there, for the help.
    """
    default = Path(os.environ.get("LORA_JAX_DATA", DATA))
    parser.add_argument("--data", type=Path, default=default, help=f"folder of {files}")


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each callable, taken in turn so that a noisy machine disturbs all alike.

    Args:
      runs: name to a callable; what it returns is waited for.
      rounds: how often each is timed.
      warmup: calls of each that are not counted.

    Returns:
      Name to `rounds` durations.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warmup + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if number >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Mapping[str, Sequence[float]], top: str, bottom: str) -> float:
    """The median over rounds of `top / bottom` within the same round."""
    pairs = zip(times[top], times[bottom], strict=True)
    return statistics.median(a / b for a, b in pairs)


def machine() -> dict[str, str]:
    """The device and the versions a number was measured with."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "processor": _processor(),
        "cores": str(len(getattr(os, "sched_getaffinity", lambda _: [0])(0))),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(rows: Sequence[Mapping]) -> str:
    """The rows as lines of aligned columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(c), *(len(r[i]) for r in cells)) for i, c in enumerate(columns)]
    lines = [columns, ["-" * w for w in widths], *cells]
    return "\n".join(
        "  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def report(
    name: str, question: str, rows: Sequence[Mapping], *, folder: Path = RESULTS, **extra
) -> None:
    """Prints the rows as a table and writes them with the machine to `<folder>/<name>.json`."""
    print(f"\n{question}\n\n{table(rows)}")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"question": question, "machine": machine(), "rows": list(rows), **extra}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\nwritten to {path}; machine: {machine()}")


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
