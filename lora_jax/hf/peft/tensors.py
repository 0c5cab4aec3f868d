"""Where every tensor of a PEFT adapter sits in a tree of LoRA leaves.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight  (r, in)
        path model.layers.self_attn.q_proj.kernel, part a, index (3,):  a[3] (in..., R)

A *slot* is one tensor of the file and the piece of a leaf it corresponds to. Export reads the
slots of a tree, import fills them; neither knows more than the list. The layouts:

    linear       A (r, in)             B (out, r)
    embedding    A (r, vocabulary)     B (features, r)
    convolution  A (r, in, window...)  B (out, r, 1...)      magnitude (1, out, 1...)
    experts      A (E·r, in)           B (out, r·E): expert slowest in A, fastest in B
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lora_jax.array import LoraArray, RowsArray, SavedArray
from lora_jax.config import matching
from lora_jax.config.lora import ALL_LINEAR, LoraConfig
from lora_jax.dims import in_dims, out_dims, stack_dims
from lora_jax.hf.checkpoint import names
from lora_jax.hf.peft.modules import (
    EMBEDDING_MODULES,
    HEAD,
    adapted_names,
    adapts,
    bare,
    is_embedding,
    leaves_of,
    modules_of,
    nesting,
    parameters_of,
    stack_sizes,
    tied_tables,
    ties,
)
from lora_jax.paths import module_of, nearest

PREFIX = "base_model.model."
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"


# PEFT's suffix for each part of an adapter, of a linear layer and of an embedding.
_SUFFIX = {
    "a": ("lora_A.weight", "lora_embedding_A"),
    "b": ("lora_B.weight", "lora_embedding_B"),
    "m": ("lora_magnitude_vector", "lora_magnitude_vector"),
    "bias": ("lora_B.bias", ""),
}


class Slot(NamedTuple):
    """One tensor of a PEFT file.

    Attributes:
      key: its name in the file.
      shape: its shape in the file.
      path: the leaf it belongs to.
      part: field of the leaf: "a", "b", "m", "bias" of a LoraArray, "value" of a SavedArray,
        "rows" of a RowsArray, or "w", the frozen base weight that PEFT repeats in the file.
      index: position along the leaf's stack dims.
      rank: rank of this layer's adapter, at most the leaf's (0 where no adapter is meant).
      cut: axis of the block that is cut to the rank, None where it has no rank.
      axes: `theirs = ours.transpose(axes).reshape(shape)`; None leaves the order.
      repeats: the file says again what stands elsewhere: the base's weight, or the tied head's
        copy of the embedding's adapter. Such a tensor is compared, not read.
    """

    key: str
    shape: tuple[int, ...]
    path: str
    part: str
    index: tuple[int, ...] = ()
    rank: int = 0
    cut: int | None = None
    axes: tuple[int, ...] | None = None
    repeats: bool = False


class _Layout(NamedTuple):
    """How one part of an adapter is laid out there: fields of a `Slot`."""

    shape: tuple[int, ...]
    cut: int | None = None
    axes: tuple[int, ...] | None = None


def by_path(slots: list[Slot]) -> dict[str, list[Slot]]:
    """The slots of each leaf."""
    found: dict[str, list[Slot]] = {}
    for slot in slots:
        found.setdefault(slot.path, []).append(slot)
    return found


def slots_of(lora_params, config: LoraConfig) -> list[Slot]:
    """Every tensor that a PEFT file of this adapter holds.

    Args:
      lora_params: tree with leaves that train.
      config: the config it was made with.

    Returns:
      The slots in the tree's order. Those of part "w" may be absent from a file. Where the config
      ties head and embedding (`ensure_weight_tying`), a tied table's slots are there for both.

    Raises:
      ValueError: a leaf cannot be named, or its rank disagrees with the config.
    """
    adapted = set(adapted_names(lora_params, config))
    tied = tied_tables(lora_params) if ties(config) else []
    wrapped = nesting(config, lora_params)
    slots = []
    for path, leaf in leaves_of(lora_params).items():
        if isinstance(leaf, LoraArray):
            experts = parameters_of(path, leaf, config)
            slots += (
                _expert_slots(path, leaf, config, experts, wrapped)
                if experts
                else _lora_slots(path, leaf, config, tied)
            )
        elif isinstance(leaf, SavedArray):
            slots += _saved_slots(path, leaf, config, adapted)
        elif isinstance(leaf, RowsArray):
            for index, name in modules_of(path, leaf):
                key = f"{PREFIX}{name}.{TOKEN_ROWS}"
                slots.append(Slot(key, tuple(leaf.rows.shape), path, "rows", index))
        if path in tied:
            slots += _head_slots(path, leaf, [s for s in slots if s.path == path])
    return slots


def _lora_slots(path: str, leaf: LoraArray, config: LoraConfig, tied: list[str]) -> Iterator[Slot]:
    embedding = is_embedding(path)
    for index, name in modules_of(path, leaf):
        if not adapts(config, path, name):
            continue
        rank = _rank(path, leaf, config, name)
        for part, layout in _layouts(path, leaf, rank).items():
            if getattr(leaf, part) is not None:
                key = f"{PREFIX}{name}.{_SUFFIX[part][embedding]}"
                yield Slot(key, layout.shape, path, part, index, rank, layout.cut, layout.axes)
        embeds = path in tied or name.rpartition(".")[2] in EMBEDDING_MODULES
        if embeds and _repeats_base(config):
            yield _base_slot(path, leaf, name, index)


def _rank(path: str, leaf: LoraArray, config: LoraConfig, name: str) -> int:
    rank = matching.rank_of(config, name)
    if rank > leaf.rank:
        raise ValueError(
            f"leaf `{path}`: its rank is {leaf.rank}, but the config gives `{name}` rank "
            f"{rank}; use the config the adapter was made with"
        )
    return rank


def _layouts(path: str, leaf: LoraArray, rank: int) -> dict[str, _Layout]:
    """The layout of each part of one layer's adapter."""
    ins, outs = in_dims(leaf.roles), out_dims(leaf.roles)
    fan_in, fan_out = _size(leaf, ins), _size(leaf, outs)
    last = tuple(range(1, len(outs) + 1))  # b's block is (R, out...)
    if leaf.window is None:
        return {
            "a": _Layout((rank, fan_in), len(ins), (len(ins), *range(len(ins)))),
            "b": _Layout((fan_out, rank), 0, (*last, 0)),
            "m": _Layout((fan_out,)),
            "bias": _Layout((fan_out,)),
        }
    channel = [ins.index(d) for d in ins if d not in leaf.window.dims]
    window = [ins.index(d) for d in leaf.window.dims]
    if leaf.window.groups > 1 or len(channel) != 1:
        raise ValueError(
            f"leaf `{path}` is the kernel of a convolution with {leaf.window.groups} groups, whose "
            "adapter PEFT makes otherwise: its A mixes the channels of all groups, which no change "
            "of this kernel can; exclude it, or merge the adapter (lora_jax.merge)"
        )
    ones = (1,) * len(window)
    spatial = tuple(leaf.shape[d] for d in leaf.window.dims)
    return {
        "a": _Layout((rank, fan_in // int(np.prod(spatial)), *spatial), len(ins),
                     (len(ins), *channel, *window)),
        "b": _Layout((fan_out, rank, *ones), 0, (*last, 0)),
        "m": _Layout((1, fan_out, *ones)),
        "bias": _Layout((fan_out,)),
    }  # fmt: skip


def _size(leaf: LoraArray, dims: list[int]) -> int:
    return int(np.prod([leaf.shape[d] for d in dims], dtype=int))


def _expert_slots(
    path: str,
    leaf: LoraArray,
    config: LoraConfig,
    layers: dict[tuple[int, ...], str],
    wrapped: dict[str, int],
) -> Iterator[Slot]:
    """The slots of a parameter that target_parameters names: all experts of a layer in one."""
    ins, outs, stack = in_dims(leaf.roles), out_dims(leaf.roles), stack_dims(leaf.roles)
    depth = len(next(iter(layers)))
    if len(stack) == depth:  # a matrix of its own, laid out as a linear layer's
        experts, layouts = 1, lambda rank: _layouts(path, leaf, rank)
    elif len(stack) == depth + 1:
        experts = leaf.shape[stack[-1]]
        # Blocks: a is (E, in..., R), b is (E, R, out...).
        a = (0, len(ins) + 1, *range(1, len(ins) + 1))
        b = (*range(2, len(outs) + 2), 1, 0)

        def layouts(rank):
            return {
                "a": _Layout((experts * rank, _size(leaf, ins)), len(ins) + 1, a),
                "b": _Layout((_size(leaf, outs), rank * experts), 1, b),
            }
    else:
        raise ValueError(
            f"leaf `{path}` stacks {len(stack)} dims, but PEFT's target_parameters know one dim "
            f"of experts besides the layers ({depth} here): adapt it with target_modules"
        )
    for index, name in layers.items():
        if not matching.names_parameter(config, name):
            continue
        module = PREFIX + name.rpartition(".")[0] + ".base_layer" * wrapped[name]
        rank = _rank(path, leaf, config, name)
        for part in ("a", "b"):
            shape, cut, axes = layouts(rank)[part]
            yield Slot(f"{module}.{_SUFFIX[part][0]}", shape, path, part, index, rank, cut, axes)


def _repeats_base(config: LoraConfig) -> bool:
    """Whether PEFT writes embeddings' base weights too (`save_embedding_layers="auto"`)."""
    targets = config.target_modules
    if targets == ALL_LINEAR or config.trainable_token_indices:
        return False
    return isinstance(targets, str) or any(entry in targets for entry in EMBEDDING_MODULES)


def _base_slot(path: str, leaf: LoraArray, name: str, index: tuple[int, ...]) -> Slot:
    layout = _whole(path, leaf.shape[len(index) :], names.tensor_of(bare(path), index).axes)
    key = f"{PREFIX}{name}.base_layer.weight"
    return Slot(key, layout.shape, path, "w", index, axes=layout.axes, repeats=True)


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
            name, shape, axes = _SUFFIX["b" if slot.part == "a" else "a"][0], shape[::-1], None
        else:
            name = slot.key.rpartition(f"{module_of(bare(path))}.")[2]
        key = f"{PREFIX}{HEAD}.{name}"
        yield slot._replace(key=key, shape=shape, axes=axes, repeats=True)


def _saved_slots(
    path: str, leaf: SavedArray, config: LoraConfig, adapted: set[str]
) -> Iterator[Slot]:
    depth = len(stack_sizes(path, leaf))
    for index, name in modules_of(path, leaf):
        tensor = names.tensor_of(bare(path), index)
        key = PREFIX + tensor.name
        if not matching.is_saved(config, name):
            # A bias that trains beside an adapter sits in the module that the adapter wraps.
            if not matching.trains_bias(config, tensor.name, adapted=name in adapted):
                continue
            if name in adapted:
                key = f"{PREFIX}{name}.base_layer.bias"
        layout = _whole(path, leaf.shape[depth:], tensor.axes)
        slot = Slot(key, layout.shape, path, "value", index, axes=layout.axes)
        yield slot
        root = matching.saved_root(config, name)
        if root and config.bias == "all" and key.endswith(".bias"):
            # PEFT writes every bias it comes by: those of both its copies of a saved module. The
            # adapter's name is left out of a key only where one component follows it.
            rest = tensor.name.removeprefix(root)
            trained = "modules_to_save" if rest == ".bias" else "modules_to_save.default"
            for part, copy in (("value", trained), ("w", "original_module")):
                yield slot._replace(key=f"{PREFIX}{root}.{copy}{rest}", part=part, repeats=True)


def _whole(path: str, shape: tuple[int, ...], axes: tuple[int, ...] | None) -> _Layout:
    """The layout there of one block of ours, from `ours = theirs.transpose(axes)`."""
    if path.rpartition(".")[2] == "bias":
        return _Layout((int(np.prod(shape, dtype=int)),))
    if axes is None:
        return _Layout(tuple(shape))
    if len(axes) != len(shape):
        raise ValueError(
            f"leaf `{path}`: one layer of it has shape {tuple(shape)}, which cannot be told "
            f"apart into Hugging Face's {len(axes)} dimensions; reshape the leaf to two"
        )
    back = tuple(axes.index(d) for d in range(len(axes)))
    return _Layout(tuple(shape[d] for d in back), None, back)


# The arrays of a leaf that an adapter's file holds.
PARTS = {LoraArray: ("a", "b", "m", "bias"), SavedArray: ("value",), RowsArray: ("rows",)}


def on_host(leaf, slots: list[Slot]):
    """A leaf with NumPy arrays; an adapter's base weight only where the file repeats it."""
    parts = [*PARTS[type(leaf)]]
    parts += ["scale"] if isinstance(leaf, LoraArray) else []
    if isinstance(leaf, SavedArray) or any(slot.part == "w" for slot in slots):
        parts.append("w")
    host = {p: np.asarray(getattr(leaf, p)) for p in parts if getattr(leaf, p) is not None}
    return dataclasses.replace(leaf, **host)


def read_slot(leaf, slot: Slot) -> np.ndarray:
    """The tensor of a slot, out of a leaf whose arrays are NumPy's.

    Returns:
      An array of `slot.shape`, contiguous.
    """
    return np.ascontiguousarray(_view(getattr(leaf, slot.part), slot)).reshape(slot.shape)


def write_slot(part: np.ndarray, slot: Slot, tensor: np.ndarray) -> None:
    """Puts the tensor of a slot in its place in a leaf's part, an array that may be written."""
    view = _view(part, slot)
    view[...] = tensor.reshape(view.shape)


def _view(part: np.ndarray, slot: Slot) -> np.ndarray:
    """The slot's block of a part, its axes in the file's order: a view."""
    block = part[slot.index]
    if slot.cut is not None:
        block = block[(slice(None),) * slot.cut + (slice(slot.rank),)]
    return block if slot.axes is None else block.transpose(slot.axes)


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
