"""The one low-rank contraction, and the dropout of its input."""

import dataclasses
import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax import compat
from lora_jax.transform.implicit import Implicit, wide_dtype
from lora_jax.transform.labels import contract, expand_to, labels, reorder


def low_rank(
    v: Implicit,
    x: Any,
    x_labels: Sequence,
    out_labels: Sequence,
    *,
    contracted: Collection,
    dtype: Any,
    precision: Any = None,
    specs: dict | None = None,
) -> Array:
    """`scale · (x·A)·B` for any set of contracted, batched and free dims of the weight.

    The factor that owns a contracted dim comes first, so that the intermediate has the rank's
    size. It is kept in float32, where the scale is applied; both products run in the wider of the
    operands' dtypes.

    Args:
      v: the implicit weight; its dims are labelled `("w", d)`.
      x: the other operand (after dropout); `x_labels`: its axes, contracted and batched ones
        under the weight's labels.
      out_labels: axes of the result.
      contracted: dims of the weight that are summed over.
      dtype: of the result.
      precision: as in `lax.dot_general`.
      specs: label to mesh axes of the result, under explicit sharding.

    Returns:
      An array with axes `out_labels`; unit dims that no factor owns are there with size 1.
    """
    roles = {v.roles[d] for d in contracted}
    # Where only stack dims are summed either order is right.
    a_first = "i" in roles or "o" not in roles
    order = ("a", "b") if a_first else ("b", "a")
    factors = [(getattr(v, part), _label(labels(v.roles, part))) for part in order]
    (first, first_labels), (second, second_labels) = factors
    compute = compute_dtype(x, v)
    wide = wide_dtype(compute)
    # x · first: (stack, free axes of x, r), the rank in place of the dims that are summed over.
    middle, middle_labels = contract(
        x.astype(compute),
        list(x_labels),
        first.astype(compute),
        first_labels,
        keep=set(out_labels) | set(second_labels),
        precision=precision,
        preferred=wide,
    )
    # In float32, before it is rounded to the operands' dtype: a small scale loses no bits.
    middle = middle * expand_to(
        v.scale.astype(wide), _label(labels(v.roles, "scale")), middle_labels
    )
    middle, second = middle.astype(compute), second.astype(compute)
    form = (tuple(middle_labels), tuple(second_labels), tuple(out_labels), precision, dtype)
    result, have = _second_product(form, middle, second, reverse_only=v.reverse_only, specs=specs)
    return with_units(result, have, out_labels)


def _second_product(
    form: tuple, middle: Array, second: Array, *, reverse_only: bool, specs: dict | None
) -> tuple[Array, list]:
    """`(x·A) · B` and its labels; `form` as of `thin_product`."""
    middle_labels, second_labels, out_labels, precision, dtype = form
    # Inside shard_map JAX's own backward sums over the axes along which only one operand varies.
    spread = compat.varying_axes(middle) | compat.varying_axes(second)
    # JAX's own transposes of a contraction add a transpose of the result for each factor.
    if reverse_only and not spread and specs is None and compat.spec_of(middle) is None:
        return thin_product(form, middle, second), result_labels(*form[:3])
    return contract(
        middle,
        middle_labels,
        second,
        second_labels,
        keep=set(out_labels),
        precision=precision,
        preferred=dtype,
        specs=specs,
    )


def with_units(array: Array, have: Sequence, want: Sequence) -> Array:
    """An array with its axes in the order of `want`, and size 1 for those it does not have.

    These are dims that no factor has; the sum with the base product broadcasts them.
    """
    order = [s for s in want if s in have]
    array = reorder(array, have, order)
    if len(order) == len(want):
        return array
    shape = dict(zip(order, array.shape, strict=True))
    return lax.reshape(array, [shape.get(s, 1) for s in want])


def _label(dims: Sequence) -> list:
    return [("w", d) if isinstance(d, int) else d for d in dims]


def compute_dtype(x: Any, v: Implicit) -> Any:
    """The dtype the two thin products run in: the activation's or the weight's, the wider one.

    A base product of a bfloat16 activation with a float32 weight has float32's precision, and so
    has the change.
    """
    inexact = [d for d in (x.dtype, v.dtype) if jnp.issubdtype(d, jnp.inexact)]
    # Of a complex number, each part's.
    floating = [compat.held(jnp.finfo(d).dtype) for d in inexact]
    # Products of 8-bit floats lose the change: bfloat16 at least.
    dtype = max(floating, key=lambda d: d.itemsize)
    dtype = dtype if dtype.itemsize >= 2 else jnp.dtype(jnp.bfloat16)
    # A factor is complex where the weight was made of two, as by `lax.complex`.
    every = [*inexact, v.a.dtype, v.b.dtype]
    if any(jnp.issubdtype(d, jnp.complexfloating) for d in every):
        return wide_dtype(dtype, jnp.complex64)
    return dtype


