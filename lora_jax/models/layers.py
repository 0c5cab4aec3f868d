"""Parts of the models: norms, the embedding, activations, and scanned blocks.

Parameters are Flax NNX's; `kernel`s are (in, out), tables are `embedding`s, norms have a `scale`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lora_jax import compat
from lora_jax.dims import AnyArray
from lora_jax.paths import numbers_of, slice_of, spell

# The ends of the paths of weights, and the spec of each.
Specs = tuple[tuple[str, PartitionSpec], ...]

# Name of the projections' results under rematerialization policies.
PROJECTION = "projection"

_TANH_GELU = partial(jax.nn.gelu, approximate=True)
_ERF_GELU = partial(jax.nn.gelu, approximate=False)
# Hugging Face's names of activations, several of which are one function.
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    **dict.fromkeys(("silu", "swish"), jax.nn.silu),
    **dict.fromkeys(("gelu", "gelu_python"), _ERF_GELU),
    **dict.fromkeys(
        ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
        _TANH_GELU,
    ),
    "gelu_10": lambda x: jnp.clip(_ERF_GELU(x), -10, 10),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "mish": jax.nn.mish,
    "hardswish": jax.nn.hard_swish,
    "linear": lambda x: x,
}
# The one that has parameters, in `lora_jax.models.llama_parts`.
XIELU = "xielu"


def kept(x: Array) -> Array:
    """Marks the output of a projection for the rematerialization policy `projections`."""
    return checkpoint_name(x, PROJECTION)


def on_rows(x: Float[Array, "b ..."], axes: Sequence[str], tokens: str | None = None) -> Array:
    """Shards the rows of a batch, and so of its gradients, over these axes of the mesh.

    Without the constraint, XLA's partitioner takes the sharding of the residual stream from the
    embedding table: if the table's width is sharded over an axis, every device of the axis holds
    all rows and a part of the width, and gathers the width for every product.

    Args:
      x: the array; its other dims are not sharded.
      axes: axes of the mesh in `jax.set_mesh`.
      tokens: the axis of the mesh that the second dim is sharded over, or None. Without any axis
        `x` stays as it is.
    """
    # Inside of a `shard_map` over the axis `x` has a device's own tokens.
    if tokens in jax.sharding.get_abstract_mesh().manual_axes:
        tokens = None
    if not axes and tokens is None:
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(tuple(axes), tokens))


def on_tokens(x: Any, axes: Sequence[str], tokens: str | None) -> Any:
    """Shards tokens before and after their embedding, with rows over the axes but `fsdp`.

    That axis has a part of the table's features on each device, of which the next `on_rows` makes
    a part of the rows. XLA's partitioner finds no way to the rows of two axes, or to rows and
    tokens, in one step: it would gather both.

    Args:
      x: (b, t), or (b, t, d).
      axes, tokens: as in `on_rows`; without `tokens`, and where `fsdp` is not one of several
        axes, `x` stays as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if tokens in mesh.manual_axes:
        return x
    rows = tuple(a for a in axes if a != "fsdp")
    several = "fsdp" in axes and any(mesh.shape[a] > 1 for a in rows)
    if tokens is None and not several:
        return x
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 2)
    return lax.with_sharding_constraint(x, PartitionSpec(rows, tokens, *others))


