"""The command line: help for a person, one line for an error, the right exit status."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
import types
import warnings

import pytest

from lora_jax import cli
from lora_jax.cli import commands, errors, main
from lora_jax.cli.parser import make_parser

pytestmark = pytest.mark.once

COMMANDS = (
    "demo", "train", "generate", "merge", "export", "import", "convert", "inspect", "estimate",
)  # fmt: skip


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """Status, standard output and standard error of a command."""
    try:
        status = main(argv)
    except SystemExit as leaving:
        status = leaving.code
    assert isinstance(status, int)
    out, err = capsys.readouterr()
    return status, out, err


def failing(monkeypatch, error: BaseException):
    """Makes `inspect` raise."""

    def raise_it(arguments):
        raise error

    monkeypatch.setattr(commands, "inspect", raise_it)


def test_help_lists_every_command(capsys):
    status, out, err = run(capsys, "--help")
    assert (status, err) == (0, "")
    assert all(re.search(rf"^    {name} ", out, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_an_example_that_parses(capsys, command):
    status, out, err = run(capsys, command, "--help")
    assert (status, err) == (0, "")
    examples = re.findall(rf"^  lora-jax ({command} .*?)(?: - < .*)?$", out, re.MULTILINE)
    assert examples
    for example in examples:
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', example)]
        arguments, unknown = make_parser(command).parse_known_args(
            [*words, *(["-"] * ("- <" in out))]
        )
        assert arguments.command == command and not [w for w in unknown if w != "-"]


def test_the_version(capsys):
    import lora_jax

    assert run(capsys, "--version") == (0, f"lora-jax {lora_jax.__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "lora-jax: the following arguments are required: command; see `lora-jax --help`"),
        (["forget"], "lora-jax: argument command: invalid choice: 'forget'"),
        (["merge", "smollm2"], "lora-jax merge: the following arguments are required: adapter"),
        (["train", "--rnak", "3"], "lora-jax train: `--rnak` is no argument of this command; the "
         "nearest are `--rank`"),
        (["train", "--lr", "1e-3"], "lora-jax train: `--lr` is no argument of this command: it is "
         "--learning-rate here; see"),
        (["train", "--load-in-4bit"], "lora-jax train: `--load-in-4bit` is no argument of this "
         "command: it is --quantize nf4 here"),
        (["train", "--max_length", "3"], "lora-jax train: `--max_length` is no argument of this "
         "command: it is --max-length here"),
        (["train", "--push-to-hub"], "lora-jax train: `--push-to-hub` is no argument of this "
         "command, and none is like it; see"),
        (["estimate", "gpt2", "--batch", "3"], "lora-jax estimate: `--batch` is no argument of "
         "this command: it is --batch-size here"),
        (["train", "--output-dir", ""], "lora-jax train: `--output-dir` is empty: is a variable"),
        (["train", "--adapter="], "lora-jax train: `--adapter` is empty: is a variable of"),
        (["push", "", "a/b"], "lora-jax push: an argument is empty: is a variable of the shell"),
        (["generate", "", "hi"], "lora-jax generate: an argument is empty: is a variable of the"),
        (["inspect", "a", "b"], "lora-jax inspect: `b` is no argument of this command;"),
        (["merge", "m", "a", "o", "--dtype", "int3"], "lora-jax merge: argument --dtype: invalid"),
        (["export", "m", "a", "o", "--to", "zip"], "lora-jax export: argument --to: invalid"),
        (["convert", "a", "o"], "lora-jax convert: the following arguments are required: --to;"),
        (["convert", "a", "o", "--to", "hf"], "lora-jax convert: argument --to: invalid choice"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line_and_status_2(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith(message) and err.endswith("--help`\n") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "no.gguf"], "no.gguf: no such file"),
        (["inspect", "no.safetensors"], "no.safetensors: no such file"),
        (["generate", "no.gguf", "x"], "no.gguf: no such file"),
        (["merge", "no.gguf", "a", "b"], "no.gguf: no such file"),
        (["export", "no.gguf", "a", "b"], "a: there is no such directory"),
        (["import", "no.gguf", "a.gguf", "b"], "a.gguf: no such file"),
        (["convert", "a", "b", "--to", "peft"], "a: there is no such directory"),
        (["inspect", "no/adapter"], "`no/adapter` is not a local directory"),
    ],
)
def test_an_error_is_one_line_and_status_1(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *argv)
    assert (status, out) == (1, "")
    assert err.startswith(f"lora-jax {argv[0]}: ") and err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "`--model` is missing: give --model, or model in the config file"),
        (["train", "no.toml"], "no.toml: no such config file; give the path of a TOML file"),
        (
            ["train", "--model", "m", "--train-data", "t", "--rank", "0"],
            "`--rank` must be at least 1",
        ),
        (
            ["train", "--model", "m", "--train-data", "t", "--dropout", "1"],
            "`--dropout` must be at",
        ),
        (["train", "--model", "m", "--train-data", "t", "--rank", "x"], "--rank expects an integ"),
        (["train", "--model", "m", "--train-data", "t"], "`--output-dir` is missing"),
        (
            [
                "train",
                "--model",
                "m",
                "--train-data",
                "t",
                "--output-dir",
                "o",
                "--steps",
                "5",
                "--profile",
                "4:6",
            ],
            "`--profile` is '4:6', but the run ends after step 5",
        ),
        (["generate", "smollm2", "x", "--top-p", "2"], "`--top-p` must be above 0 and at most 1"),
        (["convert", "a", "b", "--to", "gguf"], "`--base` is missing: a GGUF adapter orders some"),
        (["convert", "a", "b", "--to", "vllm", "--output-dtype", "float16"], "vllm keeps the ad"),
    ],
)
def test_a_wrong_setting_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith(f"lora-jax {argv[0]}: ") and err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_key_of_the_file_that_is_no_setting(capsys, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = "m"\n[lora]\nlearning_rate = 1')
    status, _, err = run(capsys, "train", str(path))
    assert status == 2
    assert err.startswith(
        f"lora-jax train: {path}: there is no setting `lora.learning_rate`: it is "
        "training.learning_rate here"
    )
    assert err.count("\n") == 1


def test_ctrl_c_is_status_130(capsys, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    assert run(capsys, "inspect", "x") == (130, "", "lora-jax inspect: interrupted\n")
    failing(monkeypatch, KeyboardInterrupt("stopped at step 3; pass check=True"))
    assert run(capsys, "inspect", "x")[2] == "lora-jax inspect: stopped at step 3; pass --check\n"


def test_debug_shows_the_traceback(capsys, monkeypatch):
    failing(monkeypatch, ValueError("the cause"))
    _, _, err = run(capsys, "inspect", "x", "--debug")
    assert err.startswith("Traceback") and err.endswith("lora-jax inspect: the cause\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\n  two\n"), "one; two"),
        (OSError(errno.ENOSPC, "No space left", "a/b"), "a/b: the disk is full: free some space"),
        (OSError(errno.ENOSPC, "No space left"), "the disk is full: free some space"),
        (PermissionError(errno.EACCES, "denied", "a/b"), "a/b: permission denied: write to a fol"),
        (OSError("written for a person"), "written for a person"),
        (FileNotFoundError(errno.ENOENT, "x", "a"), "a: there is no such file or folder"),
        (MemoryError(), "out of memory: take a smaller --batch-size"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "out of memory: take a smaller"),
        (ModuleNotFoundError("No module named 'grain'"), "No module named 'grain'"),
        (KeyError("rank"), "internal error: KeyError: 'rank' (nowhere); please report it with wh"),
        (ValueError(), "ValueError"),
        # A ValueError whose text is about bytes.
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "internal error: UnicodeDecodeError"),
    ],
)
def test_explain_is_one_line_that_says_what_to_do(error, line):
    said = errors.explain(error)
    assert said.startswith(line) and "\n" not in said


FLAGS = (
    "--resume", "--too-long", "--rank", "--quantize", "--steps", "--clip", "--progress", "--mesh",
    "--model", "--bias", "--beta1", "--roles", "--rank-pattern", "--target-modules",
    "--output-dir", "--batch-size", "--max-length", "--learning-rate",
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a holds a run; pass resume=True to go on", "a holds a run; pass --resume to go on"),
        ("give `resume=True`", "give `--resume`"),
        ("with progress=False", "with --no-progress"),
        ('too_long="truncate" or too_long="skip"', "--too-long truncate or --too-long skip"),
        ("`steps` was 3 and is 4", "`--steps` was 3 and is 4"),
        ("`format` must be one of nf4", "`--quantize` must be one of nf4"),
        ("`clip` must be above 0", "`--clip` must be above 0"),
        ("config: bad; `beta1` was 0.9", "config: bad; `--beta1` was 0.9"),
        ("lower `learning_rate` or `clip`", "lower `--learning-rate` or `--clip`"),
        ("`batch` 3 cannot be divided", "`--batch-size` 3 cannot be divided"),
        ("or choose another `output_dir`", "or choose another `--output-dir`"),
        ("set rank_pattern={'q': 4, 'v': 2}", "set --rank-pattern q=4 v=2"),
        ("set roles={'a.b': 'io'} to adapt it", "set --roles a.b=io to adapt it"),
        ("target_modules=('q', 'v') matches", "--target-modules q v matches"),
        ("got rank=7 (resume=True)", "got --rank 7 (--resume)"),
        ("a `rank` above 8, and `too_long` too", "a `--rank` above 8, and `--too-long` too"),
        # Keys of a file and axes are in quotes; a call's keywords and paths stay as they are.
        ("`mesh` has no axis 'model'", "`--mesh` has no axis 'model'"),
        ('a/adapter_config.json: "bias" must be', 'a/adapter_config.json: "bias" must be'),
        ('PEFT config: set "bias"=1, not "rank"', 'PEFT config: set "bias"=1, not "rank"'),
        ("leaf `layers.bias` is missing", "leaf `layers.bias` is missing"),
        ('lora.quantize(x, format="int8")', 'lora.quantize(x, format="int8")'),
        ("runs/output_dir: no such file", "runs/output_dir: no such file"),
        ("output_dir: no such file", "output_dir: no such file"),
        # No flag of this command.
        ("pass pad=True to `stack`", "pass pad=True to `stack`"),
    ],
)
def test_settings_in_an_error_are_spelled_as_flags(text, line):
    assert errors.explain(ValueError(text), FLAGS) == line


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("`mesh` has no axis 'fdsp'; expected data"), 2),
        (ValueError("target_modules=('q', 'v') adapts nothing"), 2),
        (TypeError("`rank` must be a whole number"), 2),
        (ValueError("`rows` has no flag"), 1),
        (ValueError("d.jsonl:1: the example has 6 tokens, more than `max_length`, 3"), 1),
        (FloatingPointError("the loss is nan: lower `learning_rate`"), 1),
        (FileExistsError("runs: there is a run; pass resume=True"), 1),
    ],
)
def test_an_error_that_begins_with_a_setting_is_a_wrong_command_line(error, status):
    assert errors.status_of(error, FLAGS) == status


class EndsInDel:
    """Gets SIGTERM where Python drops errors."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
        sum(range(10))  # the handler runs between two lines of Python


