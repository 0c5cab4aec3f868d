"""MkDocs hooks: public names to their definitions, and files that live outside `docs/`.

A reference page lists names as users write them (`::: lora_jax.hf.save_peft`). Some are looked up
lazily, which a reader of source code such as griffe cannot follow, so each is replaced by the
place of its definition, under the name that was written.
"""

import importlib
import inspect
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# Where the file is shown -> the file.
OUTSIDE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "experiments/rank_sweep_e2e.png": "benchmarks/results/rank_sweep_e2e.png",
    "experiments/rank_sweep_sst2.png": "benchmarks/results/rank_sweep_sst2.png",
    "experiments/sst2_encoder.png": "benchmarks/results/sst2_encoder.png",
    "experiments/sst2_spectrum.png": "benchmarks/results/sst2_spectrum.png",
}
PUBLIC = re.compile(r"^::: (lora_jax[\w.]*)$", re.MULTILINE)


def on_files(files, config):
    """Adds the files that live outside `docs/`."""
    for shown, source in OUTSIDE.items():
        files.append(File.generated(config, shown, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Replaces public names by the places where they are defined, and links out of `docs/`."""
    for shown, source in OUTSIDE.items():
        markdown = markdown.replace(f"](../{source})", f"]({shown})")
    return PUBLIC.sub(lambda found: _directive(found.group(1)), markdown)


def _directive(name: str) -> str:
    options = f"heading: {name}\n      toc_label: {name.rpartition('.')[2]}"
    return f"::: {definition(name)}\n    options:\n      {options}"


def definition(name: str) -> str:
    """The dotted path of the definition of a public name.

    Raises:
      AttributeError: the package has no such name.
    """
    package, _, last = name.rpartition(".")
    value = getattr(importlib.import_module(package), last)
    if inspect.isclass(value) or inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{_home(value, last)}.{last}"


def _home(value, name: str) -> str:
    """The module that assigns a constant."""
    for module in list(sys.modules.values()):
        held = getattr(module, "__dict__", {}).get(name)
        source = getattr(module, "__file__", None)
        if held is value and module.__name__.startswith("lora_jax") and source:
            if re.search(rf"^{name}\b.*=", Path(source).read_text("utf-8"), re.MULTILINE):
                return module.__name__
    raise AttributeError(f"no module of lora_jax assigns `{name}`")
