"""Adapters between `lora_jax.models` and the real `peft`: the same logits both ways."""

import dataclasses
import filecmp
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import lora_jax as lora
from lora_jax.array import LoraArray, RowsArray, SavedArray, effective
from lora_jax.hf import load_peft, save_peft

from tests.hf.peft.test_oracle import CASES, torch_llama

pytestmark = [pytest.mark.once, pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

TOKENS = np.array([[1, 5, 9, 30, 2, 17], [4, 4, 39, 0, 11, 3]], np.int32)


def tied_llama():
    config = torch_llama().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def randomize(model) -> None:
    """Adds noise to every trained number in place, which keeps tied parameters tied."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def jax_logits(model, params) -> np.ndarray:
    # Each case compiles anew and runs once: little optimization halves the time.
    quick = {"xla_backend_optimization_level": 0}
    return np.asarray(jax.jit(lora.lorafy(model.apply), compiler_options=quick)(params, TOKENS))


def close(one, other):
    np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    torch_llama().save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def base(directory):
    return lora.models.load(directory)


@pytest.fixture(scope="module")
def unrolled(directory):
    return lora.models.load(directory, scan=False)


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tied")
    tied_llama().save_pretrained(str(directory))
    return lora.models.load(directory)


@pytest.mark.parametrize("case", CASES)
def test_pefts_adapter_here_and_back(case, base, tmp_path):
    here_and_back(CASES[case], base, tmp_path)


@pytest.mark.parametrize("case", ["patterns", "layers", "everything"])
def test_pefts_adapter_on_separate_layers(case, unrolled, tmp_path):
    here_and_back(CASES[case], unrolled, tmp_path)


def here_and_back(fields, base, tmp_path):
    model = peft.get_peft_model(torch_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    randomize(model)
    model.save_pretrained(str(tmp_path / "theirs"))
    params, config = load_peft(tmp_path / "theirs", base.apply, base.params, TOKENS)
    close(jax_logits(base, params), torch_logits(model))

    save_peft(tmp_path / "ours", params, config)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert filecmp.cmp(tmp_path / "theirs" / name, tmp_path / "ours" / name, shallow=False)


OURS = {
    "plain": lora.LoraConfig(rank=4, target_modules=("q_proj", "v_proj")),
    "all-linear-rslora": lora.LoraConfig(rank=4, use_rslora=True),
    "patterns": lora.LoraConfig(
        rank=3, rank_pattern={"down_proj": 5}, alpha_pattern={r"1\.mlp\.up_proj": 3}
    ),
    "dora": lora.LoraConfig(rank=2, target_modules=("q_proj", "up_proj"), use_dora=True),
    "one-layer": lora.LoraConfig(rank=2, target_modules=("o_proj",), layers_to_transform=(1,)),
    "unnumbered-path": lora.LoraConfig(rank=2, target_modules=("model.layers.mlp.up_proj",)),
    "embedding": lora.LoraConfig(rank=2, target_modules=("embed_tokens", "k_proj")),
    "head": lora.LoraConfig(rank=2, target_modules=("lm_head",)),
    "saved": lora.LoraConfig(rank=2, modules_to_save=("lm_head", "post_attention_layernorm")),
    "bias": lora.LoraConfig(rank=2, target_modules=("q_proj", "o_proj"), bias="lora_only"),
    "bias-one-layer": lora.LoraConfig(
        rank=2, target_modules=("q_proj", "o_proj"), bias="lora_only", layers_to_transform=(2,)
    ),
    "saved-one-layer": lora.LoraConfig(rank=2, modules_to_save=("1.post_attention_layernorm",)),
    "lora-bias": lora.LoraConfig(rank=2, target_modules=("q_proj", "up_proj"), lora_bias=True),
    "tokens": lora.LoraConfig(rank=2, trainable_token_indices=(30, 2, 9)),
    "excluded": lora.LoraConfig(
        rank=2, target_modules=("q_proj", "v_proj"), exclude_modules=("v_proj",)
    ),
    "pissa": lora.LoraConfig(rank=2, target_modules=("q_proj", "up_proj"), init="pissa"),
}


def noisy(params, seed=0):
    """Noise on all that trains and means something (padding and left-out layers stay zero)."""
    rng = np.random.default_rng(seed)

    def add(x):
        if isinstance(x, SavedArray):
            moved = dataclasses.replace(x, value=x.value + rng.normal(size=x.shape).astype("f4"))
            return dataclasses.replace(x, value=effective(moved))
        if isinstance(x, RowsArray):
            return dataclasses.replace(x, rows=x.rows + rng.normal(size=x.rows.shape).astype("f4"))
        if not isinstance(x, LoraArray):
            return x
        if x.bias is not None:
            noise = rng.normal(size=x.bias.shape).astype("f4") * _on(x, x.bias.ndim)
            x = dataclasses.replace(x, bias=x.bias + noise.astype("f4"))
        b = x.b + rng.normal(size=x.b.shape).astype("f4") * _means_something(x)
        m = None if x.m is None else x.m * np.where(_on(x, x.m.ndim), 1.1, 1).astype("f4")
        return dataclasses.replace(x, b=b, m=m)

    return jax.tree.map(add, params, is_leaf=lora.is_lora)


def _on(x, ndim: int) -> np.ndarray:
    """Whether a stack index has an adapter, as an array of `ndim` dims."""
    stack = np.asarray(x.scale) != 0
    return stack.reshape(*stack.shape, *(1,) * (ndim - stack.ndim))


def _means_something(x) -> np.ndarray:
    """1 where a row of b belongs to the rank of its layer."""
    a = np.asarray(x.a)
    stack = np.ndim(x.scale)
    used = np.any(a != 0, axis=tuple(range(stack, a.ndim - 1)))
    if not used.any():  # an embedding starts with a = 0
        used = np.ones_like(used)
    return used.reshape(*used.shape, *(1,) * (x.b.ndim - used.ndim)).astype("f4")


@pytest.mark.parametrize("case", OURS)
def test_our_adapter_in_peft_and_back(case, base, tmp_path):
    config = OURS[case]
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    params = noisy(lora.init(jax.random.key(0), plan, base.params))
    if case == "embedding":  # here b starts random and a zero
        table = params["model"]["embed_tokens"]["embedding"]
        noise = np.random.default_rng(1).normal(size=table.a.shape).astype("f4")
        params["model"]["embed_tokens"]["embedding"] = dataclasses.replace(table, a=table.a + noise)
    save_peft(tmp_path / "a", params, config)

    model = peft.PeftModel.from_pretrained(torch_llama(), str(tmp_path / "a"))
    loaded = peft.get_peft_model_state_dict(model)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert loaded.keys() == stored.keys()
    for name, value in loaded.items():
        np.testing.assert_array_equal(value.numpy(), stored[name])
    close(torch_logits(model), jax_logits(base, params))

    again, _ = load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "query_key_value", "c_attn"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["dense"], "modules_to_save": ["score"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.v_proj"},
        {"target_modules": ["k_proj"], "r": 40},
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 20, "dense": 2}},
    ],
    ids=str,
)
def test_what_peft_allows_is_read(fields, base, tmp_path):
    """Names that match nothing, ranks above full rank: PEFT is silent, the file is complete."""
    here_and_back(fields, base, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_change_the_base_are_repeated(init, base, tmp_path):
    """PEFT's file holds A and B only: the residual base is made anew from the original."""
    fields = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": init}
    model = peft.get_peft_model(torch_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    randomize(model)
    model.save_pretrained(str(tmp_path / "a"))
    params, config = load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
    assert config.init == init
    close(jax_logits(base, params), torch_logits(model))


def test_inits_that_cannot_be_repeated_are_refused(base, tmp_path):
    fields = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_4"}
    model = peft.get_peft_model(torch_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    model.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(ValueError, match='initialised by "pissa_niter_4", which changed the base'):
        load_peft(tmp_path / "a", base.apply, base.params, TOKENS)


def test_an_adapter_for_a_larger_model_is_one_error(base, tmp_path):
    sizes: dict[str, Any] = dict(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=4,
        vocab_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    other = LlamaForCausalLM(LlamaConfig(**sizes))
    model = peft.get_peft_model(other, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(ValueError) as caught:
        load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
    text = str(caught.value)
    assert "2 left over: `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`" in text
    assert "6 misshapen" in text and "is (4, 32), expected (4, 16)" in text and "\n" not in text


# ---- a head that is the embedding table


TIED = {
    "adapted": {"target_modules": ["embed_tokens", "q_proj"]},
    "adapted-regex": {"target_modules": r".*(embed_tokens|q_proj)"},
    "adapted-by-head": {"target_modules": ["lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 30]},
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_adapter_of_peft_is_read_and_written(case, tied_base, tmp_path):
    fields = {"r": 2, "ensure_weight_tying": True, "task_type": "CAUSAL_LM", **TIED[case]}
    model = peft.get_peft_model(tied_llama(), peft.LoraConfig(**fields))
    randomize(model)
    model.save_pretrained(str(tmp_path / "theirs"))
    params, config = load_peft(tmp_path / "theirs", tied_base.apply, tied_base.params, TOKENS)
    close(jax_logits(tied_base, params), torch_logits(model))
    save_peft(tmp_path / "ours", params, config)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert filecmp.cmp(tmp_path / "theirs" / name, tmp_path / "ours" / name, shallow=False)


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ("embed_tokens",)}, {"modules_to_save": ("embed_tokens",)}],
    ids=str,
)
def test_our_tied_adapter_is_tied_in_peft(fields, tied_base, tmp_path):
    config = lora.LoraConfig(rank=2, **fields)
    plan = lora.plan(config, tied_base.apply, tied_base.params, TOKENS)
    params = noisy(lora.init(jax.random.key(0), plan, tied_base.params))
    table = params["model"]["embed_tokens"]["embedding"]
    if isinstance(table, LoraArray):
        noise = np.random.default_rng(1).normal(size=table.a.shape).astype("f4")
        params["model"]["embed_tokens"]["embedding"] = dataclasses.replace(table, a=table.a + noise)
    save_peft(tmp_path / "a", params, config)
    model = peft.PeftModel.from_pretrained(tied_llama(), str(tmp_path / "a"))
    close(torch_logits(model), jax_logits(tied_base, params))
    again, _ = load_peft(tmp_path / "a", tied_base.apply, tied_base.params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_an_untied_adapter_of_a_tied_model_is_refused(tied_base, tmp_path):
    fields = {"r": 2, "target_modules": ["embed_tokens"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(tied_llama(), peft.LoraConfig(**fields))
    model.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(ValueError, match="`model.embed_tokens.embedding` as an embedding only"):
        load_peft(tmp_path / "a", tied_base.apply, tied_base.params, TOKENS)
