"""bitsandbytes' weights: its own numbers to the bit, whole models, and files that are broken."""

import json
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from lora_jax import models, quant
from lora_jax.hf.checkpoint import bnb, safetensors
from lora_jax.hf.checkpoint.quantized import check_config
from lora_jax.hf.checkpoint.safetensors import load_file, open_directory
from lora_jax.models.saving import save_model
from lora_jax.quant.scales import dynamic_map

from tests.support.gguf_files import TIED
from tests.support.places import GOLDEN

pytestmark = pytest.mark.once

# Made by bitsandbytes 0.50.2 itself: its tensors, and under "want." what it dequantizes them to.
BITSANDBYTES = GOLDEN / "bitsandbytes.safetensors"
CASES = ("nf4", "fp4", "double", "fp4double", "partial", "odd", "f32storage", "reference", "eight")


@pytest.fixture(scope="module")
def golden():
    return load_file(BITSANDBYTES)


def part(golden, *cases):
    return {n: x for n, x in golden.items() if n.split(".")[0] in cases}


def saved(directory, tensors):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_the_golden_file_is_bitsandbytes_own():
    with safe_open(str(BITSANDBYTES), "numpy") as file:
        assert file.metadata()["made_by"].startswith("bitsandbytes 0.50.2")


def test_the_map_of_scales_is_bitsandbytes_own_to_the_bit(golden):
    np.testing.assert_array_equal(dynamic_map(), golden["double.weight.nested_quant_map"])


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_bitsandbytes_own(tmp_path, golden, case):
    weights = open_directory(saved(tmp_path / "m", part(golden, case)))
    want = golden[f"want.{case}.weight"]
    assert list(weights.shapes) == [f"{case}.weight"]
    assert weights.shapes[f"{case}.weight"] == want.shape
    got = weights.read(f"{case}.weight")
    assert got.dtype == np.float32
    # bitsandbytes multiplies in float32 and rounds to the dtype that was quantized.
    np.testing.assert_array_equal(got.astype(want.dtype), want)


def test_numbers_of_a_bfloat16_model_are_rounded_once(tmp_path, golden):
    weights = open_directory(saved(tmp_path / "m", part(golden, "bf16")))
    got, want = weights.read("bf16.weight"), golden["want.bf16.weight"]
    np.testing.assert_array_equal(got.astype(want.dtype), want)
    assert np.any(got != want.astype(np.float32))


def test_the_known_vector(golden):
    # x_i = (−1)^i (i + 1) / 64
    assert golden["reference.weight"].tobytes().hex() == (
        "77868686959595a4a4b4b3b3c3c3c2c2d2d2d2d1d1e1e1e1e1e1e1e0f0f0f0f0"
    )


