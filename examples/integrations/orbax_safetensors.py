"""Orbax v1: safetensors files read straight onto a mesh, as the base of an adapted function."""

import os
import tempfile

# Two devices on a CPU too; before JAX is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.experimental import v1 as ocp
from safetensors.numpy import save_file

import lora_jax as lora

SPECS = {"up.weight": P("fsdp", None), "down.weight": P(None, "fsdp")}


def network(params, x):
    """torch's layout, (out, in), as the files have it: the plan finds which dimension is which."""
    return jnp.tanh(x @ params["up.weight"].T) @ params["down.weight"].T


def main():
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    shapes = {"up.weight": (64, 16), "down.weight": (8, 64)}
    host = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(4, 16)), jnp.float32)
    layout = ocp.Context(checkpoint_layout=ocp.options.CheckpointLayout.SAFETENSORS)
    with tempfile.TemporaryDirectory() as folder:
        save_file(host, f"{folder}/model.safetensors")
        wanted = {
            name: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=NamedSharding(mesh, SPECS[name]))
            for name, w in host.items()
        }
        with layout:
            params = ocp.load(folder, wanted)
    config = lora.LoraConfig(rank=4, target_modules="all-linear", init="random")
    plan = lora.plan(config, network, params, x)
    adapted = lora.init(jax.random.key(0), plan, params)
    alone = lora.init(jax.random.key(0), plan, jax.tree.map(jnp.asarray, host))
    y, expected = (jax.jit(lora.lorafy(network))(tree, x) for tree in (adapted, alone))
    b = adapted["up.weight"].b
    return {
        "difference": float(abs(np.asarray(y) - np.asarray(expected)).max()),
        "moved": float(abs(np.asarray(y) - np.asarray(network(host, x))).max()),
        "parts": [list(p.data.shape) for p in params["up.weight"].addressable_shards],
        "factor_sharding": str(b.sharding.spec),
    }


if __name__ == "__main__":
    print(main())
