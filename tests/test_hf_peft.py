"""lora_jax/hf/peft*.py without PEFT: names, shapes, strictness, damaged files, whole writes."""

import dataclasses
import json
import os
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_trees import D, L, V, nested, planted, random_params, randomized
from safetensors.numpy import load_file, save_file

from lora_jax.array import LoraArray, SavedArray
from lora_jax.config import LoraConfig
from lora_jax.hf import peft, peft_config, peft_files, peft_slots

QV = LoraConfig(rank=4, alpha=6, target_modules=("q_proj", "v_proj"))
BASE = "base_model.model.model.layers"


@pytest.fixture
def tree():
    return randomized(planted(random_params(), QV), QV)


@pytest.fixture
def directory(tree, tmp_path):
    peft.save_peft(tmp_path / "adapter", tree, QV)
    return tmp_path / "adapter"


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


# ---- names and layout


def test_a_layer_is_a_pair_of_transposed_matrices(tree):
    _, tensors = peft.to_peft(tree, QV)
    q = tree["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert len(tensors) == 2 * 2 * L
    a = tensors[f"{BASE}.2.self_attn.q_proj.lora_A.weight"]
    b = tensors[f"{BASE}.2.self_attn.q_proj.lora_B.weight"]
    assert a.dtype == b.dtype == np.float32
    np.testing.assert_array_equal(a, np.asarray(q.a)[2].T)
    np.testing.assert_array_equal(b, np.asarray(q.b)[2].T)


def test_stacked_and_unstacked_trees_write_the_same(tree):
    _, tensors = peft.to_peft(tree, QV)
    flat = planted(random_params(stacked=False), QV)
    filled = peft.fill(flat, QV, tensors)
    assert isinstance(filled["model"]["layers"]["1"]["self_attn"]["q_proj"]["kernel"], LoraArray)
    _, again = peft.to_peft(filled, QV)
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value)


def test_split_heads_are_flattened_in_hugging_faces_order():
    """A kernel (D, heads, head_dim), and one that contracts both, are PEFT's flat matrices."""
    rng = np.random.default_rng(0)
    config = LoraConfig(rank=2, alpha=2, target_modules=("q_proj", "o_proj"))
    flat = {
        "model.layers.0.self_attn.q_proj.kernel": jnp.zeros((6, 3, 5)),
        "model.layers.0.self_attn.o_proj.kernel": jnp.zeros((3, 5, 6)),
    }
    roles = dict(zip(flat, ("ioo", "iio"), strict=True))
    tree = planted(nested(flat), config, roles=roles)
    tensors = {
        f"{BASE}.0.self_attn.{name}_proj.lora_{part}.weight": rng.normal(size=shape).astype("f4")
        for name, part, shape in (
            ("q", "A", (2, 6)),
            ("q", "B", (15, 2)),
            ("o", "A", (2, 15)),
            ("o", "B", (6, 2)),
        )
    }
    filled = peft.fill(tree, config, tensors)
    attention = filled["model"]["layers"]["0"]["self_attn"]
    q, o = attention["q_proj"]["kernel"], attention["o_proj"]["kernel"]
    assert (q.b.shape, o.a.shape) == ((2, 3, 5), (3, 5, 2))
    b = tensors[f"{BASE}.0.self_attn.q_proj.lora_B.weight"]
    a = tensors[f"{BASE}.0.self_attn.o_proj.lora_A.weight"]
    np.testing.assert_array_equal(np.asarray(q.b).reshape(2, 15), b.T)
    np.testing.assert_array_equal(np.asarray(o.a).reshape(15, 2), a.T)
    _, again = peft.to_peft(filled, config)
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value)


def test_linen_collections_and_experts_are_named():
    config = LoraConfig(rank=2, target_modules=("up",))
    flat = {"params.layers.mlp.experts.up.kernel": jnp.zeros((2, 3, 4, 5))}
    tree = planted(nested(flat), config, roles={next(iter(flat)): "bbio"})
    slots = peft_slots.slots_of(tree, config)
    assert [s.key for s in slots][::2] == [
        f"base_model.model.layers.{i}.mlp.experts.{j}.up.lora_A.weight"
        for i in range(2)
        for j in range(3)
    ]