def quantized(name, weight, block=64):
    """A weight as bitsandbytes saves it, NF4 without double quantization; and what it holds."""
    code, flat = np.array(bnb.CODES["nf4"], np.float32), weight.reshape(-1, block)
    absmax = np.abs(flat).max(1).astype(np.float32)
    index = np.abs(flat[..., None] / absmax[:, None, None] - code).argmin(-1)
    state = dict(quant_type="nf4", blocksize=block, dtype="float32", shape=list(weight.shape))
    pairs = index.reshape(-1, 2)
    tensors = {
        name: (pairs[:, :1] * 16 + pairs[:, 1:]).astype(np.uint8),
        f"{name}.absmax": absmax,
        f"{name}.quant_map": code,
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), "u1"),
    }
    return tensors, (code[index] * absmax[:, None]).reshape(weight.shape)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """A tiny decoder whose projections are in 4 bits, and the same one with their floats."""
    directory = tmp_path_factory.mktemp("bnb") / "m"
    model = models.init(jax.random.key(0), TIED)
    save_model(directory, model, model.params)
    tensors, plain = {}, {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if "_proj" in name:
            packed, plain[name] = quantized(name, weight)
            tensors |= packed
        else:
            tensors[name] = plain[name] = weight
    float_directory = saved(directory.parent / "float", plain)
    config = json.loads((directory / "config.json").read_text())
    (float_directory / "config.json").write_text(json.dumps(config))
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": False, "llm_int8_skip_modules": None,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return saved(directory, tensors), float_directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_loads_as_its_dequantized_self(model_directory, dtype):
    quantized_model, plain = (models.load(d, dtype=dtype) for d in model_directory)
    assert quantized_model.config == plain.config
    jax.tree.map(np.testing.assert_array_equal, quantized_model.params, plain.params)


def test_another_method_is_refused():
    check_config({"load_in_8bit": True})
    for settings, kind in (({"quant_method": "hqq"}, "hqq"), ({}, "unknown"), ([1], "unknown")):
        with pytest.raises(ValueError, match=f"method `{kind}`.*load the unquantized model"):
            check_config(settings)


def changed(golden, case, **changes):
    """A case's tensors, some replaced or (None) removed."""
    tensors = {n: x for n, x in part(golden, case).items()}
    for name, value in changes.items():
        key = next(n for n in tensors if n.removeprefix(f"{case}.").replace(".", "_") == name)
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value(tensors[key])
    return tensors


def stated(**fields):
    def change(raw):
        state = json.loads(raw.tobytes()) | fields
        return np.frombuffer(json.dumps(state).encode(), np.uint8)

    return change


STATE = "weight_quant_state_bitsandbytes__nf4"
BROKEN = {
    "no absmax": ("nf4", {"weight_absmax": None}, "tensor `nf4.weight.absmax` is missing"),
    "no codes": ("nf4", {"weight": None}, "tensor `nf4.weight` is missing beside its quant_state"),
    "no state": ("nf4", {STATE: None, "weight_absmax": None, "weight_quant_map": None},
                 "`nf4.weight` has dtype U8"),
    "short absmax": ("nf4", {"weight_absmax": lambda x: x[:-1]},
                     r"`nf4.weight.absmax` is F32 of shape \(47,\), expected 48 numbers F32"),
    "short codes": ("nf4", {"weight": lambda x: x[:-1]}, "has 1535 bytes, but its quant_state say"),
    "long codes": ("nf4", {"weight": lambda x: np.concatenate([x, x[:1]])}, "has 1537 bytes, but"),
    "another absmax": ("double", {"weight_absmax": lambda x: x.astype("f4")}, "is F32 of shape"),
    "no nested": ("double", {"weight_nested_absmax": None}, "`double.weight.nested_absmax` is mis"),
    "huge shape": ("nf4", {STATE: stated(shape=[1 << 40, 1 << 20])},
                   "expected 18014398509481984 numbers F32"),
    "no shape": ("nf4", {STATE: stated(shape=None)}, "is no quant_state: TypeError"),
    "negative": ("nf4", {STATE: stated(shape=[-4, -768])}, "states impossible sizes"),
    "block of 0": ("nf4", {STATE: stated(blocksize=0)}, "states impossible sizes"),
    "block of text": ("nf4", {STATE: stated(blocksize="64")}, "states impossible sizes"),
    "another type": ("nf4", {STATE: stated(quant_type="fp4")}, "states impossible sizes"),
    "no JSON": ("nf4", {STATE: lambda x: x[:-3]}, "is no quant_state: JSONDecodeError"),
    "a big state": ("nf4", {STATE: lambda x: np.zeros(20_000, "u1")}, "is too big"),
    "NaN": ("nf4", {"weight_absmax": lambda x: x * np.nan}, "`nf4.weight.absmax` holds NaN"),
    "a codebook": ("nf4", {"weight_quant_map": lambda x: x * 2}, "is not the codebook of nf4"),
    "int8 of floats": ("eight", {"weight": lambda x: x.astype("f4")}, "expected an I8 matrix"),
    "int8's SCB": ("eight", {"SCB": lambda x: x[1:]}, r"`eight.SCB` is F32 of shape \(23,\)"),
    "int8's layout": ("eight", {"weight_format": lambda x: x + np.uint8(2)}, "is not 0"),
    "int8's NaN": ("eight", {"SCB": lambda x: x * np.nan}, "its SCB holds NaN"),
    "int8 alone": ("eight", {"weight": None}, "`eight.weight` is missing beside `eight.SCB`"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path, golden, case):
    which, changes, text = BROKEN[case]
    tensors = {n: np.ascontiguousarray(x) for n, x in changed(golden, which, **changes).items()}
    directory = saved(tmp_path / "m", tensors)
    tracemalloc.start()
    with pytest.raises(ValueError, match=text) as error:
        open_directory(directory).read(f"{which}.weight")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "\n" not in str(error.value) and peak < 2_000_000
    assert str(directory) in str(error.value)


def test_what_double_quantization_leaves_over(tmp_path, golden):
    tensors = part(golden, "nf4")
    tensors["nf4.weight.nested_absmax"] = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="`nf4.weight.nested_absmax` is left over"):
        open_directory(saved(tmp_path / "m", tensors))


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_damaged_files_are_read_or_refused_never_worse(tmp_path_factory, data):
    """Any bytes of the file changed: an error that names it, or numbers, never another error."""
    tensors = part(load_file(BITSANDBYTES), "double", "eight")
    directory = saved(tmp_path_factory.mktemp("fuzz") / "m", tensors)
    path = directory / "model.safetensors"
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    states = raw.index(b'{"quant_type"')
    last = len(raw) - 1
    place = st.one_of(
        st.integers(0, header), st.integers(states, min(states + 200, last)), st.integers(0, last)
    )
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=4)):
        raw[at] = value
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(raw))))
    path.write_bytes(raw[:cut])
    try:
        weights = open_directory(directory)
        for name, shape in weights.shapes.items():
            assert weights.read(name).shape == tuple(shape)
    except (ValueError, FileNotFoundError) as error:
        assert str(directory) in str(error)


