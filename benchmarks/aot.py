"""Is the memory promise kept on an H200? Compiled ahead of time here, without one: `make aot`.

    python benchmarks/aot.py [--tiny | --quick]

Temporary memory of the gradient of eight layers with a frozen base, in bfloat16 and quantized;
what the kernels are made of (spills, tensor-core instructions); compilation for a TPU. Prints a
table, writes `results/aot.json`, and fails where a bound is not held. `--quick` is for continuous
integration (`make aot-quick`): NF4 under unrolled layers, the hardest case, for the H200 alone.
"""

import argparse
import dataclasses
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import aot_targets as targets  # sets the environment: before jax
import jax
import jax.numpy as jnp
from common import report

import lora_jax as lora
from lora_jax.quant import quantize_array
from lora_jax.quant.array import coded
from lora_jax.quant.kernels import gpu

MIB = 2**20
LAYERS, RANK = 8, 16
MOST_ABOVE_DENSE = 3  # dequantized weights of temporary memory


def base(width: int, form: str | None, *, stacked: bool, backend: str):
    """Shapes of the frozen weights: bfloat16, or quantized."""
    shape = (LAYERS, width, width) if stacked else (width, width)
    w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    if form is not None:
        w = jax.eval_shape(lambda w: quantize_array(w, format=form), w)
        w = dataclasses.replace(w, backend=backend)
    return w if stacked else [w] * LAYERS


def lora_params(w, width: int, *, stacked: bool):
    stack = (LAYERS,) if stacked else ()

    def leaf(w):
        return lora.LoraArray(
            w,
            jax.ShapeDtypeStruct((*stack, width, RANK), jnp.float32),
            jax.ShapeDtypeStruct((*stack, RANK, width), jnp.float32),
            jax.ShapeDtypeStruct(stack, jnp.float32),
            roles="sio" if stacked else "io",
        )

    return leaf(w) if stacked else [leaf(each) for each in w]


