"""How fast are products with a quantized weight on a GPU, beside bfloat16 and others' kernels?

    python benchmarks/gpu_quant.py            on one H200; half of its sizes took two minutes
    python benchmarks/gpu_quant.py --tiny     the same on a CPU, interpreted: does it run at all

In one process: XLA's bfloat16 product; ours, fused and decoded first, forward and dx;
bitsandbytes' `dequantize_4bit` and `gemm_4bit` and torch's `_weight_int4pack_mm` where torch sees
the GPU. Each timing is the median over rounds of one program that goes through enough different
weights to leave the caches cold, called again before it has ended, so that neither Python nor a
launch is timed. Writes `results/gpu_quant.json` with ratios, and the crossover of fused and
decoded products for `lora_jax/quant/dispatch.json`.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

# Torch needs memory too. A graph of launches would let products that do not wait for each other
# run at the same time, and has no place for Pallas' kernels.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import jax
import jax.numpy as jnp
from common import report

from lora_jax.quant import QuantArray, matmul, quantize_array
from lora_jax.quant.array import coded
from lora_jax.quant.kernels import gpu

COLD_BYTES = 240 * 2**20  # four times an H200's second-level cache
GOALS = {
    "forward + dx / bfloat16": {2048: 1.18, 4096: 1.10, 8192: 1.06},
    "int4 speedup over bfloat16": {1: 2.5, 16: 2.5},
    "nf4 speedup over bfloat16": {1: 1.6, 16: 1.6},
    "decode / copy bandwidth": 0.75,
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      shapes: of matrices, (K, N).
      few, many: rows of `x`, with which the fused kernel is measured and with which it is not.
      rounds: of which the median is taken.
      backend: which kernels.
      cold: bytes of codes that no cache holds.
      products: the least number in a program of few rows.
      busy: seconds of a round.
    """

    shapes: tuple[tuple[int, int], ...] = ((4096, 14336), (8192, 28672))
    few: tuple[int, ...] = (1, 4, 16, 32, 64, 128, 256)
    many: tuple[int, ...] = (2048, 4096, 8192)
    rounds: int = 11
    backend: str = "gpu"
    cold: int = COLD_BYTES
    products: int = 18
    busy: float = 0.01


TINY = Sizes(((256, 128),), (1, 16), (32,), rounds=1, backend="gpu_interpret", cold=1, products=2)


def seconds(run: Callable, args: tuple, products: int, sizes: Sizes) -> float:
    """Median seconds of one product of a compiled `run`, which has `products` of them.

    The program is called again while it runs, as often as fills `sizes.busy` seconds.
    """
    jax.block_until_ready(run(*args))
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    calls = max(2, min(20, int(sizes.busy / (time.perf_counter() - start))))
    times = []
    for _ in range(sizes.rounds):
        start = time.perf_counter()
        for _ in range(calls):
            out = run(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls / products)
    return statistics.median(times)


def chained(f: Callable, loops: int) -> Callable:
    """`f` with one weight after the other inside one program, `loops` times over.

    Each product waits for the one before, with its weight too, so that XLA merges neither products
    nor the decodings of one weight, and each is an output, so that XLA leaves none of it out.
    """

    def run(x, weights: list):
        out = []
        for w in weights * loops:
            x, w = jax.lax.optimization_barrier((x, w))
            y = f(x, w)
            x, y = jax.lax.optimization_barrier((x, y))
            out.append(y)
        return out

    return run


