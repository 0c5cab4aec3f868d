"""PEFT adapters: directories with `adapter_config.json` and `adapter_model.safetensors`.

    ours   y = x·W + s·(x·A)·B      A (in, r)    B (r, out)
    PEFT   y = x·Wᵀ + s·x·AᵀBᵀ      A (r, in)    B (out, r)

A tree's stacked layers become one pair of tensors a layer, heads are flattened, everything is
float32 as PEFT keeps it. Loading is whole or an error: no key missing, left over or misshapen.

Source: PEFT 0.21, `save_and_load.py`; the format was checked by loading both ways.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import matching
from lora_jax.array import LoraArray, SavedArray
from lora_jax.config import ALL_LINEAR, LoraConfig
from lora_jax.hf import peft_files
from lora_jax.hf.peft_slots import (
    TYING,
    Slot,
    adapted_names,
    adapts,
    check_keys,
    leaves_of,
    modules_of,
    read_slot,
    slots_of,
    tied_tables,
    write_slot,
)
from lora_jax.paths import spell

TARGETS = ("peft", "vllm")

# Initialisations after which the base weight is what it was, so that A and B are the whole
# adapter; and those that change it, but the same way each time.
_PLAIN_INITS = ("default", "random", "gaussian", "orthogonal", "eva", "mica")
_REPEATABLE_INITS = ("pissa", "olora")


def read_peft(
    directory: str | os.PathLike, *, model_type: str | None = None
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Reads a PEFT directory without a model.

    Args:
      directory: holds `adapter_config.json` and `adapter_model.safetensors`.
      model_type: Hugging Face's name of the model family, for a config that leaves
        target_modules to PEFT's default.

    Returns:
      The config, and PEFT's tensors by their names, in their stored dtype.

    Raises:
      FileNotFoundError: the directory or one of the files is missing.
      ValueError: a file is damaged, a pickle, a link out of the directory, or holds NaN; or the
        config asks for what is not supported.
    """
    fields, tensors = peft_files.read_directory(directory)
    try:
        config = LoraConfig.from_peft(fields, model_type=model_type)
    except (TypeError, ValueError) as error:
        path = os.path.join(directory, peft_files.CONFIG_FILE)
        raise type(error)(f"{path}: {error}") from None
    return config, tensors


def load_peft(
    directory: str | os.PathLike,
    fn: Callable,
    params,
    *args,
    model_type: str | None = None,
    **kwargs,
) -> tuple[Any, LoraConfig]:
    """Loads a PEFT adapter onto a model.

    Args:
      directory: as for `read_peft`.
      fn: the model, a function of its parameters.
      params: the base parameters.
      *args: example arguments for `fn`, shapes are enough; see `lora_jax.plan`.
      model_type: as for `read_peft`.
      **kwargs: more example arguments for `fn`.

    Returns:
      `params` with LoRA leaves, and the config.

    Raises:
      FileNotFoundError, ValueError: as `read_peft`; also when the adapter is of another model:
        one message names all that is missing, left over or misshapen.

    Example:
      lora_params, config = load_peft("adapter", model.apply, model.params, tokens)
    """
    import lora_jax as lora

    config, tensors = read_peft(directory, model_type=model_type)
    buildable = _without_excluded(_buildable(config, directory), params)
    plan = lora.plan(buildable, fn, params, *args, **kwargs)
    _check_tying(config, plan, directory)
    # The key is of no consequence: every factor drawn with it is replaced.
    blank = lora.init(jax.random.key(0), plan, params)
    return fill(blank, config, tensors, source=str(directory)), config


def _buildable(config: LoraConfig, directory) -> LoraConfig:
    """The config with an initialisation that leaves the base as the adapter expects it."""
    if config.init in _PLAIN_INITS:
        return dataclasses.replace(config, init="default")
    if config.init in _REPEATABLE_INITS:
        return config
    raise ValueError(
        f'{directory}: the adapter was initialised by "{config.init}", which changed the base '
        "weights in a way that cannot be repeated; save it in PEFT with "
        "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
    )


def _without_excluded(config: LoraConfig, params) -> LoraConfig:
    """The config without targets that mean excluded modules only.

    PEFT writes those for "all-linear" with exclude_modules or modules_to_save; a plan takes them
    for a mistake.
    """
    if isinstance(config.target_modules, str):
        return config
    every = [name for path, leaf in leaves_of(params).items() for _, name in modules_of(path, leaf)]
    kept = []
    for entry in config.target_modules:
        meant = [name for name in every if matching.ends_with(name, entry)]
        if not meant or not all(matching.is_excluded(config, name) for name in meant):
            kept.append(entry)
    return dataclasses.replace(config, target_modules=kept or config.target_modules)


