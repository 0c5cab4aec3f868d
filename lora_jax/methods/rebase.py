"""An adapter whose start changed the base, as an adapter of the base as it was."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from lora_jax import compat, paths
from lora_jax.array import LoraArray, check_whole, is_leaf
from lora_jax.config.arguments import check_argument, check_tree
from lora_jax.config.lora import LoraConfig
from lora_jax.config.starts import base_change
from lora_jax.dims import factor_shapes, sizes, to_matrix
from lora_jax.multi.weighted import truncated

_ORDER = "rebase(lora_params, params, config)"


def rebase(lora_params: PyTree, params: PyTree, config: LoraConfig) -> tuple[PyTree, LoraConfig]:
    """The same model as an adapter of `params`, where its start (PiSSA, OLoRA) changed the base.

        W' + s·A·B  =  W + s·[A A']·[B; B'],    s·A'·B' = W' - W

    The start took a matrix of rank r out of `W`, so the factors get twice their rank. Readers that
    do not repeat the start (vLLM, llama.cpp, MLX) can use the result, and `lora.stack` puts it
    beside other adapters of the base. It is for inference: dropout and weight decay would act on
    what was taken out too.

    Args:
      lora_params: tree with the adapter.
      params: the base as it was before `init`.
      config: the adapter's config.

    Returns:
      The tree over `params`, and its config: ranks and alphas doubled (with rsLoRA alphas by √2),
      and the default start. A config without such a start is returned as it is, and so is the tree.

    Raises:
      TypeError: an argument of another kind.
      ValueError: LoftQ, whose base is the quantized weight itself; or `params` is not the base that
        the start changed, because a difference has a higher rank.

    Source: PEFT's `path_initial_model_for_weight_conversion`, which needs the factors of the start.

    Example:
      plain, plain_config = lora.rebase(lora_params, params, config)
      lora.hf.save_peft("plain", plain, plain_config)
    """
    check_argument(_ORDER, "config", config, LoraConfig)
    check_whole(lora_params)
    check_tree("params", params)
    if config.init == "loftq":
        raise ValueError(
            'init="loftq" has the quantized weight as its base, which is no small change of the '
            "floats: quantize the base where the adapter is used, or merge it"
        )
    if base_change(config.init) == "none":
        return lora_params, config
    flat, tree = jax.tree_util.tree_flatten_with_path(lora_params, is_leaf=is_leaf)
    bases = jax.tree.leaves(params, is_leaf=is_leaf)
    if len(bases) != len(flat):
        raise ValueError(
            f"`params` has {len(bases)} leaves and `lora_params` {len(flat)}: pass the base that "
            "`init` got"
        )
    leaves = [
        _rebased(paths.spell(path), x, w) if isinstance(x, LoraArray) else x
        for (path, x), w in zip(flat, bases, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves), _doubled(config)


def _rebased(path: str, x: LoraArray, w: Array) -> LoraArray:
    if tuple(x.shape) != tuple(jnp.shape(w)):
        raise ValueError(
            f"`{path}` has shape {tuple(x.shape)} in `lora_params` and {tuple(jnp.shape(w))} in "
            "`params`: pass the base that `init` got"
        )
    stack, fan_in, fan_out = sizes(x.shape, x.roles)
    lost = to_matrix(x.w.astype(jnp.float32) - w.astype(jnp.float32), x.roles)
    u, s, vt = jnp.linalg.svd(lost, full_matrices=False)
    # Each number of the changed base is rounded, and the decomposition is, in float32.
    rounding = 4 * jnp.finfo(x.w.dtype).eps * (math.sqrt(fan_in) + math.sqrt(fan_out))
    noise = rounding * jnp.max(jnp.abs(w)).astype(jnp.float32)
    noise += 8 * jnp.finfo("float32").eps * s[..., :1]
    _check_rank(path, x.rank, s, noise)
    kept = jnp.where(s > noise, s, 0)
    # A layer that is left out has scale 0, and nothing was taken out of it.
    scale = jnp.where(x.scale == 0, 1.0, x.scale)
    a, b = truncated(u, kept / scale[..., None], vt, x.rank)
    own_a, own_b = x.a.reshape(*stack, fan_in, x.rank), x.b.reshape(*stack, x.rank, fan_out)
    # In turns: of a layer with a smaller rank, files hold the first columns alone.
    a = jnp.stack([own_a, a.astype(x.a.dtype)], axis=-1)
    b = jnp.stack([own_b, b.astype(x.b.dtype)], axis=-2)
    a_shape, b_shape = factor_shapes(x.shape, x.roles, 2 * x.rank)
    return dataclasses.replace(x, w=w, a=a.reshape(a_shape), b=b.reshape(b_shape))


def _check_rank(path: str, rank: int, s: Array, noise: Array) -> None:
    """Refuses a difference of the bases that has a higher rank than the adapter."""
    if compat.is_concrete(s) and bool(jnp.any(s[..., rank:] > noise)):
        raise ValueError(
            f"`{path}`: the base of `lora_params` differs from `params` by more than a matrix of "
            f"rank {rank}: pass the base that `init` got"
        )


def _doubled(config: LoraConfig) -> LoraConfig:
    """The config of twice the ranks at the same scales."""
    more = math.sqrt(2) if config.use_rslora else 2
    return dataclasses.replace(
        config,
        init="default",
        rank=2 * config.rank,
        alpha=more * config.alpha,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: more * alpha for name, alpha in config.alpha_pattern.items()},
    )
