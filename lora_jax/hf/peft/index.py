"""The index of an adapter: what PEFT calls each layer of each leaf, and its rank, alpha and scale.

    model.layers.self_attn.q_proj.kernel   layer 3:  model.layers.3.self_attn.q_proj
    model.layers.mlp.experts.gate_up_proj  layer 3, where `target_parameters` names it:
                                                     model.layers.3.mlp.experts.gate_up_proj

The index is made once from a tree; the tensors of a file, their checks and the fields of the
config are all read from it. Experts of a parameter that `target_parameters` does not name are
numbered as layers are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from lora_jax.array import LoraArray, RowsArray, SavedArray
from lora_jax.config import matching
from lora_jax.config.lora import LoraConfig
from lora_jax.config.starts import lacking_for_experts
from lora_jax.dims import sizes, stack_dims
from lora_jax.hf.checkpoint import names
from lora_jax.paths import bare, expand, module_of

# What PEFT's names of tensors start with.
PREFIX = "base_model.model."
BASE = ".base_layer"  # what PEFT calls a module inside an adapter

# The order in which models register the parameters of their experts, which decides how PEFT nests
# the adapters of several parameters of one module.
REGISTERED = ("gate_up_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")

# The parameter that shows that a module holds fused experts.
FUSED = ".experts.gate_up_proj"
# Names that PEFT takes for those of experts, as they were before transformers 5.
_TAKEN = (".gate_proj", ".up_proj", ".down_proj")
# Families whose names it leaves alone, as they were.
_LEFT_ALONE = ("qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text")

Kind = Literal["module", "parameter", "saved", "rows"]


class IndexRow(NamedTuple):
    """One layer of a leaf that trains.

    Attributes:
      path: the leaf's path.
      leaf: the leaf.
      layer: index along the leaf's stack dims; that of a parameter leaves out the experts.
      name: full name of the layer's module, or of the parameter that `target_parameters` names.
      kind: "module" or "parameter" of an adapter, "saved" for a leaf that trains whole, "rows"
        for a table of which some rows train.
      rank: of the layer's adapter; 0 where the config gives it none.
      alpha: of the adapter; 0.0 without one.
      scale: of the adapter, as PEFT computes it; 0.0 without one.
    """

    path: str
    leaf: Any
    layer: tuple[int, ...]
    name: str
    kind: Kind
    rank: int = 0
    alpha: float = 0.0
    scale: float = 0.0


@dataclass(frozen=True)
class AdapterIndex:
    """Every leaf of a tree, and a row for each layer of those that train.

    Attributes:
      config: the config that the rows follow.
      leaves: all leaves by path, in the tree's order.
      rows: rows by path, of the leaves that train.
    """

    config: LoraConfig
    leaves: Mapping[str, Any]
    rows: Mapping[str, tuple[IndexRow, ...]]

    @property
    def adapted(self) -> list[str]:
        """Full names of the modules that carry an adapter, in the tree's order; no parameters."""
        rows = (row for of_leaf in self.rows.values() for row in of_leaf)
        return [row.name for row in rows if row.kind == "module" and row.rank]

    @property
    def parameters(self) -> list[str]:
        """Full names of the parameters that carry an adapter, in the tree's order."""
        rows = (row for of_leaf in self.rows.values() for row in of_leaf)
        return [row.name for row in rows if row.kind == "parameter" and row.rank]


def make_index(leaves: Mapping[str, Any], config: LoraConfig) -> AdapterIndex:
    """Indexes the leaves of a tree.

    Args:
      leaves: leaves by path, from `lora_jax.array.leaves_by_path`.
      config: the config they were made with.

    Raises:
      ValueError: the path of a leaf that trains has no place for the numbers of its layers.
    """
    rows = {path: tuple(_rows(path, leaf, config)) for path, leaf in leaves.items()}
    return AdapterIndex(config, leaves, {path: found for path, found in rows.items() if found})


