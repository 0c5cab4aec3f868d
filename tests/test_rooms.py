"""The layout of the package, read from its sources: rooms, circles, lazy imports, small files."""

import ast
from collections import Counter, defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "lora_jax"

# A room (a file of the root, or a folder) imports the rooms above it in this list only.
ROOMS = (
    "compat", "paths", "files", "processes", "dims", "leaf_class", "config", "quant", "array",
    "transform", "merge", "sharding", "multi", "plan", "methods", "quantize", "tree",
    "optim", "nnx", "linen", "hf", "models", "checkpoint", "train", "analysis", "recipes", "cli",
    "__main__",
)  # fmt: skip

# Where a function may import another file of the package, and why.
LAZY = {
    "lora_jax/cli/": "`--help` prints before jax is loaded",
    "lora_jax/recipes/": "a command loads what it runs, not what the others run",
    "lora_jax/quant/dispatch.py": "a device's kernels need its own Pallas lowering",
}
MOST_LAZY = 60
MOST_ROOT_FILES = 16

# Files of fewer than 60 lines that one file imports, and why they stand alone.
SMALL = {
    "lora_jax/__main__.py": "python -m lora_jax",
    "lora_jax/cli/__main__.py": "python -m lora_jax.cli, the name of before",
    "lora_jax/multi/serve.py": "the name of before the move to models",
}


class Import(NamedTuple):
    """One file of the package imports another."""

    importer: str
    imported: str
    line: int
    lazy: bool


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def spelled(module: str) -> str:
    return FILES[module].relative_to(PACKAGE.parent).as_posix()


def room_of(module: str) -> str:
    return module.split(".")[1]


def _modules(node: ast.AST) -> set[str]:
    """The modules of the package that an import statement loads."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & FILES.keys()
    if not isinstance(node, ast.ImportFrom):
        return set()
    assert node.level == 0, "relative imports hide which room is imported"
    inner = {f"{node.module}.{alias.name}" for alias in node.names}
    return {name if name in FILES else str(node.module) for name in inner} & FILES.keys()


def _imports_of(module: str) -> list[Import]:
    found = []

    def walk(node: ast.AST, lazy: bool):
        for child in ast.iter_child_nodes(node):
            found.extend(
                Import(module, other, child.lineno, lazy)
                for other in _modules(child)
                if other != module
            )
            walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    walk(ast.parse(FILES[module].read_text("utf-8")), False)
    return found


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for module in FILES for found in _imports_of(module))


def test_every_room_has_a_place_in_the_order():
    assert {room_of(module) for module in FILES if module != "lora_jax"} == set(ROOMS)


def test_a_room_imports_only_the_rooms_before_it():
    level = {room: number for number, room in enumerate(ROOMS)}
    upward = [
        f"{spelled(x.importer)}:{x.line} imports {x.imported}"
        for x in imports()
        if "lora_jax" not in (x.importer, x.imported)
        and level[room_of(x.imported)] > level[room_of(x.importer)]
    ]
    assert not upward


def test_no_files_import_each_other_in_a_circle():
    graph = defaultdict(set)
    for x in imports():
        graph[x.importer].add(x.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' <- '.join(error.args[1])}")


def test_nobody_inside_imports_the_face():
    assert not [spelled(x.importer) for x in imports() if x.imported == "lora_jax"]


def test_functions_import_the_package_only_where_a_reason_is_listed():
    lazy = {(x.importer, x.line) for x in imports() if x.lazy}
    places = [f"{spelled(importer)}:{line}" for importer, line in sorted(lazy)]
    assert not [place for place in places if not place.startswith(tuple(LAZY))]
    count = Counter(spelled(importer) for importer, _ in lazy)
    assert len(lazy) <= MOST_LAZY, count.most_common()


def test_the_root_holds_few_files():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_ROOT_FILES


def test_small_files_have_several_importers_or_a_reason():
    importers = defaultdict(set)
    for x in imports():
        importers[x.imported].add(x.importer)
    small = {
        spelled(module)
        for module, path in FILES.items()
        if path.name != "__init__.py"
        and len(importers[module]) <= 1
        and len(path.read_text("utf-8").splitlines()) < 60
    }
    assert small == SMALL.keys()


def test_no_test_imports_another_test():
    """What tests share is in tests/support, where a change to one test cannot break it."""
    tests = Path(__file__).parent
    for path in sorted(tests.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            shared = [m for m in modules if m.startswith("tests.") and ".test_" in m]
            assert not shared, f"{path.relative_to(tests)}:{node.lineno} imports {shared[0]}"
