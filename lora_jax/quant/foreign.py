"""Weights quantized elsewhere, without loss: of given codes, and of bitsandbytes.

Codes and scales are only put in another order, which is exact in both directions.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Integer

from lora_jax.compat import is_finite
from lora_jax.dims import sizes
from lora_jax.quant import formats
from lora_jax.quant.array import (
    QuantArray,
    check,
    check_quant,
    default_roles,
    form_of,
    known,
    matrix_sizes,
    padded,
    units,
)
from lora_jax.quant.scales import SCALE_BLOCK, SCALE_DTYPES, HeldName, dynamic_map

_STATE = "quant_state.bitsandbytes__"


def from_codes(
    codes: Any,
    scale: Any,
    bias: Any = None,
    scale2: Any = None,
    *,
    format: formats.FormatName | HeldName,
    block_size: int,
    slab: int | None = None,
    order: Any = None,
    roles: str | None = None,
    shape: Sequence[int] | None = None,
    dtype: DTypeLike = "float32",
    name: str = "w",
) -> QuantArray:
    """A `QuantArray` of given codes, scales and biases: `w = codebook[code]·scale + bias`.

    GPTQ's and AWQ's `(code − zero)·scale` is "uint4_zero", with the zero points of two blocks in a
    byte; or "uint4" with `bias = −zero·scale` in float32, which is exact: a product of four and
    eleven bits.

    Args:
      codes: `(stack..., K, N)` uint8 below 16, or int8 for "int8".
      scale: `(stack..., K/block_size, N)` in float32, bfloat16 or float16.
      bias: likewise, for affine formats only.
      scale2: of formats that have one. Those of `lora_jax.quant.scales.HELD` have all three as
        their row says.
      format, block_size: as in `quantize_array`, or a name of `HELD`.
      slab: as `formats.slab_of` has it for the whole weight, where these are a part of its inputs.
      order: integers `(stack..., K)`, the input that each row of codes belongs to, or None.
      roles: of the weight; `...sio` by default.
      shape: of the weight; that of `codes` by default.
      dtype: of the weight.
      name: of the weight, for errors.

    Raises:
      ValueError: the arrays do not fit each other.
    """
    form, held = known(format)
    codes = np.asarray(codes)
    roles = roles or default_roles(codes.ndim)
    shape = tuple(codes.shape if shape is None else shape)
    *stack, fan_in, fan_out = codes.shape
    slab = slab or formats.slab_of(fan_in, form, block_size)
    q = QuantArray(
        codes, scale, format=format, block=block_size, slab=None if slab == block_size else slab,
        shape=shape, roles=roles, dtype=jnp.dtype(dtype),
    )  # fmt: skip
    given = {"scale": scale, "bias": bias, "scale2": scale2}
    parts = {name: np.asarray(x) for name, x in given.items() if x is not None}
    whole = held is not None or not fan_in % block_size
    fits = sizes(shape, roles) == (tuple(stack), fan_in, fan_out) and whole
    inputs = padded(q) if fits else 0
    blocks = -(-inputs // block_size)
    if not fits or held is None and parts["scale"].shape != (*stack, fan_in // block_size, fan_out):
        raise ValueError(
            f"`{name}`: codes {list(codes.shape)} and scales {list(parts['scale'].shape)} do not "
            f"fit a weight of shape {shape}, roles {roles}, in blocks of {block_size}: expected "
            f"(stack..., K, N) and (stack..., K/{block_size}, N), the block dividing K"
        )
    _check_scales([*parts.values()], name, plain=held is None)
    # Padding decodes to zero: its code has the value 0, or its scale and bias are 0.
    rows = {
        part: getattr(held, part).shape(blocks, fan_out)[0] if held else blocks for part in parts
    }
    packed = formats.pack(_fill(codes, inputs, form.zero), form, slab)
    q = dataclasses.replace(
        q,
        packed=jnp.asarray(packed),
        **{part: jnp.asarray(_fill(x, rows[part])) for part, x in parts.items()},
        order=None if order is None else jnp.asarray(order, jnp.int32),
    )
    return check(q, name)


def _check_scales(parts: Sequence[np.ndarray], name: str, *, plain: bool) -> None:
    for x in parts:
        if not is_finite(x):
            raise ValueError(f"`{name}`: its scales hold NaN or infinity; the file is damaged")
    if plain and str(parts[0].dtype) not in SCALE_DTYPES:
        raise ValueError(
            f"`{name}`: scales are {parts[0].dtype}, expected {' or '.join(SCALE_DTYPES)}"
        )


def _fill(x: np.ndarray, rows: int, value: float = 0) -> np.ndarray:
    """The matrix with rows of one value below it, `rows` in all."""
    pads = [(0, 0)] * (x.ndim - 2) + [(0, rows - x.shape[-2]), (0, 0)]
    return np.pad(x, pads, constant_values=value)


def codes_of(q: QuantArray) -> Integer[np.ndarray, "*s k n"]:
    """The codes `(stack..., K, N)` of a weight, without padding."""
    form = form_of(q)
    codes = np.asarray(formats.unpack(q.packed, form, q.slab_size))
    return codes[..., : matrix_sizes(q)[1], :]


def from_bitsandbytes(
    tensors: Mapping[str, np.ndarray],
    *,
    roles: Literal["io", "oi"] = "io",
    slab: int | None = None,
    dtype: DTypeLike | None = None,
    name: str = "weight",
) -> QuantArray:
    """A `QuantArray` of a 4-bit weight in a bitsandbytes checkpoint.

    Args:
      tensors: the saved tensors, by the part after the parameter's name: "" (the codes),
        "absmax", "quant_map", "quant_state.bitsandbytes__nf4" and, double-quantized,
        "nested_absmax" and "nested_quant_map".
      roles: "io" for a kernel `(in, out)`, "oi" to keep torch's `(out, in)`.
      slab: as in `from_codes`.
      dtype: of the weight; the checkpoint's own by default.
      name: of the weight, for errors.

    Raises:
      ValueError: a tensor is missing, a table is not bitsandbytes' own, or blocks cross rows.

    Source: bitsandbytes `QuantState.as_dict`, `quantize_4bit`.
    """
    state = _state_of(tensors, name)
    format, block = state["quant_type"], int(state["blocksize"])
    form = formats.known_format(format)
    outputs, fan_in = _torch_shape(state, name)
    # bitsandbytes cuts the flattened matrix into blocks, so one may cross from a row to the next.
    if fan_in % block:
        raise ValueError(
            f"`{name}`: blocks of {block} cross the rows of shape {(outputs, fan_in)}; dequantize "
            f"it, then `lora.quantize(..., pad=True)`"
        )
    _same_table(tensors["quant_map"], np.asarray(form.codebook, np.float32), "quant_map", name)
    # The bytes may be typed as bfloat16 or float32 (`quant_storage`). The first of two codes is in
    # the high four bits.
    raw = np.asarray(tensors[""]).reshape(-1).view(np.uint8)
    codes = np.stack([raw >> 4, raw & 15], 1).reshape(-1)[: outputs * fan_in]
    absmax = np.asarray(tensors["absmax"]).reshape(outputs, fan_in // block).T
    q = from_codes(
        codes.reshape(outputs, fan_in).T,
        # Double-quantized, these are uint8 codes: exact in float32, and cast back below.
        absmax.astype(np.float32),
        format=format,
        block_size=block,
        slab=slab,
        roles=roles,
        shape=(fan_in, outputs) if roles == "io" else (outputs, fan_in),
        dtype=dtype or state["dtype"],
        name=name,
    )
    return check(with_nested(q, tensors, state, name), name) if "nested_absmax" in tensors else q


def _state_of(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    """The JSON object that a bitsandbytes checkpoint has beside the tensors of a weight."""
    key = next((k for k in tensors if k.startswith(_STATE)), None)
    missing = [k for k in ("", "absmax", "quant_map") if k not in tensors]
    if key is None or missing:
        lost = missing + ([_STATE + "nf4"] if key is None else [])
        raise ValueError(f"`{name}`: bitsandbytes tensors {', '.join(map(repr, lost))} are missing")
    return json.loads(np.asarray(tensors[key], np.uint8).tobytes())


def with_nested(
    q: QuantArray, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any], name: str
) -> QuantArray:
    """A weight, or a part of one, with the scales of its scales.

    Args:
      q: `scale` has the codes of the scales, as floats.
      tensors, name: as in `from_bitsandbytes`; `nested_absmax` is that of the whole weight.
      state: the JSON object among them.

    Raises:
      ValueError: a table or block size that is not bitsandbytes' own.
    """
    table = np.asarray(tensors["nested_quant_map"], np.float32).reshape(-1)
    # bitsandbytes computes this table on the machine that quantizes, so its last bits differ.
    _same_table(table, dynamic_map(), "nested_quant_map", name, ulp=4)
    if int(state["nested_blocksize"]) != SCALE_BLOCK:
        raise ValueError(f"`{name}`: nested_blocksize is {state['nested_blocksize']}, not 256")
    return dataclasses.replace(
        q,
        scale=jnp.asarray(np.asarray(q.scale).astype(np.uint8)),
        scale2=jnp.asarray(np.asarray(tensors["nested_absmax"], np.float32).reshape(-1)),
        offset=jnp.float32(state["nested_offset"]),
        scale_map=jnp.asarray(table),
    )


def _torch_shape(state: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Outputs and inputs of a weight."""
    if len(state["shape"]) != 2:
        raise ValueError(f"`{name}` has shape {state['shape']}, expected a matrix (out, in)")
    outputs, fan_in = map(int, state["shape"])
    return outputs, fan_in


