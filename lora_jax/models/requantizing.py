"""Merging adapters into a quantized model, in the format that it is held in.

A base in its file's own blocks gives a copy of its files, in which the merged weights are written
anew: all else stays as it is, to the byte. A base that was quantized while it was loaded gives a
directory of bitsandbytes' (nf4, fp4) or compressed-tensors' format (int4, int8).

Merging rounds a weight once more. What that does is measured on the numbers as they are read back.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import processes
from lora_jax.array import is_lora
from lora_jax.files import check_new, replacing
from lora_jax.hf.checkpoint.names import as_held, tensors_of, unified
from lora_jax.hf.checkpoint.packed import fitted, method_of
from lora_jax.hf.checkpoint.safetensors import (
    PICKLES,
    open_directory,
    open_exact,
    overwrite,
    settings_of,
)
from lora_jax.hf.checkpoint.shards import NewTensor, cast, dtype_of, size_of, write_shards
from lora_jax.hf.gguf.file import open_gguf
from lora_jax.hf.gguf.rewrite import rewrite
from lora_jax.hf.gguf.weights import places_of, weights_of
from lora_jax.models.registry import names_of
from lora_jax.models.saving import (
    MAX_SHARD_SIZE,
    blocks_of,
    check_entries,
    entries_of,
    modules_of,
    part_of,
    texts_of,
    values_of,
    write_texts,
)
from lora_jax.quant.array import QuantArray, form_of, is_quant
from lora_jax.quant.requantize import requantized

_FLOAT32 = np.dtype("float32")
# The `quantization_config` of what we quantize, by format.
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
_INTEGERS = {"quant_method": "compressed-tensors", "format": "pack-quantized",
             "quantization_status": "compressed"}  # fmt: skip


class Requantized(NamedTuple):
    """What rounding merged weights to their format did.

    Attributes:
      weights: how many were rounded.
      error: the norm of what they changed by, all together, over the norm of the weights.
      worst: the weight that changed the most by that measure.
      worst_error: by how much.
    """

    weights: int
    error: float
    worst: str
    worst_error: float

    def __str__(self) -> str:
        return (
            f"rounded {self.weights} merged weights to their format: relative error "
            f"{self.error:.2%}, at most {self.worst_error:.2%} (`{self.worst}`)"
        )


class _Weight(NamedTuple):
    """A tensor to write: Hugging Face's name and its numbers, in its order of dims.

    `axes` turns them into ours, in which they are `held`, or None; an adapter `changed` them.
    """

    name: str
    numbers: np.ndarray
    axes: tuple[int, ...] | None
    held: QuantArray | None
    changed: bool


class _Errors:
    """Squares of the numbers and of the errors of each weight."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}

    def add(self, name: str, wanted: Any, got: Any) -> None:
        wanted, got = np.asarray(wanted, np.float64), np.asarray(got, np.float64)
        self.found[name] = float(np.sum((got - wanted) ** 2)), float(np.sum(wanted**2))

    def result(self) -> Requantized:
        each = {n: (e / s) ** 0.5 if s else 0.0 for n, (e, s) in self.found.items()}
        error, size = map(sum, zip(*self.found.values(), strict=True)) if each else (0.0, 0.0)
        worst = max(each, key=each.__getitem__) if each else ""
        whole = (error / size) ** 0.5 if size else 0.0
        return Requantized(len(each), whole, worst, each.get(worst, 0.0))


