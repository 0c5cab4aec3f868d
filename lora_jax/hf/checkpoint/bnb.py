"""Weights that bitsandbytes quantized, read as plain floats, to the bit.

    4 bits  w[i] = code[q[i]] · absmax[i // block]      q: two to a byte, the first in the high half
            absmax[j] = code₂[absmax₈[j]] · absmax₂[j // block₂] + offset      double quantization
    8 bits  w[r, c] = q[r, c] · SCB[r] / 127

Products are float32, as in bitsandbytes, which then rounds them to its compute dtype; here they
stay as they are, and are rounded once, to the dtype that the model is loaded in.

    X.weight                                 uint8 (n/2, 1), or any dtype of those bytes
    X.weight.absmax                          float32 (blocks,), or uint8 with nested_absmax
    X.weight.quant_map                       float32 (16,)
    X.weight.nested_absmax, .nested_quant_map    float32 (blocks of blocks,), (256,)
    X.weight.quant_state.bitsandbytes__nf4   JSON in uint8: blocksize, shape, nested_offset, ...
    X.weight, X.SCB, X.weight_format         int8 (out, in), float32 (out,), 0

Source: bitsandbytes 0.50, `functional.py` (`QuantState`), `backends/default/ops.py`
(`_dequantize_4bit_compute`); Dettmers et al. 2023, "QLoRA", section 3.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Integer

from lora_jax.hf.checkpoint.weights import Blocks, Part, Weights, blocks_of
from lora_jax.quant.array import QuantArray
from lora_jax.quant.foreign import from_bitsandbytes, from_codes, with_nested
from lora_jax.quant.formats import FORMATS, known_format

CODES = {name: np.asarray(FORMATS[name].codebook) for name in ("nf4", "fp4")}

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_SCB, _FORMAT = ".SCB", ".weight_format"
# A quant_state has a few hundred bytes; the limit keeps a wrong file from being read whole.
_LONGEST_STATE = 16_384
_EIGHTH = np.float32(7.874015718698502e-3)  # 1/127 as bitsandbytes spells it


class State(NamedTuple):
    """How one weight was quantized to 4 bits.

    Attributes:
      kind: "nf4" or "fp4".
      shape: of the weight.
      block: weights that share an absmax.
      nested_block: absmaxes that share one of their own, or None without double quantization.
      offset: added to each absmax under double quantization.
    """

    kind: str
    shape: tuple[int, ...]
    block: int
    nested_block: int | None
    offset: float

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.count // self.block)

    @property
    def held(self) -> Blocks:
        """The blocks that a weight is held in."""
        return blocks_of(known_format(self.kind).name, self.block, self.grid[1])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows, and weights in a row: one row of all where blocks or bytes cross the matrix's."""
        rows, width = self.shape if len(self.shape) == 2 else (1, self.count)
        # A block of an odd number of weights ends inside a byte.
        return (1, self.count) if width % self.block or self.block % 2 else (rows, width)


def is_quantized(names: Iterable[str]) -> bool:
    """Whether the tensors of a checkpoint are bitsandbytes'."""
    return any(_STATE in name or name.endswith(_SCB) for name in names)


# (name, dtype, shape, part) -> a part of a tensor's bytes, read as an array of that dtype and shape
Stored = Callable[..., np.ndarray]


