"""The one low-rank contraction, and the dropout of its input."""

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import compat
from lora_jax.array import widened
from lora_jax.transform.implicit import Implicit
from lora_jax.transform.labels import contract, expand_to, labels, reorder


def low_rank(
    v: Implicit,
    x,
    x_labels: Sequence,
    out_labels: Sequence,
    *,
    contracted: Collection,
    dtype,
    precision=None,
    specs: dict | None = None,
):
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
    a_first = "i" in roles or "o" not in roles
    order = ("a", "b") if a_first else ("b", "a")
    factors = [(getattr(v, part), _label(labels(v.roles, part))) for part in order]
    (first, first_labels), (second, second_labels) = factors
    compute = compute_dtype(x, v)
    wide = widened(compute)
    x = x.astype(compute)
    middle, middle_labels = contract(
        x,
        list(x_labels),
        first.astype(compute),
        first_labels,
        keep=set(out_labels) | set(second_labels),
        precision=precision,
        preferred=wide,
    )
    middle = middle * expand_to(
        v.scale.astype(wide), _label(labels(v.roles, "scale")), middle_labels
    )
    middle, second = middle.astype(compute), second.astype(compute)
    # Inside shard_map JAX's own backward sums over the axes along which only one operand varies.
    spread = compat.varying_axes(middle) | compat.varying_axes(second)
    result: Any
    if v.reverse_only and not spread and specs is None and compat.spec_of(middle) is None:
        form = (tuple(middle_labels), tuple(second_labels), tuple(out_labels), precision, dtype)
        result = thin_product(form, middle, second)
        have = result_labels(*form[:3])
    else:
        result, have = contract(
            middle,
            middle_labels,
            second,
            second_labels,
            keep=set(out_labels),
            precision=precision,
            preferred=dtype,
            specs=specs,
        )
    result = reorder(result, have, [s for s in out_labels if s in have])
    if len(have) == len(out_labels):
        return result
    shape = dict(zip([s for s in out_labels if s in have], result.shape, strict=True))
    return lax.reshape(result, [shape.get(s, 1) for s in out_labels])


def _label(dims: Sequence) -> list:
    return [("w", d) if isinstance(d, int) else d for d in dims]


def compute_dtype(x, v: Implicit):
    """The dtype the two thin products run in: the activation's or the weight's, the wider one.

    A base product of a bfloat16 activation with a float32 weight has float32's precision, and so
    has the change. At least 16 bits.
    """
    floating = [d for d in (x.dtype, v.dtype) if jnp.issubdtype(d, jnp.floating)]
    dtype = max(floating, key=lambda d: d.itemsize)
    return dtype if dtype.itemsize >= 2 else jnp.dtype(jnp.bfloat16)


def dropped(v: Implicit, x, use: int):
    """Dropout of the adapter's input with this weight's key; `x` itself when there is no key.

    Args:
      v: the implicit weight; a remaining stack of keys is folded to its first.
      x: the activation.
      use: how often this weight has been used before in this call.
    """
    if v.key is None or v.dropout == 0:
        return x
    key = v.key
    while key.ndim:
        key = key[0]
    mask = jax.random.bernoulli(jax.random.fold_in(key, use), 1 - v.dropout, x.shape)
    return jnp.where(mask, x / jnp.asarray(1 - v.dropout, x.dtype), jnp.zeros((), x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def thin_product(form: tuple, thin, factor):
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


def result_labels(thin_labels, factor_labels, keep) -> list:
    """The axes of `thin_product`'s result: batch, then the thin operand's, then the factor's."""
    shared = [s for s in thin_labels if s in factor_labels]
    batch = [s for s in shared if s in keep]
    own = [s for s in thin_labels if s not in shared and s in keep]
    return batch + own + [s for s in factor_labels if s not in shared and s in keep]


def _forward(form, thin, factor):
    return thin_product(form, thin, factor), (thin, factor)


def _backward(form, saved, g):
    thin, factor = saved
    thin_labels, factor_labels, keep, precision, _ = form
    g_labels = result_labels(thin_labels, factor_labels, keep)
    g = g.astype(thin.dtype)

    def against(x, x_labels, y, y_labels, want, dtype):
        out, have = contract(
            x, x_labels, y, y_labels, keep=set(want), precision=precision, preferred=dtype
        )
        return reorder(out, have, list(want))

    return (
        against(g, g_labels, factor, factor_labels, thin_labels, thin.dtype),
        against(thin, thin_labels, g, g_labels, factor_labels, factor.dtype),
    )


thin_product.defvjp(_forward, _backward)
