"""The plan of a stored adapter: its leaves are those that the file lists.

The targets of a config may match nothing in the model, or name modules as another library does.
With a plan from the file's own list, an adapter that was saved can always be read back.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.array import is_leaf, leaves_by_path
from lora_jax.checkpoint.flat import name_of, tuples
from lora_jax.config.lora import LoraConfig
from lora_jax.config.starts import base_change
from lora_jax.hf.peft.settle import settled
from lora_jax.paths import spell
from lora_jax.plan.leaf import LeafPlan, Plan


def planned(
    outline: Mapping[str, dict],
    config: LoraConfig,
    plan_of: Callable[[LoraConfig], Plan],
    params: Any,
) -> Plan:
    """Plans an adapter whose leaves are known.

    Args:
      outline: of the adapter, see `lora_jax.checkpoint.flat.outline`.
      config: the adapter's config.
      plan_of: plans a config on the model.
      params: the base's params.

    Returns:
      A plan whose roles are read off the model, so that they can be compared with the outline's.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf)
    stored = {spell(path): outline[name_of(path)] for path, _ in leaves if name_of(path) in outline}
    adapted = [path for path, leaf in stored.items() if leaf["kind"] == "LoraArray"]
    # Starts that change the base need the rank of every layer, which only the config has.
    if not adapted or base_change(config.init) != "none":
        return plan_of(settled(config, leaves_by_path(params)))
    # Each stored leaf by its exact path; what it trains is put in by `_as_stored`.
    wanted = dataclasses.replace(
        config,
        init="default",
        rank=1,
        rank_pattern={},
        alpha_pattern={},
        target_modules="|".join(map(re.escape, adapted)),
        exclude_modules=(),
        target_parameters=(),
        modules_to_save=(),
        trainable_token_indices=(),
        bias="none",
        layers_to_transform=None,
        layers_pattern=None,
    )
    plan = plan_of(wanted)
    return Plan(wanted, tuple(_as_stored(leaf, stored.get(leaf.path)) for leaf in plan.leaves))


def _as_stored(leaf: LeafPlan, outline: dict | None) -> LeafPlan:
    if outline is None:
        return leaf
    if outline["kind"] == "SavedArray":
        return dataclasses.replace(leaf, kind="saved", only=tuples(outline["only"]))
    if outline["kind"] == "RowsArray":
        ids = tuple(outline["ids"])
        return dataclasses.replace(leaf, kind="rows", ids=ids, axis=outline["axis"])
    if leaf.kind != "lora":
        return leaf
    # One scale for each layer of a stack; the rank is that of the stored arrays.
    scales = tuple(float(scale) for scale in np.ravel(outline["scale"]))
    return dataclasses.replace(leaf, ranks=(outline["rank"],) * len(leaf.ranks), scales=scales)
