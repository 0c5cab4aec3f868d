"""Block formats: errors and bytes, bitsandbytes' and GGUF's own numbers, bad input."""

import dataclasses
import json
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants

import lora_jax as lora
from lora_jax import quant
from lora_jax.quant import array, foreign, formats, scales
from lora_jax.quant.formats import FORMATS, FormatName

pytestmark = pytest.mark.once

# bitsandbytes' NF4 of x_i = (-1)^i (i + 1) / 64 in one block.
GOLDEN = "77868686959595a4a4b4b3b3c3c3c2c2d2d2d2d1d1e1e1e1e1e1e1e0f0f0f0f0"


@pytest.fixture(scope="module")
def gaussian():
    return np.random.default_rng(0).standard_normal((1024, 512)).astype(np.float32) * 0.02


@pytest.mark.parametrize(
    "options, error, bytes_",
    [
        (dict(format="nf4"), 0.0920, 0.266),
        (dict(format="nf4", double_quant=True), 0.0920, 0.26),
        (dict(format="int4", block_size=32), 0.0860, 0.2813),
        (dict(format="uint4"), 0.0900, 0.2813),
        (dict(format="int8"), 0.0060, 0.516),
    ],
    ids=str,
)
def test_error_and_bytes_on_gaussian_weights(gaussian, options, error, bytes_):
    q = quant.quantize_array(gaussian, **options)
    relative = np.linalg.norm(q.dequantize() - gaussian) / np.linalg.norm(gaussian)
    assert relative == pytest.approx(error, rel=0.01)
    assert q.nbytes / (2 * gaussian.size) <= bytes_
    quant.check(q)


def golden_vector():
    i = np.arange(64)
    return ((-1.0) ** i * (i + 1) / 64).astype(np.float32)


def test_nf4_codes_are_those_of_bitsandbytes():
    q = quant.quantize_array(golden_vector()[:, None], scale_dtype="float32")
    assert quant.to_bitsandbytes(q)[""].tobytes().hex() == GOLDEN


@pytest.mark.parametrize("double, roles", [(False, "io"), (True, "oi")])
def test_bitsandbytes_tensors_come_and_go_bit_for_bit(gaussian, double, roles):
    q = quant.quantize_array(gaussian, scale_dtype="float32", double_quant=double, roles=roles)
    saved = quant.to_bitsandbytes(q)
    back = quant.from_bitsandbytes(saved, roles=roles)
    again = quant.to_bitsandbytes(back)
    assert saved.keys() == again.keys()
    for name in saved:
        np.testing.assert_array_equal(saved[name], again[name], err_msg=name)
    np.testing.assert_array_equal(q.dequantize(), back.dequantize())
    assert json.loads(saved["quant_state.bitsandbytes__nf4"].tobytes())["quant_type"] == "nf4"


def test_blocks_of_padding_are_no_part_of_bitsandbytes_tensors():
    w = jax.random.normal(jax.random.key(0), (192, 8), jnp.bfloat16)  # three blocks an output
    for double in (False, True):
        q = quant.quantize_array(w, block_size=64, double_quant=double)
        saved = quant.to_bitsandbytes(q)
        assert saved["absmax"].shape == (24,)
        back = quant.from_bitsandbytes(saved)
        assert back.dtype == jnp.bfloat16
        np.testing.assert_array_equal(back.dequantize(), q.dequantize())
    with pytest.raises(ValueError, match="holds nf4 and fp4 matrices of whole blocks"):
        quant.to_bitsandbytes(quant.quantize_array(w[:100], block_size=64, pad=True))


def test_scales_of_scales_of_another_kind_are_refused():
    q = quant.quantize_array(jax.random.normal(jax.random.key(0), (64, 8)), double_quant=True)
    saved = quant.to_bitsandbytes(q)
    table = saved["nested_quant_map"]
    quant.from_bitsandbytes({**saved, "nested_quant_map": np.nextafter(table, 1)})
    with pytest.raises(ValueError, match="`nested_quant_map` is another table"):
        quant.from_bitsandbytes({**saved, "nested_quant_map": table * np.float32(1.001)})
    name = "quant_state.bitsandbytes__nf4"
    state = json.loads(saved[name].tobytes()) | {"nested_blocksize": 128}
    with pytest.raises(ValueError, match="nested_blocksize is 128, not 256"):
        quant.from_bitsandbytes({**saved, name: np.frombuffer(json.dumps(state).encode(), "u1")})