def _same_table(got: Any, want: np.ndarray, part: str, name: str, *, ulp: float = 0) -> None:
    """Refuses a table of values that is not `want`, up to `ulp` units in the last place."""
    got = np.asarray(got, np.float32).reshape(-1)
    near = ulp * np.spacing(np.abs(want))
    if got.shape != want.shape or np.any(np.abs(got - want) > near):
        raise ValueError(f"`{name}`: `{part}` is another table than bitsandbytes' own")


def to_bitsandbytes(q: QuantArray, *, name: str = "weight") -> dict[str, np.ndarray]:
    """The tensors of a weight as bitsandbytes saves them: the inverse of `from_bitsandbytes`.

    Raises:
      ValueError: bitsandbytes does not have the format, or the weight is not a matrix of whole
        blocks.
    """
    check_quant(q)
    stack, fan_in, outputs = matrix_sizes(q)
    if q.format not in ("nf4", "fp4") or stack or fan_in % q.block:
        raise ValueError(
            f"`{name}`: bitsandbytes holds nf4 and fp4 matrices of whole blocks, got {q.format} "
            f"of shape {q.shape}, roles {q.roles}, block {q.block}"
        )
    # Back to torch's (out, in), flattened; two neighbours share a byte.
    codes = codes_of(q).T.reshape(-1, 2)
    blocks = fan_in // q.block
    absmax = np.asarray(q.scale)[:blocks].T.reshape(-1)
    state = {"quant_type": q.format, "blocksize": q.block, "dtype": str(jnp.dtype(q.dtype)),
             "shape": [outputs, fan_in]}  # fmt: skip
    out = {
        # A column, as bitsandbytes stores it.
        "": (codes[:, 0] << 4 | codes[:, 1]).astype(np.uint8)[:, None],
        "absmax": absmax if q.scale2 is not None else absmax.astype(np.float32),
        "quant_map": np.asarray(form_of(q).codebook, np.float32),
    }
    if q.scale2 is not None:
        out |= {"nested_absmax": np.asarray(q.scale2), "nested_quant_map": np.asarray(q.scale_map)}
        state |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32",
                  "nested_offset": float(q.offset)}  # fmt: skip
    out[_STATE + q.format] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return out


