"""The gated delta rule: each head keeps a matrix S that tokens read and correct.

    S <- exp(g) S                        (K, V); g <= 0, the decay of a token
    S <- S + β k (v - Sᵀ k)ᵀ             what the key finds is replaced by v, as far as β says
    o  = Sᵀ q / sqrt(K)                  keys and queries of length 1

Row by row that takes as many steps as there are tokens. Here a step takes C tokens: with the decay
D_ij from token j to i of a chunk, and A_ij = β_i (k_i · k_j) D_ij for j < i, their corrections are
the rows of U = (1 + A)⁻¹ β (V - d K S), where d is the decay since the chunk's begin. With C = 1 it
is the rule above. A chunk is computed again when backward, so that memory is that of the states at
the begins of chunks: it grows with the length of a row.

Sources: Yang et al. 2024, "Gated Delta Networks", arXiv:2412.06464, section 3.2; the inverse by
halves, as in any recursive solution of a triangular system.

B batch, T tokens, N heads, G heads of keys and queries, K and V sizes of a head, W taps.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lora_jax.dims import AnyArray

CHUNK = 64  # tokens of a step

# On TPUs a product in float32 is one of bfloat16 by default, which is too coarse to solve with.
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGH)


class DeltaSizes(NamedTuple):
    """The sizes of gated delta nets.

    Attributes:
      taps: tokens that the convolution before the rule reads, W.
      key_heads, value_heads: G and N; each head of keys serves as many of values.
      key_dim, value_dim: K and V.
      fused: projections are two, which have the parts of each key head side by side, not four.
    """

    taps: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    fused: bool


def delta_rule(
    q: Float[AnyArray, "b t g k"],
    k: Float[AnyArray, "b t g k"],
    v: Float[AnyArray, "b t n v"],
    decay: Float[AnyArray, "b t n"],
    beta: Float[AnyArray, "b t n"],
    state: Float[AnyArray, "b n k v"],
    *,
    texts: Int[AnyArray, "b t"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "b t n v"], Float[Array, "b n k v"]]:
    """What tokens read, in float32, and the state after them.

    Args:
      q, k, v: queries, keys and values; of the first two only the directions count.
      decay: g; 0 keeps the state.
      beta: how far a token corrects the state; 0, not at all.
      state: the state before them, float32.
      texts: rows of several texts: a number for each, which differs from that of the text before.
        The state is 0 at the begin of a text.
      chunk: tokens of a step.
    """
    count = q.shape[1]
    size = min(chunk, count)
    rest = -count % size

    def cut(x: AnyArray, mode: Any = "constant") -> Array:
        # A token without β and decay changes nothing.
        whole = jnp.pad(x, ((0, 0), (0, rest), *((0, 0),) * (x.ndim - 2)), mode=mode)
        return jnp.moveaxis(whole.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)

    ids = None if texts is None else cut(texts, "edge")
    # The text that the state is of; before the first chunk it is 0, whatever it is of.
    before = None if ids is None else jnp.concatenate((ids[:1, :, 0], ids[:-1, :, -1]))
    xs = (*map(cut, (q, k, v, decay, beta)), ids, before)
    after, out = lax.scan(jax.checkpoint(_step), jnp.asarray(state, jnp.float32), xs)
    out = jnp.moveaxis(out, 0, 1)  # (b, chunks, c, n, v)
    return out.reshape(len(q), -1, *out.shape[3:])[:, :count], after


def _step(
    state: Float[Array, "b n k v"], chunk: tuple[Any, ...]
) -> tuple[Float[Array, "b n k v"], Float[Array, "b c n v"]]:
    """The state after a chunk, and what its tokens read."""
    *arrays, ids, before = chunk
    q, k, v, decay, beta = (jnp.moveaxis(x.astype(jnp.float32), 2, 1) for x in arrays)
    # (b, n, c, k): each head of keys serves N/G of values.
    q, k = (jnp.repeat(_unit(x), v.shape[1] // x.shape[1], axis=1) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    size = q.shape[2]
    earlier = jnp.tri(size, dtype=bool)[None, None]  # (1, 1, c, c), the token itself included
    own = True
    if ids is not None:
        earlier = earlier & (ids[:, None, :, None] == ids[:, None, None, :])
        own = (ids == before[:, None])[:, None]  # (b, 1, c), of the state's text
    # A sum for each token, not differences of running sums: nothing of another text is in it.
    total = jnp.sum(jnp.where(earlier, decay[:, :, None], 0.0), axis=-1)  # (b, n, c)
    # Masked before `exp`, which overflows for later tokens.
    between = jnp.exp(jnp.where(earlier, total[..., :, None] - total[..., None, :], -jnp.inf))
    since = jnp.where(own, jnp.exp(total), 0.0)[..., None]  # (b, n, c, 1)
    system = _einsum("bnik,bnjk->bnij", beta[..., None] * k, k) * between
    solved = _inverse(system)
    found = _einsum("bnik,bnkv->bniv", since * k, state)
    new = _einsum("bnij,bnjv->bniv", solved, beta[..., None] * (v - found))
    scores = _einsum("bnik,bnjk->bnij", q, k) * between
    out = _einsum("bnik,bnkv->bniv", since * q, state) + _einsum("bnij,bnjv->bniv", scores, new)
    to_end = between[..., -1, :, None]  # (b, n, c, 1)
    added = _einsum("bnik,bniv->bnkv", to_end * k, new)
    return since[..., -1:, :] * state + added, jnp.moveaxis(out, 1, 2)


def _unit(x: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """Vectors of length 1."""
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def _inverse(lower: Float[Array, "*b c c"]) -> Float[Array, "*b c c"]:
    """(1 + A)⁻¹ where A is what `lower` has below the diagonal.

    Of two blocks and what is below them: [[P, 0], [Q, R]]⁻¹ = [[P⁻¹, 0], [-R⁻¹ Q P⁻¹, R⁻¹]].
    """
    count = lower.shape[-1]
    found = jnp.broadcast_to(jnp.eye(count, dtype=lower.dtype), lower.shape)
    half = 1
    while half < count:
        number = jnp.arange(count) // half
        below = (number[:, None] % 2 == 1) & (number[:, None] == number[None] + 1)
        low = jnp.where(below, lower, 0.0)
        found = found - _einsum("...ij,...jk,...kl->...il", found, low, found)
        half *= 2
    return found


def convolved(
    x: Float[AnyArray, "b t c"],
    kernel: Float[AnyArray, "w 1 c"],
    before: Float[AnyArray, "b past c"],
    *,
    mask: Bool[AnyArray, "b t"] | None = None,
    texts: Int[AnyArray, "b t"] | None = None,
) -> tuple[Float[Array, "b t c"], Float[Array, "b past c"]]:
    """Each channel's sum over W tokens up to each one, `Σ_j kernel_j x_(t-W+1+j)`, in float32.

    Args:
      x: the tokens.
      kernel: a weight for each tap and channel.
      before: the tokens before them, 0 where there are none.
      mask: true at real tokens: the others are passed over, wherever they are.
      texts: as in `delta_rule`; not with a mask.

    Returns:
      The sums, and the last real tokens.
    """
    taps, count = len(kernel), x.shape[1]
    whole = jnp.concatenate((before.astype(x.dtype), x), axis=1)
    take = partial(jnp.take_along_axis, axis=1)
    first = jnp.zeros((len(x), 1), jnp.int32)
    if mask is not None:
        real = jnp.pad(jnp.asarray(mask), ((0, 0), (taps - 1, 0)), constant_values=True)
        order = jnp.argsort(~real, axis=1, stable=True)  # the real ones, in their order
        whole = take(whole, order[..., None])
        first = jnp.sum(mask, axis=1, dtype=jnp.int32)[:, None]
    total = jnp.zeros((), jnp.float32)
    for back in range(taps):
        part = whole[:, taps - 1 - back :][:, :count].astype(jnp.float32)
        if texts is not None and back:
            gone = jnp.pad(texts[:, :-back], ((0, 0), (back, 0)), constant_values=-1)
            part = jnp.where((texts == gone)[..., None], part, 0.0)
        total = total + part * kernel[taps - 1 - back, 0].astype(jnp.float32)
    if mask is None:
        return total, whole[:, count:]
    place = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return take(total, place[..., None]), take(whole, (first + jnp.arange(taps - 1))[..., None])