def test_codes_lie_as_bitsandbytes_lays_them_and_decode_to_its_numbers():
    """Two rows of two blocks written out by hand: high four bits first, along the inputs."""
    codes = np.arange(256).reshape(2, 128) % 16
    absmax = np.asarray([1.0, 2.0, 3.0, 4.0], np.float32)
    flat = codes.reshape(-1, 2)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 128]}
    tensors = {
        "": (flat[:, 0] << 4 | flat[:, 1]).astype(np.uint8)[:, None],
        "absmax": absmax,
        "quant_map": np.asarray(formats.FORMATS["nf4"].codebook, np.float32),
        "quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    want = tensors["quant_map"][codes] * np.repeat(absmax, 64).reshape(2, 128)
    np.testing.assert_array_equal(quant.from_bitsandbytes(tensors).dequantize(), want.T)
    np.testing.assert_array_equal(quant.from_bitsandbytes(tensors, roles="oi").dequantize(), want)
    broken = tensors | {"quant_map": tensors["quant_map"] * 2}
    with pytest.raises(ValueError, match="`quant_map` is another table"):
        quant.from_bitsandbytes(broken)
    with pytest.raises(ValueError, match="'absmax' are missing"):
        quant.from_bitsandbytes({k: v for k, v in tensors.items() if k != "absmax"})
    state["shape"] = [4, 63]
    crossing = tensors | {
        "quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8)
    }
    with pytest.raises(ValueError, match="blocks of 64 cross the rows"):
        quant.from_bitsandbytes(crossing)


def test_dynamic_map_has_the_published_ends():
    table = scales.dynamic_map()
    assert len(table) == 256 and np.all(np.diff(table) > 0)
    assert table[0] == pytest.approx(-0.99297, abs=1e-5) and table[-1] == 1.0


@pytest.mark.parametrize("kind, roles", [("Q4_0", "io"), ("Q4_1", "oi"), ("Q8_0", "oi")])
def test_gguf_blocks_are_held_without_loss(gaussian, kind, roles):
    type_ = GGMLQuantizationType[kind]
    raw = gguf_quants.quantize(gaussian[:64, :96], type_)
    want = gguf_quants.dequantize(raw, type_)
    q = quant.from_gguf(raw, kind, roles=roles)
    got = np.asarray(q.dequantize())
    np.testing.assert_array_equal(got if roles == "oi" else got.T, want)
    with pytest.raises(ValueError, match="GGUF type IQ2_S"):
        quant.from_gguf(raw, "IQ2_S")


def test_gptq_weights_are_held_without_loss():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (128, 24)).astype(np.uint8)
    zero = rng.integers(0, 16, (2, 24)).astype(np.float32)
    scale = rng.random((2, 24)).astype(np.float16)
    wide = scale.astype(np.float32)
    q = quant.from_codes(codes, scale, -zero * wide, format="uint4", block_size=64)
    want = (codes.reshape(2, 64, 24) - zero[:, None]) * wide[:, None]
    np.testing.assert_array_equal(q.dequantize(), want.reshape(128, 24))


@pytest.mark.parametrize(
    "shape, roles, format",
    [((3, 2, 64, 8), "ssio", "nf4"), ((64, 2, 5), "ioo", "uint4"), ((2, 64, 7), "iio", "int8"),
     ((1, 64, 5), "uio", "nf4"), ((64, 3, 5), "iso", "int8")],
)  # fmt: skip
def test_shapes_and_roles_are_kept(shape, roles, format):
    w = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    q = quant.quantize_array(w, format=format, block_size=32, roles=roles)
    assert (q.shape, q.ndim, q.dtype, q.size) == (shape, len(shape), np.float32, w.size)
    assert np.linalg.norm(q.dequantize() - w) < 0.12 * np.linalg.norm(w)
    quant.check(q)


def test_an_odd_number_of_blocks_is_filled_up_and_stays_hidden():
    w = np.random.default_rng(3).standard_normal((96, 4)).astype(np.float32)
    q = quant.quantize_array(w, block_size=32)
    assert q.packed.shape == (64, 4) and q.dequantize().shape == (96, 4)
    part = quant.quantize_array(w[:50], block_size=32, pad=True)
    np.testing.assert_array_equal(part.dequantize()[:32], q.dequantize()[:32])


def test_scales_of_scales_leave_the_padding_out():
    # 900 scales in groups of 256, and as many columns of padding's.
    w = np.random.default_rng(3).standard_normal((96, 300)).astype(np.float32)
    w *= np.geomspace(1, 1000, 300, dtype=np.float32)
    q = quant.quantize_array(w, block_size=32, double_quant=True)
    assert q.scale.shape == (4, 300) and q.scale2.shape == (4,)
    got = np.asarray(array.expanded(q).scale)
    assert np.isfinite(got).all()
    # Of one output after the other; steps of the map are at most 1.4 % of a group's largest.
    want = np.abs(w.reshape(3, 32, 300)).max(1).T.reshape(-1)
    most = 0.0075 * np.repeat(q.scale2, 256)[:900]
    assert (np.abs(got[:3].T.reshape(-1) - want) <= most).all()
    # 768 fill whole groups: the last block of padding has none of its own.
    whole = quant.quantize_array(w[:, :256], block_size=32, double_quant=True)
    assert np.isfinite(array.expanded(whole).scale).all()


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_a_tie_takes_the_lower_code(format):
    order, middles = formats._ladder(FORMATS[format])
    w = np.ones((16, 1), np.float32)  # the largest is 1, and so is the scale
    w[: len(middles), 0] = middles
    q = quant.quantize_array(w, format=format, block_size=16, scale_dtype="float32", pad=True)
    np.testing.assert_array_equal(foreign.codes_of(q)[: len(middles), 0], order[:-1])


