"""Which kernel multiplies: by device, format, shape and number of rows, from a table.

    reference  jnp, any shape                       gpu  Pallas, Triton lowering
    tpu        Pallas, Mosaic lowering              *_interpret  the same, interpreted on a CPU

A shape that no kernel takes uses the reference, with one warning; and so do TPUs on a mesh with
an axis `tensor`.
"""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lora_jax import compat
from lora_jax.quant.array import Backend, QuantArray, form_of
from lora_jax.quant.formats import Coded, Pass, decode
from lora_jax.quant.kernels.partition import spread_mesh, used_whole

BACKENDS: tuple[Backend, ...] = get_args(Backend)
# What "auto" chooses on JAX's platforms; the reference on any other.
_OF_PLATFORM: Mapping[str, Backend] = {"gpu": "gpu", "cuda": "gpu", "tpu": "tpu"}


class ReferenceWarning(UserWarning):
    """A quantized product runs without a kernel: none takes its shape, or XLA cannot split it."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How one product is computed.

    Attributes:
      decode: `(w, *, dtype, name) -> (K, N)`, of a `formats.Coded` matrix.
      matmul: the fused product `(x, w, *, transposed, dtype) -> (M, N or K)`, or None to decode
        and then multiply.
      reason: why the reference runs although another backend was chosen, or "".
    """

    decode: Callable
    matmul: Callable | None = None
    reason: str = ""

    @property
    def is_reference(self) -> bool:
        return self.decode is _reference

    @property
    def fused(self) -> bool:
        return self.matmul is not None


def check_backend(backend: str) -> None:
    """Raises ValueError for an unknown backend."""
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}")


def backend_of(q: QuantArray) -> Backend:
    """The backend of a weight, "auto" resolved by JAX's default device.

    Raises:
      ValueError: an unknown one.
    """
    check_backend(q.backend)
    if q.backend != "auto":
        return q.backend
    return _OF_PLATFORM.get(compat.default_device().platform, "reference")


def choose_kernel(
    q: QuantArray, rows: float, packed: tuple[int, ...], *, transposed: bool, dtype: DTypeLike
) -> Kernel:
    """The kernel of one product.

    Args:
      q: the weight.
      rows: of `x`; infinity to decode the weight without a product.
      packed: shape of the codes of one matrix.
      transposed: whether outputs are contracted.
      dtype: of `x`, in which products are taken.
    """
    backend, _, interpreted = backend_of(q).partition("_")
    if backend == "reference":
        return Kernel(_reference)
    if backend == "gpu":
        # Imported only when chosen: the reference needs no Pallas.
        from lora_jax.quant.kernels import gpu as kernels
    else:
        from lora_jax.quant.kernels import tpu as kernels
    form, slab = form_of(q), q.slab_size
    # On a CPU, where they are interpreted, XLA splits them.
    mesh = spread_mesh() if backend == "tpu" and not interpreted else None
    unsplit = "" if mesh is None or used_whole(mesh) else _UNSPLIT
    if reason := unsplit or kernels.obstacle(form, slab, packed):
        _warn_once(f"a quantized weight has no kernel of {backend}: {reason}; plain JAX decodes it")
        return Kernel(_reference, reason=reason)
    options = {"interpret": bool(interpreted)}
    decoder = functools.partial(kernels.decode, **options)
    limit = fused_rows(backend, form.name, packed[-1], transposed=transposed)
    # For many rows the device's own product of a decoded copy beats a fused kernel.
    # A fused one would be given the rows of all devices.
    if rows > limit or mesh is not None or kernels.fused_obstacle(form, slab, packed, dtype):
        return Kernel(decoder)
    return Kernel(decoder, functools.partial(kernels.matmul, **options))


# JAX wires `custom_partitioning`, by which the GPU's kernels are split, to no TPU
# (https://github.com/jax-ml/jax/issues/38196): the program would not compile.
_UNSPLIT = (
    "XLA cannot split its kernels over this mesh (axes other than data, fsdp and context, or "
    "explicit ones)"
)


def _reference(w: Coded, *, dtype: DTypeLike, name: Pass) -> Float[Array, "k n"]:
    del name  # only kernels have one
    return decode(w, dtype)


# Cached by its text: a reason is warned of once a process, not in every layer.
@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, ReferenceWarning, stacklevel=4)


@functools.cache
def crossovers() -> list[dict]:
    """The most rows for which a fused kernel is faster, from `dispatch.json`; first match."""
    return json.loads((Path(__file__).parent / "dispatch.json").read_text("utf-8"))["fused_rows"]


def fused_rows(backend: str, form: str, outputs: int, *, transposed: bool) -> int:
    """The most rows for which the fused kernel is used; 0 for never."""
    for row in crossovers():
        if row["backend"] != backend or row["format"] not in (form, "*"):
            continue
        if outputs >= row["least_outputs"] and row["transposed"] in (transposed, None):
            return row["rows"]
    return 0
