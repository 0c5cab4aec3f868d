"""Cases of weights made of weights: sums, products, permutations, copies, norms, complex numbers.

None of them may form `W + s·A·B`; `test_low_rank_forms` looks for it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.laws.case import Case, features, normal

# Closed over by the models, as masks and permutations are.
COLUMNS = np.array([1, 0, 2, 3, 5, 4])
ROWS = np.array([3, 1, 2, 0, 7, 6, 5, 4])
PLACES = np.array([7, 2, 5, 1], np.int32)
MASK = np.asarray(normal(50, 8, 6))


def _many(fn, **shapes):
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    return lambda: (fn, params, (features(),))


def _one(fn, *shape: int):
    return _many(lambda p, x: fn(p["w"], x), w=shape or (8, 6))


def _spectra(fn, *shape: int):
    """A model of complex numbers, of the least precision that Fourier transforms have."""

    def wide(w, x):
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        y = fn(w.astype(dtype), x.astype(dtype))
        return (y.real + y.imag).astype(x.dtype)

    return _one(wide, *shape)


def _heads(equation: str, axis: int):
    """A weight whose heads are repeated for their groups."""
    return lambda w, x: jnp.einsum(equation, x, jnp.repeat(w, 2, axis=axis))


def _repeated_inputs(w, x):
    return jnp.einsum("bthk,hkd->btd", x.reshape(2, 5, 4, 2), jnp.repeat(w, 2, axis=0))


def _absorbed(p, x):
    """Latent attention: the queries' and the keys' projections of a head, one matrix."""
    return jnp.einsum("btd,dhc->bthc", x, jnp.einsum("dhk,chk->dhc", p["q"], p["k"]))


def _mean_of_experts(w, x):
    return x @ w.mean(0) + jnp.tanh(x @ w[0])


def _branches(p, x):
    """A weight, a sum of two, and one without an adapter."""
    branches = [lambda: p["frozen"], lambda: 2 * p["w"], lambda: p["w"] + p["v"]]
    return x @ lax.switch(jnp.argmax(x[0, 0]) % 3, branches)


def _complex(p, x):
    return jnp.abs((x + 1j * x[..., ::-1]) @ lax.complex(p["re"], p["im"]))


def _imaginary_part(p, x):
    return x @ ((p["re"] + 1j * p["im"]).conj() * (1 - 3j)).imag


def _standardised(w, x):
    return x @ ((w - w.mean(0)) * lax.rsqrt(w.var(0) + 1e-5))


def _normalised(w, x):
    return x @ (w * lax.rsqrt(jnp.mean(jnp.square(w), 1, keepdims=True) + 1e-5))


IO = {"w": "io"}

CASES = (
    Case("permuted_columns", _one(lambda w, x: x @ w[:, COLUMNS]), IO),
    Case("permuted_rows", _one(lambda w, x: x @ jnp.take(w, ROWS, axis=0)), IO),
    Case("permuted_by_a_parameter", _many(lambda p, x: x @ p["w"][:, jnp.argsort(p["order"])],
                                          w=(8, 6), order=(6,)), IO),
    Case("chosen_columns", _one(lambda w, x: x @ w[:, np.array([0, 0, 5])]), IO),
    Case("gains_by_einsum", _many(lambda p, x: x @ jnp.einsum("do,o->do", p["w"], p["gain"]),
                                  w=(8, 6), gain=(6,)), IO),
    Case("gains_of_members_by_einsum", _many(lambda p, x: jnp.einsum(
        "btd,edo->ebto", x, jnp.einsum("do,eo->edo", p["w"], p["gain"])), w=(8, 6), gain=(3, 6)),
        IO),
    Case("gains_of_examples", _one(lambda w, x: jnp.einsum(
        "btd,bdo->bto", x, w * x.mean(1)[:, :, None])), IO),
    Case("plus_a_constant", _one(lambda w, x: x @ (w + MASK)), IO),
    Case("plus_a_parameter", _many(lambda p, x: x @ (p["frozen"] - p["w"]), w=(8, 6),
                                   frozen=(8, 6)), IO, linear=("w", "frozen")),
    Case("plus_a_row", _one(lambda w, x: x @ (2.0 - w + MASK[0])), IO),
    Case("plus_experts", _many(lambda p, x: jnp.einsum(
        "btd,edf->btef", x, p["w"][None] + p["own"]), w=(8, 6), own=(3, 8, 6)), IO,
        linear=("w", "own")),
    Case("sum_of_transposed", _many(lambda p, x: x @ (p["w"] - p["v"].T), w=(8, 6), v=(6, 8)),
         IO | {"v": "oi"}),
    Case("product_with_a_parameter", _many(lambda p, x: x @ (p["w"] @ p["frozen"]), w=(8, 7),
                                           frozen=(7, 6)), {"w": "oi"}, linear=("w", "frozen")),
    Case("product_absorbed", _many(_absorbed, q=(8, 2, 5), k=(7, 2, 5)), {"q": "osi", "k": "osi"}),
    Case("heads_repeated_first", _one(_heads("btd,hkd->bthk", 0), 2, 3, 8), {"w": "ooi"}),
    Case("heads_repeated_inputs", _one(_repeated_inputs, 2, 2, 6), {"w": "iio"}),
    Case("cumsum_outputs", _one(lambda w, x: x @ jnp.cumsum(w, 1)), IO),
    Case("cumsum_inputs", _one(lambda w, x: x @ lax.cumsum(w, 0, reverse=True)), IO),
    Case("fourier_inputs", _spectra(lambda w, x: x @ jnp.fft.fft(w, axis=0)), IO),
    Case("fourier_outputs", _spectra(lambda w, x: jnp.fft.irfft(x @ jnp.fft.rfft(w, 7), 7)), IO),
    Case("fourier_both", _spectra(lambda w, x: jnp.fft.fft(x) @ jnp.fft.rfft2(w)), IO),
    Case("fourier_two_inputs", _spectra(lambda w, x: jnp.einsum(
        "btij,ijo->bto", x.reshape(2, 5, 4, 2), jnp.fft.rfft2(w, axes=(0, 1))), 4, 2, 6),
        {"w": "iio"}),
    Case("fourier_smoothed", _spectra(lambda w, x: x @ jnp.fft.irfft(
        jnp.fft.rfft(w, axis=0)[:3], 8, axis=0)), IO),
    Case("mean_of_outputs", _one(lambda w, x: x @ w.mean(1)), IO),
    Case("sum_of_heads", _one(lambda w, x: x @ w.sum(1), 8, 2, 6), {"w": "ioo"}),
    Case("mean_of_experts", _one(_mean_of_experts, 3, 8, 6), {"w": "sio"},
         config={"roles": {"w": "sio"}}),
    Case("complex_of_two", _many(_complex, re=(8, 6), im=(8, 6)), {"re": "io", "im": "io"}),
    Case("complex_cast", _one(lambda w, x: jnp.abs(x @ (w.astype(jnp.complex64) * (1 + 2j)))), IO,
         numerical=False),
    Case("complex_parts", _many(_imaginary_part, re=(8, 6), im=(8, 6)),
         {"re": "io", "im": "io"}, config={"rank": 1}),
    Case("norm_frobenius", _one(lambda w, x: x @ (w / jnp.sqrt(jnp.sum(w**2)))), IO),
    Case("norm_of_rows", _one(_normalised), IO),
    Case("norm_standardised", _one(_standardised), IO),
    Case("branches_of_three", _many(_branches, w=(8, 6), v=(8, 6), frozen=(8, 6)),
         IO | {"v": "io"}, linear=("w", "v", "frozen"), dropout=False),
    Case("loop_scales", _one(lambda w, x: x @ lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 0.5), (0, w))[1]), IO, reverse=False),
    Case("loop_transposes", _one(lambda w, x: x @ lax.fori_loop(
        0, 3, lambda i, w: w.T + 1, w), 8, 8), {"w": "oi"}),
    Case("loop_over_copies", _one(lambda w, x: lax.scan(
        lambda c, w: (jnp.tanh(c @ w), None), x, jnp.broadcast_to(w, (3, 8, 8)))[0], 8, 8), IO),
    Case("row_written", _one(lambda w, x: x @ w.at[2].set(1.5)), IO),
    Case("column_written", _many(lambda p, x: x @ p["w"].at[:, 2].set(p["column"]), w=(8, 6),
                                 column=(8,)), IO),
    Case("row_of_features_written", _one(
        lambda w, x: x @ w.at[jnp.argmax(x[0, 0]) % 3].set(x[0, 0, :6])), IO,
        config={"roles": IO}),
    Case("rows_written", _one(lambda w, x: x @ w.at[np.array([0, 5, 5])].set(1.5)), IO),
    Case("row_added_to", _one(lambda w, x: x @ w.at[2].add(MASK[0])), IO),
    Case("slice_written", _one(lambda w, x: x @ lax.dynamic_update_slice(
        w, MASK[:2].astype(w.dtype), (jnp.argmax(x[0, 0]), 0))), IO, config={"roles": IO}),
    Case("written_into_a_stack", _many(lambda p, x: jnp.einsum("btd,edf->btef", x,
        lax.dynamic_update_slice(p["buffer"], p["w"][None], (1, 0, 0))), w=(8, 6),
        buffer=(3, 8, 6)), IO, linear=("w", "buffer"), dropout=False),
    Case("rows_placed", _one(lambda w, x: x[..., 1:] @ jnp.zeros((7, 6)).at[PLACES].set(
        w, mode="clip"), 4, 6), IO),
    Case("columns_placed", _one(lambda w, x: x @ jnp.asarray(MASK, w.dtype).at[
        :, PLACES - 1].add(w, mode="clip"), 8, 4), IO),
    Case("rows_placed_in_a_parameter", _many(lambda p, x: x @ p["frozen"].at[PLACES].set(p["w"]),
         w=(4, 6), frozen=(8, 6)), IO, linear=("w", "frozen")),
    Case("rows_placed_in_experts", _one(lambda w, x: jnp.einsum(
        "btd,edf->btef", x, jnp.zeros((3, 8, 6)).at[:, PLACES].set(w)), 3, 4, 6),
        {"w": "sio"}, config={"roles": {"w": "sio"}}),
    Case("block_placed", _one(lambda w, x: x @ jnp.zeros((8, 6)).at[1:, 2:].set(w), 7, 4), IO),
    Case("one_row_placed", _one(lambda w, x: x @ jnp.zeros((8, 6)).at[2].set(w[1])), IO,
         config={"roles": IO}),
    Case("rows_summed_by_segment", _one(lambda w, x: x[..., :3] @ jax.ops.segment_sum(
        w, np.array([0, 2, 2, 1, 0, 1, 2, 0]), 3)), IO),
    Case("summed_by_hand", _one(lambda w, x: jnp.sum(x[..., None] * w, -2)), IO,
         config={"roles": IO}, linear=("w",)),
)  # fmt: skip
