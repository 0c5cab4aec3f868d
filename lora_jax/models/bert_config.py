"""The configuration of BERT-like encoders, from and to Hugging Face's config.json.

As for the decoders, a field that could change results is never ignored. Dropout rates are read and
written but not applied: adapters have their own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_jax.models.bert_kinds import KINDS, Kind
from lora_jax.models.classifier import labels_of, write_labels
from lora_jax.models.dialect import (
    check_fixed,
    refuse_unsupported,
    scalar_if_one,
    tuple_of,
)
from lora_jax.models.heads import (
    ANSWERS,
    CLASSIFICATION,
    FEATURES,
    MASKED_LM,
    TASKS,
    TOKENS,
    Head,
    Problem,
    Task,
)
from lora_jax.models.layers import ACTIVATIONS
from lora_jax.models.ranges import check_fields, check_object, check_raw


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """An encoder of the BERT family; fields have Hugging Face's names if there are any.

    Attributes:
      model_type: the family, a key of `KINDS`.
      vocab_size: rows of the embedding table.
      hidden_size: width of the residual stream.
      embedding_size: width of the tables, where it is another one; None is `hidden_size`.
      intermediate_size: width of the MLP.
      num_hidden_layers: number of blocks.
      num_attention_heads: number of heads; each has `hidden_size / num_attention_heads` dimensions.
      max_position_embeddings: rows of the position table.
      type_vocab_size: rows of the token type table.
      hidden_act: one of `lora_jax.models.layers.ACTIVATIONS`.
      layer_norm_eps: added to the variance before the root.
      initializer_range: standard deviation of fresh weights.
      pad_token_id: the padding token; RoBERTa's positions skip it.
      bos_token_id: or None.
      eos_token_ids: or empty.
      task: what the model returns: "features" (hidden states and pooled state), or the logits of
        "sequence-classification", "masked-lm", "token-classification" or "question-answering".
      pooler: whether there is a pooler (`tanh` of a dense layer on the first hidden state).
      labels: the classes' names, in the order of the logits.
      problem_type: the loss that transformers would use, or None; read and written only.
      hidden_dropout_prob, attention_probs_dropout_prob, classifier_dropout: read and
        written only.
      own: what ModernBERT or DeBERTa have beside these, or None.
    """

    model_type: str = "bert"
    vocab_size: int
    hidden_size: int
    embedding_size: int | None = None
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    task: Task = FEATURES
    pooler: bool = True
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: Problem | None = None
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    own: Any = None

    def __post_init__(self) -> None:
        check_fields(self, KINDS[self.model_type].fields if self.model_type in KINDS else None)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config: `hidden_size` ({self.hidden_size}) is not a multiple of "
                f"`num_attention_heads` ({self.num_attention_heads})"
            )
        _one_of("model_type", self.model_type, KINDS)
        _one_of("task", self.task, TASKS)
        _one_of("hidden_act", self.hidden_act, ACTIVATIONS)
        if self.kind.typed and self.type_vocab_size < 1 and self.kind.family != "deberta":
            raise ValueError(
                f"config: `type_vocab_size` of `{self.model_type}` must be at least 1, got "
                f"{self.type_vocab_size}"
            )
        if self.task == ANSWERS and len(self.labels) != 2:
            raise ValueError(
                f"config: task `{ANSWERS}` has two logits a token, start and end, got "
                f"{len(self.labels)} `labels`"
            )
        if self.task in (CLASSIFICATION, TOKENS) and not self.labels:
            raise ValueError("config: `labels` is empty: name at least one class")
        if self.pooler != self.needs_pooler and self.task != FEATURES:
            raise ValueError(
                f"config: task `{self.task}` of `{self.model_type}` needs `pooler` "
                f"{self.needs_pooler}, got {self.pooler}"
            )
        if self.task not in self.kind.classes:
            raise ValueError(f"config: task `{self.task}` of `{self.model_type}` is not supported")
        if self.kind.offset_positions and self.pad_token_id is None:
            raise ValueError(f"config: `{self.model_type}` counts positions from `pad_token_id`")
        if self.context < 1:
            raise ValueError(
                f"config: `pad_token_id` ({self.pad_token_id}) leaves no position of "
                f"`max_position_embeddings` ({self.max_position_embeddings})"
            )

    @property
    def kind(self) -> Kind:
        """How the family differs from BERT."""
        return KINDS[self.model_type]

    @property
    def slides(self) -> tuple[bool, ...]:
        """For each block whether its tokens attend to those nearby alone."""
        modern = self.kind.family == "modernbert"
        return self.own.slides if modern else (False,) * self.num_hidden_layers

    @property
    def typed(self) -> bool:
        """Whether tokens have types, with vectors of their own."""
        return self.kind.typed and self.type_vocab_size > 0

    @property
    def placed(self) -> bool:
        """Whether there is a table of positions."""
        return self.kind.family != "deberta" or self.own.placed

    @property
    def embedded_size(self) -> int:
        """Width of the tables."""
        return self.embedding_size or self.hidden_size

    @property
    def fresh_scale(self) -> float:
        """Initial value of a norm's `scale`."""
        return 1.0

    @property
    def norm_bias(self) -> bool:
        """Whether norms have a bias."""
        return self.kind.family != "modernbert" or self.own.norm_bias

    @property
    def head(self) -> Head:
        """The layers of the task's head."""
        row = self.kind.heads[self.task]
        return row if self.kind.own is None else self.kind.own.head(self.own, self.task, row)

    @property
    def needs_pooler(self) -> bool:
        """Whether the task's head reads the pooler's result."""
        return self.task != FEATURES and self.kind.pools(self.task)

    @property
    def head_modules(self) -> tuple[str, ...]:
        """Prefixes of the tensors of the task's head."""
        if self.task == FEATURES:
            return ()
        outer = (path.partition(".")[0] for path in self.head.paths)
        return tuple(dict.fromkeys(f"{name}." for name in outer if name != self.kind.prefix))

    @property
    def context(self) -> int:
        """Maximum number of tokens in a text."""
        # Rows 0 to pad_token_id of the position table are not used for real tokens.
        used = (self.pad_token_id or 0) + 1 if self.kind.offset_positions else 0
        return self.max_position_embeddings - used

    @staticmethod
    def from_hf(raw: Mapping[str, Any], *, task: Task | None = None) -> "BertConfig":
        """Reads the object in config.json.

        Args:
          raw: the object.
          task: one of `TASKS`; by default the one that `architectures` names.

        Raises:
          ValueError: an unknown family or class, or a field whose value changes results and is not
            supported.
        """
        check_object(raw)
        _one_of("model_type", str(raw.get("model_type")), KINDS)
        kind = KINDS[raw["model_type"]]
        check_raw(raw)
        ours = {theirs: ours for ours, theirs in kind.fields.items()}
        # Under their own names: ModernBERT's files have BERT's `layer_norm_eps` too, unused.
        stated = {name: x for name, x in raw.items() if kind.fields.get(name) not in raw}
        raw = {ours.get(name, name): value for name, value in stated.items()}
        own = kind.own.known if kind.own else ()
        refuse_unsupported(raw, (*_PLAIN, *_CARRIED, *own), _NEUTRAL)
        check_fixed(raw, kind.fixed)
        if "embedding_size" not in kind.defaults:
            check_fixed(raw, {"embedding_size": None})
        set_to_null = {k: None for k in _MAYBE_NULL if k in raw}
        given = {**kind.defaults, **set_to_null, **{k: v for k, v in raw.items() if v is not None}}
        if task == ANSWERS:  # the names are those of another task's classes
            given |= {"id2label": None, "num_labels": 2}
        task = task or _task(raw, kind)
        if task == MASKED_LM and raw.get("tie_word_embeddings") is False:
            raise ValueError(
                "config: `tie_word_embeddings` must be true, got false: the head of words is the "
                'embedding table; load the model without it, as task="features"'
            )
        plain = {name: given[name] for name in _PLAIN if name in given}
        return BertConfig(
            **plain,
            eos_token_ids=tuple_of(given.get("eos_token_id")),
            task=task,
            pooler=kind.pools(task),
            labels=labels_of(given),
            own=kind.own.read(given) if kind.own else None,
        )

    def to_hf(self) -> dict[str, Any]:
        """The object for config.json; `from_hf` reads it back."""
        kind = self.kind
        # What a family fixes is no field of its config.json.
        plain = {name: getattr(self, name) for name in _PLAIN if name not in kind.fixed}
        if self.embedding_size is None:
            del plain["embedding_size"]
        out = {kind.fields.get(name, name): value for name, value in plain.items()}
        out["eos_token_id"] = scalar_if_one(self.eos_token_ids)
        out["architectures"] = [self.kind.classes[self.task]]
        more = {} if kind.own is None else kind.own.write(self.own)
        return {**out, **write_labels(self.labels), **more}


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip
_PLAIN = (
    "model_type", *_SIZES, "embedding_size", "hidden_act", "layer_norm_eps", "initializer_range",
    "pad_token_id", "bos_token_id", "problem_type", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "classifier_dropout",
)  # fmt: skip