def dequantized(plain: Weights, dtypes: Mapping[str, str], stored: Stored) -> Weights:
    """The checkpoint under its plain names, every tensor a float.

    Args:
      plain: the checkpoint as it is on disk; its `read` is for tensors that are not quantized.
      dtypes: safetensors' dtype of each of its tensors.
      stored: reads the others.

    Returns:
      Weights whose `read` dequantizes; what was not quantized comes as it is.

    Raises:
      ValueError: tensors that do not fit together; the message names file and tensor.
    """
    raw = _Raw(plain.source, plain.shapes, plain.where, stored)
    states = {n.split(_STATE)[0]: _state(n, raw) for n in raw.shapes if _STATE in n}
    eights = [n.removesuffix(_SCB) + ".weight" for n in raw.shapes if n.endswith(_SCB)]
    helpers = {f"{name}.{part}" for name in states for part in _PARTS}
    helpers |= {n for n in raw.shapes if _STATE in n or n.endswith((_SCB, _FORMAT))}
    for name, state in states.items():
        _check_state(name, state, raw, dtypes)
    for name in eights:
        _check_eight(name, raw, dtypes)
    shapes = {n: s for n, s in raw.shapes.items() if n not in helpers}
    for name in shapes:
        if name not in states and name not in eights and dtypes[name] not in _FLOATS:
            raise ValueError(
                f"{_file(name, raw)}: tensor `{name}` has dtype {dtypes[name]}, but nothing beside "
                "it says how bitsandbytes quantized it; save the model again"
            )
    shapes |= {name: state.shape for name, state in states.items()}

    def read(name: str, part: Part = ()) -> np.ndarray:
        if name in states:
            return four_bits(name, states[name], raw, part)
        return _eight_bits(name, raw, part) if name in eights else plain.read(name, part)

    return plain._replace(
        shapes=shapes,
        read=read,
        formats={
            **{n: s.held for n, s in states.items()},
            **{n: Blocks("int8_channel", math.gcd(raw.shapes[n][1], 128)) for n in eights},
        },
        blocks=lambda name, part=(): (
            four_bit_blocks(name, states[name], raw, part)
            if name in states
            else _eight_bit_blocks(name, raw, part)
        ),
    )


class _Raw(NamedTuple):
    """The tensors on disk: as in `Weights`, with `stored` of `dequantized`."""

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    where: Callable[[str], str]
    stored: Stored

    def small(self, name: str, dtype: DTypeLike) -> np.ndarray:
        """A tensor that a weight has beside it, flattened."""
        return self.stored(name, dtype, (math.prod(self.shapes[name]),))


_FLOATS = ("F64", "F32", "F16", "BF16")


def _file(name: str, raw: _Raw) -> str:
    return os.path.join(raw.source, raw.where(name))


