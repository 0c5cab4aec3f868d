"""PEFT's tensors into a tree of LoRA leaves: the tree planned, sized, filled and checked."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.array import LoraArray, is_lora
from lora_jax.config import matching
from lora_jax.config.lora import LoraConfig
from lora_jax.config.starts import base_change
from lora_jax.dims import factor_shapes
from lora_jax.hf.peft.modules import HEAD, TYING, adapts, leaves_of, modules_of, stack_sizes, ties
from lora_jax.hf.peft.tensors import (
    PARTS,
    PREFIX,
    Slot,
    by_path,
    check_keys,
    on_host,
    read_slot,
    slots_of,
    write_slot,
)
from lora_jax.paths import spell


def plannable(config: LoraConfig, params, source: str) -> LoraConfig:
    """A config with which a plan finds the adapter's leaves, and no fault with what PEFT allows.

    PEFT ignores names that match nothing, or excluded modules only (it writes such ones itself),
    and allows ranks above full rank. The tensors of the file are checked one by one, so nothing
    is lost by that.

    Raises:
      ValueError: the adapter's initialisation changed the base in a way that cannot be repeated.
    """
    if base_change(config.init) == "unrepeatable":
        raise ValueError(
            f'{source}: the adapter was initialised by "{config.init}", which changed the base '
            "weights in a way that cannot be repeated; save it in PEFT with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    config = _without_unused(config, params)
    if base_change(config.init) == "repeatable":
        return config
    # The ranks are `fill`'s business, which makes the factors anew.
    return dataclasses.replace(config, init="default", rank=1, rank_pattern={}, alpha_pattern={})


def _without_unused(config: LoraConfig, params) -> LoraConfig:
    leaves = leaves_of(params).items()
    every = [name for path, leaf in leaves for _, name in modules_of(path, leaf, config)]
    unused = set(matching.unmatched(config, every))
    free = [name for name in every if not matching.is_excluded(config, name)]
    kept: dict = {}
    for field in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        value = getattr(config, field)
        if isinstance(value, tuple):
            kept[field] = tuple(entry for entry in value if (field, entry) not in unused)
    if "target_modules" in kept:
        meant = (e for e in kept["target_modules"] if any(matching.ends_with(n, e) for n in free))
        # With none left the plan says what is nearest.
        kept["target_modules"] = tuple(meant) or config.target_modules
    if ("exclude_modules", config.exclude_modules) in unused:
        kept["exclude_modules"] = ()
    kept["trainable_token_indices"] = _without_tied_rows(config, every)
    for field in ("rank_pattern", "alpha_pattern"):
        value = getattr(config, field)
        kept[field] = {k: v for k, v in value.items() if (field, k) not in unused}
    return dataclasses.replace(config, **kept)


def _without_tied_rows(config: LoraConfig, every: list[str]):
    """Rows asked for of the embedding and of a head that is the same table: PEFT keeps one."""
    asked = config.trainable_token_indices
    if not isinstance(asked, Mapping) or any(matching.ends_with(n, HEAD) for n in every):
        return asked
    rest = {entry: ids for entry, ids in asked.items() if not matching.ends_with(entry, HEAD)}
    same = all(ids in rest.values() for ids in asked.values())
    return rest if rest and same else asked


def tied_by_file(config: LoraConfig, tensors: Mapping[str, np.ndarray]) -> LoraConfig:
    """A config that names the head where only the file says that PEFT tied it.

    PEFT takes the head out of the config that it writes, and then no longer ties a table whose
    name it does not know (`wte`) when it loads its own file.
    """
    if ties(config) or not config.extra.get(TYING):
        return config
    adapted = any(key.startswith(f"{PREFIX}{HEAD}.lora_") for key in tensors)
    saved = f"{PREFIX}{HEAD}.weight" in tensors
    if isinstance(config.target_modules, tuple) and adapted:
        return dataclasses.replace(config, target_modules=(*config.target_modules, HEAD))
    if saved:
        return dataclasses.replace(config, modules_to_save=(*config.modules_to_save, HEAD))
    return config


def check_tying(config: LoraConfig, plan, source: str) -> None:
    """A table that is also the head: PEFT changes both only where the config ties them."""
    for leaf in (*plan.adapted, *plan.saved):
        if leaf.kind != "rows" and leaf.lookup and any(use.kind == "contract" for use in leaf.uses):
            if not ties(config):
                raise ValueError(
                    f"{source}: the adapter changes `{leaf.path}` as an embedding only, but "
                    "this model uses it as the output head too; train it in PEFT with "
                    f'{TYING}=True and "{HEAD}" among its modules, or load a model whose head is '
                    "not tied"
                )


def fill(
    lora_params, config: LoraConfig, tensors: Mapping[str, np.ndarray], *, source: str = "adapter"
):
    """Puts PEFT's tensors into a tree of LoRA leaves.

    Args:
      lora_params: tree as `lora_jax.init` makes it; which leaves have an adapter, and their roles,
        are taken from it, the factors, ranks and scales are made anew.
      config: the adapter's config.
      tensors: PEFT's tensors by name.
      source: what messages call the adapter.

    Returns:
      The tree with the adapter's numbers, factors in float32; layers without an adapter have
      zeros.

    Raises:
      ValueError: tensors are missing, left over or misshapen, the base weights in the file are
        not the tree's, or the config does not mean a leaf that has an adapter.
    """
    sized = _map(lambda path, leaf: _sized(path, leaf, config), lora_params)
    slots = slots_of(sized, config)
    check_keys(slots, tensors, source)
    grouped = by_path(slots)

    def put(path, leaf):
        here = grouped.get(path, [])
        parts = {p: _filled(leaf, p, here, tensors) for p in PARTS[type(leaf)]}
        leaf = dataclasses.replace(leaf, **parts)
        _check_repeats(leaf, here, tensors, source)
        return leaf

    before = leaves_of(lora_params)
    return _map(lambda path, leaf: _placed(put(path, leaf), before[path]), sized)


def _map(change, lora_params):
    """`change(path, leaf)` at every leaf that trains."""

    def at(key_path, leaf):
        return change(spell(key_path), leaf) if is_lora(leaf) else leaf

    return jax.tree_util.tree_map_with_path(at, lora_params, is_leaf=is_lora)


def _sized(path: str, leaf, config: LoraConfig):
    """The leaf with zero factors of the ranks, and with the scales, that the config gives it.

    The zeros take no memory: `_filled` makes arrays of them one leaf at a time.
    """
    if not isinstance(leaf, LoraArray):
        return leaf
    ranks, scales = [], []
    for _, name in modules_of(path, leaf, config):
        rank = matching.rank_of(config, name) if adapts(config, path, name) else 0
        alpha = matching.alpha_of(config, name)
        ranks.append(rank)
        scales.append(matching.scale_of(config, rank, alpha) if rank else 0.0)
    if not any(ranks):
        raise ValueError(
            f"leaf `{path}` has an adapter, but the config does not mean it; use the config the "
            "tree was made with"
        )
    a, b = factor_shapes(leaf.shape, leaf.roles, max(ranks))
    return dataclasses.replace(
        leaf,
        a=np.broadcast_to(np.float32(0), a),
        b=np.broadcast_to(np.float32(0), b),
        scale=np.asarray(scales, np.float32).reshape(stack_sizes(path, leaf)),
    )


def _filled(leaf, part: str, slots: list[Slot], tensors: Mapping[str, np.ndarray]):
    """One part of a leaf from its tensors."""
    old = getattr(leaf, part)
    if old is None:
        return None
    # Where no tensor belongs there is no adapter: zeros, but the base's own magnitude or value.
    new = np.array(old, order="C")
    for slot in slots:
        if slot.part == part and not slot.repeats:
            write_slot(new, slot, tensors[slot.key].astype(new.dtype))
    return new


def _placed(leaf, before):
    """The leaf's new arrays as JAX's, sharded as those before were."""
    placed = {}
    for field in dataclasses.fields(leaf):
        new, old = getattr(leaf, field.name), getattr(before, field.name)
        if isinstance(new, np.ndarray) and new is not old:
            sharding = getattr(old, "sharding", None)
            named = isinstance(sharding, jax.sharding.NamedSharding)
            placed[field.name] = jax.device_put(new, sharding) if named else jnp.asarray(new)
    return dataclasses.replace(leaf, **placed)


def _check_repeats(leaf, slots: list[Slot], tensors: Mapping[str, np.ndarray], source: str) -> None:
    """What the file says twice, or repeats from the base, is the same."""
    repeats = [slot for slot in slots if slot.repeats and slot.key in tensors]
    if not repeats:
        return
    host = on_host(leaf, repeats)
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
