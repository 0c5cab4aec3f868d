"""A model with fresh parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_jax.config.arguments import check_key, kind_of
from lora_jax.hf.checkpoint.fill import Spread
from lora_jax.models.kernels import AttentionName
from lora_jax.models.llama_parts import FRESH_XIELU
from lora_jax.models.model import Dtype, Model
from lora_jax.models.registry import forward_of
from lora_jax.models.remat import Remat
from lora_jax.paths import spell
from lora_jax.processes import put


def init(
    key: Array,
    config: Any,
    *,
    dtype: Dtype = "float32",
    param_dtype: Dtype | None = None,
    scan: bool = True,
    remat: Remat = False,
    offload: bool = False,
    attention: AttentionName = "auto",
) -> Model:
    """A model with fresh parameters: kernels and embeddings normal, norms neutral, biases 0.

    Args:
      key: PRNG key.
      config: the configuration, of any architecture of `lora_jax.models.registry`.
      dtype, scan, remat, offload, attention: see `Forward`.
      param_dtype: the same; `dtype` by default.

    Returns:
      The model, without a tokenizer.

    Raises:
      TypeError: no configuration, or no key.
    """
    if not isinstance(getattr(config, "model_type", None), str):
        raise TypeError(
            f"`config` must be one of `lora.models`, such as a `LlamaConfig`, got "
            f"{kind_of(config)}: call `lora.models.init(key, config)`; a parsed config.json is "
            "read by `lora.models.config_from_hf`"
        )
    check_key("key", key)
    forward = forward_of(
        config,
        dtype=dtype,
        param_dtype=param_dtype or dtype,
        scan=scan,
        remat=remat,
        offload=offload,
        attention=attention,
    )
    return Model(forward, draw(key, forward.shapes(), config))


def draw(key: Array, shapes: Any, config: Any, *, spread: Spread | None = None) -> Any:
    """Fresh parameters of these shapes: nested dictionaries of `jax.ShapeDtypeStruct`s.

    `spread` is as in `lora_jax.hf.checkpoint.fill`; without one they are on one device.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(key, len(leaves))
    params = [
        _fresh(key, spell(path), shape, config)
        for key, (path, shape) in zip(keys, leaves, strict=True)
    ]
    made = jax.tree.unflatten(tree, params)
    if spread is None:
        return made
    return jax.tree_util.tree_map_with_path(lambda p, x: put(x, spread(spell(p), x)), made)


def _fresh(key: Array, path: str, shape: jax.ShapeDtypeStruct, config: Any) -> Float[Array, "..."]:
    name = path.rpartition(".")[2]
    if name in ("dt_bias", "per_expert_scale", "layer_scalar") or path.endswith(
        "linear_attn.norm.scale"
    ):
        return jnp.ones(shape.shape, shape.dtype)
    if ".act_fn." in path:
        return jnp.full(shape.shape, FRESH_XIELU[name], shape.dtype)
    if name == "A_log":
        # Rates up to 16, as Mamba 2 draws them; of 0 there would be no logarithm.
        return jnp.log(jax.random.uniform(key, shape.shape, minval=0.01, maxval=16.0))
    if name == "scale":
        return jnp.full(shape.shape, config.fresh_scale, shape.dtype)
    if name.endswith("bias"):
        return jnp.zeros(shape.shape, shape.dtype)
    # Drawn in float32, so that a model in 16 bits starts as the same one rounded.
    return (jax.random.normal(key, shape.shape) * config.initializer_range).astype(shape.dtype)
