"""What vLLM's models take of an adapter, read off the installed source, which needs no GPU.

Restates `get_supported_lora_modules` (vllm/lora/utils.py) and `_load_adapter`
(vllm/lora/worker_manager.py): a linear layer's own name, or those that are packed in it, and the
names in `embedding_modules`.
"""

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# Models that vLLM runs as transformers has them: every linear layer under its own name.
BACKEND = "transformers"


class Taken(NamedTuple):
    """What a model takes: adapters at all, names of modules (None: any), all experts in one."""

    adapters: bool
    modules: set[str] | None
    together: bool = False


def root() -> Path:
    """The folder of the installed package."""
    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def taken(architecture: str) -> Taken | None:
    """What the model of an architecture takes, None where vLLM has no such model."""
    models = root() / "model_executor" / "models"
    found = re.search(
        rf'"{architecture}":\s*\(\s*"(\w+)",\s*"(\w+)"', (models / "registry.py").read_text("utf-8")
    )
    if found is None:
        return None
    if found[1] == BACKEND:
        return Taken(True, None)
    classes, linears = _classes(models, found[1])
    line = _line(classes, found[2])
    packed = next((x for c in line if (x := _literal(classes[c], "packed_modules_mapping"))), {})
    tables = next((x for c in line if (x := _literal(classes[c], "embedding_modules"))), {})
    names = {name for one in linears for name in packed.get(one, [one])}
    return Taken(
        any("SupportsLoRA" in _bases(classes[c]) for c in line),
        names | {*tables},
        any(_literal(classes[c], "is_3d_moe_weight") for c in line),
    )


def _classes(models: Path, module: str) -> tuple[dict[str, ast.ClassDef], set[str]]:
    """The classes of a file and of those it takes classes from, and the names of linear layers."""
    classes: dict[str, ast.ClassDef] = {}
    linears: set[str] = set()
    todo, done = [module], set()
    while todo:
        name = todo.pop()
        if name in done or not (file := models / f"{name}.py").is_file():
            continue
        done.add(name)
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, node)
            elif isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                todo.append(node.module)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "vllm.model_executor.models."
            ):
                todo.append(str(node.module).rpartition(".")[2])
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                made = ast.unparse(node.value.func)
                if made.endswith(("Linear", "FusedMoE")) and isinstance(
                    node.targets[0], ast.Attribute
                ):
                    linears.add(node.targets[0].attr)
    return classes, linears


def _line(classes: dict[str, ast.ClassDef], name: str) -> list[str]:
    """A class and those it inherits from, in order, where the files have them."""
    line, todo = [], [name]
    while todo:
        one = todo.pop(0)
        if one in classes and one not in line:
            line.append(one)
            todo.extend(_bases(classes[one]))
    return line


def _bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base).rpartition(".")[2] for base in node.bases]


def _literal(node: ast.ClassDef, name: str) -> dict:
    for each in node.body:
        targets = each.targets if isinstance(each, ast.Assign) else [getattr(each, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return ast.literal_eval(each.value)
    return {}
