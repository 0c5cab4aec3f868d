"""Where every tensor of a PEFT adapter sits in a tree of LoRA leaves.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight  (r, in)
        path model.layers.self_attn.q_proj.kernel, part a, index (3,):  a[3] (in..., R)

A *slot* is one tensor of the file and the piece of a leaf it corresponds to. Export reads the
slots of a tree, import fills them; neither knows more than the list.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import matching
from lora_jax.array import LoraArray, SavedArray, in_dims, out_dims, stack_dims
from lora_jax.config import ALL_LINEAR, LoraConfig
from lora_jax.hf import names
from lora_jax.paths import expand, module_of, nearest, spell

PREFIX = "base_model.model."

# Modules whose whole base weight PEFT adds to the file when target_modules names them.
EMBEDDING_MODULES = ("embed_tokens", "lm_head")
HEAD = "lm_head"

# PEFT's field that makes it adapt a tied head and embedding alike.
TYING = "ensure_weight_tying"

# PEFT's suffix for each part of an adapter, of a linear layer and of an embedding.
_SUFFIX = {
    "a": ("lora_A.weight", "lora_embedding_A"),
    "b": ("lora_B.weight", "lora_embedding_B"),
    "m": ("lora_magnitude_vector", "lora_magnitude_vector"),
}


class Slot(NamedTuple):
    """One tensor of a PEFT file.

    Attributes:
      key: its name in the file.
      shape: its shape in the file.
      path: the leaf it belongs to.
      part: field of the leaf: "a", "b", "m" of a LoraArray, "value" of a SavedArray, or "w", the
        frozen base weight that PEFT repeats in the file.
      index: position along the leaf's stack dims.
      rank: rank of this layer's adapter, at most the leaf's (0 where no adapter is meant).
      axes: `ours = theirs.transpose(axes)`; None leaves the order of a "value" or "w", and
        exchanges the dimensions of an "a" or "b".
      repeats: the file says again what stands elsewhere: the base's weight, or the tied head's
        copy of the embedding's adapter. Such a tensor is compared, not read.
    """

    key: str
    shape: tuple[int, ...]
    path: str
    part: str
    index: tuple[int, ...] = ()
    rank: int = 0
    axes: tuple[int, ...] | None = None
    repeats: bool = False


def by_path(slots: list[Slot]) -> dict[str, list[Slot]]:
    """The slots of each leaf."""
    found: dict[str, list[Slot]] = {}
    for slot in slots:
        found.setdefault(slot.path, []).append(slot)
    return found


def on_host(leaf, slots: list[Slot]):
    """A leaf with NumPy arrays; an adapter's base weight only where the file repeats it."""
    parts = ["w", "value"] if isinstance(leaf, SavedArray) else ["a", "b", "m", "scale"]
    parts += ["w"] if any(slot.part == "w" for slot in slots) else []
    host = {p: np.asarray(getattr(leaf, p)) for p in parts if getattr(leaf, p) is not None}
    return dataclasses.replace(leaf, **host)


def leaves_of(lora_params) -> dict[str, Any]:
    """Every leaf of a tree by its path, LoRA and saved leaves whole."""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        lora_params, is_leaf=lambda x: isinstance(x, LoraArray | SavedArray)
    )
    return {spell(path): leaf for path, leaf in flat}


def modules_of(path: str, leaf) -> Iterator[tuple[tuple[int, ...], str]]:
    """The full module name of each layer of a leaf, with the layer's index.

    Args:
      path: the leaf's path.
      leaf: a leaf, whose stack dims are its roles' `b`; a plain array is stacked along as many
        leading dims as its path leaves numbers out.

    Raises:
      ValueError: the path does not say where the numbers of the leaf's layers belong.
    """
    module = module_of(_bare(path))
    sizes = stack_sizes(path, leaf)
    for index in np.ndindex(*sizes):
        yield index, _named(module, index, sizes, path)


def stack_sizes(path: str, leaf) -> tuple[int, ...]:
    """Sizes of a leaf's stack dims."""
    if isinstance(leaf, LoraArray):
        return tuple(leaf.shape[d] for d in stack_dims(leaf.roles))
    return tuple(leaf.shape[: names.stack_depth(_bare(path))])


def _bare(path: str) -> str:
    """A path as a checkpoint knows it: without linen's collection name."""
    return path.removeprefix("params.")


def _named(module: str, index: tuple[int, ...], sizes: tuple[int, ...], path: str) -> str:
    if len(index) == names.stack_depth(module):
        return names.module_name(module, index)
    if len(index) == 1 and (expanded := expand(module, sizes[0])):
        return expanded[index[0]]
    raise ValueError(
        f"leaf `{path}` stacks {len(index)} dimension(s) of layers, but its path does not say "
        "where their numbers belong in a PEFT name; rename the tree so that a component such as "
        "`layers` holds the stacked modules, or unstack it"
    )


