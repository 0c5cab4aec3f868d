"""GGUF LoRA files: evaluated as llama.cpp does, read back, refused where llama.cpp could not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.constants import MODEL_ARCH_NAMES
from gguf.tensor_mapping import get_tensor_name_map

import lora_jax as lora
from lora_jax import models
from lora_jax.hf.checkpoint.safetensors import load_file
from lora_jax.hf.gguf import lora_write
from lora_jax.hf.gguf import names as gguf_names
from lora_jax.hf.gguf.architectures import GGUF_ARCHITECTURES
from lora_jax.hf.gguf.file import open_gguf
from lora_jax.hf.gguf.lora_read import load_gguf_lora
from lora_jax.hf.gguf.lora_write import save_gguf_lora
from lora_jax.hf.gguf.names import Base, read_base
from lora_jax.hf.gguf.names import gguf_names as names_of
from lora_jax.models.gguf import base_of
from lora_jax.models.registry import config_from_hf
from lora_jax.models.saving import save_model

from tests.support.gguf_files import (
    TIED,
    UNTIED,
    adapted,
    as_llama_cpp,
    config_with,
    tensors_of,
    write_model,
)

pytestmark = pytest.mark.once

TOKENS = jax.ShapeDtypeStruct((1, 2), jnp.int32)
BASE = base_of(TIED)


@pytest.fixture(scope="module")
def tied():
    return models.init(jax.random.key(0), TIED)


@pytest.fixture(scope="module")
def untied():
    return models.init(jax.random.key(0), UNTIED)


CASES = {
    "plain": config_with(),
    "all-linear, rsLoRA": config_with(target_modules="all-linear", use_rslora=True, rank=3),
    "ranks and alphas": config_with(
        target_modules="all-linear",
        rank_pattern={"q_proj": 2, "down_proj": 1},
        alpha_pattern={"layers.1.self_attn.q_proj": 24, "up_proj": 1.5},
    ),
    "ranks under rsLoRA": config_with(
        target_modules=("k_proj", "o_proj"), use_rslora=True, rank_pattern={"k_proj": 2}
    ),
    "one layer": config_with(target_modules=("k_proj", "gate_proj"), layers_to_transform=(1,)),
    "embedding and head": config_with(target_modules=("embed_tokens", "lm_head", "k_proj")),
}


@pytest.fixture(scope="module")
def trained(untied):
    """The parameters of each case, made when they are first asked for."""
    return functools.cache(lambda case: adapted(untied, CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_merged_model(tmp_path, untied, trained, case):
    params = trained(case)
    base = write_model(tmp_path / "base.gguf", UNTIED, tensors_of(untied))
    path = tmp_path / "adapter.gguf"
    save_gguf_lora(path, params, CASES[case], base=read_base(base))
    merged = models.Model(untied.forward, lora.merge(params))
    want, got = tensors_of(merged), as_llama_cpp(base, path)
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name)
    moved = [n for n, w in tensors_of(untied).items() if np.abs(w - want[n]).max() > 0.1]
    assert len(moved) == sum(n.endswith(".lora_a") for n in (t.name for t in
                                                            GGUFReader(path).tensors))  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_file_comes_back_and_is_written_the_same_again(tmp_path, untied, trained, case):
    params, base = trained(case), base_of(UNTIED)
    save_gguf_lora(tmp_path / "a.gguf", params, CASES[case], base=base)
    loaded, read = load_gguf_lora(
        tmp_path / "a.gguf", untied.apply, untied.params, TOKENS, base=base
    )
    # Folding an alpha into B rounds it once.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-6),
        lora.merge(loaded), lora.merge(params),
    )  # fmt: skip
    save_gguf_lora(tmp_path / "b.gguf", loaded, read, base=base)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_files_alpha_is_that_of_most_modules(tmp_path, untied, trained):
    case = "ranks and alphas"
    save_gguf_lora(tmp_path / "a.gguf", trained(case), CASES[case], base=base_of(UNTIED))
    assert open_gguf(tmp_path / "a.gguf", kind="adapter").metadata["adapter.lora.alpha"] == 6


def test_nothing_is_folded_where_all_scales_agree(tmp_path, tied):
    lora_config = config_with(target_modules="all-linear", use_rslora=True, alpha=4)
    params = adapted(tied, lora_config)
    save_gguf_lora(tmp_path / "a.gguf", params, lora_config, base=BASE)
    loaded, read = load_gguf_lora(tmp_path / "a.gguf", tied.apply, tied.params, TOKENS, base=BASE)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert (read.rank, read.alpha, read.use_rslora) == (4, 8, False)  # 4/√4 is 8/4
    assert read.target_modules == (
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    )  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwens_rows_stay(tmp_path, family):
    raw = {k: v for k, v in TIED.to_hf().items() if k != "attention_bias"}
    model = models.init(
        jax.random.key(0), models.LlamaConfig.from_hf({**raw, "model_type": family})
    )
    params = adapted(model, config_with())
    save_gguf_lora(tmp_path / "a.gguf", params, config_with(), base=base_of(model.config))
    found = {t.name: t.data for t in GGUFReader(tmp_path / "a.gguf").tensors}
    leaf = params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(found["blk.1.attn_q.weight.lora_b"], leaf.b[1].T)
    np.testing.assert_array_equal(found["blk.1.attn_q.weight.lora_a"], leaf.a[1].T)


FAMILIES = {
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "phi3": {"pad_token_id": 0},
    "gpt2": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_decoders(tmp_path, family):
    """No rows are reordered; GPT-2's weights are (out, in) to llama.cpp."""
    sizes = {name: getattr(TIED, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings")}  # fmt: skip
    small = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    raw = {"model_type": family, **(small if family == "gpt2" else sizes), **FAMILIES[family]}
    model = models.init(jax.random.key(0), config_from_hf(raw))
    lora_config = config_with(target_modules="all-linear", rank_pattern={"mlp.c_proj": 2})
    if family != "gpt2":
        lora_config = config_with(target_modules="all-linear")
    params = adapted(model, lora_config)
    save_gguf_lora(tmp_path / "a.gguf", params, lora_config, base=base_of(model.config))
    for name, tree in (("base", model.params), ("merged", lora.merge(params))):
        save_model(tmp_path / name, model, tree)
    base, merged = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "merged"))
    file = GGUFReader(tmp_path / "a.gguf")
    found = {t.name: t.data for t in file.tensors}
    alpha = file.get_field("adapter.lora.alpha").contents()
    arch = gguf_names.ARCHITECTURE_OF[family]
    table = get_tensor_name_map(next(a for a, name in MODEL_ARCH_NAMES.items() if name == arch), 2)
    seen = 0
    for name, weight in base.items():
        b = found.get(f"{table.get_name(name, try_suffixes=('.weight', '.bias'))}.lora_b")
        if b is None:
            np.testing.assert_array_equal(merged[name], weight)
            continue
        a = found[f"{table.get_name(name, try_suffixes=('.weight',))}.lora_a"]
        change = alpha / b.shape[1] * (b @ a)
        change = change.T if family == "gpt2" else change
        np.testing.assert_allclose(merged[name], weight + change, rtol=1e-5, atol=1e-5)
        seen += 1
    assert 2 * seen == len(found) == 2 * 2 * (4 if family in ("phi3", "gpt2") else 7)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_smaller_numbers(tmp_path, tied, dtype, error):
    params = adapted(tied, config_with())
    save_gguf_lora(tmp_path / "a.gguf", params, config_with(), base=BASE, dtype=dtype, name="mine")
    file = GGUFReader(tmp_path / "a.gguf")
    kind = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert {t.tensor_type for t in file.tensors} == {GGMLQuantizationType[kind]}
    assert file.get_field("general.name").contents() == "mine"
    assert file.get_field("general.file_type").contents() == LlamaFileType[f"MOSTLY_{kind}"]
    loaded, _ = load_gguf_lora(tmp_path / "a.gguf", tied.apply, tied.params, TOKENS, base=BASE)
    leaf, was = (p["model"]["layers"]["self_attn"]["v_proj"]["kernel"] for p in (loaded, params))
    np.testing.assert_allclose(leaf.b, was.b, rtol=error)
    assert np.any(leaf.b != was.b)
    huge = jax.tree.map(lambda x: x * 1e5 if x.ndim == 3 and x.shape[-2] == 4 else x, params)
    if dtype == "float16":
        with pytest.raises(ValueError, match="has a number that float16 cannot hold"):
            save_gguf_lora(tmp_path / "a.gguf", huge, config_with(), base=BASE, dtype=dtype)
        assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
    with pytest.raises(ValueError, match="`dtype` must be one of float32, float16, bfloat16"):
        save_gguf_lora(tmp_path / "a.gguf", params, config_with(), base=BASE, dtype="int8")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"use_dora": True}, r"with DoRA \(use_dora=True\); merge the adapter into the model"),
        ({"modules_to_save": ("lm_head",)}, r"with whole saved modules \(lm_head\); merge"),
        ({"bias": "all"}, r'with trained biases \(bias="all"\); merge'),
    ],
)
def test_what_llama_cpp_cannot_apply_is_to_be_merged(tmp_path, untied, fields, text):
    params = adapted(untied, config_with(**fields))
    with pytest.raises(ValueError, match=f"llama.cpp cannot apply an adapter {text}"):
        save_gguf_lora(tmp_path / "a.gguf", params, config_with(**fields), base=base_of(UNTIED))
    assert not list(tmp_path.iterdir())


