"""Training from an adapter that PEFT initialised: the same loss at every step, the same result."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft

pytestmark = [
    pytest.mark.once,
    pytest.mark.slow,
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore"),
]

STEPS, RATE, DECAY = 20, 1e-2, 0.05
CASES = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "all-linear-rslora": {"r": 4, "target_modules": "all-linear", "use_rslora": True},
    "dora": {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {r"1\.mlp\.up_proj": 2},
        "alpha_pattern": {"q_proj": 12},
    },
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "v_proj"]},
    "saved-head-and-biases": {
        "r": 4,
        "target_modules": ["q_proj", "o_proj"],
        "modules_to_save": ["lm_head", "input_layernorm"],
        "bias": "all",
    },
    "own-biases-and-tokens": {
        "r": 4,
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "lora_bias": True,
        "trainable_token_indices": [3, 7, 30, 12],
    },
    "one-layer-with-its-biases": {
        "r": 4,
        "target_modules": ["q_proj", "o_proj"],
        "bias": "lora_only",
        "layers_to_transform": [1],
    },
}


def torch_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and which of them are learned: rows of different length, padded on the right."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(4):
        tokens, learned = rng.integers(1, 40, (3, 8)), np.zeros((3, 8), bool)
        for row, length in enumerate(rng.integers(4, 9, 3)):
            tokens[row, length:] = 0
            learned[row, 2:length] = True
        out.append((tokens, learned))
    return out


def torch_curve(model) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
    losses, data = [], batches()
    for step in range(STEPS):
        tokens, learned = data[step % len(data)]
        labels = torch.tensor(np.where(learned, tokens, -100))
        mask = torch.tensor(np.maximum.accumulate(learned[:, ::-1], 1)[:, ::-1].copy()).long()
        loss = model(torch.tensor(tokens), attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def our_curve(model, lora_params):
    forward = lora.lorafy(model.apply)
    trainable, frozen = lora.split(lora_params)
    optimizer = optax.adamw(RATE, weight_decay=DECAY)

    def loss_of(trainable, tokens, learned):
        logits = forward(lora.combine(trainable, frozen), tokens)[:, :-1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(each * learned[:, 1:]) / jnp.sum(learned[:, 1:])

    @jax.jit
    def step(trainable, state, tokens, learned):
        loss, gradient = jax.value_and_grad(loss_of)(trainable, tokens, learned)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    losses, data, state = [], batches(), optimizer.init(trainable)
    for number in range(STEPS):
        trainable, state, loss = step(trainable, state, *data[number % len(data)])
        losses.append(float(loss))
    return losses, lora.combine(trainable, frozen)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    torch_llama().save_pretrained(str(directory))
    return lora.models.load(directory)


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_give_pefts_losses_and_logits(case, base, tmp_path):
    torch.manual_seed(3)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **CASES[case])
    theirs = peft.get_peft_model(torch_llama(), config)
    theirs.save_pretrained(str(tmp_path / "start"))
    tokens = batches()[0][0]
    start, our_config = load_peft(tmp_path / "start", base.apply, base.params, tokens)

    losses, trained = our_curve(base, start)
    reference = torch_curve(theirs)
    assert reference[-1] < reference[0] - 0.03  # it learns, so the curves say something
    np.testing.assert_allclose(losses, reference, atol=1e-3, rtol=0)

    save_peft(tmp_path / "trained", trained, our_config)
    back = peft.PeftModel.from_pretrained(torch_llama(), str(tmp_path / "trained"))
    ours = jax.jit(lora.lorafy(base.apply))(trained, np.arange(12, dtype=np.int32).reshape(2, 6))
    with torch.no_grad():
        in_peft = back.eval()(torch.arange(12).reshape(2, 6)).logits.numpy()
        reference = theirs.eval()(torch.arange(12).reshape(2, 6)).logits.numpy()
    np.testing.assert_allclose(ours, in_peft, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(ours, reference, atol=2e-3, rtol=1e-2)
