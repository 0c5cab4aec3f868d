"""What differs between installations: releases of JAX, and packages that may be missing.

Releases: jaxprs are read here (`jax.extend`), on jax 0.10 to 0.12. Packages: how those that may be
missing, or that take long to import, are imported, and which extra installs them.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jexc
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

Var = jexc.Var
Literal = jexc.Literal

OLDEST_JAX = (0, 10)


def check_jax(version: tuple[int, ...]) -> None:
    """Refuses a release of JAX that lacks what this package needs.

    Raises:
      ImportError: it is too old.
    """
    if version < OLDEST_JAX:
        found, oldest = (".".join(map(str, v)) for v in (version, OLDEST_JAX))
        raise ImportError(
            f"lora_jax needs jax {oldest} or later, found {found}: pip install -U jax"
        )


# Before other modules are imported: they would fail with the name that an old JAX lacks.
check_jax(jax.__version_info__)

VERSION = "0.1.0"  # of this package; pyproject.toml and `lora_jax.__version__` read it

# The packages of every extra, by the names they are imported by; pyproject.toml has the same.
EXTRAS = {
    "llm": ("gguf", "grain", "huggingface_hub", "jinja2", "matplotlib", "tokenizers", "tqdm"),
    "bleu": ("sacrebleu",),
}

# Primitives that go by several names across releases, by the one name our tables use.
_RENAMED = {"pjit": "jit", "checkpoint": "remat", "remat2": "remat", "core_call": "closed_call"}


def moved(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Makes the `__getattr__` of a module that finds what has another name now.

    Args:
      module: its full name.
      names: the former names, and what each is now: a module, or `module:name`.

    Returns:
      A function of a name, which warns of a former one.

    Raises:
      AttributeError: (from the function) the name is none of them.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module `{module}` has no attribute `{name}`")
        place, _, attribute = names[name].partition(":")
        new = names[name].replace(":", ".")
        warnings.warn(f"`{module}.{name}` is now `{new}`", DeprecationWarning, stacklevel=2)
        found = importlib.import_module(place)
        return getattr(found, attribute) if attribute else found

    return find


def require(module: str) -> Any:
    """Imports a package where it is used: one that takes long to import, or that may be missing.

    Args:
      module: its full name, such as `orbax.checkpoint`.

    Returns:
      The module.

    Raises:
      ModuleNotFoundError: it is not installed; the message names the extra that installs it.

    Example:
      bar = require("tqdm").tqdm(total=10)
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:  # installed, but something it needs itself is not
            raise
        raise _not_installed(package) from None


