"""How many floating-point operations a training step needs, and how many a chip can do.

A product of matrices runs once forward, and once backward for each operand that has a gradient:

    full fine-tuning   x·W   forward, dx, dW       3 products
    LoRA               x·W   forward, dx           2
    LoRA               x·A   forward, dx, dA       3

Recomputation (remat, a loss in chunks) is not counted, so the share of the chip's peak is the
model FLOPs utilization (MFU) of Chowdhery et al. 2022, "PaLM", appendix B. Attention counts as it
is written, without leaving out what a causal mask hides.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax import compat
from lora_jax.train.step import shape_of
from lora_jax.transform.primitive import inner_jaxpr
from lora_jax.transform.primitives import row_of

# Dense bfloat16 FLOP/s of one device, by the start of its `device_kind`; the first match counts.
# From the vendors' data sheets, without sparsity.
_PEAKS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Bfloat16 FLOP/s that a device can do at most, or None where they are not known."""
    kind = device.device_kind
    return next((peak for start, peak in _PEAKS.items() if kind.startswith(start)), None)


def training_flops(loss: Callable, trainable: Any, *inputs: Any) -> int | None:
    """Model FLOPs of `jax.value_and_grad(loss)(trainable, *inputs)`.

    Args:
      loss: `(trainable, *inputs) -> float32 ()`; it is traced, not run.
      trainable: tree of what has a gradient.
      inputs: what has none.

    Returns:
      The operations of all products and convolutions, two for a multiplication with its addition;
      None where a kernel does not state its own, or a loop with products ends by a condition.
    """
    jaxpr = jax.make_jaxpr(loss)(trainable, *inputs).jaxpr
    count = len(jax.tree.leaves(trainable))
    flops, _ = _walk(jaxpr, [i < count for i in range(len(jaxpr.invars))])
    return None if math.isnan(flops) else round(flops)


class StepFlops:
    """Model FLOPs of an optimizer step on each device, counted once for each shape of batch."""

    def __init__(self, loss: Callable, devices: int) -> None:
        """`loss(trainable, frozen, microbatch, key)`, as for `make_step`."""
        self._loss, self._devices = loss, devices
        self._counted: dict[tuple[int, ...], float | None] = {}

    def __call__(self, trainable: Any, frozen: Any, batch: Any) -> float | None:
        """The FLOPs, or None as `training_flops`; `batch` has an axis of microbatches."""
        shape = shape_of(batch)
        if shape not in self._counted:

            def first(trainable: Any, frozen: Any, batch: Any) -> Any:
                return self._loss(trainable, frozen, jax.tree.map(lambda x: x[0], batch), None)

            count = training_flops(first, trainable, frozen, batch)
            microbatches = batch.tokens.shape[0]
            each = None if count is None else count * microbatches / self._devices
            self._counted[shape] = each
        return self._counted[shape]


# The FLOPs, NaN where they are not known, and for each result whether it has a gradient.
_Count = tuple[float, list[bool]]


def _walk(jaxpr: Any, learned: Sequence[bool]) -> _Count:
    env, total = dict(zip(jaxpr.invars, learned, strict=True)), 0.0

    def has_gradient(v: Any) -> bool:
        # Literals and constants have none.
        return not isinstance(v, compat.Literal) and env.get(v, False)

    for eqn in jaxpr.eqns:
        flops, outs = _of_equation(eqn, [has_gradient(v) for v in eqn.invars])
        total += flops
        env |= dict(zip(eqn.outvars, outs, strict=True))
    return total, [has_gradient(v) for v in jaxpr.outvars]


def _of_equation(eqn: Any, learned: list[bool]) -> _Count:
    op = compat.name_of(eqn)
    if op in _BODIES:
        return _BODIES[op](eqn, learned)
    if row_of(op).memory == "call":
        inner, _ = compat.open_jaxpr(inner_jaxpr(eqn))
        flops, outs = _walk(inner, learned)
        return flops * _shards(eqn), outs
    forward = _PRODUCTS[op](eqn) if op in _PRODUCTS else 0.0
    # Attention takes two products of three operands: four products backward.
    passes = 1 + min(sum(learned), 2)
    floats = (jax.numpy.issubdtype(v.aval.dtype, jax.numpy.inexact) for v in eqn.outvars)
    differentiable = any(learned) and op != "stop_gradient"
    return passes * forward, [differentiable and is_float for is_float in floats]