def test_a_stack_without_a_place_for_its_numbers_is_an_error():
    config = LoraConfig(rank=2, target_modules=("up",))
    leaf = LoraArray(
        w=jnp.zeros((3, 4, 5)),
        a=jnp.zeros((3, 4, 2)),
        b=jnp.zeros((3, 2, 5)),
        scale=jnp.ones(3),
        roles="bio",
    )
    with pytest.raises(ValueError, match="leaf `tower.up.kernel` stacks 1 dimension.* rename"):
        peft.to_peft({"tower": {"up": {"kernel": leaf}}}, config)


def test_bfloat16_base_and_saved_modules_keep_their_dtype(tmp_path):
    config = dataclasses.replace(QV, modules_to_save=("lm_head", "input_layernorm"))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params())
    tree = randomized(planted(half, config), config)
    peft.save_peft(tmp_path / "a", tree, config)
    _, tensors = peft.read_peft(tmp_path / "a")
    head = tensors["base_model.model.lm_head.weight"]
    assert head.dtype == ml_dtypes.bfloat16 and head.shape == (V, D)
    norm = tensors[f"{BASE}.1.input_layernorm.weight"]
    assert norm.dtype == ml_dtypes.bfloat16 and norm.shape == (D,)
    assert tensors[f"{BASE}.0.self_attn.q_proj.lora_A.weight"].dtype == np.float32
    equal(peft.fill(planted(half, config), config, tensors), tree)


