"""Attention over whole rows by kernels that never write the scores to memory, and their table.

    splash    TPU: Pallas' kernel. Windows, soft caps, padding and texts side by side; no sinks.
    cudnn     NVIDIA GPU: cuDNN's, 16 bits. Windows; none of the others.
    xla       anything: plain JAX, some heads and queries at a time (`lora_jax.models.mixing`).

`attention="auto"` takes the first row of `TABLE` that takes the case; a name takes that row, or
the next one that does, with a warning that has the reason. Memory grows with a row's length in
each; decoding, over a cache, is always XLA's.

B batch, T tokens, N query heads, K key/value heads, H size of a head.

Sources: Dao et al. 2022, "FlashAttention", arXiv:2205.14135; Pallas' splash attention,
`jax.experimental.pallas.ops.tpu.splash_attention`.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from lora_jax import compat
from lora_jax.dims import AnyArray
from lora_jax.models.sharding import ROWS

AttentionName = Literal["auto", "splash", "cudnn", "xla"]
ATTENTIONS: tuple[AttentionName, ...] = get_args(AttentionName)
Kind = Literal["windows", "soft caps", "sinks", "padding", "segments"]

# Tokens: the scores of fewer are small.
KERNELS_FROM = 128
# What Pallas' kernels take tokens in.
_LANES = 128
# Tokens of a block of queries or keys; as in MaxText.
_BLOCK = 512

# As an error or a warning names what a row lacks.
_LACKS: Mapping[Kind, str] = {
    "windows": "has no sliding windows",
    "soft caps": "has no soft cap of the scores",
    "sinks": "has no sinks of heads",
    "padding": "takes no mask of padding",
    # Through `jax.nn.dot_product_attention` cuDNN gets a mask as a bias of all pairs of tokens.
    # Its private call has offsets of texts, which JAX 0.10 counts by query heads for keys too: with
    # grouped heads every text but the first would read another's keys, without an error.
    "segments": "cannot keep texts of one row apart",
}


class Case(NamedTuple):
    """What the attention of a call needs.

    Attributes:
      platform: of the device: "tpu", "gpu", "cpu".
      since: the major compute capability of an NVIDIA GPU, 8 for Ampere; 0 for others.
      dtype: of queries, keys and values.
      size: H.
      kinds: masks and caps beside the causal mask.
      apart: why a kernel cannot run on the devices of this program; "" where it can.
    """

    platform: str
    since: int
    dtype: Any
    size: int
    kinds: frozenset[Kind] = frozenset()
    apart: str = ""


class Row(NamedTuple):
    """An implementation, and the cases that it takes.

    Attributes:
      name: its name.
      kinds: the masks and caps that it takes.
      platform: the only platform that it runs on; None for any.
      since: the least compute capability.
      dtypes: the dtypes that it takes; () for any.
      sizes: whether it takes heads of a size, and the same in words.
      run: `run(q, k, v, ids, *, window, scale, softcap) -> mixed values`; None for XLA's.
    """

    name: AttentionName
    kinds: frozenset[Kind]
    platform: str | None = None
    since: int = 0
    dtypes: tuple[str, ...] = ()
    sizes: tuple[Callable[[int], bool], str] = (lambda h: True, "")
    run: Callable | None = None


def splash(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    ids: Int[AnyArray, "b t"] | None,
    *,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "b t n h"]:
    """Pallas' splash attention; tokens of equal `ids` see each other. `interpret` is for tests."""
    splash = compat.require("jax.experimental.pallas.ops.tpu.splash_attention")
    t, h = q.shape[1], q.shape[3]
    rest = -t % _LANES
    # Behind the row, where causal attention looks at nothing of it; the kernel has no scale.
    wide = q.astype(jnp.float32) * (h**-0.5 if scale is None else scale)
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0))) for x in (wide.astype(q.dtype), k, v)
    )
    ids = ids if ids is None else jnp.pad(ids, ((0, 0), (0, rest)))
    kernel = _splash_kernel(
        q.shape[2], t + rest, window=window, softcap=softcap, interpret=interpret
    )

    def one(q: Array, k: Array, v: Array, ids: Array | None) -> Array:
        heads = (jnp.moveaxis(x, 1, 0) for x in (q, k, v))  # (n, t, h), (k, t, h)
        apart = None if ids is None else splash.SegmentIds(ids, ids)
        return jnp.moveaxis(kernel(*heads, apart), 0, 1)

    return jax.vmap(one)(q, k, v, ids)[:, :t]