def _check_tying(config: LoraConfig, plan, directory) -> None:
    """A table that is also the head: PEFT changes both only where the config ties them."""
    for leaf in (*plan.adapted, *plan.saved):
        if leaf.lookup and any(use.kind == "contract" for use in leaf.uses):
            if not config.extra.get(TYING):
                raise ValueError(
                    f"{directory}: the adapter changes `{leaf.path}` as an embedding only, but "
                    "this model uses it as the output head too; train it in PEFT with "
                    f"{TYING}=True, or load a model whose head is not tied"
                )


def fill(
    lora_params, config: LoraConfig, tensors: Mapping[str, np.ndarray], *, source: str = "adapter"
):
    """Puts PEFT's tensors into a tree of LoRA leaves.

    Args:
      lora_params: tree as `lora_jax.init` makes it with `config`; its factors are replaced.
      config: the adapter's config.
      tensors: PEFT's tensors by name.
      source: what messages call the adapter.

    Returns:
      The tree with the adapter's numbers; layers without an adapter have zeros.

    Raises:
      ValueError: tensors are missing, left over or misshapen, or the base weights in the file
        are not the tree's.
    """
    slots = slots_of(lora_params, config)
    check_keys(slots, tensors, source)
    by_path = _by_path(slots)

    def put(key_path, leaf):
        if not isinstance(leaf, LoraArray | SavedArray):
            return leaf
        here = by_path.get(spell(key_path), [])
        parts = ("value",) if isinstance(leaf, SavedArray) else ("a", "b", "m")
        filled = {p: _filled(leaf, p, here, tensors) for p in parts}
        leaf = dataclasses.replace(leaf, **filled)
        _check_repeats(leaf, here, tensors, source)
        return leaf

    return jax.tree_util.tree_map_with_path(
        put, lora_params, is_leaf=lambda x: isinstance(x, LoraArray | SavedArray)
    )


