"""The commands: each turns its arguments into dataclasses and calls one recipe.

A command imports its recipe when it runs, or when its own flags are needed: `lora-jax --help` lists
all commands and does not wait for the imports of any.
"""

import argparse
import itertools
import os
import select
import stat
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_jax.cli import settings
from lora_jax.cli.errors import UsageError
from lora_jax.cli.settings import Section
from lora_jax.compat import VERSION


def version() -> str:
    """The version of this package."""
    return VERSION


def demo_sections() -> list[Section]:
    """The settings of `demo`."""
    from lora_jax.recipes.settings import DemoConfig

    return [Section("", DemoConfig)]


def demo(arguments: argparse.Namespace) -> None:
    """`lora-jax demo`."""
    from lora_jax.recipes.demo.run import run

    run(_from_flags(demo_sections(), arguments)[0], log=_print)


def train_sections() -> list[Section]:
    """The settings of `train`: the run at the top of the TOML file, and two tables."""
    from lora_jax.recipes.finetune import FinetuneConfig, LoraConfig, TrainConfig

    return [
        Section("", FinetuneConfig),
        Section("lora", LoraConfig, frozenset({"extra"})),
        Section("training", TrainConfig),
    ]


def train(arguments: argparse.Namespace) -> None:
    """`lora-jax train`."""
    from lora_jax.recipes.finetune import finetune

    finetune(*_from_file_and_flags(train_sections(), arguments), log=_print)


def sweep_sections() -> list[Section]:
    """The settings of `sweep`: the task at the top of the TOML file, and three tables."""
    from lora_jax.recipes.sweep import LanguageSweepConfig, LoraConfig, SweepConfig, TrainConfig

    # A sweep sets these itself, or gives every rank the same.
    chosen = {"rank_pattern", "alpha_pattern", "extra"}
    swept = {"learning_rate", "seed", "eval_every", "save_every", "keep", "tensorboard",
             "accumulation", "balance_experts", "packing", "packed_length"}  # fmt: skip
    return [
        Section("", LanguageSweepConfig),
        Section("sweep", SweepConfig),
        Section("lora", LoraConfig, frozenset(chosen)),
        Section("training", TrainConfig, frozenset(swept)),
    ]


def sweep(arguments: argparse.Namespace) -> None:
    """`lora-jax sweep`."""
    from lora_jax.recipes.sweep import sweep_language_model

    sweep_language_model(*_from_file_and_flags(sweep_sections(), arguments), log=_print)


def generate_sections() -> list[Section]:
    """The settings of `generate`."""
    from lora_jax.recipes.settings import Devices, GenerateConfig

    return [Section("", GenerateConfig), Section("devices", Devices)]


def _check_head(config: Any, arguments: argparse.Namespace, model_type: str) -> None:
    """Refuses the settings of a generation for a model whose head says a class or a number."""
    plain = type(config)(batch_size=config.batch_size)
    given = [f.name for f in fields(config) if getattr(config, f.name) != getattr(plain, f.name)]
    given += [name for name in ("system", "raw") if getattr(arguments, name) is not None]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(
            f"{flags}: for models that generate text, and this `{model_type}` has the head of a "
            "task: leave out"
        )


def generate(arguments: argparse.Namespace) -> None:
    """`lora-jax generate`."""
    from lora_jax import processes
    from lora_jax.recipes import finetune
    from lora_jax.recipes.classify import classify_prompts
    from lora_jax.recipes.forms import NOTHING, read_trained
    from lora_jax.recipes.generate import answer_prompts, as_trained
    from lora_jax.train.goals import goal_of

    config, devices = _from_flags(generate_sections(), arguments)
    if devices.distributed and "-" in arguments.prompts:
        raise UsageError("with --distributed every process needs the prompts: write them out")
    prompts = _prompts(arguments.prompts)
    piped = "-" in arguments.prompts and not sys.stdin.isatty()
    if piped:
        # An empty pipe ends here, before the model is loaded.
        prompts = _not_empty(prompts)
    finetune.join(devices)
    processes.check_same({"prompts": str(arguments.prompts), "settings": str(config)})
    # A merged model has the form of its adapter, and a head of its own.
    trained = read_trained(arguments.adapter or arguments.model)
    head = NOTHING if arguments.adapter is None else trained
    model = finetune.load_model(
        arguments.model, dtype=arguments.dtype, mesh=devices.mesh, head=head,
        **_quantization(arguments),
    )  # fmt: skip
    params = model.params
    if arguments.adapter is not None:
        params, _ = finetune.load_adapter(model, arguments.adapter)
    answers = goal_of(model.config) is None
    if not answers:
        _check_head(config, arguments, model.config.model_type)
    as_question = partial(
        as_trained,
        chat=model.tokenizer is not None and model.tokenizer.has_template,
        form=trained.form,
        adapter=arguments.adapter is not None,
        raw=arguments.raw,
        system=arguments.system,
        trained_system=trained.system,
    )
    # One answer stands alone, so that a script can read it; several need their prompts.
    labels = len(arguments.prompts) > 1 or "-" in arguments.prompts
    if piped and len(arguments.prompts) == 1:
        prompts, labels = _several(prompts)
    # Whoever types prompts, or sends them through a pipe, waits for each answer.
    waits = "-" in arguments.prompts and not _is_file(sys.stdin)
    if not answers:
        size, write = 1 if waits else config.batch_size, processes.in_first(_write)
        classify_prompts(model, params, prompts, batch_size=size, write=write, heads=labels)
        return
    answer_prompts(
        model,
        params,
        prompts,
        replace(config, batch_size=1) if waits else config,
        question=lambda prompt: as_question([prompt])[0],
        write=processes.in_first(_write),
        # All processes have to run the same programs.
        live=processes.exchange(sys.stdout.isatty())[0],
        labels=labels,
        template=trained.template,
    )


