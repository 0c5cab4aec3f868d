"""PEFT directories as files: damaged ones are refused, new ones are written whole or not at all."""

import dataclasses
import json
import os
import struct

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_jax import checkpoint
from lora_jax.array import LoraArray
from lora_jax.config import peft as peft_config
from lora_jax.config.lora import LoraConfig
from lora_jax.hf.peft import api, save
from lora_jax.hf.peft import directory as peft_files
from lora_jax.hf.peft.card import auto_class_of, card, is_encoder

from tests.support.peft_trees import QV, equal, nested, planted, random_params, randomized

pytestmark = pytest.mark.once


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
        api.read_peft(directory)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, text",
    [
        (b"", ":1: not JSON"),
        (b"{", ":1: not JSON"),
        (b"\xff\xfe", ":1: not UTF-8 text"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"r": 1, "r": 2}', "`r` occurs twice in one object"),
        (b"[" * 200_000, "nested too deeply|not JSON"),
        (b'{"r": 4}', ".peft_type. is missing"),
        (b'{"peft_type": "LORA", "r": 4}', ".target_modules. is missing"),
        (
            b'{"peft_type": "LORA", "target_modules": ["q"], "use_qalora": true}',
            ".use_qalora. = True",
        ),
        (b'{"peft_type": "LORA", "target_modules": ["q"], "r": "4"}', '"r" must be an integer'),
    ],
    ids=lambda v: v[:30] if isinstance(v, str) else "",
)
def test_damaged_config(content, text, directory):
    path = directory / peft_files.CONFIG_FILE
    path.write_bytes(content)
    with pytest.raises((ValueError, TypeError), match=text) as caught:
        api.read_peft(directory)
    assert str(path) in str(caught.value)


