"""An adapter of a 7B model (rank 16, every linear layer) is written and read near its own size."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.once, pytest.mark.slow]

# Run in a process of its own, whose peak is then this alone. The base has no memory: a view of one
# zero. What is measured is above the process with what it starts from.
SCRIPT = """
import json, os, sys, time
import jax, numpy as np
from lora_jax.array import LoraArray
from lora_jax.config.lora import LoraConfig
from lora_jax.hf.peft import api as peft

LAYERS, RANK, D, F = 32, 16, 4096, 11008
SHAPES = {"self_attn": {f"{p}_proj": (D, D) for p in "qkvo"},
          "mlp": {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}}
jax.devices()


def leaf(fan_in, fan_out, fill):
    return LoraArray(
        np.broadcast_to(np.float32(0), (LAYERS, fan_in, fan_out)),
        fill((LAYERS, fan_in, RANK)), fill((LAYERS, RANK, fan_out)),
        np.full(LAYERS, 2, np.float32), roles="sio")


def tree(fill):
    blocks = {block: {name: {"kernel": leaf(*shape, fill)} for name, shape in sizes.items()}
              for block, sizes in SHAPES.items()}
    return {"model": {"layers": blocks}}


def status(field):
    # Not resource.getrusage: its peak is that of the process this one was started by, too.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))


directory, action = sys.argv[1:]
config = LoraConfig(rank=RANK, alpha=32)
rng = np.random.default_rng(0)
saves = action == "save"
given = tree(lambda s: rng.random(s, np.float32) if saves else np.broadcast_to(np.float32(0), s))
before, start = status("VmRSS"), time.perf_counter()
if saves:
    peft.save_peft(directory, given, config)
else:
    read, tensors = peft.read_peft(directory)
    filled = peft.fill(given, read, tensors)
    a = filled["model"]["layers"]["mlp"]["up_proj"]["kernel"].a
    name = "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"
    assert np.array_equal(a[7].T, tensors[name])
peak = status("VmHWM")
size = os.path.getsize(os.path.join(directory, "adapter_model.safetensors"))
print(json.dumps({"times": (peak - before) / size, "megabytes": size >> 20,
                  "seconds": time.perf_counter() - start}))
"""


def run(directory, action: str) -> dict:
    command = [sys.executable, "-c", SCRIPT, str(directory), action]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_is_near_the_adapters_size(tmp_path):
    written = run(tmp_path / "adapter", "save")
    assert written["megabytes"] == 152
    assert written["times"] < 1.5, written  # the tensors in the file's layout
    read = run(tmp_path / "adapter", "load")
    assert read["times"] < 3.2, read  # the mapped file, its tensors, the tree
