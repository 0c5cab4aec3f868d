"""`QuantArray`: a weight in 4 or 8 bits a number, a leaf that takes the place of a float array.

It has the shape, dtype and roles of its weight. Its arrays are those of the matrix
`(stack..., K, N)`, in dims first and out dims last, in the layout of `lora_jax.quant.formats`.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lora_jax.config.arguments import kind_of
from lora_jax.dims import from_matrix, in_dims, out_dims, sizes, stack_dims
from lora_jax.leaf_class import leaf_class
from lora_jax.quant import formats
from lora_jax.quant import scales as stored_scales
from lora_jax.quant.scales import HELD, Held, HeldName, Stored

# The fields that hold arrays.
ARRAYS = ("packed", "scale", "bias", "scale2", "offset", "scale_map", "order")
# Static: two weights that differ here have different tree structures, and compile apart.
_META = ("format", "block", "slab", "shape", "roles", "dtype", "backend")
# Which kernels multiply with a weight: "auto" follows JAX's default device, "..._interpret" runs a
# kernel in Pallas' interpreter.
Backend = Literal["auto", "reference", "gpu", "tpu", "gpu_interpret", "tpu_interpret"]


@leaf_class(_META)
@dataclasses.dataclass(frozen=True, repr=False)
class QuantArray:
    """A block-quantized weight.

    Attributes:
      packed: codes, uint8 `(stack..., K·bits/8, N)`, for example two a byte, or int8
        `(stack..., K, N)`. K is padded to whole superblocks.
      scale: `(stack..., K/B, N)` float, or uint8 codes where the scales are quantized too, or as
        `lora_jax.quant.scales.HELD` has it.
      bias: `(stack..., K/B, N)` of an affine format, else None; or as `HELD` has it.
      scale2: float32 `(stack..., ⌈K/B·N/256⌉)`, the scales of the scales, or None; or as `HELD`
        has it.
      offset: float32 `(stack...)`, subtracted from the scales before they were quantized.
      scale_map: float32 `(stack..., 256)`, the values of the scales' codes. It is stored because
        bitsandbytes computes it on each machine, not always to the same last bit.
      order: int32 `(stack..., inputs)`, the input of each row, where they are stored in
        another order (GPTQ's act-order), or None.
      format: a name of `formats.FORMATS` or of `scales.HELD`.
      block: inputs that share a scale.
      slab: inputs whose codes lie in bytes of their own, where they are only a part of a block
        (`lora_jax.quant.formats.slab_of`); None is a block.
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
    order: Any = None
    format: formats.FormatName | HeldName = "nf4"
    block: int = 64
    slab: int | None = None
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
    def slab_size(self) -> int:
        """Inputs whose codes lie in bytes of their own: a block, or a part of one."""
        return self.slab or self.block

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
        # One program: each step of its own would hold the whole weight once more.
        return _dequantized(self)


@jax.jit
def _dequantized(q: QuantArray) -> Float[Array, "..."]:
    return from_matrix(matrix(q), q.shape, q.roles)


def is_quant(x: Any) -> bool:
    """Whether a leaf is a quantized weight."""
    return isinstance(x, QuantArray)


def arrays(q: QuantArray) -> list:
    """The arrays of a weight, without the fields that are None."""
    return [x for x in (getattr(q, name) for name in ARRAYS) if x is not None]


def form_of(q: QuantArray) -> formats.Format:
    """The format of the codes."""
    return known(q.format)[0]


def known(name: str) -> tuple[formats.Format, Held | None]:
    """A format by name, and how its scales are held where that is not as plain floats.

    Raises:
      ValueError: there is none of that name.
    """
    if name in HELD:
        return HELD[name].form, HELD[name]
    return formats.known_format(name), None


def units(q: QuantArray) -> tuple[int, int]:
    """Inputs and outputs that no shard may divide: their codes or scales lie together."""
    held = known(q.format)[1]
    blocks, outputs = (0, 1) if held is None else held.units
    return max(superblock(q), blocks * q.block), outputs


def superblock(q: QuantArray) -> int:
    """Inputs whose codes share bytes."""
    return form_of(q).rows(q.slab_size)


def stored_inputs(q: QuantArray) -> int:
    """K with its padding."""
    return q.packed.shape[-2] * 8 // sum(form_of(q).packing.planes)


def matrix_sizes(q: QuantArray) -> tuple[tuple[int, ...], int, int]:
    """The stack's shape, and K and N of the weight without padding."""
    return sizes(q.shape, q.roles)


def padded(q: QuantArray) -> int:
    """K with the padding that it gets: slabs smaller than blocks need none."""
    unit = superblock(q) if q.slab else units(q)[0]
    return -(-matrix_sizes(q)[1] // unit) * unit


def check_quant(q: Any) -> None:
    """Raises `TypeError` for what is no quantized weight."""
    if not is_quant(q):
        raise TypeError(
            f"a quantized weight must be a `QuantArray`, got {kind_of(q)}: "
            "`lora.quant.quantize_array(w)` makes one"
        )


def expanded(q: QuantArray) -> QuantArray:
    """The same weight in a plain format, its scales `(stack..., K/B, N)` in floats, B a slab."""
    form, held = known(q.format)
    if q.scale_map is not None:
        scale = stored_scales.expand_scales(
            q.scale, q.scale2, q.offset, q.scale_map, blocks=_true_blocks(q)
        )
        q = dataclasses.replace(q, scale=scale, scale2=None, offset=None, scale_map=None)
    elif held is not None:
        blocks = -(-stored_inputs(q) // q.block)
        scale, bias = held.floats(q.scale, q.bias, q.scale2, blocks, q.packed.shape[-1])
        q = dataclasses.replace(q, format=form.name, scale=scale, bias=bias, scale2=None)
    if q.slab is None:
        return q
    # One for each slab; those of the last block may be fewer.
    each, count = q.block // q.slab, stored_inputs(q) // q.slab
    scale, bias = (
        x if x is None else jnp.repeat(x, each, axis=-2)[..., :count, :] for x in (q.scale, q.bias)
    )
    return dataclasses.replace(q, scale=scale, bias=bias, block=q.slab, slab=None)


def _true_blocks(q: QuantArray) -> int:
    """Blocks of the weight's inputs; blocks of padding follow them."""
    return -(-matrix_sizes(q)[1] // q.block)


def coded(q: QuantArray) -> formats.Coded:
    """The weight's matrices, rows as they are stored, with their scales in floats."""
    q = expanded(q)
    return formats.Coded(q.packed, q.scale, q.bias, form=form_of(q), block=q.block)


def matrix(q: QuantArray) -> Float[Array, "*s k n"]:
    """The decoded matrix with its padding, in the weight's dtype."""
    return in_order(formats.decode(coded(q), q.dtype), q)


def in_order(m: Float[Array, "*s k n"], q: QuantArray) -> Float[Array, "*s k n"]:
    """Decoded rows, or some columns of them, in the order of the weight's inputs."""
    if q.order is None:
        return m
    return jnp.take_along_axis(m, jnp.argsort(q.order)[..., None], axis=-2)


def default_roles(ndim: int) -> str:
    """The last dim out, the one before in, all others a stack."""
    return "s" * (ndim - 2) + "io"


def abstract(w: Any, name: str) -> QuantArray:
    """A weight in a format of `HELD` without its arrays: a `ShapeDtypeStruct` for each.

    Args:
      w: its shape and dtype.
      name: of the format, in the block size that its files have.
    """
    q = QuantArray(
        None, None, format=HELD[name].name, block=HELD[name].block, shape=tuple(w.shape),
        roles=default_roles(len(w.shape)), dtype=w.dtype,
    )  # fmt: skip
    parts = {
        part: jax.ShapeDtypeStruct(shape, dtypes[0]) for part, (shape, dtypes) in _wanted(q).items()
    }
    return dataclasses.replace(q, **parts)


def resized(q: QuantArray, shape: tuple[int, ...]) -> QuantArray:
    """A weight of another shape, held as this one is, without its arrays: as `abstract`."""
    q = dataclasses.replace(q, shape=shape)
    parts = {
        part: jax.ShapeDtypeStruct(size, getattr(q, part).dtype)
        for part, (size, _) in _wanted(q).items()
    }
    return dataclasses.replace(q, **parts)


def _wanted(q: QuantArray) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and possible dtypes of each array, by its field."""
    form, held = known(q.format)
    stack, fan_in, fan_out = matrix_sizes(q)
    # K counts padding in `packed` and `scale`, but not in `scale2`: bitsandbytes has no padding.
    inputs = padded(q)
    blocks, packing = -(-inputs // q.block), form.packing
    stored = inputs * sum(packing.planes) // 8
    wanted: dict = {"packed": ((*stack, stored, fan_out), (packing.dtype,))}
    plain = {"scale": Stored(), "bias": Stored() if form.affine else None}
    for part, array in (plain if held is None else held.arrays).items():
        if array is not None:
            wanted[part] = ((*stack, *array.shape(blocks, fan_out)), array.dtypes)
    if q.scale_map is not None:
        count = -(-_true_blocks(q) * fan_out // stored_scales.SCALE_BLOCK)
        wanted |= {"scale": (wanted["scale"][0], ("uint8",))}
        wanted |= {"scale2": ((*stack, count), ("float32",)), "offset": (stack, ("float32",))}
        wanted["scale_map"] = ((*stack, 256), ("float32",))
    if q.order is not None:
        wanted["order"] = ((*stack, fan_in), ("int32",))
    return wanted


def check(q: QuantArray, name: str = "w") -> QuantArray:
    """Checks that the arrays of a `QuantArray`, such as one from a file, fit its metadata.

    Raises:
      ValueError: the metadata disagrees with the arrays.
    """
    check_quant(q)
    wanted = _wanted(q)
    for part in ARRAYS:
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