def test_a_write_that_ends_after_its_loop_prints_nothing(monkeypatch):
    """TensorStore's threads print such a traceback for each array, on a full disk."""
    printed = []
    monkeypatch.setattr(sys, "__unraisablehook__", printed.append)
    dropped = [types.SimpleNamespace(exc_value=RuntimeError(text)) for text in (CLOSED, "another")]
    for each in dropped:
        errors._unraisable(each)
    assert printed == dropped[1:]


CLOSED = "Event loop is closed"


def test_a_signal_whose_error_is_dropped_comes_again():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(errors.EndedError, match="ended by SIGTERM"):
            with errors.ending_by_signals():
                EndsInDel()
                for _ in range(500):
                    time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_before_there_is_anything_to_save_ends_in_a_sentence(
    capsys, monkeypatch, name, status
):
    number = getattr(signal, name)
    monkeypatch.setattr(commands, "inspect", lambda arguments: signal.raise_signal(number))
    before = signal.signal(number, signal.SIG_DFL)
    try:
        line = f"lora-jax inspect: ended by {name} before it was done\n"
        assert run(capsys, "inspect", "x") == (status, "", line)
        assert signal.getsignal(number) == signal.SIG_DFL
        # As under `nohup`.
        signal.signal(number, signal.SIG_IGN)
        assert run(capsys, "inspect", "x") == (0, "", "")
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("name", "status", "text"),
    [("SIGTERM", 143, "ended by SIGTERM before it was done"), ("SIGINT", 130, "interrupted")],
)
def test_a_signal_while_the_flags_are_read_ends_in_a_sentence(
    capsys, monkeypatch, name, status, text
):
    monkeypatch.setattr(cli, "parse", lambda argv: signal.raise_signal(getattr(signal, name)))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert run(capsys, "inspect", "x") == (status, "", f"lora-jax: {text}\n")
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("status", "left"), [(143, [143]), (130, [130]), (0, []), (2, [])])
def test_a_process_that_a_signal_ends_leaves_at_once(monkeypatch, status, left):
    """Threads of XLA that still compile crash in Python's own exit."""
    found = []
    monkeypatch.setattr(cli, "main", lambda: status)
    monkeypatch.setattr(os, "_exit", found.append)
    with pytest.raises(SystemExit) as end:
        cli.start()
    assert (end.value.code, found) == (status, left)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal_of_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, command, "--help")
    assert not [line for line in out.splitlines() if len(line) > 80]


