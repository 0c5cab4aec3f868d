"""Making a backend what AutoTokenizer makes of the same directory.

`class_of` finds the class that AutoTokenizer takes, `rebuild` sets the parts that the class sets
(`lora_jax.hf.tokenizer.classes`), and `surround` what it puts around a text.
"""

import json
import warnings
from collections.abc import Mapping
from typing import Any

from lora_jax.compat import require
from lora_jax.hf.tokenizer.classes import CLASSES, Class, Given, Part, Parts

# Other names of a class.
_SAME = {
    **dict.fromkeys(
        ("DistilBertTokenizer", "ElectraTokenizer", "ConvBertTokenizer", "LxmertTokenizer",
         "MobileBertTokenizer", "SqueezeBertTokenizer"),
        "BertTokenizer",
    ),
    **dict.fromkeys(
        ("BartTokenizer", "LEDTokenizer", "LongformerTokenizer", "MvpTokenizer"), "RobertaTokenizer"
    ),
}  # fmt: skip
# The other classes that are built from defaults.
_NOT_FOLLOWED = frozenset(
    f"{name}Tokenizer"
    for name in (
        "Albert", "Barthez", "BigBird", "Blenderbot", "CLIP", "Camembert", "CodeGen",
        "DPRContextEncoder", "DPRQuestionEncoder", "DPRReader", "Deberta", "DebertaV2", "Esmc",
        "Funnel", "Herbert", "Lasr", "LayoutLMv2", "LayoutLMv3", "LayoutXLM", "Luke", "MBart",
        "MBart50", "MLuke", "MPNet", "MarkupLM", "Nllb", "Nougat", "OpenAIGPT", "Pegasus",
        "Reformer", "RemBert", "RoFormer", "SeamlessM4T", "Siglip2", "Splinter", "Tipsv2", "Udop",
        "VideoPrism", "Whisper", "XGLM", "XLNet",
    )
)  # fmt: skip

# model_type -> its class; "" is a type whose tokenizer.json is followed. Types that are missing go
# by `tokenizer_class` alone.
_OF_TYPE = {
    **dict.fromkeys(("mistral", "mistral3", "mixtral", "ministral", "phi3", "llava", "olmo2",
                     "granite", "stablelm", "ernie4_5", "glm", "glm4", "olmo3", "llava_next"), ""),
    **dict.fromkeys(("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen2_vl", "qwen2_5_vl",
                     "qwen3_vl", "qwen3_vl_moe", "internvl"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "opt", "phi", "starcoder2"), "GPT2Tokenizer"),
    **dict.fromkeys(("gpt_neox", "olmo", "olmoe", "mpt", "mamba"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
    **dict.fromkeys(("bert", "distilbert", "electra"), "BertTokenizer"),
    **dict.fromkeys(("roberta", "bart"), "RobertaTokenizer"),
    **dict.fromkeys(("t5", "mt5"), "T5Tokenizer"),
    "code_llama": "CodeLlamaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}  # fmt: skip
# Types whose directories often name a wrong class: the type decides.
_TYPE_DECIDES = ("qwen2", "phi3", "llava")


def class_of(settings: Mapping[str, Any], config: Mapping[str, Any], backend: Any) -> str:
    """Name of the class that AutoTokenizer takes, or "" if it follows tokenizer.json.

    Args:
      settings: tokenizer_config.json.
      config: config.json.
      backend: the tokenizer of tokenizer.json.
    """
    model = config.get("model_type")
    declared = settings.get("tokenizer_class") or config.get("tokenizer_class")
    # None: a type that is not in the table. "": one whose tokenizer.json is followed.
    its = _OF_TYPE.get(model) if isinstance(model, str) else None
    if declared is None:
        return its or ""
    declared = str(declared).removesuffix("Fast")
    declared = _SAME.get(declared, declared)
    # A repository with code of its own: without that code its class is taken as declared.
    if "auto_map" in settings:
        return declared
    # Llama 3's files: a byte-level tokenizer under the class of Llama 2.
    if declared == "LlamaTokenizer" and model not in _TYPE_DECIDES and _byte_level(backend):
        return ""
    if its is None or its == declared:
        return declared
    return its if not its or model in _TYPE_DECIDES else declared


def rebuild(
    backend: Any, name: str, settings: Mapping[str, Any], named: Mapping[str, str]
) -> Class | None:
    """Sets the parts that a class sets.

    Args:
      backend: the tokenizer of tokenizer.json, which is changed.
      name: the class.
      settings: tokenizer_config.json.
      named: name -> text of the special tokens that the files name.

    Returns:
      The class, or None if tokenizer.json is followed.
    """
    if (its := CLASSES.get(name)) is None:
        if name in _NOT_FOLLOWED:
            _warn(name, "its normalizer, pre-tokenizer and decoder")
        return None
    kind = type(backend.model).__name__
    if kind != its.model:
        _warn(name, f"a model of kind {its.model} in place of {kind}")
        return None
    characters = _characters(_state(backend.normalizer))
    parts = its.parts(Given(settings, {**its.special, **named}, characters))
    for field in ("normalizer", "pre_tokenizer", "decoder"):
        if _state(getattr(backend, field)) != getattr(parts, field):
            setattr(backend, field, getattr(_shell(parts), field))
    _set_model(backend, parts.model)
    return its


def _warn(name: str, difference: str) -> None:
    warnings.warn(
        f"`{name}`: transformers gives this class {difference} by default, whatever tokenizer.json "
        "has; here tokenizer.json is followed, and tokens may differ",
        stacklevel=4,
    )


def _byte_level(backend: Any) -> bool:
    return any("ByteLevel" in repr(part) for part in (backend.pre_tokenizer, backend.decoder))


def _state(part: Any) -> Part:
    """A part of a backend, as tokenizer.json writes it."""
    return None if part is None else json.loads(part.__getstate__())


def _characters(normalizer: Part) -> Part:
    """The character map among a file's normalizers."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    return next((step for step in steps if step["type"] == "Precompiled"), None)


def _shell(parts: Parts) -> Any:
    """A tokenizer without a vocabulary that has the parts: the library makes them from JSON."""
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": None,
        "decoder": parts.decoder,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    return require("tokenizers").Tokenizer.from_str(json.dumps(whole))


def _set_model(backend: Any, fields: Mapping[str, Any]) -> None:
    if "unk_id" not in fields:
        for field, value in fields.items():
            setattr(backend.model, field, value)
        return
    # Unigram's fields cannot be set: one with another number for unknown pieces is made anew.
    state = json.loads(backend.model.__getstate__())
    if (state["unk_id"], state.get("byte_fallback", False)) != (fields["unk_id"], False):
        pieces = [tuple(piece) for piece in state["vocab"]]
        backend.model = require("tokenizers").models.Unigram(pieces, fields["unk_id"], False)


def surround(backend: Any, its: Class, special: Mapping[str, str]) -> None:
    """Sets what a class puts around a text, where the class decides it and not tokenizer.json."""
    if not its.single:
        return

    def written(template: str) -> list[str]:
        texts = []
        for step in template.split():
            token, colon, number = step.partition(":")
            texts.append(special.get(token, token) + colon + number)
        return texts

    names = {step.partition(":")[0] for step in its.single.split()} - {"$A"}
    backend.post_processor = require("tokenizers").processors.TemplateProcessing(
        single=written(its.single),
        pair=written(its.pair),
        special_tokens=[(special[n], backend.token_to_id(special[n])) for n in sorted(names)],
    )
