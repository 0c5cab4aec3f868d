"""Adapters of every family of decoders between `lora_jax.models` and the real `peft`.

Each case combines what test_model.py has one by one for Llama: what differs here are the
families' modules (fused projections, Conv1D, scaled and tied tables).
"""

import copy
import filecmp

import jax
import numpy as np
import peft
import pytest
import torch

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft

from tests.hf.peft.test_model import noisy, randomize
from tests.support.torch_models import saver

pytestmark = [
    pytest.mark.once,
    pytest.mark.oracle,
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore"),
]

SIZES = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    pad_token_id=0,
)
FAMILIES = {
    "mistral": dict(SIZES, model_type="mistral", sliding_window=4, tie_word_embeddings=False),
    "qwen2": dict(SIZES, model_type="qwen2", tie_word_embeddings=False),
    "qwen3": dict(SIZES, model_type="qwen3", head_dim=8),
    "gemma": dict(SIZES, model_type="gemma", head_dim=8, attention_bias=True),
    "gemma2": dict(SIZES, model_type="gemma2", head_dim=8, sliding_window=4),
    "gemma3": dict(SIZES, model_type="gemma3_text", head_dim=8, sliding_window=4),
    "phi3": dict(SIZES, model_type="phi3"),
    "gpt2": dict(model_type="gpt2", vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32),
}
# What the modules are called: attention, the table, a norm, the head if it is no table.
LLAMA = ("q_proj", "down_proj", "embed_tokens", "post_attention_layernorm")
MODULES = {
    **dict.fromkeys(FAMILIES, LLAMA),
    "phi3": ("qkv_proj", "gate_up_proj", "embed_tokens", "post_attention_layernorm"),
    "gpt2": ("c_attn", "mlp.c_proj", "wte", "ln_2"),
}
TOKENS = np.array([[1, 5, 9, 30, 2, 17], [4, 4, 39, 0, 11, 3]], np.int32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver("hf/peft/families", FAMILIES, tmp_path_factory)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, saved):
    """The family's name, its random torch model, and ours with the same weights."""
    there, directory = saved(request.param)
    return request.param, there(), lora.models.load(directory)


def tied(torch_model) -> bool:
    return torch_model.config.tie_word_embeddings


def everything(name: str, torch_model) -> dict:
    """All linear layers, rsLoRA, patterns, every bias, and the head where it is its own."""
    fields = {"r": 3, "target_modules": "all-linear", "use_rslora": True, "bias": "all"}
    fields |= {"rank_pattern": {MODULES[name][0]: 2}, "alpha_pattern": {MODULES[name][1]: 5}}
    return fields if tied(torch_model) else {**fields, "modules_to_save": ["lm_head"]}


def one_layer(name: str, torch_model) -> dict:
    """DoRA in one layer, whose biases train, with a norm of both."""
    attention, mlp, _, norm = MODULES[name]
    return {
        "r": 2,
        "target_modules": [attention, mlp],
        "use_dora": True,
        "layers_to_transform": 1,
        "bias": "lora_only",
        "modules_to_save": [norm],
    }


def table(name: str, torch_model) -> dict:
    """The embedding, with the head that is tied to it: PEFT knows `wte` by its head only."""
    attention, _, table, _ = MODULES[name]
    targets = {"r": 2, "target_modules": [attention, "lm_head" if name == "gpt2" else table]}
    return {**targets, "ensure_weight_tying": True} if tied(torch_model) else targets


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def jax_logits(model, params) -> np.ndarray:
    quick = {"xla_backend_optimization_level": 0}
    run = jax.jit(lora.lorafy(model.apply, strict=True), compiler_options=quick)
    return np.asarray(run(params, TOKENS))


def close(one, other):
    np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", [everything, one_layer, table])
def test_pefts_adapter_here_and_back(fields, family, tmp_path):
    name, torch_model, base = family
    config = peft.LoraConfig(task_type="CAUSAL_LM", **fields(name, torch_model))
    model = peft.get_peft_model(copy.deepcopy(torch_model), config)
    randomize(model)
    model.save_pretrained(str(tmp_path / "theirs"))
    params, config = load_peft(tmp_path / "theirs", base.apply, base.params, TOKENS)
    close(jax_logits(base, params), torch_logits(model))
    save_peft(tmp_path / "ours", params, config)
    if (name, fields) == ("gpt2", table):
        # PEFT leaves the head out of what it writes, and would not tie it again; ours it ties.
        model = peft.PeftModel.from_pretrained(copy.deepcopy(torch_model), str(tmp_path / "ours"))
        close(jax_logits(base, params), torch_logits(model))
        return
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert filecmp.cmp(tmp_path / "theirs" / file, tmp_path / "ours" / file, shallow=False)


def test_our_adapter_in_peft_and_back(family, tmp_path):
    """All linear layers, patterns, biases of adapters and trained tokens."""
    name, torch_model, base = family
    attention, mlp, _, norm = MODULES[name]
    config = lora.LoraConfig(
        rank=3,
        use_rslora=True,
        lora_bias=True,
        rank_pattern={attention: 2},
        alpha_pattern={mlp: 5},
        modules_to_save=(f"1.{norm}",),
        trainable_token_indices=(30, 2, 9),
    )
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    params = noisy(lora.init(jax.random.key(0), plan, base.params))
    save_peft(tmp_path / "a", params, config)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(torch_model), str(tmp_path / "a"))
    close(torch_logits(model), jax_logits(base, params))
    again, _ = load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("family", ["gpt2", "gemma"], indirect=True)
@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_our_tied_table_is_tied_in_peft(field, family, tmp_path):
    name, torch_model, base = family
    table = MODULES[name][2]
    config = lora.LoraConfig(**{"rank": 2, "target_modules": (MODULES[name][0],), field: (table,)})
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    trainable, frozen = lora.split(lora.init(jax.random.key(0), plan, base.params))
    params = lora.combine(jax.tree.map(lambda x: x + 0.1, trainable), frozen)
    save_peft(tmp_path / "a", params, config)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(torch_model), str(tmp_path / "a"))
    close(torch_logits(model), jax_logits(base, params))
    again, _ = load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_an_embedding_that_peft_does_not_tie_is_refused(saved, tmp_path):
    there, directory = saved("gpt2")
    torch_model = there()
    base = lora.models.load(directory)
    fields = {"r": 2, "target_modules": ["wte"], "ensure_weight_tying": True}
    model = peft.get_peft_model(copy.deepcopy(torch_model), peft.LoraConfig(**fields))
    model.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(ValueError, match="`transformer.wte.embedding` as an embedding only"):
        load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
