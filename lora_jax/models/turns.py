"""What a decoder's blocks do to queries and keys by the places of their tokens.

    rotate      by position, with one base and scaling for all blocks, another base in blocks with a
                window, or none in some blocks
    normalize   after the rotation, without a scale (Llama 4)
    grow        the queries of blocks that do not rotate, with the length of the text (Llama 4):
                1 + c log(1 + floor((p + 1) / s)) at position p; or of all, by p (Ministral 3)

Sources: RoPE arXiv:2104.09864; temperature tuning arXiv:2501.19399.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Int

from lora_jax.dims import AnyArray
from lora_jax.models.attention import Turn, Turns, choose
from lora_jax.models.config import LlamaConfig
from lora_jax.models.layers import normal
from lora_jax.models.rope import RopeScaling, Rotation, rotate, rotation


def turns_of(config: LlamaConfig, positions: Int[AnyArray, "b t"]) -> Turns:
    """What the blocks of a configuration do.

    Args:
      config: the configuration.
      positions: each new token's place in its text.

    Returns:
      By whether a block slides, or rotates where blocks without a window differ in that.
    """
    rotation_of = _rotations(config, positions)
    factor = None
    if config.floor_scale is not None:
        first = 0.0 if config.floor_everywhere else 1.0
        steps = jnp.floor((positions + first) / config.floor_scale)
        factor = 1 + config.attn_scale * jnp.log1p(steps)[..., None, None]  # (b, t, 1, 1)

    def turn_of(slides: bool | Array) -> Turn:
        by = rotation_of(slides)
        rotates = True if config.rope_layers is None else slides

        def turn(q: Array, k: Array) -> tuple[Array, Array]:
            q, k = rotate(q, by), rotate(k, by)
            if config.qk_norm_plain:
                eps = config.rms_norm_eps
                q, k = choose(rotates, (normal(q, eps), normal(k, eps)), (q, k))
            if factor is not None:
                grown = (q * factor).astype(q.dtype)
                q = grown if config.floor_everywhere else choose(rotates, q, grown)
            return q, k

        return turn

    return turn_of


def _rotations(config: LlamaConfig, positions: Int[AnyArray, "b t"]) -> Callable:
    """The rotation of a block, or None, by whether it slides; arguments as for `turns_of`."""

    def turn(theta: float, scaling: RopeScaling | None, *, slides: bool = False) -> Rotation:
        return rotation(
            positions,
            head_dim=config.rotary_dim_of(slides),
            theta=theta,
            scaling=scaling,
            context=config.max_position_embeddings,
        )

    full = turn(config.rope_theta, config.rope_scaling)
    if config.rope_layers is not None:
        # In a scan over blocks that differ, the others rotate by an angle of 0.
        still = Rotation(jnp.ones_like(full.cos), jnp.zeros_like(full.sin))
        return lambda rotates: None if rotates is False else choose(rotates, full, still)
    if config.rope_local_base_freq is None or not any(config.mixing.slides):
        return lambda slides: full
    # No distance within a window exceeds the trained context, so nothing is scaled here.
    local = turn(config.rope_local_base_freq, None, slides=True)
    return lambda slides: choose(slides, local, full)
