"""PEFT's task types: which one a tree is of, and what PEFT then looks for in the file.

A decoder is CAUSAL_LM. Encoders of BERT's kind are told by their names (`word_embeddings`,
`encoder`); their head by what stands beside them.
"""

from collections.abc import Mapping

import numpy as np

from lora_jax.hf.peft.modules import leaves_of

# The modules of classifiers' heads that PEFT takes for trained.
_HEADS = ("classifier", "score")


def task_of(lora_params, tensors: Mapping[str, np.ndarray]) -> str | None:
    """The task type of a tree.

    Args:
      lora_params: in Hugging Face's names, or ours.
      tensors: what is written, by PEFT's names.

    Returns:
      "CAUSAL_LM" for all that is no encoder; "SEQ_CLS", "TOKEN_CLS" or "QUESTION_ANS" for an
      encoder with such a head, where its head is written too, as PEFT expects of these types;
      "FEATURE_EXTRACTION" without a head; None (any model) otherwise, for instance with the head
      of a masked language model.
    """
    if not is_encoder(lora_params):
        return "CAUSAL_LM"
    parts = _parts(leaves_of(lora_params))
    if "classifier" in parts:
        whole = bool({"pooler", "out_proj"} & parts)  # classifiers of tokens have neither
        found = "SEQ_CLS" if whole else "TOKEN_CLS"
        return found if "classifier" in _parts(tensors) else None
    if "qa_outputs" in parts:
        return "QUESTION_ANS" if "qa_outputs" in _parts(tensors) else None
    return None if {"cls", "lm_head"} & parts else "FEATURE_EXTRACTION"


def is_encoder(lora_params) -> bool:
    """Whether a tree is an encoder of BERT's kind, with whatever head."""
    parts = _parts(leaves_of(lora_params))
    return {"word_embeddings", "encoder"} <= parts and "decoder" not in parts


def check_head(task_type: str | None, lora_params, tensors: Mapping[str, np.ndarray]) -> None:
    """PEFT takes the heads of classifiers for trained, and finds no file whole that lacks them.

    Raises:
      ValueError: the file would lack a head.
    """
    if task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return
    for head in _HEADS:
        if head in _parts(leaves_of(lora_params)) - _parts(tensors):
            raise ValueError(
                f'task_type "{task_type}": PEFT would look for the head `{head}` in the file; '
                f'train it too, modules_to_save=("{head}",), or pass task_type=None'
            )


def _parts(names) -> set[str]:
    return {part for name in names for part in name.split(".")}