def _is_file(stream: Any) -> bool:
    """Whether a stream reads a file, whose end is there already."""
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # it has no descriptor
        return False


def _not_empty(prompts: Iterator[str]) -> Iterator[str]:
    first = next(prompts, None)
    if first is None:
        raise UsageError("standard input holds no prompt: write one a line to it")
    return itertools.chain([first], prompts)


def _several(prompts: Iterator[str]) -> tuple[Iterator[str], bool]:
    """The prompts of a pipe or a file, and whether there is, or may still come, a second one."""
    first = next(prompts)
    try:
        # At its end a stream is ready too. By now the model is loaded, which takes longer than
        # the writer of a single prompt takes to close its pipe.
        ready = bool(select.select([sys.stdin], [], [], 0)[0])
    except (OSError, ValueError):  # it has no descriptor
        ready = True
    if not ready:
        return itertools.chain([first], prompts), True
    read = [first, *itertools.islice(prompts, 1)]
    return itertools.chain(read, prompts), len(read) > 1


def _prompts(given: list[str]) -> Iterator[str]:
    for prompt in given:
        if prompt == "-":
            yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        else:
            yield prompt


def merge(arguments: argparse.Namespace) -> None:
    """`lora-jax merge`."""
    from lora_jax.recipes.export import merge_adapter

    rounded = merge_adapter(
        arguments.model,
        arguments.adapter,
        arguments.output,
        dtype=arguments.dtype,
        requantize=arguments.requantize,
        **_quantization(arguments),
    )
    if rounded is not None:
        _print(str(rounded))
    _print(f"wrote the merged model to {arguments.output}")


def export_formats() -> dict[str, str]:
    """The formats that `export` writes, each with one line about it."""
    from lora_jax.recipes.adapter_formats import ADAPTER_FORMATS

    return {name: form.summary for name, form in ADAPTER_FORMATS.items()}


def convert_formats() -> tuple[str, ...]:
    """The formats that `convert` writes."""
    from lora_jax.recipes.convert import CONVERTED

    return tuple(CONVERTED)


def export(arguments: argparse.Namespace) -> None:
    """`lora-jax export`, and `import`, which is an export to Orbax."""
    from lora_jax.recipes.adapter_formats import ADAPTER_FORMATS
    from lora_jax.recipes.export import export_adapter

    export_adapter(
        arguments.model,
        arguments.adapter,
        arguments.output,
        to=arguments.to,
        dtype=arguments.output_dtype,
        model_dtype=arguments.dtype,
        step=arguments.step,
        **_quantization(arguments),
    )
    _print(f"wrote the {ADAPTER_FORMATS[arguments.to].holds} to {arguments.output}")


def convert(arguments: argparse.Namespace) -> None:
    """`lora-jax convert`."""
    from lora_jax.recipes.convert import convert as convert_adapter

    convert_adapter(
        arguments.adapter,
        arguments.output,
        to=arguments.to,
        base=arguments.base,
        dtype=arguments.output_dtype,
    )
    _print(f"wrote the adapter to {arguments.output}")


def push_sections() -> list[Section]:
    """The settings of `push`."""
    from lora_jax.recipes.settings import PushConfig

    return [Section("", PushConfig)]


def push(arguments: argparse.Namespace) -> None:
    """`lora-jax push`."""
    from lora_jax import hf

    config = _from_flags(push_sections(), arguments)[0]
    pushed = hf.push(arguments.directory, arguments.repo, **vars(config))
    _print(f"pushed {', '.join(pushed.files)} to {pushed.url}")
    if pushed.left_out:
        _print(f"not pushed: {', '.join(pushed.left_out)}")


def inspect(arguments: argparse.Namespace) -> None:
    """`lora-jax inspect`."""
    from lora_jax.recipes.inspect import inspect

    _print(inspect(arguments.path, tensors=arguments.tensors, check=arguments.check))


def estimate_sections() -> list[Section]:
    """The settings of `estimate`."""
    from lora_jax.recipes.settings import EstimateConfig

    return [Section("", EstimateConfig)]


def estimate(arguments: argparse.Namespace) -> None:
    """`lora-jax estimate`."""
    from lora_jax.recipes.estimate import estimate as estimate_memory

    config = _from_flags(estimate_sections(), arguments)[0]
    estimate_memory(arguments.model, config, log=_print)


def _quantization(arguments: argparse.Namespace) -> dict:
    """The quantization of the base, as keywords of `finetune.load_model`."""
    return {"quantize": arguments.quantize, "quantize_block": arguments.quantize_block}


def _print(text: str) -> None:
    """Prints and flushes, so that the text stays in order with the progress bar on stderr."""
    print(text, flush=True)


def _write(text: str) -> None:
    """As `_print`, without a line break."""
    print(text, end="", flush=True)


def _from_flags(sections: list[Section], arguments: argparse.Namespace) -> list:
    return _configs(sections, arguments, None)


def _from_file_and_flags(sections: list[Section], arguments: argparse.Namespace) -> list:
    return _configs(sections, arguments, arguments.config)


def _configs(
    sections: list[Section], arguments: argparse.Namespace, file: Path | None
) -> list[Any]:
    """The dataclasses of a command; whatever is wrong with one is a usage error."""
    from lora_jax.config.arguments import SettingsError

    found = settings.options(sections)
    try:
        values = {} if file is None else settings.from_toml(file, found)
        # Flags last: they override the file.
        values |= settings.from_flags(arguments, found)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    try:
        return [settings.build(section, values) for section in sections]
    except (ValueError, TypeError) as error:
        raise SettingsError(str(error)) from error
