"""Text generation: tokenizes prompts, runs `models.generate` and decodes the result."""

from collections.abc import Sequence
from typing import Any

import jax

from lora_jax import models
from lora_jax.recipes.settings import GenerateConfig

Messages = list[dict[str, str]]


def as_messages(text: str, *, system: str | None = None) -> Messages:
    """The chat messages of one user prompt, after a system message if given."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


def generate_texts(
    model: Any, params: Any, questions: Sequence[Messages | str], config: GenerateConfig
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


def _tokens(tokenizer: Any, question: Messages | str) -> list[int]:
    if isinstance(question, str):
        return list(tokenizer.encode(question))
    return list(tokenizer.apply_chat_template(question, add_generation_prompt=True))
