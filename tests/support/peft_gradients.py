"""The slopes of adapters: PEFT's against ours, compared in the files of adapters."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft

from tests.support.peft_llama import TOKENS
from tests.support.peft_oracle import TENSORS, peft_wrote, randomize


def theirs(model) -> dict:
    """Gradients of `sum(sin(logits))` for PEFT's adapters, by the names in its file."""
    import peft
    import torch

    torch.sin(model(torch.tensor(TOKENS, dtype=torch.long)).logits).sum().backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data = parameter.grad
    state = peft.get_peft_model_state_dict(model)
    return {name: value.detach().numpy() for name, value in sorted(state.items())}


def check_gradients(name: str, scratch: Path, there: Callable, base, fields: dict) -> None:
    """The slopes of an adapter that PEFT made.

    Args:
      name: of the recorded answer.
      scratch: a folder.
      there: makes the torch model.
      base: our model with the same weights.
      fields: of `peft.LoraConfig`.
    """
    # Small: with large factors the softmax is steep, and float32 leaves three digits of a slope.
    noise = partial(randomize, scale=0.1)
    want = peft_wrote(name, scratch / "a", there, fields, theirs, randomized=noise)
    kind = base.config.model_type
    params, config = load_peft(scratch / "a", base.apply, base.params, TOKENS, model_type=kind)
    trainable, frozen = lora.split(params)

    def loss(trainable):
        run = lora.lorafy(base.apply, strict=True)
        return jnp.sin(run(lora.combine(trainable, frozen), TOKENS)).sum()

    slopes = lora.combine(jax.grad(loss)(trainable), frozen)
    save_peft(scratch / "b", slopes, config, model_type=kind)
    got = load_file(scratch / "b" / TENSORS)
    assert got.keys() == want.keys()
    size = max(np.abs(x).max() for x in want.values())
    for key, value in want.items():
        # float32 sums of hundreds of terms, against the largest slope.
        np.testing.assert_allclose(got[key], value, atol=2e-5 * size, err_msg=key)
