"""Which model types there are: one entry each, for everything that loads, makes or saves a model.

To add one: a configuration, a forward and a table of names, and a line in `ARCHITECTURES`.

A configuration is a frozen dataclass with at least `model_type`, `num_hidden_layers`,
`initializer_range`, `fresh_scale` (what norms' `scale` starts as), `max_position_embeddings` and
`to_hf()`.

A forward is a hashable object made by `forward(config=, dtype=, param_dtype=, scan=, remat=)`, with
`config`, `shapes()` (the parameter tree as `jax.ShapeDtypeStruct`s) and `apply(params, tokens, *,
mask=None, ...)`, a pure function. A `causal_lm` returns logits (b, t, v) and also has `head`,
`init_cache` and the options of `lora_jax.models.model.Forward.apply`. An `encoder` takes
`token_type_ids=` too and returns what its head gives: (b, classes) for a classifier.
`lora_jax.models.model` has what forwards share: `structure`, `stacked`, `rematerialized`,
`check_options`, `check_inputs`; `lora_jax.models.layers` has `run_blocks`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from lora_jax.hf.checkpoint import names
from lora_jax.models.bert_config import KINDS, BertConfig
from lora_jax.models.config import LlamaConfig
from lora_jax.models.encoder import EncoderForward
from lora_jax.models.families import DIALECTS
from lora_jax.models.gpt2 import GPT2LM, GPT2Config
from lora_jax.models.model import Forward

CAUSAL_LM, ENCODER = "causal_lm", "encoder"


class Architecture(NamedTuple):
    """A model type.

    Attributes:
      kind: `CAUSAL_LM` or `ENCODER`: what `apply` takes and returns.
      from_hf: the object in config.json -> the configuration; refuses what it does not know.
      forward: makes what computes it, see above.
      names: Hugging Face's names of its tensors.
    """

    kind: str
    from_hf: Callable[[Mapping[str, Any]], Any]
    forward: Callable[..., Any]
    names: names.Family


# What a file with a `text_config` says beside it.
_OUTSIDE = (
    "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "tie_word_embeddings",
)  # fmt: skip


def text_of_gemma3(raw: Mapping[str, Any]) -> LlamaConfig:
    """The text model of a Gemma 3 with eyes (`model_type` `gemma3`), which becomes `gemma3_text`.

    Raises:
      ValueError: there is no `text_config`, or it is not understood.
    """
    if not isinstance(text := raw.get("text_config"), Mapping):
        raise ValueError("config: a `gemma3` needs a `text_config`, an object; there is none")
    outside = {name: raw[name] for name in _OUTSIDE if name in raw}
    return LlamaConfig.from_hf({**outside, **text, "model_type": "gemma3_text"})


ARCHITECTURES: Mapping[str, Architecture] = {
    **{
        kind: Architecture(CAUSAL_LM, LlamaConfig.from_hf, Forward, names.LLAMA)
        for kind in DIALECTS
    },
    "gemma3_text": Architecture(CAUSAL_LM, LlamaConfig.from_hf, Forward, names.GEMMA3),
    "gemma3": Architecture(CAUSAL_LM, text_of_gemma3, Forward, names.GEMMA3),
    "gpt2": Architecture(
        CAUSAL_LM, GPT2Config.from_hf, partial(Forward, module=GPT2LM), names.GPT2
    ),
    **{
        kind: Architecture(ENCODER, BertConfig.from_hf, EncoderForward, names.BERT)
        for kind in KINDS
    },
}


def architecture_of(model_type: str) -> Architecture:
    """The entry of a model type.

    Raises:
      ValueError: there is none.
    """
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"config: model_type `{model_type}` is not one of {known}")
    return ARCHITECTURES[model_type]


def config_from_hf(raw: Mapping[str, Any]) -> Any:
    """The configuration that the object in config.json states.

    Raises:
      ValueError: a model type that is not known, or a field that changes numbers in a way that is
        not supported.
    """
    return architecture_of(str(raw.get("model_type"))).from_hf(raw)
