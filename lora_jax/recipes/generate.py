"""Text generation: tokenizes prompts, runs `models.generate` and decodes the result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax import models

Messages = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Options of the generation.

    Attributes:
      max_new_tokens: maximum number of tokens of an answer.
      temperature: 0 takes the most likely token; above 0, logits are divided by it and sampled.
      top_p: samples only from the most likely tokens that together have this probability.
      seed: seed of the sampling.
      batch_size: prompts in one batch.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self):
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


def as_messages(text: str, *, system: str | None = None) -> Messages:
    """The chat messages of one user prompt, after a system message if given."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


def generate_texts(
    model, params: Any, questions: Sequence[Messages | str], config: GenerateConfig
) -> list[str]:
    """Generates an answer to each prompt.

    Args:
      model: from `lora_jax.models.load`, with a tokenizer.
      params: its parameters, with or without adapters.
      questions: each is the messages of a chat so far, or a text to continue as it is.
      config: options of the generation.

    Returns:
      One text for each question, without special tokens.

    Raises:
      ValueError: the model has no tokenizer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("this model came without a tokenizer, so it cannot read text")
    prompts = [_tokens(tokenizer, question) for question in questions]
    stops = sorted({*model.config.eos_token_ids, tokenizer.eos_id} - {None})
    key = jax.random.key(config.seed)
    answers = []
    for start in range(0, len(prompts), config.batch_size):
        answers += models.generate(
            model,
            params,
            prompts[start : start + config.batch_size],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            stop_tokens=stops,
            key=jax.random.fold_in(key, start),
        )
    return [tokenizer.decode(tokens) for tokens in answers]


def _tokens(tokenizer, question: Messages | str) -> list[int]:
    if isinstance(question, str):
        return list(tokenizer.encode(question))
    return list(tokenizer.apply_chat_template(question, add_generation_prompt=True))
