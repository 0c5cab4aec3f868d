"""Which kernel multiplies few rows fastest? Candidates for `lora_jax/quant/kernels/gpu.py`.

    python benchmarks/gpu_kernels.py [--inputs 4096 --outputs 14336] [--formats nf4 int4]
    python benchmarks/gpu_kernels.py --compile     for an H200 that is not there, as `make aot`

The fused kernel of the library loses to decoding first with NF4, and with int4 to a bfloat16 weight
(`results/gpu_quant.json`). Its machine code shows a likely cause for NF4: the compiler's
pipelining turns the look-up of every weight into an asynchronous copy into shared memory and a
load from there. The candidates have neither; none was run on a GPU yet:

- `vector`: no tensor cores, for 1 row. Products of several rows of a block are added up before
  they are multiplied by its scale: 7.5 instructions a weight, no barrier.
- `tile`: tensor cores, for 16 or more rows: 5.5 instructions a weight, as few as those of the
  library's kernel with int4. Scales multiply the sums of a block, not its weights.
- `decode`: decoding without a table in memory, 8.6 instructions a weight; the library's has 7.6,
  of which one loads from the table.

Codes become bfloat16 by a look-up in registers: PRMT takes bytes out of a table of 8 by the codes
themselves, twice for the two halves of 16 and for the two bytes of a value. Prints each candidate
with its error against decoding first, sorts them, and writes `results/gpu_kernels.json`.
"""

import argparse
import functools
import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor

if "--compile" in sys.argv:
    import aot_targets  # sets the environment: before jax
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from common import report
from gpu_quant import Sizes, chained, seconds
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lora_jax.quant import formats, quantize_array

BLOCK = 64
MOST_ERROR = 1e-2  # the codebook in bfloat16, as the weights are when decoded first


def lookup_text(codebook, slab: int) -> str:
    """PTX from four bytes, of two codes each, to the bfloat16 values of the low or high codes."""
    bits = np.asarray(codebook, jnp.bfloat16).view(np.uint16)
    tables = {"h": bits >> 8, "l": bits & 255}
    moves = ""
    for plane, values in tables.items():
        words = values.astype(np.uint8).view(np.uint32)
        moves += "".join(f"mov.b32 t{plane}{i}, 0x{w:08x}; " for i, w in enumerate(words))

    # Of the codes of two bytes (low, high, low, high) the two low ones, or the two high ones, go to
    # one register, as the tensor cores take them.
    chosen = ("0x6240", "0x7351")[slab]

    def half(result: int) -> str:
        found = "".join(
            f"prmt.b32 a, t{p}0, t{p}1, s; prmt.b32 b, t{p}2, t{p}3, s; prmt.b32 {p}, a, b, m; "
            for p in "hl"
        )
        return found + f"prmt.b32 ${result}, l, h, {chosen}; "

    registers = "s, m, a, b, h, l, th0, th1, th2, th3, tl0, tl1, tl2, tl3"
    # `s` has the low three bits of each code, `m` chooses between the halves by the fourth.
    return (
        f"{{ .reg .b32 {registers}; {moves}"
        "and.b32 s, $2, 0x77777777; and.b32 m, $2, 0x88888888; shr.u32 m, m, 1; "
        f"or.b32 m, m, 0x32103210; {half(0)}"
        f"shr.u32 s, s, 16; shr.u32 m, m, 16; {half(1)} }}"
    )


def slabs(codes, form: formats.Format) -> list:
    """The bfloat16 values of the low and of the high codes."""
    like = jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)
    # One call for each: JAX lowers one result. The assembler merges what both compute.
    return [
        triton.elementwise_inline_asm(
            lookup_text(form.codebook, slab), args=[codes], constraints="=r,=r,r", pack=4,
            result_shape_dtypes=[like],
        )[0]
        for slab in range(2)
    ]  # fmt: skip


def multiply_add(a, b, c):
    """`a · b + c`, rounded once. Written as two operations, the compiler may not join them."""
    args = [jnp.broadcast_to(x, c.shape) for x in (a, b, c)]
    (out,) = triton.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;", args=args, constraints="=f,f,f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(c.shape, jnp.float32)],
    )  # fmt: skip
    return out


def call(kernel, *, warps: int, stages: int, **options):
    params = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(kernel, compiler_params=params, **options)


