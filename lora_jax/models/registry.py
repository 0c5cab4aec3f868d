"""The table of model types: all code that loads, makes or saves a model reads it.

To add one: a configuration, a forward, a table of names and an entry in `ARCHITECTURES`.

A configuration is a frozen dataclass with at least `model_type`, `num_hidden_layers`,
`initializer_range`, `fresh_scale` (initial `scale` of norms), `max_position_embeddings`, `task`
(see `lora_jax.models.heads`), `labels` (the names of classes, or ()) and `to_hf()`.

A forward is a hashable object made by `forward(config=, dtype=, param_dtype=, scan=, remat=)`, with
`config`, `shapes()` (the parameter tree as `jax.ShapeDtypeStruct`s) and `apply(params, tokens, *,
mask=None, ...)`, a pure function. A `causal_lm` returns logits (b, t, v), with `labels` (b, c),
and also has `head`, `init_cache` and the options of `lora_jax.models.model.Forward.apply`. An
`encoder` takes `token_type_ids=` too and returns its head's result: (b, classes) for a classifier.
An `encoder_decoder` takes two texts, see `lora_jax.models.encoder_decoder`.
An `image_encoder` takes pixels (b, c, h, w) for the tokens.
`lora_jax.models.model` has the functions that forwards share: `structure`, `stacked`,
`rematerialized`, `check_options`, `check_inputs`; `lora_jax.models.layers` has `run_blocks`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.hf.checkpoint import names
from lora_jax.models.bert_config import KINDS, BertConfig
from lora_jax.models.classifier import renamed_decoder
from lora_jax.models.config import LlamaConfig
from lora_jax.models.dialect import unknown_type
from lora_jax.models.encoder import EncoderForward
from lora_jax.models.encoder_decoder import EncoderDecoderForward
from lora_jax.models.families import DIALECTS
from lora_jax.models.gpt2 import GPT2LM, GPT2Config
from lora_jax.models.kernels import AttentionName, check_attention
from lora_jax.models.model import Forward
from lora_jax.models.ranges import check_object
from lora_jax.models.t5_config import KINDS as T5_KINDS
from lora_jax.models.t5_config import T5Config
from lora_jax.models.vit import ImageForward
from lora_jax.models.vit_config import ViTConfig
from lora_jax.models.wrapped import WRAPPERS, check_readable, text_of

CAUSAL_LM: Final = "causal_lm"
ENCODER: Final = "encoder"
IMAGE_ENCODER: Final = "image_encoder"
ENCODER_DECODER: Final = "encoder_decoder"


class Architecture(NamedTuple):
    """A model type.

    Attributes:
      kind: `CAUSAL_LM`, `ENCODER`, `ENCODER_DECODER` or `IMAGE_ENCODER`; decides what `apply` takes
        and returns.
      from_hf: the object in config.json -> the configuration; unknown fields raise.
      forward: makes the forward, see above.
      names: Hugging Face's names of its tensors.
    """

    kind: Literal["causal_lm", "encoder", "encoder_decoder", "image_encoder"]
    from_hf: Callable[[Mapping[str, Any]], Any]
    forward: Callable[..., Any]
    names: names.Family


ARCHITECTURES: Mapping[str, Architecture] = {
    **{
        kind: Architecture(CAUSAL_LM, LlamaConfig.from_hf, Forward, dialect.names)
        for kind, dialect in DIALECTS.items()
    },
    **{kind: Architecture(CAUSAL_LM, text_of, Forward, names.WRAPPED) for kind in WRAPPERS},
    "llama4": Architecture(CAUSAL_LM, text_of, Forward, names.WITH_HEAD),
    "gpt2": Architecture(
        CAUSAL_LM, GPT2Config.from_hf, partial(Forward, module=GPT2LM), names.GPT2
    ),
    **{
        kind: Architecture(ENCODER, BertConfig.from_hf, EncoderForward, names.BERT)
        for kind in KINDS
    },
    **{
        kind: Architecture(ENCODER_DECODER, T5Config.from_hf, EncoderDecoderForward, names.T5)
        for kind in T5_KINDS
    },
    "vit": Architecture(IMAGE_ENCODER, ViTConfig.from_hf, ImageForward, names.VIT),
}


def names_of(config: Any) -> names.Family:
    """Hugging Face's names of the tensors of a model that was loaded."""
    own = architecture_of(config.model_type).names
    if renamed_decoder(config):
        own = replace(own, prefix="transformer.", starts=(("model.", "transformer."),))
    wrapper = getattr(config, "wrapper", None)
    return own if wrapper is None else names.within(own, architecture_of(wrapper).names)


def architecture_of(model_type: str) -> Architecture:
    """The entry of a model type.

    Raises:
      ValueError: the model type is unknown.
    """
    if model_type not in ARCHITECTURES:
        raise unknown_type(model_type, ARCHITECTURES)
    return ARCHITECTURES[model_type]


# Options of `Forward` that an encoder has not; an encoder-decoder lacks the first.
DECODERS_OWN = ("attention", "offload")


def forward_of(
    config: Any, *, attention: AttentionName = "auto", offload: bool = False, **options: Any
) -> Any:
    """The forward of a configuration; options as those of `Forward`.

    Raises:
      ValueError: an option that does not exist, or is not for an encoder.
    """
    architecture = architecture_of(config.model_type)
    if architecture.kind == CAUSAL_LM:
        return architecture.forward(config=config, attention=attention, offload=offload, **options)
    check_attention(attention)
    both = architecture.kind == ENCODER_DECODER
    for name, given in (
        ("attention", attention not in ("auto", "xla")),
        ("offload", offload and not both),
    ):
        if given:
            raise ValueError(
                f"`{name}` is for decoders, and `{config.model_type}` is an "
                f"encoder{'-decoder' if both else ', whose texts are short'}: leave it out"
            )
    more = {"offload": offload} if both else {}
    return architecture.forward(config=config, **more, **options)


def kind_of_model(model: Any) -> str | None:
    """The `kind` of a model's architecture; None of a model of the user's own."""
    kinds = {row.forward: row.kind for row in ARCHITECTURES.values()}
    return kinds.get(type(getattr(model, "forward", None)))


def inputs_of(config: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What `apply` takes behind the parameters, as shapes: enough for a trace, such as a plan's."""
    kind, tokens = architecture_of(config.model_type).kind, jax.ShapeDtypeStruct((1, 2), jnp.int32)
    if kind == IMAGE_ENCODER:
        return (jax.ShapeDtypeStruct((1, config.num_channels, *config.image_size), jnp.float32),)
    return (tokens, tokens) if kind == ENCODER_DECODER else (tokens,)


def config_from_hf(raw: Mapping[str, Any]) -> Any:
    """The configuration that the object in config.json states.

    Raises:
      TypeError: no object.
      ValueError: an unknown model type, or a field whose value changes results and is not
        supported.
    """
    check_object(raw)
    check_readable(raw, ARCHITECTURES)
    return architecture_of(str(raw.get("model_type"))).from_hf(raw)