def adapts(config: LoraConfig, path: str, name: str) -> bool:
    """Whether a config means a layer of a leaf; with "all-linear", any that is not excluded.

    As in `lora_jax.plan`, a module also goes by its parameter's name and, where no layers are
    chosen, by its path without numbers.
    """
    bare = _bare(path)
    spelled = [name, f"{name}.{bare.rpartition('.')[2]}"]
    if any(matching.is_excluded(config, n) for n in spelled):
        return False
    if config.target_modules == ALL_LINEAR:
        return True
    if config.layers_to_transform is None:
        spelled += [path, module_of(path), bare, module_of(bare)]
    return any(matching.is_target(config, n) for n in spelled)


def adapted_names(lora_params, config: LoraConfig) -> list[str]:
    """Full names of the modules that carry an adapter, in the tree's order."""
    return [
        name
        for path, leaf in leaves_of(lora_params).items()
        if isinstance(leaf, LoraArray)
        for _, name in modules_of(path, leaf)
        if adapts(config, path, name)
    ]


def tied_tables(lora_params) -> list[str]:
    """Paths of trained embedding tables that are the output head as well: no head of its own."""
    leaves = leaves_of(lora_params)
    if any(module_of(path).rpartition(".")[2] == HEAD for path in leaves):
        return []
    return [
        path
        for path, leaf in leaves.items()
        if is_embedding(path) and isinstance(leaf, LoraArray | SavedArray)
    ]


def slots_of(lora_params, config: LoraConfig) -> list[Slot]:
    """Every tensor that a PEFT file of this adapter holds.

    Args:
      lora_params: tree with LoraArray and SavedArray leaves.
      config: the config it was made with.

    Returns:
      The slots in the tree's order. Those of part "w" may be absent from a file. Where the config
      ties head and embedding (`ensure_weight_tying`), a tied table's slots are there for both.

    Raises:
      ValueError: a leaf cannot be named, or its rank disagrees with the config.
    """
    adapted = set(adapted_names(lora_params, config))
    tied = tied_tables(lora_params) if config.extra.get(TYING) else []
    slots = []
    for path, leaf in leaves_of(lora_params).items():
        if isinstance(leaf, LoraArray):
            slots += _lora_slots(path, leaf, config)
        elif isinstance(leaf, SavedArray):
            slots += _saved_slots(path, leaf, config, adapted)
        if path in tied:
            slots += _head_slots(path, leaf, [s for s in slots if s.path == path])
    return slots


def _lora_slots(path: str, leaf: LoraArray, config: LoraConfig) -> Iterator[Slot]:
    fan_in = int(np.prod([leaf.shape[d] for d in in_dims(leaf.roles)], dtype=int))
    fan_out = int(np.prod([leaf.shape[d] for d in out_dims(leaf.roles)], dtype=int))
    embedding = is_embedding(path)
    for index, name in modules_of(path, leaf):
        if not adapts(config, path, name):
            continue
        rank = matching.rank_of(config, name)
        if rank > leaf.rank:
            raise ValueError(
                f"leaf `{path}`: its rank is {leaf.rank}, but the config gives `{name}` rank "
                f"{rank}; use the config the adapter was made with"
            )
        shapes = {"a": (rank, fan_in), "b": (fan_out, rank), "m": (fan_out,)}
        for part, shape in shapes.items():
            if part != "m" or leaf.m is not None:
                key = f"{PREFIX}{name}.{_SUFFIX[part][embedding]}"
                yield Slot(key, shape, path, part, index, rank)
        if _repeats_base(config, name):
            yield _base_slot(path, leaf, name, index)


def is_embedding(path: str) -> bool:
    """Whether a leaf is a lookup table, which PEFT names differently: Flax calls it so."""
    return path.rpartition(".")[2] == "embedding"


def _repeats_base(config: LoraConfig, name: str) -> bool:
    """Whether PEFT writes the module's base weight too (`save_embedding_layers="auto"`)."""
    targets = config.target_modules
    if targets == ALL_LINEAR or name.rpartition(".")[2] not in EMBEDDING_MODULES:
        return False
    return isinstance(targets, str) or any(entry in targets for entry in EMBEDDING_MODULES)


def _base_slot(path: str, leaf: LoraArray, name: str, index: tuple[int, ...]) -> Slot:
    tensor = names.tensor_of(_bare(path), index)
    shape = _theirs(leaf.shape[len(index) :], tensor.axes, path)
    key = f"{PREFIX}{name}.base_layer.weight"
    return Slot(key, shape, path, "w", index, 0, tensor.axes, repeats=True)


