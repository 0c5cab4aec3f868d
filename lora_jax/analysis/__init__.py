"""Experiments: ranks of changes of weights, sweeps of ranks, and the memory of training."""

from lora_jax.analysis.spectra.spectrum import MatrixSpectrum, Spectrum, spectrum
from lora_jax.analysis.spectra.subspace import Overlap, intruder_dimensions, overlap
from lora_jax.analysis.step_memory.estimate import MemoryEstimate, memory, memory_table, parameters
from lora_jax.analysis.sweep.config import SweepConfig, Task
from lora_jax.analysis.sweep.result import Sweep
from lora_jax.analysis.sweep.sweep import rank_sweep

__all__ = [
    "MatrixSpectrum",
    "MemoryEstimate",
    "Overlap",
    "Spectrum",
    "Sweep",
    "SweepConfig",
    "Task",
    "intruder_dimensions",
    "memory",
    "memory_table",
    "overlap",
    "parameters",
    "rank_sweep",
    "spectrum",
]


def __dir__() -> list[str]:
    return __all__
