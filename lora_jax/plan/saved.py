"""Parameters that train without an adapter: whole leaves, biases, and some rows of a table."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lora_jax import paths
from lora_jax.config import matching
from lora_jax.config.lora import LoraConfig
from lora_jax.dims import in_dims, out_dims, sizes, stack_dims
from lora_jax.plan.draft import Draft
from lora_jax.plan.leaf import LeafPlan


def saved_whole(leaf: LeafPlan, layers: Sequence[bool]) -> LeafPlan:
    """The leaf as one that trains whole, in the layers that modules_to_save names."""
    only = _only(leaf, layers)
    reason = "in modules_to_save"
    if only is not None:
        reason += f", {len(only)} of {len(layers)} layers"
    return dataclasses.replace(leaf, kind="saved", only=only, reason=reason)


def with_saved(config: LoraConfig, drafts: Sequence[Draft]) -> list[Draft]:
    """Marks the biases and the rows of tables that train.

    Raises:
      ValueError: trainable_token_indices names no table, or rows that a table does not have.
    """
    adapted = {x.names.module: x.leaf for x in drafts if x.leaf.kind == "lora"}
    trains = {
        leaf.path: matching.trains_bias(config, leaf.path, adapted=names.module in adapted)
        for leaf, names, _ in drafts
    }
    marked = []
    for draft in drafts:
        leaf, weight = draft.leaf, adapted.get(draft.names.module)
        if leaf.kind == "frozen" and trains[leaf.path]:
            draft = draft._replace(leaf=_bias(leaf, config.bias, weight))
        marked.append(draft)
    rows = config.trainable_token_indices
    return _with_token_rows(rows, marked) if rows else marked


def _bias(leaf: LeafPlan, which: str, weight: LeafPlan | None) -> LeafPlan:
    """A bias that trains: with "lora_only" in the layers whose weight is adapted."""
    only = _adapted_layers(weight, leaf) if weight and which == "lora_only" else None
    reason = f'bias="{which}"' + (f", {len(only)} layers" if only is not None else "")
    return dataclasses.replace(leaf, kind="saved", only=only, reason=reason)


def _only(leaf: LeafPlan, hits: Sequence[bool]) -> tuple[tuple[int, ...], ...] | None:
    """The stack indices that train, None for all of them."""
    if all(hits):
        return None
    dims = stack_dims(leaf.roles) if leaf.roles else [0]
    # `SavedArray.only` indexes leading dims.
    if dims != list(range(len(dims))):
        raise ValueError(
            f"`{leaf.path}` has roles `{leaf.roles}`: to train some of its layers, its stack must "
            "be its leading dims; unstack the layers, or save all of them"
        )
    places = np.ndindex(*(leaf.shape[d] for d in dims))
    return tuple(place for place, hit in zip(places, hits, strict=True) if hit)


def _adapted_layers(weight: LeafPlan, bias: LeafPlan) -> tuple[tuple[int, ...], ...] | None:
    """The layers of a bias whose weights have an adapter, None where all have."""
    stack = sizes(weight.shape, weight.roles)[0]
    # A layer without an adapter has rank 0. A bias of another shape is not stacked like its weight.
    if all(weight.ranks) or bias.shape[: len(stack)] != stack:
        return None
    return tuple(place for place, r in zip(np.ndindex(*stack), weight.ranks, strict=True) if r)


def _with_token_rows(
    rows: Sequence[int] | Mapping[str, Sequence[int]], drafts: Sequence[Draft]
) -> list[Draft]:
    """Marks the tables of which some rows train."""
    if not isinstance(rows, Mapping):
        ids = {_input_table(drafts).path: rows}
    else:
        ids = {_named_table(entry, drafts).path: own for entry, own in rows.items()}
        # A dict keeps one of two equal keys: with fewer entries, two names mean one table.
        if len(ids) < len(rows):
            raise ValueError(
                f"`trainable_token_indices`: two of the names {sorted(rows)} mean one table of "
                f"{sorted(ids)} (head and embedding are tied): list its ids once"
            )
    return [
        draft._replace(leaf=_rows(draft.leaf, ids[draft.leaf.path]))
        if draft.leaf.path in ids
        else draft
        for draft in drafts
    ]


def _input_table(drafts: Sequence[Draft]) -> LeafPlan:
    """The largest table that an argument looks up: the vocabulary, not positions or types."""
    tables = [x.leaf for x in drafts if any(use.kind == "lookup" for use in x.leaf.uses)]
    # Positions and token types are looked up too, but have fewer rows.
    tables.sort(key=lambda x: -x.shape[_vocabulary(x)])
    if not tables:
        raise ValueError(
            "`trainable_token_indices`: no argument of the function is looked up in a table; name "
            'the module, {"embed_tokens": [...]}'
        )
    if len(tables) > 1 and tables[0].shape == tables[1].shape:
        raise ValueError(
            f"`trainable_token_indices`: `{tables[0].path}` and `{tables[1].path}` have one shape "
            f"{tables[0].shape}; name the table, {{{paths.module_of(tables[0].path)!r}: [...]}}"
        )
    return tables[0]


def _named_table(entry: str, drafts: Sequence[Draft]) -> LeafPlan:
    """The table of the module that ends with a name."""
    found = [
        leaf
        for leaf, names, _ in drafts
        if leaf.roles and names.module.endswith(entry) and leaf.ndim == 2
    ]
    if len(found) == 1:
        return found[0]
    tables = {names.module for leaf, names, _ in drafts if leaf.lookup}
    several = f"{len(found)} tables ({', '.join(f'`{x.path}`' for x in found[:3])})"
    tied = next((f"`{leaf.path}`" for leaf, _, _ in drafts if leaf.tied), None)
    head = f"; the head is tied to the embedding: name {tied}" if tied and not found else ""
    raise ValueError(
        f"`trainable_token_indices`: `{entry}` matches {several if found else 'no table'}; "
        f"nearest: {paths.nearest(entry, tables)}{head}"
    )


def _vocabulary(leaf: LeafPlan) -> int:
    """The dim whose indices are tokens: the rows that are looked up, or a head's outputs."""
    return (in_dims if leaf.lookup else out_dims)(leaf.roles)[0]


def _rows(leaf: LeafPlan, ids: Sequence[int]) -> LeafPlan:
    """A table as a leaf of which some rows train."""
    if leaf.kind != "frozen":
        how = "has an adapter" if leaf.kind == "lora" else "trains whole"
        raise ValueError(
            f"`trainable_token_indices`: `{leaf.path}` {how} already; leave it out of "
            "`target_modules` and `modules_to_save`, or leave `trainable_token_indices` out"
        )
    if sorted(leaf.roles) != ["i", "o"]:
        raise ValueError(
            f"`trainable_token_indices`: `{leaf.path}` has shape {leaf.shape} and roles "
            f"`{leaf.roles}`, expected a table (vocabulary, features)"
        )
    axis = _vocabulary(leaf)
    if max(ids) >= leaf.shape[axis]:
        raise ValueError(
            f"`trainable_token_indices`: `{leaf.path}` has {leaf.shape[axis]} rows, so token "
            f"{max(ids)} is not one of them; resize the table first"
        )
    return dataclasses.replace(
        leaf, kind="rows", ids=tuple(ids), axis=axis, reason=f"{len(ids)} trainable rows"
    )
