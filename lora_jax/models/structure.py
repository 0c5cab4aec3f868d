"""The module of a model: its parameters' shapes, and the module with parameters in it."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.array import leaves_by_path
from lora_jax.paths import numbers_of


# Every call of a model needs it, and only sizes and options decide it.
@lru_cache(maxsize=64)
def structure(forward: Any) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The module's graph without arrays, and the shapes of its parameters, of one block each.

    Args:
      forward: has `module`, `config`, `dtype`, `param_dtype` and `scan`, as `Forward`.
    """
    # Abstract: no parameter of the module is ever allocated.
    module = nnx.eval_shape(
        lambda: forward.module(
            forward.config,
            dtype=jnp.dtype(forward.dtype),
            param_dtype=jnp.dtype(forward.param_dtype),
            scan=forward.scan,
            rngs=nnx.Rngs(0),
        )
    )
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def module_with(forward: Any, params: Any) -> Any:
    """The NNX module of a model with these parameters, `check_params` passed."""
    check_params(forward, params)
    return nnx.merge(structure(forward)[0], params)


def check_params(forward: Any, params: Any) -> None:
    """Refuses parameters of another model.

    Args:
      forward: has `shapes()`.
      params: with or without adapters; they may be abstract.

    Raises:
      ValueError: one is missing, has another shape, or is not the model's; the message names it.
    """
    wanted, given = leaves_by_path(forward.shapes()), leaves_by_path(params)
    for path in (*wanted, *(path for path in given if path not in wanted)):
        want, got = (
            f"an array of shape {tuple(leaves[path].shape)}" if path in leaves else "nothing"
            for leaves in (wanted, given)
        )
        # In a `shard_map` a device has some of the experts; the router, which is checked, has all.
        if ".experts." in path and path in wanted and path in given:
            if wanted[path].shape[-1] == given[path].shape[-1]:
                continue
        if want != got:
            raise ValueError(
                f"`params` has {got} at `{path}`, expected {want}: these are no parameters of this "
                "model; pass `model.params`, or what `lora.init` made of them"
            )


def stacked(shapes: dict[str, Any], blocks: tuple[str, ...], count: int) -> dict[str, Any]:
    """The shapes of `count` stacked blocks, from those of one.

    Args:
      shapes: nested dictionaries of `jax.ShapeDtypeStruct`s.
      blocks: where the block is in them.
      count: how many there are.
    """
    first, *rest = blocks
    inner = shapes[first]
    if rest:
        return {**shapes, first: stacked(inner, tuple(rest), count)}

    def many(inner: Any, count: int) -> Any:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct((count, *s.shape), s.dtype), inner)

    named = {name: numbers_of(name) for name in inner}
    if not all(named.values()):
        return {**shapes, first: many(inner, count)}
    # Blocks of several kinds: one of each kind.
    each = {name: many(inner[name], len(numbers)) for name, numbers in named.items() if numbers}
    return {**shapes, first: each}
