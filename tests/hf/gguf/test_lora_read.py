"""Reading GGUF LoRA files of others: without an alpha, with norms, damaged, for another model."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.hf.gguf.lora_read import load_gguf_lora, read_gguf_lora
from lora_jax.hf.gguf.lora_write import save_gguf_lora
from lora_jax.models.gguf import base_of

from tests.support.gguf_files import TIED, pair, write_lora

pytestmark = pytest.mark.once

TOKENS = jax.ShapeDtypeStruct((1, 2), jnp.int32)
BASE = base_of(TIED)


@pytest.fixture(scope="module")
def tied():
    return models.init(jax.random.key(0), TIED)


@pytest.mark.parametrize("alpha", [0.0, None])
def test_without_an_alpha_the_scale_is_one(tmp_path, tied, alpha):
    tensors = {**pair(rank=2), **pair("blk.1.attn_v", rank=3), **pair("blk.1.ffn_up", 2, 64)}
    path = write_lora(tmp_path / "a.gguf", tensors, alpha=alpha)
    loaded, read = load_gguf_lora(path, tied.apply, tied.params, TOKENS, base=BASE)
    leaf = loaded["model"]["layers"]["self_attn"]["v_proj"]["kernel"]
    np.testing.assert_array_equal(leaf.scale, [1.0, 1.0])
    change = tensors["blk.1.attn_v.weight.lora_b"] @ tensors["blk.1.attn_v.weight.lora_a"]
    np.testing.assert_allclose(lora.array.delta(leaf)[1], change.T, rtol=1e-5, atol=1e-6)
    assert read.rank_pattern == {"model.layers.1.self_attn.v_proj": 3}
    assert read.target_modules == ("model.layers.1.mlp.up_proj", "v_proj")


def test_a_modules_last_name_is_a_target_only_where_no_other_has_it(tmp_path):
    tensors = {**pair("blk.0.attn_output"), **pair("blk.1.attn_output"), **pair("blk.0.attn_qkv")}
    path = write_lora(tmp_path / "a.gguf", tensors, arch="gpt2")
    config, _ = read_gguf_lora(path, base=BASE._replace(architecture="gpt2"))
    # `c_proj` alone would be that of the MLP too.
    assert config.target_modules == ("attn.c_proj", "transformer.h.0.attn.c_attn")


_HUB = "https://huggingface.co"
BASES = {
    "a hub id": ({"repo_url": f"{_HUB}/org/tiny-1b"}, "org/tiny-1b"),
    "by its name": ({"name": "Tiny 1b", "organization": "Org"}, "Tiny 1b"),
    "elsewhere": ({"repo_url": "https://example.org/x", "name": "Tiny 1b"}, "Tiny 1b"),
    "without": ({}, None),
}


@pytest.mark.parametrize("case", BASES)
def test_the_base_that_a_file_names_is_compared(tmp_path, tied, case):
    fields, named = BASES[case]
    keys = {f"general.base_model.0.{key}": value for key, value in fields.items()}
    path = write_lora(tmp_path / "a.gguf", pair(), keys=keys)
    args = (path, tied.apply, tied.params, TOKENS)
    _, config = load_gguf_lora(*args, base=BASE, base_model_name="other/tiny-1b")
    assert config.extra.get("base_model_name_or_path") == named
    with nullcontext() if named is None else pytest.warns(UserWarning, match=f"names .* `{named}`"):
        load_gguf_lora(*args, base=BASE, base_model_name=tmp_path / "tiny-1b-chat.Q4_K_M.gguf")


def test_the_base_that_is_written_is_read_again(tmp_path, tied):
    tree, config = load_gguf_lora(
        write_lora(tmp_path / "a.gguf", pair()), tied.apply, tied.params, TOKENS, base=BASE
    )
    for name, read in ("org/tiny-1b", "org/tiny-1b"), (tmp_path / "tiny-1b", "tiny 1b"):
        save_gguf_lora(tmp_path / "b.gguf", tree, config, base=BASE, base_model_name=name)
        again, _ = read_gguf_lora(tmp_path / "b.gguf", base=BASE)
        assert again.extra["base_model_name_or_path"] == read


BROKEN = {
    "a model": (pair(), dict(kind="model"), "holds a GGUF of type .model., not an adapter"),
    "another kind": (pair(), dict(keys={"adapter.type": "ia3"}), "of type .lora., got .ia3."),
    "another model": (pair(), dict(arch="qwen2"), "for a `qwen2`, the model is a `llama`"),
    "alpha": (pair(), dict(alpha=float("nan")), "`adapter.lora.alpha` must be a number above 0"),
    "half a pair": (dict(list(pair().items())[:1]), {}, "`blk.0.attn_v.weight.lora_b` is missing"),
    "another tensor": ({**pair(), "blk.0.x": [1]}, {}, "`blk.0.x` is neither a lora_a nor a lora"),
    "no place": (pair("blk.7.attn_v"), {}, "has no place in a `llama` of 2 blocks"),
    "nothing": ({"output_norm.weight": np.ones(32)}, {}, "holds no adapter"),
    "two ranks": ({**pair(), "blk.0.attn_v.weight.lora_a": np.ones((3, 32))}, {}, "no pair of one"),
    "a vector": ({**pair(), "blk.0.attn_v.weight.lora_a": np.ones(32)}, {}, "no pair of one rank"),
    "NaN": ({**pair(), "blk.0.attn_v.weight.lora_a": np.full((2, 32), np.nan)}, {},
            "`blk.0.attn_v.weight.lora_a` holds NaN"),
    "rows": (pair("blk.0.attn_k", rows=10), {}, "`blk.0.attn_k.weight.lora_b` has 10 rows, not"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path, case):
    tensors, options, text = BROKEN[case]
    path = write_lora(tmp_path / "a.gguf", tensors, **options)
    with pytest.raises(ValueError, match=text) as error:
        read_gguf_lora(path, base=BASE)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_of_another_size(tmp_path, tied):
    path = write_lora(tmp_path / "a.gguf", pair(rows=24))
    with pytest.raises(ValueError, match=r"1 misshapen: .*v_proj.lora_B.weight` is \(24, 2\)"):
        load_gguf_lora(path, tied.apply, tied.params, TOKENS, base=BASE)


def test_norms_are_left_out_with_a_warning(tmp_path):
    path = write_lora(tmp_path / "a.gguf", {**pair(), "blk.0.attn_norm.weight": np.ones(32)})
    with pytest.warns(UserWarning, match="1 norms such as `blk.0.attn_norm.weight` are left out"):
        _, tensors = read_gguf_lora(path, base=BASE)
    assert len(tensors) == 2
