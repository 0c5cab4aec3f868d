"""Rules for operations that consume a weight: `y = op(x, W) + s·op(op(x, A), B)`."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from lora_jax import compat
from lora_jax.dims import a_dims
from lora_jax.transform import base_weight
from lora_jax.transform.implicit import Implicit, Unsupported, owned, wide_dtype
from lora_jax.transform.labels import RANK, expand_to, labels, reorder
from lora_jax.transform.low_rank import compute_dtype, contract, low_rank, with_dropout


def dot_general(
    lhs: Any,
    rhs: Any,
    bind: Callable,
    use: int,
    *,
    dimension_numbers: tuple,
    precision: Any,
    many: Any = None,
    **params: Any,
) -> Array:
    """A weight on one side of a dot: any contracting, batch and free dims.

    Args:
      lhs, rhs: one of them an `Implicit`, the other an array.
      bind: binds the original primitive to dense operands.
      use: how often the weight was used before, for dropout.
      dimension_numbers, precision: of the primitive.
      many: for a weight with many adapters, the `ManyProduct` of `lora_jax.transform.many.rules`.
      **params: the primitive's other parameters.

    Returns:
      The product, in the dtype the base product has.
    """
    weight_left = isinstance(lhs, Implicit)
    v, x = (lhs, rhs) if weight_left else (rhs, lhs)
    contracted = dimension_numbers[0][0 if weight_left else 1]
    x_labels, out = _axis_labels(v, x, dimension_numbers, weight_left=weight_left)
    first: list = []
    if many is not None:
        v, first = many.spread(v)
    x, gain_after = _gain_before(v, x, x_labels, contracted=contracted, first=first)
    base = base_weight.product(
        v,
        x,
        bind,
        weight_left=weight_left,
        dimension_numbers=dimension_numbers,
        precision=precision,
        **params,
    )
    if not v.rank:  # a quantized weight without an adapter
        return base
    form = {"contracted": contracted, "dtype": base.dtype, "precision": precision}
    if many is not None:
        change = many.low_rank(v, with_dropout(v, x, use), x_labels, out, **form)
    else:
        # Under an explicit mesh the change must have the base product's sharding.
        specs = _wanted_specs(base, out, params.get("out_sharding"))
        change = low_rank(v, with_dropout(v, x, use), x_labels, out, specs=specs, **form)
    y = _gain_after(v, base + change, out, pending=gain_after, first=first)
    return _with_bias(v, y, out, contracted=contracted, first=first)


def _axis_labels(
    v: Implicit, x: Any, dimension_numbers: tuple, *, weight_left: bool
) -> tuple[list, list]:
    """The labels of the activation's axes and of the product's.

    A dim of the weight is `("w", d)`, and so is the axis of the activation that it meets; a free
    axis of the activation is `("x", d)`.
    """
    # Dimension numbers are (left, right); here (weight, activation).
    order = 1 if weight_left else -1
    (w_contracted, x_contracted), (w_batch, x_batch) = (pair[::order] for pair in dimension_numbers)
    x_labels: list = [("x", d) for d in range(x.ndim)]
    for w_dim, x_dim in zip([*w_contracted, *w_batch], [*x_contracted, *x_batch], strict=True):
        x_labels[x_dim] = ("w", w_dim)
    w_free = [("w", d) for d in range(v.ndim) if d not in w_contracted and d not in w_batch]
    x_free = [label for label in x_labels if label[0] == "x"]
    # lax.dot_general's order of result axes: batch, the left operand's free ones, the right's.
    batch = [("w", d) for d in w_batch]
    return x_labels, batch + (w_free + x_free if weight_left else x_free + w_free)


def _wanted_specs(base: Array, out: Sequence, out_sharding: Any) -> dict | None:
    spec = compat.spec_of(base)
    if spec is None or out_sharding is None:
        return None
    return dict(zip(out, spec, strict=True))


def _gain_before(
    v: Implicit, x: Any, x_labels: Sequence, contracted: Collection, first: Sequence = ()
) -> tuple[Any, bool]:
    """Multiplies DoRA's gain into the activation where its dims are summed over.

    `x·(g ∘ W)ᵀ = (x ∘ g)·Wᵀ` for a transposed use; in `x·(W ∘ g) = (x·W) ∘ g` the gain can wait.

    Args:
      v: the weight.
      x, x_labels: the activation.
      contracted: dims of the weight.
      first: labels of axes that gain, scale and bias have before their own.

    Returns:
      The activation, and whether the gain is still to be applied to the result.
    """
    if v.gain is None:
        return x, False
    dims = labels(v.roles, "gain")
    summed = [d for d in dims if d in contracted]
    if not summed:
        return x, True
    have = {label[1] for label in x_labels if label[0] == "w"}
    # Gains of dims that stay cannot go into the activation, and those that are summed cannot wait.
    if any(d not in have for d in dims):
        raise Unsupported("DoRA's magnitude is over dims that are partly summed, partly kept")
    gain = expand_to(v.gain, [*first, *(("w", d) for d in dims)], x_labels)
    return (x * gain.astype(x.dtype)), False


def _with_bias(
    v: Implicit, y: Array, out_labels: Sequence, contracted: Collection, first: Sequence = ()
) -> Array:
    """Adds `scale · bias` where the in dims have been summed over, once for every output."""
    if v.bias is None:
        return y
    # The bias belongs to x·W with all of W's inputs: any other product has no place for it.
    roles = [v.roles[d] for d in range(v.ndim) if d in contracted and v.shape[d] != 1]
    if "s" in roles or "o" in roles or roles.count("i") != _large(v).count("i"):
        raise Unsupported("it is contracted over other dims than its in dims")
    dims = [*first, *(("w", d) for d in labels(v.roles, "bias"))]
    scales = [*first, *(("w", d) for d in labels(v.roles, "scale"))]
    bias = v.bias * expand_to(v.scale.astype(v.bias.dtype), scales, dims)
    return y + expand_to(bias, dims, out_labels).astype(y.dtype)


def _large(v: Implicit) -> list[str]:
    """Roles of the dims that are not of size one."""
    return [role for role, n in zip(v.roles, v.shape, strict=True) if n != 1]


def _gain_after(
    v: Implicit, y: Array, out_labels: Sequence, pending: bool, first: Sequence = ()
) -> Array:
    if not pending:
        return y
    gain = expand_to(v.gain, [*first, *(("w", d) for d in labels(v.roles, "gain"))], out_labels)
    return y * gain.astype(y.dtype)


# Of `lax.conv_general_dilated`: where the window goes, which does not depend on the channels.
_WINDOW = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")


def conv(
    lhs: Any,
    rhs: Any,
    bind: Callable,
    use: int,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    batch_group_count: int,
    precision: Any,
    **params: Any,
) -> Array:
    """A convolution kernel: a convolution to `r` channels with `A`, then a 1x1 product with `B`.

    With feature groups each group has its own `r` channels, all from one `A`, and the part of
    `B` that makes its outputs.
    """
    if isinstance(lhs, Implicit):
        raise Unsupported("an adapted weight is convolved as the input")
    if batch_group_count != 1:
        raise Unsupported("batch groups")
    v = _kernel(rhs, dimension_numbers)
    base = base_weight.applied(v, lhs, bind)
    if not v.rank:
        return base
    groups, channel = feature_group_count, dimension_numbers.out_spec[1]
    a, a_numbers = _thin_kernel(v, lhs.dtype, dimension_numbers, groups)
    middle = lax.conv_general_dilated(
        with_dropout(v, lhs, use),
        a,
        dimension_numbers=a_numbers,
        feature_group_count=groups,
        precision=precision,
        preferred_element_type=wide_dtype(lhs.dtype),
        **{name: params[name] for name in _WINDOW},
    )
    # The kernel has no stack dim, so the scale is one number.
    middle = (middle * v.scale.astype(middle.dtype)).astype(lhs.dtype)
    change = _to_outputs(
        v, middle, channel=channel, groups=groups, precision=precision, dtype=base.dtype
    )
    y = base + change.reshape(base.shape)
    # Bias and gain are one number for each output channel.
    by_channel = [-1 if d == channel else 1 for d in range(y.ndim)]
    if v.bias is not None:
        y = y + (v.bias * v.scale.astype(v.bias.dtype)).reshape(by_channel).astype(y.dtype)
    return y if v.gain is None else y * v.gain.reshape(by_channel).astype(y.dtype)


def _kernel(v: Implicit, numbers: lax.ConvDimensionNumbers) -> Implicit:
    """The kernel with input channels and window as in dims, and output channels as out dims."""
    out_dim, *ins = numbers.rhs_spec
    v = owned(v, [d for d in ins if v.roles[d] == "u"], "i")
    v = owned(v, [out_dim] if v.roles[out_dim] == "u" else [], "o")
    if v.roles[out_dim] != "o" or any(v.roles[d] != "i" for d in ins):
        raise Unsupported(f"kernel with roles {v.roles}: only its output channels may be `o`")
    return v


def _thin_kernel(
    v: Implicit, dtype: Any, numbers: lax.ConvDimensionNumbers, groups: int
) -> tuple[Array, lax.ConvDimensionNumbers]:
    """A as a kernel `(in channels and window..., groups · r)`, and its dimension numbers."""
    dims = a_dims(v.roles)
    # XLA gives each feature group r outputs of its own; all are made by the same A.
    a = jnp.tile(v.a.astype(dtype), (1,) * len(dims) + (groups,))
    _, *ins = numbers.rhs_spec
    spec = (len(dims), *(dims.index(d) for d in ins))
    return a, lax.ConvDimensionNumbers(numbers.lhs_spec, spec, numbers.out_spec)


def _to_outputs(
    v: Implicit, middle: Array, *, channel: int, groups: int, precision: Any, dtype: Any
) -> Array:
    """The second product: from `(…, groups · r, …)` to `(…, groups, outputs of a group, …)`."""
    shape = middle.shape
    # The channel axis as (groups, r).
    middle = middle.reshape(*shape[:channel], groups, v.rank, *shape[channel + 1 :])
    rest = [("x", d) for d in range(len(shape)) if d != channel]
    # (r, groups, outputs of a group): a group's outputs are consecutive.
    b = v.b.astype(middle.dtype).reshape(v.rank, groups, -1)
    change, have = contract(
        middle,
        [*rest[:channel], "group", RANK, *rest[channel:]],
        b,
        [RANK, "group", "out"],
        keep={*rest, "group", "out"},
        precision=precision,
        preferred=dtype,
    )
    return reorder(change, have, [*rest[:channel], "group", "out", *rest[channel:]])


def ragged_dot(
    lhs: Any,
    rhs: Any,
    group_sizes: Any,
    bind: Callable,
    use: int,
    *,
    ragged_dot_dimension_numbers: lax.RaggedDotDimensionNumbers,
    precision: Any,
    group_offset: Any = None,
    **_: Any,
) -> Array:
    """Grouped matmul `(m, k) x (g, k, n)`: one `A` and one `B` a group."""
    v, numbers = rhs, ragged_dot_dimension_numbers
    if isinstance(lhs, Implicit):
        raise Unsupported("an adapted weight is the rows of ragged_dot")
    (contracting, batching) = numbers.dot_dimension_numbers
    plain = (
        tuple(map(tuple, contracting)) == ((1,), (1,))
        and tuple(map(tuple, batching)) == ((), ())
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
    )
    if not plain or v.roles not in ("sio", "soi") or group_offset is not None:
        raise Unsupported("ragged_dot other than (m, k) x (groups, k, n)")
    base = base_weight.applied(v, lhs, bind, group_sizes)
    if not v.rank:
        return base
    if v.gain is not None or v.bias is not None:
        raise Unsupported("DoRA, or an adapter's bias, with ragged_dot")
    # (groups, k, r) and (groups, r, n), whichever factor has the dim k.
    first, second = v.a, v.b
    if v.roles == "soi":
        first, second = jnp.swapaxes(v.b, 1, 2), jnp.swapaxes(v.a, 1, 2)
    x = with_dropout(v, lhs, use)
    x = x.astype(compute_dtype(x, v))
    wide = wide_dtype(x.dtype)
    middle = lax.ragged_dot(
        x, first.astype(x.dtype), group_sizes, precision=precision, preferred_element_type=wide
    )
    # One scale a group, put into the second factor: rows of `middle` are not numbered by group.
    second = (second.astype(wide) * v.scale.astype(wide)[:, None, None]).astype(x.dtype)
    change = lax.ragged_dot(
        middle.astype(x.dtype),
        second,
        group_sizes,
        precision=precision,
        preferred_element_type=base.dtype,
    )
    return base + change
