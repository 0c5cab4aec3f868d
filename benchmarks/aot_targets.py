"""Compile-only devices: an H200 or a TPU v5e for the compiler, on a machine that has neither.

Needs the wheels of `make aot` (the CUDA plugin without NVIDIA's libraries; libtpu). What comes out
is the real optimized program, with its buffers; times are not to be had.
"""

import atexit
import contextlib
import importlib
import os
import shutil
import tempfile
from typing import Any

DUMP = tempfile.mkdtemp(prefix="aot-")  # XLA writes the PTX of what it compiles there
atexit.register(shutil.rmtree, DUMP, ignore_errors=True)

# Before jax is imported. Autotuning runs candidates on the device, of which there is none.
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["XLA_FLAGS"] = (
    f"--xla_gpu_autotune_level=0 --xla_dump_to={DUMP} --xla_dump_hlo_pass_re=NONE"
)

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def device(kind: str):
    """A device to compile for: "cuda" (an H200) or "tpu" (a v5e)."""
    return devices(kind, 1)[0]


def devices(kind: str, count: int, topology: str | None = None) -> list:
    """So many of them in one machine: any number of "cuda", 4 or fewer of "tpu".

    `topology` is libtpu's name of a larger slice, such as "v5p:2x2x4".
    """
    if kind == "cuda":
        found = topologies.get_topology_desc(
            platform="cuda", target_config=_H200, topology=f"1x1x{count}"
        )
    elif topology is not None:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    else:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name="v5e:2x2", chips_per_host_bounds=(2, 2, 1)
        )
    return found.devices[:count]


@contextlib.contextmanager
def cudnn():
    """Lets JAX trace cuDNN's attention on a machine without cuDNN, of which it asks the version."""
    attention: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")

    class Versions:
        @staticmethod
        def cudnn_get_version() -> int:
            return 91200  # of the device's description above

    before = attention.cuda_versions
    attention.cuda_versions = Versions
    try:
        yield
    finally:
        attention.cuda_versions = before


def compiled(f, *args, kind: str = "cuda", donate: tuple = ()):
    """`f` compiled for the device; arguments are trees of anything with a shape and a dtype."""
    place = jax.sharding.SingleDeviceSharding(device(kind))
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    with _context(kind):
        traced = jax.jit(f, donate_argnums=donate).trace(*args)
        return traced.lower(lowering_platforms=(kind,)).compile()


def _context(kind: str):
    if kind != "cuda" or jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    # From 0.11 on Pallas asks the mesh which GPU it is lowered for.
    gpu = jax.sharding.AbstractDevice("NVIDIA H200", 132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=gpu)
    return jax.sharding.use_abstract_mesh(mesh)
