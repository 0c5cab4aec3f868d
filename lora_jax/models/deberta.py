"""DeBERTa's attention: a query's score of a key adds what their distance says to each of the two.

    A[i, j] = (q_i · k_j + q_i · K_r[δ(i - j)] + k_j · Q_r[δ(i - j)]) / sqrt(3 H)

K_r and Q_r are the keys and queries of a table of distances, one for all blocks. δ is the distance,
of which those beyond half of the buckets share rows by their logarithm, in versions 2 and 3.

Large models of version 2 add what a convolution of the first block's input says to its result:

    y <- LayerNorm(y + act(Conv(x)))

B batch, T tokens, D width, N heads, H size of a head, C = 2 T - 1 distances.

Sources: He et al. 2020, arXiv:2006.03654, equation 4; He et al. 2021, arXiv:2111.09543.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray
from lora_jax.models.bert_parts import Attending, Build
from lora_jax.models.deberta_config import Deberta
from lora_jax.models.layers import ACTIVATIONS, kept
from lora_jax.models.mixing import Mixing, mix


class SelfAttention(nnx.Module):
    """Every token attends to every real token, by content and by distance."""

    def __init__(self, build: Build) -> None:
        own, width = build.config.own, build.config.hidden_size
        self.heads, self.own = build.config.num_attention_heads, own
        self.query_proj = build.linear(width, width)
        self.key_proj = build.linear(width, width)
        self.value_proj = build.linear(width, width)
        if own.distances and not own.shared:
            if "c2p" in own.parts:
                self.pos_key_proj = build.linear(width, width)
            if "p2c" in own.parts:
                self.pos_query_proj = build.linear(width, width)

    def __call__(self, x: Float[Array, "b t d"], by: Attending) -> Float[Array, "b t d"]:
        q, k, v = (
            self._by_head(project, x)
            for project in (self.query_proj, self.key_proj, self.value_proj)
        )
        scale = (q.shape[-1] * (1 + len(self.own.parts))) ** -0.5
        distances = by.distances if self.own.parts else None
        bias = None if distances is None else scale * self._of_distances(q, k, distances)
        seen = None if by.mask is None else jnp.asarray(by.mask)[:, None, None, :]
        return mix(q, k, v, seen=seen, by=Mixing((), scale=scale), bias=bias).reshape(x.shape)

    def _by_head(self, project: Any, x: Float[Array, "*b d"]) -> Float[Array, "*b n h"]:
        return kept(project(x)).reshape(*x.shape[:-1], self.heads, -1)

    def _of_distances(
        self, q: Float[Array, "b t n h"], k: Float[Array, "b t n h"], distances: Float[Array, "c d"]
    ) -> Float[Array, "b n t t"]:
        """What is added to the products of queries and keys, in float32."""
        shared, score = self.own.shared, jnp.zeros((), jnp.float32)
        if "c2p" in self.own.parts:
            keys = self._by_head(self.key_proj if shared else self.pos_key_proj, distances)
            score = score + _of_pairs(_products(q, keys[::-1]))
        if "p2c" in self.own.parts:
            queries = self._by_head(self.query_proj if shared else self.pos_query_proj, distances)
            score = score + jnp.swapaxes(_of_pairs(_products(k, queries)), -1, -2)
        return score


def _products(
    x: Float[Array, "b t n h"], of_distances: Float[Array, "c n h"]
) -> Float[Array, "b n t c"]:
    return jnp.einsum("btnh,cnh->bntc", x, of_distances, preferred_element_type=jnp.float32)


def _of_pairs(x: Float[Array, "b n t c"]) -> Float[Array, "b n t t"]:
    """`out[i, j] = x[i, j - i + T - 1]`: reads the flat array in rows that are one shorter.

    Without a gather, whose gradient would scatter. Source: the shift of Dai et al. 2019,
    arXiv:1901.02860, appendix B.
    """
    *batch, t, c = x.shape
    flat = x.reshape(*batch, t * c)[..., t - 1 : t * c - 1]
    return flat.reshape(*batch, t, c - 1)[..., :t] if t > 1 else x


class Convolution(nnx.Module):
    """What the neighbours of each token add to the first block's result."""

    def __init__(self, build: Build) -> None:
        config, own = build.config, build.config.own
        self.act = own.conv_act
        self.conv = nnx.Conv(
            config.hidden_size, config.hidden_size, (own.taps,), feature_group_count=own.groups,
            dtype=build.dtype, param_dtype=build.param_dtype, rngs=build.rngs,
        )  # fmt: skip
        self.LayerNorm = build.norm()

    def after(
        self, x: Float[Array, "b t d"], mask: Bool[AnyArray, "b t"] | None
    ) -> Callable[[Float[Array, "b t d"], Int[Array, ""]], Float[Array, "b t d"]]:
        """A function of a block's result and number, from the first block's input; no padding."""
        real = None if mask is None else jnp.asarray(mask)[..., None].astype(x.dtype)
        near = self.conv(x if real is None else x * real)
        near = ACTIVATIONS[self.act](near if real is None else near * real)

        def run(y: Float[Array, "b t d"], number: Int[Array, ""]) -> Float[Array, "b t d"]:
            # Of every block, which is cheap beside a branch in the loop over blocks.
            return jnp.where(number == 0, self.LayerNorm(y + near), y)

        return run


def distance_rows(tokens: int, own: Deberta) -> np.ndarray:
    """Rows of the table for the distances from `-(tokens - 1)` to `tokens - 1`, (2 · tokens - 1).

    Distances within half of the buckets have rows of their own. Those beyond share the others by
    their logarithm, up to the farthest.
    """
    distance = np.arange(1 - tokens, tokens)
    if own.buckets:
        half, far = own.buckets // 2, own.distances - 1
        # float32 as transformers has it: the edges of buckets depend on the rounding.
        share = np.log(np.maximum(np.abs(distance), half).astype(np.float32) / np.float32(half))
        share = share / np.float32(math.log(far / half)) * np.float32(half - 1)
        beyond = np.sign(distance) * (np.ceil(share) + half)
        distance = np.where(np.abs(distance) <= half, distance, beyond).astype(int)
    return np.clip(distance + own.span, 0, 2 * own.span - 1)
