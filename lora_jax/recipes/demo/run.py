"""The demo: score, fine-tune, score, export the adapter, load it again, score."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax import hf, train
from lora_jax.compat import EXTRAS, check_installed
from lora_jax.config.lora import LoraConfig
from lora_jax.recipes import finetune
from lora_jax.recipes.demo import files, task
from lora_jax.recipes.generate import generate_texts
from lora_jax.recipes.reports import show_memory
from lora_jax.recipes.settings import DemoConfig, GenerateConfig
from lora_jax.train import TrainConfig
from lora_jax.train.memory import tree_bytes
from lora_jax.tree import count_parameters, format_trainable_parameters

# The right answers have at most 27 tokens.
_ANSWERS = GenerateConfig(max_new_tokens=32, batch_size=24, temperature=0.0)
_MAX_LENGTH = 256  # above the longest example


class Scored(NamedTuple):
    """A score and the answers it was computed from."""

    score: float
    answers: list[str]


class DemoResult(NamedTuple):
    """The scores of the demo.

    Attributes:
      before: share of right answers of the base model.
      after: share of right answers with the adapter.
      reloaded: the same with the adapter loaded from the PEFT directory.
    """

    before: float
    after: float
    reloaded: float


def run(config: DemoConfig, *, log: Callable[[str], None] = print) -> DemoResult:
    """Runs the demo.

    Args:
      config: its settings.
      log: receives each text for the user.

    Returns:
      The scores.

    Raises:
      FileExistsError: `output_dir` holds files that no earlier demo wrote.
      RuntimeError: the exported adapter, read back, does not give the same answers.
    """
    check_installed(*EXTRAS["llm"])
    started = time.monotonic()
    examples, test = _make_data(config)
    data = files.prepare(config.output_dir, examples, test)
    model = finetune.load_model(config.model, quantize=config.quantize)
    log(_described(config, model.params))
    before = score(model, model.params, test)
    log(report("before fine-tuning", before, test))

    # alpha = 2·rank, as is usual: the scale is 2 at every rank.
    lora_config = LoraConfig(rank=config.rank, alpha=2 * config.rank)
    params = finetune.init_adapter(model, lora_config, seed=config.seed)
    log(format_trainable_parameters(params))
    trained = train_on(model, params, data, lora_config=lora_config, config=config, log=log)

    after = score(model, trained.lora_params, test)
    log(report("after fine-tuning", after, test))
    adapter = config.output_dir / finetune.ADAPTER
    name = finetune.hub_name(config.model)
    hf.save_peft(adapter, trained.lora_params, lora_config, base_model_name=name)
    reloaded = score(model, finetune.load_adapter(model, adapter)[0], test)
    log(f"with the adapter read back from {adapter}: {_count(reloaded, test)}")
    # A wrong name or layout in the file would change the answers.
    if reloaded != after:
        raise RuntimeError(f"{adapter}: the adapter, read back, gives other answers than before")
    found = DemoResult(before.score, after.score, reloaded.score)
    files.finish(config.output_dir, found._asdict())
    log(f"\n{files.contents(config.output_dir)}\n\ndone in {time.monotonic() - started:.0f} s")
    return found


def _described(config: DemoConfig, params: Any) -> str:
    """The model's size: `smollm2: 134,515,008 parameters in 513.1 MiB (float32)`."""
    count = count_parameters(params).total
    size = f"{tree_bytes(params) / 2**20:,.1f} MiB"
    beside = "float32"
    if config.quantize is not None:
        beside = f'quantized "{config.quantize}"; float32: {4 * count / 2**20:,.1f} MiB'
    return f"{config.model}: {count:,} parameters in {size} ({beside})"


def _make_data(config: DemoConfig) -> tuple[list[task.Sentence], list[task.Sentence]]:
    # Every example is seen once, so that what is learned is the task and not the sentences.
    count = config.steps * config.batch_size
    return task.make_examples(config.seed, train=count, test=config.test_examples)


def train_on(
    model: Any,
    params: Any,
    data: Path,
    *,
    lora_config: LoraConfig,
    config: DemoConfig,
    log: Callable[[str], None],
) -> train.Result:
    """Fine-tunes on the data file and prints the memory of the run; the result of `fit`."""
    examples = train.load_examples(data, model.tokenizer, max_length=_MAX_LENGTH)
    hooks = train.Hooks(memory=show_memory(log))
    return train.fit(
        model,
        params,
        examples,
        eval_data=None,
        config=training(config),
        lora_config=lora_config,
        hooks=hooks,
    )


def training(config: DemoConfig) -> TrainConfig:
    """The `TrainConfig` of a demo."""
    return TrainConfig(
        output_dir=config.output_dir,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup=0.1,
        # Each length is compiled once, which is a large share of a short run.
        buckets=2,
        seed=config.seed,
        progress=config.progress,
    )


def score(model: Any, params: Any, test: Sequence[task.Sentence]) -> Scored:
    """Generates answers to the test set and scores them."""
    answers = generate_texts(model, params, [task.question(e) for e in test], _ANSWERS)
    return Scored(task.score(answers, test), answers)


def report(when: str, scored: Scored, test: Sequence[task.Sentence]) -> str:
    """The score, and one answer beside the right one."""
    return (
        f"\n{when}: {_count(scored, test)}\n"
        f"  sentence  {test[0].text}\n"
        f"  answer    {' '.join(scored.answers[0].split())}\n"
        f"  right is  {task.canonical(test[0].booking)}\n"
    )


def _count(scored: Scored, test: Sequence[task.Sentence]) -> str:
    return f"{round(scored.score * len(test))} of {len(test)} exactly right ({scored.score:.0%})"
