"""`import lora_jax` stays light, and the package names nothing it should not."""

import ast
import importlib
import pydoc
import re
import subprocess
import sys

import pytest

import lora_jax as lora
from lora_jax import compat

from tests.support.places import ROOT

HEAVY = (
    "flax", "orbax", "grain", "optax", "transformers", "torch", "peft", "matplotlib", "gguf",
    "safetensors", "tokenizers", "huggingface_hub", "tensorboardX", "tqdm", "jinja2",
)  # fmt: skip
# The contract of the design.
PUBLIC = (
    "LoraConfig", "plan", "init", "lorafy", "split", "combine", "trainable_mask", "masked",
    "merge", "unmerge", "count_parameters", "format_trainable_parameters", "is_lora",
    "checkpoint", "hf", "models", "train", "linen", "nnx", "cli",
)  # fmt: skip


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy():
    assert not modules_after("import lora_jax") & set(HEAVY)


def test_the_public_names_are_there():
    assert set(PUBLIC) <= set(lora.__all__)
    assert dir(lora) == sorted([*lora.__all__, "__version__"])
    text = pydoc.plain(pydoc.render_doc(lora))
    assert all(re.search(rf"\b{name}\b", text) for name in lora.__all__)
    missing = [name for name in lora.__all__ if not hasattr(lora, name)]
    assert not missing


FACES = (
    "lora_jax", "lora_jax.analysis", "lora_jax.checkpoint", "lora_jax.cli", "lora_jax.hf",
    "lora_jax.linen", "lora_jax.models", "lora_jax.multi", "lora_jax.nnx", "lora_jax.quant",
    "lora_jax.recipes", "lora_jax.sharding", "lora_jax.train",
)  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("face", FACES)
def test_a_face_lists_its_public_names_only(face):
    module = importlib.import_module(face)
    more = ["__version__"] if face == "lora_jax" else []
    assert dir(module) == sorted([*module.__all__, *more])
    assert not [name for name in module.__all__ if not hasattr(module, name)]
    with pytest.raises(AttributeError, match="has no attribute .no_such_name"):
        module.no_such_name  # noqa: B018


# Prints the public names that importing all modules changes, and the packages that a public name
# hides from `import lora_jax.package as x`.
IMPORT_ALL = """
import importlib, pkgutil, sys, lora_jax
faces = [importlib.import_module(name) for name in sys.argv[1:]]
before = {(face, name): getattr(face, name) for face in faces for name in face.__all__}
for found in pkgutil.walk_packages(lora_jax.__path__, "lora_jax."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
print(*(f"{face.__name__}.{name}" for (face, name), value in before.items()
        if getattr(face, name) is not value))
print(*(name for name, module in sys.modules.items() if name.startswith("lora_jax.")
        and hasattr(module, "__path__")
        and getattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2]) is not module))
"""


@pytest.mark.once
def test_a_function_keeps_its_name_from_the_module_that_defines_it():
    """`lora.merge` is defined in merge.py: importing that file must not put it in its place."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *FACES],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    changed, hidden = done.stdout.splitlines()
    assert changed == ""
    # The function `lora.plan` is the one name that a package has too.
    assert hidden == "lora_jax.plan"


def test_type_checkers_see_what_is_imported_lazily():
    """And no `__getattr__`, with which every name would be one."""
    tree = ast.parse((ROOT / "lora_jax" / "__init__.py").read_text("utf-8"))
    branches = {ast.unparse(x.test): x.body for x in tree.body if isinstance(x, ast.If)}
    seen = {a.name for x in branches["_typing.TYPE_CHECKING"] for a in x.names}  # type: ignore
    (lazy,) = branches["not _typing.TYPE_CHECKING"]
    assert seen == lora._LAZY.keys() and isinstance(lazy, ast.FunctionDef)


@pytest.mark.parametrize(
    "command",
    ["demo", "generate", "merge", "export", "import", "convert", "inspect", "estimate"],
)
def test_the_command_line_imports_nothing_heavy_before_it_runs(command):
    code = f"from lora_jax.cli.parser import make_parser; make_parser({command!r})"
    assert not modules_after(code) & set(HEAVY)


@pytest.mark.parametrize("name", ["torch", "jax._src", "jax.interpreters"])
def test_the_package_never_imports(name):
    """torch is the tests' oracle only, and private JAX breaks with its next release."""
    for path in sorted((ROOT / "lora_jax").rglob("*.py")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            words = line.split()
            imports = words[:1] in (["import"], ["from"]) and len(words) > 1
            assert not (imports and words[1].startswith(name)), f"{path}:{number}: {line}"


def test_only_compat_names_jax_extend():
    for path in sorted((ROOT / "lora_jax").rglob("*.py")):
        if path.name != "compat.py":
            text = path.read_text("utf-8")
            assert "import jax.extend" not in text and "from jax.extend" not in text, path


def test_an_old_jax_is_refused():
    compat.check_jax((0, 10, 0))
    with pytest.raises(ImportError, match=r"needs jax 0\.10 or later, found 0\.9\.2: pip install"):
        compat.check_jax((0, 9, 2))


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("lora_jax", "answer"),
        ("lora_jax", "describe"),
        ("lora_jax", "exchange"),
        ("lora_jax.multi.serve", "Server"),
        ("lora_jax.recipes.generate", "AnswerConfig"),
        ("lora_jax.recipes.generate", "answer"),
        ("lora_jax.recipes.generate", "as_question"),
    ],
)
def test_former_names_are_found_and_their_new_ones_said(place, name):
    module = importlib.import_module(place)
    with pytest.deprecated_call(match=f"{name}` is now `lora_jax"):
        assert getattr(module, name).__doc__
    with pytest.raises(AttributeError, match=f"`{place}` has no attribute `nothing`"):
        module.nothing  # noqa: B018