def check_installed(*packages: str) -> None:
    """Refuses at once what would fail later, without importing anything.

    Raises:
      ModuleNotFoundError: one of the packages is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise _not_installed(package)


def _not_installed(package: str) -> ModuleNotFoundError:
    extras = (f"'lora-jax[{e}]'" for e, packages in EXTRAS.items() if package in packages)
    # What is in no extra comes with the package whose files are read, such as h5py with Keras.
    wanted = next(extras, package)
    return ModuleNotFoundError(f"`{package}` is not installed: pip install {wanted}", name=package)


def name_of(eqn: Any) -> str:
    """The primitive's name, the same on every supported release."""
    name: str = eqn.primitive.name
    return _RENAMED.get(name, name)


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence]:
    """Splits an inner jaxpr into the jaxpr and its constants.

    Up to 0.10 jit, scan and cond hold a ClosedJaxpr and remat and shard_map an open one; from
    0.11 the two types are one.
    """
    if jexc.ClosedJaxpr is not jexc.Jaxpr and isinstance(jaxpr, jexc.ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, tuple(getattr(jaxpr, "consts", ()) or ())


def scan_counts(params: dict, operands: int) -> tuple[int, int]:
    """How many of scan's operands are constants, and how many carries (0.11 renamed both)."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    groups = params["ft_in"].update(list(range(operands))).unpack()
    return len(groups[0].vals), len(groups[1].vals)


def mapped_axes(params: dict) -> frozenset:
    """The mesh axes of a `shard_map`, whose parameter has one of two names by the release."""
    new, old = "newly_manual_axes", "manual_axes"
    return frozenset(params[new if new in params else old])


def segment(jaxpr: Any, eqns: list, invars: list, outvars: list) -> Any:
    """The open jaxpr of some consecutive equations of `jaxpr`."""
    # The effects of the whole jaxpr may be more than those of these equations.
    effects = set().union(*(e.effects for e in eqns))
    info = jaxpr.debug_info
    # Names of arguments must be as many as arguments. A release without these fields checks none.
    with contextlib.suppress(AttributeError, TypeError):
        info = info._replace(
            arg_names=None if info.arg_names is None else (None,) * len(invars),
            result_paths=None if info.result_paths is None else ("",) * len(outvars),
        )
    return jaxpr.replace(
        constvars=[], invars=invars, outvars=outvars, eqns=eqns, effects=effects, debug_info=info
    )


def eval_segment(jaxpr: Any, args: Sequence) -> list:
    """Evaluates an open jaxpr. JAX binds its primitives, so effects and contexts are kept."""
    return jax.core.eval_jaxpr(jaxpr, (), *args)


@contextlib.contextmanager
def equation_context(eqn: Any) -> Iterator[None]:
    """Enters the name scope and the compute settings an equation was traced under."""
    scope = str(eqn.source_info.name_stack)
    with contextlib.ExitStack() as stack:
        manager = getattr(getattr(eqn, "ctx", None), "manager", None)
        if manager is not None:
            stack.enter_context(manager)
        if scope:
            stack.enter_context(jax.named_scope(scope))
        yield


# Folders whose frames are not the user's. The first three are left out in any case; the others are
# model libraries, whose line is better than none.
_LIBRARIES = tuple(
    os.sep + part + os.sep
    for part in ("jax", "jaxlib", "lora_jax", "flax", "equinox", "haiku", "einops", "contextlib")
)
_UNKNOWN = "unknown line"


def source_line(eqn: Any, default: str = _UNKNOWN) -> str:
    """`file.py:12 (function)` of the line of the user's model that made this equation.

    Args:
      eqn: an equation.
      default: returned where all frames are a library's, as inside a function that JAX has
        cached. Without one, the line in the model library (flax, equinox) is returned.
    """
    traceback = eqn.source_info.traceback
    frames = list(traceback.frames) if traceback is not None else []
    if line := _innermost(frames, _LIBRARIES):
        return line
    return default if default != _UNKNOWN else _innermost(frames, _LIBRARIES[:3]) or default


def _innermost(frames: Sequence, left_out: tuple[str, ...]) -> str:
    """The innermost frame outside some folders as text, or ""."""
    for frame in frames:
        if not _is_left_out(frame.file_name, left_out):
            name = os.path.basename(frame.file_name)
            return f"{name}:{frame.line_num} ({frame.function_name})"
    return ""


# A plan asks for every equation, and the frames of a model are of few files.
@functools.lru_cache(maxsize=4096)
def _is_left_out(file_name: str, left_out: tuple[str, ...]) -> bool:
    # `<frozen importlib>` and the like, and the wrapper of a context manager.
    if file_name.startswith("<") or file_name.endswith("contextlib.py"):
        return True
    return any(part in file_name for part in left_out)


def held(dtype: Any) -> np.dtype:
    """The dtype in which JAX holds numbers of one: NumPy's float64 is float32 unless x64 is on."""
    return jax.dtypes.canonicalize_dtype(dtype)


def is_array(x: Any) -> bool:
    """Whether `x` is one array, concrete or traced (not a quantized one)."""
    return isinstance(x, jax.Array | jax.core.Tracer | np.ndarray)


def is_concrete(x: Any) -> bool:
    """Whether `x` is an array whose numbers this process can read."""
    if isinstance(x, jax.core.Tracer):
        return False
    return isinstance(x, np.ndarray) or (isinstance(x, jax.Array) and x.is_fully_addressable)


def varying_axes(x: Any) -> frozenset:
    """The mesh axes along which `x` differs inside a `shard_map`; none outside."""
    aval = jax.typeof(x)
    # The attribute has one of two names, by the release of JAX.
    return frozenset(getattr(getattr(aval, "manual_axis_type", aval), "varying", ()) or
                     getattr(aval, "vma", ()))  # fmt: skip


def spec_of(x: jax.typing.ArrayLike) -> tuple | None:
    """The mesh axes of each dim of `x` under an explicit mesh, None under any other."""
    if explicit_mesh(x) is None:
        return None
    spec = jax.typeof(x).sharding.spec
    return tuple(spec) + (None,) * (np.ndim(x) - len(spec))


def explicit_mesh(x: jax.typing.ArrayLike) -> Any:
    """The abstract mesh that `x` is typed by if it has explicit axes, else None."""
    mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    explicit = jax.sharding.AxisType.Explicit
    return None if mesh is None or mesh.empty or explicit not in mesh.axis_types else mesh


def open_axes(mesh: Any) -> dict[str, int]:
    """The axes of several devices that a program is partitioned over, and their sizes."""
    return {a: n for a, n in mesh.shape.items() if n > 1 and a not in mesh.manual_axes}


def is_traceable(x: Any) -> bool:
    """Whether a function's output is an array (or key) rather than a Python object."""
    return isinstance(x, jax.Array | jax.core.Tracer) or (
        hasattr(x, "dtype") and hasattr(x, "shape")
    )


def compiler_options() -> dict[str, Any]:
    """Options to compile a training step with on the default device.

    By default XLA:CPU uses vectors of 256 bits. With the 512 of AVX-512 a step of SmolLM2 takes
    about 3 % less; a processor without AVX-512 splits them.
    """
    return {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else {}


@contextlib.contextmanager
def ordered_collectives(devices: Iterable[jax.Device]) -> Iterator[None]:
    """Turns JAX's compile cache off where these are several CPU devices.

    In a program that XLA:CPU restores from there, the collectives inside a loop have lost their
    order to those outside: devices begin different ones and wait until XLA ends the process.
    """
    name = "jax_enable_compilation_cache"
    if sum(d.platform == "cpu" for d in devices) < 2 or not getattr(jax.config, name):
        yield
        return
    # JAX asks once whether there is a cache, and keeps the answer.
    jax.config.update(name, False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update(name, True)
        compilation_cache.reset_cache()


def default_device() -> jax.Device:
    """JAX's default device, which `jax.default_device` may have changed."""
    device = getattr(jax.config, "jax_default_device", None)
    if device is None or isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device


def is_finite(x: np.ndarray) -> bool:
    """Whether all numbers of a host array are finite; of any dtype of JAX's."""
    # numpy's `isfinite` takes no bfloat16.
    return bool(np.isfinite(np.asarray(x).astype(np.float32, copy=False)).all())
