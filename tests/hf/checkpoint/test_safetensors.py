"""Reading safetensors: exact values, and every way a file or directory can be wrong."""

import json
import struct
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.hf.checkpoint.fill import fill
from lora_jax.hf.checkpoint.safetensors import load_file, open_directory, read_header
from lora_jax.models import init

from tests.support.tiny import SMALLEST, as_hf

pytestmark = pytest.mark.once

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.float32) / 3


def write(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def shard(directory, placed, **files):
    for name, tensors in files.items():
        save_file(tensors, directory / f"{name}.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return directory


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_values_of_every_float(tmp_path, dtype):
    save_file({"a": A.astype(dtype), "b": B.astype(dtype)}, tmp_path / "model.safetensors")
    weights = open_directory(tmp_path)
    assert weights.shapes == {"a": (2, 3), "b": (4,)}
    assert weights.read("a").dtype == dtype
    np.testing.assert_array_equal(weights.read("a"), A.astype(dtype))
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["b"], B.astype(dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, dtype, value):
    bad = A.astype(dtype)
    bad[1, 2] = value
    # The largest number of the dtype is one.
    most = np.full_like(bad, ml_dtypes.finfo(dtype).max)
    save_file({"model.bad": bad, "most": most}, tmp_path / "model.safetensors")
    weights = open_directory(tmp_path)
    np.testing.assert_array_equal(weights.read("most"), most)
    text = r"model.safetensors: tensor `model.bad` has 1 values .* the first at \[1, 2\]"
    with pytest.raises(ValueError, match=text):
        weights.read("model.bad")


def test_shards_are_one_checkpoint(tmp_path):
    placed = {"a": "x.safetensors", "b": "y.safetensors"}
    weights = open_directory(shard(tmp_path, placed, x={"a": A}, y={"b": B}))
    assert set(weights.shapes) == {"a", "b"} and weights.where("b") == "y.safetensors"
    np.testing.assert_array_equal(weights.read("b"), B)


def test_shards_may_be_links_as_in_the_hub_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    save_file({"a": A}, blobs / "123")
    (snapshot / "x.safetensors").symlink_to(blobs / "123")
    np.testing.assert_array_equal(
        open_directory(shard(snapshot, {"a": "x.safetensors"})).read("a"), A
    )


HEADERS = {
    "length beyond the file": (b"{}", b"", 10**15, "claims 1000000000000000 bytes, the file has"),
    "not JSON": (b"{oops", b"", None, "header is not JSON"),
    "not text": (b"\xff\xfe{}", b"", None, "header is not JSON"),
    "endless number": (b'{"a": ' + b"9" * 5000 + b"}", b"", None, "header is not JSON"),
    "not an object": ([1], b"", None, "header is not a JSON object"),
    "a name twice": (b'{"a": {}, "a": {}}', b"", None, "`a` occurs twice"),
    "not a tensor's entry": ({"a": 3}, b"", None, "entry for `a` is not a tensor's"),
    "offsets missing": (
        {"a": {"dtype": "F32", "shape": [1]}},
        b"",
        None,
        "entry for `a` is not a tensor's",
    ),
    "unknown dtype": ({"a": entry("F31")}, bytes(8), None, "`a` has the unknown dtype 'F31'"),
    "negative size": ({"a": entry(shape=(-2,))}, bytes(8), None, "`a` has impossible sizes"),
    "fractional size": ({"a": entry(shape=(2.0,))}, bytes(8), None, "`a` has impossible sizes"),
    "offsets backwards": (
        {"a": entry(begin=8, end=0)},
        bytes(8),
        None,
        "`a` has impossible sizes",
    ),
    "a shape too large": (
        {"a": entry(shape=(10**9, 10**9))},
        bytes(8),
        None,
        r"lies: tensor `a` \(F32 \[1000000000, 1000000000\]\) takes 4000000000000000000 bytes",
    ),
    "cut short": (
        {"a": entry(shape=(10**12,), end=4 * 10**12)},
        bytes(8),
        None,
        "cut short: tensor `a` ends at byte 4000000000000 of the data, the file has 8",
    ),
    "overlap": ({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12), None, "overlap before `b`"),
    "gap": ({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20), None, "a gap or an overlap"),
    "more bytes than tensors": ({"a": entry()}, bytes(12), None, "4 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(tmp_path, case):
    header, data, length, text = HEADERS[case]
    path = write(tmp_path / "model.safetensors", header, data, length)
    tracemalloc.start()
    with pytest.raises(ValueError, match=text) as error:
        open_directory(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert peak < 1_000_000  # nothing of what the header claims


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file({"a": A}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a whole safetensors file|cut short"):
        read_header(path)


def test_a_missing_file_and_a_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights: neither model.safetensors nor"):
        open_directory(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone: no such directory"):
        open_directory(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="x.safetensors: no such file"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickle_is_refused_with_the_reason(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=f"{name}: a pickle file, refused.*runs whatever code"):
        open_directory(tmp_path)


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3"])
def test_quantized_weights_are_refused(tmp_path, dtype):
    write(tmp_path / "model.safetensors", {"a": entry(dtype, end=2)}, bytes(2))
    with pytest.raises(ValueError, match=f"tensor `a` has dtype {dtype}; only F64, F32, F16, BF16"):
        open_directory(tmp_path)


def test_indices_may_be_there_but_not_be_read(tmp_path):
    save_file({"a": A, "position_ids": np.arange(3)}, tmp_path / "model.safetensors")
    weights = open_directory(tmp_path)
    np.testing.assert_array_equal(weights.read("a"), A)
    with pytest.raises(ValueError, match="tensor `position_ids` has dtype I64; only F64, F32"):
        weights.read("position_ids")


@pytest.mark.parametrize(
    "place", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 3, None]
)
def test_an_index_that_points_outside(tmp_path, place):
    save_file({"a": A}, tmp_path / "x.safetensors")
    directory = tmp_path / "model"
    directory.mkdir()
    with pytest.raises(ValueError, match="index.json: tensor `a` lies outside the directory"):
        open_directory(shard(directory, {"a": place}))


def test_an_index_and_its_shards_must_agree(tmp_path):
    placed = {"a": "x.safetensors", "b": "y.safetensors"}
    with pytest.raises(FileNotFoundError, match="y.safetensors: shard missing"):
        open_directory(shard(tmp_path, placed, x={"a": A}))
    with pytest.raises(ValueError, match="tensor `b` is not in y.safetensors"):
        open_directory(shard(tmp_path, {**placed, "c": "y.safetensors"}, y={"c": B}))
    with pytest.raises(ValueError, match="y.safetensors: tensor `c` is not in model.safetensors"):
        open_directory(shard(tmp_path, placed, y={"b": B, "c": B}))
    with pytest.raises(ValueError, match="tensor `a` is a duplicate: .* places it in x.safe"):
        open_directory(shard(tmp_path, placed, y={"b": B, "a": A}))


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_without_a_map(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="has no `weight_map` object"):
        open_directory(tmp_path)


def test_an_index_that_is_not_json(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{\n"weight_map": oops}')
    with pytest.raises(ValueError, match="index.json:2: not JSON"):
        open_directory(tmp_path)


# Filling a tree: all keys are accounted for, in one message.


@pytest.fixture(scope="module")
def tiny():
    return init(jax.random.key(0), SMALLEST)


def test_fill_gives_back_every_number(tmp_path, tiny):
    save_file(as_hf(tiny), tmp_path / "model.safetensors")
    loaded = fill(tiny.forward.shapes(), open_directory(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, loaded, tiny.params)


CHANGES = {
    "missing": (
        lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
        "1 missing: `model.layers.1.mlp.up_proj.weight`",
    ),
    "left over": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": A}),
        "1 not part of the model: `model.layers.2.mlp.up_proj.weight` in model.safetensors",
    ),
    "misshapen": (
        lambda t: t.update({"model.norm.weight": B[:3]}),
        r"1 misshapen: `model.norm.weight` in model.safetensors has shape \(3,\), expected \(4,\)",
    ),
    "transposed": (
        lambda t: t.update({"lm_head.weight": np.ascontiguousarray(t["lm_head.weight"].T)}),
        r"`lm_head.weight` in model.safetensors has shape \(4, 11\), expected \(11, 4\)",
    ),
    "misspelt": (
        lambda t: t.update({"model.final_norm.weight": t.pop("model.norm.weight")}),
        "1 missing: `model.norm.weight`; 1 not part of .*; nearest to `model.norm.weight`: "
        "`model.final_norm.weight`",
    ),
    "many": (lambda t: [t.pop(n) for n in list(t)[:5]], "5 missing: .* and 2 more"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_keys_that_do_not_fit(tmp_path, tiny, case):
    change, text = CHANGES[case]
    tensors = as_hf(tiny)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=text) as error:
        fill(tiny.forward.shapes(), open_directory(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_what_old_checkpoints_carry_is_let_through(tmp_path, tiny):
    tensors = as_hf(tiny)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = B
    save_file(tensors, tmp_path / "model.safetensors")
    fill(tiny.forward.shapes(), open_directory(tmp_path))