@pytest.mark.parametrize("largest", [1.0, -1.0])
def test_the_largest_value_takes_the_last_code_of_eight_bits(largest):
    q = quant.quantize_array(jnp.full((16, 1), largest), format="int8", block_size=16)
    np.testing.assert_array_equal(foreign.codes_of(q).astype(np.int8), 127 * np.int8(largest))


def test_eight_bit_floats_are_those_of_ml_dtypes():
    """Every code but the two of NaN; what lies beyond the last value takes its code."""
    codes = np.delete(np.arange(256, dtype=np.uint8), [127, 255])
    floats = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(formats.code_values(jnp.asarray(codes), FORMATS["fp8"]), floats)
    beyond = jnp.concatenate([floats, jnp.array([1e4, -1e4])])
    got = formats.nearest(beyond, FORMATS["fp8"])
    np.testing.assert_array_equal(got, [*codes, 126, 254])


def test_a_tie_of_scales_takes_the_lower_code():
    table = scales.dynamic_map()
    middle = (table[200] + table[201]) / np.float32(2)
    # Their mean is 0 and their largest is 1.
    codes = scales.compress_scales(jnp.array([[1, -1, middle, -middle]]).T, 4)["scale"]
    assert int(codes[2, 0]) == 200


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_have_the_codes_of_zero(format):
    q = quant.quantize_array(jnp.zeros((40, 3)), format=format, block_size=16, pad=True)
    np.testing.assert_array_equal(foreign.codes_of(q), FORMATS[format].zero)
    np.testing.assert_array_equal(q.dequantize(), 0.0)


def test_quantization_is_traced_abstractly_and_under_jit():
    w = np.random.default_rng(4).standard_normal((2, 128, 8)).astype(np.float32)
    shapes = jax.eval_shape(quant.quantize_array, w)
    assert shapes.packed.shape == (2, 64, 8) and shapes.shape == (2, 128, 8)
    inside = jax.jit(quant.quantize_array)(w)
    np.testing.assert_array_equal(inside.dequantize(), quant.quantize_array(w).dequantize())


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(format="nf3"), "`format` must be one of nf4, fp4, int4, .*, int6, got 'nf3'"),
        (dict(block_size=48), "`block_size` must be one of 16, 32, .* got 48"),
        (dict(block_size=128), "`block_size` 128 does not divide the 96 inputs of `w`"),
        (dict(scale_dtype="int8"), "`scale_dtype` must be one of float32, bfloat16, float16"),
        (dict(roles="ioo"), "`roles` 'ioo' does not fit `w` of shape"),
        (
            dict(double_quant=True, scale_dtype="bfloat16"),
            "`double_quant` makes .*: leave `scale_d",
        ),
        (dict(format="int4", double_quant=True), "`double_quant` needs a format whose scales are"),
    ],
)
def test_bad_requests_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        quant.quantize_array(np.ones((96, 4), np.float32), **{"block_size": 32} | options)


def test_bad_weights_are_refused():
    w = np.ones((64, 4), np.float32)
    with pytest.raises(ValueError, match="`w` is not finite"):
        quant.quantize_array(np.where(np.arange(4) == 2, np.nan, w).astype(np.float32))
    with pytest.raises(ValueError, match="only floating-point weights"):
        quant.quantize_array(np.ones((64, 4), np.int32))
    for size in (1e6, 1e-9):
        with pytest.raises(ValueError, match="leave the range of float16"):
            quant.quantize_array(w * np.float32(size), scale_dtype="float16")
    quant.quantize_array(w * 0, scale_dtype="float16")
    # Biases, scales of scales and the decoded weights have a range too.
    with pytest.raises(ValueError, match="leave the range of float16, or its weights"):
        quant.quantize_array(w * 7e4, format="uint4", scale_dtype="float16")
    with pytest.raises(ValueError, match="leave the range of float32"):
        quant.quantize_array(w * 3.4e38, double_quant=True)
    for form in ("nf4", "int8"):
        with pytest.raises(ValueError, match="or its weights that of float16"):
            quant.quantize_array(np.full((64, 4), 65504, np.float16), format=form)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(block_size=48), r"do not fit a weight of shape \(128, 4\).*in blocks of 48"),
        (dict(scale=np.ones((3, 4), np.float32)), r"scales \[3, 4\] do not fit"),
        (dict(scale=np.full((2, 4), np.nan, np.float32)), "scales hold NaN or infinity"),
        (dict(scale=np.ones((2, 4), np.int32)), "scales are int32, expected float32 or bfl"),
        (dict(format="uint4"), "`bias` should be .* is nothing"),
        (dict(format="nf3"), "`format` must be one of nf4"),
    ],
)
def test_codes_that_do_not_fit_are_refused(change, text):
    codes = np.zeros((128, 4), np.uint8)
    given = dict(scale=np.ones((2, 4), np.float32), format="int4", block_size=64) | change
    with pytest.raises(ValueError, match=text):
        quant.from_codes(codes, given.pop("scale"), **given)


