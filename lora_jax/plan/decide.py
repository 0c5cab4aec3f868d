"""`plan`: which leaves are adapted, the roles of their dims, and why the others are frozen.

Nothing is allocated: parameters and arguments may be `jax.ShapeDtypeStruct`s.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lora_jax import compat, paths
from lora_jax.array import LoraArray, RowsArray, is_leaf, is_lora, widened
from lora_jax.config import matching
from lora_jax.config.arguments import (
    check_argument,
    check_arrays,
    check_function,
    check_tree,
)
from lora_jax.config.lora import ALL_LINEAR, LoraConfig
from lora_jax.dims import b_dims, factor_shapes, out_dims, sizes
from lora_jax.plan import roles as roles_of
from lora_jax.plan.check import check, too_high
from lora_jax.plan.draft import Draft, names_of
from lora_jax.plan.flow import Usage
from lora_jax.plan.leaf import LeafPlan, Plan, Use
from lora_jax.plan.saved import saved_whole, with_saved
from lora_jax.plan.usage import is_weight, usage
from lora_jax.transform.lorafy import materializations

# Modules that turn features into logits: "all-linear" leaves them out, as PEFT does.
HEAD_NAMES = frozenset(
    "lm_head embed_out output_projection classifier score logits logits_dense logitdense head "
    "unembed decoder_norm_head".split()
)


_CALL = "plan(config, fn, params, *args)"


class LeftOutWarning(UserWarning):
    """A matrix that the config names is not adapted."""


def plan(
    config: LoraConfig, fn: Callable, params: PyTree, *args, strict: bool = False, **kwargs
) -> Plan:
    """Decides which leaves of `params` are adapted, from how `fn` uses them.

    The roles of a weight's dimensions are read off the function's jaxpr: a contracted dim is an
    in dim, a batched one or one taken index by index (scanned layers, chosen experts) a stack
    dim, the others are out dims. Where a weight is used both ways the first contraction counts;
    a table whose rows are looked up has its rows as in dim, as in PEFT. `config.roles` overrides.

    Args:
      config: what to adapt.
      fn: `fn(params, *args, **kwargs)`, the function that will be lorafied.
      params: parameter tree of arrays or `ShapeDtypeStruct`s.
      *args: example arguments; arrays may be `ShapeDtypeStruct`s.
      strict: make it an error when a matrix that the config names is left out; otherwise that is
        a `LeftOutWarning`.
      **kwargs: likewise.

    Returns:
      The plan. Print it to see every leaf, its roles, and why it is or is not adapted.

    Raises:
      ValueError: a name in the config matches nothing (the nearest names are listed), a matched
        leaf is used in no way that a low-rank change could follow, or a rank exceeds the
        smallest dimension it could have; under `strict`, a named matrix is left out.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 4))}
      >>> def fn(p, x):
      ...     return jax.nn.relu(x @ p["up"]) @ p["down"]
      >>> config = lora.LoraConfig(rank=2, target_modules=("up",))
      >>> x = jax.ShapeDtypeStruct((1, 4), "float32")
      >>> [leaf.path for leaf in lora.plan(config, fn, params, x).adapted]
      ['up']
    """
    check_argument(_CALL, "config", config, LoraConfig)
    check_function(_CALL, fn)
    check_tree("params", params)
    check_arrays("the arguments of `fn`", jax.tree.leaves((args, kwargs)))
    flat, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    spelled = [paths.spell(key_path) for key_path, _ in flat]
    leaves = [leaf for _, leaf in flat]
    for path, leaf in zip(spelled, leaves, strict=True):
        if is_lora(leaf):
            raise ValueError(
                f"`params` already has an adapter at `{path}`: plan on the base parameters, which "
                "`lora.unmerge` or `lora.merge` returns"
            )
    used = usage(fn, leaves, tree, args=args, kwargs=kwargs)
    drafts = [
        _draft(config, path, leaf, index=i, used=used)
        for i, (path, leaf) in enumerate(zip(spelled, leaves, strict=True))
        # Trees may hold other Python values, such as numbers of layers or functions.
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    ]
    heads = _heads(drafts, {spelled[i] for i in used.inner})
    masks = _masks(used, spelled, leaves) if config.target_modules == ALL_LINEAR else {}
    drafts = [draft._replace(leaf=_decide(config, draft, heads, masks)) for draft in drafts]
    drafts = with_saved(config, drafts)
    check(config, drafts)
    planned = [draft.leaf for draft in drafts]
    _report_left_out(config, planned, strict=strict)
    fallbacks = predict_fallbacks(
        planned, fn, params, args=args, kwargs=kwargs, bias=config.lora_bias
    )
    return Plan(
        config,
        tuple(
            dataclasses.replace(leaf, uses=(*leaf.uses, *fallbacks.get(leaf.path, ())))
            for leaf in planned
        ),
    )


def _report_left_out(config: LoraConfig, planned: Sequence[LeafPlan], *, strict: bool) -> None:
    """Warns of named matrices that stay frozen; under `strict` raises."""
    left_out = [leaf for leaf in planned if leaf.left_out]
    if not left_out:
        return
    each = "; ".join(f"`{leaf.path}` {leaf.shape}: {leaf.reason}: {leaf.left_out}"
                     for leaf in left_out[:10])  # fmt: skip
    more = f"; and {len(left_out) - 10} more" if len(left_out) > 10 else ""
    text = (
        f"target_modules={config.target_modules!r} names matrices that are left out: {each}{more}"
    )
    if strict:
        raise ValueError(f"{text}. `strict=True` forbids that")
    warnings.warn(text, LeftOutWarning, stacklevel=3)  # the line that calls `plan`


class _Mask(NamedTuple):
    """A leaf that another one is multiplied with, element by element, or that holds its scales.

    Attributes:
      reason: why it is left out.
      certain: False where it may be the weight, and the other leaf the mask.
    """

    reason: str
    certain: bool


def _masks(used: Usage, spelled: Sequence[str], leaves: Sequence) -> dict[str, _Mask]:
    """The leaves that are scales, or masks, or may be, of another leaf's elements, by their paths.

    A leaf is a mask if its name contains "mask", or if it holds zeros and ones only. Of two leaves
    that are multiplied, one of them a mask, the other is the weight.
    """
    found = {}
    for i, others in used.scales.items():
        names = _listed(spelled, others)
        reason = f"scales or zero points: each goes with several elements of {names}"
        found[spelled[i]] = _Mask(reason, certain=True)
    for i, others in used.masks.items():
        masks = {j for j in (i, *others) if _is_mask(spelled[j], leaves[j])}
        names = _listed(spelled, others)
        if i in masks:
            reason = f"a mask: it is multiplied with {names} element by element"
            found[spelled[i]] = _Mask(reason, certain=True)
        elif not others <= masks:
            reason = f"multiplied with {names} element by element, and either may be a mask"
            found[spelled[i]] = _Mask(reason, certain=False)
    return found


def _listed(spelled: Sequence[str], indices: Iterable[int]) -> str:
    return ", ".join(f"`{spelled[i]}`" for i in sorted(indices))


def _is_mask(path: str, leaf: Any) -> bool:
    if "mask" in path.rsplit(".", 1)[-1].lower():
        return True
    # An array of zeros alone is a weight that starts at zero.
    return (
        compat.is_concrete(leaf)
        and bool(jnp.all((leaf == 0) | (leaf == 1)))
        and bool(jnp.any(leaf == 1))
    )


def _draft(config: LoraConfig, path: str, leaf: Any, *, index: int, used: Usage) -> Draft:
    """A leaf, frozen so far, with its names and with roles from the config or from its uses."""
    uses = tuple(used.uses[index])
    shape = tuple(leaf.shape)
    base = LeafPlan(path, shape, str(leaf.dtype), "frozen", uses=uses)
    if not is_weight(leaf):
        base = dataclasses.replace(base, reason="not a floating-point array with a dimension")
        return Draft(base, names_of(base))
    given = matching.given_roles(config, (path, paths.module_of(path)), len(shape))
    rebatched = {dim for leaf_index, dim in used.rebatched if leaf_index == index}
    roles, lookup, remark = roles_of.inferred(uses, shape, rebatched)
    if given:
        roles, remark = given, "roles from config"
    if index in used.stopped:
        stopped = "no gradient reaches it: the model stops it (`stop_gradient`)"
        remark = f"{remark}; {stopped}" if remark else stopped
    base = dataclasses.replace(base, roles=roles, lookup=lookup, reason=remark)
    return Draft(base, names_of(base), roles_given=bool(given))


def _heads(drafts: Sequence[Draft], inner: set[str]) -> frozenset[str]:
    """The paths of output heads, which "all-linear" leaves out.

    A head has a head's name, or maps features to as many outputs as a table has rows, with no
    weight after it. Only a table looked up by an argument counts: a vocabulary, not positions.
    """
    tables = {x.leaf.shape for x in drafts if any(use.kind == "lookup" for use in x.leaf.uses)}

    def is_head(draft: Draft) -> bool:
        leaf = draft.leaf
        if not leaf.roles:
            return False
        stack, fan_in, fan_out = sizes(leaf.shape, leaf.roles)
        # (features, vocabulary), where the table is (vocabulary, features).
        last = not stack and leaf.path not in inner and (fan_out, fan_in) in tables
        return last or draft.names.unnumbered[-1].rsplit(".", 1)[-1] in HEAD_NAMES

    return frozenset(x.leaf.path for x in drafts if is_head(x))


def _decide(
    config: LoraConfig, draft: Draft, heads: frozenset[str], masks: Mapping[str, _Mask]
) -> LeafPlan:
    """A leaf as one that is adapted, trains whole, or stays frozen for a reason."""
    leaf, names, _ = draft
    matches = [matching.match(config, layer, names.unnumbered) for layer in names.layers]
    # Saved comes before adapted, as in PEFT, where a saved module holds no adapters.
    # A buffer of integers inside a saved module has no gradient: it stays as it is.
    trains = leaf.dtype.startswith(("float", "bfloat", "complex"))
    if trains and any(match.saved for match in matches):
        return saved_whole(leaf, [match.saved for match in matches])
    all_linear = config.target_modules == ALL_LINEAR
    obstacle, named = _obstacle(draft, matches, heads, masks, all_linear=all_linear)
    if obstacle:
        # "all-linear" does not name a leaf that the function does not use; uses of complex numbers
        # are not followed.
        used = leaf.uses or leaf.dtype.startswith("complex")
        named = named and bool(used or not all_linear)
        way_out = roles_of.override(leaf) if named else ""
        return dataclasses.replace(leaf, reason=obstacle, left_out=way_out)
    adapted = dataclasses.replace(
        leaf,
        kind="lora",
        ranks=tuple(match.rank if match.targeted else 0 for match in matches),
        alphas=tuple(match.alpha if match.targeted else 0.0 for match in matches),
        scales=tuple(match.scale if match.targeted else 0.0 for match in matches),
    )
    if all_linear and adapted.rank == config.rank and (found := too_high(adapted)):
        # A warning, because a router of four experts would make a rank of eight impossible.
        return dataclasses.replace(leaf, reason=found[0], left_out=found[1])
    return adapted


def _obstacle(
    draft: Draft,
    matches: Sequence[matching.Match],
    heads: frozenset[str],
    masks: Mapping[str, _Mask],
    *,
    all_linear: bool,
) -> tuple[str, bool]:
    """Why a leaf is not adapted, or "", and whether the config names it.

    "all-linear" does not name what it leaves out by its definition: embeddings and the head.
    """
    leaf, names, roles_given = draft
    targeted = any(match.targeted for match in matches)
    if not leaf.roles:
        return leaf.reason, targeted
    if not targeted:
        if all(match.excluded for match in matches):
            return "in `exclude_modules`", False
        if names.numbered or not matches[0].other_layer:
            return "not targeted", False
        return (
            f"its {len(matches)} layers are stacked under a name that does not show it (known are "
            f"{', '.join(paths.STACK_NAMES)}), so `layers_to_transform` cannot choose among them"
        ), False
    if "i" not in leaf.roles or not out_dims(leaf.roles):
        return f"roles {leaf.roles}: a vector, not a matrix", True
    if not all_linear:
        return "", True
    if leaf.lookup:
        return 'an embedding: "all-linear" leaves it out', False
    if not roles_given and not roles_of.maps_features(leaf.uses):
        return 'mixed with a constant, then added to features: "all-linear" leaves it out', False
    if leaf.path in heads:
        return 'the output head: "all-linear" leaves it out', False
    if leaf.path in masks and not roles_given:
        mask = masks[leaf.path]
        return mask.reason, not mask.certain
    return "", True


def predict_fallbacks(
    planned: Sequence[LeafPlan],
    fn: Callable,
    params: PyTree,
    *,
    args: Sequence,
    kwargs: dict,
    bias: bool,
) -> dict[str, list[Use]]:
    """Traces the lorafied function with abstract factors and collects its fallbacks.

    Args:
      planned: all leaves.
      fn, params, args, kwargs: as in `plan`.
      bias: whether the adapters have one (`lora_bias`).

    Returns:
      Path of each adapted leaf that falls back to the uses that materialize its weight, with the
      reason as their `fallback`.
    """
    adapted = {leaf.path: leaf for leaf in planned if leaf.kind in ("lora", "rows")}
    if not adapted:
        return {}

    def abstract(key_path: tuple, w: Any) -> Any:
        leaf = adapted.get(paths.spell(key_path))
        return w if leaf is None else _abstract(leaf, w, bias=bias)

    lora_params = jax.tree_util.tree_map_with_path(abstract, params, is_leaf=is_leaf)
    uses: dict[str, list[Use]] = {}
    for (path, primitive, line), reason in materializations(fn, lora_params, args, kwargs).items():
        uses.setdefault(path, []).append(Use(primitive, line, "other", fallback=reason))
    return uses


def _abstract(leaf: LeafPlan, w: Any, *, bias: bool) -> LoraArray | RowsArray:
    """A planned leaf with shapes in place of trained arrays."""
    dtype = widened(leaf.dtype)
    if leaf.kind == "rows":
        features = leaf.shape[1 - leaf.axis]
        rows = jax.ShapeDtypeStruct((len(leaf.ids), features), dtype)
        return RowsArray(w, rows, leaf.ids, leaf.axis)
    a, b = factor_shapes(leaf.shape, leaf.roles, leaf.rank)
    stack = sizes(leaf.shape, leaf.roles)[0]
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in ((a, dtype), (b, dtype), (stack, jnp.float32))]
    outs = jax.ShapeDtypeStruct([leaf.shape[d] for d in b_dims(leaf.roles)], dtype)
    return LoraArray(w, *shapes, roles=leaf.roles, bias=outs if bias else None)