def test_a_tied_table_is_to_be_merged(tmp_path, tied):
    lora_config = config_with(target_modules=("embed_tokens", "q_proj"))
    params = adapted(tied, lora_config)
    with pytest.raises(ValueError, match="`model.embed_tokens` where the output head is the emb"):
        save_gguf_lora(tmp_path / "a.gguf", params, lora_config, base=BASE)


def test_tensors_without_a_place(untied):
    base, pair = base_of(UNTIED), {"lora_A.weight": np.ones((2, 32)), "lora_B.weight": np.ones(
        (8, 2))}  # fmt: skip

    def content(module, tensors):
        tensors = {f"base_model.model.{module}.{k}": v for k, v in tensors.items()}
        return lora_write.to_gguf(tensors, config_with(), base)

    with pytest.raises(ValueError, match="no place for an adapter of `model.layers.2.mlp.up_proj`"):
        content("model.layers.2.mlp.up_proj", pair)
    with pytest.raises(ValueError, match="cannot apply `.*lora_B.bias`: it reads pairs of lora_A"):
        content("model.layers.1.mlp.up_proj", {**pair, "lora_B.bias": np.ones(8)})
    with pytest.raises(ValueError, match=r"no pair of matrices \(r, in\) and \(out, r\)"):
        content("model.layers.1.mlp.up_proj", {**pair, "lora_B.weight": np.ones((8, 3))})
    with pytest.raises(ValueError, match="no pair of lora_A and lora_B; there is nothing to wri"):
        content("model.layers.1.mlp.up_proj", {})
    # PEFT repeats the base's table; one with more rows is a resized vocabulary.
    table = {"lora_embedding_A": np.ones((2, 40)), "lora_embedding_B": np.ones((32, 2))}
    assert content("model.embed_tokens", {**table, "base_layer.weight": np.ones((40, 32))})
    with pytest.raises(ValueError, match="cannot apply `.*embed_tokens.base_layer.weight`"):
        content("model.embed_tokens", {**table, "base_layer.weight": np.ones((41, 32))})