def _head_slots(path: str, leaf, table: list[Slot]) -> Iterator[Slot]:
    """The slots of a tied head: PEFT writes `lora_A = lora_embedding_Bᵀ` and the reverse.

    table  W + s·a·b  (V, D)      head  W + s·(B·A)  (V, D),  B = a,  A = b
    """
    if isinstance(leaf, LoraArray) and leaf.m is not None:
        raise ValueError(
            f"leaf `{path}` is head and embedding in one, and PEFT's DoRA keeps a magnitude for "
            "each; exclude the embedding, or leave DoRA out"
        )
    for slot in table:
        shape, axes = slot.shape, slot.axes
        if slot.part in ("a", "b"):
            name, shape, axes = _SUFFIX["b" if slot.part == "a" else "a"][0], shape[::-1], (0, 1)
        else:
            name = slot.key.rpartition(f"{module_of(_bare(path))}.")[2]
        key = f"{PREFIX}{HEAD}.{name}"
        yield slot._replace(key=key, shape=shape, axes=axes, repeats=True)


def _saved_slots(
    path: str, leaf: SavedArray, config: LoraConfig, adapted: set[str]
) -> Iterator[Slot]:
    sizes = stack_sizes(path, leaf)
    for index, name in modules_of(path, leaf):
        tensor = names.tensor_of(_bare(path), index)
        key = PREFIX + tensor.name
        if not matching.is_saved(config, name):
            # A bias that trains beside an adapter sits in the module that the adapter wraps.
            if not matching.trains_bias(config, tensor.name, adapted=name in adapted):
                continue
            if name in adapted:
                key = f"{PREFIX}{name}.base_layer.bias"
        shape = _theirs(leaf.shape[len(sizes) :], tensor.axes, path)
        yield Slot(key, shape, path, "value", index, 0, tensor.axes)


def _theirs(shape: tuple[int, ...], axes: tuple[int, ...] | None, path: str) -> tuple[int, ...]:
    """The shape there of one block of ours."""
    if path.rpartition(".")[2] == "bias":
        return (int(np.prod(shape, dtype=int)),)
    if axes is None:
        return tuple(shape)
    if len(axes) != len(shape):
        raise ValueError(
            f"leaf `{path}`: one layer of it has shape {tuple(shape)}, which cannot be told "
            f"apart into Hugging Face's {len(axes)} dimensions; reshape the leaf to two"
        )
    return tuple(shape[axes.index(d)] for d in range(len(shape)))


def read_slot(leaf, slot: Slot) -> np.ndarray:
    """The tensor of a slot, out of a leaf whose arrays are NumPy's.

    Returns:
      An array of `slot.shape`, contiguous.
    """
    block = getattr(leaf, slot.part)[slot.index]
    if slot.part in ("a", "b"):
        flat = block.reshape(*((-1, leaf.rank) if slot.part == "a" else (leaf.rank, -1)))
        matrix = flat[:, : slot.rank] if slot.part == "a" else flat[: slot.rank]
        return np.ascontiguousarray(matrix if slot.axes else matrix.T)
    if slot.axes is None:
        return np.ascontiguousarray(block.reshape(slot.shape))
    return np.ascontiguousarray(block.transpose(np.argsort(slot.axes)))


def write_slot(part: np.ndarray, slot: Slot, tensor: np.ndarray) -> None:
    """Puts the tensor of a slot in its place in a leaf's part, an array that may be written."""
    block = part[slot.index]
    if slot.part == "a":
        block.reshape(-1, block.shape[-1])[:, : slot.rank] = tensor.T
    elif slot.part == "b":
        block.reshape(block.shape[0], -1)[: slot.rank] = tensor.T
    elif slot.axes is None:
        part[slot.index] = tensor.reshape(block.shape)
    else:
        part[slot.index] = tensor.transpose(slot.axes)


def check_keys(slots: list[Slot], tensors: Mapping[str, np.ndarray], source: str) -> None:
    """Refuses a file whose tensors are not exactly the slots.

    Raises:
      ValueError: one message with all that is missing, left over or misshapen, each with the
        nearest names.
    """
    wanted = {slot.key: slot for slot in slots}
    missing = [k for k, s in wanted.items() if s.part != "w" and k not in tensors]
    extra = [k for k in tensors if k not in wanted]
    problems = _listed(
        "missing",
        [
            f"`{k}` (nearest in the file: {_near(k, extra)})" if extra else f"`{k}`"
            for k in missing[:3]
        ],
        len(missing),
    )
    problems += _listed(
        "left over",
        [f"`{k}` (nearest expected: {_near(k, wanted)})" for k in extra[:3]],
        len(extra),
    )
    shapes = [
        f"`{k}` is {tensors[k].shape}, expected {s.shape}"
        for k, s in wanted.items()
        if k in tensors and tensors[k].shape != s.shape
    ]
    problems += _listed("misshapen", shapes[:3], len(shapes))
    if problems:
        raise ValueError(f"{source}: the adapter does not fit this model; {'; '.join(problems)}")


def _near(key: str, known) -> str:
    return nearest(key, known, 1)


def _listed(what: str, shown: list[str], count: int) -> list[str]:
    if not count:
        return []
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    return [f"{count} {what}: {', '.join(shown)}{more}"]
