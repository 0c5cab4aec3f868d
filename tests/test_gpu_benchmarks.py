"""The benchmarks for a GPU, which is seldom there, run on a CPU in small: peers included."""

import ast
import subprocess
import sys

import pytest

from tests.support.places import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gpu_quant", {"format": {"nf4", "int4"}}),
        ("gpu_train", {"base": {"bfloat16", "nf4", "int4"}, "who": {"lora_jax", "PEFT"}}),
    ],
)
def test_a_benchmark_runs_in_small(name, found):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for column, values in found.items():
        assert {str(row[column]).split()[0] for row in rows} == values


@pytest.mark.slow
def test_the_check_of_kernels_runs_in_small():
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {
        "nf4", "fp4", "int4", "uint4", "int8"
    }  # fmt: skip