# Fields where null means "none", not "the default".
_MAYBE_NULL = ("bos_token_id", "pad_token_id", "eos_token_id")

# Fields that can change results, with the values that do not.
_NEUTRAL: Mapping[str, tuple] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "position_embedding_type": ("absolute", None),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
}
# Fields without effect that old and multilingual checkpoints have.
_CARRIED = frozenset(
    {
        "directionality", "eos_token_id", "gradient_checkpointing", "num_labels", "output_past",
        "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
        "pooler_size_per_head", "pooler_type", "qa_dropout", "sinusoidal_pos_embds",
        "summary_activation", "summary_last_dropout", "summary_type", "summary_use_proj",
        "tie_weights_", "tie_word_embeddings",
    }
)  # fmt: skip


def _one_of(field: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"config: {field} `{value}` is not one of {', '.join(known)}")


def _task(raw: Mapping[str, Any], kind: Kind) -> Task:
    """The task of the class that `architectures` names."""
    named = (raw.get("architectures") or [kind.classes[FEATURES]])[0]
    for task, name in kind.classes.items():
        if name == named:
            return task
    raise ValueError(
        f"config: `architectures` names `{named}`, which is not one of "
        f"{', '.join(kind.classes.values())}; set `task` to one of "
        f"{', '.join(f'`{t}`' for t in TASKS)}"
    )
