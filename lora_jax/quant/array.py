"""`QuantArray`: a weight in 4 or 8 bits a number, a leaf that takes the place of a float array.

It has the shape, dtype and roles of its weight. Its arrays are those of the matrix
`(stack..., K, N)`, in dims first and out dims last, in the layout of `lora_jax.quant.formats`.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from lora_jax.dims import AnyArray, from_matrix, in_dims, out_dims, sizes, stack_dims, to_matrix
from lora_jax.leaf_class import leaf_class
from lora_jax.quant import formats

_DATA = ("packed", "scale", "bias", "scale2", "offset", "scale_map")
# Static: two weights that differ here have different tree structures, and compile apart.
_META = ("format", "block", "shape", "roles", "dtype", "backend")
# Which kernels multiply with a weight: "auto" follows JAX's default device, "..._interpret" runs a
# kernel in Pallas' interpreter.
Backend = Literal["auto", "reference", "gpu", "tpu", "gpu_interpret", "tpu_interpret"]
ScaleDtype = Literal["float32", "bfloat16", "float16"]
SCALE_DTYPES: tuple[ScaleDtype, ...] = get_args(ScaleDtype)


@leaf_class(_META)
@dataclasses.dataclass(frozen=True, repr=False)
class QuantArray:
    """A block-quantized weight.

    Attributes:
      packed: codes, uint8 `(stack..., K/2, N)` two a byte, or int8 `(stack..., K, N)`. K is
        padded to whole superblocks.
      scale: `(stack..., K/B, N)` float, or uint8 codes where the scales are quantized too.
      bias: `(stack..., K/B, N)` of the affine format, else None.
      scale2: float32 `(stack..., ⌈K/B·N/256⌉)`, the scales of the scales, or None.
      offset: float32 `(stack...)`, subtracted from the scales before they were quantized.
      scale_map: float32 `(stack..., 256)`, the values of the scales' codes. It is stored because
        bitsandbytes computes it on each machine, not always to the same last bit.
      format: a name of `formats.FORMATS`.
      block: inputs that share a scale.
      shape: of the weight.
      roles: one letter a dim of the weight: s stack, i in, o out, u a unit dim.
      dtype: of the weight, and of `dequantize`.
      backend: which kernels multiply with it, see `lora_jax.quant.dispatch`.

    The second quantization is bitsandbytes': 256 scales in the order of the weight `(N, K)` share
    one, `scale = scale_map[code] · scale2 + offset`.

    Source: Dettmers et al. 2023, "QLoRA", section 3.
    """

    packed: Any
    scale: Any
    bias: Any = None
    scale2: Any = None
    offset: Any = None
    scale_map: Any = None
    format: formats.FormatName = "nf4"
    block: int = 64
    shape: tuple[int, ...] = ()
    roles: str = "io"
    dtype: Any = np.dtype("float32")
    backend: Backend = "auto"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that are stored, scales included."""
        return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays(self))

    @property
    def sharding(self) -> Any:
        """The sharding of the weight's own dims, or None if it is unknown."""
        return logical_sharding(self)

    def astype(self, dtype: Any) -> "QuantArray":
        """The same codes, decoded to another dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def dequantize(self) -> Float[Array, "..."]:
        """The weight as an array of `shape` and `dtype`, computed in float32 and rounded once."""
        return from_matrix(matrix(self), self.shape, self.roles)


def is_quant(x: Any) -> bool:
    """Whether a leaf is a quantized weight."""
    return isinstance(x, QuantArray)


def arrays(q: QuantArray) -> list:
    """The arrays of a weight, without the fields that are None."""
    return [x for x in (getattr(q, name) for name in _DATA) if x is not None]


def form_of(q: QuantArray) -> formats.Format:
    return formats.FORMATS[q.format]


def matrix_sizes(q: QuantArray) -> tuple[tuple[int, ...], int, int]:
    """The stack's shape, and K and N of the weight without padding."""
    return sizes(q.shape, q.roles)


