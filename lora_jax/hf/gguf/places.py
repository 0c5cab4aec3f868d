"""Where the weights of a GGUF file lie, and what changes a file's numbers into Hugging Face's."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from lora_jax.hf.gguf.architectures import GGUF_ARCHITECTURES, gguf_architecture, their_names
from lora_jax.hf.gguf.fields import DeltaHeads, delta_of_file
from lora_jax.hf.gguf.file import Gguf
from lora_jax.hf.gguf.layout import column_order, row_order


class Place(NamedTuple):
    """Where a weight lies.

    Attributes:
      tensor: the file's.
      module: Hugging Face's.
      expert: the number of an expert in the tensor, or None.
      rows: those of an expert, or of the tensor, that are the weight, or None for all.
      turned: it is (in, out) under Hugging Face's name, where the file has (out, in).
    """

    tensor: str
    module: str
    expert: int | None = None
    rows: slice | None = None
    turned: bool = False


# Far more than any model has; lists of so many are made.
MOST_BLOCKS = 10_000
# Queries, keys and values as one tensor, which files of any decoder may have.
FUSED_QKV = "attn_qkv"
_TYPES = "embeddings.token_type_embeddings.weight"
QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
_SIZES = (
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "embedding_length",
)  # fmt: skip
# Modules of whose weights a file has no axis of one: dims of the weight, and which it is.
ONE = {"linear_attn.conv1d": (3, 1), "mlp.shared_expert_gate": (2, 0)}


def places_of(file: Gguf) -> dict[str, Place]:
    """Where each weight lies, by Hugging Face's name."""
    kind = gguf_architecture(file.metadata, file.path)
    ours = {theirs: module for module, theirs in their_names(kind).items()}
    row, found = GGUF_ARCHITECTURES[kind], {}
    beyond = _main_blocks(file, kind)
    for name, tensor in file.tensors.items():
        block, part, ending = _parts(name)
        # The first holds no weight but divisors of RoPE, which `rope_divisors` reads, and llama.cpp
        # reads it in some architectures only; blocks beyond the last predict further tokens.
        divisors = row.divided and name == "rope_freqs.weight"
        if divisors or block is not None and block >= beyond:
            continue
        module = ours.get(part)
        if part == FUSED_QKV and module is None and QKV[0] in row.linears:
            for each, rows in _rows_of_qkv(file, kind, name).items():
                found[f"{row.stack}.{block}.{each}.{ending}"] = Place(name, each, rows=rows)
            continue
        start = "" if block is None else f"{row.stack}.{block}."
        if odd := row.odd.get(f"{part}.{ending}"):
            found[f"{start}{odd}"] = Place(name, odd)
            continue
        if module is None or ending not in ("weight", "bias"):
            where = f"no place in a decoder of the architecture `{kind}`"
            raise ValueError(f"{file.path}: tensor `{name}` has {where}")
        if (experts := re.fullmatch(r"((?:.+\.)?experts)\.(\w+)", module)) and len(
            tensor.shape
        ) == 3:
            first, last = experts.groups()
            names = ("w1", "w3") if row.both.startswith("block_") else ("gate_proj", "up_proj")
            for n, (each, rows) in product(
                range(tensor.shape[0]), _parts_of(last, names, tensor.shape[1])
            ):
                found[f"{start}{first}.{n}.{each}.{ending}"] = Place(name, module, n, rows)
        else:
            turned = row.turned and ending == "weight" and module in row.linears
            found[f"{start}{module}.{ending}"] = Place(name, module, turned=turned)
    return found