def middle(shape):
    """A part that begins and ends inside blocks, and inside bytes."""
    return tuple(slice(n // 3, n // 3 + n // 2 + 1) for n in shape)


@pytest.mark.parametrize("case", CASES)
def test_a_part_is_that_part_of_the_whole(tmp_path, golden, case):
    weights = open_directory(saved(tmp_path / "m", part(golden, case)))
    name = f"{case}.weight"
    # The last row of "double" has scales of another group than the first.
    last = tuple(slice(n - 1, n) for n in weights.shapes[name])
    for inside in (middle(weights.shapes[name]), last):
        np.testing.assert_array_equal(weights.read(name, inside), weights.read(name)[inside])


@pytest.mark.parametrize("case", ["nf4", "fp4", "double", "f32storage"])
def test_blocks_of_a_part_are_those_of_the_whole(tmp_path, golden, case):
    weights = open_directory(saved(tmp_path / "m", part(golden, case)))
    name = f"{case}.weight"
    rows, columns = weights.shapes[name]
    block = weights.formats[name].block
    if columns % block:
        pytest.skip("blocks cross rows")
    half = min(max(columns // 2 // (2 * block), 1) * 2 * block, columns)
    inside = (slice(1, rows - 1), slice(0, half))
    found, whole = weights.blocks(name, inside), weights.blocks(name)
    last = found.packed.shape[-2]
    np.testing.assert_array_equal(found.packed, whole.packed[:last, 1 : rows - 1])
    scales = found.scale.shape[-2]
    np.testing.assert_array_equal(found.scale, whole.scale[:scales, 1 : rows - 1])
    if case == "double":
        np.testing.assert_array_equal(found.scale2, whole.scale2)


def test_a_part_takes_its_own_blocks_and_groups_of_scales(tmp_path, monkeypatch):
    w = np.random.default_rng(0).standard_normal((256, 512), np.float32)
    held = quant.quantize_array(w, double_quant=True, roles="oi")
    tensors = quant.to_bitsandbytes(held)
    saved(tmp_path, {f"w.{part}" if part else "w": x for part, x in tensors.items()})
    weights, sizes, read = open_directory(tmp_path), [], safetensors.read_array

    def count(*args, **part):
        sizes.append(read(*args, **part).size)
        return read(*args, **part)

    monkeypatch.setattr(safetensors, "read_array", count)
    inside = (
        slice(130, 250),
        slice(200, 500),
    )  # five blocks of eight in each row
    np.testing.assert_array_equal(weights.read("w", inside), weights.read("w")[inside])
    part, whole = sizes[: len(sizes) // 2], sizes[len(sizes) // 2 :]
    assert max(part) == 120 * (512 - 192) // 2 and max(whole) == w.size // 2


def test_eight_bits_are_held_with_a_scale_for_each_row(tmp_path, golden):
    weights = open_directory(saved(tmp_path / "m", part(golden, "eight")))
    q = weights.blocks("eight.weight")
    want = weights.read("eight.weight")
    # bitsandbytes divides by 127 after the product, so that the last bit of a float32 may differ.
    np.testing.assert_allclose(q.dequantize(), want, rtol=2e-7)
    assert q.nbytes == want.size + 4 * len(want)
