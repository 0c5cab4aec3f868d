"""What a plan would materialize, asked of the interpreter itself before anything is allocated."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.array import LoraArray, RowsArray, b_dims, factor_shapes, sizes, widened
from lora_jax.plan.usage import Use
from lora_jax.quant.array import is_leaf
from lora_jax.transform.lorafy import materializations


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