def gather(params: Any, specs: Specs) -> Any:
    """Brings weights that are stored on more devices to where they are used.

    Without the constraint, XLA's partitioner decodes a quantized weight where it is stored and
    sends the result, and it may send rows in place of weights where a batch is small. An adapter's
    transformation applies the constraint to codes and factors.

    Args:
      params: parameters of a block, or of a model.
      specs: the specs in which weights are used, by the end of their paths; others stay.
    """

    def whole(path: tuple[Any, ...], x: Array) -> Array:
        name = f".{spell(path)}"
        spec = next((spec for full, spec in specs if f".{full}".endswith(name)), None)
        if spec is None:
            return x
        # Of a stacked leaf this is one block, without the first dim.
        return lax.with_sharding_constraint(x, PartitionSpec(*tuple(spec)[-x.ndim :]))

    return jax.tree_util.tree_map_with_path(whole, params)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, the mean in float32.

    With `offset` (Gemma) the factor is `1 + scale`; with `centered` (Cohere) the mean is subtracted
    from `x` first. With these, or `wide` (gpt-oss), the product is rounded once. `shape` is (d,),
    or (n, d) where each head has a scale of its own.
    """

    def __init__(
        self,
        *shape: int,
        eps: float,
        param_dtype: DTypeLike,
        offset: bool = False,
        centered: bool = False,
        wide: bool = False,
    ) -> None:
        self.eps = eps
        self.wide = wide or offset or centered
        self.offset, self.centered = offset, centered
        # Either way a fresh norm multiplies by 1.
        fresh = jnp.zeros if offset else jnp.ones
        self.scale = nnx.Param(fresh(shape, param_dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        wide = x.astype(jnp.float32)
        if self.centered:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normal = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = self.scale.get_value()  # (d,) or (n, d)
        if self.wide:
            return (normal * (scale.astype(jnp.float32) + int(self.offset))).astype(x.dtype)
        # Llama rounds before it multiplies, the others after; in 16 bits the results differ.
        return scale.astype(x.dtype) * normal.astype(x.dtype)


def normal(x: Float[Array, "*b d"], eps: float) -> Float[Array, "*b d"]:
    """`RMSNorm` without a scale."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps) * scale + bias`, mean and variance in float32.

    With `offset` (Nemotron) the factor is `1 + scale`.
    """

    def __init__(
        self, size: int, *, eps: float, param_dtype: DTypeLike, offset: bool = False
    ) -> None:
        self.eps, self.offset = eps, offset
        fresh = jnp.zeros if offset else jnp.ones
        self.scale = nnx.Param(fresh((size,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((size,), param_dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normal = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale, bias = self.scale.get_value() + int(self.offset), self.bias.get_value()
        return normal.astype(x.dtype) * scale.astype(x.dtype) + bias.astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors, one for each token."""

    def __init__(self, tokens: int, size: int, *, dtype: DTypeLike, param_dtype: DTypeLike) -> None:
        self.dtype = dtype
        self.embedding = nnx.Param(jnp.zeros((tokens, size), param_dtype))

    def __call__(self, tokens: Int[AnyArray, "*t"]) -> Float[Array, "*t d"]:
        return jnp.take(self.embedding.get_value(), tokens, axis=0).astype(self.dtype)


def logits_of(
    hidden: Float[Array, "b t d"],
    weight: Float[Array, "v d"] | Float[Array, "d v"],
    *,
    tied: bool,
    dtype: DTypeLike,
) -> Float[Array, "b t v"]:
    """Logits in float32; products in the compute dtype, sums in float32.

    Args:
      hidden: what the final norm returned.
      weight: the embedding table (v, d) if `tied`, else the head's kernel (d, v).
      tied: which of the two.
      dtype: the compute dtype.
    """
    # Over d: the last dim of `hidden`, and of the table, but the first of the kernel.
    contract = (((hidden.ndim - 1,), (1 if tied else 0,)), ((), ()))
    return lax.dot_general(
        hidden.astype(dtype), weight.astype(dtype), contract, preferred_element_type=jnp.float32
    )


def run_blocks(
    layers: Any,
    carry: Any,
    call: Callable[..., Any],
    *,
    wrap: Callable[..., Callable],
    each: Sequence[bool],
    given: Array | None = None,
) -> Any:
    """Runs blocks one after the other: one `lax.scan` where they are stacked.

    Args:
      layers: one block whose parameters carry a leading axis; an `nnx.Dict` of such blocks, one of
        each kind, by the numbers that `groups_of` has; or one of all blocks by number.
      carry: what the first block gets.
      call: `(block, carry, number, own) -> carry`; `number` is an int32 scalar.
      wrap: applied to the function that runs one block (rematerialization).
      each: what sets each block apart, one value a block. `own` is a Python value where it is
        known when tracing: in blocks that are not stacked, and where all values are the same, so
        that blocks that do not differ cost nothing.
      given: an array of which `call` gets each block's, on the leading axis, as `given`, or None.

    Returns:
      What the last block returned.
    """

    # `wrap` finds the parameters in the first argument that is data.
    def one(
        graph: nnx.GraphDef,
        state: Any,
        i: Int[Array, ""],
        carry: Any,
        given: Array | None,
        own: bool | Bool[Array, ""] | None,
    ) -> Any:
        more = {} if given is None else {"given": given}
        return call(nnx.merge(graph, state), carry, i, own, **more)

    if isinstance(layers, nnx.Dict) and "0" in layers:
        for number, own in enumerate(each):
            graph, state = nnx.split(layers[str(number)])
            some = None if given is None else given[number]
            carry = wrap(partial(one, graph, own=own))(state, jnp.int32(number), carry, some)
        return carry
    if not isinstance(layers, nnx.Dict):
        turns = [[(range(len(each)), layers)]]
    else:
        turns, rest = [], _groups_in(layers)
        # Kinds that take turns run in one scan, a block of each; runs of blocks one after another.
        while rest:
            some, rest = rest[: rest[0].step], rest[rest[0].step :]
            turns.append([(numbers, layers[slice_of(numbers)]) for numbers in some])
    for stacks in turns:
        carry = _scanned(stacks, carry, one, wrap=wrap, each=each, given=given)
    return carry


