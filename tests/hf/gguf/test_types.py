"""Every type of GGUF tensor that the gguf package dequantizes, and damage anywhere in a file."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES

import lora_jax as lora
from lora_jax import models
from lora_jax.hf.gguf.file import open_gguf, read_tensor
from lora_jax.hf.gguf.lora_read import read_gguf_lora
from lora_jax.hf.gguf.weights import weights_of
from lora_jax.models.gguf import base_of, config_of
from lora_jax.quant.array import is_quant

from tests.support.gguf_files import (
    NAMES,
    TIED,
    add_config,
    pair,
    tensors_of,
    write_lora,
    write_model,
    writing,
)

pytestmark = pytest.mark.once

# No weights come in these: integers, intermediate results, and types still without a decoder.
NOT_WEIGHTS = {"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K", "Q1_0"}
ROWS, COLUMNS = 3, 512


def dequantized(raw, kind):
    with np.errstate(all="ignore"):
        return quants.dequantize(raw, kind)


def random_rows(kind, rows=ROWS, columns=COLUMNS, seed=0):
    """The bytes of rows of any type, all of them finite and none huge."""
    rng = np.random.default_rng(seed)
    block, size = GGML_QUANT_SIZES[kind]
    if kind.name in ("F32", "F16", "BF16"):
        return quants.quantize(rng.normal(size=(rows, columns)).astype(np.float32), kind)
    raw = rng.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    while True:
        values = dequantized(raw, kind).reshape(len(raw), -1)
        bad = ~(np.abs(values) < 1e3).all(1)  # a scale is any float16 at all
        if not bad.any():
            return raw.reshape(rows, -1)
        raw[bad] = rng.integers(0, 256, (int(bad.sum()), size), dtype=np.uint8)


def supported(kind):
    try:
        dequantized(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def test_only_types_that_are_no_weights_are_not_supported():
    assert {k.name for k in GGMLQuantizationType if not supported(k)} <= NOT_WEIGHTS


def one_tensor(path, raw, kind):
    with writing(path) as writer:
        writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=kind)
    return open_gguf(path)


@pytest.mark.parametrize("name", [k.name for k in GGMLQuantizationType if supported(k)])
def test_each_type_is_the_gguf_packages(tmp_path, name):
    kind = GGMLQuantizationType[name]
    raw = random_rows(kind)
    file = one_tensor(tmp_path / "a.gguf", raw, kind)
    got = read_tensor(file, "blk.0.ffn_up.weight")
    assert got.shape == (ROWS, COLUMNS) and got.dtype == np.float32
    np.testing.assert_array_equal(got, dequantized(raw, kind).reshape(ROWS, COLUMNS))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_XS"])
def test_a_part_begins_and_ends_inside_blocks(tmp_path, name):
    kind = GGMLQuantizationType[name]
    file = one_tensor(tmp_path / "a.gguf", random_rows(kind), kind)
    whole = read_tensor(file, "blk.0.ffn_up.weight")
    for part in [(slice(1, 3), slice(200, 301)), (np.array([2, 0]), slice(0, 5)), (slice(0, 2),)]:
        got = read_tensor(file, "blk.0.ffn_up.weight", part)
        np.testing.assert_array_equal(got, whole[part])


def test_a_type_that_is_no_float(tmp_path):
    raw = np.zeros((ROWS, COLUMNS), np.int32)
    file = one_tensor(tmp_path / "a.gguf", raw, GGMLQuantizationType.I32)
    with pytest.raises(ValueError, match="`blk.0.ffn_up.weight` has type I32, which the gguf pack"):
        read_tensor(file, "blk.0.ffn_up.weight")


@pytest.mark.parametrize("name", ["F32", "F16", "Q4_0", "Q6_K"])
def test_a_scale_that_is_not_finite(tmp_path, name):
    kind = GGMLQuantizationType[name]
    raw = random_rows(kind)
    if raw.dtype == np.uint8:
        raw.reshape(-1, GGML_QUANT_SIZES[kind][1])[1, -2 if name == "Q6_K" else 0 :][:2] = (0, 0x7E)
    else:
        raw[1, 1] = np.nan
    file = one_tensor(tmp_path / "a.gguf", raw, kind)
    with pytest.raises(ValueError, match="a.gguf: tensor `blk.0.ffn_up.weight` holds NaN or inf"):
        read_tensor(file, "blk.0.ffn_up.weight")


def test_a_model_of_mixed_k_quants(tmp_path):
    """As llama.cpp mixes them in a Q4_K_M file: some blocks have more bits."""
    config = models.LlamaConfig.from_hf(
        {**TIED.to_hf(), "hidden_size": 256, "intermediate_size": 256, "head_dim": 64,
         "num_hidden_layers": 4}
    )  # fmt: skip
    model = models.init(jax.random.key(0), config)
    kinds = {"ffn_up": "Q5_K", "attn_q": "Q3_K"}
    more = dict.fromkeys(f"blk.{i}.{part}" for i in (0, 3) for part in ("attn_v", "ffn_down"))
    path, raws = tmp_path / "mixed.gguf", {}
    with writing(path) as writer:
        add_config(writer, config)
        for name, tensor in tensors_of(model).items():
            if tensor.ndim == 1:
                writer.add_tensor(name, tensor)
                continue
            own = "Q6_K" if name.removesuffix(".weight") in more else "Q4_K"
            kind = GGMLQuantizationType[kinds.get(name.split(".")[-2], own)]
            raw = random_rows(kind, *tensor.shape)
            raws[name] = dequantized(raw, kind).reshape(tensor.shape)
            writer.add_tensor(name, raw, raw_dtype=kind)
    floats = models.load(path)
    loaded = tensors_of(floats)
    assert len(raws) == 29 and {n.split(".")[-2] for n in raws} >= set(kinds) <= set(NAMES.values())
    for name, want in raws.items():
        np.testing.assert_array_equal(loaded[name], want)
    held = models.load(path, quantize="file")
    layers = lora.dequantize(held.params)["model"].pop("layers")
    assert list(layers) == ["0:1", "1:3", "3:4"]
    for part, block in (("0:1", slice(1)), ("1:3", slice(1, 3)), ("3:4", slice(3, 4))):
        own = jax.tree.map(lambda x, i=block: x[i], floats.params["model"]["layers"])
        jax.tree.map(np.testing.assert_array_equal, layers[part], own)
    bytes_ = sum(x.nbytes for x in jax.tree.leaves(held.params, is_leaf=is_quant))
    assert bytes_ <= 1.02 * path.stat().st_size
    tokens = np.arange(8)[None]
    apply = jax.jit(lambda params, ids: lora.lorafy(held.apply)(params, ids))
    # Sums of float32 in another order, through four blocks of weights up to 1,000.
    np.testing.assert_allclose(
        apply(held.params, tokens), floats.apply(floats.params, tokens), rtol=1e-3, atol=1e-3
    )


def damaged(raw, data):
    """A few bytes changed, most of them in the header; or the end cut off."""
    raw = bytearray(raw)
    place = st.one_of(st.integers(0, min(1500, len(raw) - 1)), st.integers(0, len(raw) - 1))
    value = st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    for at, byte in data.draw(st.lists(st.tuples(place, value), min_size=1, max_size=6)):
        raw[at] = byte
    cut = data.draw(st.one_of(st.none(), st.none(), st.integers(0, len(raw))))
    return bytes(raw[:cut])


def read_model(path):
    file = open_gguf(path)
    weights = weights_of(file)
    config_of(file.metadata, weights.shapes, path=path)
    for name, shape in weights.shapes.items():
        assert weights.read(name).shape == tuple(shape)


def read_adapter(path):
    for tensor in read_gguf_lora(path, base=base_of(TIED))[1].values():
        assert np.isfinite(tensor).all()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a model in Q4_0 and of an adapter."""
    folder = tmp_path_factory.mktemp("whole")
    tensors = tensors_of(models.init(jax.random.key(0), TIED))
    model = write_model(folder / "m.gguf", TIED, tensors, GGMLQuantizationType.Q4_0)
    adapter = write_lora(folder / "a.gguf", {**pair(), **pair("blk.1.attn_q", 3, 32)})
    return {"model": model.read_bytes(), "adapter": adapter.read_bytes()}


@pytest.mark.parametrize("what", ["model", "adapter"])
@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_damaged_files_are_read_or_refused_never_worse(tmp_path_factory, whole, what, data):
    """An error of one line that names the file, or numbers."""
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damaged(whole[what], data))
    try:
        (read_model if what == "model" else read_adapter)(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
