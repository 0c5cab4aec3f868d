"""LoftQ: a quantized base, and an adapter that starts as the quantization error.

    Q_t = quantize(W − s·A_{t−1}·B_{t−1})        s·A_t·B_t = SVD_r(W − Q_t)        A_0·B_0 = 0

The base becomes `Q_T`; quantizing and decomposing in turn brings `Q_T + s·A_T·B_T` near to `W`.

Source: Li et al. 2023, "LoftQ", arXiv:2310.08659, algorithm 1; PEFT's `loftq_init`.
"""

import dataclasses
from typing import Any

import jax.core
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from lora_jax.array import widened
from lora_jax.config.lora import LoraConfig
from lora_jax.dims import from_matrix, sizes, to_matrix
from lora_jax.methods.factors import Started, principal, scale_of, shaped, uniform_rank
from lora_jax.plan.leaf import LeafPlan
from lora_jax.quant.array import QuantArray, is_quant
from lora_jax.quant.encode import quantize_array
from lora_jax.quant.formats import FORMATS


def loftq(
    key: PRNGKeyArray, config: LoraConfig, leaf: LeafPlan, w: Any, weight: Any = None
) -> Started:
    """The quantized weight and the factors of its error.

    A weight in floats is quantized as in PEFT: NF4 in blocks of 64 inputs with float32 scales. A
    quantized one needs the floats it was quantized from. The first turn does not change it (as in
    PEFT's `replace_lora_weights_loftq`), and later ones keep its format. PEFT's factors are right
    for a scale of 1 only; here they are divided by the scale.

    Args:
      key: unused.
      config: with `loftq_config`.
      leaf: of the plan.
      w: the base weight, in floats or quantized.
      weight: the floats that a quantized `w` was quantized from.

    Raises:
      ValueError: a quantized `w` without `weight`, or the reverse; 8 bits; a block that does not
        divide the inputs; or a weight that quantizing does not change.
    """
    uniform_rank(leaf, "loftq")
    _check(config, leaf, w, weight)
    q = w if is_quant(w) else None
    full = jnp.asarray(w if weight is None else weight)
    full = full.astype(widened(full.dtype))
    s = scale_of(leaf).astype(full.dtype)
    rest, a, b = full, None, None
    for turn in range(config.loftq_config["loftq_iter"]):
        if turn or q is None:
            q = _quantize(rest, w, q, leaf)
        # While tracing the values are unknown, and there is no check.
        lost = full - q.astype(full.dtype).dequantize()
        if not isinstance(lost, jax.core.Tracer) and not jnp.any(lost):
            raise ValueError(
                f"`{leaf.path}`: quantizing changes no number, so LoftQ has no error to start from "
                '(and factors of zero never train): use init="default"'
            )
        a, b = principal(to_matrix(lost, leaf.roles), leaf.rank, s)
        change = s * jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
        rest = full - from_matrix(change, leaf.shape, leaf.roles)
    assert a is not None and b is not None  # there is at least one turn
    return q, *shaped(leaf, a, b)


_BLOCK = 64  # PEFT's, for a base in floats


def _check(config: LoraConfig, leaf: LeafPlan, w: Any, weight: Any) -> None:
    if is_quant(w) and weight is None:
        raise ValueError(
            f"`{leaf.path}` is quantized: LoftQ needs the floats it was quantized from, "
            "lora.init(key, plan, params, weights=floats)"
        )
    if not is_quant(w) and weight is not None:
        raise ValueError(f"`{leaf.path}` is not quantized: leave `weights` out of lora.init")
    if not is_quant(w) and config.loftq_config["loftq_bits"] != 4:
        raise ValueError(
            f"`{leaf.path}`: LoftQ with loftq_bits=8 needs a base that is quantized already: "
            'base = lora.quantize(params, plan, format="int8"), then lora.init(key, plan, base, '
            "weights=params)"
        )


def undivided(leaf: LeafPlan) -> int:
    """The inputs of a weight in floats if LoftQ's blocks do not divide them, else 0."""
    inputs = sizes(leaf.shape, _roles(leaf))[1]
    return inputs if inputs % _BLOCK else 0


def _roles(leaf: LeafPlan) -> str:
    # PEFT's blocks run along a table's features, and along the inputs of any other weight.
    return leaf.roles.translate(str.maketrans("io", "oi")) if leaf.lookup else leaf.roles


def _quantize(x: Array, w: Any, like: QuantArray | None, leaf: LeafPlan) -> QuantArray:
    """Quantizes `x` in the format of `like`, by default in PEFT's."""
    if like is None:
        roles = _roles(leaf)
        if inputs := undivided(leaf):
            raise ValueError(
                f"`{leaf.path}` has {inputs} inputs, and LoftQ quantizes floats in blocks of "
                f"{_BLOCK}: quantize the base in smaller blocks, `base = lora.quantize(params, "
                "plan, block_size=16, pad=True)`, then lora.init(key, plan, base, weights=params)"
            )
        return quantize_array(
            x.astype(w.dtype),
            block_size=_BLOCK,
            roles=roles,
            scale_dtype="float32",
            name=leaf.path,
        )
    form = FORMATS.get(like.format)
    if form is None:
        raise ValueError(
            f"`{leaf.path}` is held as its file has it ({like.format}), and LoftQ's second turn "
            'would quantize it anew: set loftq_config={"loftq_iter": 1}, or quantize the base'
        )
    double = like.scale_map is not None
    q = quantize_array(
        x,
        format=form.name,
        block_size=like.block,
        scale_dtype=None if double else like.scale.dtype.name,
        double_quant=double,
        roles=like.roles,
        pad=True,
        name=leaf.path,
    )
    return dataclasses.replace(q, dtype=like.dtype, backend=like.backend)