def _filled(leaf, part: str, slots: list[Slot], tensors: Mapping[str, np.ndarray]):
    """One part of a leaf from its tensors, placed as the part was."""
    old = getattr(leaf, part)
    if old is None:
        return None
    # Where no tensor belongs there is no adapter: zeros, but the base's own magnitude or value.
    new = np.zeros(old.shape, old.dtype) if part in "ab" else np.array(old)
    for slot in slots:
        if slot.part == part and not slot.repeats:
            write_slot(new, slot, tensors[slot.key].astype(new.dtype))
    sharding = getattr(old, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.device_put(new, sharding)
    return jnp.asarray(new)


def _check_repeats(leaf, slots: list[Slot], tensors: Mapping[str, np.ndarray], source: str) -> None:
    """What the file says twice, or repeats from the base, is the same."""
    repeats = [slot for slot in slots if slot.repeats and slot.key in tensors]
    if not repeats:
        return
    host = _on_host(leaf, repeats)
    for slot in repeats:
        ours = read_slot(host, slot)
        if np.array_equal(ours, tensors[slot.key].astype(ours.dtype)):
            continue
        if slot.part == "w":
            raise ValueError(
                f"{source}: `{slot.key}` is not this model's base weight; the adapter was made on "
                "another model, or on one whose vocabulary was resized: load that one"
            )
        raise ValueError(
            f"{source}: `{slot.key}` differs from the embedding's, though {TYING} is true and the "
            "model ties head and embedding; tie them in PEFT and save again"
        )


def save_peft(
    directory: str | os.PathLike,
    lora_params,
    config: LoraConfig,
    *,
    base_model_name: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    target: str = "peft",
) -> None:
    """Writes an adapter as a PEFT directory, whole or not at all.

    Args:
      directory: made if it does not exist; other files in it stay.
      lora_params: tree with the adapter.
      config: the config the adapter was made with.
      base_model_name: Hub id or path of the base model, for `base_model_name_or_path`.
      task_type: PEFT's task type; a config that came from PEFT keeps its own.
      target: "peft", or "vllm" for an adapter that vLLM serves at the right scale: vLLM knows one
        rank and one alpha, so other scales are multiplied into B and ranks filled up with zeros.

    Raises:
      ValueError: the tree and the config disagree, a number is not finite, or vLLM could not
        serve the adapter.
      OSError: the directory cannot be written; nothing was changed.

    Example:
      save_peft("adapter", lora_params, config, base_model_name="HuggingFaceTB/SmolLM2-135M")
    """
    if target not in TARGETS:
        raise ValueError(f'target must be one of "peft", "vllm", got {target!r}')
    task_type = config.extra.get("task_type", task_type)
    if task_type == "CAUSAL_LM" and tied_tables(lora_params):
        # Our table is one leaf, so its change is the head's too.
        config = dataclasses.replace(config, extra={**config.extra, TYING: True})
    fields, tensors = to_peft(lora_params, config)
    if target == "vllm":
        from lora_jax.hf.peft_vllm import for_vllm

        fields, tensors = for_vllm(fields, tensors, config)
    fields["task_type"] = task_type
    if base_model_name is not None:
        fields["base_model_name_or_path"] = base_model_name
    peft_files.write_directory(directory, fields, tensors)


def to_peft(lora_params, config: LoraConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The content of a PEFT directory: the config's fields and the tensors by name.

    Raises:
      ValueError: as `save_peft`.
    """
    slots = slots_of(lora_params, config)
    if not any(slot.part == "a" for slot in slots):
        raise ValueError(
            "lora_params: no leaf carries an adapter that the config means; pass the tree that "
            "lora_jax.init made with this config"
        )
    by_path = _by_path(slots)
    tensors = {}
    for path, leaf in leaves_of(lora_params).items():
        if isinstance(leaf, LoraArray | SavedArray):
            here = by_path.get(path, [])
            leaf = _on_host(leaf, here)
            _check_agreement(path, leaf, config, here)
            tensors |= {slot.key: _as_peft(read_slot(leaf, slot), slot) for slot in here}
    for name, value in tensors.items():
        peft_files.check_tensor(name, value, "lora_params")
    fields = config.to_peft()
    adapted = adapted_names(lora_params, config)
    if config.target_modules == ALL_LINEAR or not all(
        matching.is_target(config, name) for name in adapted
    ):
        # Names that mean in PEFT, which knows no stacked paths, what they mean here.
        fields["target_modules"] = named_targets(lora_params, config)
    return fields, tensors


def _by_path(slots: list[Slot]) -> dict[str, list[Slot]]:
    found: dict[str, list[Slot]] = {}
    for slot in slots:
        found.setdefault(slot.path, []).append(slot)
    return found


def _on_host(leaf, slots: list[Slot]):
    """The leaf with NumPy arrays; an adapter's base weight only where the file repeats it."""
    parts = ["w", "value"] if isinstance(leaf, SavedArray) else ["a", "b", "m", "scale"]
    parts += ["w"] if any(slot.part == "w" for slot in slots) else []
    host = {p: np.asarray(getattr(leaf, p)) for p in parts if getattr(leaf, p) is not None}
    return dataclasses.replace(leaf, **host)


def _as_peft(tensor: np.ndarray, slot: Slot) -> np.ndarray:
    return tensor.astype(np.float32, copy=False) if slot.part in ("a", "b", "m") else tensor


def named_targets(lora_params, config: LoraConfig) -> list[str]:
    """The adapted modules as names for target_modules that mean exactly these, sorted.

    The last components of the names, unless they also mean a module that is not adapted: then
    the full names.
    """
    adapted = set(adapted_names(lora_params, config))
    every = {
        name for path, leaf in leaves_of(lora_params).items() for _, name in modules_of(path, leaf)
    }
    short = {name.rpartition(".")[2] for name in adapted}
    meant = {n for n in every if any(matching.ends_with(n, s) for s in short)}
    excluded = {n for n in every if matching.is_excluded(config, n)}
    return sorted(short if meant - excluded == adapted else adapted)


def _check_agreement(path: str, leaf, config: LoraConfig, slots: list[Slot]) -> None:
    if isinstance(leaf, SavedArray):
        _check_saved(path, leaf, slots)
        return
    if (leaf.m is not None) != config.use_dora:
        has = "has" if leaf.m is not None else "has no"
        raise ValueError(
            f"leaf `{path}` {has} DoRA magnitude, but the config says use_dora={config.use_dora}; "
            "use the config the adapter was made with"
        )
    for index, name in modules_of(path, leaf):
        rank = matching.rank_of(config, name) if adapts(config, path, name) else 0
        if np.any(leaf.a[index][..., rank:]) and np.any(leaf.b[index][rank:]):
            raise ValueError(
                f"leaf `{path}`: `{name}` has an adapter beyond rank {rank}, which the config "
                "gives it; use the config the adapter was made with"
            )
        if rank:
            _check_scale(path, name, float(leaf.scale[index]), config)


def _check_scale(path: str, name: str, scale: float, config: LoraConfig) -> None:
    rank, alpha = matching.rank_of(config, name), matching.alpha_of(config, name)
    expected = matching.scale_of(config, rank, alpha)
    if abs(scale - expected) > 1e-6 * abs(expected):
        raise ValueError(
            f"leaf `{path}`: `{name}` has scale {scale:.6g}, but the config's alpha and rank give "
            f"{expected:.6g}, and PEFT would use that; change alpha (or alpha_pattern), or "
            "multiply b by the ratio"
        )


def _check_saved(path: str, leaf: SavedArray, slots: list[Slot]) -> None:
    """Nothing that was trained is left out of the file."""
    unwritten = np.ones(leaf.shape, bool)
    for slot in slots:
        unwritten[slot.index] = False
    if np.any(unwritten & (np.asarray(leaf.value) != np.asarray(leaf.w))):
        raise ValueError(
            f"leaf `{path}` was trained, but the config's bias and modules_to_save do not mean "
            "it (or some of its layers); use the config the adapter was made with"
        )
