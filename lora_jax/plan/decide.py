"""`plan`: which leaves are adapted, what each of their dimensions is, and why the others are not.

Nothing is allocated: parameters and arguments may be `jax.ShapeDtypeStruct`s.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.array import LoraArray, RowsArray, is_leaf, is_lora, widened
from lora_jax.config import matching
from lora_jax.config.lora import ALL_LINEAR, LoraConfig
from lora_jax.dims import b_dims, factor_shapes, out_dims, sizes
from lora_jax.plan import roles as roles_of
from lora_jax.plan import saved as plan_saved
from lora_jax.plan import usage as dataflow
from lora_jax.plan.leaf import LeafPlan, Plan, Use, every_name, names_of, unnumbered
from lora_jax.plan.usage import Usage
from lora_jax.transform.lorafy import materializations

# Modules that turn features into logits: "all-linear" leaves them out, as PEFT does.
HEAD_NAMES = frozenset(
    "lm_head embed_out output_projection classifier score logits logits_dense logitdense head "
    "unembed decoder_norm_head".split()
)


def plan(config: LoraConfig, fn: Callable, params, *args, **kwargs) -> Plan:
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
      **kwargs: likewise.

    Returns:
      The plan. Print it to see every leaf, its roles, and why it is or is not adapted.

    Raises:
      ValueError: a name in the config matches nothing (the nearest names are listed), a matched
        leaf is used in no way that a low-rank change could follow, or a rank exceeds the
        smallest dimension it could have.

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
    flat, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    for key_path, leaf in flat:
        if is_lora(leaf):
            raise ValueError(
                f"`params` already has an adapter at `{paths.spell(key_path)}`; plan on the base "
                f"parameters: `lora.unmerge` or `lora.merge` gives them"
            )
    leaves = [leaf for _, leaf in flat]
    names = [paths.spell(key_path) for key_path, _ in flat]
    usage = dataflow.usage(fn, leaves, tree, args, kwargs)
    drafts = [
        _draft(config, i, name, leaf, usage)
        for i, (name, leaf) in enumerate(zip(names, leaves, strict=True))
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    ]
    heads = _heads(drafts, {names[i] for i in usage.inner})
    planned = tuple(_decide(config, draft, heads) for draft in drafts)
    planned = plan_saved.with_biases(config, planned)
    planned = plan_saved.with_token_rows(config, planned)
    _check(config, planned)
    params = jax.tree.unflatten(tree, leaves)
    found = foreseen(planned, fn, params, args, kwargs, bias=config.lora_bias)
    return Plan(
        config,
        tuple(dataclasses.replace(x, uses=(*x.uses, *found.get(x.path, ()))) for x in planned),
    )


def _draft(config: LoraConfig, index: int, path: str, leaf, usage: Usage) -> LeafPlan:
    """A frozen leaf with the roles its uses show."""
    uses = tuple(usage.uses[index])
    base = LeafPlan(path, tuple(leaf.shape), str(leaf.dtype), "frozen", uses=uses)
    if not dataflow.is_weight(leaf):
        return dataclasses.replace(base, reason="not a floating-point array with a dimension")
    rebatched = {d for i, d in usage.rebatched if i == index}
    given = roles_of.given(config, path, len(leaf.shape))
    roles, lookup, remark = roles_of.inferred(uses, len(leaf.shape), rebatched)
    if given:
        return dataclasses.replace(base, roles=given, lookup=lookup, reason="roles from config")
    return dataclasses.replace(base, roles=roles, lookup=lookup, reason=remark)


def _targets(config: LoraConfig, leaf: LeafPlan, names: list[str]) -> bool:
    if matching.names_parameter(config, names[1]):
        return True
    if any(matching.is_excluded(config, name) for name in names):
        return False
    if config.target_modules == ALL_LINEAR:
        return True
    loose = [] if config.layers_to_transform is not None else unnumbered(leaf)
    return any(matching.is_target(config, name) for name in [*names, *loose])


def _heads(drafts: Sequence[LeafPlan], inner: set) -> frozenset:
    """Paths of output heads: by name, or features to a table's rows with no weight after it.

    Only tables looked up by an argument count: a vocabulary, not positions.
    """
    tables = {d.shape for d in drafts if any(u.kind == "lookup" for u in d.uses)}

    def is_head(leaf: LeafPlan) -> bool:
        if not leaf.roles:
            return False
        stack, fan_in, fan_out = sizes(leaf.shape, leaf.roles)
        last = not stack and leaf.path not in inner and (fan_out, fan_in) in tables
        return last or paths.bare(paths.module_of(leaf.path)).rsplit(".", 1)[-1] in HEAD_NAMES

    return frozenset(leaf.path for leaf in drafts if is_head(leaf))


def _decide(config: LoraConfig, leaf: LeafPlan, heads: frozenset) -> LeafPlan:
    each = names_of(leaf)
    if saved := plan_saved.saved(config, leaf, each):
        return saved
    hits = [_targets(config, leaf, names) for names in each]
    if not any(hits):
        return dataclasses.replace(leaf, reason=_untargeted(config, leaf, each))
    obstacle = _obstacle(config, leaf, heads)
    if obstacle:
        return dataclasses.replace(leaf, reason=obstacle)
    ranks, alphas = [], []
    for names, hit in zip(each, hits, strict=True):
        module = names[1] if matching.names_parameter(config, names[1]) else names[0]
        ranks.append(matching.rank_of(config, module) if hit else 0)
        alphas.append(float(matching.alpha_of(config, module)) if hit else 0.0)
    scales = [
        matching.scale_of(config, r, a) if r else 0.0 for r, a in zip(ranks, alphas, strict=True)
    ]
    planned = dataclasses.replace(
        leaf, kind="lora", ranks=tuple(ranks), alphas=tuple(alphas), scales=tuple(scales)
    )
    if config.target_modules == ALL_LINEAR and planned.rank == config.rank and _too_high(planned):
        # Nobody named this leaf: a router of four experts must not stop a rank of eight.
        return dataclasses.replace(leaf, reason=f'"all-linear" leaves it out: {_too_high(planned)}')
    return planned


def _untargeted(config: LoraConfig, leaf: LeafPlan, each: list) -> str:
    """Why no name of a leaf is a target."""
    if not leaf.roles:
        return leaf.reason
    numberless = len(each) > 1 and each[0] == each[-1] and config.layers_to_transform is not None
    if numberless and any(matching.is_target(_all_layers(config), name) for name in each[0]):
        return (
            f"its {len(each)} layers are stacked under a name that does not say so (known are "
            f"{', '.join(paths.STACK_NAMES)}), so `layers_to_transform` cannot choose among them"
        )
    return "not targeted"


def _all_layers(config: LoraConfig) -> LoraConfig:
    return dataclasses.replace(config, layers_to_transform=None, layers_pattern=None)


def _obstacle(config: LoraConfig, leaf: LeafPlan, heads: frozenset) -> str:
    """Why a targeted leaf is not adapted, or ""."""
    if not leaf.roles:
        return leaf.reason
    if "i" not in leaf.roles or "o" not in leaf.roles or not out_dims(leaf.roles):
        return f"roles {leaf.roles}: a vector, not a matrix"
    if config.target_modules != ALL_LINEAR:
        return ""
    if leaf.lookup:
        return 'an embedding: "all-linear" leaves it out'
    given = roles_of.given(config, leaf.path, len(leaf.shape))
    if not given and not roles_of.is_linear(leaf.uses):
        return 'mixed with a constant, then added to features: "all-linear" leaves it out'
    if leaf.path in heads:
        return 'the output head: "all-linear" leaves it out'
    return ""


def _check(config: LoraConfig, leaves: tuple[LeafPlan, ...]):
    """Every name of the config must have matched, and every rank must fit."""
    names = {
        name
        for leaf in leaves
        for each in plan_saved.layer_names(leaf, names_of(leaf))
        for name in each
    }
    names |= {name for leaf in leaves for name in unnumbered(leaf)}
    problems = [
        f"{field} entry `{entry}` matches no module; nearest: "
        f"{paths.nearest(entry, {paths.module_of(leaf.path) for leaf in leaves})}"
        for field, entry in matching.unmatched(config, names)
        if not (field == "modules_to_save" and _automatic(config, entry, names))
    ]
    problems += _useless_targets(config, leaves)
    problems += [
        f"lora_bias=True does not work with the embedding `{leaf.path}`: exclude it"
        for leaf in leaves
        if config.lora_bias and leaf.kind == "lora" and leaf.lookup
    ]
    problems += [_too_high(leaf) for leaf in leaves if leaf.kind == "lora" and _too_high(leaf)]
    if not problems and not any(leaf.kind != "frozen" for leaf in leaves):
        problems.append(_nothing(config, leaves))
    if problems:
        raise ValueError("; ".join(problems))


def _automatic(config: LoraConfig, entry: str, names: set) -> bool:
    """PEFT adds both names of a classification head to modules_to_save; one is enough."""
    head = ("classifier", "score")
    return (
        entry in head
        and set(head) <= set(config.modules_to_save)
        and any(matching.ends_with(n, h) for n in names for h in head)
    )


def _useless_targets(config: LoraConfig, leaves: tuple[LeafPlan, ...]) -> list[str]:
    """Listed targets that matched leaves of which none can be adapted; excluded is no fault."""
    if isinstance(config.target_modules, str):
        return []
    problems = []
    for entry in config.target_modules:
        matched = [
            leaf for leaf in leaves if any(matching.ends_with(n, entry) for n in every_name(leaf))
        ]
        if any(matching.is_excluded(config, n) for leaf in matched for n in every_name(leaf)):
            continue
        if matched and all(leaf.kind == "frozen" for leaf in matched):
            why = "; ".join(f"`{leaf.path}`: {leaf.reason}" for leaf in matched[:3])
            problems.append(f"target_modules entry `{entry}` adapts nothing ({why})")
    return problems


def _too_high(leaf: LeafPlan) -> str:
    _, fan_in, fan_out = sizes(leaf.shape, leaf.roles)
    limit = min(fan_in, fan_out)
    if leaf.rank <= limit:
        return ""
    return (
        f"rank {leaf.rank} is above the smallest dimension {limit} of `{leaf.path}` "
        f"(in {fan_in}, out {fan_out}), where full rank is reached: lower `rank`, or set "
        f"rank_pattern={{{paths.module_of(leaf.path).rsplit('.', 1)[-1]!r}: {limit}}}"
    )


def _nothing(config: LoraConfig, leaves: tuple[LeafPlan, ...]) -> str:
    likely = sorted(leaves, key=lambda leaf: not leaf.roles)  # the ones that could be adapted first
    some = "; ".join(f"`{leaf.path}`: {leaf.reason}" for leaf in likely[:5])
    known = paths.nearest(
        str(config.target_modules), {paths.module_of(leaf.path) for leaf in leaves}
    )
    return (
        f"target_modules={config.target_modules!r} matches nothing in a tree of {len(leaves)} "
        f"leaves; nearest: {known} ({some})"
    )


def foreseen(
    planned: Sequence, fn: Callable, params, args: Sequence, kwargs: dict, *, bias: bool = False
) -> dict:
    """Traces the lorafied function with abstract factors and collects its fallbacks.

    Args:
      planned: `LeafPlan`s.
      fn, params, args, kwargs: as `plan` has them.
      bias: whether the adapters have one (`lora_bias`).

    Returns:
      Path of an adapted leaf to the `Use`s, with their reason as `fallback`, that add it up.
    """
    adapted = {leaf.path: leaf for leaf in planned if leaf.kind in ("lora", "rows")}
    if not adapted:
        return {}

    def abstract(key_path, w):
        leaf = adapted.get(paths.spell(key_path))
        return w if leaf is None else _abstract(leaf, w, bias=bias)

    lora_params = jax.tree_util.tree_map_with_path(abstract, params, is_leaf=is_leaf)
    uses: dict[str, list[Use]] = {}
    for (path, primitive, line), reason in materializations(fn, lora_params, args, kwargs).items():
        uses.setdefault(path, []).append(Use(primitive, line, "other", fallback=reason))
    return uses


def _abstract(leaf, w, *, bias: bool) -> LoraArray | RowsArray:
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
