"""jax.export: save an adapted function; run it where neither the model nor lora_jax is installed.

The arrays are arguments of the saved function, so another adapter of the same plan needs no new
export. They travel as a flat list, because jax.export saves no classes of its callers.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

import lora_jax as lora

# Runs in a process of its own; `-I` keeps this folder and PYTHONPATH out of its reach.
READER = """
import sys
import jax, numpy as np
folder = sys.argv[1]
function = jax.export.deserialize(bytearray(open(folder + "/function.bin", "rb").read()))
file = np.load(folder + "/arrays.npz")
arrays = [file[f"arr_{i}"] for i in range(len(file.files) - 1)]
assert "lora_jax" not in sys.modules
np.save(folder + "/y.npy", function.call(arrays, file["x"]))
"""


def network(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def main():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"up": (32, 128), "down": (128, 8)}
    params = {n: 0.1 * jax.random.normal(k, shapes[n]) for n, k in zip(shapes, keys, strict=False)}
    x = jax.random.normal(keys[2], (5, 32))
    plan = lora.plan(lora.LoraConfig(rank=4, target_modules="all-linear"), network, params, x)
    # Every array is moved, B too, so that an adapter left out would show.
    adapted = jax.tree.map(lambda leaf: leaf + 0.05, lora.init(keys[3], plan, params))
    arrays, structure = jax.tree.flatten(adapted)
    call = jax.jit(lambda arrays, x: lora.lorafy(network)(structure.unflatten(arrays), x))
    (batch,) = export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in arrays]
    saved = export.export(call)(shapes, jax.ShapeDtypeStruct((batch, 32), x.dtype)).serialize()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "function.bin").write_bytes(saved)
        np.savez(Path(folder) / "arrays.npz", *arrays, x=x)
        subprocess.run([sys.executable, "-I", "-c", READER, folder], check=True)
        there = np.load(Path(folder) / "y.npy")
    moved = float(jnp.abs(there - network(params, x)).max())
    return {"difference": float(jnp.abs(there - call(arrays, x)).max()), "moved": moved}


if __name__ == "__main__":
    print(main())