def weights_of(k: int, n: int, form: str, sizes: Sizes) -> tuple[list, list[QuantArray]]:
    """Enough bfloat16 weights to leave the caches cold, and the same quantized."""
    count = max(2, -(-sizes.cold // (k * n // 2)))
    keys = jax.random.split(jax.random.key(0), count)
    dense = [jax.random.normal(key, (k, n), jnp.bfloat16) / 64 for key in keys]
    held = [dataclasses.replace(quantize_array(w, format=form), backend=sizes.backend)
            for w in dense]  # fmt: skip
    return dense, held


def ways(q: QuantArray, m: int, sizes: Sizes) -> dict[str, Callable]:
    """Products `(x, arrays of one weight) -> y`, by name."""
    interpret = sizes.backend.endswith("interpret")

    def fused(x, w: QuantArray, transposed=False):
        return gpu.matmul(x, coded(w), transposed=transposed, dtype=x.dtype, interpret=interpret)

    def decoded(x, w: QuantArray, transposed=False):
        name = "backward" if transposed else "forward"
        full = gpu.decode(coded(w), dtype=x.dtype, name=name, interpret=interpret)
        return x @ (full.T if transposed else full)

    def chosen(x, w: QuantArray):
        return matmul(x, w)

    out = {"decoded": decoded, "chosen": chosen}
    return out | ({"fused": fused} if m <= max(sizes.few) else {})


def product_rows(sizes: Sizes) -> list[dict]:
    rows = []
    for k, n in sizes.shapes:
        for form in ("nf4", "int4"):
            dense, held = weights_of(k, n, form, sizes)
            for m in (*sizes.few, *sizes.many):
                x = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)
                g = jax.random.normal(jax.random.key(2), (m, n), jnp.bfloat16)
                rows.append(one_row(form, m, x, g, dense, held, sizes))
                print(rows[-1], flush=True)
    return rows


def one_row(form: str, m: int, x, g, dense: list, held: list, sizes: Sizes) -> dict:
    """Forward of each way, and dx of the decoded and of the fused one, beside bfloat16."""
    k, n = dense[0].shape
    row = {"format": form, "K": k, "N": n, "rows": m}
    ours = ways(held[0], m, sizes)
    runs = {"bf16": (lambda x, w: x @ w, x, dense), "bf16_dx": (lambda g, w: g @ w.T, g, dense)}
    for name, f in ours.items():
        runs[name] = (f, x, held)
        if name != "chosen":
            runs[f"{name}_dx"] = (functools.partial(f, transposed=True), g, held)
    found = timings(runs, m, sizes)
    row |= {f"{name}_us": t * 1e6 for name, t in found.items()}
    row |= {f"{name}_over_bf16": found[name] / found["bf16"] for name in ours}
    row["forward_dx_over_bf16"] = (found["decoded"] + found["decoded_dx"]) / (
        found["bf16"] + found["bf16_dx"]
    )
    row["chosen_over_best"] = found["chosen"] / min(found[name] for name in ours)
    return row


def timings(runs: dict, m: int, sizes: Sizes) -> dict[str, float]:
    """Seconds of one product of each `(f, left, weights)`, all compiled before any is timed.

    Programs of many rows are compiled one after the other: XLA measures which algorithm is the
    fastest, and chose another one, up to an eighth slower, beside other compilations.
    """
    count = len(next(iter(runs.values()))[2])
    few = m <= max(sizes.few)
    loops = -(-sizes.products // count) if few else 1

    def compiled(run):
        f, left, weights = run
        return jax.jit(chained(f, loops)).lower(left, weights).compile()

    with ThreadPoolExecutor(len(runs) if few else 1) as pool:
        programs = dict(zip(runs, pool.map(compiled, runs.values()), strict=True))
    return {name: seconds(programs[name], runs[name][1:], loops * count, sizes) for name in runs}


def decode_rows(sizes: Sizes) -> list[dict]:
    """Bandwidth of decoding alone, against that of a copy."""
    rows = []
    for k, n in sizes.shapes:
        for form in ("nf4", "int4"):
            dense, held = weights_of(k, n, form, sizes)
            interpret = sizes.backend.endswith("interpret")

            def decode(x, w, interpret=interpret):
                return gpu.decode(coded(w), dtype=jnp.bfloat16, name="forward", interpret=interpret)

            one = jnp.ones((), jnp.bfloat16)
            runs = {"decode": (decode, one, held), "copy": (lambda x, w: w + x, one, dense)}
            found = timings(runs, max(sizes.many), sizes)
            ours, copied = found["decode"], found["copy"]
            moved = held[0].nbytes + k * n * 2
            rows.append({
                "format": form, "K": k, "N": n, "decode_us": ours * 1e6,
                "decode_gb_s": moved / ours / 1e9, "copy_gb_s": 4 * k * n / copied / 1e9,
                "decode_over_copy": (moved / ours) / (4 * k * n / copied),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def torch_rows(sizes: Sizes) -> list[dict]:
    """bitsandbytes and torch's int4 product on the same shapes; empty where they cannot run."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    rows = []
    for k, n in sizes.shapes:
        for m in (*sizes.few, *sizes.many):
            rows += [*_torch_dense(torch, k, n, m, sizes), *_bnb(torch, k, n, m, sizes)]
            if m <= max(sizes.few):  # beyond, it takes 20 times as long as a bfloat16 product
                rows += _tinygemm(torch, k, n, m, sizes)
            print(rows[-1], flush=True)
    return rows


def _cuda_seconds(torch, run: Callable, count: int, rounds: int) -> float:
    """Median of one call by CUDA's own clock; of short ones Python's launching is a part."""
    for i in range(count):
        run(i)
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(count):
            run(i)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / count)
    return statistics.median(times)


def _torch_dense(torch, k: int, n: int, m: int, sizes: Sizes) -> list[dict]:
    count = max(2, -(-sizes.cold // (k * n // 2)))
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    held = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") / 64 for _ in range(count)]
    product = _cuda_seconds(
        torch, lambda i: torch.nn.functional.linear(x, held[i]), count, sizes.rounds
    )
    base = {"peer": "torch " + torch.__version__, "format": "bfloat16", "K": k, "N": n, "rows": m}
    return [base | {"product_us": product * 1e6}]


def _bnb(torch, k: int, n: int, m: int, sizes: Sizes) -> list[dict]:
    if importlib.util.find_spec("bitsandbytes") is None:
        return []
    import bitsandbytes as bnb

    count = max(2, -(-sizes.cold // (k * n // 2)))
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    held = [
        bnb.functional.quantize_4bit(
            torch.randn(n, k, dtype=torch.bfloat16, device="cuda") / 64, quant_type="nf4"
        )
        for _ in range(count)
    ]
    product = _cuda_seconds(
        torch, lambda i: bnb.matmul_4bit(x, held[i][0].t(), held[i][1]), count, sizes.rounds
    )
    decode = _cuda_seconds(
        torch, lambda i: bnb.functional.dequantize_4bit(*held[i]), count, sizes.rounds
    )
    base = {"peer": "bitsandbytes " + bnb.__version__, "format": "nf4", "K": k, "N": n, "rows": m}
    return [base | {"product_us": product * 1e6, "decode_us": decode * 1e6}]


def _tinygemm(torch, k: int, n: int, m: int, sizes: Sizes) -> list[dict]:
    count = max(2, -(-sizes.cold // (k * n // 2)))
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    codes = torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, device="cuda")
    held = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in range(count)]
    scales = torch.ones(k // 64, n, 2, dtype=torch.bfloat16, device="cuda")
    product = _cuda_seconds(
        torch,
        lambda i: torch.ops.aten._weight_int4pack_mm(x, held[i], 64, scales),
        count,
        sizes.rounds,
    )
    base = {"peer": "torch " + torch.__version__, "format": "int4", "K": k, "N": n, "rows": m}
    return [base | {"product_us": product * 1e6}]


def crossover(rows: list[dict]) -> list[dict]:
    """For each format and shape the most rows at which the fused kernel still wins."""
    out = []
    for form, n in sorted({(r["format"], r["N"]) for r in rows}):
        own = [r for r in rows if (r["format"], r["N"]) == (form, n) and "fused_us" in r]
        wins = [r["rows"] for r in own if r["fused_us"] <= r["decoded_us"]]
        out.append({"format": form, "N": n, "fused_rows": max(wins, default=0)})
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small shapes, interpreted on a CPU")
    options = parser.parse_args()
    sizes = TINY if options.tiny else Sizes()
    if not options.tiny and jax.default_backend() != "gpu":
        raise SystemExit("this benchmark is for a GPU; `--tiny` runs it on a CPU")
    decode, rows = decode_rows(sizes), product_rows(sizes)
    peers = torch_rows(sizes)
    if not options.tiny:
        report("gpu_quant", "Products with a quantized weight, as ratios to bfloat16", rows,
               decode=decode, peers=peers, crossover=crossover(rows), goals=GOALS)  # fmt: skip


if __name__ == "__main__":
    main()