def test_an_internal_error_says_where(capsys, monkeypatch):
    failing(monkeypatch, KeyError("rank"))
    _, _, err = run(capsys, "inspect", "x")
    assert re.search(r"internal error: KeyError: 'rank' \(test_cli.py:\d+\); please report", err)


def test_a_warning_is_one_line_that_names_flags(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    text = "look\n out: pass `tensors` with check=True"
    monkeypatch.setattr(commands, "inspect", lambda a: warnings.warn(text, stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        # pytest records warnings instead of showing them.
        monkeypatch.setattr(
            warnings, "showwarning",
            lambda m, c, f, n, *_: sys.stderr.write(warnings.formatwarning(m, c, f, n)),
        )  # fmt: skip
        status, _, err = run(capsys, "inspect", "x")
    line = "lora-jax: warning: look out: pass `--tensors` with --check\n"
    assert (status, err) == (0, line)


def test_prompts_come_from_arguments_and_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    assert list(commands._prompts(["zero", "-"])) == ["zero", "one", "two"]


@pytest.mark.parametrize(("text", "several"), [("one\n\n", False), ("one\ntwo\n", True)])
@pytest.mark.parametrize("open_", [True, False])
def test_the_only_prompt_of_a_pipe_is_known_when_the_pipe_is_closed(
    monkeypatch, text, several, open_
):
    read, write = os.pipe()
    os.write(write, text.encode())
    if not open_:
        os.close(write)
    with os.fdopen(read) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        prompts, found = commands._several(commands._not_empty(commands._prompts(["-"])))
        # Where the pipe is open, another prompt may come.
        assert found == (several or open_)
        if open_:
            os.close(write)
        assert list(prompts) == text.split()


def test_an_empty_pipe_is_a_wrong_command_line_before_the_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    line = "lora-jax generate: standard input holds no prompt: write one a line to it\n"
    assert run(capsys, "generate", "missing", "-") == (2, "", line)


def test_a_reader_that_leaves_is_no_error():
    code = (
        "import sys; from lora_jax.cli import commands, main\n"
        "commands.inspect = lambda a: [print('x' * 100) for _ in range(100000)]\n"
        "sys.exit(main(['inspect', 'x']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""
    process.stderr.close()


def test_ctrl_c_in_a_process_is_clean(tmp_path):
    code = (
        "import signal, sys, time; from lora_jax.cli import commands, main\n"
        # As a shell's foreground job: one in the background starts with the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "commands.inspect = lambda a: (print('ready', flush=True), time.sleep(60))\n"
        "sys.exit(main(['inspect', 'x']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "lora-jax inspect: interrupted\n")