def test_metadata_that_disagrees_with_the_arrays_is_refused():
    q = quant.quantize_array(np.ones((128, 4), np.float32))
    for change, text in [
        (dict(block=32), r"`scale` should be .*\[4, 4\], is bfloat16\[2, 4\]"),
        (dict(shape=(128, 5)), "`packed` should be"),
        (dict(format="uint4"), "`bias` should be .* is nothing"),
        (dict(format="int8"), "`packed` should be int8"),
        (dict(packed=q.packed.astype(jnp.int8)), "`packed` should be uint8"),
    ]:
        with pytest.raises(ValueError, match=text):
            quant.check(dataclasses.replace(q, **change), "layer.kernel")


def test_stacked_weights_must_be_of_one_kind():
    a = quant.quantize_array(np.ones((64, 4), np.float32))
    b = quant.quantize_array(np.ones((64, 4), np.float32), format="int4")
    both = quant.stack_weights([a, a])
    assert both.shape == (2, 64, 4) and both.roles == "sio"
    with pytest.raises(ValueError, match="only weights of one kind can be stacked"):
        foreign.stack_weights([a, b])


@pytest.mark.wrong_types
def test_where_is_no_number():
    with pytest.raises(TypeError, match=r"`where` must be module names, .*, got `int`"):
        lora.quantize({"k": np.ones((8, 8), np.float32)}, cast(Any, 3))


def test_trees_are_quantized_by_name_and_come_back():
    rng = np.random.default_rng(5)
    params = {
        "layers": {
            "up": {"kernel": rng.standard_normal((2, 64, 32)).astype(np.float32)},
            "norm": {"scale": np.ones((2, 64), np.float32)},
        },
        "head": {"kernel": rng.standard_normal((64, 8)).astype(np.float32)},
        "norm": {"scale": np.ones(8, np.float32)},
    }
    q = lora.quantize(params, ["up"], format="int8")
    assert isinstance(q["layers"]["up"]["kernel"], lora.QuantArray)
    assert q["head"]["kernel"] is params["head"]["kernel"]
    # A stack of vectors has two dims and is no matrix.
    whole = lora.quantize(params, r"layers\..*", format="int8")["layers"]
    assert isinstance(whole["up"]["kernel"], lora.QuantArray)
    assert whole["norm"]["scale"] is params["layers"]["norm"]["scale"]
    back = lora.dequantize(q)
    np.testing.assert_allclose(
        back["layers"]["up"]["kernel"], params["layers"]["up"]["kernel"], atol=0.02
    )
    with pytest.raises(ValueError, match="`where` entry `upp` matches no matrix; nearest: .*up"):
        lora.quantize(params, ["upp"])
    with pytest.raises(ValueError, match="quantized already"):
        lora.quantize(q, ["up"])
    with pytest.raises(ValueError, match="`block_size` 64 does not divide the 8 inputs"):
        lora.quantize({"k": np.ones((8, 8), np.float32)}, ["k"])
    mapped = lora.quantize(params, lambda path, leaf: path == "head.kernel", roles={"head": "oi"},
                           block_size=16, pad=True)  # fmt: skip
    assert mapped["head"]["kernel"].roles == "oi"


@pytest.mark.wrong_types
def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="`backend` must be one of auto, .* got 'cuda'"):
        lora.quantize({"up": np.ones((64, 8), np.float32)}, ["up"], backend=cast(Any, "cuda"))


def test_the_annotations_name_every_format():
    assert get_args(FormatName) == tuple(FORMATS)


def test_codes_are_counted_from_the_bias_as_it_is_stored():
    # Near 100 float16 has steps of 1/16, which is about what a code of a range of 1 spans.
    w = 100 + np.random.default_rng(0).uniform(size=(64, 40)).astype(np.float32)
    q = quant.quantize_array(jnp.asarray(w), format="uint4", scale_dtype="float16")
    error = np.abs(np.asarray(q.dequantize()) - w)
    # All but those clipped at the two ends are within half a code.
    assert np.mean(error <= 0.51 / 15) > 0.95
