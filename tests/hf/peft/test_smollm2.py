"""SmolLM2-135M: from PEFT's adapter through twenty steps of training and back into PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft

pytestmark = [
    pytest.mark.once,
    pytest.mark.slow,
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore"),
]

STEPS, RATE = 20, 1e-3
TEXTS = [
    "The ferry leaves the harbour at seven and returns before dark.",
    "My grandmother kept bees behind the old brick barn.",
    "A prime number has exactly two divisors.",
    "for i in range(10):\n    print(i * i)",
    "Das Wetter bleibt wechselhaft und windig.",
    "Please book a table for four on Friday evening, near the window.",
    "Rust never sleeps, and neither does the night shift.",
    "He counted the coins twice, then once more to be sure.",
]


@pytest.fixture(scope="module")
def ours(smollm2):
    return lora.models.load(smollm2)


def torch_model(smollm2):
    directory, _, file = smollm2.rpartition("/")
    return AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=file, dtype=torch.float32
    ).eval()


def padded(tokenizer, texts) -> tuple[np.ndarray, np.ndarray]:
    rows = [tokenizer.encode(text) for text in texts]
    tokens = np.full((len(rows), max(map(len, rows))), tokenizer.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], mask[number, : len(row)] = row, True
    return tokens, mask


def torch_logits(model, tokens, mask) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(
            torch.tensor(tokens).long(), attention_mask=torch.tensor(mask)
        ).logits.numpy()


def torch_curve(model, batches) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        tokens, mask = (torch.tensor(x) for x in batches[step % len(batches)])
        labels = tokens.long().masked_fill(~mask, -100)
        loss = model(tokens.long(), attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def our_curve(model, params, batches):
    trainable, frozen = lora.split(params)
    optimizer = optax.adamw(RATE, weight_decay=0.01)

    def loss_of(trainable, frozen, tokens, mask):
        logits = lora.lorafy(model.apply)(lora.combine(trainable, frozen), tokens)[:, :-1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(each * mask[:, 1:]) / jnp.sum(mask[:, 1:])

    @jax.jit
    def step(trainable, frozen, state, tokens, mask):
        loss, gradient = jax.value_and_grad(loss_of)(trainable, frozen, tokens, mask)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    losses, state = [], optimizer.init(trainable)
    for number in range(STEPS):
        batch = batches[number % len(batches)]
        trainable, state, loss = step(trainable, frozen, state, *batch)
        losses.append(float(loss))
    return losses, lora.combine(trainable, frozen)


def test_from_peft_through_training_and_back(ours, smollm2, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(torch_model(smollm2), config)
    theirs.save_pretrained(str(tmp_path / "start"))
    width = padded(ours.tokenizer, TEXTS)[0].shape[1]
    batches = []
    for first in range(0, len(TEXTS), 2):
        tokens, mask = padded(ours.tokenizer, TEXTS[first : first + 2])
        pad = ((0, 0), (0, width - tokens.shape[1]))  # one shape, one compilation
        tokens = np.pad(tokens, pad, constant_values=ours.tokenizer.pad_id)
        batches.append((tokens, np.pad(mask, pad)))

    params, our_config = load_peft(tmp_path / "start", ours.apply, ours.params, batches[0][0])
    losses, trained = our_curve(ours, params, batches)
    reference = torch_curve(theirs, batches)
    assert np.mean(reference[-4:]) < 0.8 * np.mean(reference[:4])
    np.testing.assert_allclose(losses, reference, atol=1e-3, rtol=0)

    save_peft(tmp_path / "trained", trained, our_config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    tokens, mask = padded(ours.tokenizer, TEXTS)
    logits = jax.jit(lora.lorafy(ours.apply))

    again, _ = load_peft(tmp_path / "theirs", ours.apply, ours.params, tokens)
    difference = logits(again, tokens) - torch_logits(theirs, tokens, mask)
    assert np.abs(difference)[mask].max() <= 1e-3

    back = peft.PeftModel.from_pretrained(theirs.unload(), str(tmp_path / "trained"))
    difference = logits(trained, tokens) - torch_logits(back, tokens, mask)
    assert np.abs(difference)[mask].max() <= 1e-3