def test_missing_files(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        api.read_peft(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a directory with adapter_config.json, got a fi"):
        api.read_peft(directory / peft_files.CONFIG_FILE)
    (directory / peft_files.TENSOR_FILE).rename(directory / "model.safetensors")
    with pytest.raises(
        FileNotFoundError, match="adapter_model.safetensors is missing.* holds README"
    ):
        api.read_peft(directory)
    (directory / peft_files.CONFIG_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        api.read_peft(directory)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_refused_with_the_reason(name, directory):
    (directory / peft_files.TENSOR_FILE).rename(directory / name)
    with pytest.raises(ValueError, match=f"{name}: pickle files are refused, because reading one"):
        api.read_peft(directory)


def test_links_out_of_the_directory_are_refused(directory, tmp_path):
    path = directory / peft_files.TENSOR_FILE
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="links to .*elsewhere, outside its directory"):
        api.read_peft(directory)


def test_links_of_the_hubs_cache_are_followed(tree, directory, tmp_path):
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate((peft_files.CONFIG_FILE, peft_files.TENSOR_FILE)):
        (directory / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    config, tensors = api.read_peft(snapshot)
    equal(api.fill(planted(random_params(), config), config, tensors), tree)


# Damage may write a prefix that is stripped.
@pytest.mark.filterwarnings("ignore:.* tensors have names that PEFT does not write")
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
        config, tensors = api.read_peft(directory)
        api.fill(_blank(), config, tensors)
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
        config, tensors = api.read_peft(directory)
        api.fill(_blank(), config, tensors)
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
        api.save_peft(directory, randomized(_blank(), QV), QV)
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


def test_a_folder_of_orbax_is_sent_to_its_reader(tree, tmp_path):
    checkpoint.save(tmp_path / "a", tree, QV)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in ("a", "run"):
        with pytest.raises(FileNotFoundError, match="read it with lora.checkpoint.restore"):
            api.read_peft(tmp_path / name)


@pytest.mark.parametrize(
    ("paths", "task"),
    [
        (("model.embed_tokens.embedding", "model.layers.mlp.up_proj.kernel"), "CAUSAL_LM"),
        (("transformer.wte.embedding", "transformer.h.0.attn.c_attn.kernel"), "CAUSAL_LM"),
        (("gpt_neox.embed_in.embedding", "gpt_neox.layers.mlp.dense_h_to_4h.kernel"), "CAUSAL_LM"),
        (("up.kernel", "down.kernel"), None),
        (("encoder.layers.up.kernel", "shared.embed_tokens.embedding"), None),
        (("model.embed_tokens.embedding", "model.layers.up.kernel", "score.kernel"), None),
    ],
    ids=str,
)
def test_only_a_language_model_of_transformers_has_its_task(paths, task):
    assert save.task_of(paths, ()) == task


def test_a_model_of_one_s_own_has_no_task_unless_it_is_given(tmp_path):
    leaf = LoraArray(np.ones((4, 3)), np.ones((4, 2)), np.ones((2, 3)), np.float32(1))
    config = LoraConfig(rank=2, alpha=2, target_modules=("up",))
    for asked, task in (("auto", None), ("CAUSAL_LM", "CAUSAL_LM")):
        api.save_peft(tmp_path / "a", {"up": {"kernel": leaf}}, config, task_type=asked)
        fields = json.loads((tmp_path / "a" / peft_files.CONFIG_FILE).read_text())
        assert fields["task_type"] == task


def test_the_model_card_says_what_it_is_and_a_users_own_stays(tree, tmp_path):
    place = tmp_path / "a"
    api.save_peft(place, tree, QV, base_model_name="org/it's\nname: other")  # no hub id
    text = (place / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: peft\n")
    api.save_peft(place, tree, QV, base_model_name="org/base")
    text = (place / "README.md").read_text()
    assert text.startswith("---\nbase_model: 'org/base'\nlibrary_name: peft\n")
    for line in ("- rank: 4", "- alpha: 6", "- adapted modules: `q_proj`, `v_proj`"):
        assert line in text.splitlines()
    assert "AutoModelForCausalLM.from_pretrained('org/base')" in text
    api.save_peft(place, tree, QV, task_type="SEQ_CLS")  # the card of what is replaced goes too
    text = (place / "README.md").read_text()
    assert "- base model: not recorded" in text and "SequenceClassification" in text
    (place / "README.md").write_text(text + "mine")
    api.save_peft(place, tree, QV, base_model_name="org/base")
    assert (place / "README.md").read_text() == text + "mine"


ENCODER = "bert.embeddings.word_embeddings.embedding", "bert.encoder.layer.output.dense.kernel"


@pytest.mark.parametrize(
    ("head", "task", "want"),
    [
        (("cls.predictions.bias",), None, "AutoModelForMaskedLM"),
        (("classifier.kernel", "bert.pooler.dense.kernel"), None, "AutoModelForSequenceClass"),
        (("classifier.kernel",), None, "AutoModelForTokenClassification"),
        (("qa_outputs.kernel",), None, "AutoModelForQuestionAnswering"),
        ((), "FEATURE_EXTRACTION", "AutoModel"),
        (("classifier.kernel",), "SEQ_CLS", "AutoModelForSequenceClassification"),
    ],
)
def test_the_card_names_the_class_whose_modules_are_adapted(head, task, want, tmp_path):
    paths = (*ENCODER, *head)
    name = auto_class_of(paths, task)
    assert f"import {want}" in card({"task_type": task}, name)
    decoder = "model.language_model.layers.mlp.up_proj.kernel"
    assert auto_class_of((decoder,), "CAUSAL_LM") == "AutoModelForImageTextToText"
    assert auto_class_of((decoder.replace("language_model.", ""),), "CAUSAL_LM") is None
    # A card of ours is replaced, whichever class it names.
    fields = {"task_type": task, "r": 1}
    tensors = {"a.lora_A.weight": np.zeros((1, 1), np.float32)}
    peft_files.write_directory(tmp_path / "a", fields, tensors, auto_class=name)
    peft_files.write_directory(tmp_path / "a", {**fields, "r": 2}, tensors, auto_class=name)
    assert "- rank: 2" in (tmp_path / "a" / "README.md").read_text()


def test_names_given_and_names_kept(tree, tmp_path):
    api.save_peft(tmp_path / "a", tree, QV, base_model_name="org/base", task_type="SEQ_CLS")
    config, _ = api.read_peft(tmp_path / "a")
    assert config.extra["base_model_name_or_path"] == "org/base"
    api.save_peft(tmp_path / "b", tree, config)
    assert api.read_peft(tmp_path / "b")[0] == config


def test_import_export_import_is_bitwise(tree, directory, tmp_path):
    config, tensors = api.read_peft(directory)
    again = api.fill(planted(random_params(), config), config, tensors)
    equal(again, tree)
    api.save_peft(tmp_path / "b", again, config)
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
    api.save_peft(directory, scaled, other)
    assert api.read_peft(directory)[0].alpha == 12
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
            api.save_peft(directory, tree, QV, base_model_name="other")
    assert snapshot(directory) == before
    assert len(list(directory.parent.iterdir())) == 1


def test_a_failing_disk_leaves_no_new_directory(tree, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device"):
        api.save_peft(tmp_path / "new", tree, QV)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way(tree, tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match="expected a directory to write the adapter to, got a fi"):
        api.save_peft(tmp_path / "a", tree, QV)
    with pytest.raises(OSError, match="could not be written"):
        api.save_peft(tmp_path / "a" / "b", tree, QV)


def test_a_7b_shaped_adapter_needs_no_base(tmp_path):
    """32 layers of d=4096: the base is never touched, so a zero-strided one is enough."""
    wide = np.broadcast_to(np.float32(0), (32, 4096, 4096))
    rng = np.random.default_rng(0)
    leaf = LoraArray(
        w=wide,
        a=rng.normal(size=(32, 4096, 8)).astype(np.float32),
        b=rng.normal(size=(32, 8, 4096)).astype(np.float32),
        scale=np.full(32, 2, np.float32),
        roles="sio",
    )
    tree = nested({f"model.layers.self_attn.{p}_proj.kernel": leaf for p in "qv"})
    config = LoraConfig(target_modules=("q_proj", "v_proj"))
    api.save_peft(tmp_path / "big", tree, config)
    _, tensors = api.read_peft(tmp_path / "big")
    filled = api.fill(tree, config, tensors)
    q = filled["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(q.a, leaf.a)
    assert q.w is wide


@pytest.mark.parametrize("paths, encoder", [
    (["bert.embeddings.word_embeddings.embedding", "bert.encoder.layer.0.x"], True),
    (["encoder.embeddings.word_embeddings.embedding", "decoder.bert.x"], False),
    (["model.embed_tokens.embedding", "model.layers.0.x"], False),
])  # fmt: skip
def test_an_encoder_with_a_decoder_is_none(paths, encoder):
    assert is_encoder(paths) is encoder
