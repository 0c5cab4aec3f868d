"""The configuration of T5, mT5 and UMT5, from and to Hugging Face's config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from lora_jax.models.dialect import (
    NEUTRAL,
    check_fixed,
    refuse_unsupported,
    scalar_if_one,
    tuple_of,
)
from lora_jax.models.layers import ACTIVATIONS
from lora_jax.models.ranges import check_fields, check_object, check_raw

# Fields of config.json -> ours.
_NAMES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_kv": "head_dim",
    "d_ff": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_decoder_layers": "num_decoder_layers",
    "num_heads": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "relative_attention_num_buckets": "buckets",
    "relative_attention_max_distance": "distances",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "decoder_start_token_id": "decoder_start_token_id",
    "pad_token_id": "pad_token_id",
    "dropout_rate": "dropout_rate",
    "classifier_dropout": "classifier_dropout",
    "initializer_range": "initializer_range",
}
# `output_past` is of old files; UMT5's `scalable_attention` has no effect in transformers.
_WITHOUT_EFFECT = ("initializer_factor", "output_past", "scalable_attention")
_READ = ("dense_act_fn", "eos_token_id", "feed_forward_proj", "is_gated_act",
         "scale_decoder_outputs", "tie_word_embeddings")  # fmt: skip
_REQUIRED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
_NEUTRAL = {**NEUTRAL, "is_encoder_decoder": (True,)}


class Kind(NamedTuple):
    """How a model type differs from T5.

    Attributes:
      architecture: Hugging Face's class.
      every: every block has a table of distances of its own, in place of the first one's for all.
      scaled: whether a tied head takes the hidden states times `hidden_size**-0.5`.
      activation: `feed_forward_proj` where config.json has none.
    """

    architecture: str
    every: bool = False
    scaled: bool = True
    activation: str = "gated-gelu"


KINDS: Mapping[str, Kind] = {
    "t5": Kind("T5ForConditionalGeneration", activation="relu"),
    "mt5": Kind("MT5ForConditionalGeneration", scaled=False),
    "umt5": Kind("UMT5ForConditionalGeneration", every=True),
}


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """An encoder-decoder of T5's kind, with the field names of the other models.

    Attributes:
      model_type: a key of `KINDS`.
      vocab_size: rows of the embedding table.
      hidden_size: width of the residual stream.
      head_dim: size of a head.
      intermediate_size: width of the MLP.
      num_hidden_layers: blocks of the encoder.
      num_decoder_layers: blocks of the decoder.
      num_attention_heads: number of heads.
      max_position_embeddings: tokens of the texts that it was trained on; it has no limit.
      buckets: rows of a table of distances, see `lora_jax.models.t5.bucket_of`.
      distances: the distance from which on all are alike.
      layer_norm_epsilon: added to the mean square before the root.
      activation: a key of `lora_jax.models.layers.ACTIVATIONS`.
      gated: the MLP has a gate.
      tie_word_embeddings: the output head is the embedding table.
      scaled: the head takes the hidden states times `hidden_size**-0.5`.
      decoder_start_token_id: what the decoder reads before the first token that it writes.
      pad_token_id: or None.
      eos_token_ids: the tokens that end a text.
      dropout_rate, classifier_dropout: read and written only.
      initializer_range: standard deviation of fresh weights.
    """

    model_type: str = "t5"
    vocab_size: int
    hidden_size: int
    head_dim: int
    intermediate_size: int
    num_hidden_layers: int
    num_decoder_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    buckets: int = 32
    distances: int = 128
    layer_norm_epsilon: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    tie_word_embeddings: bool = True
    scaled: bool = True
    decoder_start_token_id: int = 0
    pad_token_id: int | None = 0
    eos_token_ids: tuple[int, ...] = (1,)
    dropout_rate: float = 0.1
    classifier_dropout: float = 0.0
    initializer_range: float = 0.02

    fresh_scale: ClassVar[float] = 1.0
    labels: ClassVar[tuple[str, ...]] = ()
    longrope_limit: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_fields(self, {ours: theirs for theirs, ours in _NAMES.items()})
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"config: the activation `{self.activation}` of `feed_forward_proj` is not one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        # The encoder has half of the buckets on either side, half of these by their logarithm.
        if self.buckets % 4 or self.distances <= self.buckets // 2:
            raise ValueError(
                "config: `relative_attention_num_buckets` must be a multiple of 4 and less than "
                f"twice `relative_attention_max_distance`, got {self.buckets} and {self.distances}"
            )

    @property
    def kind(self) -> Kind:
        """How the model type differs from T5."""
        return KINDS[self.model_type]

    @property
    def context(self) -> int:
        """Tokens of the texts that it was trained on."""
        return self.max_position_embeddings

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> "T5Config":
        """Reads the object in config.json.

        Raises:
          ValueError: a missing size, or a field whose value changes results and is not supported.
        """
        check_object(raw)
        kind = KINDS[raw["model_type"]]
        refuse_unsupported(raw, (*_NAMES, *_WITHOUT_EFFECT, *_READ), _NEUTRAL)
        check_raw(raw)
        given = {name: value for name, value in raw.items() if value is not None}
        if missing := [name for name in _REQUIRED if name not in given]:
            raise ValueError(f"config: config.json lacks {', '.join(f'`{m}`' for m in missing)}")
        given.setdefault("num_decoder_layers", given["num_layers"])
        fields = {ours: given[theirs] for theirs, ours in _NAMES.items() if theirs in given}
        *gate, act = str(given.get("feed_forward_proj", kind.activation)).split("-")
        if gate not in ([], ["gated"]):
            raise ValueError(
                f"config: `feed_forward_proj` must be an activation, or `gated-` and one, got "
                f"{given['feed_forward_proj']!r}"
            )
        # As in transformers: of the first release's config files.
        act = "gelu_new" if gate and act == "gelu" else act
        check_fixed(raw, {"dense_act_fn": act, "is_gated_act": bool(gate)})
        tied = given.get("tie_word_embeddings", True)
        # Before transformers 5 the head was scaled where it was tied.
        scaled = kind.scaled and given.get("scale_decoder_outputs", tied)
        ends = tuple_of(raw.get("eos_token_id", 1))
        return T5Config(
            model_type=raw["model_type"], **fields, activation=act, gated=bool(gate),
            tie_word_embeddings=tied, scaled=scaled, eos_token_ids=ends,
        )  # fmt: skip

    def to_hf(self) -> dict[str, Any]:
        """The object for config.json; `from_hf` reads it back unchanged."""
        act = "gelu" if self.gated and self.activation == "gelu_new" else self.activation
        return {
            "model_type": self.model_type,
            "architectures": [self.kind.architecture],
            "is_encoder_decoder": True,
            **{theirs: getattr(self, ours) for theirs, ours in _NAMES.items()},
            "feed_forward_proj": f"gated-{act}" if self.gated else act,
            "tie_word_embeddings": self.tie_word_embeddings,
            "scale_decoder_outputs": self.scaled,
            "eos_token_id": scalar_if_one(self.eos_token_ids),
        }