def _rows(path: str, leaf: Any, config: LoraConfig) -> Iterator[IndexRow]:
    if isinstance(leaf, SavedArray | RowsArray):
        kind = "saved" if isinstance(leaf, SavedArray) else "rows"
        for layer, name in modules_of(path, leaf):
            yield IndexRow(path=path, leaf=leaf, layer=layer, name=name, kind=kind)
    if not isinstance(leaf, LoraArray):
        return
    # A parameter's ranks and alphas follow its own name; everything else goes by its module's.
    if parameters := parameters_of(path, leaf, config):
        for layer, name in parameters.items():
            row = IndexRow(path=path, leaf=leaf, layer=layer, name=name, kind="parameter")
            yield _with_rank(row, config) if matching.names_parameter(config, name) else row
        return
    for layer, name in modules_of(path, leaf):
        row = IndexRow(path=path, leaf=leaf, layer=layer, name=name, kind="module")
        yield _with_rank(row, config)


def _with_rank(row: IndexRow, config: LoraConfig) -> IndexRow:
    found = _match(config, row.path, row.name, whole=row.kind == "parameter")
    if not found.targeted:
        return row
    return row._replace(rank=found.rank, alpha=found.alpha, scale=found.scale)


def modules_of(path: str, leaf: Any) -> Iterator[tuple[tuple[int, ...], str]]:
    """The full name of the module that each index of a leaf's stack belongs to.

    Args:
      path: the leaf's path.
      leaf: a leaf, whose stack dims are its roles' `s`; a plain array is stacked along as many
        leading dims as its path leaves numbers out.

    Raises:
      ValueError: the path has no place for the numbers of the leaf's layers.
    """
    stack = stack_sizes(path, leaf)
    for layer in np.ndindex(*stack):
        yield layer, _named(path, layer, stack)


def parameters_of(path: str, leaf: Any, config: LoraConfig) -> dict[tuple[int, ...], str]:
    """The full name of the parameter in each layer, if target_parameters names any of them.

    Returns:
      Names by layer; the experts' dim is no layer. Empty if none is named.
    """
    if not config.target_parameters:
        return {}
    module, _, parameter = bare(path).rpartition(".")
    # The dims in front of the experts' are layers: their numbers stand in the module's name.
    depth = names.stack_depth(module) if module else 0
    parameter = their_parameter(bare(path))
    found = {
        layer: f"{names.module_name(module, layer)}.{parameter}"
        for layer in np.ndindex(*leaf.shape[:depth])
    }
    targeted = any(matching.names_parameter(config, name) for name in found.values())
    return found if targeted else {}


def with_fused_experts(
    leaves: Mapping[str, Any], config: LoraConfig, model_type: str | None
) -> LoraConfig:
    """The config with adapted experts, gate beside up in one array, among `target_parameters`.

    transformers has such experts as parameters of one module; PEFT finds no module for each. Nor
    does it take the routers of gpt-oss, no linear layer there, which lies beside experts with
    biases, of GraniteMoE, and of Llama 4, which returns two results. Of models that have other MLPs
    too, in an `mlp`, it takes the names of their layers, and that of the router, for those of
    experts: they are parameters here as well, but for some `model_type`.

    Raises:
      ValueError: the config has what PEFT does not have for parameters.
    """
    fused = {
        bare(path).removesuffix(".gate_up_proj") for path in leaves if bare(path).endswith(FUSED)
    }
    biased = {bare(path).removesuffix(".gate_up_proj_bias") for path in leaves} & fused
    llama4 = {module for module in fused if module.endswith(".feed_forward.experts")}
    routers = {f"{module.removesuffix('experts')}router" for module in biased | llama4}
    modules = {module_of(bare(path)) for path in leaves} if fused else set()
    routers |= {module for module in modules if module.endswith(".block_sparse_moe.router")}
    plain = {module for module in modules if module.rpartition(".")[0] not in fused}
    renamed = any(module.endswith(".mlp.experts") for module in fused)
    taken = {module for module in plain if module.endswith(_TAKEN)} if renamed else set()
    beside = set() if model_type in _LEFT_ALONE else taken
    if taken:
        routers |= beside | {module for module in modules if module.endswith(".mlp.gate")}
    named: dict[str, list[str]] = {}  # the end of parameters' names -> the adapted ones
    partly = set()  # the ends of those of which a layer, of any stack, has no adapter
    for path, leaf in leaves.items():
        module = bare(path).rpartition(".")[0]
        if module not in fused | routers:
            continue
        parameter, depth = their_parameter(bare(path)), names.stack_depth(module)
        # Gemma 4's experts lie in a layer itself, whose number would stand between.
        last = names.module_name(module, (0,) * depth).split(".")[-2:]
        short = ".".join((*(part for part in last if not part.isdigit()), parameter))
        if not isinstance(leaf, LoraArray):
            partly.add(short)
            continue
        if parameters_of(path, leaf, config):
            continue
        ranks = {row.layer[:depth]: row.rank for row in _rows(path, leaf, config)}
        own = [f"{names.module_name(module, at)}.{parameter}" for at, r in ranks.items() if r]
        partly |= {short} if len(own) < len(ranks) else set()
        named[short] = [*named.get(short, ()), *own]
    entries = [x for end, own in named.items() for x in (own if end in partly else [end])]
    if entries and (given := lacking_for_experts(config)):
        raise ValueError(
            f"{given} does not work with experts in PEFT, and `{entries[0]}` is adapted: leave it "
            "out, or the experts (`exclude_modules` of gate_up_proj, down_proj)"
        )
    patterns = {
        name: {**found, **{rf"{key}\.weight": value for key, value in found.items()}}
        for name in ("rank_pattern", "alpha_pattern")
        if (found := getattr(config, name)) and beside and entries
    }
    return replace(config, target_parameters=(*config.target_parameters, *entries), **patterns)


