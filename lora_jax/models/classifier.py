"""A decoder that classifies texts: its classes in config.json, and where its head `score` reads.

    logits = W_score · h      h the hidden state of a text's last token, W_score (c, d)

B batch, T tokens, D width, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lora_jax.config.arguments import quoted
from lora_jax.dims import AnyArray

HEAD = "score"
CLASSIFIER = "ForSequenceClassification"
# Decoders of which transformers has no class with such a head.
WITHOUT = (
    "cohere", "cohere2", "ernie4_5", "gemma4_text", "glm4_moe", "glm4_moe_lite", "granite",
    "llama4_text", "olmoe", "qwen3_5_moe_text",
)  # fmt: skip
# Starts of the names of classes, where they are not those of the language models.
_STARTS = {"Gemma3": "Gemma3Text", "Qwen3_5": "Qwen3_5Text"}


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
    if "" in labels or len({*labels}) < len(labels):
        raise ValueError(f"`labels` must be different names, got {quoted(labels)}")


def write_labels(labels: tuple[str, ...]) -> dict[str, Any]:
    """The reverse of `labels_of`."""
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def read_classes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a decoder's configuration, if `architectures` names a classifier of texts."""
    if not str((raw.get("architectures") or [""])[0]).endswith(CLASSIFIER):
        return {}
    # There is no head that could repeat the embedding.
    return {
        "labels": labels_of(raw),
        "problem_type": raw.get("problem_type"),
        "tie_word_embeddings": False,
    }


def write_classes(config: Any, architecture: str) -> dict[str, Any]:
    """The class in `architectures`, and the classes, if there are any.

    Args:
      config: a decoder's configuration.
      architecture: the class of the language model.
    """
    if not config.labels:
        return {"architectures": [architecture]}
    start = architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    found = {"architectures": [f"{_STARTS.get(start, start)}{CLASSIFIER}"]}
    more = {} if config.problem_type is None else {"problem_type": config.problem_type}
    return {**found, **write_labels(config.labels), **more}


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
