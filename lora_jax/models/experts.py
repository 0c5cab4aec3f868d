"""A mixture of experts: an MLP of which each token uses a few parts.

    p = softmax(x · W_gate)                              float32, over the E experts
    y = Σ_e p_e · W_down,e (act(W_gate,e x) * W_up,e x)  over the k experts with the largest p_e

Tokens are sorted by expert. An expert's rows are then multiplied by its weights alone, so that cost
grows with the k experts of a token and not with E: by `lax.ragged_dot` where that is one operation
(TPU), elsewhere by tiles of rows of one expert, because XLA makes of `ragged_dot` a dense product
with all experts there.

M tokens, K experts of a token, E experts, D width, F inner size of an expert.

Source: Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024, "Mixtral", arXiv:2401.04088.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lora_jax.models.config import LlamaConfig
from lora_jax.models.dialect import Routing
from lora_jax.models.layers import ACTIVATIONS, kept

# Backends on which `ragged_dot` is one operation.
_RAGGED = frozenset({"tpu"})


class Chosen(NamedTuple):
    """The experts of each token, the likeliest first, and how much each of them counts."""

    experts: Int[Array, "m k"]
    weights: Float[Array, "m k"]


class Load(NamedTuple):
    """How tokens are spread over experts: sums over tokens, and over the blocks so far.

    Attributes:
      chosen: how many tokens chose each expert.
      likely: the probabilities of each expert.
    """

    chosen: Float[Array, " e"]
    likely: Float[Array, " e"]


class Order(NamedTuple):
    """The rows `token · K + choice`, sorted by expert.

    Attributes:
      source: the row at each sorted place.
      place: the sorted place of each row.
      sizes: rows of each expert.
    """

    source: Int[Array, " rows"]
    place: Int[Array, " rows"]
    sizes: Int[Array, " e"]


class Experts(nnx.Module):
    """The weights of all experts, gate and up side by side: (E, D, 2F) and (E, F, D)."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike) -> None:
        count, width, inner = config.num_experts, config.hidden_size, config.expert_size
        assert count is not None  # a configuration without experts has an `MLP`
        self.dtype = dtype
        self.activation = config.hidden_activation
        self.gate_up_proj = nnx.Param(jnp.zeros((count, width, 2 * inner), param_dtype))
        self.down_proj = nnx.Param(jnp.zeros((count, inner, width), param_dtype))
        self.limit, self.alpha = config.swiglu_limit, config.swiglu_alpha
        self.biased = config.expert_bias
        if self.biased:
            self.gate_up_proj_bias = nnx.Param(jnp.zeros((count, 2 * inner), param_dtype))
            self.down_proj_bias = nnx.Param(jnp.zeros((count, width), param_dtype))

    def __call__(self, x: Float[Array, "m d"], chosen: Chosen) -> Float[Array, "m d"]:
        first, second = self.gate_up_proj.get_value(), self.down_proj.get_value()
        order = sort_by_expert(chosen.experts, first.shape[0])
        product = ragged if jax.default_backend() in _RAGGED else tiled
        rows = jnp.take(x, order.source // chosen.experts.shape[1], axis=0)  # (rows, d)
        wide = kept(product(rows, first.astype(self.dtype), order))  # (rows, 2f)
        if self.biased:
            owner = jnp.take(chosen.experts.reshape(-1), order.source)  # (rows,)
            wide = wide + _of_each(self.gate_up_proj_bias, owner, wide)
        out = product(self.gated(wide), second.astype(self.dtype), order)  # (rows, d)
        if self.biased:
            out = out + _of_each(self.down_proj_bias, owner, out)
        out = jnp.take(out, order.place, axis=0).reshape(*chosen.experts.shape, -1)  # (m, k, d)
        # In float32: the sum of a token's experts is rounded once.
        return jnp.einsum("mkd,mk->md", out.astype(jnp.float32), chosen.weights).astype(x.dtype)

    def gated(self, wide: Float[Array, "rows f2"]) -> Float[Array, "rows f"]:
        """What goes into the second product, of gate and up."""
        if self.limit is None:
            gate, up = jnp.split(wide, 2, axis=-1)
            return ACTIVATIONS[self.activation](gate) * up
        # As gpt-oss stores them, in turns: PEFT's adapters have the outputs in that order.
        gate = jnp.minimum(wide[:, ::2], self.limit)
        up = jnp.clip(wide[:, 1::2], -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)


def _of_each(bias: nnx.Param, owner: Int[Array, " rows"], like: Array) -> Float[Array, "rows o"]:
    """The bias of each row's expert."""
    return jnp.take(bias.get_value(), owner, axis=0).astype(like.dtype)


class MixtureMLP(nnx.Module):
    """A router and its experts, in the place of an MLP."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        assert config.num_experts is not None
        self.name = config.modules.router
        router = nnx.Linear(
            config.hidden_size,
            config.num_experts,
            use_bias=config.expert_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        setattr(self, self.name, router)
        self.routing = config.routing
        if self.routing is not None and not self.routing.softmax:
            bias = jnp.zeros((config.num_experts,), param_dtype)
            setattr(router, "e_score_correction_bias", nnx.Param(bias))  # noqa: B010
        self.shared = config.modules.shared if config.shared_expert_size else ""
        self.shared_gate = config.shared_gate
        if self.shared_gate:
            self.shared_expert_gate = nnx.Linear(
                config.hidden_size, 1, use_bias=False, dtype=dtype, param_dtype=param_dtype,
                rngs=rngs,
            )  # fmt: skip
        self.experts = Experts(config, dtype=dtype, param_dtype=param_dtype)
        self.count = config.num_experts_per_tok
        self.normalized = config.norm_topk_prob

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.counted(x, None)[0]

    def counted(
        self, x: Float[Array, "b t d"], real: Bool[Array, "b t"] | None
    ) -> tuple[Float[Array, "b t d"], Load | None]:
        """The output, and the load of the experts by the tokens that are `real`, if given."""
        rows = x.reshape(-1, x.shape[-1])  # (m, d)
        router = getattr(self, self.name)
        logits = router(rows)
        if self.routing is None:
            chosen = choose_experts(logits, self.count, normalized=self.normalized)
        else:
            bias = None
            if not self.routing.softmax:
                bias = router.e_score_correction_bias.get_value()
            chosen = choose_grouped(
                logits, bias, self.count, self.routing, normalized=self.normalized
            )
        load = None if real is None else load_of(logits, chosen.experts, real.reshape(-1))
        out = self.experts(rows, chosen).reshape(x.shape)
        if self.shared:
            out = out + self.of_all(x)
        return out, load

    def of_all(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """What the experts that every token uses add, which `Block` sets."""
        out = getattr(self, self.shared)(x)
        return out * jax.nn.sigmoid(self.shared_expert_gate(x)) if self.shared_gate else out


def choose_experts(logits: Float[Array, "m e"], count: int, *, normalized: bool) -> Chosen:
    """The `count` likeliest experts of each token; `normalized` weights add up to 1."""
    likely = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = lax.top_k(likely, count)
    if normalized:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return Chosen(experts, weights)


def choose_grouped(
    logits: Float[Array, "m e"],
    bias: Float[Array, " e"] | None,
    count: int,
    routing: Routing,
    *,
    normalized: bool,
) -> Chosen:
    """As `choose_experts`, among the experts of each token's best groups.

    By a softmax a group is as good as its best expert, by sigmoids as its two best. The bias
    balances the load: it decides which experts are chosen, not how much they count.

    Source: DeepSeek-AI 2024, arXiv:2405.04434, section 2.2.2; arXiv:2412.19437, section 2.1.2.
    """
    wide = logits.astype(jnp.float32)
    likely = jax.nn.softmax(wide, axis=-1) if routing.softmax else jax.nn.sigmoid(wide)
    scores = likely if bias is None else likely + bias.astype(jnp.float32)
    grouped = scores.reshape(len(scores), routing.groups, -1)  # (m, g, e/g)
    best = lax.top_k(grouped, 1 if routing.softmax else 2)[0].sum(axis=-1)
    groups = lax.top_k(best, routing.chosen)[1]  # (m, chosen)
    within = (groups[:, :, None] == jnp.arange(routing.groups)).any(axis=1)  # (m, g)
    scores = jnp.where(within[:, :, None], grouped, -jnp.inf).reshape(scores.shape)
    experts = lax.top_k(scores, count)[1]
    weights = jnp.take_along_axis(likely, experts, axis=1)
    if normalized:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return Chosen(experts, weights * routing.scale)


def load_of(
    logits: Float[Array, "m e"], experts: Int[Array, "m k"], real: Bool[Array, " m"]
) -> Load:
    """The load of one block's experts."""
    # In float32: bfloat16 counts to 256 only.
    count, weights = logits.shape[1], real.astype(jnp.float32)
    chosen = jnp.zeros(count).at[experts].add(weights[:, None])
    return Load(chosen, weights @ jax.nn.softmax(logits.astype(jnp.float32), axis=-1))


def balance(load: Load) -> Float[Array, ""]:
    """The load-balancing loss, E Σ_e f_e p_e, as transformers' `load_balancing_loss_func`.

    f_e is the share of tokens that chose e, p_e the mean probability; K if all are alike.

    Source: Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6.
    """
    # A token's probabilities add up to 1, so that this is the number of tokens.
    tokens = jnp.maximum(lax.stop_gradient(load.likely.sum()), 1.0)
    return load.chosen.size * jnp.sum(load.chosen / tokens * load.likely / tokens)


def sort_by_expert(experts: Int[Array, "m k"], count: int) -> Order:
    """Sorts the choices of all tokens by expert; those of one expert stay in their order."""
    flat = experts.reshape(-1)
    source = jnp.argsort(flat, stable=True)
    return Order(source, jnp.argsort(source), jnp.bincount(flat, length=count))


def ragged(
    rows: Float[Array, "rows i"], weights: Float[Array, "e i o"], order: Order
) -> Float[Array, "rows o"]:
    """Each sorted row times its expert's weights, in one operation."""
    return lax.ragged_dot(rows, weights, order.sizes)


def tiled(
    rows: Float[Array, "rows i"], weights: Float[Array, "e i o"], order: Order
) -> Float[Array, "rows o"]:
    """As `ragged`, a tile of rows of one expert at a time.

    Each expert's last tile is filled up with zeros, so that sizes do not depend on the choices.
    """
    count, experts = rows.shape[0], weights.shape[0]
    size = tile_size(count, experts)
    tiles = tile_count(count, experts)
    needed = -(-order.sizes // size)  # tiles of each expert
    ends = jnp.cumsum(needed)
    # The last tiles may be no expert's: they hold zeros, and any weights do for them.
    owner = jnp.searchsorted(ends, jnp.arange(tiles), side="right").clip(max=experts - 1)
    # How far an expert's rows move: its first tile's place less its first sorted place.
    shift = (ends - needed) * size - (jnp.cumsum(order.sizes) - order.sizes)
    at = jnp.arange(count) + jnp.repeat(shift, order.sizes, total_repeat_length=count)
    apart = jnp.zeros((tiles * size, rows.shape[1]), rows.dtype)
    apart = apart.at[at].set(rows, unique_indices=True, indices_are_sorted=True)
    out = _each_tile(apart.reshape(tiles, size, -1), owner, weights)
    return jnp.take(out.reshape(tiles * size, -1), at, axis=0, unique_indices=True)


def _each_tile(
    tiles: Float[Array, "tiles rows i"], owner: Int[Array, " tiles"], weights: Float[Array, "e i o"]
) -> Float[Array, "tiles rows o"]:
    # One after another: all at once would copy the weights for each tile. The checkpoint keeps the
    # backward pass from holding those copies: it takes the expert's weights again.
    @jax.checkpoint
    def one(each: tuple[Array, Array]) -> Array:
        x, expert = each
        return x @ lax.dynamic_index_in_dim(weights, expert, keepdims=False)

    return lax.map(one, (tiles, owner))


def tile_size(rows: int, experts: int) -> int:
    """Rows of one tile: a quarter of an expert's share, in whole eights where there are enough.

    Each expert adds at most a tile of filling, so that a quarter is added to the work.
    """
    quarter = rows / experts / 4
    return 1 if quarter < 4 else min(256, 8 * max(1, round(quarter / 8)))


def tile_count(rows: int, experts: int) -> int:
    """How many tiles there are at most, whatever tokens choose."""
    return rows // tile_size(rows, experts) + min(rows, experts)
