"""Contraction of two arrays whose axes carry labels."""

from collections.abc import Collection, Sequence

import jax.numpy as jnp
from jax import lax

from lora_jax.transform import explicit


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