def _splash_kernel(
    heads: int, tokens: int, *, window: int | None, softcap: float | None, interpret: bool
) -> Any:
    splash = compat.require("jax.experimental.pallas.ops.tpu.splash_attention")
    shape = (tokens, tokens)
    seen = splash.CausalMask(shape)
    if window is not None:
        seen = splash.LocalMask(shape, (window - 1, 0), 0)
    block = next(b for b in (_BLOCK, _BLOCK // 2, _LANES) if tokens % b == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    # JAX goes through the mask for blocks that are masked whole, ten seconds for 32,768 tokens, and
    # remembers them by the mask.
    return splash.make_splash_mha(
        splash.MultiHeadMask([seen] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def cudnn(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    ids: None,
    *,
    window: int | None,
    scale: float | None,
    softcap: None,
) -> Float[Array, "b t n h"]:
    """cuDNN's attention, through JAX's public call."""
    del ids, softcap
    near = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=near, implementation="cudnn"
    )


_16_BITS = ("bfloat16", "float16")
_ALL: frozenset[Kind] = frozenset(get_args(Kind))
_WINDOWS: frozenset[Kind] = frozenset({"windows"})
_NO_SINKS: frozenset[Kind] = _ALL - {"sinks"}

TABLE: tuple[Row, ...] = (
    Row(
        name="splash", platform="tpu", dtypes=("bfloat16", "float32"), kinds=_NO_SINKS, run=splash,
        sizes=(lambda h: h < _LANES or h % _LANES == 0, "below 128, or multiples of 128"),
    ),
    # The limits of cuDNN, from Hopper on and before.
    Row(
        name="cudnn", platform="gpu", since=9, dtypes=_16_BITS, kinds=_WINDOWS, run=cudnn,
        sizes=(lambda h: h % 8 == 0 and h <= 256, "multiples of 8 to 256"),
    ),
    Row(
        name="cudnn", platform="gpu", since=8, dtypes=_16_BITS, kinds=_WINDOWS, run=cudnn,
        sizes=(lambda h: h % 8 == 0 and h <= 128, "multiples of 8 to 128"),
    ),
    Row(name="xla", kinds=_ALL),
)  # fmt: skip


def kernel_for(
    wanted: AttentionName,
    q: Float[Array, "b t n h"],
    mask: Bool[AnyArray, "b s"] | None,
    segments: Int[AnyArray, "b s"] | None,
    *,
    slides: bool | Array,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: bool = False,
    over: str | None = None,
) -> Callable | None:
    """The kernel for whole rows, `(q, k, v) -> mixed values`; None where it is XLA's attention.

    Args:
      wanted: the row of the table, or "auto".
      q: the queries; only their shape and dtype are read.
      mask, segments: see `lora_jax.models.attention.attention`.
      slides: whether this block has a window; an array in a scan over blocks that differ.
      window, scale, softcap, sinks: see `lora_jax.models.mixing.Mixing`.
      over: the axis that the tokens of a row are spread over.
    """
    t = q.shape[1]
    window = window if window is not None and window < t else None
    needs: dict[Kind, bool] = {
        "windows": slides is not False and window is not None,
        "soft caps": softcap is not None,
        "sinks": sinks,
        "padding": mask is not None,
        "segments": segments is not None,
    }
    kinds: frozenset[Kind] = frozenset(kind for kind, needed in needs.items() if needed)
    lack = apart() if over is None else f"takes no tokens spread over the axis '{over}'"
    case = Case(*target(), dtype=q.dtype, size=q.shape[-1], kinds=kinds, apart=lack)
    if t < KERNELS_FROM or (run := choose(wanted, case).run) is None:
        return None
    # Padding sees padding alone, as a text of its own would.
    ids = mask.astype(jnp.int32) if segments is None and mask is not None else segments

    def of(window: int | None) -> Callable:
        own = functools.partial(run, window=window, scale=scale, softcap=softcap)
        return lambda q, k, v: _on_devices(own, q, k, v, ids=ids)

    def kernel(q: Array, k: Array, v: Array) -> Array:
        if isinstance(slides, bool):
            return in_place(of(window if slides else None)(q, k, v), q)
        # A kernel's window is a static number.
        return in_place(lax.cond(slides, of(window), of(None), q, k, v), q)

    return kernel


def check_attention(wanted: str) -> None:
    """Refuses an implementation that does not exist.

    Raises:
      ValueError: it does not.
    """
    if wanted not in ATTENTIONS:
        raise ValueError(f"`attention` must be one of {', '.join(ATTENTIONS)}, got {wanted!r}")


def choose(wanted: AttentionName, case: Case) -> Row:
    """The row of the table that a case is computed by.

    Warns:
      UserWarning: the wanted row does not take the case; once for each reason.
    """
    names = [row.name for row in TABLE]
    start = 0 if wanted == "auto" else names.index(wanted)
    found = next(row for row in TABLE[start:] if not lacks(row, case))
    if wanted not in ("auto", found.name):
        # Of the rows of one name the last takes the most devices.
        own = [row for row in TABLE if row.name == wanted][-1]
        _report(wanted, lacks(own, case), found.name)
    return found


def lacks(row: Row, case: Case) -> str:
    """Why a row does not take a case; "" if it does."""
    if row.platform not in (None, case.platform) or row.since > case.since:
        place = {"gpu": "an NVIDIA GPU since Ampere", "tpu": "a TPU"}[str(row.platform)]
        return f"runs on {place}, and the device is a {case.platform.upper()}"
    dtype = jnp.dtype(case.dtype).name
    if row.dtypes and dtype not in row.dtypes:
        return f"takes {' and '.join(row.dtypes)}, and the model computes in {dtype}"
    takes, sizes = row.sizes
    if not takes(case.size):
        return f"takes heads of sizes {sizes}, and these have {case.size}"
    if row.run is not None and case.apart:
        return case.apart
    missing = [text for kind, text in _LACKS.items() if kind in case.kinds - row.kinds]
    return " and ".join(missing)


@functools.cache
def _report(wanted: str, reason: str, taken: str) -> None:
    # Of every block and every program the same.
    warnings.warn(f'`attention="{wanted}"` {reason}: "{taken}" takes its place', stacklevel=2)


def target() -> tuple[str, int]:
    """The platform that a program is traced for, and its compute capability; see `Case`."""
    default = compat.default_device()
    # "9.0" on NVIDIA's GPUs, "gfx942" on AMD's, which cuDNN does not run on.
    major = str(getattr(default, "compute_capability", "")).partition(".")[0]
    since = int(major) if major.isdecimal() else 0
    # A mesh in the context may be of devices that are not attached, for a compiler alone. JAX
    # takes the limits of the attached one.
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform not in (None, default.platform):
        return device.platform, 8 if device.platform == "gpu" else 0
    return default.platform, since


def apart() -> str:
    """Why a kernel cannot run on the devices of the context; "" where it can."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        # Of a program on several devices a kernel must be given the parts.
        alone = jax.device_count() == 1
        return "" if alone else "needs the mesh of several devices in `jax.set_mesh`"
    explicit = compat.open_axes(mesh) and AxisType.Explicit in mesh.axis_types
    return "takes no mesh with explicit axes" if explicit else ""


def spread(mesh: Any, rows: int, heads: int) -> tuple[tuple[str, ...] | None, str | None]:
    """The axes that each device's rows, and key heads, are divided by in a `shard_map`.

    What an axis does not divide is computed on all of its devices.
    """
    axes = compat.open_axes(mesh)
    found = tuple(a for a in ROWS if a in axes)
    divided = found and rows % math.prod(axes[a] for a in found) == 0
    apart = "tensor" in axes and heads % axes["tensor"] == 0
    return (found if divided else None), ("tensor" if apart else None)


def _on_devices(
    run: Callable,
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    *,
    ids: Int[AnyArray, "b t"] | None,
) -> Float[Array, "b t n h"]:
    """`run(q, k, v, ids)`, on a mesh by each device for its rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if not compat.open_axes(mesh):
        return run(q, k, v, ids)
    rows, heads = spread(mesh, q.shape[0], k.shape[2])
    whole = PartitionSpec(rows, None, heads, None)
    return jax.shard_map(
        run,
        in_specs=(whole, whole, whole, None if ids is None else PartitionSpec(rows, None)),
        out_specs=whole,
        # Pallas wants all axes to be the kernel's, those of one device too.
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        # A kernel's results are not typed by the axes that they differ along.
        check_vma=False,
    )(q, k, v, ids)


def in_place(mixed: Float[Array, "b t n h"], q: Float[Array, "b t n hq"]) -> Array:
    """Always `mixed`, with the tokens' axis of the queries; nothing once compiled.

    Queries may be longer than values, by what `lora_jax.models.attention.with_sinks` adds.

    Adapters for each token follow the tokens' axis through the program, and lose it in a kernel or
    where it is cut in pieces.
    """
    return lax.select(jnp.ones(mixed.shape, bool), mixed, q[..., : mixed.shape[-1]])