def vector(x, packed, scale, *, form, supers: int, groups: int, columns: int, splits: int,
           warps: int):  # fmt: skip
    """`x (M, K) · w` with M of 1 or little more; `supers` superblocks a step.

    A thread has one row of each of the `groups` of a block and adds their products up before they
    are multiplied by the block's scale.
    """
    (m, _), n = x.shape, packed.shape[1]
    count = packed.shape[0] // BLOCK
    steps, size = count // supers // splits, BLOCK // groups

    def kernel(x_ref, packed_ref, scale_ref, out_ref):
        first = pl.program_id(1) * steps
        zero = jnp.zeros((supers, size, columns), jnp.float32)

        def body(i, sums):
            at = pl.ds((first + i) * supers, supers)
            added = [[zero] * m, [zero] * m]
            for g in range(groups):
                rows = pl.ds(g * size, size)
                for h, slab in enumerate(slabs(packed_ref[at, rows, :], form)):
                    w = slab.astype(jnp.float32)
                    for r in range(m):
                        left = x_ref[r, at, h, rows].astype(jnp.float32)[:, :, None]
                        added[h][r] = multiply_add(left, w, added[h][r])
            for h in range(2):
                s = scale_ref[at, h, :].astype(jnp.float32)[:, None, :]
                sums = tuple(map(functools.partial(multiply_add, s), added[h], sums))
            return sums

        for r, total in enumerate(lax.fori_loop(0, steps, body, (zero,) * m)):
            out_ref[r, :] = jnp.sum(jnp.sum(total, axis=0), axis=0)

    parts = call(
        kernel, warps=warps, stages=1, grid=(n // columns, splits),
        in_specs=[
            pl.BlockSpec((m, count, 2, BLOCK), lambda j, s: (0, 0, 0, 0)),
            pl.BlockSpec((count, BLOCK, columns), lambda j, s: (0, 0, j)),
            pl.BlockSpec((count, 2, columns), lambda j, s: (0, 0, j)),
        ],
        out_specs=pl.BlockSpec((None, m, columns), lambda j, s: (s, 0, j)),
        out_shape=jax.ShapeDtypeStruct((splits, m, n), jnp.float32),
    )(x.reshape(m, count, 2, BLOCK), packed.reshape(count, BLOCK, n),
      scale.reshape(count, 2, n))  # fmt: skip
    return jnp.sum(parts, axis=0).astype(x.dtype)


def tile(x, packed, scale, *, form, columns: int, splits: int, warps: int, stages: int,
         ahead: bool):  # fmt: skip
    """`x (M, K) · w` with M of 16 or 64; `ahead` loads a step's codes during the one before."""
    (m, k), n = x.shape, packed.shape[1]
    count = packed.shape[0] // BLOCK
    steps = count // splits

    def kernel(x_ref, packed_ref, scale_ref, out_ref):
        first = pl.program_id(1) * steps

        def load(j):
            return (
                packed_ref[pl.ds(j * BLOCK, BLOCK), :],
                scale_ref[2 * j, :],
                scale_ref[2 * j + 1, :],
            )

        def add(total, j, codes, *scales):
            for h, slab in enumerate(slabs(codes, form)):
                left = x_ref[:, pl.ds((2 * j + h) * BLOCK, BLOCK)]
                part = jnp.dot(left, slab, preferred_element_type=jnp.float32)
                total = multiply_add(part, scales[h].astype(jnp.float32)[None, :], total)
            return total

        def body(i, carry):
            total, loaded = carry
            j = first + i
            following = load(jnp.minimum(j + 1, count - 1)) if ahead else None
            return add(total, j, *(loaded if ahead else load(j))), following

        start = jnp.zeros((m, columns), jnp.float32)
        out_ref[...], _ = lax.fori_loop(0, steps, body, (start, load(first) if ahead else None))

    parts = call(
        kernel, warps=warps, stages=stages, grid=(n // columns, splits),
        in_specs=[
            pl.BlockSpec((m, k), lambda j, s: (0, 0)),
            pl.BlockSpec((count * BLOCK, columns), lambda j, s: (0, j)),
            pl.BlockSpec((2 * count, columns), lambda j, s: (0, j)),
        ],
        out_specs=pl.BlockSpec((None, m, columns), lambda j, s: (s, 0, j)),
        out_shape=jax.ShapeDtypeStruct((splits, m, n), jnp.float32),
    )(x, packed, scale)  # fmt: skip
    return jnp.sum(parts, axis=0).astype(x.dtype)


def decode(x, packed, scale, *, form, rows: int, columns: int, warps: int):
    """The matrix, `rows` of a block by `columns` at a time; `x` is not used."""
    count, n = packed.shape[0] // BLOCK, packed.shape[1]

    def kernel(packed_ref, scale_ref, out_ref):
        for h, slab in enumerate(slabs(packed_ref[...], form)):
            w = slab.astype(jnp.float32) * scale_ref[h, :].astype(jnp.float32)[None, :]
            out_ref[h] = w.astype(x.dtype)

    return call(
        kernel, warps=warps, stages=1, grid=(count, BLOCK // rows, n // columns),
        in_specs=[
            pl.BlockSpec((None, rows, columns), lambda s, r, j: (s, r, j)),
            pl.BlockSpec((None, 2, columns), lambda s, r, j: (s, 0, j)),
        ],
        out_specs=pl.BlockSpec((None, 2, rows, columns), lambda s, r, j: (s, 0, r, j)),
        out_shape=jax.ShapeDtypeStruct((count, 2, BLOCK, n), x.dtype),
    )(packed.reshape(count, BLOCK, n), scale.reshape(count, 2, n)).reshape(-1, n)  # fmt: skip


# What compiles well for an H200: no spills, no barrier in the loop of `vector`, few instructions.
VECTOR = (
    dict(supers=1, groups=4, columns=64, warps=4), dict(supers=1, groups=4, columns=128, warps=8),
    dict(supers=2, groups=4, columns=64, warps=8),
)  # fmt: skip
TILE = {
    16: ((64, 4, 1), (64, 4, 3), (128, 8, 1), (128, 8, 3), (128, 4, 1)),
    64: ((64, 4, 1), (64, 4, 3), (128, 8, 1), (128, 8, 3), (128, 4, 3)),
}  # rows of x: (columns, warps, stages)


def candidates(inputs: int, outputs: int) -> list[tuple]:
    """`(kernel, rows of x, options)` of what may fill an H200."""
    supers = inputs // (2 * BLOCK)

    def fills(columns: int, splits: int, step: int = 1) -> bool:
        return supers % (step * splits) == 0 and 400 <= outputs // columns * splits <= 2700

    out: list[tuple] = [
        (vector, 1, options | dict(splits=splits))
        for options, splits in itertools.product(VECTOR, (1, 2, 4, 8))
        if fills(options["columns"], splits, options["supers"])
    ]
    for rows, tiles in TILE.items():
        for (columns, warps, stages), splits in itertools.product(tiles, (2, 4, 8)):
            if fills(columns, splits):
                how = dict(columns=columns, splits=splits, warps=warps, stages=stages)
                out.append((tile, rows, how | dict(ahead=stages == 1)))
    return [*out, (decode, 1, dict(rows=32, columns=128, warps=4))]


def measured(form: formats.Format, inputs: int, outputs: int, sizes: Sizes) -> list[dict]:
    """Microseconds and error of each candidate, in order."""
    count = max(2, -(-sizes.cold // (inputs * outputs // 2)))
    keys = jax.random.split(jax.random.key(0), count)
    held = [
        quantize_array(jax.random.normal(key, (inputs, outputs), jnp.bfloat16) / 64,
                       format=form.name, block_size=BLOCK)
        for key in keys
    ]  # fmt: skip
    weights, full = [(q.packed, q.scale) for q in held], held[0].dequantize()
    cases = candidates(inputs, outputs)

    def compiled(case):
        kernel, rows, options = case
        x = jax.random.normal(jax.random.key(rows), (rows, inputs), jnp.bfloat16)
        f = functools.partial(kernel, form=form, **options)
        loops = 1 if kernel is decode else -(-sizes.products // count)
        chain = jax.jit(chained(lambda x, w: f(x, *w), loops)).lower(x, weights).compile()
        return x, loops, jax.jit(f).lower(x, *weights[0]).compile(), chain

    rows = []
    with ThreadPoolExecutor() as pool:
        for (kernel, m, options), found in zip(cases, pool.map(compiled, cases), strict=True):
            x, loops, once, chain = found
            want = np.float32(full if kernel is decode else x @ full)
            error = np.linalg.norm(np.float32(once(x, *weights[0])) - want) / np.linalg.norm(want)
            time = seconds(chain, (x, weights), loops * count, sizes)
            rows.append({"format": form.name, "K": inputs, "N": outputs, "kernel": kernel.__name__,
                         "rows": m, "us": time * 1e6, "error": float(error),
                         "options": options})  # fmt: skip
            print(rows[-1], flush=True)  # a lease may end before the table
    return sorted(rows, key=lambda r: (r["kernel"], r["rows"], r["us"]))


def compile_all(form: formats.Format, inputs: int, outputs: int) -> None:
    """Compiles each candidate for an H200, ahead of time."""
    w = jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16)
    q = jax.eval_shape(lambda w: quantize_array(w, format=form.name, block_size=BLOCK), w)
    cases = candidates(inputs, outputs)
    for kernel, rows, options in cases:
        x = jax.ShapeDtypeStruct((rows, inputs), jnp.bfloat16)
        aot_targets.compiled(functools.partial(kernel, form=form, **options), x, q.packed, q.scale)
    print(f"{form.name}: {len(cases)} candidates compile")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=14336)
    parser.add_argument("--formats", nargs="+", default=["nf4", "int4"])
    parser.add_argument("--compile", action="store_true", help="ahead of time, for an H200")
    options = parser.parse_args()
    forms = [formats.known_format(name) for name in options.formats]
    if options.compile:
        for form in forms:
            compile_all(form, options.inputs, options.outputs)
        return
    if jax.default_backend() != "gpu":
        raise SystemExit("this benchmark is for a GPU; `--compile` does without")
    rows = []
    for form in forms:
        rows += measured(form, options.inputs, options.outputs, Sizes(rounds=7))
    report("gpu_kernels", "Which kernel multiplies few rows fastest?", rows)
    if wrong := [row for row in rows if not row["error"] < MOST_ERROR]:
        raise SystemExit(f"wrong: {wrong}")


if __name__ == "__main__":
    main()
