"""Runs of several processes of this machine, joined by `jax.distributed` over gloo."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Meanwhile = Callable[[list[subprocess.Popen]], None]
WORKER = Path(__file__).parent / "process.py"
SECONDS = 300  # of a process, on a busy machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(count: int, devices: int, job: dict[str, Any], *others: dict[str, Any], cwds=()) -> list:
    """Runs the processes to their ends; `others` are changes of the job of processes 1, 2, ..."""
    port, lines = free_port(), []
    for number in range(count):
        own = others[number - 1] if 0 < number <= len(others) else {}
        shared = {"id": number, "count": count, "port": port, "training": {}, **job, **own}
        lines.append([str(WORKER), json.dumps(shared)])
    return ends_of(lines, devices, cwds or [None] * count)


def command(arguments: list[str], *others: list[str], meanwhile: Meanwhile | None = None) -> list:
    """Runs `lora-jax` in two processes; `others` are further arguments of each."""
    port, lines = free_port(), []
    for number in range(2):
        own = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
        own += ["--process-id", str(number), *(others[number] if others else [])]
        lines.append(["-m", "lora_jax", *arguments, *own])
    return ends_of(lines, 1, [None] * 2, meanwhile)


def signalled(number: int, after: Path, pattern: str) -> Meanwhile:
    """Sends process 1 a signal once a file in a folder matches a pattern."""

    def send(running: list[subprocess.Popen]) -> None:
        end = time.monotonic() + SECONDS
        while not any(after.glob(pattern)) and running[1].poll() is None:
            assert time.monotonic() < end, f"no {pattern} in {after}"
            time.sleep(0.05)
        running[1].send_signal(number)

    return send


def ends_of(
    lines: list[list[str]], devices: int, cwds: list, meanwhile: Meanwhile | None = None
) -> list[tuple[str, int]]:
    """The output and the status of each process; `meanwhile` is called while they run."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, *line],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            cwd=cwd,
        )
        for line, cwd in zip(lines, cwds, strict=True)
    ]
    try:
        if meanwhile is not None:
            meanwhile(running)
        ended = [(p.communicate(timeout=SECONDS)[0], p.returncode) for p in running]
    finally:
        for p in running:
            p.kill()
    return ended


def losses_of(ended: list) -> np.ndarray:
    """The losses that all processes printed as their last line."""
    for text, status in ended:
        assert status == 0, text
    found = [json.loads(text.strip().splitlines()[-1]) for text, _ in ended]
    assert all(each == found[0] for each in found)
    return np.array(found[0])