def beside(parts: Sequence[QuantArray], name: str) -> QuantArray:
    """Weights of the same inputs side by side, along the last dim, their outputs.

    Raises:
      ValueError: they have scales in common, or their inputs in different orders.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    outputs = units(first)[1]
    apart = first.scale_map is None and first.roles[-1] == "o"
    orders = [q.order for q in parts if q.order is not None]
    apart &= all(np.array_equal(orders[0], x) for x in orders)
    kinds = {
        (q.format, q.block, jax.tree.structure(dataclasses.replace(q, shape=()))) for q in parts
    }
    if not apart or len(kinds) > 1 or any(q.shape[-1] % outputs for q in parts[:-1]):
        raise ValueError(
            f"`{name}` are one weight here, and their blocks cannot be put side by side (double "
            'quantization, different formats or orders of inputs): use a format such as "nf4"'
        )
    shape = (*first.shape[:-1], sum(q.shape[-1] for q in parts))
    same = [dataclasses.replace(q, shape=shape, order=None) for q in parts]
    whole = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=-1), *same)
    return dataclasses.replace(whole, order=first.order)


def stack_weights(parts: Sequence[QuantArray]) -> QuantArray:
    """Stacks weights of one shape and format along a new leading dim.

    Raises:
      ValueError: they differ in more than their numbers.
    """
    if len({jax.tree.structure(q) for q in parts}) != 1:
        kinds = sorted({f"{q.format} {q.shape} block {q.block}" for q in parts})
        raise ValueError(f"only weights of one kind can be stacked, got {'; '.join(kinds)}")
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *parts)
    first = parts[0]
    return dataclasses.replace(stacked, shape=(len(parts), *first.shape), roles="s" + first.roles)
