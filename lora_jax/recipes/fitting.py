"""Settings of a training run that fit the model, its processes, or the memory of a device."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lora_jax import processes
from lora_jax.analysis.step_memory.estimate import in_units
from lora_jax.analysis.step_memory.fit import fastest, parse_bytes
from lora_jax.analysis.step_memory.step import StepSettings
from lora_jax.config.arguments import SettingsError, quoted
from lora_jax.config.lora import LoraConfig
from lora_jax.models.classifier import check_labels
from lora_jax.models.heads import ANSWERS, CLASSIFICATION, DECODER_HEADS, NAMED
from lora_jax.models.mesh import Placement, check_rows, placement
from lora_jax.models.registry import (
    CAUSAL_LM,
    ENCODER,
    ENCODER_DECODER,
    IMAGE_ENCODER,
    kind_of_model,
)
from lora_jax.models.remat import remat_name
from lora_jax.models.sharding import ROWS, TOKENS, make_mesh
from lora_jax.quant.array import Backend, is_quant
from lora_jax.recipes.forms import NOTHING, Trained, read_trained
from lora_jax.recipes.settings import Devices
from lora_jax.sharding import AXES
from lora_jax.train import preparation
from lora_jax.train.config import TrainConfig
from lora_jax.train.evaluate import whole_rows
from lora_jax.train.examples import Example, TooLong, examples
from lora_jax.train.goals import goal_of
from lora_jax.train.images import image_examples, load_folder
from lora_jax.train.jsonl import Record, load_jsonl
from lora_jax.train.memory import device_bytes
from lora_jax.train.mesh import rows_of
from lora_jax.train.preparation import settings_of
from lora_jax.tree import trained_and_frozen

_KERNELS: Mapping[str, Backend] = {"gpu": "gpu", "tpu": "tpu"}


def join(job: Devices, *configs: Any) -> None:
    """Joins the processes of the run, which need the same settings, before JAX starts devices."""
    if job.distributed:
        processes.join(job.coordinator, job.processes, job.process_id)
        # Loading onto another mesh would wait for ever. What is in the files, `fit` compares. JAX
        # joins as many as process 0 waits for, whatever number the others were given.
        own = (
            "coordinator", "process_id", "model", "train_data", "eval_data", "tuning_data",
            "adapter",
        )  # fmt: skip
        every = settings_of(job, *configs)
        processes.check_same({name: every[name] for name in every if name not in own})
        return
    for name in ("coordinator", "processes", "process_id"):
        if getattr(job, name) is not None:
            raise SettingsError(f"`{name}` is for a run of several processes: add distributed=True")


def check_mesh(axes: Mapping[str, Any] | None, batch_size: int) -> None:
    """Checks before a model is loaded that its mesh exists and divides the rows of a batch.

    Raises:
      ValueError: it does not.
    """
    if axes is None:
        return
    mesh = make_mesh(**axes)
    rows = tuple(axis for axis in ROWS if axis in mesh.axis_names)
    spans = TOKENS if mesh.shape.get(TOKENS, 1) > 1 else None
    check_rows(Placement(mesh, rows, mesh, spans), batch_size)


def records_of(path: Path, fields: Mapping[str, str]) -> list[Record]:
    """The rows of a file, or the images of a folder."""
    if not Path(path).is_dir():
        return load_jsonl(path, fields=fields)
    if fields:
        raise SettingsError(
            f"`fields` are those of a file's rows, and {path} is a folder of images"
        )
    return load_folder(path)


def with_classes(job: Any, records: Sequence[Record], log: Callable[[str], None]) -> Any:
    """The job; the folders of images are the classes of a fresh head where no others are named."""
    if not Path(job.train_data).is_dir():
        return job
    if job.problem in ("multi_label_classification", "regression"):
        raise SettingsError(
            f'problem="{job.problem}" needs a file whose rows have "image" and '
            f'"label{"s" * (job.problem != "regression")}": a folder of images has one class each'
        )
    if job.labels or job.task or job.problem:
        return job
    labels = tuple(dict.fromkeys(str(record.label) for record in records))
    if len(labels) < 2:
        raise SettingsError(
            f"{job.train_data} has images of one class, {', '.join(labels)}, and a head needs two; "
            "for texts give a file of JSON lines"
        )
    log(f"a fresh head for the folders of {job.train_data}: {', '.join(labels)}")
    return dataclasses.replace(job, labels=labels)


def examples_of(
    model: Any, records: Sequence[Record], *, max_length: int | None, too_long: TooLong = "error"
) -> list[Example]:
    """The records as the model reads them; settings as in `FinetuneConfig`."""
    if kind_of_model(model) == IMAGE_ENCODER:
        if max_length is not None or too_long != "error":
            raise SettingsError("`max_length` and `too_long` are for texts: leave them out")
        return image_examples(records, model)
    context = model.config.context
    length = context if max_length is None else max_length
    if length > context:
        warnings.warn(
            f"`max_length` {length} is above the model's context of {context} tokens: "
            "it was not trained on the positions beyond",
            stacklevel=2,
        )
    return examples(
        records, model.tokenizer, max_length=length, too_long=too_long, config=model.config
    )


def head_of(job: Any, adapter: str | None = None) -> Trained:
    """The fresh head of a fine-tuning: its own, or that of the adapter that it goes on from.

    Raises:
      SettingsError: settings that contradict each other, or another head than the adapter's.
    """
    given = Trained(None, tuple(job.labels), job.task, job.problem)
    values = given.problem == "regression"
    if given.task == ANSWERS and given.labels:
        raise SettingsError('`labels` are for classes, and task="question-answering" has none')
    if given.problem is not None and given.task not in (None, CLASSIFICATION):
        raise SettingsError(f'`problem` is for a head of texts, and `task` is "{given.task}"')
    if values and not given.labels:
        given = given._replace(labels=("LABEL_0",))  # transformers' name
    elif not given.labels and (given.problem or given.task not in (None, ANSWERS)):
        raise SettingsError(
            f"`labels` are missing: name the classes of `{given.problem or given.task}`"
        )
    if len(given.labels) == 1 and not values:
        raise SettingsError(
            f'`labels` must be at least two classes, got "{given.labels[0]}"; for a number add '
            'problem="regression"'
        )
    check_labels(given.labels)
    known = NOTHING if adapter is None else read_trained(adapter)._replace(form=None)
    if known.has_head and given not in (NOTHING, known):
        raise SettingsError(
            f"`labels` are {quoted(given.labels)}, but the head of the adapter {adapter} has "
            f"{quoted(known.labels)}, in this order, for {known.task or CLASSIFICATION}: leave "
            "them out, `task` and `problem` too"
        )
    return known if known.has_head else given


def with_head(model: Any, config: LoraConfig) -> LoraConfig:
    """The adapter's config; of a model with the head of a task, which trains whole, as in PEFT."""
    if goal_of(model.config) is None:
        return config
    if kind_of_model(model) == ENCODER:
        # What a checkpoint of a bare encoder lacks is drawn, BERT's pooler too.
        heads = [name.removesuffix(".") for name in model.config.head_modules]
        heads += ["pooler"] if model.config.pooler else []
    elif kind_of_model(model) == IMAGE_ENCODER:
        heads = ["classifier"]
    else:
        heads = [str(DECODER_HEADS[model.config.task].last)]
    more = [name for name in heads if name not in config.modules_to_save]
    saved = (*config.modules_to_save, *more)
    # ModernBERT's heads do not tell. PEFT has no type for images.
    known = NAMED.get(model.config.task)
    extra = {**({} if known is None else {"task_type": known.peft}), **config.extra}
    return dataclasses.replace(config, modules_to_save=saved, extra=extra)


