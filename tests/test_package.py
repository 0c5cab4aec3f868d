"""What people install: the wheel and the source distribution, built and used away from the sources.

The editable install of every make target hides a file that the package's data lack. Here a wheel
is built, compared with the tree, and installed into environments that cannot see the checkout: one
with every package of this environment, and one with what `pip install lora-jax` brings and nothing
else. Nothing is downloaded.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_string
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lora_jax
from lora_jax.cli.parser import COMMANDS
from lora_jax.compat import EXTRAS

from tests.support.pages import blocks, write_small_model
from tests.support.places import ROOT

pytestmark = pytest.mark.once

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# In the repository and not in the source distribution: what runs on its host only.
HOSTED = (".ci/", ".github/", ".git", ".pre-commit-config.yaml")
# In the source distribution and not in the repository: what the build adds.
BUILT = ("PKG-INFO", "setup.cfg", "lora_jax.egg-info/")


class Built(NamedTuple):
    """What `python -m build` makes."""

    wheel: Path
    sdist: Path


def tracked() -> list[str]:
    """The files of the repository, those not committed yet included."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("no git repository to compare with")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def run(*command: str | Path, cwd: Path, **options) -> subprocess.CompletedProcess:
    """Runs a command in a folder that holds no checkout, without this process's PYTHONPATH."""
    kept = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "LC_ALL": "C.UTF-8"}
    # Where conftest.py has JAX keep what it compiles, and how.
    kept |= {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_"))}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=kept,
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    # The wheel is built from the source distribution, as an index would have it built.
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source, cwd=dist)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    return Built(wheel, sdist)


def test_an_editable_install_is_a_path_that_type_checkers_read(built, tmp_path):
    """Not setuptools' import hook, behind which pyright and Pylance find nothing."""
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    code = "from setuptools import build_meta; build_meta.build_editable('.')"
    done = run(sys.executable, "-c", code, cwd=source)
    assert done.returncode == 0, done.stderr
    (wheel,) = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        hooks = [name for name in archive.namelist() if name.endswith(".py")]
        (path,) = [name for name in archive.namelist() if name.endswith(".pth")]
        assert (hooks, archive.read(path).decode("utf-8").strip()) == ([], str(source))


def test_the_wheel_holds_every_file_of_the_package(built):
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    wanted = {name for name in tracked() if name.startswith("lora_jax/")}
    assert inside == {"lora_jax_command.py", *wanted}
    assert {"lora_jax/py.typed", "lora_jax/quant/dispatch.json"} <= inside


def test_the_source_distribution_holds_the_repository(built):
    with tarfile.open(built.sdist) as archive:
        names = [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()]
    inside = {name for name in names if not name.startswith(BUILT)}
    assert inside == {n for n in tracked() if not n.startswith((*HOSTED, *BUILT))}


