"""Reading GGUF: files that the gguf package wrote, and broken ones."""

import struct
import tracemalloc

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from lora_jax import models
from lora_jax.hf.gguf.file import open_gguf
from lora_jax.hf.gguf.weights import weights_of
from lora_jax.models.gguf import config_of
from lora_jax.models.rope import RopeScaling, static_frequencies

from tests.support.gguf_files import TIED, tensors_of, write_model

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def tiny():
    return models.init(jax.random.key(0), TIED)


@pytest.fixture
def saved(tmp_path, tiny):
    return write_model(tmp_path / "tiny.gguf", TIED, tensors_of(tiny))


def test_numbers_and_configuration_come_back(saved, tiny):
    loaded = models.load(saved)
    assert loaded.config == TIED and loaded.tokenizer is None
    jax.tree.map(np.testing.assert_array_equal, loaded.params, tiny.params)


def test_an_untied_head_and_biases_come_back(tmp_path):
    config = models.LlamaConfig.from_hf(
        {**TIED.to_hf(), "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
    )
    model = models.init(jax.random.key(1), config)
    model = models.Model(model.forward, jax.tree.map(lambda x: x + 0.01 * x.size, model.params))
    loaded = models.load(write_model(tmp_path / "a.gguf", config, tensors_of(model)))
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwens_rows_are_not_reordered(tmp_path, arch):
    raw = {k: v for k, v in TIED.to_hf().items() if k != "attention_bias"}
    config = models.LlamaConfig.from_hf({**raw, "model_type": arch})
    model = models.init(jax.random.key(1), config)
    tensors = tensors_of(model)
    for name in list(tensors):
        if ".attn_q." in name or ".attn_k." in name:
            heads = 4 if ".attn_q." in name else 2
            rows = tensors[name]
            pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
            tensors[name] = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))
    loaded = models.load(write_model(tmp_path / "a.gguf", config, tensors, arch=arch))
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_blocks_are_the_gguf_packages(tmp_path, tiny, kind):
    kind = GGMLQuantizationType[kind]
    tensors = tensors_of(tiny)
    loaded = models.load(write_model(tmp_path / "a.gguf", TIED, tensors, kind))
    raw = tensors["blk.1.ffn_up.weight"]
    want = quants.dequantize(quants.quantize(raw, kind), kind).reshape(raw.shape)
    got = loaded.params["model"]["layers"]["mlp"]["up_proj"]["kernel"][1]
    np.testing.assert_array_equal(got, want.T)
    assert np.abs(want - raw).max() > 0


def test_stored_in_bfloat16(saved, tiny):
    loaded = models.load(saved, dtype="float32", param_dtype="bfloat16")
    kernel = loaded.params["model"]["layers"]["self_attn"]["k_proj"]["kernel"]
    want = tiny.params["model"]["layers"]["self_attn"]["k_proj"]["kernel"].astype("bfloat16")
    np.testing.assert_array_equal(kernel, want)