def fitted(
    model: Any,
    params: Any,
    data: Sequence[Example],
    *,
    device_memory: str,
    lora_config: LoraConfig,
    config: TrainConfig,
    log: Callable[[str], None],
) -> tuple[Any, TrainConfig]:
    """The model and the run with the fastest settings that fit, which are logged in a line.

    Args:
      model, params: the model, and its parameters with adapters.
      data: what it trains on.
      device_memory: as `parse_bytes` reads it.
      lora_config: the adapter's config.
      config: the run; its rows a step, `batch_size * accumulation`, stay as they are.
      log: receives the line.

    Raises:
      ValueError: nothing fits; the message has the smallest step and what would help.
    """
    at = placement(model, params)
    found = preparation.layout(model, data, config, rows_of(at)).loader
    forward, base = model.forward, trained_and_frozen(params)[1]
    held = [x for x in jax.tree.leaves(model.params, is_leaf=is_quant) if is_quant(x)]
    mesh = {} if at is None else at.mesh.shape
    settings = StepSettings(
        # The start decides numbers, not shapes.
        adapter=dataclasses.replace(lora_config, init="default", loftq_config={}),
        quantize=held[0].format if held else None,
        batch=config.batch_size,
        accumulation=config.accumulation,
        length=max(found.ladder),
        packing=found.segmented and not whole_rows(model),
        balance_experts=config.balance_experts,
        dtype=forward.dtype,
        remat=forward.remat,
        offload=kind_of_model(model) in (CAUSAL_LM, ENCODER_DECODER) and forward.offload,
        clip=config.clip is not None,
        mesh={axis: mesh[axis] for axis in AXES if axis in mesh},
        backend=_KERNELS.get(jax.default_backend(), "reference"),
    )
    # Files may hold blocks of several formats: the bytes of the base are those that lie there.
    limit = parse_bytes(device_memory)
    best = fastest(forward.config, settings, limit, weights=device_bytes(base))
    chosen = best.settings
    changes = {
        "batch_size": (settings.batch, chosen.batch),
        "accumulation": (settings.accumulation, chosen.accumulation),
        "remat": (remat_name(settings.remat), remat_name(chosen.remat)),
    }
    # Given settings and defaults alike: which of the two they were is not known here.
    shown = ", ".join(
        f"{name} {after}{'' if after == before else f' (instead of {before})'}"
        for name, (before, after) in changes.items()
    )
    log(f"for {device_memory}: {shown}, about {in_units(best.total)}")
    config = dataclasses.replace(config, batch_size=chosen.batch, accumulation=chosen.accumulation)
    forward = dataclasses.replace(forward, remat=chosen.remat)
    return dataclasses.replace(model, forward=forward), config