def test_adapters_stored_in_16_bits_are_read_as_float32(tree, directory):
    path = directory / peft_files.TENSOR_FILE
    halved = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(path).items()}
    save_file(halved, path, metadata={"format": "pt"})
    config, tensors = peft.read_peft(directory)
    filled = peft.fill(planted(random_params(), QV), config, tensors)
    q = filled["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    want = tree["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert q.a.dtype == jnp.float32
    np.testing.assert_array_equal(q.a, want.a.astype(jnp.bfloat16).astype(jnp.float32))


def test_all_linear_is_written_as_names():
    config = LoraConfig(rank=2)
    fields, tensors = peft.to_peft(randomized(planted(random_params(), config), config), config)
    assert fields["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert len(tensors) == 2 * 7 * L


def test_all_linear_is_written_as_full_names_where_ends_would_mean_more():
    params = random_params()
    params["other"] = {"up_proj": {"kernel": jnp.zeros((3, 3))}}
    config = LoraConfig(rank=2, exclude_modules=("self_attn.q_proj",))
    tree = planted(params, config)
    assert "q_proj" not in peft.named_targets(tree, config)
    tree["other"]["up_proj"] = params["other"]["up_proj"]  # not adapted, though linear
    layers = tree["model"]["layers"]
    for block, name in (("self_attn", "k_proj"), ("self_attn", "v_proj"), ("self_attn", "o_proj")):
        layers[block][name] = params["model"]["layers"][block][name]
    assert peft.named_targets(tree, config) == sorted(
        f"model.layers.{i}.mlp.{p}_proj" for i in range(L) for p in ("down", "gate", "up")
    )


def test_layers_without_an_adapter_stay_zero(tree):
    config = LoraConfig(rank=4, alpha=6, target_modules=("q_proj",), layers_to_transform=1)
    blank = planted(random_params(), config)
    filled = randomized(blank, config)
    q = filled["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert not np.any(q.a[0]) and not np.any(q.b[2]) and np.any(q.a[1])
    _, tensors = peft.to_peft(filled, config)
    assert sorted(tensors) == [f"{BASE}.1.self_attn.q_proj.lora_{p}.weight" for p in "AB"]


# ---- the tree and the config agree, or it is an error


def changed(tree, **parts):
    q = tree["model"]["layers"]["self_attn"]["q_proj"]
    q["kernel"] = dataclasses.replace(q["kernel"], **parts)
    return tree


def test_another_scale_is_an_error(tree):
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj` has scale 3, .* give 1\.5"
    ):
        peft.to_peft(changed(tree, scale=jnp.full(L, 3.0)), QV)


def test_an_adapter_the_config_does_not_mean_is_an_error(tree):
    other = dataclasses.replace(QV, target_modules=("v_proj",))
    with pytest.raises(ValueError, match="q_proj` has an adapter beyond rank 0"):
        peft.to_peft(tree, other)
    smaller = dataclasses.replace(QV, rank=2, alpha=3)
    with pytest.raises(ValueError, match="has an adapter beyond rank 2"):
        peft.to_peft(tree, smaller)
    larger = dataclasses.replace(QV, rank=5)
    with pytest.raises(ValueError, match="its rank is 4, but the config gives .* rank 5"):
        peft.to_peft(tree, larger)


def test_dora_of_tree_and_config_agree(tree):
    with pytest.raises(ValueError, match="has no DoRA magnitude, but the config says use_dora=Tr"):
        peft.to_peft(tree, dataclasses.replace(QV, use_dora=True))
    with pytest.raises(ValueError, match="has DoRA magnitude, but the config says use_dora=False"):
        peft.to_peft(changed(tree, m=jnp.ones((L, D))), QV)


def test_a_trained_leaf_that_would_not_be_written_is_an_error(tree):
    head = tree["lm_head"]["kernel"]
    tree["lm_head"]["kernel"] = SavedArray(w=head, value=head + 1)
    with pytest.raises(ValueError, match="`lm_head.kernel` was trained, but .* do not mean it"):
        peft.to_peft(tree, QV)


def test_a_base_changed_for_good_is_an_error(tree):
    with pytest.raises(ValueError, match='init="pissa_niter_4", changed the base .* merged model'):
        peft.to_peft(tree, dataclasses.replace(QV, init="pissa_niter_4"))


def test_not_finite_or_nothing_adapted(tree):
    with pytest.raises(ValueError, match="no leaf carries an adapter"):
        peft.to_peft(random_params(), QV)
    q = tree["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    with pytest.raises(ValueError, match="q_proj.lora_A.weight` holds NaN or infinity"):
        peft.to_peft(changed(tree, a=q.a.at[1, 2, 3].set(jnp.inf)), QV)


# ---- keys


def test_a_tree_of_another_config_is_an_error(tree):
    _, tensors = peft.to_peft(tree, QV)
    other = dataclasses.replace(QV, target_modules=("v_proj",))
    with pytest.raises(ValueError, match="q_proj.kernel` has an adapter, but the config does not"):
        peft.fill(tree, other, tensors)


def test_missing_left_over_and_misshapen_keys_are_one_error(tree):
    _, tensors = peft.to_peft(tree, QV)
    q0 = f"{BASE}.0.self_attn.q_proj.lora_A.weight"
    tensors[q0.replace("q_proj", "q_prj")] = tensors.pop(q0)
    v1 = f"{BASE}.1.self_attn.v_proj.lora_B.weight"
    tensors[v1] = tensors[v1][:, :2]
    with pytest.raises(ValueError) as caught:
        peft.fill(planted(random_params(), QV), QV, tensors, source="here")
    text = str(caught.value)
    assert text.startswith("here: the adapter does not fit this model; 1 missing: `" + q0)
    assert "nearest in the file: `" + q0.replace("q_proj", "q_prj") in text
    assert "1 left over: `" + q0.replace("q_proj", "q_prj") in text
    assert f"1 misshapen: `{v1}` is (8, 2), expected (8, 4)" in text
    assert "\n" not in text


def test_an_adapter_of_another_model_says_how_many_keys(tree):
    _, tensors = peft.to_peft(tree, QV)
    strangers = {k.replace("model.layers", "transformer.h"): v for k, v in tensors.items()}
    with pytest.raises(ValueError, match=r"12 missing: .* and 9 more; 12 left over: .* and 9 more"):
        peft.fill(planted(random_params(), QV), QV, strangers)


def test_another_base_embedding_in_the_file_is_an_error():
    config = LoraConfig(rank=2, target_modules=("embed_tokens",))
    tree = randomized(planted(random_params(), config), config)
    _, tensors = peft.to_peft(tree, config)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert tensors[key].shape == (V, D)
    equal(peft.fill(planted(random_params(), config), config, tensors), tree)
    without = {k: v for k, v in tensors.items() if k != key}
    equal(peft.fill(planted(random_params(), config), config, without), tree)
    with pytest.raises(ValueError, match="is not this model's base weight"):
        peft.fill(planted(random_params(7), config), config, tensors)


# ---- vLLM


@pytest.mark.parametrize(
    "fields, what",
    [
        ({"use_dora": True}, r"DoRA \(use_dora=True\)"),
        ({"bias": "all"}, 'trained biases \\(bias="all"\\)'),
        ({"modules_to_save": ("lm_head",)}, r"whole saved modules \(lm_head\)"),
        ({"init": "pissa"}, r'a changed base weight \(init="pissa"\)'),
    ],
)
def test_vllm_refuses(fields, what, tmp_path):
    config = dataclasses.replace(QV, **fields)
    tree = randomized(planted(random_params(biases=True), config), config)
    with pytest.raises(ValueError, match=f"vLLM cannot serve an adapter with {what}; merge the ad"):
        peft.save_peft(tmp_path / "a", tree, config, target="vllm")
    assert not list(tmp_path.iterdir())


def test_vllm_folds_scales_and_pads_ranks(tmp_path):
    config = LoraConfig(
        rank=4,
        alpha=6,
        target_modules=("q_proj", "v_proj"),
        rank_pattern={"v_proj": 2},
        alpha_pattern={r"1\.self_attn\.q_proj": 2},
        use_rslora=True,
    )
    tree = randomized(planted(random_params(), config), config)
    _, plain = peft.to_peft(tree, config)
    peft.save_peft(tmp_path / "a", tree, config, target="vllm")
    read, folded = peft.read_peft(tmp_path / "a")
    assert (read.rank, read.alpha, read.use_rslora) == (4, 4, False)
    assert not read.rank_pattern and not read.alpha_pattern
    for name, scale in (("0.self_attn.q_proj", 3.0), ("1.self_attn.q_proj", 1.0)):
        b = f"{BASE}.{name}.lora_B.weight"
        np.testing.assert_array_equal(folded[b], plain[b] * scale)
    a, b = (f"{BASE}.2.self_attn.v_proj.lora_{p}.weight" for p in "AB")
    assert folded[a].shape == (4, D) and folded[b].shape == (8, 4)
    s = np.float32(6 / np.sqrt(2))
    np.testing.assert_allclose(folded[b] @ folded[a], s * plain[b] @ plain[a], rtol=1e-5, atol=1e-5)


def test_vllm_leaves_numbers_alone_when_one_scale_holds(tree):
    fields, tensors = peft.to_peft(tree, QV)
    from lora_jax.hf.peft_vllm import for_vllm

    same, folded = for_vllm(fields, tensors, QV)
    assert same == fields
    for name, value in tensors.items():
        np.testing.assert_array_equal(folded[name], value)


def test_unknown_target_of_export(tree, tmp_path):
    with pytest.raises(ValueError, match='target must be one of "peft", "vllm", got \'tgi\''):
        peft.save_peft(tmp_path / "a", tree, QV, target="tgi")


# ---- files: reading


def rewrite_config(directory, **fields):
    path = directory / peft_files.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def raw(header: dict | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def one(dtype="F32", shape=(2,), span=(0, 8)) -> dict:
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}}


DAMAGED = [
    (b"", "not a whole safetensors file"),
    (b"\x00" * 4, "not a whole safetensors file"),
    (struct.pack("<Q", 2**60) + b"{}", "header claims 1152921504606846976 bytes"),
    (raw(b"{", b""), "header is not JSON"),
    (raw(b"[]", b""), "not a JSON object"),
    (raw(one(), b"\0" * 4), "tensor `x`"),
    (raw(one(shape=(3,)), b"\0" * 8), "tensor `x`"),
    (raw(one(shape=(2**40,), span=(0, 2**42)), b"\0" * 8), "tensor `x`"),
    (raw(one(shape=(-2,)), b"\0" * 8), "tensor `x`"),
    (raw(one(span=(4, 12)), b"\0" * 12), "`x`"),
    (raw(one(), b"\0" * 12), "after the last tensor"),
    (raw(one("I32"), b"\0" * 8), "tensor `x` is I32, expected F32, F16, BF16"),
    (raw(one("F64", (1,)), b"\0" * 8), "tensor `x` is F64, expected"),
    (raw(one("Q7"), b"\0" * 8), "`x` has the unknown dtype 'Q7'"),
    (raw(one(shape=(0,), span=(0, 0)), b""), r"tensor `x` is empty \(shape \(0,\)\)"),
    (raw(one(), b"\0" * 4 + struct.pack("<f", float("nan"))), "tensor `x` holds NaN or infinity"),
    (raw(one("BF16", (1,), (0, 2)), b"\x80\x7f"), "tensor `x` holds NaN or infinity"),
    (
        raw(json.dumps(one())[:-1].encode() + b"," + json.dumps(one())[1:].encode(), b"\0" * 8),
        "`x`",
    ),
]


@pytest.mark.parametrize("content, text", DAMAGED, ids=lambda v: v[:30] if type(v) is str else "")
def test_damaged_weights(content, text, directory):
    path = directory / peft_files.TENSOR_FILE
    path.write_bytes(content)
    with pytest.raises(ValueError, match=text) as caught:
        peft.read_peft(directory)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, text",
    [
        (b"", "not JSON that PEFT writes"),
        (b"{", "not JSON that PEFT writes"),
        (b"\xff\xfe", "not JSON that PEFT writes"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"r": 1, "r": 2}', "`r` stands twice in one object"),
        (b"[" * 200_000, "nested too deeply|not JSON"),
        (b'{"r": 4}', "`peft_type` is missing"),
        (b'{"peft_type": "LORA", "r": 4}', "`target_modules` is missing"),
        (
            b'{"peft_type": "LORA", "target_modules": ["q"], "use_qalora": true}',
            "`use_qalora` = True",
        ),
        (b'{"peft_type": "LORA", "target_modules": ["q"], "r": "4"}', "rank must be an integer"),
    ],
    ids=lambda v: v[:30] if isinstance(v, str) else "",
)
def test_damaged_config(content, text, directory):
    path = directory / peft_files.CONFIG_FILE
    path.write_bytes(content)
    with pytest.raises((ValueError, TypeError), match=text) as caught:
        peft.read_peft(directory)
    assert str(path) in str(caught.value)


def test_missing_files(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        peft.read_peft(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a directory with adapter_config.json, got a fi"):
        peft.read_peft(directory / peft_files.CONFIG_FILE)
    (directory / peft_files.TENSOR_FILE).rename(directory / "model.safetensors")
    with pytest.raises(
        FileNotFoundError, match="adapter_model.safetensors is missing.* holds README"
    ):
        peft.read_peft(directory)
    (directory / peft_files.CONFIG_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        peft.read_peft(directory)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_refused_with_the_reason(name, directory):
    (directory / peft_files.TENSOR_FILE).rename(directory / name)
    with pytest.raises(ValueError, match=f"{name}: pickle files are refused, because reading one"):
        peft.read_peft(directory)


def test_links_out_of_the_directory_are_refused(directory, tmp_path):
    path = directory / peft_files.TENSOR_FILE
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="links to .*elsewhere, outside the adapter's directory"):
        peft.read_peft(directory)


def test_links_of_the_hubs_cache_are_followed(tree, directory, tmp_path):
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate((peft_files.CONFIG_FILE, peft_files.TENSOR_FILE)):
        (directory / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    config, tensors = peft.read_peft(snapshot)
    equal(peft.fill(planted(random_params(), config), config, tensors), tree)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_is_an_error_or_harmless(data, tmp_path_factory):
    """Cut, overwritten or inserted bytes: one ValueError, or values of the right shapes."""
    whole = _whole(tmp_path_factory)
    where = data.draw(st.integers(0, len(whole) - 1))
    damage = data.draw(st.binary(min_size=1, max_size=12))
    kind = data.draw(st.sampled_from(["cut", "overwrite", "insert"]))
    content = {
        "cut": whole[:where],
        "overwrite": whole[:where] + damage + whole[where + len(damage) :],
        "insert": whole[:where] + damage + whole[where:],
    }[kind]
    directory = tmp_path_factory.getbasetemp() / "fuzzed"
    (directory / peft_files.TENSOR_FILE).write_bytes(content)
    try:
        config, tensors = peft.read_peft(directory)
        peft.fill(_blank(), config, tensors)
    except ValueError as error:
        assert len(str(error)) < 2000


LIES = {
    "dtype": st.sampled_from(["F64", "I8", "BOOL", "", None, 3, "F16", "BF16"]),
    "shape": st.lists(st.integers(-2, 2**62) | st.booleans() | st.floats(), max_size=4),
    "data_offsets": st.lists(st.integers(-1, 2**62), max_size=3),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_lie_of_a_header_is_an_error(data, tmp_path_factory):
    """Valid JSON that says something else of one tensor, or of another: one ValueError."""
    whole = _whole(tmp_path_factory)
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    names = sorted(name for name in header if name != "__metadata__")
    name, field = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(sorted(LIES)))
    if data.draw(st.booleans()):
        header[name][field] = data.draw(LIES[field].filter(lambda v: v != header[name][field]))
    else:  # its numbers under another name, or another's under its own
        other = data.draw(st.sampled_from([*(n for n in names if n != name), "left.over"]))
        header[other] = header.pop(name)
    directory = tmp_path_factory.getbasetemp() / "fuzzed"
    (directory / peft_files.TENSOR_FILE).write_bytes(raw(header, whole[8 + size :]))
    with pytest.raises(ValueError) as caught:
        config, tensors = peft.read_peft(directory)
        peft.fill(_blank(), config, tensors)
    assert len(str(caught.value)) < 2000 and "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
FIELDS = sorted({*peft_config.MAPPED, *peft_config.CARRIED, *peft_config.REFUSED, "unheard_of"})


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_config_is_an_error_or_a_config(changes):
    """Whatever a field holds: one error of one line, or a config that survives being written."""
    fields = {**QV.to_peft(), **changes}
    try:
        config = LoraConfig.from_peft(fields)
    except (ValueError, TypeError) as error:
        assert "\n" not in str(error).replace(repr(changes), "")
        return
    assert LoraConfig.from_peft(config.to_peft()) == config


_CACHE: dict = {}


def _blank():
    if "blank" not in _CACHE:
        _CACHE["blank"] = planted(random_params(), QV)
    return _CACHE["blank"]


def _whole(tmp_path_factory) -> bytes:
    directory = tmp_path_factory.getbasetemp() / "fuzzed"
    if "whole" not in _CACHE or not directory.exists():
        peft.save_peft(directory, randomized(_blank(), QV), QV)
        _CACHE["whole"] = (directory / peft_files.TENSOR_FILE).read_bytes()
    return _CACHE["whole"]


# ---- files: writing


def test_the_json_is_as_peft_writes_it(directory):
    text = (directory / peft_files.CONFIG_FILE).read_text()
    fields = json.loads(text)
    assert text == json.dumps(fields, indent=2, sort_keys=True)
    assert fields["task_type"] == "CAUSAL_LM" and fields["inference_mode"] is True
    assert sorted(p.name for p in directory.iterdir()) == sorted(
        ["README.md", peft_files.CONFIG_FILE, peft_files.TENSOR_FILE]
    )


def test_the_model_card_says_what_it_is_and_a_users_own_stays(tree, tmp_path):
    place = tmp_path / "a"
    peft.save_peft(place, tree, QV, base_model_name="org/it's")
    text = (place / "README.md").read_text()
    assert text.startswith("---\nbase_model: 'org/it''s'\nlibrary_name: peft\n")
    for line in ("- rank: 4", "- alpha: 6", "- adapted modules: `q_proj`, `v_proj`"):
        assert line in text.splitlines()
    assert 'AutoModelForCausalLM.from_pretrained("org/it\'s")' in text
    peft.save_peft(place, tree, QV, task_type="SEQ_CLS")  # the card of what is replaced goes too
    text = (place / "README.md").read_text()
    assert "- base model: not recorded" in text and "SequenceClassification" in text
    (place / "README.md").write_text(text + "mine")
    peft.save_peft(place, tree, QV, base_model_name="org/base")
    assert (place / "README.md").read_text() == text + "mine"


def test_names_given_and_names_kept(tree, tmp_path):
    peft.save_peft(tmp_path / "a", tree, QV, base_model_name="org/base", task_type="SEQ_CLS")
    config, _ = peft.read_peft(tmp_path / "a")
    assert config.extra["base_model_name_or_path"] == "org/base"
    peft.save_peft(tmp_path / "b", tree, config)
    assert peft.read_peft(tmp_path / "b")[0] == config


def test_import_export_import_is_bitwise(tree, directory, tmp_path):
    config, tensors = peft.read_peft(directory)
    again = peft.fill(planted(random_params(), config), config, tensors)
    equal(again, tree)
    peft.save_peft(tmp_path / "b", again, config)
    for name in (peft_files.CONFIG_FILE, peft_files.TENSOR_FILE):
        assert (tmp_path / "b" / name).read_bytes() == (directory / name).read_bytes()


def snapshot(directory) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_other_files_stay_and_both_are_replaced(tree, directory):
    (directory / "README.md").write_text("mine")
    other = dataclasses.replace(QV, alpha=12)
    scaled = jax.tree.map(
        lambda x: dataclasses.replace(x, scale=x.scale * 2) if isinstance(x, LoraArray) else x,
        tree,
        is_leaf=lambda x: isinstance(x, LoraArray),
    )
    peft.save_peft(directory, scaled, other)
    assert peft.read_peft(directory)[0].alpha == 12
    assert (directory / "README.md").read_text() == "mine"
    assert len(list(directory.iterdir())) == 3


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_adapter(call, tree, directory, monkeypatch):
    before = snapshot(directory)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="could not be written: No space left on device; make ro"):
            peft.save_peft(directory, tree, QV, base_model_name="other")
    assert snapshot(directory) == before
    assert len(list(directory.parent.iterdir())) == 1


def test_a_failing_disk_leaves_no_new_directory(tree, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device"):
        peft.save_peft(tmp_path / "new", tree, QV)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way(tree, tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match="expected a directory to write the adapter to, got a fi"):
        peft.save_peft(tmp_path / "a", tree, QV)
    with pytest.raises(OSError, match="could not be written"):
        peft.save_peft(tmp_path / "a" / "b", tree, QV)


def test_a_7b_shaped_adapter_needs_no_base(tmp_path):
    """32 layers of d=4096: the base is never touched, so a zero-strided one is enough."""
    wide = np.broadcast_to(np.float32(0), (32, 4096, 4096))
    rng = np.random.default_rng(0)
    leaf = LoraArray(
        w=wide,
        a=rng.normal(size=(32, 4096, 8)).astype(np.float32),
        b=rng.normal(size=(32, 8, 4096)).astype(np.float32),
        scale=np.full(32, 2, np.float32),
        roles="bio",
    )
    tree = nested({f"model.layers.self_attn.{p}_proj.kernel": leaf for p in "qv"})
    config = LoraConfig(target_modules=("q_proj", "v_proj"))
    peft.save_peft(tmp_path / "big", tree, config)
    _, tensors = peft.read_peft(tmp_path / "big")
    filled = peft.fill(tree, config, tensors)
    q = filled["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(q.a, leaf.a)
    assert q.w is wide