def parameter_of(module: str, config: LoraConfig) -> str | None:
    """The full name of the parameter that an adapter at a module of PEFT's is of, if any.

    Args:
      module: without `PREFIX`, with a `.base_layer` for each adapter around this one.
      config: the adapter's.
    """
    plain = module.replace(BASE, "")
    ends = dict.fromkeys(entry.rpartition(".")[2] for entry in config.target_parameters)
    full = [f"{plain}.{end}" for end in ends]
    found = [name for name in full if matching.names_parameter(config, name)]
    # The first parameter of a module has the innermost adapter.
    nested = sorted(found, key=lambda name: _registered(config, name))
    return nested[-1 - module.count(BASE)] if nested else None


def their_parameter(path: str) -> str:
    """PEFT's name of the parameter at a path: `weight` for the `kernel` of a linear layer."""
    last = path.rpartition(".")[2]
    if module_of(path) == path:
        return last
    try:
        return names.tensor_of(path, (0,) * names.stack_depth(path)).name.rpartition(".")[2]
    except ValueError:
        # Not a parameter of Hugging Face's, such as `w`: it goes by its own name.
        return last


def every_module(leaves: Mapping[str, Any], config: LoraConfig) -> list[str]:
    """Full names of the modules of all leaves, but of those that are parameters of a config.

    Raises:
      ValueError: as `make_index`, here for leaves that do not train too.
    """
    return [
        name
        for path, leaf in leaves.items()
        if not parameters_of(path, leaf, config)
        for _, name in modules_of(path, leaf)
    ]


def every_parameter(leaves: Mapping[str, Any], config: LoraConfig) -> list[str]:
    """Full names of the parameters, of leaves of which target_parameters names a layer."""
    return [
        name for path, leaf in leaves.items() for name in parameters_of(path, leaf, config).values()
    ]


def named_targets(index: AdapterIndex) -> list[str]:
    """Entries for target_modules that match the adapted modules and no others, sorted.

    They are the last components of the names, unless these match a module without an adapter
    too: then they are the full names.
    """
    # PEFT compares the ends of names, so a last component also matches modules elsewhere.
    adapted = set(index.adapted)
    every = set(every_module(index.leaves, index.config))
    # Of one that is its parent's too (DeBERTa's `conv.conv`) PEFT would wrap the parent.
    parents = {part for name in every for part in name.split(".")[:-1]}
    lasts = {name: name.rpartition(".")[2] for name in adapted}
    short = {
        ".".join(name.split(".")[-2:]) if last in parents else last for name, last in lasts.items()
    }
    matched = {n for n in every if any(matching.ends_with(n, s) for s in short)}
    excluded = {n for n in every if matching.is_excluded(index.config, n)}
    return sorted(short if matched - excluded == adapted else adapted)


