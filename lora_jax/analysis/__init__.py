"""Experiments: ranks of changes of weights, sweeps of ranks, and the memory of training."""

from lora_jax.analysis.memory import MemoryEstimate as MemoryEstimate
from lora_jax.analysis.memory import memory as memory
from lora_jax.analysis.memory import memory_table as memory_table
from lora_jax.analysis.memory import parameters as parameters
from lora_jax.analysis.rank_sweep import rank_sweep as rank_sweep
from lora_jax.analysis.spectrum import MatrixSpectrum as MatrixSpectrum
from lora_jax.analysis.spectrum import Spectrum as Spectrum
from lora_jax.analysis.spectrum import spectrum as spectrum
from lora_jax.analysis.subspace import Overlap as Overlap
from lora_jax.analysis.subspace import intruder_dimensions as intruder_dimensions
from lora_jax.analysis.subspace import overlap as overlap
from lora_jax.analysis.sweep_config import SweepConfig as SweepConfig
from lora_jax.analysis.sweep_config import Task as Task
from lora_jax.analysis.sweep_result import Sweep as Sweep