def save_requantized(
    path: str | Path,
    model: Any,
    lora_params: Any,
    *,
    dtype: str = "float32",
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Requantized:
    """Merges adapters into a quantized model and writes it in the format of its base.

    Weights that no adapter changes are written as they are held, without loss.

    Args:
      path: to be made: a directory, or a .gguf file where the base came from one.
      model: from `lora_jax.models.load(..., quantize=...)`.
      lora_params: its parameters with adapters.
      dtype: of what is left in floats; a copy of the base's files keeps theirs.
      max_shard_size: of a directory that is written anew, see `save_merged`.

    Returns:
      How much the rounding changed the merged weights.

    Raises:
      FileExistsError: there is something at `path`.
      ValueError: the base is not quantized, its format is only read, or a sum that is not finite.
    """
    path = Path(path)
    check_new(path)
    if processes.several():
        raise ValueError("`save_requantized` writes a model that one process holds: merge there")
    dtype_of(dtype)
    held = [x for x in jax.tree.leaves(model.params, is_leaf=is_quant) if is_quant(x)]
    source = model.checkpoint
    in_gguf = source is not None and source.suffix == ".gguf"
    if not held and not in_gguf:
        raise ValueError(
            "`model` is not quantized: load it with `quantize`, or merge without `requantize`"
        )
    if held and held[0].format not in _formats_in(source):
        return _into_new(path, model, lora_params, dtype, size_of(max_shard_size))
    if dtype != "float32":
        raise ValueError(
            f"`dtype` is {dtype!r}, and the merge is written into a copy of {source}, which keeps "
            "its own: leave it out"
        )
    return (_into_gguf if in_gguf else _into_copy)(path, model, lora_params)


def _formats_in(source: Path | None) -> set[str]:
    """The formats of the base's files."""
    if source is None:
        return set()
    gguf = source.suffix == ".gguf"
    weights = weights_of(open_gguf(source)) if gguf else open_directory(source)
    return {blocks.format for blocks in (weights.formats or {}).values()}


def _weights(
    model: Any, lora_params: Any, there: Iterable[str] = (), *, numbers: bool = True
) -> Iterator[_Weight]:
    """Every tensor of the model with its merged numbers, or with zeros.

    `there` are the names of the base's files, in which experts may lie otherwise.
    """
    family, modules = as_held(names_of(model.config), there), modules_of(lora_params)
    blocks = blocks_of(modules, family)
    entries = [x for block in blocks for x in entries_of(block, modules, family, _FLOAT32)]
    check_entries(entries, model, family)
    for block in blocks:
        blank = (np.broadcast_to(_FLOAT32.type(0), x.shape) for x in
                 entries_of(block, modules, family, _FLOAT32))  # fmt: skip
        values = values_of(block, modules, family, _FLOAT32) if numbers else blank
        leaves = modules[block.module]
        for parameter, leaf in leaves.items():
            base = leaf.w if is_lora(leaf) else leaf
            held = part_of(base, block.index) if is_quant(base) else None
            changed = is_lora(leaf) or held is None and any(map(is_lora, leaves.values()))
            tensors = tensors_of(f"{block.module}.{parameter}", block.index, family=family)
            for number, (name, axes) in enumerate(tensors):
                own = None if held is None else _columns(held, number, len(tensors))
                yield _Weight(name, next(values), axes, own, changed)


def _columns(q: QuantArray, number: int, count: int) -> QuantArray:
    """One of several weights that lie side by side."""
    if count == 1:
        return q

    def cut(x: Any) -> Any:
        width = x.shape[-1] // count
        return x[..., number * width : (number + 1) * width]

    shape = (*q.shape[:-1], q.shape[-1] // count)
    part = jax.tree.map(cut, dataclasses.replace(q, order=None))  # which has no outputs
    return dataclasses.replace(part, shape=shape, order=q.order)


def _rounded(weight: _Weight, errors: _Errors) -> QuantArray:
    """A weight in its format; an unchanged one as it is held."""
    assert weight.held is not None
    if not weight.changed:
        return weight.held
    ours = weight.numbers if weight.axes is None else weight.numbers.transpose(weight.axes)
    made = requantized(jax.numpy.asarray(ours), weight.held, name=weight.name)
    errors.add(weight.name, ours, made.dequantize())
    return made


def _into_gguf(path: Path, model: Any, lora_params: Any) -> Requantized:
    if path.suffix != ".gguf":
        raise ValueError(f"`path` is {path}, and the base is a GGUF file: give a name with .gguf")
    errors = _Errors()
    with replacing(path) as new:
        shutil.copyfile(model.checkpoint, new)
        file = open_gguf(new)
        for weight in _weights(model, lora_params, places_of(file)):
            if weight.changed:
                got = rewrite(file, weight.name, weight.numbers)
                errors.add(weight.name, weight.numbers, got)
    return errors.result()


def _into_copy(path: Path, model: Any, lora_params: Any) -> Requantized:
    """A copy of the base's directory, of which the changed weights are written anew."""
    errors, settings = _Errors(), settings_of(model.checkpoint) or {}
    entries, _ = open_exact(model.checkpoint)
    there = unified(open_directory(model.checkpoint).shapes, names_of(model.config))
    with replacing(path) as new:
        new.mkdir()
        for file in model.checkpoint.iterdir():
            if file.is_file() and file.suffix not in (*PICKLES, ".gguf"):
                shutil.copyfile(file, new / file.name)
        for weight in _weights(model, lora_params, there):
            if not weight.changed:
                continue
            name = there.get(weight.name)
            if name is None:
                raise ValueError(
                    f"{model.checkpoint}: it has no tensor for `{weight.name}`, which the adapter "
                    "changes (a tied or a fresh head); merge without `requantize`"
                )
            tensors = _tensors(weight._replace(name=name), settings, errors)
            # Tables and sizes stay; a file without zero points has none to write.
            new_ones = {n: x for n, x in tensors.items() if n in entries and "quant_" not in n}
            overwrite(new, {n: fitted(x, entries[n], n) for n, x in new_ones.items()})
    return errors.result()


def _into_new(path: Path, model: Any, lora_params: Any, dtype: str, most: int) -> Requantized:
    """A directory of its own, for a base that was quantized while it was loaded."""
    if getattr(model.config, "wrapper", None):
        raise ValueError(
            f"`model` is the decoder inside a `{model.config.wrapper}`, which is written in floats "
            "only: merge without `requantize`"
        )
    shapes = list(_weights(model, model.params, numbers=False))
    settings = _settings_of(shapes)
    errors, entries = _Errors(), []
    for weight in shapes:
        found = _tensors(weight, settings, errors, dtype)
        entries += [NewTensor(name, x.shape, x.dtype) for name, x in found.items()]
    texts = texts_of(model, dtype)
    config = {**json.loads(texts["config.json"]), "quantization_config": settings}
    texts["config.json"] = json.dumps(config, indent=2) + "\n"
    each = (_tensors(x, settings, errors, dtype).values() for x in _weights(model, lora_params))
    with replacing(path) as new:
        new.mkdir()
        write_shards(new, entries, chain.from_iterable(each), max_shard_size=most)
        write_texts(new, texts)
    return errors.result()


def _tensors(
    weight: _Weight, settings: Mapping[str, Any], errors: _Errors, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """The tensors of a weight under their whole names."""
    if weight.held is None:
        return {weight.name: cast(weight.numbers, dtype_of(dtype), weight.name)}
    module = weight.name.removesuffix(".weight")
    method = method_of(settings, weight.held, weight.name)
    return {f"{module}{end}": x for end, x in method.pack(_rounded(weight, errors)).items()}


def _settings_of(weights: Sequence[_Weight]) -> dict[str, Any]:
    """The `quantization_config` of a directory with weights that we quantized."""
    first = next(x.held for x in weights if x.held is not None)
    for weight in weights:
        held = weight.held or first
        if (held.format, held.block) != (first.format, first.block):
            raise ValueError(
                f"`{weight.name}` is held in {held.format} in blocks of {held.block}, others in "
                f"{first.format} in blocks of {first.block}: a directory has one format"
            )
    modules = {
        x.name.rpartition(".")[0]: x.held is not None for x in weights if x.numbers.ndim == 2
    }
    ends = {name.rpartition(".")[2] for name, held in modules.items() if held}
    # By the end of their names, but where a weight that is held ends so too (BERT's pooler).
    plain = ((name, name.rpartition(".")[2]) for name, held in modules.items() if not held)
    left = sorted({name if end in ends else end for name, end in plain})
    if first.format in ("nf4", "fp4"):
        double = first.scale_map is not None
        kind = {"bnb_4bit_quant_type": first.format, "bnb_4bit_use_double_quant": double}
        return {**_BNB, **kind, "llm_int8_skip_modules": left}
    numbers = {
        "num_bits": sum(form_of(first).packing.planes), "type": "int", "symmetric": True,
        "strategy": "group", "group_size": first.block,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": numbers}
    return {**_INTEGERS, "ignore": left, "config_groups": {"group_0": group}}
