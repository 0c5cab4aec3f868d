"""The model card of an exported adapter: a README.md that says what it is and how to load it."""

from collections.abc import Mapping
from typing import Any

CARD_FILE = "README.md"

# The class of transformers that PEFT's task types are loaded with.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
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


def card(fields: Mapping[str, Any]) -> str:
    """The text of a model card.

    Args:
      fields: PEFT's config.

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
    front = ["---", "library_name: peft", "tags:", "- lora", "- lora_jax"]
    front[1:1] = [f"base_model: {_quoted(base)}"] if base else []
    model = _CLASSES.get(fields.get("task_type") or "", "AutoModel")
    code = [
        "```python",
        "from peft import PeftModel",
        f"from transformers import {model}",
        "",
        f"base = {model}.from_pretrained({base or 'the base model'!r})",
        "model = PeftModel.from_pretrained(base, 'this directory')",
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


def _quoted(text: str) -> str:
    """A YAML string, whatever is in it."""
    return "'" + text.replace("'", "''").replace("\n", " ") + "'"
