"""Experiments: ranks of changes of weights, sweeps of ranks, and the memory of training."""

from lora_jax.analysis.memory.estimate import MemoryEstimate as MemoryEstimate
from lora_jax.analysis.memory.estimate import memory as memory
from lora_jax.analysis.memory.estimate import memory_table as memory_table
from lora_jax.analysis.memory.estimate import parameters as parameters
from lora_jax.analysis.spectrum.spectrum import MatrixSpectrum as MatrixSpectrum
from lora_jax.analysis.spectrum.spectrum import Spectrum as Spectrum
from lora_jax.analysis.spectrum.spectrum import spectrum as spectrum
from lora_jax.analysis.spectrum.subspace import Overlap as Overlap
from lora_jax.analysis.spectrum.subspace import intruder_dimensions as intruder_dimensions
from lora_jax.analysis.spectrum.subspace import overlap as overlap
from lora_jax.analysis.sweep.config import SweepConfig as SweepConfig
from lora_jax.analysis.sweep.config import Task as Task
from lora_jax.analysis.sweep.result import Sweep as Sweep
from lora_jax.analysis.sweep.sweep import rank_sweep as rank_sweep