def scales(q: QuantArray) -> Float[Array, "*s b n"]:
    """The scales as floats, `(stack..., K/B, N)`, decoded if they are quantized."""
    if q.scale2 is None:
        return q.scale
    return formats.expand_scales(q.scale, q.scale2, q.offset, q.scale_map, blocks=_true_blocks(q))


def expanded(q: QuantArray) -> QuantArray:
    """The same weight with its scales in floats."""
    return q if q.scale2 is None else dataclasses.replace(
        q, scale=scales(q), scale2=None, offset=None, scale_map=None
    )  # fmt: skip


def _true_blocks(q: QuantArray) -> int:
    """Blocks of the weight's inputs; blocks of padding follow them."""
    return -(-matrix_sizes(q)[1] // q.block)


def coded(q: QuantArray) -> formats.Coded:
    """The weight's matrices with their scales in floats."""
    return formats.Coded(q.packed, scales(q), q.bias, form=form_of(q), block=q.block)


def matrix(q: QuantArray) -> Float[Array, "*s k n"]:
    """The decoded matrix with its padding, in the weight's dtype."""
    return formats.decode(coded(q), q.dtype)


def quantize_array(
    w: Any,
    *,
    format: formats.FormatName = "nf4",
    block_size: int = 64,
    scale_dtype: ScaleDtype | None = None,
    double_quant: bool = False,
    roles: str | None = None,
    pad: bool = False,
    name: str = "w",
) -> QuantArray:
    """Quantizes one weight.

    Args:
      w: floating-point array.
      format: "nf4", "fp4", "int4" (signed scales), "uint4" (a scale and a bias a block) or
        "int8".
      block_size: inputs that share a scale, a power of two of at least 16.
      scale_dtype: of the scales: "bfloat16" by default. With `double_quant` it is "float32" and
        no other, as in bitsandbytes: the scales are quantized from that.
      double_quant: quantize the scales too, to 8 bits.
      roles: one letter a dim (s stack, i in, o out); `...sio` by default: the last dim is
        produced, the one before contracted, all others stacked.
      pad: fill a block that is not whole with zeros; otherwise that is an error.
      name: of the weight, for errors.

    Returns:
      The quantized weight; works under `jit` and `eval_shape`.

    Raises:
      ValueError: an unknown format or block size, a block that does not divide the inputs,
        non-finite weights, or scales beyond the range of `scale_dtype`. (The last two not under
        `jit`, where values are unknown.)
    """
    form = formats.known_format(format)
    roles = default_roles(len(w.shape)) if roles is None else roles
    scale_dtype = scale_dtype or ("float32" if double_quant else "bfloat16")
    _check_format(form, block_size, scale_dtype, double_quant)
    _check_weight(w, block_size, roles=roles, pad=pad, name=name)
    # Values are checked outside `jit` only; a tracer has none.
    if not isinstance(w, jax.core.Tracer) and not bool(_is_finite(w)):
        raise ValueError(f"`{name}` is not finite (NaN or infinity): it cannot be quantized")
    parts = _encode(
        w,
        roles=roles,
        form=form,
        block=block_size,
        scale_dtype=jnp.dtype(scale_dtype),
        double=double_quant,
    )
    q = QuantArray(
        **parts,
        format=form.name,
        block=block_size,
        shape=tuple(w.shape),
        roles=roles,
        dtype=jnp.dtype(w.dtype),
    )
    _check_range(q, w, name)
    return q


@jax.jit
def _is_finite(w: Float[AnyArray, "..."]) -> Bool[Array, ""]:
    return jnp.all(jnp.isfinite(w))


def default_roles(ndim: int) -> str:
    """The last dim out, the one before in, all others a stack."""
    return "s" * (ndim - 2) + "io"


def _check_format(form: formats.Format, block: int, scale_dtype: str, double: bool) -> None:
    if block not in formats.BLOCK_SIZES:
        known = ", ".join(map(str, formats.BLOCK_SIZES))
        raise ValueError(f"`block_size` must be one of {known}, got {block}")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(
            f"`scale_dtype` must be one of {', '.join(SCALE_DTYPES)}, got {scale_dtype!r}"
        )
    if double and scale_dtype != "float32":
        raise ValueError(
            "`double_quant` makes 8-bit scales out of float32 ones, got "
            f"scale_dtype={scale_dtype!r}: leave `scale_dtype` out"
        )
    if double and form.scale != "absmax":
        raise ValueError(
            f"`double_quant` needs a format whose scales are magnitudes (nf4, fp4, int8), got "
            f'"{form.name}"'
        )


def _check_weight(w: Any, block: int, *, roles: str, pad: bool, name: str) -> None:
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(
            f"`{name}` is {w.dtype}, and only floating-point weights are quantized: choose others"
        )
    if len(roles) != len(w.shape) or not {"i", "o"} <= set(roles) or set(roles) - set("siou"):
        raise ValueError(
            f"`roles` {roles!r} does not fit `{name}` of shape {tuple(w.shape)}: one letter a dim, "
            f"s (stack), i (in) or o (out), with an i and an o"
        )
    _, fan_in, _ = sizes(w.shape, roles)
    if fan_in % block and not pad:
        fits = [b for b in formats.BLOCK_SIZES if fan_in % b == 0]
        hint = f"choose {fits[-1]} or less" if fits else "none does"
        raise ValueError(
            f"`block_size` {block} does not divide the {fan_in} inputs of `{name}` (shape "
            f"{tuple(w.shape)}, roles {roles}): {hint}, or fill the last block with `pad=True`"
        )


def _check_range(q: QuantArray, w: Any, name: str) -> None:
    """Raises where a scale underflows in a block that is not zero, or a weight overflows."""
    if isinstance(q.packed, jax.core.Tracer):
        return
    if bool(_is_lost(q, w)):
        held = "float32" if q.scale2 is not None else q.scale.dtype
        raise ValueError(
            f"the scales of `{name}` leave the range of {held}, or its weights that of "
            f'{q.dtype}: use scale_dtype="bfloat16" or "float32", or wider weights'
        )


@jax.jit
def _is_lost(q: QuantArray, w: Float[AnyArray, "..."]) -> Bool[Array, ""]:
    size = jnp.abs(scales(q).astype(jnp.float32))
    # A scale may be finite and its largest product not, for example in a float16 weight.
    lost = ~jnp.all(jnp.isfinite(_extremes(q, size)))
    if q.scale.dtype == jnp.float16:  # bfloat16 reaches as far down as float32
        least = float(jnp.finfo(q.scale.dtype).tiny)
        lost |= jnp.any((size < least) & (_spread(q, w) > 0))
    return lost


def _extremes(q: QuantArray, size: Float[Array, "*s b n"]) -> Float[Array, "2 *s b n"]:
    """The lowest and the highest value that each block's codes stand for, in the weight's dtype."""
    form = form_of(q)
    # int8 codes are their own values.
    values = (-127, 127) if form.codebook is None else form.codebook
    ends = [size * v for v in (min(values), max(values))]
    if q.bias is not None:
        ends = [end + q.bias.astype(jnp.float32) for end in ends]
    return jnp.stack(ends).astype(q.dtype)


def _spread(q: QuantArray, w: Any) -> Float[Array, "*s b n"]:
    """What the scale of each block is computed from: its range, or its largest magnitude."""
    folded = to_matrix(jnp.asarray(w, jnp.float32), q.roles)
    # Filled as `_encode` fills it: an affine block's range includes the zeros of its padding.
    folded = _fill(folded, formats.padded_inputs(folded.shape[-2], form_of(q), q.block))
    *stack, rows, cols = folded.shape
    blocks = folded.reshape(*stack, rows // q.block, q.block, cols)
    if form_of(q).affine:
        return jnp.max(blocks, axis=-2) - jnp.min(blocks, axis=-2)
    return jnp.max(jnp.abs(blocks), axis=-2)


def _fill(m: Float[Array, "*s k n"], rows: int) -> Float[Array, "*s m n"]:
    """The matrix with zeros below it, `rows` in all."""
    return jnp.pad(m, [(0, 0)] * (m.ndim - 2) + [(0, rows - m.shape[-2]), (0, 0)])


@functools.partial(jax.jit, static_argnames=("roles", "form", "block", "scale_dtype", "double"))
def _encode(
    w: Array,
    *,
    roles: str,
    form: formats.Format,
    block: int,
    scale_dtype: np.dtype,
    double: bool,
) -> dict[str, Any]:
    """The arrays of a quantized weight."""
    m = to_matrix(w, roles)
    *stack, fan_in, fan_out = m.shape
    rows = formats.padded_inputs(fan_in, form, block)

    def one(m: Float[Array, "k n"]) -> dict[str, Any]:
        # Scales that are quantized again stay float32 until then: no rounding comes twice.
        kept = jnp.float32 if double else scale_dtype
        codes, scale, bias = formats.encode(_fill(m.astype(jnp.float32), rows), form, block, kept)
        out = {"packed": formats.pack(codes, form, block), "scale": scale, "bias": bias}
        if double:
            out |= formats.compress_scales(scale, -(-fan_in // block))
        return out

    if not stack:
        return one(m)
    # One matrix at a time: a stack in float32 would take several times the memory of its weight.
    flat = lax.map(one, m.reshape(-1, fan_in, fan_out))
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), flat)


def check(q: QuantArray, name: str = "w") -> QuantArray:
    """Checks that the arrays of a `QuantArray`, such as one from a file, fit its metadata.

    Raises:
      ValueError: the metadata disagrees with the arrays.
    """
    form = formats.known_format(q.format)
    stack, fan_in, fan_out = matrix_sizes(q)
    # K counts padding in `packed` and `scale`, but not in `scale2`: bitsandbytes has no padding.
    rows = formats.padded_inputs(fan_in, form, q.block)
    blocks = (*stack, rows // q.block, fan_out)
    packing = form.packing
    wanted: dict = {"packed": ((*stack, rows // packing.slabs, fan_out), (packing.dtype,))}
    double = q.scale2 is not None
    wanted["scale"] = (blocks, ("uint8",) if double else SCALE_DTYPES)
    if form.affine:
        wanted["bias"] = (blocks, SCALE_DTYPES)
    if double:
        count = -(-_true_blocks(q) * fan_out // formats.SCALE_BLOCK)
        wanted |= {"scale2": ((*stack, count), ("float32",)), "offset": (stack, ("float32",))}
        wanted["scale_map"] = ((*stack, 256), ("float32",))
    for part in _DATA:
        have = getattr(q, part)
        if part not in wanted and have is None:
            continue
        shape, dtypes = wanted.get(part, (None, ()))
        got = "nothing" if have is None else f"{have.dtype}{list(have.shape)}"
        if have is None or tuple(have.shape) != shape or str(have.dtype) not in dtypes:
            expected = f"{' or '.join(dtypes)}{list(shape)}" if shape is not None else "nothing"
            raise ValueError(
                f"`{name}`: metadata (format {q.format}, block {q.block}, shape {q.shape}, roles "
                f"{q.roles}) disagrees with the arrays: `{part}` should be {expected}, is {got}"
            )
    return q


def logical_sharding(q: QuantArray) -> Any:
    """The sharding of the weight's own dims, from that of its codes; None where unknown."""
    if isinstance(q.packed, jax.core.Tracer):
        return None
    sharding = getattr(q.packed, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return sharding
    # JAX drops trailing None entries of a spec.
    spec = tuple(sharding.spec) + (None,) * (q.packed.ndim - len(sharding.spec))
    own = dict(zip(stack_dims(q.roles), spec, strict=False))
    for group, axes in zip((in_dims(q.roles), out_dims(q.roles)), spec[-2:], strict=True):
        # Dims folded into K or N: only the first can be sharded, see `quant.sharding`.
        own |= dict.fromkeys(group[:1], axes)
    return NamedSharding(sharding.mesh, PartitionSpec(*(own.get(d) for d in range(q.ndim))))
