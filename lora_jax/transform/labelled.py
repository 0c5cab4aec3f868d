"""Contraction of two arrays whose axes carry labels, and the one low-rank contraction."""

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.array import widened
from lora_jax.transform import explicit
from lora_jax.transform.value import Implicit, expand_to, labels, reorder


def contract(
    x,
    x_labels: Sequence,
    y,
    y_labels: Sequence,
    *,
    keep: Collection,
    precision=None,
    preferred=None,
    specs: dict | None = None,
):
    """Contracts every label that both arrays have and that is not kept.

    A shared label that is kept is a batch dimension; a label only one of them has is summed away
    unless it is kept.

    Args:
      x, y: arrays; `x_labels`, `y_labels`: a label for each axis.
      keep: labels the result keeps.
      precision: as in `lax.dot_general`.
      preferred: dtype of the result, None for the operands' own.
      specs: label to mesh axes of the result, under explicit sharding.

    Returns:
      The result and its labels: batch, then `x`'s own, then `y`'s own.
    """
    x, x_labels = _sum_away(x, x_labels, y_labels, keep)
    y, y_labels = _sum_away(y, y_labels, x_labels, keep)
    shared = [label for label in x_labels if label in y_labels]
    batch = [label for label in shared if label in keep]
    summed = [label for label in shared if label not in keep]
    dimension_numbers = (
        ([x_labels.index(s) for s in summed], [y_labels.index(s) for s in summed]),
        ([x_labels.index(s) for s in batch], [y_labels.index(s) for s in batch]),
    )
    rest = [s for s in x_labels if s not in shared] + [s for s in y_labels if s not in shared]
    out = batch + rest
    result = lax.dot_general(
        x,
        y,
        dimension_numbers,
        precision=precision,
        preferred_element_type=preferred,
        out_sharding=explicit.result_spec(x, x_labels, y, y_labels, summed, out, specs),
    )
    return result, out


def _sum_away(array, own: Sequence, other: Sequence, keep: Collection):
    lost = [i for i, label in enumerate(own) if label not in keep and label not in other]
    if lost:
        array = jnp.sum(array, axis=tuple(lost))
    return array, [label for label in own if label in keep or label in other]


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
    result, have = contract(
        middle.astype(compute),
        middle_labels,
        second.astype(compute),
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