def unrolled(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.sum(x.astype(jnp.float32))


def scanned(weights, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
    return jnp.sum(x.astype(jnp.float32))


def gradient(width: int, rows: int, form: str | None, *, stacked: bool, kind: str = "cuda"):
    """The compiled gradient of the adapters."""
    fn = scanned if stacked else unrolled
    backend = "gpu" if kind == "cuda" else "tpu"
    params = lora_params(base(width, form, stacked=stacked, backend=backend), width,
                         stacked=stacked)  # fmt: skip
    trainable, frozen = lora.split(params)

    def grad(trainable, frozen, x):
        return jax.grad(lambda t: lora.lorafy(fn)(lora.combine(t, frozen), x))(trainable)

    x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
    return targets.compiled(grad, trainable, frozen, x, kind=kind)


def memory_rows(
    width: int,
    all_rows: tuple,
    kind: str = "cuda",
    *,
    forms: tuple = ("nf4", "int4"),
    layouts: tuple = (False, True),
) -> list[dict]:
    one = width * width * 2
    rows = []
    for stacked in layouts:
        for m in all_rows:
            dense = None
            for form in (None, *forms):
                done = gradient(width, m, form, stacked=stacked, kind=kind)
                temp = done.memory_analysis().temp_size_in_bytes
                dense = temp if form is None else dense
                rows.append({
                    "device": kind,
                    "layers": "scanned" if stacked else "unrolled",
                    "rows": m,
                    "base": form or "bfloat16",
                    "temp_mib": temp / MIB,
                    "above_dense_in_weights": (temp - dense) / one,
                    "dw": has_weight_gradient(done.as_text(), width, stacked=stacked),
                })  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def has_weight_gradient(text: str, width: int, *, stacked: bool) -> bool:
    """Whether the program returns anything of a weight's shape."""
    result = re.search(r"entry_computation_layout=\{.*->(.*)\}", text)
    return bool(result) and f"[{width},{width}]" in result.group(1)


def assembler() -> str | None:
    """NVIDIA's ptxas, where its wheel is installed."""
    paths = [found for p in sys.path for found in sorted(Path(p).glob("nvidia/**/bin/ptxas"))]
    return str(paths[0]) if paths else None


def kernel_rows(width: int, forms: tuple = ("nf4", "int4", "uint4")) -> list[dict]:
    """Registers, spills and tensor-core instructions of each kernel, from the assembler.

    The gradient has no kernel of its own: it decodes, then XLA multiplies.
    """
    ptxas = assembler()
    rows = []
    for form in forms:
        w = jax.ShapeDtypeStruct((width, width), jnp.bfloat16)
        q = jax.eval_shape(lambda w, form=form: quantize_array(w, format=form), w)
        for name, m in (("decode", 0), ("forward", 16), ("forward", 64)):
            x = jax.ShapeDtypeStruct((m, width), jnp.bfloat16)

            def run(x, q, name=name):
                if name == "decode":
                    return gpu.decode(coded(q), dtype=jnp.bfloat16, name="forward")
                return gpu.matmul(x, coded(q), dtype=jnp.bfloat16, transposed=False)

            row = {"kernel": name, "format": form, "rows": m}
            row |= assembled(run, (x, q), ptxas)
            rows.append(row)
            print(row, flush=True)
    return rows


def assembled(run, args, ptxas: str | None) -> dict:
    """Compiles, and assembles the PTX that XLA has dumped."""
    targets.compiled(run, *args)
    ptx = newest_ptx()
    found = {"tensor_core": re.search(r"wgmma\.mma_async|mma\.sync", ptx) is not None}
    if ptxas is None:
        return found
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "k.ptx"
        source.write_text(ptx)
        said = subprocess.run(
            [ptxas, "-arch=sm_90a", "-v", source, "-o", Path(folder) / "k.cubin"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    return found | {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", said)), default=0),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill stores", said))),
    }


def newest_ptx() -> str:
    """The PTX of the last compilation's largest kernel; the dump is emptied."""
    folder = Path(targets.DUMP)
    files = sorted(folder.glob("*.ptx"), key=lambda p: p.stat().st_size)
    text = files[-1].read_text()
    for file in folder.iterdir():
        file.unlink()
    return text


def check(memory: list[dict], kernels: list[dict]) -> list[str]:
    """What does not hold."""
    wrong = [
        f"{r['base']} {r['layers']} rows {r['rows']}: {r['above_dense_in_weights']:.2f} weights "
        f"above bfloat16, at most {MOST_ABOVE_DENSE}"
        for r in memory
        if r["device"] == "cuda" and r["above_dense_in_weights"] > MOST_ABOVE_DENSE
    ]
    wrong += [f"a gradient of the base: {r}" for r in memory if r["dw"]]
    for r in kernels:
        if r.get("spilled_bytes"):
            wrong.append(f"{r['kernel']} {r['format']} spills {r['spilled_bytes']} bytes")
        if r["kernel"] != "decode" and r.get("tensor_core") is False:
            wrong.append(f"{r['kernel']} {r['format']} rows {r['rows']} uses no tensor cores")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="one small case of each")
    parser.add_argument("--quick", action="store_true", help="NF4 on the H200 alone, small")
    parser.add_argument("--skip-tpu", action="store_true")
    options = parser.parse_args()
    if options.quick:
        memory = memory_rows(1024, (256,), forms=("nf4",), layouts=(False,))
        _end(check(memory, kernel_rows(1024, ("nf4",))))
        return
    width = 1024 if options.tiny else 4096
    rows = (256,) if options.tiny else (256, 2048, 8192)
    memory = memory_rows(width, rows)
    kernels = kernel_rows(width)
    if not options.skip_tpu:
        memory += memory_rows(width, rows[:1], "tpu")
    wrong = check(memory, kernels)
    if not options.tiny:
        report("aot", "Temporary memory of a gradient over a quantized base, compiled for an H200",
               memory, kernels=kernels, failures=wrong)  # fmt: skip
    _end(wrong)


def _end(wrong: list[str]):
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
