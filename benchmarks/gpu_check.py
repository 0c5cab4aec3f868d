"""Are the kernels and cuDNN's attention right on this GPU? To be run before anything is timed.

    python benchmarks/gpu_check.py            on a GPU
    python benchmarks/gpu_check.py --tiny     the kernels interpreted on a CPU: does it run at all

Decoding is compared with the reference's bits, fused products and attention (with its gradients)
with float64 and float32 on the host or at the highest precision. Prints a line for each case and
fails where one is wrong.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import quant
from lora_jax.quant.array import coded
from lora_jax.quant.formats import decode
from lora_jax.quant.kernels import gpu

MOST_ERROR = 1e-2  # of 16-bit operands, as a ratio of norms
# inputs, outputs, block, whether scales are quantized: odd numbers of superblocks, few columns
SHAPES = (
    (1408, 512, 64, False), (4096, 1040, 64, False), (256, 4096, 16, False),
    (1024, 384, 128, False), (512, 256, 32, True), (512, 48, 64, False), (4096, 14336, 64, False),
)  # fmt: skip
ROWS = (1, 40)
# tokens, query heads, key heads, size of a head, dtype
ATTENTION = (
    (2048, 32, 8, 128, "bfloat16"), (1000, 9, 3, 64, "bfloat16"), (129, 4, 2, 64, "bfloat16"),
    (200, 4, 4, 96, "float16"),
)  # fmt: skip


def distance(got, want) -> float:
    """`|got - want| / |want|`; NaN where there is one."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def weight_case(form: str, case: tuple, interpret: bool) -> dict[str, float]:
    """Errors of decoding (any difference counts as infinite) and of fused products."""
    k, n, block, double = case
    w = jax.random.normal(jax.random.key(k + n), (k, n)) / 8
    q = quant.quantize_array(w, format=form, block_size=block, double_quant=double)
    held = coded(q)
    host = coded(jax.tree.map(lambda a: jax.device_put(a, jax.devices("cpu")[0]), q))
    want = np.asarray(decode(host, jnp.bfloat16), np.float32)
    got = gpu.decode(held, dtype=jnp.bfloat16, name="forward", interpret=interpret)
    errors = {"decode": 0.0 if np.array_equal(np.float32(got), want) else np.inf}
    if gpu.fused_obstacle(held.form, block, q.packed.shape, jnp.bfloat16):
        return errors
    for rows in ROWS:
        x = jax.random.normal(jax.random.key(rows), (rows, want.shape[0]), jnp.bfloat16)
        y = gpu.matmul(x, held, transposed=False, dtype=jnp.float32, interpret=interpret)
        errors[f"{rows} rows"] = distance(y, np.float64(np.float32(x)) @ np.float64(want))
    return errors


def attend(arrays, cotangent, implementation: str):
    """Attention and its gradients."""
    f = functools.partial(jax.nn.dot_product_attention, is_causal=True,
                          implementation=implementation)  # fmt: skip
    y, back = jax.vjp(f, *arrays)
    return y, *back(cotangent.astype(y.dtype))


def attention_case(case: tuple) -> dict[str, float]:
    tokens, heads, kept, size, dtype = case
    keys = jax.random.split(jax.random.key(tokens), 4)
    sizes = (heads, kept, kept, heads)
    *arrays, g = (jax.random.normal(key, (2, tokens, count, size), dtype)
                  for key, count in zip(keys, sizes, strict=True))  # fmt: skip
    run = jax.jit(attend, static_argnums=2)
    with jax.default_matmul_precision("highest"):
        want = run([x.astype("float32") for x in arrays], g, "xla")
    found = run(arrays, g, "cudnn")
    names = ("y", "dq", "dk", "dv")
    return {n: distance(np.float32(a), b) for n, a, b in zip(names, found, want, strict=True)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small shapes, interpreted on a CPU")
    tiny = parser.parse_args().tiny
    if not tiny and jax.default_backend() != "gpu":
        raise SystemExit("this check is for a GPU; `--tiny` runs it on a CPU")
    shapes = [(256, 32, 16, False), (128, 16, 32, True)] if tiny else SHAPES
    cases = [
        (f"{form} {shape}", functools.partial(weight_case, form, shape, tiny))
        for form in ("nf4", "fp4", "int4", "uint4", "int8")
        for shape in shapes
        if not (shape[-1] and form in ("int4", "uint4"))
    ]
    if not tiny:
        cases += [(f"attention {c}", functools.partial(attention_case, c)) for c in ATTENTION]
    wrong = []
    for name, run in cases:
        errors = run()
        print(name, {key: f"{error:.1e}" for key, error in errors.items()}, flush=True)
        if not all(error < MOST_ERROR for error in errors.values()):
            wrong.append(name)
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