def nesting(index: AdapterIndex) -> dict[str, int]:
    """How many other adapters PEFT wraps around that of each parameter, by the parameter's name.

    PEFT wraps a module once for each of its parameters, in the order in which the model
    registers them; a JAX tree does not keep that order. Known names stand in transformers' order,
    others as `target_parameters` lists them. If that order is wrong, the shapes do not fit.

    Raises:
      ValueError: the order is not known, and the shapes are equal, so a wrong one would fit.
    """
    modules: dict[str, list[str]] = {}
    sizes_by_name = {}
    for row in (row for of_leaf in index.rows.values() for row in of_leaf):
        if row.kind == "parameter" and row.rank:
            modules.setdefault(row.name.rpartition(".")[0], []).append(row.name)
            sizes_by_name[row.name] = sizes(row.leaf.shape, row.leaf.roles)[1:]
    for found in modules.values():
        _check_order(found, sizes_by_name)
    return {
        name: len(found) - 1 - place
        for found in modules.values()
        for place, name in enumerate(sorted(found, key=lambda n: _registered(index.config, n)))
    }


def _check_order(found: list[str], sizes_by_name: Mapping[str, tuple[int, int]]) -> None:
    unknown = [name for name in found if name.rpartition(".")[2] not in REGISTERED]
    alike = len({sizes_by_name[name] for name in found}) < len(found)
    if unknown and len(found) > 1 and alike:
        raise ValueError(
            "`target_parameters`: PEFT numbers the adapters of "
            f"{', '.join(f'`{n}`' for n in found)} by the order in which its model registers them, "
            "which is not known here, and their "
            "shapes are alike: adapt one of them, or rename them as transformers does "
            f"({', '.join(REGISTERED)})"
        )


def _registered(config: LoraConfig, name: str) -> tuple[int, int]:
    last = name.rpartition(".")[2]
    known = REGISTERED.index(last) if last in REGISTERED else len(REGISTERED)
    listed = enumerate(config.target_parameters)
    return known, next((i for i, entry in listed if matching.ends_with(name, entry)), 0)


def stack_sizes(path: str, leaf: Any) -> tuple[int, ...]:
    """Sizes of a leaf's stack dims."""
    if isinstance(leaf, LoraArray):
        return tuple(leaf.shape[d] for d in stack_dims(leaf.roles))
    trains = isinstance(leaf, SavedArray | RowsArray)
    # `h.kernel`, a module's matrix or a parameter of stacked layers, has to be told if it trains.
    return tuple(leaf.shape[: names.stack_depth(bare(path) if trains else module_of(bare(path)))])


def _named(path: str, layer: tuple[int, ...], stack: tuple[int, ...]) -> str:
    module = module_of(bare(path))
    if not stack:  # a single module may be called `layer`, or lie in one
        return module
    if len(layer) == names.stack_depth(module):
        return names.module_name(module, layer)
    # A stack under a component that no table of names has, such as `blocks`.
    if len(layer) == 1 and (expanded := expand(module, stack[0])):
        return expanded[layer[0]]
    raise ValueError(
        f"leaf `{path}` stacks {len(layer)} dimension(s) of layers, but its path has no place for "
        "their numbers in a PEFT name; rename the tree so that a component such as `layers` holds "
        "the stacked modules, unstack it, or give Hugging Face's names by `name_map` (experts "
        "stored as one array are written where `target_parameters` names them)"
    )


def adapts(config: LoraConfig, path: str, name: str) -> bool:
    """Whether a config adapts a layer of a leaf; with "all-linear", any that is not excluded.

    Args:
      config: the config.
      path: the leaf's path.
      name: full name of the layer's module or parameter.
    """
    return _match(config, path, name).targeted


def _match(config: LoraConfig, path: str, name: str, *, whole: bool = False) -> matching.Match:
    """What a config does with a layer; `whole`: its name is the parameter's, not the module's."""
    plain = bare(path)
    module, last = module_of(plain), plain.rpartition(".")[2]
    # An array without a parameter name of its own (`gate_up_proj`) is module and parameter in one.
    parameter = name if whole or module == plain else f"{name}.{last}"
    return matching.match(config, (name, parameter), (path, module_of(path), plain, module))


def is_embedding(path: str) -> bool:
    """Whether a leaf is a lookup table, which PEFT names differently: Flax calls it so."""
    return path.rpartition(".")[2] == "embedding"


def is_table(path: str, leaf: Any) -> bool:
    """Whether a leaf is a lookup table by its path, or as the plan of its adapter found."""
    return is_embedding(path) or (isinstance(leaf, LoraArray) and leaf.tied is not None)
