"""Scores of generated completions: exact match and BLEU."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.compat import require
from lora_jax.recipes.generate import generate_texts
from lora_jax.recipes.settings import GenerateConfig
from lora_jax.train.jsonl import Record


class Question(NamedTuple):
    """A prompt, or the messages before an answer, and its right completions."""

    prompt: Any
    completions: list[str]


def questions_of(records: Sequence[Record]) -> list[Question]:
    """Every distinct prompt with its completions, in the order of the records."""
    found: dict[str, Question] = {}
    for record in records:
        if record.form == "prompt":
            prompt, completion = record.fields
        elif record.form == "messages" and record.fields[0][-1]["role"] == "assistant":
            *prompt, last = record.fields[0]
            completion = last["content"]
        else:
            raise ValueError(
                f"{record.source}: completions are generated here, so every record needs a prompt "
                'and a completion, or messages that end with the assistant\'s; or take "loss"'
            )
        if record.options:
            raise ValueError(
                f"{record.source}: completions are generated without "
                f'{", ".join(f"`{name}`" for name in record.options)}; remove them, or take "loss"'
            )
        # Messages are dicts, which have no hash.
        question = found.setdefault(json.dumps(prompt), Question(prompt, []))
        question.completions.append(completion.strip())
    return list(found.values())


def completions_of(
    model: Any, params: Any, questions: Sequence[Question], config: GenerateConfig
) -> list[str]:
    """The completion that the model generates for each question, without spaces around it."""
    prompts = [question.prompt for question in questions]
    return [text.strip() for text in generate_texts(model, params, prompts, config)]


def exact_match(texts: Sequence[str], questions: Sequence[Question]) -> np.ndarray:
    """(n,): 1.0 where the text is one of the question's completions, else 0.0."""
    both = zip(texts, questions, strict=True)
    return np.asarray([float(text in question.completions) for text, question in both])


def bleu_statistics(texts: Sequence[str], questions: Sequence[Question]) -> np.ndarray:
    """(n, 10): `bleu_counts` of each text, its question's completions as references."""
    both = zip(texts, questions, strict=True)
    return np.stack([bleu_counts(text, question.completions) for text, question in both])


def bleu_counts(hypothesis: str, references: Sequence[str]) -> np.ndarray:
    """The statistics of BLEU for a sentence: matches of 1- to 4-grams, totals, the two lengths.

    Returns:
      float64 (10,); their sum over sentences gives the corpus BLEU, see `bleu_of`.

    Source: Papineni et al. 2002; computed by sacrebleu (Post 2018), tokenization 13a.
    """
    bleu = require("sacrebleu").BLEU(effective_order=True)
    found = bleu.sentence_score(hypothesis, list(references))
    return np.asarray([*found.counts, *found.totals, found.sys_len, found.ref_len], np.float64)


def bleu_of(values: np.ndarray) -> float:
    """Corpus BLEU, 0 to 100, of `bleu_counts` of its sentences."""
    BLEU = require("sacrebleu").BLEU
    sums = [int(x) for x in values.sum(axis=0)]
    found = BLEU.compute_bleu(sums[:4], sums[4:8], sums[8], sums[9], smooth_method="exp")
    return float(found.score)
