"""Random transformers models, saved as directories: what our models are compared with."""

import copy

import jax
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM


def saver(cases, tmp_path_factory):
    """Makes and saves a random transformers model of a case, once.

    Args:
      cases: case -> fields of its configuration.
      tmp_path_factory: pytest's.

    Returns:
      A function: case -> the torch model and its directory.
    """
    made = {}

    def make(case):
        if case not in made:
            torch.manual_seed(0)
            fields = {"model_type": "llama", "initializer_range": 0.3, **cases[case]}
            config = AutoConfig.for_model(**copy.deepcopy(fields))
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if name.endswith("bias") or "norm" in name or ".ln_" in name:
                        weight.add_(torch.randn_like(weight) * 0.1)
            directory = tmp_path_factory.mktemp("model")
            model.save_pretrained(directory)
            made[case] = model, directory
        return made[case]

    return make


def texts(padding):
    """Three texts of 12, 7 and 1 tokens, padded on one side with a token that is a real one."""
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (3, 12), 0, 97))
    mask = np.arange(12) < np.array([[12], [7], [1]])
    return tokens, mask if padding == "right" else mask[:, ::-1].copy()


def both_paddings():
    """The texts, padded on the left and on the right, in one batch."""
    return (np.concatenate(both) for both in zip(texts("left"), texts("right"), strict=True))


def theirs(model, tokens, mask, positions):
    """A torch model's logits."""
    with torch.no_grad():
        return model(
            torch.tensor(tokens), attention_mask=torch.tensor(mask), position_ids=positions
        ).logits.numpy()


def greedy(model, tokens, mask, count):
    """A torch model's likeliest tokens."""
    with torch.no_grad():
        return model.generate(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )[:, tokens.shape[1] :].tolist()