def _state(key: str, raw: _Raw) -> State:
    """Reads the JSON beside a weight."""
    where, kind = _file(key, raw), key.split(_STATE)[1]
    if kind not in CODES:
        raise ValueError(f"{where}: tensor `{key}` is of the unknown type `{kind}`")
    if math.prod(raw.shapes[key]) > _LONGEST_STATE:
        raise ValueError(f"{where}: tensor `{key}` is no quant_state: {raw.shapes[key]} is too big")
    try:
        found = json.loads(raw.small(key, np.uint8).tobytes())
        nested = found.get("nested_blocksize")
        state = State(
            kind=kind,
            shape=tuple(found["shape"]),
            block=found["blocksize"],
            nested_block=nested,
            offset=0.0 if nested is None else float(found["nested_offset"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{where}: tensor `{key}` is no quant_state: {type(error).__name__}: {error}"
        ) from None
    # The sizes come from a file: they are checked before anything is allocated.
    numbers = [*state.shape, state.block, *([] if nested is None else [nested])]
    whole = all(type(n) is int and n > 0 for n in numbers)
    if not whole or found.get("quant_type", kind) != kind or not math.isfinite(state.offset):
        raise ValueError(f"{where}: tensor `{key}` states impossible sizes: {state}")
    return state


def _check_state(name: str, state: State, raw: _Raw, dtypes: Mapping[str, str]) -> None:
    """Every tensor beside a weight is there, with the dtype and size that follow from the state."""
    nested = state.nested_block
    wanted: dict[str, tuple[str, int]] = {
        "absmax": ("F32" if nested is None else "U8", state.blocks),
        "quant_map": ("F32", 16),
    }
    if nested is not None:
        wanted["nested_absmax"] = ("F32", -(-state.blocks // nested))
        wanted["nested_quant_map"] = ("F32", 256)
    for part, (dtype, count) in wanted.items():
        _check_tensor(f"{name}.{part}", raw, dtypes, dtype=dtype, count=count)
    for part in _PARTS:
        if part not in wanted and f"{name}.{part}" in raw.shapes:
            raise ValueError(
                f"{_file(f'{name}.{part}', raw)}: tensor `{name}.{part}` is left over: the "
                "quant_state knows no double quantization"
            )
    if name not in raw.shapes:
        raise ValueError(f"{raw.source}: tensor `{name}` is missing beside its quant_state")
    # Counted in bytes: `quant_storage` may type them as any dtype. An odd count fills a last byte.
    packed = math.prod(raw.shapes[name]) * _SIZES.get(dtypes[name], 0)
    if packed != -(-state.count // 2):
        raise ValueError(
            f"{_file(name, raw)}: tensor `{name}` has {packed} bytes, but its quant_state says "
            f"{state.shape} at 4 bits, which take {-(-state.count // 2)}"
        )


_SIZES = {
    "U8": 1, "I8": 1, "BOOL": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8,
    "F64": 8,
}  # fmt: skip


def _check_tensor(
    name: str, raw: _Raw, dtypes: Mapping[str, str], *, dtype: str, count: int
) -> None:
    if name not in raw.shapes:
        raise ValueError(f"{raw.source}: tensor `{name}` is missing")
    if dtypes[name] != dtype or math.prod(raw.shapes[name]) != count:
        raise ValueError(
            f"{_file(name, raw)}: tensor `{name}` is {dtypes[name]} of shape {raw.shapes[name]}, "
            f"expected {count} numbers {dtype}"
        )


def _check_eight(name: str, raw: _Raw, dtypes: Mapping[str, str]) -> None:
    module = name.removesuffix(".weight")
    if name not in raw.shapes:
        raise ValueError(f"{raw.source}: tensor `{name}` is missing beside `{module}{_SCB}`")
    if dtypes[name] != "I8" or len(raw.shapes[name]) != 2:
        raise ValueError(
            f"{_file(name, raw)}: tensor `{name}` is {dtypes[name]} of shape {raw.shapes[name]}, "
            "expected an I8 matrix beside its SCB"
        )
    _check_tensor(module + _SCB, raw, dtypes, dtype="F32", count=raw.shapes[name][0])
    key = module + _FORMAT
    # One number of any dtype, which is 0 if its bytes are.
    size = _SIZES.get(dtypes.get(key, ""), 0)
    if key in raw.shapes and (
        math.prod(raw.shapes[key]) != 1 or raw.stored(key, np.uint8, (size,)).any()
    ):
        raise ValueError(
            f"{_file(key, raw)}: tensor `{key}` is not 0 (row by row); only that can be read: load "
            "and save the model again with a newer bitsandbytes"
        )


def _ends(shape: Sequence[int], part: Part) -> list[tuple[int, int]]:
    """The first index and the end of a part along each dim."""
    return [(s.start, s.stop) for s in part] if part else [(0, n) for n in shape]


def four_bits(name: str, state: State, raw: _Raw, part: Part = ()) -> Float[np.ndarray, "..."]:
    """A part of a 4-bit weight as float32; one whose blocks cross rows is read whole."""
    if state.grid != state.shape and part:
        return four_bits(name, state, raw)[part]
    rows, (first, last) = _ends(state.grid, part if state.grid == state.shape else ())
    # Whole blocks: those at the ends of the part are cut below.
    start, end = first // state.block, -(-last // state.block)
    cut = start * state.block, min(end * state.block, state.grid[1])
    code, packed = _code(name, state, raw), _packed(name, state, raw, (rows, cut))
    # Both numbers of every byte that there can be: one lookup gives two, the high half first.
    both = np.stack([np.repeat(code, 16), np.tile(code, 16)], axis=1)
    width = cut[1] - cut[0]
    values = both[packed].reshape(len(packed), -1)[:, :width]
    scales = absmax(name, state, raw, (rows, (start, end)))
    # The last block may be shorter than the others, where there is one row.
    whole = width // state.block * state.block
    values[:, :whole].reshape(len(packed), -1, state.block)[:] *= scales[
        :, : whole // state.block, None
    ]
    values[:, whole:] *= scales[:, -1:]
    values = values[:, first - cut[0] : last - cut[0]]
    return values if state.grid == state.shape else values.reshape(state.shape)


_Box = tuple[tuple[int, int], tuple[int, int]]  # first row and end; first column and end


def _packed(name: str, state: State, raw: _Raw, box: _Box) -> Integer[np.ndarray, "r b"]:
    """The bytes of some rows; columns begin and end between bytes."""
    rows, width = state.grid
    (top, bottom), (first, last) = box
    # The bytes may be typed as bfloat16 or float32 (`quant_storage`).
    part = (slice(top, bottom), slice(first // 2, -(-last // 2)))
    return raw.stored(name, np.uint8, (rows, -(-width // 2)), part)


def four_bit_blocks(name: str, state: State, raw: _Raw, part: Part = ()) -> QuantArray:
    """A part of a 4-bit weight as it is on disk, a `QuantArray` of roles "oi".

    Raises:
      ValueError: blocks cross the rows of the matrix, or the file is damaged.
    """
    if state.grid != state.shape:
        part = ()
    rows, (first, last) = _ends(state.grid, part)
    blocks = (first // state.block, -(-last // state.block))
    scales = absmax(name, state, raw, (rows, blocks))  # refuses what is not finite
    if state.nested_block is not None:
        # The codes of the scales, which are exact in float32.
        scales = _scales(name, state, raw, (rows, blocks)).astype(np.float32)
    shape = [rows[1] - rows[0], last - first] if state.grid == state.shape else list(state.shape)
    key = _STATE[1:] + state.kind
    found = json.loads(raw.small(f"{name}.{key}", np.uint8).tobytes())
    tensors = {
        "": _packed(name, state, raw, (rows, (first, last))),
        "absmax": scales,
        "quant_map": raw.small(f"{name}.quant_map", np.float32),
        key: np.frombuffer(json.dumps({**found, "shape": shape}).encode(), np.uint8),
    }
    q = from_bitsandbytes(tensors, roles="oi", slab=state.held.slab_size, name=name)
    if state.nested_block is None:
        return q
    nested = ("nested_absmax", "nested_quant_map")
    outer = {part: raw.small(f"{name}.{part}", np.float32) for part in nested}
    return with_nested(q, outer, found, name)


def _scales(name: str, state: State, raw: _Raw, box: _Box) -> np.ndarray:
    """absmax as it is stored, `(rows, blocks)`."""
    dtype = np.float32 if state.nested_block is None else np.uint8
    rows = state.grid[0]
    part = tuple(slice(*ends) for ends in box)
    return raw.stored(f"{name}.absmax", dtype, (rows, state.blocks // rows), part)


def absmax(name: str, state: State, raw: _Raw, box: _Box) -> Float[np.ndarray, "r blocks"]:
    """The float32 absmax of some blocks of some rows of a 4-bit weight."""
    scales = _scales(name, state, raw, box)
    if state.nested_block is not None:
        code = raw.small(f"{name}.nested_quant_map", np.float32)
        outer = raw.small(f"{name}.nested_absmax", np.float32)
        (top, bottom), (first, last) = box
        number = np.arange(top, bottom)[:, None] * (state.blocks // state.grid[0])
        group = (number + np.arange(first, last)) // state.nested_block
        # The order of bitsandbytes' own float32 operations, so that the result is equal to the bit.
        scales = code[scales] * outer[group] + np.float32(state.offset)
    if not np.isfinite(scales).all():
        raise ValueError(f"{_file(name, raw)}: tensor `{name}.absmax` holds NaN or infinity")
    return scales


def _code(name: str, state: State, raw: _Raw) -> Float[np.ndarray, "16"]:
    """The file's own codebook, which must be that of its type: bitsandbytes' kernels use theirs."""
    code = raw.small(f"{name}.quant_map", np.float32)
    if not np.allclose(code, CODES[state.kind], rtol=0, atol=1e-6):
        raise ValueError(
            f"{_file(name, raw)}: tensor `{name}.quant_map` is not the codebook of {state.kind}"
        )
    return code


def _eight_bits(name: str, raw: _Raw, part: Part) -> Float[np.ndarray, "out in"]:
    codes, scales = _rows(name, raw, part)
    return codes.astype(np.float32) * scales[:, None] * _EIGHTH


def _eight_bit_blocks(name: str, raw: _Raw, part: Part) -> QuantArray:
    """A part as it is on disk; its numbers may differ in the last bit of a float32."""
    codes, scales = _rows(name, raw, part)
    block = math.gcd(raw.shapes[name][1], 128)
    return from_codes(
        codes.T, (scales * _EIGHTH)[None], format="int8_channel", block_size=block, roles="oi",
        shape=codes.shape, name=name,
    )  # fmt: skip


def _rows(name: str, raw: _Raw, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and the scale of each row, before its division by 127."""
    shape = raw.shapes[name]
    scales = raw.stored(name.removesuffix(".weight") + _SCB, np.float32, shape[:1], part[:1])
    if not np.isfinite(scales).all():
        raise ValueError(f"{_file(name, raw)}: tensor `{name}`: its SCB holds NaN or infinity")
    return raw.stored(name, np.int8, shape, part), scales
