"""A thin product whose backward is written out, for reverse-mode differentiation only.

JAX transposes `y = t·B` into `gᵀ·t`, with the large cotangent `g (tokens, out)` as left operand.
XLA's CPU matmul wants its left operand row-major, so it copies `gᵀ`, recomputing all that makes
`g` along the way, column by column: a fifth of a training step of SmolLM2-135M. Written as
`tᵀ·g` only the thin `t (tokens, r)` is copied. Other devices do either order equally well.
"""

import functools

import jax

from lora_jax.transform.labels import contract
from lora_jax.transform.implicit import reorder


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
