"""The tensors of a PEFT file, and the piece of a leaf that each of them holds.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight  (r, in)
        path model.layers.self_attn.q_proj.kernel, part a, layer (3,):  a[3] (in..., R)

A `TensorSpec` is one tensor of the file and its place in a leaf. Export reads the specs out of a
tree, import writes them into one; both use nothing else of the file. The layouts:

    linear       A (r, in)             B (out, r)
    embedding    A (r, vocabulary)     B (features, r)
    convolution  A (r, in, window...)  B (out, r, 1...)      magnitude (1, out, 1...)
    experts      A (E·r, in)           B (out, r·E): expert slowest in A, fastest in B
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lora_jax import processes
from lora_jax.array import LoraArray, RowsArray, SavedArray
from lora_jax.config import matching
from lora_jax.config.lora import ALL_LINEAR, LoraConfig
from lora_jax.dims import in_dims, out_dims, stack_dims
from lora_jax.hf.checkpoint import names
from lora_jax.hf.peft.index import PREFIX, AdapterIndex, IndexRow, is_table, nesting
from lora_jax.hf.peft.tying import EMBEDDING_MODULES, HEAD, tied_tables, ties
from lora_jax.paths import bare, module_of

TOKEN_ROWS = "token_adapter.trainable_tokens_delta"

# PEFT's suffix for each part of an adapter, of a linear layer and of an embedding.
_SUFFIX = {
    "a": ("lora_A.weight", "lora_embedding_A"),
    "b": ("lora_B.weight", "lora_embedding_B"),
    "m": ("lora_magnitude_vector", "lora_magnitude_vector"),
    "bias": ("lora_B.bias", ""),
}

# The arrays of a leaf that an adapter's file holds.
PARTS = {LoraArray: ("a", "b", "m", "bias"), SavedArray: ("value",), RowsArray: ("rows",)}
Part = Literal["a", "b", "m", "bias", "value", "rows", "w"]


class TensorSpec(NamedTuple):
    """One tensor of a PEFT file.

    Attributes:
      key: its name in the file.
      shape: its shape in the file.
      part: field of the leaf: "a", "b", "m", "bias" of a LoraArray, "value" of a SavedArray,
        "rows" of a RowsArray, or "w", the frozen base weight that PEFT repeats in the file.
      layer: position along the leaf's stack dims.
      rank: rank of this layer's adapter, at most the leaf's; 0 for tensors that have no rank.
      cut: axis of the block that is cut to the rank, None for tensors that have no rank.
      axes: `theirs = ours.transpose(axes).reshape(shape)`; None leaves the order.
      repeats: the file holds these numbers twice: they are the base's weight, or the tied head's
        copy of the embedding's adapter. Such a tensor is compared, not read.
    """

    key: str
    shape: tuple[int, ...]
    part: Part
    layer: tuple[int, ...] = ()
    rank: int = 0
    cut: int | None = None
    axes: tuple[int, ...] | None = None
    repeats: bool = False


class _Layout(NamedTuple):
    """How one part of an adapter lies in the file, see `TensorSpec`."""

    shape: tuple[int, ...]
    cut: int | None = None
    axes: tuple[int, ...] | None = None


# Families whose class in transformers stores experts as (experts, in, out) without setting
# `is_transposed`: PEFT then takes the outputs for the inputs. In all others it is right.
SWAPPED = ("llama4", "llama4_text")


def tensor_specs(
    index: AdapterIndex,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    model_type: str | None = None,
) -> dict[str, list[TensorSpec]]:
    """Every tensor that the PEFT file of an adapter holds.

    Args:
      index: of the adapter.
      shapes: of the tensors in a file that is read: they show how experts lie in it.
      model_type: Hugging Face's name of the model family, which decides it where they do not.

    Returns:
      The specs of each leaf that trains, in the tree's order. Those of part "w" may be absent
      from a file. Where the config ties head and embedding (`ensure_weight_tying`), those of a
      tied table are there for both.

    Raises:
      ValueError: PEFT has no layout for a leaf's adapter, or does not know the order of several.
    """
    config, adapted = index.config, set(index.adapted)
    tied = tied_tables(index.leaves) if ties(config) else []
    wrapped = nesting(index)
    found = {}
    for path, rows in index.rows.items():
        specs: list[TensorSpec] = []
        for row in rows:
            if row.kind == "saved":
                specs += _saved_specs(row, config, adapted)
            elif row.kind == "rows":
                key = f"{PREFIX}{row.name}.{TOKEN_ROWS}"
                specs.append(TensorSpec(key, tuple(row.leaf.rows.shape), "rows", row.layer))
            elif row.rank and row.kind == "parameter":
                specs += _parameter_specs(row, wrapped[row.name], shapes or {}, model_type)
            elif row.rank:
                specs += _module_specs(row)
                embeds = path in tied or row.name.rpartition(".")[2] in EMBEDDING_MODULES
                if embeds and _repeats_base(config):
                    specs.append(_base_spec(row))
        if path in tied:
            specs += _head_specs(rows[0], specs)
        found[path] = specs
    return found


def _module_specs(row: IndexRow) -> Iterator[TensorSpec]:
    for part, layout in _layouts(row).items():
        if getattr(row.leaf, part) is not None:
            key = f"{PREFIX}{row.name}.{_SUFFIX[part][is_table(row.path, row.leaf)]}"
            yield _lora_spec(row, key, part, layout)


def _lora_spec(row: IndexRow, key: str, part: Part, layout: _Layout) -> TensorSpec:
    return TensorSpec(
        key=key,
        shape=layout.shape,
        part=part,
        layer=row.layer,
        rank=row.rank,
        cut=layout.cut,
        axes=layout.axes,
    )


def _layouts(row: IndexRow) -> dict[Part, _Layout]:
    """The layout of each part of one layer's adapter."""
    leaf, rank = row.leaf, row.rank
    ins, outs = in_dims(leaf.roles), out_dims(leaf.roles)
    fan_in, fan_out = _size(leaf, ins), _size(leaf, outs)
    last = tuple(range(1, len(outs) + 1))  # b's block is (R, out...)
    if leaf.window is None:
        return {
            # Ours is (in..., R): the rank moves to the front, the in dims become one.
            "a": _Layout((rank, fan_in), len(ins), (len(ins), *range(len(ins)))),
            "b": _Layout((fan_out, rank), 0, (*last, 0)),
            "m": _Layout((fan_out,)),
            "bias": _Layout((fan_out,)),
        }
    # torch's kernels are (out, in, window...); ours have the dims in any order.
    channel = [ins.index(d) for d in ins if d not in leaf.window.dims]
    window = [ins.index(d) for d in leaf.window.dims]
    if leaf.window.groups > 1 or len(channel) != 1:
        raise ValueError(
            f"leaf `{row.path}` is the kernel of a convolution with {leaf.window.groups} groups, "
            "whose adapter PEFT makes otherwise: its A mixes the channels of all groups, which no "
            "change of this kernel can; exclude it, or merge the adapter (`lora.merge`)"
        )
    ones = (1,) * len(window)
    spatial = tuple(leaf.shape[d] for d in leaf.window.dims)
    return {
        "a": _Layout(
            shape=(rank, fan_in // math.prod(spatial), *spatial),
            cut=len(ins),
            axes=(len(ins), *channel, *window),
        ),
        "b": _Layout((fan_out, rank, *ones), 0, (*last, 0)),
        "m": _Layout((1, fan_out, *ones)),
        "bias": _Layout((fan_out,)),
    }


def _size(leaf: LoraArray, dims: Sequence[int]) -> int:
    return math.prod(leaf.shape[d] for d in dims)


def _parameter_specs(
    row: IndexRow, wrapped: int, shapes: Mapping[str, tuple[int, ...]], model_type: str | None
) -> Iterator[TensorSpec]:
    """The two tensors of a parameter that target_parameters names: all experts of a layer."""
    # PEFT wraps the module once a parameter: an outer wrapper holds the inner one as `base_layer`.
    module = PREFIX + row.name.rpartition(".")[0] + ".base_layer" * wrapped
    plain, swapped = _parameter_layouts(row)
    key = f"{module}.{_SUFFIX['a'][0]}"
    if _is_swapped(row, (plain["a"].shape, swapped["b"].shape), shapes.get(key), model_type):
        # ΔW = a·b either way: the file's A is our b, and its B our a.
        yield _lora_spec(row, key, "b", swapped["b"])
        yield _lora_spec(row, f"{module}.{_SUFFIX['b'][0]}", "a", swapped["a"])
        return
    for part in ("a", "b"):
        yield _lora_spec(row, f"{module}.{_SUFFIX[part][0]}", part, plain[part])


def _is_swapped(
    row: IndexRow,
    expected: tuple[tuple[int, ...], tuple[int, ...]],
    found: tuple[int, ...] | None,
    model_type: str | None,
) -> bool:
    """Whether PEFT takes the outputs of a parameter for its inputs.

    It takes a parameter's last dim for the inputs, and the first after the experts' only where the
    module's class sets `is_transposed`. `expected` are the shapes of the file's A, plain and
    swapped; `found` is the file's, or None when one is written.
    """
    roles = row.leaf.roles[len(row.layer) :]
    if module_of(bare(row.path)) != bare(row.path):
        # The file has a module's weight in the order of dims in its family's table of names.
        axes = names.tensor_of(bare(row.path), row.layer).axes
        roles = roles if axes is None else "".join(roles[axes.index(d)] for d in range(len(axes)))
    in_first = roles.replace("s", "").startswith("i")
    if "s" not in roles or not in_first:
        return in_first
    plain, swapped = expected
    if plain != swapped and found is not None:
        return found == swapped
    if plain == swapped and model_type is None:
        raise ValueError(
            f"leaf `{row.path}`: its experts are square matrices (experts, in, out), and whether "
            "PEFT takes their first or their second dim for the inputs depends on the model's "
            'class in transformers, which is not known here: pass model_type ("gpt_oss", '
            '"llama4_text", ... as in config.json)'
        )
    return model_type in SWAPPED


def _parameter_layouts(row: IndexRow) -> tuple[dict[Part, _Layout], dict[Part, _Layout]]:
    """The layouts of a parameter's factors: in the file's A and B, and the other way around."""
    leaf, stack = row.leaf, stack_dims(row.leaf.roles)
    depth = len(row.layer)
    ins, outs = in_dims(leaf.roles), out_dims(leaf.roles)
    fan_in, fan_out = _size(leaf, ins), _size(leaf, outs)
    if len(stack) == depth:  # a matrix of its own, laid out as a linear layer's
        swapped: dict[Part, _Layout] = {
            "a": _Layout((fan_in, row.rank), len(ins)),
            "b": _Layout((row.rank, fan_out), 0),
        }
        return _layouts(row), swapped
    if len(stack) > depth + 1:
        raise ValueError(
            f"leaf `{row.path}` stacks {len(stack)} dims, but PEFT's `target_parameters` have one "
            f"dim of experts besides the layers ({depth} here): adapt it with `target_modules`"
        )
    # PEFT keeps the experts' factors side by side in one matrix, expert slowest in A, fastest in B.
    wide = leaf.shape[stack[-1]] * row.rank
    # Blocks: a is (E, in..., R), b is (E, R, out...).
    n_in, n_out = len(ins), len(outs)
    plain: dict[Part, _Layout] = {
        "a": _Layout((wide, fan_in), n_in + 1, (0, n_in + 1, *range(1, n_in + 1))),
        "b": _Layout((fan_out, wide), 1, (*range(2, n_out + 2), 1, 0)),
    }
    swapped = {
        "a": _Layout((fan_in, wide), n_in + 1, (*range(1, n_in + 1), n_in + 1, 0)),
        "b": _Layout((wide, fan_out), 1),
    }
    return plain, swapped


def _repeats_base(config: LoraConfig) -> bool:
    """Whether PEFT writes embeddings' base weights too (`save_embedding_layers="auto"`).

    It does so where the config targets an embedding, because its vocabulary may have been resized.
    """
    targets = config.target_modules
    if targets == ALL_LINEAR or config.trainable_token_indices:
        return False
    return isinstance(targets, str) or any(entry in targets for entry in EMBEDDING_MODULES)


def _base_spec(row: IndexRow) -> TensorSpec:
    shape = row.leaf.shape[len(row.layer) :]
    if is_table(row.path, row.leaf):  # (vocabulary, features) there, as looked up here
        roles = row.leaf.roles[len(row.layer) :]
        axes = None if roles.startswith("i") else (1, 0)
    else:
        axes = names.tensor_of(bare(row.path), row.layer).axes
    layout = _whole(row.path, shape, axes)
    return TensorSpec(
        key=f"{PREFIX}{row.name}.base_layer.weight",
        shape=layout.shape,
        part="w",
        layer=row.layer,
        axes=layout.axes,
        repeats=True,
    )


def _head_specs(row: IndexRow, table: list[TensorSpec]) -> list[TensorSpec]:
    """The specs of a tied head: PEFT writes `lora_A = lora_embedding_Bᵀ` and the reverse.

    table  W + s·a·b  (V, D)      head  W + s·(B·A)  (V, D),  B = a,  A = b
    """
    if isinstance(row.leaf, LoraArray) and row.leaf.m is not None:
        raise ValueError(
            f"leaf `{row.path}` is head and embedding in one, and PEFT's DoRA keeps a magnitude "
            "for each; exclude the embedding, or leave DoRA out"
        )
    found = []
    for spec in table:
        shape, axes = spec.shape, spec.axes
        if spec.part in ("a", "b"):
            # The head's weight is the table, which a lookup multiplies from the other side.
            name, shape, axes = _SUFFIX["b" if spec.part == "a" else "a"][0], shape[::-1], None
        else:
            name = spec.key.rpartition(f"{module_of(bare(row.path))}.")[2]
        key = f"{PREFIX}{HEAD}.{name}"
        found.append(spec._replace(key=key, shape=shape, axes=axes, repeats=True))
    return found


def _saved_specs(row: IndexRow, config: LoraConfig, adapted: set[str]) -> Iterator[TensorSpec]:
    tensor = names.tensor_of(bare(row.path), row.layer)
    key = PREFIX + tensor.name
    if not matching.is_saved(config, row.name):
        # A bias that trains beside an adapter sits in the module that the adapter wraps.
        if not matching.trains_bias(config, tensor.name, adapted=row.name in adapted):
            return
        if row.name in adapted:
            key = f"{PREFIX}{row.name}.base_layer.bias"
    layout = _whole(row.path, row.leaf.shape[len(row.layer) :], tensor.axes)
    spec = TensorSpec(key, layout.shape, "value", row.layer, axes=layout.axes)
    yield spec
    root = matching.saved_root(config, row.name)
    if root and config.bias == "all" and key.endswith(".bias"):
        # PEFT writes every bias that it finds: those of both its copies of a saved module. The
        # adapter's name is left out of a key only where one component follows it.
        rest = tensor.name.removeprefix(root)
        trained = "modules_to_save" if rest == ".bias" else "modules_to_save.default"
        copies: tuple[tuple[Part, str], ...] = (("value", trained), ("w", "original_module"))
        for part, copy in copies:
            yield spec._replace(key=f"{PREFIX}{root}.{copy}{rest}", part=part, repeats=True)


def _whole(path: str, shape: tuple[int, ...], axes: tuple[int, ...] | None) -> _Layout:
    """The layout there of one block of ours, from `ours = theirs.transpose(axes)`."""
    if path.rpartition(".")[2] == "bias":
        # A vector there; here a bias of split heads has a dim for them.
        return _Layout((math.prod(shape),))
    if axes is None:
        return _Layout(tuple(shape))
    if len(axes) != len(shape):
        raise ValueError(
            f"leaf `{path}`: one layer of it has shape {tuple(shape)}, which cannot be split "
            f"into Hugging Face's {len(axes)} dimensions; reshape the leaf to two"
        )
    back = tuple(axes.index(d) for d in range(len(axes)))
    return _Layout(tuple(shape[d] for d in back), None, back)


def read_leaf(leaf: Any, specs: Sequence[TensorSpec]) -> tuple[Any, dict[str, np.ndarray]]:
    """Copies a leaf that trains to the host, and takes the tensors of the file out of it.

    Args:
      leaf: the leaf.
      specs: the tensors to take.

    Returns:
      The leaf with NumPy arrays, an adapter's base weight only where a spec is of it; and the
      tensors by their name in the file, each contiguous and of its spec's shape.
    """
    parts: list[str] = [*PARTS[type(leaf)]]
    parts += ["scale"] if isinstance(leaf, LoraArray) else []
    # The base is the largest array of a leaf: it is copied only where it is compared or repeated.
    if isinstance(leaf, SavedArray) or any(spec.part == "w" for spec in specs):
        parts.append("w")
    held = {p: getattr(leaf, p) for p in parts if getattr(leaf, p) is not None}
    host = {p: np.asarray(processes.whole(x)) for p, x in held.items()}
    tensors = {
        spec.key: np.ascontiguousarray(_view(host[spec.part], spec)).reshape(spec.shape)
        for spec in specs
    }
    return dataclasses.replace(leaf, **host), tensors


def write_tensor(part: np.ndarray, spec: TensorSpec, tensor: np.ndarray) -> None:
    """Writes one tensor of the file into its place in a leaf's part, in place."""
    view = _view(part, spec)
    view[...] = tensor.reshape(view.shape)


def _view(part: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """The spec's block of a part, its axes in the file's order: a view."""
    block = part[spec.layer]
    # A leaf is allocated with its largest rank; a layer of a smaller one uses the first columns.
    if spec.cut is not None:
        block = block[(slice(None),) * spec.cut + (slice(spec.rank),)]
    return block if spec.axes is None else block.transpose(spec.axes)