def test_llama3s_divisors_are_its_scaling(tmp_path, tiny):
    scaling = RopeScaling(
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    divisors = static_frequencies(8, 5e5, None) / static_frequencies(8, 5e5, scaling)
    assert divisors.max() == 32 and divisors.min() == 1
    config = models.LlamaConfig.from_hf({**TIED.to_hf(), "rope_theta": 5e5})
    tensors = {**tensors_of(tiny), "rope_freqs.weight": divisors.astype(np.float32)}
    loaded = models.load(write_model(tmp_path / "a.gguf", config, tensors))
    assert loaded.config.rope_scaling == scaling
    tensors["rope_freqs.weight"][1] *= 1.5
    with pytest.raises(ValueError, match="`rope_freqs.weight` is not that of a Llama"):
        models.load(write_model(tmp_path / "a.gguf", config, tensors))


def test_stated_rope_scalings(tmp_path, tiny):
    def load(**keys):
        keys = {f"llama.rope.scaling.{k}": v for k, v in keys.items()}
        path = write_model(tmp_path / "a.gguf", TIED, tensors_of(tiny), keys=keys)
        file = open_gguf(path)
        return config_of(file.metadata, weights_of(file).shapes, path=path).rope_scaling

    linear = load(type=("string", "linear"), factor=("float32", 2.0))
    assert linear == RopeScaling(rope_type="linear", factor=2.0)
    yarn = load(
        type=("string", "yarn"),
        factor=("float32", 4.0),
        original_context_length=("uint32", 16),
    )
    assert yarn == RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    with pytest.raises(ValueError, match="RoPE scaling of type `longrope` is not supported"):
        load(type=("string", "longrope"), factor=("float32", 4.0))


@pytest.mark.parametrize(
    "keys, text",
    [
        ({"llama.logit_scale": ("float32", 2.0)}, "key `logit_scale` = 2.0 is not known and may"),
        ({"split.count": ("uint16", 2)}, "one of 2 parts of a model; join them first"),
        ({"general.type": ("string", "adapter")}, "a GGUF of type \"adapter\", not a model"),
        ({"llama.expert_count": ("uint32", 8)}, "missing: `model.layers.0.block_sparse_moe.exp"),
        ({"llama.rope.dimension_count": ("uint32", 4)}, "RoPE over a part of each head"),
        ({"llama.attention.key_length": ("uint32", 8), "llama.attention.value_length":
          ("uint32", 4)}, "keys and values of different sizes"),
    ],
)  # fmt: skip
def test_metadata_that_changes_numbers_is_refused(tmp_path, tiny, keys, text):
    path = write_model(tmp_path / "a.gguf", TIED, tensors_of(tiny), keys=keys)
    with pytest.raises(ValueError, match=text) as error:
        models.load(path)
    assert str(path) in str(error.value)


def test_tensors_that_do_not_fit(tmp_path, tiny):
    tensors = tensors_of(tiny)
    path = write_model(
        tmp_path / "a.gguf", TIED, {**tensors, "blk.0.attn_sinks.weight": np.ones(4)}
    )
    with pytest.raises(ValueError, match="`blk.0.attn_sinks.weight` has no place in a dec"):
        models.load(path)
    del tensors["blk.1.ffn_up.weight"]
    path = write_model(tmp_path / "a.gguf", TIED, tensors)
    with pytest.raises(ValueError, match="1 missing: `model.layers.1.mlp.up_proj.weight`"):
        models.load(path)


def test_an_unknown_architecture(tmp_path, tiny):
    path = write_model(tmp_path / "a.gguf", TIED, tensors_of(tiny), arch="mamba")
    with pytest.raises(ValueError, match="architecture `mamba` is not one of llama, qwen2, qwen3"):
        models.load(path)


def test_a_model_of_one_part_is_whole(tmp_path, tiny):
    keys = {"split.count": ("uint16", 1)}
    assert open_gguf(write_model(tmp_path / "a.gguf", TIED, tensors_of(tiny), keys=keys)).tensors


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.gguf: no such file"):
        models.load(tmp_path / "gone.gguf")


def header(tensors=0, keys=0, rest=b"", magic=b"GGUF", version=3):
    return magic + struct.pack("<IQQ", version, tensors, keys) + rest


def text_of(value):
    return struct.pack("<Q", len(value)) + value


def placed(*records, data=128):
    """Tensors `a`, `b`, each given by its numbers, its type and its place in the data."""
    rest = b"".join(
        text_of(name) + struct.pack("<IQIQ", 1, *record)
        for name, record in zip((b"a", b"b"), records, strict=True)
    )
    whole = header(tensors=len(records), rest=rest)
    return whole + bytes(-len(whole) % 32 + data)


BROKEN = {
    "empty": (b"", "only 0 bytes"),
    "another magic": (header(magic=b"GGML", rest=bytes(9)), "does not start with GGUF"),
    "big-endian": (header(version=3 << 24, rest=bytes(9)), "version 50331648 is not 2 or 3"),
    "2^60 tensors": (header(tensors=1 << 60), "claims 1152921504606846976 tensors, more than"),
    "2^60 keys": (header(keys=1 << 60), "claims 1152921504606846976 keys, more than"),
    "a long name": (header(keys=1, rest=struct.pack("<Q", 1 << 50) + bytes(40)), "bytes wanted"),
    "an endless array": (
        header(keys=1, rest=text_of(b"a") + struct.pack("<IIQ", 9, 4, 1 << 58) + bytes(40)),
        "claims 288230376151711744 elements of an array",
    ),
    "an endless array of texts": (
        header(keys=1, rest=text_of(b"a") + struct.pack("<IIQ", 9, 8, 1 << 40) + bytes(40)),
        "claims 1099511627776 elements of an array",
    ),
    "an unknown type": (
        header(keys=1, rest=text_of(b"a") + struct.pack("<I", 99) + bytes(40)),
        "a value of the unknown type 99",
    ),
    "not UTF-8": (header(keys=1, rest=text_of(b"\xff\xfe") + bytes(40)), "invalid start byte"),
    "a key twice": (
        header(keys=2, rest=(text_of(b"a") + struct.pack("<IB", 0, 1)) * 2 + bytes(20)),
        "the key `a` is there twice",
    ),
    "nine dimensions": (
        header(tensors=1, rest=text_of(b"a") + struct.pack("<I", 9) + bytes(80)),
        "tensor `a` has 9 dimensions",
    ),
    "a huge tensor": (
        header(
            tensors=1,
            rest=text_of(b"a") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 20, 0, 0) + bytes(64),
        ),
        "tensor `a` ends past the end of the file",
    ),
    "an empty tensor": (
        header(
            tensors=1,
            rest=text_of(b"a") + struct.pack("<IQQIQ", 2, 0, 1 << 60, 2, 0) + bytes(64),
        ),
        r"tensor `a` is empty, of shape \(1152921504606846976, 0\)",
    ),
    "an unknown block": (
        header(tensors=1, rest=text_of(b"a") + struct.pack("<IQIQ", 1, 4, 77, 0) + bytes(64)),
        "tensor `a` has the unknown type 77",
    ),
    "half a block": (
        header(tensors=1, rest=text_of(b"a") + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(64)),
        "rows of 33 are not whole blocks of 32",
    ),
    "a tensor twice": (
        header(
            tensors=2,
            rest=(text_of(b"a") + struct.pack("<IQIQ", 1, 1, 0, 0)) * 2 + bytes(64),
        ),
        "tensor `a` is there twice",
    ),
    "an overlap": (placed((8, 0, 0), (8, 0, 0)), "`b` begins at byte 0 of the data, expected 32"),
    "off the alignment": (placed((8, 0, 0), (8, 0, 36)), "`b` begins at byte 36 of the data"),
    "a hole": (placed((8, 0, 0), (8, 0, 64)), "`b` begins at byte 64 of the data, expected 32"),
    "a type half as wide": (placed((16, 1, 0), (8, 0, 64)), "`b` begins at byte 64 of the data"),
    "the last too narrow": (placed((8, 0, 0), (16, 1, 32), data=96), "32 bytes follow the last"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers(tmp_path, case):
    raw, text = BROKEN[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(ValueError, match=text) as error:
        open_gguf(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert peak < 1_000_000


def test_a_file_cut_anywhere_is_an_error(saved):
    whole = saved.read_bytes()
    ends = [*range(0, 2400, 7), *range(2400, len(whole), 4999), len(whole) - 1]
    for end in ends:
        saved.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="not a (whole )?GGUF file"):
            open_gguf(saved)


def test_flipped_bytes_are_read_or_refused_never_worse(saved):
    whole = bytearray(saved.read_bytes())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        at, was = int(rng.integers(0, 2400)), None
        was, whole[at] = whole[at], int(rng.integers(0, 256))
        saved.write_bytes(whole)
        whole[at] = was
        try:
            file = open_gguf(saved)
            config_of(file.metadata, weights_of(file).shapes, path=saved)
        except ValueError as error:
            assert str(saved) in str(error)
            refused += 1
    assert refused > 50