def with_dropout(v: Implicit, x: Any, use: int) -> Any:
    """Dropout of the adapter's input with this weight's key; `x` itself when there is no key.

    Args:
      v: the implicit weight; a remaining stack of keys is folded to its first.
      x: the activation.
      use: how often this weight has been used before in this call.
    """
    if v.key is None or v.dropout == 0:
        return x
    key = v.key
    # A stack that is used as a whole, such as experts, has one mask for all of it.
    while key.ndim:
        key = key[0]
    # Inverted dropout: the expectation stays, and evaluation needs no factor.
    mask = _mask(jax.random.fold_in(key, use), 1 - v.dropout, x.shape, v.places)
    return jnp.where(mask, x / jnp.asarray(1 - v.dropout, x.dtype), jnp.zeros((), x.dtype))


def _mask(key: Array, keep: float, shape: tuple[int, ...], places: Any) -> Array:
    if places is None or places.size * shape[-1] != math.prod(shape):
        return jax.random.bernoulli(key, keep, shape)

    def row(place: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, place), keep, shape[-1:])

    return jax.vmap(row)(places.reshape(-1)).reshape(shape)


def at_places(weights: Any, places: Any) -> Any:
    """The weights, for products with activations whose rows have these numbers.

    The dropout of an adapter then draws each row's mask from the row's number: the mask does not
    depend on which rows are computed together, nor on their order. Plain weights stay as they are.

    Args:
      weights: a tree of arrays.
      places: int32, of the shape of the activations without their last axis, the features.
    """
    return _marked(weights, places)


def _same(weights: Any, places: Any) -> Any:
    del places
    return weights


# The interpreter finds the call by this name.
AT_PLACES = _same.__name__ = "lora_jax_at_places"
_marked = jax.jit(_same)


def masked_at(values: Sequence) -> list:
    """What `at_places` gives of weights and, last, the places."""
    *weights, places = values
    drops = [isinstance(v, Implicit) and v.key is not None and v.dropout > 0 for v in weights]
    return [
        dataclasses.replace(v, places=places) if masked else v
        for v, masked in zip(weights, drops, strict=True)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def thin_product(form: tuple, thin: Any, factor: Any) -> Array:
    """`contract(thin, factor)` with a backward of its own.

    Args:
      form: `(thin labels, factor labels, kept labels, precision, dtype of the result)`, hashable.
      thin: `x·A`, tokens by rank.
      factor: `B`.

    Returns:
      The product, its axes in the order `contract` gives.
    """
    thin_labels, factor_labels, keep, precision, dtype = form
    return contract(
        thin, thin_labels, factor, factor_labels, keep=keep, precision=precision, preferred=dtype
    )[0]


def result_labels(thin_labels: Sequence, factor_labels: Sequence, keep: Collection) -> list:
    """The axes of `thin_product`'s result: batch, then the thin operand's, then the factor's."""
    shared = [s for s in thin_labels if s in factor_labels]
    batch = [s for s in shared if s in keep]
    own = [s for s in thin_labels if s not in shared and s in keep]
    return batch + own + [s for s in factor_labels if s not in shared and s in keep]


def _forward(form: tuple, thin: Any, factor: Any) -> tuple[Array, tuple]:
    return thin_product(form, thin, factor), (thin, factor)


def _backward(form: tuple, saved: tuple, g: Any) -> tuple[Array, Array]:
    thin, factor = saved
    thin_labels, factor_labels, keep, precision, _ = form
    g_labels = result_labels(thin_labels, factor_labels, keep)
    # The result may be wider than its operands; the products of the backward run in theirs.
    g = g.astype(thin.dtype)

    def against(
        x: Any, x_labels: Sequence, y: Any, y_labels: Sequence, want: Sequence, dtype: Any
    ) -> Array:
        out, have = contract(
            x, x_labels, y, y_labels, keep=set(want), precision=precision, preferred=dtype
        )
        return reorder(out, have, list(want))

    # d thin = g·Bᵀ and dB = thinᵀ·g, contracted into each operand's own order of axes.
    return (
        against(g, g_labels, factor, factor_labels, want=thin_labels, dtype=thin.dtype),
        against(thin, thin_labels, g, g_labels, want=factor_labels, dtype=factor.dtype),
    )


thin_product.defvjp(_forward, _backward)
