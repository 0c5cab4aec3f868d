"""PEFT's tensors into a tree of LoRA leaves: the config made plannable, the leaves filled."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import processes
from lora_jax.array import LoraArray, is_lora, leaves_by_path
from lora_jax.config.lora import LoraConfig
from lora_jax.dims import factor_shapes
from lora_jax.hf.peft.index import PREFIX, IndexRow, make_index, stack_sizes
from lora_jax.hf.peft.tensors import (
    PARTS,
    TensorSpec,
    read_leaf,
    tensor_specs,
    write_tensor,
)
from lora_jax.hf.peft.tying import TYING
from lora_jax.paths import nearest, spell

_SHOWN = 3
_DECODER = ".language_model."  # in the names of a model of images and texts


# Heads of classifiers in transformers.
_HEADS = ("score", "classifier", "qa_outputs")


def check_task(
    config: LoraConfig, tensors: Iterable[str], paths: Iterable[str], source: str
) -> None:
    """Refuses the adapter of a classifier on a model without its head.

    Args:
      config: the adapter's config.
      tensors: PEFT's names of the file's tensors.
      paths: of the model's leaves.
      source: what messages call the adapter.

    Raises:
      ValueError: the file holds a head that the model does not have.
    """
    there = {key.removeprefix(PREFIX).partition(".")[0] for key in tensors}
    # Components are compared, as a head may lie inside another module.
    here = {part for path in paths for part in path.split(".")}
    for head in _HEADS:
        if head in there - here:
            task = config.extra.get("task_type")
            kind = f"a classifier (task_type {task})" if task else "a classifier"
            raise ValueError(
                f"{source}: the adapter is of {kind}: it trains the head `{head}`, which this "
                "model does not have; load the model that has it"
            )


def fill(
    lora_params: Any,
    config: LoraConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    source: str = "adapter",
    model_type: str | None = None,
) -> Any:
    """Puts PEFT's tensors into a tree of LoRA leaves.

    Args:
      lora_params: tree as `lora_jax.init` makes it; which leaves have an adapter, and their roles,
        are taken from it; factors, ranks and scales are new.
      config: the adapter's config.
      tensors: PEFT's tensors by name.
      source: what messages call the adapter.
      model_type: as for `load_peft`.

    Returns:
      The tree with the adapter's numbers, factors in float32; layers without an adapter have
      zeros.

    Raises:
      ValueError: tensors are missing, left over or misshapen, the base weights in the file are
        not the tree's, or the config has no adapter for a leaf that has one.
    """
    index = make_index(leaves_by_path(lora_params), config)
    for rows in index.rows.values():
        _check_meant(rows)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    specs = tensor_specs(index, shapes=shapes, model_type=model_type)
    # Everything is checked before the first array is made: a wrong file takes no memory.
    _check_keys([spec for of_leaf in specs.values() for spec in of_leaf], tensors, source)

    def put(key_path: tuple, leaf: Any) -> Any:
        if not is_lora(leaf):
            return leaf
        path = spell(key_path)
        sized, here = _sized(leaf, index.rows[path]), specs[path]
        parts = {part: _filled(sized, part, here, tensors) for part in PARTS[type(leaf)]}
        filled = dataclasses.replace(sized, **parts)
        _check_repeats(filled, here, tensors, source)
        return _placed(filled, leaf)

    return jax.tree_util.tree_map_with_path(put, lora_params, is_leaf=is_lora)


def _check_meant(rows: Sequence[IndexRow]) -> None:
    if isinstance(rows[0].leaf, LoraArray) and not any(row.rank for row in rows):
        raise ValueError(
            f"leaf `{rows[0].path}` has an adapter, but the config targets none of its layers "
            f"(`{rows[0].name}`); use the config the tree was made with, or state by `roles` how "
            "the leaf's dims are to be read"
        )


def _sized(leaf: Any, rows: Sequence[IndexRow]) -> Any:
    """The leaf with zero factors of the ranks, and with the scales, that the config gives it.

    The zeros take no memory: `_filled` makes arrays of them one leaf at a time.
    """
    if not isinstance(leaf, LoraArray):
        return leaf
    scale = np.zeros(stack_sizes(rows[0].path, leaf), np.float32)
    for row in rows:
        scale[row.layer] = row.scale
    # One rank for all layers of a stack: the largest, smaller ones are padded.
    a, b = factor_shapes(leaf.shape, leaf.roles, max(row.rank for row in rows))
    zero = np.float32(0)
    return dataclasses.replace(
        leaf, a=np.broadcast_to(zero, a), b=np.broadcast_to(zero, b), scale=scale
    )


def _filled(
    leaf: Any, part: str, specs: Sequence[TensorSpec], tensors: Mapping[str, np.ndarray]
) -> np.ndarray | None:
    """One part of a leaf from its tensors."""
    old = getattr(leaf, part)
    if old is None:
        return None
    # Where no tensor belongs there is no adapter: zeros, but the base's own magnitude or value.
    new = np.array(old, order="C")
    for spec in specs:
        if spec.part == part and not spec.repeats:
            # Files may hold 16 bits; factors are float32 here, saved leaves have the base's dtype.
            write_tensor(new, spec, tensors[spec.key].astype(new.dtype))
    return new


def _placed(leaf: Any, before: Any) -> Any:
    """The leaf's new arrays as JAX's, sharded as those before were."""
    placed = {}
    for field in dataclasses.fields(leaf):
        new, old = getattr(leaf, field.name), getattr(before, field.name)
        if isinstance(new, np.ndarray) and new is not old:
            placed[field.name] = on_device(new, old)
    return dataclasses.replace(leaf, **placed)


def on_device(new: np.ndarray, old: Any) -> jax.Array:
    """An array as JAX's, with the sharding of the array whose place it takes."""
    sharding = getattr(old, "sharding", None)
    # Other shardings are those of one device, which is left to JAX.
    named = isinstance(sharding, jax.sharding.NamedSharding)
    return processes.put(new, sharding) if named else jax.device_put(new)


