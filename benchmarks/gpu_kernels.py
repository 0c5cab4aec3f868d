"""Which kernel multiplies few rows fastest? Candidates for `lora_jax/quant/kernels/gpu.py`.

    python benchmarks/gpu_kernels.py [--inputs 4096 --outputs 14336] [--formats nf4 int4]
    python benchmarks/gpu_kernels.py --compile     for an H200 that is not there, as `make aot`

The kernel that is there loses to decoding first with NF4, and with int4 to a bfloat16 weight
(`results/gpu_quant.json`). It was not profiled; probably each step of its loop waits for its
loads, of which NF4 has one more for every weight, into a table. The candidates compile for an H200
and are right when interpreted, but none was run on one yet:

- `vector`: no tensor cores, for 1 to 4 rows. Several superblocks a step, so that more loads are
  under way; partial sums stay in registers until the end.
- `tile`: tensor cores, for 16 or more rows. Scales multiply the sums of a block, not its weights.
- `decode`: the shipped decoding in other tiles.

Codes become bfloat16 by a look-up in registers: PRMT takes bytes out of a table of 8 by the codes
themselves, twice for the two halves of 16 and for the two bytes of a value. Prints the fastest of
each kind with its error against decoding first, and writes `results/gpu_kernels.json`.
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


def lookup_text(codebook) -> str:
    """PTX from four bytes, of two codes each, to four pairs of bfloat16 values."""
    bits = np.asarray(codebook, jnp.bfloat16).view(np.uint16)
    tables = {"h": bits >> 8, "l": bits & 255}
    moves = ""
    for plane, values in tables.items():
        words = values.astype(np.uint8).view(np.uint32)
        moves += "".join(f"mov.b32 t{plane}{i}, 0x{w:08x}; " for i, w in enumerate(words))

    def half(first: int, second: int) -> str:
        found = "".join(
            f"prmt.b32 a, t{p}0, t{p}1, s; prmt.b32 b, t{p}2, t{p}3, s; prmt.b32 {p}, a, b, m; "
            for p in "hl"
        )
        return found + f"prmt.b32 ${first}, l, h, 0x5140; prmt.b32 ${second}, l, h, 0x7362; "

    registers = "s, m, a, b, h, l, th0, th1, th2, th3, tl0, tl1, tl2, tl3"
    # `s` has the low three bits of each code, `m` chooses between the halves by the fourth.
    return (
        f"{{ .reg .b32 {registers}; {moves}"
        "and.b32 s, $4, 0x77777777; and.b32 m, $4, 0x88888888; shr.u32 m, m, 1; "
        f"or.b32 m, m, 0x32103210; {half(0, 1)}"
        f"shr.u32 s, s, 16; shr.u32 m, m, 16; {half(2, 3)} }}"
    )


def pairs(codes, form: formats.Format):
    """int32 of each byte: the low code's bfloat16 below the high code's."""
    like = jax.ShapeDtypeStruct(codes.shape, jnp.int32)
    (out,) = triton.elementwise_inline_asm(
        lookup_text(form.codebook), args=[codes], constraints="=r,=r,=r,=r,r", pack=4,
        result_shape_dtypes=[like],
    )  # fmt: skip
    return out


def float32_slabs(codes, form: formats.Format) -> tuple:
    both = pairs(codes, form)
    as_float = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.float32)
    return as_float(both << 16), as_float(both & jnp.int32(-65536))


def bfloat16_slabs(codes, form: formats.Format) -> tuple:
    both = pairs(codes, form)
    return tuple(
        lax.bitcast_convert_type(half.astype(jnp.int16), jnp.bfloat16)
        for half in (both, both >> 16)
    )


def call(kernel, *, warps: int, stages: int, **options):
    params = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(kernel, compiler_params=params, **options)


def vector(x, packed, scale, *, form, supers: int, columns: int, splits: int, warps: int):
    """`x (M, K) · w` with M of 1, 2 or 4; `supers` superblocks a step."""
    (m, _), n = x.shape, packed.shape[1]
    count = packed.shape[0] // BLOCK
    steps = count // supers // splits

    def kernel(x_ref, packed_ref, scale_ref, out_ref):
        first = pl.program_id(1) * steps

        def body(i, sums):
            at = pl.ds((first + i) * supers, supers)
            slabs = float32_slabs(packed_ref[at], form)
            for h, slab in enumerate(slabs):
                w = slab * scale_ref[at, h, :].astype(jnp.float32)[:, None, :]
                left = [x_ref[r, at, h, :].astype(jnp.float32)[:, :, None] for r in range(m)]
                sums = tuple(total + each * w for total, each in zip(sums, left, strict=True))
            return sums

        start = (jnp.zeros((supers, BLOCK, columns), jnp.float32),) * m
        for r, total in enumerate(lax.fori_loop(0, steps, body, start)):
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
            for h, slab in enumerate(bfloat16_slabs(codes, form)):
                left = x_ref[:, pl.ds((2 * j + h) * BLOCK, BLOCK)]
                part = jnp.dot(left, slab, preferred_element_type=jnp.float32)
                total = total + part * scales[h].astype(jnp.float32)[None, :]
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
        for h, slab in enumerate(float32_slabs(packed_ref[...], form)):
            out_ref[h] = (slab * scale_ref[h, :].astype(jnp.float32)[None, :]).astype(x.dtype)

    return call(
        kernel, warps=warps, stages=1, grid=(count, BLOCK // rows, n // columns),
        in_specs=[
            pl.BlockSpec((None, rows, columns), lambda s, r, j: (s, r, j)),
            pl.BlockSpec((None, 2, columns), lambda s, r, j: (s, 0, j)),
        ],
        out_specs=pl.BlockSpec((None, 2, rows, columns), lambda s, r, j: (s, 0, r, j)),
        out_shape=jax.ShapeDtypeStruct((count, 2, BLOCK, n), x.dtype),
    )(packed.reshape(count, BLOCK, n), scale.reshape(count, 2, n)).reshape(-1, n)  # fmt: skip


def candidates(inputs: int, outputs: int) -> list[tuple]:
    """`(kernel, rows of x, options)` of what may fill an H200 and spare its registers."""
    out, supers = [], inputs // (2 * BLOCK)

    def fills(columns: int, splits: int) -> bool:
        return supers % splits == 0 and 400 <= outputs // columns * splits <= 2700

    for rows, s, c, w, p in itertools.product(
        (1, 4), (1, 2, 4), (32, 64, 128), (4, 8), (1, 2, 4, 8)
    ):
        registers = s * BLOCK * c // (32 * w)
        if fills(c, p) and supers % (s * p) == 0 and 16 <= registers and registers * rows <= 64:
            out.append((vector, rows, dict(supers=s, columns=c, splits=p, warps=w)))
    for rows, c, w, stages, p in itertools.product(
        (16, 64), (32, 64, 128), (4, 8), (1, 3), (2, 4, 8)
    ):
        if fills(c, p) and c * rows >= 128 * w:
            how = dict(columns=c, splits=p, warps=w, stages=stages, ahead=stages == 1)
            out.append((tile, rows, how))
    for rows, c, w in ((64, 128, 4), (32, 128, 4), (16, 256, 4), (32, 256, 8), (8, 512, 4)):
        out.append((decode, 1, dict(rows=rows, columns=c, warps=w)))
    return out


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