def _rows_of_qkv(file: Gguf, kind: str, name: str) -> dict[str, slice]:
    """The rows of queries, keys and values in the tensor that `--fuse-qkv` makes of the three."""
    sizes = [file.metadata.get(f"{kind}.{key}") for key in _SIZES]
    heads, pairs, size, width = (n if type(n) is int and n > 0 else 0 for n in sizes)
    size = size or (width // heads if heads else 0)
    ends = np.cumsum([0, heads, pairs or heads, pairs or heads]) * size
    if ends[-1] != (rows := file.tensors[name].shape[0]):
        raise ValueError(
            f"{file.path}: tensor `{name}` has {rows} rows, expected {ends[-1]}, those of its "
            "queries, keys and values"
        )
    return {module: slice(int(ends[i]), int(ends[i + 1])) for i, module in enumerate(QKV)}


def stated_numbers(file: Gguf) -> dict[str, np.ndarray]:
    """The weights that a file states in its metadata, a number of each block, or has not.

    Raises:
      ValueError: a key missing, or without a number for each block.
    """
    kind = gguf_architecture(file.metadata, file.path)
    row, found = GGUF_ARCHITECTURES[kind], {}
    blocks = file.metadata.get(f"{kind}.block_count")
    count = blocks if type(blocks) is int and 0 < blocks <= MOST_BLOCKS else 0
    for key, leaf in row.stated.items():
        each: Any = file.metadata.get(key)
        # llama.cpp takes one number for all blocks too.
        each = [each] * count if isinstance(each, float) else each
        numbers = [n for n in each if isinstance(n, int | float)] if isinstance(each, list) else []
        if not count or len(numbers) != count or not np.isfinite(numbers).all():
            raise ValueError(
                f"{file.path}: `{key}` must be a number for each of {blocks} blocks, got "
                f"{str(each)[:60]}"
            )
        # Hugging Face has what trains as a vector of one number.
        shape = (1,) if "alpha" in key else ()
        for block, number in enumerate(each):
            found[f"{row.stack}.{block}.{leaf}"] = np.full(shape, number, np.float32)
    table, words = "token_types.weight", file.tensors.get("token_embd.weight")
    if kind == "bert" and words and table not in file.tensors and _without_types(file):
        found[_TYPES] = np.zeros((1, words.shape[-1]), np.float32)
    return found


def _without_types(file: Gguf) -> bool:
    """Whether it is a DistilBERT's: llama.cpp has it as a BERT whose tokens are of one type."""
    return file.metadata.get("tokenizer.ggml.token_type_count") == 1


def inside_of(file: Gguf, place: Place) -> tuple[int, ...]:
    """The shape of a weight in the file."""
    shape = file.tensors[place.tensor].shape[place.expert is not None :]
    return shape if place.rows is None else (place.rows.stop - place.rows.start, *shape[1:])


def _parts_of(experts: str, names: tuple[str, str], rows: int) -> list[tuple[str, slice | None]]:
    """The linear layers of an expert in one tensor, and the rows of each."""
    if experts != "gate_up_proj":
        return [(experts, None)]
    return [(names[0], slice(0, rows // 2)), (names[1], slice(rows // 2, rows))]


def _parts(name: str) -> tuple[int | None, str, str]:
    """`blk.3.attn_q.weight` is (3, "attn_q", "weight"), `output.weight` (None, "output", ...)."""
    found = re.fullmatch(r"(?:blk\.(\d{1,9})\.)?(.+?)(?:\.(\w+))?", name, re.DOTALL)
    block, part, ending = found.groups(default="") if found else ("", "", "")
    return int(block) if block else None, part, ending


def _main_blocks(file: Gguf, kind: str) -> float:
    """The number of blocks without those that predict further tokens."""
    count, further = (
        file.metadata.get(f"{kind}.{key}", 0) for key in ("block_count", "nextn_predict_layers")
    )
    return count - further if type(count) is type(further) is int and further else math.inf


def numbers_here(file: Gguf, place: Place, found: np.ndarray) -> np.ndarray:
    """The numbers of a weight from a file's, whose rows and columns are in order."""
    if place.module.endswith("A_log"):
        if not (found < 0).all():
            raise ValueError(f"{file.path}: tensor `{place.tensor}` must be below 0")
        return np.log(-found)
    found = found - added if (added := _added_to(file, place)) else found
    if place.turned:
        return found.T
    return found.reshape(shape_of(found.shape, place))


def numbers_there(file: Gguf, place: Place, numbers: np.ndarray) -> np.ndarray:
    """The inverse of `numbers_here`."""
    if place.module.endswith("A_log"):
        return -np.exp(numbers)
    numbers = numbers.T if place.turned else numbers
    if place.module in ONE:
        shape = file.tensors[place.tensor].shape
        numbers = numbers if numbers.ndim == len(shape) else numbers.reshape(shape)
    return numbers + _added_to(file, place)


def _added_to(file: Gguf, place: Place) -> np.float32:
    """What the file has added to each number of a weight."""
    row = GGUF_ARCHITECTURES[gguf_architecture(file.metadata, file.path)]
    plain = place.module == "linear_attn.norm" or not place.module.endswith("norm")
    plain = plain or place.tensor.endswith(".bias")
    return np.float32(0 if plain else row.added)


class Halves(NamedTuple):
    """The names of the two weights that are one in Hugging Face's model, and its module."""

    first: str
    second: str
    module: str

    @property
    def latent(self) -> bool:
        """Whether they are keys and values of latent vectors."""
        return self.module.endswith("kv_b_proj")


def halves_of(file: Gguf, places: Mapping[str, Place]) -> dict[str, Halves]:
    """The weights that the file has in two tensors, by Hugging Face's name."""
    row, found = GGUF_ARCHITECTURES[gguf_architecture(file.metadata, file.path)], {}
    for whole, (first, second) in row.joined.items():
        for name, place in places.items():
            if place.module == first:
                other = name.replace(first, second)
                if other not in places:
                    raise ValueError(f"{file.path}: tensor `{place.tensor}` has no other half")
                found[name.replace(first, whole)] = Halves(name, other, whole)
    return found


def order_of(file: Gguf, place: Place) -> np.ndarray | None:
    """Which of Hugging Face's rows each row of a tensor is; see `layout`."""
    kind = gguf_architecture(file.metadata, file.path)
    heads = file.metadata[f"{kind}.attention.head_count"]
    kv_heads = file.metadata.get(f"{kind}.attention.head_count_kv", heads)
    rows = inside_of(file, place)[0]
    with _named(file, place):
        delta = delta_heads(file)
        return row_order(kind, place.module, rows, heads=heads, kv_heads=kv_heads, delta=delta)


def columns_of(file: Gguf, place: Place) -> np.ndarray | None:
    """As `order_of`, of a matrix's columns."""
    kind = gguf_architecture(file.metadata, file.path)
    columns = file.tensors[place.tensor].shape[-1]
    with _named(file, place):
        return column_order(kind, place.module, columns, delta=delta_heads(file))


def delta_heads(file: Gguf) -> DeltaHeads | None:
    """The heads of the file's delta nets, or None without them."""
    start = f"{gguf_architecture(file.metadata, file.path)}."
    return delta_of_file(
        {k.removeprefix(start): v for k, v in file.metadata.items() if k.startswith(start)}
    )


@contextlib.contextmanager
def _named(file: Gguf, place: Place) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file.path}: tensor `{place.tensor}` has {error}") from None


def shape_of(inside: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """The shape of a weight from that of its tensor."""
    dims, axis = ONE.get(place.module, (len(inside), 0))
    if len(inside) < dims:
        return (*inside[:axis], 1, *inside[axis:])
    return inside[::-1] if place.turned else inside