def _check_repeats(
    leaf: Any, specs: Sequence[TensorSpec], tensors: Mapping[str, np.ndarray], source: str
) -> None:
    """Tensors that the file holds twice, or repeats from the base, are equal."""
    repeats = [spec for spec in specs if spec.repeats and spec.key in tensors]
    if not repeats:
        return
    _, found = read_leaf(leaf, repeats)
    for spec in repeats:
        ours = found[spec.key]
        if np.array_equal(ours, tensors[spec.key].astype(ours.dtype)):
            continue
        if spec.part == "w":
            raise ValueError(
                f"{source}: `{spec.key}` is not this model's base weight; the adapter was made on "
                "another model, or on one whose vocabulary was resized: load that one"
            )
        raise ValueError(
            f"{source}: `{spec.key}` differs from the embedding's, though {TYING} is true and the "
            "model ties head and embedding; tie them in PEFT and save again"
        )


def _check_keys(
    specs: Sequence[TensorSpec], tensors: Mapping[str, np.ndarray], source: str
) -> None:
    """Refuses a file whose tensors are not exactly those of the specs.

    Raises:
      ValueError: one message with all that is missing, left over or misshapen, each with the
        nearest names.
    """
    wanted = {spec.key: spec for spec in specs}
    # PEFT repeats a base weight only sometimes: it may be absent.
    missing = [k for k, spec in wanted.items() if spec.part != "w" and k not in tensors]
    extra = [k for k in tensors if k not in wanted]
    other = [k for k, spec in wanted.items() if k in tensors and tensors[k].shape != spec.shape]
    shapes = [f"`{k}` is {tensors[k].shape}, expected {wanted[k].shape}" for k in other]
    problems = [
        *_listed("missing", _with_nearest(missing, extra, "in the file"), len(missing)),
        *_listed("left over", _with_nearest(extra, wanted, "expected"), len(extra)),
        *_listed("misshapen", shapes[:_SHOWN], len(shapes)),
    ]
    ranks = {_rank_of(wanted[key], tensors[key].shape) for key in other}
    if not missing and len(ranks) == 1 and None not in ranks:
        problems.append(
            f"the tensors have rank {ranks.pop()}, and the config says {wanted[other[0]].rank}: "
            "correct `r` (or `rank_pattern`) in it"
        )
    elif missing or shapes:
        problems.append(
            "pass an adapter of this model; where a model of your own has dims that are read "
            "otherwise than in PEFT, state them by `lora.hf.load_peft(..., roles=...)`"
        )
    elif extra and all(_DECODER in k for k in wanted) and not any(_DECODER in k for k in extra):
        problems.append(
            "the adapter changes the whole model, and of it the language model alone is loaded: "
            "use PEFT, or train one on modules of `language_model`"
        )
    if problems:
        raise ValueError(f"{source}: the adapter does not fit this model; {'; '.join(problems)}")


def _rank_of(spec: TensorSpec, shape: tuple[int, ...]) -> int | None:
    """The rank of a tensor that has the spec's shape but for the rank, or None."""
    axis = {"a": 0, "b": 1}.get(spec.part)
    if axis is None or len(shape) != len(spec.shape) or not spec.rank:
        return None
    experts = spec.shape[axis] // spec.rank
    rank, left = divmod(shape[axis], experts)
    same = shape[:axis] + shape[axis + 1 :] == spec.shape[:axis] + spec.shape[axis + 1 :]
    return rank if same and not left else None


def _with_nearest(keys: list[str], known: Iterable[str], where: str) -> list[str]:
    """The first few keys, each with the nearest known one, where any is known."""
    known = list(known)
    if not known:
        return [f"`{key}`" for key in keys[:_SHOWN]]
    return [f"`{key}` (nearest {where}: {nearest(key, known, 1)})" for key in keys[:_SHOWN]]


def _listed(what: str, shown: list[str], count: int) -> list[str]:
    if not count:
        return []
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    return [f"{count} {what}: {', '.join(shown)}{more}"]
