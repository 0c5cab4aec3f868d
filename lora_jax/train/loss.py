"""Causal language-model loss over the learned tokens only.

    loss = - (1/N) sum_i  log softmax(head(h_i))[target_i]        N learned tokens of the step

The sum and N run over all rows and all microbatches of a step, so accumulation changes the memory
but not the loss. The output head, the largest matrix of a small model, is applied only at the
positions that predict a learned token; the others do not contribute to the loss. Where the float32
logits of all these positions would take more than `CHUNK_BYTES`, head and cross entropy run over a
part of the positions at a time. A head that does not train gives the gradient of its input in the
same pass,

    d loss_i / d h_i = (softmax(head(h_i)) - onehot(target_i)) · d head / d h_i

which is all that the backward pass needs of it; another one is applied again there. The dropout of
an adapter of the head has one mask for each place of the grid, whatever part or device computes it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from lora_jax import compat
from lora_jax.dims import AnyArray
from lora_jax.models.layers import Specs, gather
from lora_jax.models.registry import ENCODER, ENCODER_DECODER, IMAGE_ENCODER, kind_of_model
from lora_jax.train.goals import Goal, answer_losses, goal_of, token_losses
from lora_jax.transform.low_rank import at_places

# Logits at one time, float32. The backward pass holds about two more arrays of this size.
CHUNK_BYTES = 128 << 20


class Rows(NamedTuple):
    """How the rows of a batch are spread over a mesh.

    Attributes:
      axes: axes of the mesh in `jax.set_mesh`.
      parts: the number of devices along them; each has its share of a batch's positions, see
        `loader`.
      weights: what is gathered of the parameters before the head is applied, see
        `lora_jax.models.layers.gather`.
      tokens: the axis that the tokens of a row are spread over, or None.
      spans: the number of devices along it.
    """

    axes: tuple[str, ...] = ()
    parts: int = 1
    weights: Specs = ()
    tokens: str | None = None
    spans: int = 1

    @property
    def count(self) -> int:
        """The number of devices that a batch is spread over."""
        return self.parts * self.spans


TOGETHER = Rows()


def outputs_of(model: Any) -> Callable:
    """The model as a function `(params, tokens, positions) -> logits` at those positions.

    For another loss, or for `plan`. Training uses `losses_of`, which never holds all logits.

    Args:
      model: `apply(params, tokens, return_hidden=True)` gives hidden states (B, T, D) and
        `head(params, hidden)` gives logits (B, T', V).

    Returns:
      `logits(params, tokens, positions)`: tokens int32 (B, T), positions int32 (P,) of the
      flattened (B, T) grid; logits float32 (P, V).
    """

    def logits(
        params: Any, tokens: Int[AnyArray, "b t"], positions: Int[AnyArray, " p"]
    ) -> Float[Array, "p v"]:
        # Shapes matter here: an encoder-decoder may read what it writes.
        both = (tokens, tokens) if kind_of_model(model) == ENCODER_DECODER else (tokens,)
        hidden = model.apply(params, *both, return_hidden=True)
        picked = pick(hidden, positions)[None]
        params = _head(model, params, picked).at(params, positions[None])
        return model.head(params, picked)[0].astype(jnp.float32)

    return logits


def losses_of(
    model: Any,
    rows: Rows = TOGETHER,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    balance: float = 0.0,
    frozen: frozenset[int] = frozenset(),
) -> Callable:
    """The model as a function `(params, tokens, positions, targets) -> losses` at those positions.

    `lorafy` transforms this function for training. Logits exist for as many positions at a time as
    `chunk_bytes` holds in float32, in the backward pass too, which applies the head again.

    Args:
      model: as for `outputs_of`.
      rows: how the rows of the batch are spread over a mesh.
      chunk_bytes: the largest array of logits on a device. A head of V outputs takes 4·V bytes a
        position.
      balance: weight of the load-balancing loss of experts, which is added at every position: in
        a weighted mean it counts once. `model.apply` then has the argument `balanced`.
      frozen: numbers of the leaves of `params` that get no gradient. Where the head reads no other,
        chunks give the gradient of the hidden states with the losses: leave it out where only the
        losses are wanted, which would take twice as long.

    Returns:
      `losses(params, tokens, positions, targets, *, segments=None, reads=None)`: tokens int32
      (B, T), positions and targets int32 (P,), for packed rows segments int32 (B, T), and for an
      encoder-decoder reads int32 (B, S), -1 at padding; -log softmax(logits)[target], float32
      (P,). An encoder of images has images float32 (B, C, H, W), and `tokens` only for their
      shape. Of a head of a task the loss is that of its `lora_jax.train.goals.Goal`, and targets
      are as it has them, (P, ...).
    """
    goal = goal_of(getattr(model, "config", None))
    whole = kind_of_model(model) in (ENCODER, IMAGE_ENCODER)
    if goal is not None and (whole or goal.per == "answer"):
        return _of_whole_rows(model, goal, rows)
    loss_of = token_losses if goal is None else goal.loss

    def losses(
        params: Any,
        tokens: Int[AnyArray, "b t"],
        positions: Int[AnyArray, " p"],
        targets: Shaped[AnyArray, "p ..."],
        *,
        segments: Int[AnyArray, "b t"] | None = None,
        reads: Int[AnyArray, "b s"] | None = None,
    ) -> Float[Array, " p"]:
        # Models of others may have no such argument: their rows are not packed.
        packed, texts = {} if segments is None else {"segments": segments}, (tokens,)
        if reads is not None:
            packed, texts = {"mask": reads >= 0}, (jnp.maximum(reads, 0), tokens)
        if balance:
            hidden, load = model.apply(params, *texts, **packed, return_hidden=True, balanced=True)
        else:
            hidden, load = model.apply(params, *texts, **packed, return_hidden=True), 0.0
        hidden = _pick_apart(hidden, positions, rows)
        places = positions.reshape(rows.count, -1)
        targets = targets.reshape(*places.shape, *targets.shape[1:])
        # Once, and not for every chunk.
        params = gather(params, rows.weights) if rows.weights else params
        head = _head(model, params, hidden)
        # Here and in each chunk: the loop of chunks gives no key of its own to what is marked.
        params = head.at(params, places)

        def part(
            hidden: Float[Array, "n c d"],
            places: Int[AnyArray, "n c"],
            targets: AnyArray,
        ) -> Float[Array, " n*c"]:
            # The head's weight travels, not the rows: there are more of them than inputs.
            logits = _spread(model.head(head.at(params, places), hidden), rows)
            flat = targets.reshape(-1, *targets.shape[2:])
            return loss_of(logits.reshape(-1, logits.shape[-1]), flat)

        count = min(-(-4 * head.outputs * hidden.shape[1] // chunk_bytes), hidden.shape[1])
        if count <= 1:
            found = part(hidden, places, targets)
        elif head.weights <= frozen:
            found = _with_gradients(part, count, hidden, places, targets)
        else:
            found = _in_chunks(jax.checkpoint(part), count, hidden, places, targets).reshape(-1)
            found = _before_gradients(found)
        return found + balance * load if balance else found

    return losses


def _of_whole_rows(model: Any, goal: Goal, rows: Rows) -> Callable:
    """`losses_of` of an encoder, and of answers: a text in a row, or two, the second in segment 2.

    No token attends to padding. A row of an encoder of images is an image.
    """
    both_ways = kind_of_model(model) == ENCODER
    typed = both_ways and model.config.typed
    # A text's logits are of its row, wherever its tokens are.
    by_text = rows._replace(tokens=None, spans=1)

    def losses(
        params: Any,
        tokens: Int[AnyArray, "b t"],
        positions: Int[AnyArray, " p"],
        targets: AnyArray,
        *,
        segments: Int[AnyArray, "b t"] | None = None,
        images: Float[AnyArray, "b c h w"] | None = None,
    ) -> Float[Array, " p"]:
        real, given = None, {}
        if segments is not None:
            real = segments > 0
            types = {"token_type_ids": (segments > 1).astype(tokens.dtype)} if typed else {}
            given = {"mask": real, **types} if both_ways else {}
        logits = model.apply(params, tokens if images is None else images, **given)
        numbers = positions // tokens.shape[1]
        if goal.per == "answer":
            assert real is not None
            return answer_losses(logits, real, numbers, targets)
        if goal.per == "token":
            found = _pick_apart(logits, positions, rows)
        else:
            apart = _spread(logits.reshape(rows.parts, -1, logits.shape[-1]), by_text)
            starts = jnp.arange(rows.parts) * apart.shape[1]
            own = numbers.reshape(rows.parts, -1) - starts[:, None]
            found = jax.vmap(lambda some, row: some[row])(apart, own)
        return goal.loss(found.reshape(-1, found.shape[-1]), targets)

    return losses


class _Head(NamedTuple):
    """What is known of a model's head before it is applied.

    Attributes:
      weights: the numbers of the parameters that it reads, among all.
      outputs: how many logits a position has.
    """

    weights: frozenset[int]
    outputs: int

    def at(self, params: Any, places: Int[AnyArray, "n c"]) -> Any:
        """The parameters for hidden states of these places, see `at_places`."""
        leaves, tree = jax.tree.flatten(params)
        marked = at_places({i: leaves[i] for i in self.weights}, places)
        return jax.tree.unflatten(tree, [marked.get(i, x) for i, x in enumerate(leaves)])


def _head(model: Any, params: Any, hidden: Float[Array, "n q d"]) -> _Head:
    one = jax.ShapeDtypeStruct((1, 1, hidden.shape[-1]), hidden.dtype)
    jaxpr, _ = compat.open_jaxpr(jax.make_jaxpr(model.head)(params, one))
    # The others would go through the loop of chunks for nothing.
    read = {v for eqn in jaxpr.eqns for v in eqn.invars if isinstance(v, compat.Var)}
    numbered = enumerate(jaxpr.invars[:-1])
    return _Head(frozenset(i for i, v in numbered if v in read), jaxpr.outvars[0].aval.shape[-1])


def _with_gradients(
    part: Callable,
    count: int,
    hidden: Float[Array, "n q d"],
    places: Int[AnyArray, "n q"],
    targets: Shaped[AnyArray, "n q ..."],
) -> Float[Array, " n*q"]:
    """The losses of `part` by chunks, whose backward pass does not apply the head again."""

    def both(
        hidden: Float[Array, "n c d"],
        places: Int[AnyArray, "n c"],
        targets: Shaped[AnyArray, "n c ..."],
    ) -> tuple[Float[Array, " n*c"], Float[Array, "n c d"]]:
        losses, pull = jax.vjp(lambda h: part(h, places, targets), hidden)
        # A position's loss depends on its own hidden state alone, so the sum has all gradients.
        return losses, pull(jnp.ones_like(losses))[0]

    held = jax.lax.stop_gradient(hidden)
    losses, slopes = _in_chunks(both, count, held, places, targets)
    # 0 to add, with these gradients.
    moved = (hidden - held).astype(jnp.float32)
    return (losses + jnp.sum(slopes.astype(jnp.float32) * moved, axis=-1)).reshape(-1)


def _in_chunks(fn: Callable, count: int, *inputs: AnyArray) -> Any:
    """`fn(*inputs)`, by `count` chunks of each part's positions, (n, q, ...), one by one.

    Its results have positions first, (n·c,) or (n, c, ...); they are put together as (n, q, ...).
    """
    parts, places = inputs[0].shape[:2]
    size = -(-places // count)

    def chunks(x: AnyArray) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, size * count - places)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(parts, count, size, *x.shape[2:]), 1, 0)

    def joined(x: Array) -> Array:
        inner = x.shape[3:] if x.ndim > 2 else ()
        apart = jnp.moveaxis(x.reshape(count, parts, size, *inner), 0, 1)
        return apart.reshape(parts, -1, *inner)[:, :places]

    found = jax.lax.map(lambda chunk: fn(*chunk), tuple(map(chunks, inputs)))
    return jax.tree.map(joined, found)


@jax.custom_vjp
def _before_gradients(losses: Float[Array, " p"]) -> Float[Array, " p"]:
    """The losses, which are computed before their gradients are.

    The gradients apply the head again and do not depend on the losses: libtpu leaves the losses for
    the end of the step where it can, and holds the head that it has gathered for both until then.
    """
    return losses


def _losses_fwd(losses: Float[Array, " p"]) -> tuple[Float[Array, " p"], Float[Array, " p"]]:
    return losses, losses


def _losses_bwd(losses: Float[Array, " p"], g: Float[Array, " p"]) -> tuple[Float[Array, " p"]]:
    # XLA removes a barrier of which one result has no reader. The gradients of a loss that is not a
    # number are none either.
    return (jnp.where(jnp.isnan(losses), losses, g),)


_before_gradients.defvjp(_losses_fwd, _losses_bwd)


def _pick_apart(
    hidden: Float[Array, "b t d"], positions: Int[AnyArray, " p"], rows: Rows
) -> Float[Array, "n q d"]:
    """As `pick`, in each part of the batch on its own device: P/n positions of n parts."""
    if rows.count == 1:
        return pick(hidden, positions)[None]
    if rows.spans > 1:
        # `loader` gives all places, span by span.
        apart = hidden.reshape(
            rows.parts, -1, rows.spans, hidden.shape[1] // rows.spans, hidden.shape[2]
        )
        apart = jnp.moveaxis(apart, 2, 1)  # (parts, spans, rows, t, d)
        return _spread(apart.reshape(rows.count, -1, hidden.shape[-1]), rows)
    parts = _spread(hidden.reshape(rows.parts, -1, *hidden.shape[1:]), rows)
    starts = jnp.arange(rows.parts) * (parts.shape[1] * parts.shape[2])
    places = positions.reshape(rows.parts, -1) - starts[:, None]
    return _spread(jax.vmap(pick)(parts, places), rows)


def _spread(x: Array, rows: Rows) -> Array:
    """The first dim over the axes of the batch; the others, such as a vocabulary, as they are."""
    if rows.count == 1:
        return x
    axes = rows.axes if rows.tokens is None else (*rows.axes, rows.tokens)
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *others))


def pick(hidden: Float[Array, "b t d"], positions: Int[AnyArray, " p"]) -> Float[Array, "p d"]:
    """The hidden states at `positions` of the flattened grid, (P, D); all of them if P == B*T."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    if positions.shape[0] == flat.shape[0]:
        return flat
    # The positions are distinct and sorted; with these flags the scatter of the gradient needs no
    # atomic additions. Where mesh axes are explicit, JAX needs the place of the picked rows.
    spread = any(compat.spec_of(flat) or ())
    return flat.at[positions].get(
        indices_are_sorted=True,
        unique_indices=True,
        mode="promise_in_bounds",
        out_sharding=PartitionSpec() if spread else None,
    )


def cross_entropy(
    logits: Float[Array, "p v"],
    targets: Int[AnyArray, " p"],
    weights: Float[Array, " p"],
) -> Float[Array, ""]:
    """The weighted sum of -log softmax(logits)[target], in float32 (not yet divided by N)."""
    return jnp.sum(token_losses(logits, targets) * weights)


def read_beside(batch: Any) -> dict[str, AnyArray]:
    """What a microbatch has for the losses beside tokens, positions and targets, by name."""
    more = {"segments": batch.segments, "reads": batch.reads, "images": batch.images}
    return {name: x for name, x in more.items() if x is not None}


def summed_loss(losses: Callable) -> Callable:
    """The loss of one microbatch as a sum, from a function that returns the loss of each position.

    Args:
      losses: `(params, tokens, positions, targets, key) -> losses (P,)`, see `losses_of`; for
        packed rows it is called with `segments` too.

    Returns:
      `loss(params, batch, key) -> float32 ()`; `batch` is one microbatch: tokens (B, T),
      positions, targets, weights (P,), and segments (B, T) or None.
    """

    def loss(params: Any, batch: Any, key: Any) -> Float[Array, ""]:
        inputs = (params, batch.tokens, batch.positions, batch.targets, key)
        each = losses(*inputs, **read_beside(batch))
        return jnp.sum(each * batch.weights)

    return loss
