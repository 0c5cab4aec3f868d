"""Making a backend what AutoTokenizer makes of the same directory.

`class_of` finds the class that AutoTokenizer takes, `rebuild` sets the parts that the class sets
(`lora_jax.hf.tokenizer.classes`), and `surround` what it puts around a text.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
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
        "Albert", "Barthez", "BigBird", "Blenderbot", "CLIP", "CodeGen",
        "DPRContextEncoder", "DPRQuestionEncoder", "DPRReader", "Deberta", "Esmc",
        "Funnel", "Herbert", "Lasr", "LayoutLMv2", "LayoutLMv3", "LayoutXLM", "Luke", "MBart",
        "MBart50", "MLuke", "MPNet", "MarkupLM", "Nllb", "Nougat", "OpenAIGPT", "Pegasus",
        "Reformer", "RemBert", "RoFormer", "SeamlessM4T", "Siglip2", "Splinter", "Tipsv2", "Udop",
        "VideoPrism", "Whisper", "XGLM", "XLNet",
    )
)  # fmt: skip

# model_type -> its class; "" is a type whose tokenizer.json is followed. Types that are missing go
# by `tokenizer_class` alone.
_OF_TYPE = {
    **dict.fromkeys(
        ("mistral", "mistral3", "mixtral", "ministral", "ministral3", "pixtral", "phi3", "phimoe",
         "llava", "llava_next", "vipllava", "smolvlm", "olmo2", "olmo3", "olmo_hybrid", "flex_olmo",
         "granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "stablelm", "ernie4_5",
         "ernie4_5_moe", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm4v", "glm4v_moe",
         "minimax_m2", "mimo_v2_flash", "kimi_linear", "nemotron", "jamba", "gpt_bigcode",
         "hyperclovax", "arctic", "modernbert", "modernbert-decoder", "xlm-roberta-xl", "umt5"),
        "",
    ),
    **dict.fromkeys(
        ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen2_vl", "qwen2_5_vl",
         "qwen3_vl", "qwen3_vl_moe", "qwen2_5_omni", "qwen3_omni_moe", "internvl", "ovis2"),
        "Qwen2Tokenizer",
    ),
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), "Qwen3_5Tokenizer"
    ),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "recurrent_gemma"),
        "GemmaTokenizer",
    ),
    **dict.fromkeys(
        ("gpt2", "gpt_neo", "gptj", "opt", "phi", "starcoder2", "dbrx"), "GPT2Tokenizer"
    ),
    **dict.fromkeys(
        ("gpt_neox", "olmo", "olmoe", "mpt", "mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"),
        "GPTNeoXTokenizer",
    ),
    **dict.fromkeys(("cohere", "cohere2", "aya_vision"), "CohereTokenizer"),
    **dict.fromkeys(
        ("bert", "distilbert", "electra", "convbert", "ernie", "megatron-bert", "squeezebert"),
        "BertTokenizer",
    ),
    **dict.fromkeys(
        ("roberta", "bart", "longformer", "data2vec-text", "roberta-prelayernorm"),
        "RobertaTokenizer",
    ),
    **dict.fromkeys(("t5", "mt5", "switch_transformers"), "T5Tokenizer"),
    **dict.fromkeys(("xlm-roberta", "xmod"), "XLMRobertaTokenizer"),
    "deberta-v2": "DebertaV2Tokenizer",
    "camembert": "CamembertTokenizer",
}  # fmt: skip
# Types whose directories often name a wrong class: the type decides.
_TYPE_DECIDES = ("qwen2", "phi3", "llava", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text")


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
) -> tuple[Class | None, Any]:
    """Sets the parts that a class sets.

    Args:
      backend: the tokenizer of tokenizer.json, which may be changed.
      name: the class.
      settings: tokenizer_config.json.
      named: name -> text of the special tokens that the files name.

    Returns:
      The class, or None if tokenizer.json is followed, and the backend.
    """
    if (its := CLASSES.get(name)) is None:
        if name in _NOT_FOLLOWED:
            _warn(name, "its normalizer, pre-tokenizer and decoder")
        return None, backend
    kind = type(backend.model).__name__
    if kind != its.model:
        _warn(name, f"a model of kind {its.model} in place of {kind}")
        return None, backend
    backend = _without_added(backend, settings)
    characters = _characters(_state(backend.normalizer))
    parts = its.parts(Given(settings, {**its.special, **named}, characters))
    for field in ("normalizer", "pre_tokenizer", "decoder"):
        if _state(getattr(backend, field)) != getattr(parts, field):
            setattr(backend, field, getattr(_shell(parts), field))
    _set_model(backend, parts.model)
    return its, backend


def _without_added(backend: Any, settings: Mapping[str, Any]) -> Any:
    """The backend without its added tokens, where tokenizer_config.json has a list of others.

    A class takes the vocabulary from tokenizer.json, and the added tokens from that list, which
    are added to what this returns.
    """
    declared = settings.get("added_tokens_decoder")
    if not isinstance(declared, Mapping):
        return backend
    there = backend.get_added_tokens_decoder()
    lost = {number: x.content for number, x in there.items() if str(number) not in declared}
    first = backend.get_vocab_size(with_added_tokens=False)
    fresh = min((number for number in lost if number >= first), default=None)
    if fresh is not None and any(n.isdecimal() and int(n) > fresh for n in declared):
        warnings.warn(
            f"tokenizer.json has added tokens, such as {lost[fresh]!r}, that the list in "
            "tokenizer_config.json has not: transformers leaves them out and numbers those after "
            "them anew; here they are kept",
            stacklevel=4,
        )
        return backend
    plain = {n for n, x in declared.items() if isinstance(x, Mapping) and not x.get("special")}
    if not lost and not any(x.special and str(n) in plain for n, x in there.items()):
        return backend
    state = {**json.loads(backend.to_str()), "added_tokens": []}
    return require("tokenizers").Tokenizer.from_str(json.dumps(state))


def _warn(name: str, difference: str) -> None:
    warnings.warn(
        f"`{name}`: transformers gives this class {difference} by default, whatever tokenizer.json "
        "has; here tokenizer.json is followed, and tokens may differ",
        stacklevel=4,
    )


def _byte_level(backend: Any) -> bool:
    parts = (
        backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder
    )  # fmt: skip
    return any("ByteLevel" in repr(part) for part in parts)


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
    pieces = [tuple(piece) for piece in state["vocab"]]
    texts = [text for text, _ in pieces]
    named = fields.get("unk_token") in texts
    unknown = texts.index(fields["unk_token"]) if named else fields["unk_id"]
    if (state["unk_id"], state.get("byte_fallback", False)) != (unknown, False):
        backend.model = require("tokenizers").models.Unigram(pieces, unknown, False)


def surround(
    backend: Any,
    its: Class,
    special: Mapping[str, str],
    settings: Mapping[str, Any],
    directory: Path,
) -> None:
    """Sets what a class puts around a text, where the class decides it and not tokenizer.json.

    Raises:
      ValueError: the tokenizer has none of these tokens.
    """
    if not its.single:
        return
    names = {step.partition(":")[0] for step in its.single.split()} - {"$A"}
    lost = [name for name in sorted(names) if backend.token_to_id(special[name]) is None]
    if lost:
        raise ValueError(
            f"{directory}: the tokenizer's class puts a `{lost[0]}` around every text, and the "
            "model has no token for it; name the model's own in tokenizer_config.json"
        )

    def written(template: str) -> list[str]:
        texts = []
        for step in template.split():
            token, colon, number = step.partition(":")
            texts.append(special.get(token, token) + colon + number)
        return texts

    processors = require("tokenizers").processors
    if its.trims:
        ends = [(special[n], backend.token_to_id(special[n])) for n in ("sep_token", "cls_token")]
        trims = bool(settings.get("trim_offsets", True))
        prefix = bool(settings.get("add_prefix_space"))
        backend.post_processor = processors.RobertaProcessing(*ends, trims, prefix)
        return
    backend.post_processor = processors.TemplateProcessing(
        single=written(its.single),
        pair=written(its.pair),
        special_tokens=[(special[n], backend.token_to_id(special[n])) for n in sorted(names)],
    )
