"""What trains besides adapters: whole leaves, biases, and single rows of a table."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lora_jax import paths
from lora_jax.config import matching
from lora_jax.config.lora import LoraConfig
from lora_jax.dims import in_dims, out_dims, sizes, stack_dims
from lora_jax.plan.leaf import LeafPlan


def layer_names(leaf: LeafPlan, each: Sequence[list[str]]) -> list[list[str]]:
    """The names that each layer of a leaf goes by, one entry when it is not stacked.

    Args:
      leaf: with its roles, if its uses show any.
      each: `names_of(leaf)`; a leaf without roles (a bias, a norm's scale) is stacked where its
        path leaves the layers' numbers out.
    """
    if leaf.roles or not leaf.shape or len(each) != 1:
        return list(each)
    expanded = [paths.expand(name, leaf.shape[0]) for name in each[0]]
    # A name that ends where a stack begins has no place for a number.
    numbered = [names for names in expanded if names]
    return [list(names) for names in zip(*numbered, strict=True)] or list(each)


def saved(config: LoraConfig, leaf: LeafPlan, each: Sequence[list[str]]) -> LeafPlan | None:
    """The leaf as one that trains whole, or None where modules_to_save does not mean it."""
    layers = layer_names(leaf, each)
    hits = [any(matching.is_saved(config, name) for name in names) for names in layers]
    if not any(hits):
        return None
    only = _only(leaf, hits)
    reason = "in modules_to_save"
    if only is not None:
        reason += f", {len(only)} of {len(hits)} layers"
    return dataclasses.replace(leaf, kind="saved", only=only, reason=reason)


def _only(leaf: LeafPlan, hits: Sequence[bool]) -> tuple[tuple[int, ...], ...] | None:
    """The stack indices that train, None for all of them."""
    if all(hits):
        return None
    dims = stack_dims(leaf.roles) if leaf.roles else [0]
    if dims != list(range(len(dims))):
        raise ValueError(
            f"`{leaf.path}` trains in some of its layers only, and its stack is not its leading "
            "dims: unstack the layers, or save all of them"
        )
    places = np.ndindex(*(leaf.shape[d] for d in dims))
    return tuple(place for place, hit in zip(places, hits, strict=True) if hit)


def with_biases(config: LoraConfig, leaves: tuple[LeafPlan, ...]) -> tuple[LeafPlan, ...]:
    """Marks the biases that `config.bias` trains: with "lora_only" those of adapted layers."""
    adapted = {paths.module_of(leaf.path): leaf for leaf in leaves if leaf.kind == "lora"}

    def mark(leaf: LeafPlan) -> LeafPlan:
        weight = adapted.get(paths.module_of(leaf.path))
        trains = matching.trains_bias(config, leaf.path, adapted=weight is not None)
        if leaf.kind != "frozen" or not trains:
            return leaf
        only = _adapted_layers(weight, leaf) if config.bias == "lora_only" else None
        reason = f'bias="{config.bias}"' + (f", {len(only)} layers" if only is not None else "")
        return dataclasses.replace(leaf, kind="saved", only=only, reason=reason)

    return tuple(mark(leaf) for leaf in leaves)


def _adapted_layers(weight, bias: LeafPlan) -> tuple[tuple[int, ...], ...] | None:
    """The layers of a bias whose weights have an adapter, None where all have."""
    stack = sizes(weight.shape, weight.roles)[0]
    if all(weight.ranks) or bias.shape[: len(stack)] != stack:
        return None
    return tuple(place for place, r in zip(np.ndindex(*stack), weight.ranks, strict=True) if r)


def with_token_rows(config: LoraConfig, leaves: tuple[LeafPlan, ...]) -> tuple[LeafPlan, ...]:
    """Marks the tables of which `config.trainable_token_indices` trains some rows.

    Raises:
      ValueError: there is no such table, it trains otherwise already, or an id is no row of it.
    """
    asked = config.trainable_token_indices
    if not asked:
        return leaves
    if isinstance(asked, tuple):
        meant = {_input_table(leaves).path: asked}
    else:
        meant = {_named_table(entry, leaves).path: ids for entry, ids in asked.items()}
        if len(meant) < len(asked):
            raise ValueError(
                f"trainable_token_indices: two of the names {sorted(asked)} mean one table "
                f"{sorted(meant)} (head and embedding are tied): give its ids once"
            )
    return tuple(_rows(leaf, meant[leaf.path]) if leaf.path in meant else leaf for leaf in leaves)


def _input_table(leaves: Sequence[LeafPlan]) -> LeafPlan:
    """The largest table that an argument looks up: the vocabulary, not positions or types."""
    tables = [x for x in leaves if any(use.kind == "lookup" for use in x.uses)]
    tables.sort(key=lambda x: -x.shape[_vocabulary(x)])
    if not tables:
        raise ValueError(
            "trainable_token_indices: no table is looked up by an argument of the function; name "
            'the module, {"embed_tokens": [...]}'
        )
    if len(tables) > 1 and tables[0].shape == tables[1].shape:
        raise ValueError(
            f"trainable_token_indices: `{tables[0].path}` and `{tables[1].path}` are tables of "
            f"one size; name the one that is meant, {{{paths.module_of(tables[0].path)!r}: [...]}}"
        )
    return tables[0]


def _named_table(entry: str, leaves: Sequence[LeafPlan]) -> LeafPlan:
    """The table of the module that ends with a name."""
    found = [
        x for x in leaves if x.roles and paths.module_of(x.path).endswith(entry) and x.ndim == 2
    ]
    if len(found) == 1:
        return found[0]
    known = {paths.module_of(x.path) for x in leaves if x.lookup}
    several = f"{len(found)} tables ({', '.join(f'`{x.path}`' for x in found[:3])})"
    raise ValueError(
        f"trainable_token_indices: `{entry}` means {several if found else 'no table'}; "
        f"nearest: {paths.nearest(entry, known)}"
    )


def _vocabulary(leaf: LeafPlan) -> int:
    """The dim whose indices are tokens: the rows that are looked up, or a head's outputs."""
    return (in_dims if leaf.lookup else out_dims)(leaf.roles)[0]


def _rows(leaf: LeafPlan, ids: tuple[int, ...]) -> LeafPlan:
    if leaf.kind != "frozen":
        how = "has an adapter" if leaf.kind == "lora" else "trains whole"
        raise ValueError(
            f"trainable_token_indices: `{leaf.path}` {how} already; exclude it there, or leave "
            "trainable_token_indices out"
        )
    if sorted(leaf.roles) != ["i", "o"]:
        raise ValueError(
            f"trainable_token_indices: `{leaf.path}` has shape {leaf.shape} and roles "
            f"`{leaf.roles}`, expected a table (vocabulary, features)"
        )
    axis = _vocabulary(leaf)
    if max(ids) >= leaf.shape[axis]:
        raise ValueError(
            f"trainable_token_indices: token {max(ids)} is no row of `{leaf.path}`, which has "
            f"{leaf.shape[axis]}; resize the table first"
        )
    return dataclasses.replace(
        leaf, kind="rows", ids=ids, axis=axis, reason=f"{len(ids)} trainable rows"
    )
