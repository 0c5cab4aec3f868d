"""`QuantArray`: a weight in 4 or 8 bits a number, a leaf that takes the place of a float array.

It has the shape, dtype and roles of its weight. Its arrays are those of the matrix
`(stack..., K, N)`, in dims first and out dims last, in the layout of `lora_jax.quant.formats`.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lora_jax.dims import from_matrix, in_dims, out_dims, sizes, stack_dims
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


def default_roles(ndim: int) -> str:
    """The last dim out, the one before in, all others a stack."""
    return "s" * (ndim - 2) + "io"


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