def test_an_index_would_take_both(built):
    done = run(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=built.wheel.parent)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_name_version_and_requirements_are_those_of_the_sources(built):
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        found = message_from_string(archive.read(name).decode("utf-8"))
    assert (found["Name"], found["Version"]) == ("lora-jax", lora_jax.__version__)
    assert "version" in PROJECT["dynamic"]
    asked = [Requirement(text) for text in found.get_all("Requires-Dist", [])]
    core = {r.name for r in asked if r.marker is None}
    assert core == {
        "jax", "flax", "optax", "orbax-checkpoint", "numpy", "jaxtyping", "regex", "safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_has_the_packages_that_messages_name_it_for(extra):
    wanted = {Requirement(text).name for text in PROJECT["optional-dependencies"][extra]}
    assert wanted == set(EXTRAS[extra])


def test_the_tested_versions_of_python_are_the_stated_ones():
    stated = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert PROJECT["requires-python"] == f">={stated[0]}"
    assert "{}.{}".format(*sys.version_info) in stated


class Environment(NamedTuple):
    """A virtual environment with the wheel in it."""

    python: Path
    command: Path
    packages: Path


def _environment(folder: Path, wheel: Path) -> Environment:
    done = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    done = run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index",
        "--quiet", wheel, cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return Environment(python, folder / "bin" / "lora-jax", packages)


@pytest.fixture(scope="module")
def everything(built, tmp_path_factory) -> Environment:
    """An environment that finds every package of this one, and no editable install of ours."""
    found = _environment(tmp_path_factory.mktemp("everything") / "venv", built.wheel)
    # Python does not read the .pth files of a folder that a .pth file names.
    (found.packages / "tests.pth").write_text(f"{Path(pytest.__file__).parent.parent}\n", "utf-8")
    return found


@pytest.fixture(scope="module")
def core(built, tmp_path_factory) -> Environment:
    """An environment with the core's requirements, and theirs, and nothing else."""
    found = _environment(tmp_path_factory.mktemp("core") / "venv", built.wheel)
    for name in _closure(PROJECT["dependencies"]):
        for entry in _entries(name):
            link = found.packages / entry.name
            if not link.exists():
                link.symlink_to(entry)
    return found


def _closure(requirements: list[str]) -> set[str]:
    """Names of the distributions that requirements bring, extras of theirs included."""
    queue, seen = [Requirement(text) for text in requirements], set()
    while queue:
        asked = queue.pop()
        key = (canonicalize_name(asked.name), frozenset(asked.extras))
        if key in seen:
            continue
        seen.add(key)
        for text in metadata.requires(asked.name) or ():
            inner = Requirement(text)
            extras = [{"extra": extra} for extra in ("", *asked.extras)]
            if inner.marker is None or any(inner.marker.evaluate(e) for e in extras):
                queue.append(inner)
    return {name for name, _ in seen}


def _entries(name: str) -> Iterator[Path]:
    """What a distribution has at the top of site-packages."""
    files = metadata.files(name) or ()
    tops = {file.parts[0] for file in files} - {"..", "__pycache__"}
    for top in sorted(tops):
        yield Path(str(metadata.distribution(name).locate_file(top)))


def test_the_installed_package_does_what_the_readme_says(everything, tmp_path):
    """The README's Python blocks, a training among them, and products lowered for devices."""
    code = "\n".join(
        [
            AWAY,
            f"lora_jax.models.find_smollm2 = lambda: {str(write_small_model(tmp_path))!r}",
            *(b.text for b in blocks(ROOT / "README.md") if b.language == "python"),
            "assert len([r for r in result.history if r['kind'] == 'train']) == 3",
            LOWERED,
        ]
    )
    _runs(everything, code, tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "loss.png").is_file()


def test_the_installed_command_helps(everything, tmp_path):
    done = run(everything.command, "--help", cwd=tmp_path)
    assert done.returncode == 0 and all(command in done.stdout for command in COMMANDS)
    lines = [f"helps({command!r})" for command in COMMANDS]
    _runs(everything, "\n".join([AWAY, HELPS, *lines]), tmp_path)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (signal.SIGTERM, "ended by SIGTERM before it was done"),
        (signal.SIGHUP, "ended by SIGHUP before it was done"),
        (signal.SIGINT, "interrupted"),
    ],
)
def test_a_signal_during_the_imports_ends_in_a_sentence(core, tmp_path, number, text):
    """The first import of jax, here a file that sends the signal."""
    (tmp_path / "jax.py").write_text(f"import os\nos.kill(os.getpid(), {number:d})\n", "utf-8")
    code = "import sys; sys.path.insert(0, '.'); import lora_jax_command; lora_jax_command.start()"
    done = run(core.python, "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (128 + number, f"lora-jax: {text}\n")


@pytest.mark.parametrize("module", ["lora_jax", "lora_jax.cli"])
def test_the_package_is_the_command_too(core, tmp_path, module):
    done = run(core.python, "-m", module, "train", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("lora-jax train: `--model` is missing")


def test_the_core_needs_no_extra(core, tmp_path):
    """Everything for a model and a loop of one's own, with the core's packages alone."""
    _runs(core, AWAY + CORE, tmp_path)


def test_a_part_without_its_extra_names_the_extra(core, tmp_path):
    write_small_model(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": " b"}\n', "utf-8")
    _runs(core, AWAY + MISSING, tmp_path)
    done = run(core.command, "merge", "./smollm2", "adapter", "merged", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"lora-jax merge: .* pip install 'lora-jax\[llm\]'\n", done.stderr)


def _runs(environment: Environment, code: str, cwd: Path) -> None:
    done = run(environment.python, "-", cwd=cwd, input=code)
    assert done.returncode == 0, done.stdout + done.stderr


# The start of every script: no checkout is importable, and its package is the environment's.
AWAY = """
import sys, pathlib, lora_jax
assert pathlib.Path(lora_jax.__file__).is_relative_to(sys.prefix), lora_jax.__file__
"""

HELPS = """
from lora_jax.cli import main
def helps(command):
    try:
        main([command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0, command
"""

LOWERED = """
import dataclasses
base = lora.quantize({"w": jnp.ones((256, 256), jnp.bfloat16)}, ("w",), format="nf4")["w"]
rows = jnp.ones((4, 256), jnp.bfloat16)
product = jax.jit(lora.lorafy(lambda params, x: x @ params["w"]))
for device, kernel in (("gpu", "triton"), ("tpu", "tpu_custom_call")):
    q = dataclasses.replace(base, backend=device)
    platform = {"gpu": "cuda"}.get(device, device)
    text = product.trace({"w": q}, rows).lower(lowering_platforms=(platform,)).as_text()
    assert kernel in text, (device, text)
"""

CORE = """
import importlib, pkgutil
for package in ("gguf", "grain", "huggingface_hub", "jinja2", "matplotlib", "tokenizers", "tqdm"):
    assert importlib.util.find_spec(package) is None, package
modules = [m.name for m in pkgutil.walk_packages(lora_jax.__path__, "lora_jax.")]
assert len(modules) > 100
for name in modules:
    if not name.endswith("__main__"):
        importlib.import_module(name)

import jax, jax.numpy as jnp, numpy as np, optax, lora_jax as lora

def model(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]

x = jax.random.normal(jax.random.key(0), (8, 16))
params = {"up": {"kernel": jnp.eye(16, 64)}, "down": {"kernel": jnp.eye(64, 4)}}
config = lora.LoraConfig(rank=4, alpha=8, target_modules=("up", "down"))
adapted = lora.init(jax.random.key(1), lora.plan(config, model, params, x), params)
trainable, frozen = lora.split(adapted)
tx = lora.masked(optax.adam(1e-2))
state = tx.init(adapted)
loss, gradient = lora.value_and_grad(lambda p: jnp.mean(lora.lorafy(model)(p, x) ** 2))(adapted)
updates, state = tx.update(gradient, state, adapted)
adapted = optax.apply_updates(adapted, updates)
y = lora.lorafy(model)(adapted, x)
assert abs(model(lora.merge(adapted), x) - y).max() < 1e-5

lora.hf.save_peft("peft", adapted, config)
again, _ = lora.hf.load_peft("peft", model, params, x)
assert abs(lora.lorafy(model)(again, x) - y).max() < 1e-6
lora.checkpoint.save("orbax", adapted, config)
again, _ = lora.checkpoint.restore("orbax", model, params, x)
assert abs(lora.lorafy(model)(again, x) - y).max() < 1e-6

small = lora.quantize(params, ("up",), format="nf4", block_size=16)
quantized = lora.init(jax.random.key(1), lora.plan(config, model, small, x), small)
assert np.isfinite(lora.lorafy(model)(quantized, x)).all()
assert lora.merge(quantized)["up"]["kernel"].dtype == jnp.float32
"""

MISSING = r"""
import contextlib, io, re, struct
import jax.numpy as jnp, lora_jax as lora
from lora_jax import hf, train
from lora_jax.analysis.spectra.spectrum import plot_decay
from lora_jax.cli import main
from lora_jax.hf import hub
from lora_jax.hf.gguf.file import open_gguf
from lora_jax.hf.gguf.names import Base, gguf_names
from lora_jax.hf.tokenizer.directory import from_directory
from lora_jax.hf.tokenizer.tokenizer import Tokenizer
from lora_jax.recipes.completions import bleu_counts

SENTENCE = r"`\w+` is not installed: pip install 'lora-jax\[EXTRA\]'"

def names(extra, part):
    try:
        part()
    except ModuleNotFoundError as error:
        line = str(error)
        assert re.fullmatch(SENTENCE.replace("EXTRA", extra), line), line
    else:
        raise AssertionError("nothing was missing")

empty = pathlib.Path("empty.gguf")
empty.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
record = {"kind": "eval", "step": 1, "eval_loss": 1.0}
message = {"role": "user", "content": "hello"}
w = {"w": jnp.ones((64, 64))}
names("llm", lambda: from_directory("smollm2"))
chat = Tokenizer(backend=None, special={}, chat_template="{{ messages }}")
names("llm", lambda: chat.render_chat([message]))
names("llm", lambda: open_gguf(empty))
names("llm", lambda: gguf_names(Base("llama", 1, 1, 1, 1, False)))
names("llm", lambda: hub.snapshot("owner/name"))
names("llm", lambda: lora.quantize(w, ("w",), progress=True))
names("llm", lambda: train.plot_loss("loss.png", [record]))
names("llm", lambda: plot_decay("decay.png", None))
names("llm", lambda: train.fit(None, None, [], None, train.TrainConfig(steps=1)))
names("bleu", lambda: bleu_counts("a", ["b"]))

for command in (
    "demo",
    "train --model ./smollm2 --train-data data.jsonl --output-dir out",
    "sweep --model ./smollm2 --train-data data.jsonl --eval-data data.jsonl --output-dir out",
    "generate ./smollm2 hello",
    "inspect empty.gguf",
):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main(command.split())
    line = f"lora-jax {command.split()[0]}: {SENTENCE.replace('EXTRA', 'llm')}\n"
    assert status == 1 and re.fullmatch(line, errors.getvalue()), (command, errors.getvalue())
"""