def _shards(eqn: Any) -> int:
    """The devices that each run the body of a `shard_map`; 1 for any other call."""
    if compat.name_of(eqn) != "shard_map":
        return 1
    return math.prod(eqn.params["mesh"].shape[a] for a in compat.mapped_axes(eqn.params))


def _scan(eqn: Any, learned: list[bool]) -> _Count:
    inner, _ = compat.open_jaxpr(eqn.params["jaxpr"])
    consts, carries = compat.scan_counts(eqn.params, len(eqn.invars))
    while True:
        flops, outs = _walk(inner, learned)
        # A carry that has a gradient after one step has it in the next one.
        carried = [a or b for a, b in zip(learned[consts:], outs[:carries], strict=False)]
        if learned[consts : consts + carries] == carried:
            return flops * eqn.params["length"], outs
        learned = [*learned[:consts], *carried, *learned[consts + carries :]]


def _cond(eqn: Any, learned: list[bool]) -> _Count:
    bodies = [compat.open_jaxpr(branch)[0] for branch in eqn.params["branches"]]
    found = [_walk(body, learned[1:]) for body in bodies]
    # The longest branch: which one runs is decided by the data.
    flops = max((flops for flops, _ in found), key=lambda f: (math.isnan(f), f))
    return flops, [any(outs) for outs in zip(*(outs for _, outs in found), strict=True)]


def _unknown(eqn: Any, learned: list[bool]) -> _Count:
    return math.nan, [any(learned)] * len(eqn.outvars)


def _while(eqn: Any, learned: list[bool]) -> _Count:
    body, _ = compat.open_jaxpr(eqn.params["body_jaxpr"])
    flops, _ = _walk(body, [True] * len(body.invars))
    # Reverse mode has no rule for such a loop: what it gives has no gradient.
    return math.nan if flops else 0.0, [False] * len(eqn.outvars)


_BODIES: dict[str, Callable[[Any, list[bool]], _Count]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_linear_solve": _unknown,
}


def _dot(eqn: Any) -> float:
    ragged = eqn.params.get("ragged_dot_dimension_numbers")
    numbers = ragged.dot_dimension_numbers if ragged else eqn.params["dimension_numbers"]
    (contracted, _), _ = numbers
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return 2.0 * out.size * math.prod(lhs.shape[d] for d in contracted)


def _convolution(eqn: Any) -> float:
    kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
    features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * out.size * kernel.size / features


def _cudnn_attention(eqn: Any) -> float:
    # Queries (B, T, N, H) with keys (B, S, K, H), then the weights with the values.
    query, key = eqn.invars[0].aval, eqn.invars[1].aval
    return 4.0 * query.size * key.shape[1]


def _kernel(eqn: Any) -> float:
    if (cost := eqn.params["cost_estimate"]) is not None:
        return float(cost.flops)
    name = eqn.params["name"] or ""
    floats = [v.aval for v in eqn.invars if jax.numpy.issubdtype(v.aval.dtype, jax.numpy.inexact)]
    if name.startswith("quant_decode"):
        return 0.0
    if name.startswith("quant_matmul"):
        return 2.0 * floats[0].size * eqn.outvars[0].aval.shape[-1]
    if name.startswith("splash"):
        # Queries (B, N, T, H), and keys (B, K, S, H).
        return 4.0 * floats[0].size * floats[1].shape[-2]
    return math.nan


_PRODUCTS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot,
    "ragged_dot": _dot,
    "ragged_dot_general": _dot,
    "conv_general_dilated": _convolution,
    "dot_product_attention_fwd_wrapper": _cudnn_attention,
    "pallas_call": _kernel,
}
