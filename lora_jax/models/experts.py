"""A mixture of experts: an MLP of which each token uses a few parts.

    p = softmax(x · W_gate)                              float32, over the E experts
    y = Σ_e p_e · W_down,e (act(W_gate,e x) * W_up,e x)  over the k experts with the largest p_e

Tokens are sorted by expert. An expert's rows are then multiplied by its weights alone, so that cost
grows with the k experts of a token and not with E, see `lora_jax.models.expert_rows`.

On a mesh every device sorts its own tokens. Along the axis `expert` each device has some of the
experts: it gathers the tokens of all devices of the axis, those of one device after the other take
its experts, and the sums go back to the tokens' devices. Choices of other devices' experts cost
nothing but their places.

M tokens, K experts of a token, E experts, D width, F inner size of an expert.

Source: Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024, "Mixtral", arXiv:2401.04088.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lora_jax import compat
from lora_jax.models.config import LlamaConfig
from lora_jax.models.dialect import Routing
from lora_jax.models.expert_rows import product, sort_by_expert
from lora_jax.models.kernels import spread
from lora_jax.models.layers import ACTIVATIONS, kept
from lora_jax.models.sharding import EXPERTS, TOKENS


class Chosen(NamedTuple):
    """The experts of each token, the likeliest first, and how much each of them counts."""

    experts: Int[Array, "*m k"]
    weights: Float[Array, "*m k"]


class Load(NamedTuple):
    """How tokens are spread over experts: sums over tokens, and over the blocks so far.

    Attributes:
      chosen: how many tokens chose each expert.
      likely: the probabilities of each expert.
    """

    chosen: Float[Array, " e"]
    likely: Float[Array, " e"]


class Experts(nnx.Module):
    """The weights of all experts, gate and up side by side: (E, D, 2F) and (E, F, D)."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike) -> None:
        count, width, inner = config.num_experts, config.hidden_size, config.expert_size
        assert count is not None  # a configuration without experts has an `MLP`
        self.dtype, self.count = dtype, count
        self.activation = config.hidden_activation
        self.gate_up_proj = nnx.Param(jnp.zeros((count, width, 2 * inner), param_dtype))
        self.down_proj = nnx.Param(jnp.zeros((count, inner, width), param_dtype))
        self.limit, self.alpha = config.swiglu_limit, config.swiglu_alpha
        self.biased, self.scaled = config.expert_bias, config.expert_inputs_scaled
        if self.biased:
            self.gate_up_proj_bias = nnx.Param(jnp.zeros((count, 2 * inner), param_dtype))
            self.down_proj_bias = nnx.Param(jnp.zeros((count, width), param_dtype))

    def __call__(
        self, x: Float[Array, "b t d"], logits: Float[Array, "b t e"], choose: Callable
    ) -> Float[Array, "b t d"]:
        weights = {
            name: getattr(self, name).get_value()
            for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
            if self.biased or not name.endswith("bias")
        }
        return over_experts(self.mixed, choose, x, logits, weights)

    def mixed(
        self, x: Float[Array, "m d"], chosen: Chosen, weights: dict[str, Array], first: int | Array
    ) -> Float[Array, "m d"]:
        """The sums over those of each token's experts that `weights` has, from `first` on."""
        up, down = weights["gate_up_proj"], weights["down_proj"]
        order = sort_by_expert(chosen.experts - first, self.count, own=up.shape[0])
        rows = jnp.take(x, order.source // chosen.experts.shape[1], axis=0)  # (rows, d)
        shares = chosen.weights
        if self.scaled:
            rows = rows * jnp.take(shares.reshape(-1), order.source)[:, None].astype(rows.dtype)
            shares = jnp.ones_like(shares)
        wide = product(rows, up.astype(self.dtype), order)  # (rows, 2f)
        # For tokens of other devices, as many as there are devices, it is computed again.
        wide = wide if up.shape[0] < self.count else kept(wide)
        if self.biased:
            owner = jnp.take((chosen.experts - first).reshape(-1), order.source)  # (rows,)
            wide = wide + _of_each(weights["gate_up_proj_bias"], owner, wide)
        out = product(self.gated(wide), down.astype(self.dtype), order)  # (rows, d)
        if self.biased:
            out = out + _of_each(weights["down_proj_bias"], owner, out)
        out = jnp.take(out, order.place, axis=0).reshape(*chosen.experts.shape, -1)  # (m, k, d)
        if up.shape[0] < self.count:
            local = chosen.experts - first
            shares = jnp.where((local >= 0) & (local < up.shape[0]), shares, 0.0)
        return _summed(out, shares).astype(x.dtype)

    def gated(self, wide: Float[Array, "rows f2"]) -> Float[Array, "rows f"]:
        """What goes into the second product, of gate and up."""
        if self.limit is None:
            gate, up = jnp.split(wide, 2, axis=-1)
            return ACTIVATIONS[self.activation](gate) * up
        # As gpt-oss stores them, in turns: PEFT's adapters have the outputs in that order.
        gate = jnp.minimum(wide[:, ::2], self.limit)
        up = jnp.clip(wide[:, 1::2], -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)


@partial(jax.checkpoint, prevent_cse=False)
def _summed(out: Float[Array, "m k d"], shares: Float[Array, "m k"]) -> Float[Array, "m d"]:
    """The sums over each token's experts; the backward pass converts again what is kept of `out`.

    In float32: a sum is rounded once.
    """
    return jnp.einsum("mkd,mk->md", out.astype(jnp.float32), shares)


def _of_each(bias: Array, owner: Int[Array, " rows"], like: Array) -> Float[Array, "rows o"]:
    """The bias of each row's expert; anything for the experts of other devices."""
    return jnp.take(bias, owner, axis=0, mode="clip").astype(like.dtype)


def over_experts(
    mixed: Callable[..., Array],
    choose: Callable[[Array], Chosen],
    x: Float[Array, "b t d"],
    logits: Float[Array, "b t e"],
    weights: dict[str, Array],
) -> Float[Array, "b t d"]:
    """`mixed(x, chosen, weights, first)` by each device, for its tokens or for its experts.

    Args:
      mixed: the experts of tokens (m, d), where `weights` begin with the expert `first`.
      choose: of logits to what tokens choose.
      x, logits: of all tokens; inside of a `shard_map` over `EXPERTS`, of a device's own.
      weights: (E, ...), in a `shard_map` a device's own; none is spread along other axes than
        `EXPERTS` and "tensor".
    """
    mesh, count = jax.sharding.get_abstract_mesh(), logits.shape[-1]
    axes = compat.open_axes(mesh)
    rows, _ = spread(mesh, x.shape[0], 1)
    if EXPERTS in mesh.manual_axes and len(weights["down_proj"]) < count:
        return _with_others(mixed, x, choose(logits), weights, apart=True)
    apart = count % axes.get(EXPERTS, 1) == 0 and EXPERTS in axes
    tokens = TOKENS if TOKENS in axes and x.shape[1] % axes[TOKENS] == 0 else None
    # XLA spreads what `tensor` divides by itself.
    if not apart and (not (rows or tokens) or "tensor" in axes):
        return _flat(mixed, x, choose(logits), weights, 0)

    def own(x: Array, logits: Array, weights: dict[str, Array]) -> Array:
        # Here and not before: XLA would choose for all tokens on every device.
        chosen = choose(logits)
        if not apart:
            return _flat(mixed, x, chosen, weights, 0)
        return _with_others(mixed, x, chosen, weights, apart=EXPERTS in (rows or ()))

    here = PartitionSpec(rows, tokens)
    return jax.shard_map(
        own,
        in_specs=(here, here, PartitionSpec(EXPERTS if apart else None)),
        out_specs=here,
        axis_names={*(rows or ()), *filter(None, [tokens]), *([EXPERTS] if apart else [])},
        check_vma=False,
    )(x, logits, weights)


def _flat(mixed: Callable, x: Array, chosen: Chosen, weights: dict, first: int | Array) -> Array:
    """The experts of all tokens of some rows."""
    tokens, *others = (y.reshape(-1, y.shape[-1]) for y in (x, *chosen))
    return mixed(tokens, Chosen(*others), weights, first).reshape(x.shape)


def _with_others(mixed: Callable, x: Array, chosen: Chosen, weights: dict, *, apart: bool) -> Array:
    """A device's experts for the tokens of all devices, and the sums of its own tokens.

    Args:
      mixed, weights: as in `over_experts`.
      x, chosen: tokens of this device, or of all if not `apart`.
      apart: whether each device has its own tokens.
    """
    first = lax.axis_index(EXPERTS) * len(weights["down_proj"])
    if not apart:
        return lax.psum(_flat(mixed, x, chosen, weights, first), EXPERTS)

    # One device's tokens after the other, and again in the backward pass: at once their rows would
    # take as many times the memory.
    @jax.checkpoint
    def one(each: tuple[Array, Chosen]) -> Array:
        return _flat(mixed, *each, weights, first)

    # The backward pass gathers again: else every device would keep the tokens of all layers.
    @jax.checkpoint
    def everyone(x: Array, chosen: Chosen) -> Array:
        gathered = jax.tree.map(lambda y: lax.all_gather(y, EXPERTS), (x, chosen))
        return lax.psum_scatter(lax.map(one, gathered), EXPERTS)

    return everyone(x, chosen)


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
        self.biased = self.routing is not None and self.routing.biased
        if self.routing is not None and self.biased:
            rows = (1,) if self.routing.statics else ()
            bias = jnp.zeros((*rows, config.num_experts), param_dtype)
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
        self.normalized, self.scaled = config.norm_topk_prob, config.expert_inputs_scaled

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.counted(x, None)[0]

    def counted(
        self, x: Float[Array, "b t d"], real: Bool[Array, "b t"] | None
    ) -> tuple[Float[Array, "b t d"], Load | None]:
        """The output, and the load of the experts by the tokens that are `real`, if given."""
        logits = getattr(self, self.name)(x)  # (b, t, e)
        load = None if real is None else load_of(logits, self.chosen(logits).experts, real)
        out = self.experts(x, logits, self.chosen)
        if self.shared:
            out = out + self.of_all(x)
        return out, load

    def chosen(self, logits: Float[Array, "b t e"]) -> Chosen:
        """What tokens with these logits choose."""
        flat = logits.reshape(-1, logits.shape[-1])
        if self.scaled:
            scores, experts = lax.top_k(flat, self.count)
            chosen = Chosen(experts, jax.nn.sigmoid(scores.astype(jnp.float32)))
        elif self.routing is None:
            chosen = choose_experts(flat, self.count, normalized=self.normalized)
        else:
            bias = None
            if self.biased:
                bias = getattr(self, self.name).e_score_correction_bias.get_value().reshape(-1)
            chosen = choose_grouped(
                flat, bias, self.count, self.routing, normalized=self.normalized
            )
        return Chosen(*(y.reshape(*logits.shape[:-1], -1) for y in chosen))

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
    logits: Float[Array, "b t e"], experts: Int[Array, "b t k"], real: Bool[Array, "b t"]
) -> Load:
    """The load of one block's experts."""
    # In float32: bfloat16 counts to 256 only.
    count, weights = logits.shape[-1], real.astype(jnp.float32)
    chosen = jnp.zeros(count).at[experts].add(weights[..., None])
    likely = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    return Load(chosen, jnp.einsum("bt,bte->e", weights, likely))


def balance(load: Load) -> Float[Array, ""]:
    """The load-balancing loss, E Σ_e f_e p_e, as transformers' `load_balancing_loss_func`.

    f_e is the share of tokens that chose e, p_e the mean probability; K if all are alike.

    Source: Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6.
    """
    # A token's probabilities add up to 1, so that this is the number of tokens.
    tokens = jnp.maximum(lax.stop_gradient(load.likely.sum()), 1.0)
    return load.chosen.size * jnp.sum(load.chosen / tokens * load.likely / tokens)