def test_names_are_the_gguf_packages():
    assert names_of(BASE._replace(layers=12))["model.layers.11.self_attn.q_proj"] == "blk.11.attn_q"
    for arch, row in GGUF_ARCHITECTURES.items():
        kind = next(a for a, name in MODEL_ARCH_NAMES.items() if name == arch)
        table = get_tensor_name_map(kind, 2)
        names = names_of(BASE._replace(architecture=arch))
        assert len(names) == len(set(names.values())) >= 2 * len(row.linears)
        assert all(table[module] == theirs for module, theirs in names.items())


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 9}


@pytest.mark.parametrize(
    ("raw", "base"),
    [
        ({"model_type": "mistral", "num_hidden_layers": 2, "num_attention_heads": 4,
          "vocab_size": 9}, Base("llama", 2, 4, 4, 9, False)),
        ({"model_type": "gpt2", "n_layer": 2, "n_head": 4, "vocab_size": 9},
         Base("gpt2", 2, 4, 4, 9, True)),
        ({"model_type": "gemma3_text", "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 1, "vocab_size": 9}, Base("gemma3", 2, 4, 1, 9, True)),
        # Of images and texts: llama.cpp has architectures of its own for some.
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **SMALL}},
         Base("gemma3", 2, 4, 4, 9, True)),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral", **SMALL}},
         Base("mistral3", 2, 4, 4, 9, False)),
        ({"model_type": "qwen2_5_vl", "tie_word_embeddings": True, "text_config": SMALL},
         Base("qwen2vl", 2, 4, 4, 9, True)),
    ],
)  # fmt: skip
def test_a_base_from_its_config(raw, base):
    assert gguf_names.base_from_hf(raw) == base


def test_bases_that_are_not_known(tmp_path):
    with pytest.raises(ValueError, match="llama.cpp's names of model_type `t5` are not known"):
        gguf_names.base_from_hf({"model_type": "t5"})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="config.json: config: `num_attention_heads` must be a"):
        read_base(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json: "):
        read_base(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_base(tmp_path / "gone")


def test_what_was_there_stays_when_writing_fails(tmp_path, tied, monkeypatch):
    params = adapted(tied, config_with())
    path = tmp_path / "a.gguf"
    save_gguf_lora(path, params, config_with(), base=BASE)
    before = path.read_bytes()

    def fail(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_gguf_lora(path, adapted(tied, config_with(), 9), config_with(), base=BASE)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
    with pytest.raises(ValueError, match="expected a file to write the adapter to, got a direc"):
        save_gguf_lora(tmp_path, params, config_with(), base=BASE)
