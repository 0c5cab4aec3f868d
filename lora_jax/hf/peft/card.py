"""The model card beside a PEFT adapter: README.md."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_jax.hf.hub import is_hub_id

CARD_FILE = "README.md"

# PEFT's task type -> the class of transformers that loads the base model.
_OF_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
# Every type that PEFT reads.
TASK_TYPES = (None, *_OF_TASK, "FEATURE_EXTRACTION")
_MULTIMODAL, _MASKED = "AutoModelForImageTextToText", "AutoModelForMaskedLM"
_IMAGES = "AutoModelForImageClassification"
# Every class that a card may name; None is that of the task.
CLASSES = (None, *_OF_TASK.values(), _MULTIMODAL, _MASKED, _IMAGES, "AutoModel")

# Modules that an encoder has before a classifier of whole texts, but not before one of tokens; and
# those of masked language models.
OF_TEXTS = frozenset({"pooler", "out_proj", "pre_classifier"})
OF_WORDS = frozenset({"cls", "lm_head", "vocab_projector", "decoder"})

# The table and the blocks of a decoder: Llama's, GPT-NeoX', GPT-2's.
_DECODERS = (("embed_tokens", "layers"), ("embed_in", "layers"), ("wte", "h"))

# The start of the names of a decoder that is part of a model of images and texts.
WRAPPED = ("model.language_model.", "language_model.model.")


def parts_of(names: Iterable[str]) -> set[str]:
    """The components of dotted names."""
    return {part for name in names for part in name.split(".")}


def is_encoder(paths: Collection[str]) -> bool:
    """Whether leaves of these paths are an encoder of BERT's kind, with any head or none."""
    parts = parts_of(paths)
    if {"tok_embeddings", "layers", "attn"} <= parts:  # ModernBERT
        return True
    # Of BERT's kind, or DistilBERT's.
    blocks = "encoder" in parts or {"transformer", "layer"} <= parts
    return "word_embeddings" in parts and blocks and "decoder" not in parts


def is_decoder(parts: Collection[str]) -> bool:
    """Whether these components of paths are those of a language model of transformers'."""
    known = any({*both} <= {*parts} for both in _DECODERS)
    return known and not {"encoder", "classifier"} & {*parts}


def is_encoder_decoder(parts: Collection[str]) -> bool:
    """Whether these components of paths are those of T5 or its like."""
    return "EncDecAttention" in parts


def auto_class_of(paths: Collection[str], task_type: str | None) -> str | None:
    """The class that loads the base, in which the adapter's names are those of its modules.

    Args:
      paths: of the model's leaves, in Hugging Face's terms.
      task_type: of the config.

    Returns:
      The class, or None for that of the task.
    """
    if any(path.startswith(WRAPPED) for path in paths):
        return _MULTIMODAL
    if task_type is not None:
        return None
    # An adapter without a task was made on a model with a head that it leaves alone.
    parts = parts_of(paths)
    if {"vit", "patch_embeddings", "classifier"} <= parts:
        return _IMAGES
    if not is_encoder(paths):
        if "score" in parts and is_decoder(parts):
            biased = any(path.endswith("score.bias") for path in paths)
            return _OF_TASK["TOKEN_CLS" if biased else "SEQ_CLS"]
        if "qa_outputs" in parts and is_decoder(parts):
            return _OF_TASK["QUESTION_ANS"]
        if is_encoder_decoder(parts):
            return _OF_TASK["SEQ_2_SEQ_LM"]
        return "AutoModelForCausalLM" if "lm_head" in parts else None
    if "classifier" in parts and "tok_embeddings" not in parts:
        return _OF_TASK["SEQ_CLS" if OF_TEXTS & parts else "TOKEN_CLS"]
    if "qa_outputs" in parts:
        return _OF_TASK["QUESTION_ANS"]
    return _MASKED if OF_WORDS & parts else None


_LINES = (
    ("r", "rank"),
    ("lora_alpha", "alpha"),
    ("rank_pattern", "ranks that differ"),
    ("alpha_pattern", "alphas that differ"),
    ("target_modules", "adapted modules"),
    ("target_parameters", "adapted parameters"),
    ("modules_to_save", "modules trained whole"),
    ("trainable_token_indices", "trained tokens"),
)
_FLAGS = (
    ("use_rslora", "rsLoRA: scale alpha/√rank"),
    ("use_dora", "DoRA: magnitudes are trained too"),
    ("lora_bias", "B has a bias"),
)


def classes_of(text: str, fields: Mapping[str, Any]) -> list[str | None]:
    """The values of `auto_class` for which `card` gives this text; none if a user changed it."""
    return [name for name in CLASSES if card(fields, name) == text]


def card(
    fields: Mapping[str, Any],
    auto_class: str | None = None,
    *,
    place: str = "folder or hub id of this adapter",
) -> str:
    """The text of a model card.

    Args:
      fields: PEFT's config.
      auto_class: the class that loads the base; None is that of the config's task.
      place: where PEFT reads the adapter from.

    Returns:
      Markdown, with the front matter that the Hub reads.
    """
    base = fields.get("base_model_name_or_path")
    facts = [f"- base model: {base or 'not recorded'}"]
    facts += [f"- {name}: {_spelled(fields[key])}" for key, name in _LINES if fields.get(key)]
    facts += [f"- {text}" for key, text in _FLAGS if fields.get(key)]
    if fields.get("init_lora_weights") == "loftq":
        steps = fields["loftq_config"]
        facts.append(
            f"- started by LoftQ ({steps['loftq_bits']} bits, {steps['loftq_iter']} turns): it "
            "belongs to the base model quantized so, which PEFT does when it reads the adapter "
            "over the base in floats"
        )
    if fields.get("bias", "none") != "none":
        facts.append(f"- biases of the base trained: {fields['bias']}")
    # The Hub lists the adapter under its base by this front matter, and takes no path in it.
    front = ["---", "library_name: peft", "tags:", "- lora", "- lora_jax"]
    front[1:1] = [f"base_model: '{base}'"] if is_hub_id(base or "", owner=False) else []
    model = auto_class or _OF_TASK.get(fields.get("task_type") or "", "AutoModel")
    code = [
        "```python",
        "from peft import PeftModel",
        f"from transformers import {model}",
        "",
        f"base = {model}.from_pretrained({base or 'the base model'!r})",
        f"model = PeftModel.from_pretrained(base, {place!r})",
        "```",
    ]
    parts = [front, ["---", "", "# LoRA adapter", ""], facts, ["", "Loading it:", ""], code]
    return "\n".join(line for part in parts for line in part) + "\n"


def _spelled(value: Any) -> str:
    """A value of the config in Markdown, long lists cut."""
    if isinstance(value, Mapping):
        return ", ".join(f"`{k}` {_spelled(v)}" for k, v in value.items())
    if isinstance(value, list):
        shown = [f"`{v}`" if isinstance(v, str) else str(v) for v in sorted(value)[:12]]
        more = f" and {len(value) - 12} more" if len(value) > 12 else ""
        return ", ".join(shown) + more
    return f"`{value}`" if isinstance(value, str) else str(value)
