"""A decoder with the head of a task: its classes in config.json, and which tokens its head reads.

    logits = W h + b      W (c, d), h the hidden state of each token, or of a text's last one; of
                          a classifier of texts, `score`, without b

B batch, T tokens, D width, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lora_jax.config.arguments import quoted
from lora_jax.dims import AnyArray
from lora_jax.models.heads import ANSWERS, CLASSIFICATION, DECODER_HEADS, NAMED, TOKENS

# Decoders of which transformers has a class with a head for tokens or for answers, under the names
# of this package.
_TOKENS = (
    "apertus", "arcee", "deepseek_v3", "exaone4", "gemma", "gemma2", "glm", "glm4", "gpt_oss",
    "helium", "llama", "ministral", "ministral3", "mistral", "mixtral", "nemotron", "phi", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3",
    "stablelm", "starcoder2",
)  # fmt: skip
_ANSWERS = (
    "arcee", "exaone4", "llama", "ministral", "ministral3", "mistral", "mixtral", "nemotron",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3",
)  # fmt: skip
# Those whose class for answers holds the decoder under another name.
_TRANSFORMER = (
    "arcee", "exaone4", "llama", "ministral", "nemotron", "qwen2", "qwen3", "qwen3_moe",
    "qwen3_next", "seed_oss", "smollm3",
)  # fmt: skip
# Decoders of which transformers has no class that classifies texts.
_WITHOUT = (
    "apertus", "cohere", "cohere2", "cwm", "dots1", "ernie4_5", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "gemma4_text", "glm4_moe", "glm4_moe_lite", "granite", "granite_swa",
    "granitemoe", "granitemoe_swa", "hyperclovax", "internlm3", "iquestcoder", "jais2",
    "llama4_text", "mellum", "olmoe", "qwen3_5_moe_text", "solar_open", "vaultgemma", "youtu",
)  # fmt: skip


def has_head(model_type: str, task: str) -> bool:
    """Whether transformers has a decoder's class for a task."""
    if task == CLASSIFICATION:
        return model_type not in _WITHOUT
    return model_type in {TOKENS: _TOKENS, ANSWERS: _ANSWERS}.get(task, ())


# Starts of the names of classes, where they are not those of the language models.
_STARTS = {"Gemma3": "Gemma3Text", "Qwen3_5": "Qwen3_5Text"}


def renamed_decoder(config: Any) -> bool:
    """Whether transformers' class holds the decoder as `transformer`, not as `model`."""
    return getattr(config, "task", None) == ANSWERS and config.model_type in _TRANSFORMER


def labels_of(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes in config.json; transformers writes none for two unnamed ones."""
    names = given.get("id2label")
    if names:
        if not all(str(i).isdecimal() for i in names):
            raise ValueError(f"config: `id2label` must have numbers as keys, got {list(names)}")
        return tuple(str(names[i]) for i in sorted(names, key=int))
    return tuple(f"LABEL_{i}" for i in range(given.get("num_labels", 2)))


def check_labels(labels: Sequence[str]) -> None:
    """Refuses a text in place of names, and names of which two are the same or one is empty."""
    if isinstance(labels, str):
        raise TypeError(f"`labels` must be a list of names, got {quoted((labels,))}: a text")
    if not isinstance(labels, Sequence) or not all(isinstance(x, str) for x in labels):
        raise TypeError(f"`labels` must be a list of names, got {labels!r}")
    if "" in labels or len({*labels}) < len(labels):
        raise ValueError(f"`labels` must be different names, got {quoted(labels)}")


def write_labels(labels: tuple[str, ...]) -> dict[str, Any]:
    """The reverse of `labels_of`."""
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def read_classes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a decoder's configuration, if `architectures` names a class with a head."""
    named = str((raw.get("architectures") or [""])[0])
    for task, known in NAMED.items():
        if task in DECODER_HEADS and named.endswith(known.ending):
            # There is no head that could repeat the embedding.
            return {
                "task": task,
                "labels": ("start", "end") if task == ANSWERS else labels_of(raw),
                "problem_type": raw.get("problem_type"),
                "tie_word_embeddings": False,
            }
    return {}


def write_classes(config: Any, architecture: str) -> dict[str, Any]:
    """The class in `architectures`, and the classes, if there are any.

    Args:
      config: a decoder's configuration.
      architecture: the class of the language model.
    """
    if not config.labels:
        return {"architectures": [architecture]}
    start = architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    found = {"architectures": [f"{_STARTS.get(start, start)}{NAMED[config.task].ending}"]}
    more = {} if config.problem_type is None else {"problem_type": config.problem_type}
    named = {} if config.task == ANSWERS else write_labels(config.labels)
    return {**found, **named, **more}


def last_states(
    hidden: Float[Array, "b t d"],
    tokens: Int[AnyArray, "b t"],
    mask: Bool[AnyArray, "b t"] | None,
    pad_token_id: int | None,
) -> Float[Array, "b 1 d"]:
    """The hidden state of each row's last real token.

    Real are those of the mask; without one, as in transformers, all but `pad_token_id`.
    """
    if mask is None and pad_token_id is None:
        return hidden[:, -1:]
    real = tokens != pad_token_id if mask is None else mask
    last = jnp.max(jnp.arange(tokens.shape[1]) * real, axis=1)  # (b,)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)