def groups_of(kinds: Sequence[Any]) -> tuple[range, ...]:
    """The numbers of the blocks that are stacked together: each group has one kind.

    Blocks one after another whose kinds repeat, such as dense, sparse, dense, sparse, are a group
    for each place of the period; a run of blocks of one kind is one. Of all ways to cut the blocks
    so, this is the one with the fewest groups: each is compiled once.
    """
    # Of the first blocks: the groups, and how many runs they are in, which decides among equals.
    best: list[tuple[int, int, tuple[range, ...]]] = [(0, 0, ())]
    for stop in range(1, len(kinds) + 1):
        ways = []
        for start in range(stop):
            some, (groups, runs, before) = kinds[start:stop], best[start]
            period = next((p for p in range(1, len(some)) if some[p:] == some[:-p]), 1)
            if len(some) % period == 0 and (len(some) == 1 or some[period:] == some[:-period]):
                found = (range(start + first, stop, period) for first in range(period))
                ways.append((groups + period, runs + 1, (*before, *found)))
        best.append(min(ways, key=lambda way: way[:2]))
    return best[-1][2]


def stack_of(
    kinds: Sequence[Any], make: Callable[[Any], Any], *, scan: bool | tuple[int, ...]
) -> Any:
    """The blocks of a model: one for each group that is scanned, or each for itself.

    Args:
      kinds: the kind of each block.
      make: kind -> a block.
      scan: whether blocks are stacked; a number for each block also keeps those with other numbers
        apart. A block stands for all of its group then: `lora_jax.models.structure.stacked` gives
        its parameters their leading axis.
    """
    if not scan:
        return nnx.Dict({str(number): make(kind) for number, kind in enumerate(kinds)})
    groups = groups_of(kinds if scan is True else tuple(zip(kinds, scan, strict=True)))
    if len(groups) == 1:
        return make(kinds[0])
    return nnx.Dict({slice_of(numbers): make(kinds[numbers[0]]) for numbers in groups})


def _groups_in(layers: nnx.Dict) -> list[range]:
    found = (numbers_of(name) for name in layers)
    return sorted((numbers for numbers in found if numbers), key=lambda numbers: numbers.start)


def _scanned(
    stacks: Sequence[tuple[range, Any]],
    carry: Any,
    one: Callable[..., Any],
    *,
    wrap: Callable[..., Callable],
    each: Sequence[bool],
    given: Array | None,
) -> Any:
    """Runs a block of each stack in turns, in one `lax.scan`; arguments as in `run_blocks`."""
    bodies, xs = [], []
    for numbers, layer in stacks:
        graph, states = nnx.split(layer)
        places = jnp.asarray(numbers, jnp.int32)
        own = [each[number] for number in numbers]
        alike = len(set(own)) == 1
        body = partial(one, graph, own=own[0]) if alike else partial(one, graph)
        bodies.append(wrap(body, several=len(stacks) > 1))
        some = None if given is None else given[slice(numbers.start, numbers.stop, numbers.step)]
        xs.append((states, places, some) if alike else (states, places, some, jnp.asarray(own)))

    def turn(carry: Any, found: Any) -> tuple[Any, None]:
        for body, x in zip(bodies, found, strict=True):
            carry = body(*x[:2], carry, *x[2:])
        return carry, None

    return lax.scan(turn, carry, tuple(xs))[0]


def automatic(
    run: Callable, params: Any, rows: AnyArray, *, with_number: bool = False, **others: Any
) -> Any:
    """`run(params, rows, **others)`, where explicit axes of a mesh are left to XLA's partitioner.

    `jax.make_mesh` makes explicit axes, for which every operation of a model must state the
    placement of its result. The models here state none but that of the rows.

    Args:
      run: the model.
      params: its weights.
      rows: an array whose first dim has the rows of the batch; the results keep their places.
      with_number: the result is a pair of such results and a number.
      others: further arrays, or None.
    """
    mesh = next(
        (m for x in jax.tree.leaves((params, rows)) if (m := compat.explicit_mesh(x))), None
    )
    if mesh is None:
        return run(params, rows, **others)
    places = PartitionSpec(*(compat.spec_of(rows) or (None,))[:1])
    found: Any = (places, PartitionSpec()) if with_number else places
    free: Any = jax.sharding.auto_axes(lambda p, r, o: run(p, r, **o), out_sharding=found)
    # Outside `jax.set_mesh` the arrays alone have the mesh.
    with jax.sharding.use_abstract_mesh(mesh):
        return free(params, rows, others)
