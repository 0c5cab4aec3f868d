"""The families of encoders as data: what each has beside BERT, or otherwise."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from lora_jax.models import deberta_config, modern_config
from lora_jax.models.heads import FEATURES, HEADS, MASKED_LM, NAMED, Head, Task


class Own(NamedTuple):
    """How fields of config.json that BERT has not are read and written, and what heads they make.

    Attributes:
      known: the fields.
      read, write: from them and back.
      head: a task's head, from its row of `HEADS`.
    """

    known: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Any]
    write: Callable[[Any], dict[str, Any]]
    head: Callable[[Any, Task, Head], Head]


class Kind(NamedTuple):
    """How one model type differs from BERT.

    Attributes:
      prefix: the module that holds the encoder in a model with a head.
      classes: Hugging Face's class for each task.
      defaults: the values that transformers uses for fields missing in config.json.
      heads: the layers of its heads. Only BERT's classifier reads a pooler; the others have layers
        of their own on the first hidden state.
      family: whose blocks it has.
      pooled: the bare encoder has a pooler, unless its file lacks one.
      offset_positions: count positions over the tokens that are not padding, from
        `pad_token_id + 1` (as fairseq does), not from 0 over all tokens.
      blocks: the module that holds the blocks.
      typed: tokens have types, with vectors of their own.
      fields: our names of fields and those in config.json, where these differ.
      fixed: fields of config.json with the one value that the forward has.
      own: how fields of its own are read and written, those of `BertConfig.own`.
    """

    prefix: str
    classes: Mapping[Task, str]
    defaults: Mapping[str, Any]
    heads: Mapping[Task, Head]
    family: Literal["bert", "distilbert", "modernbert", "deberta"] = "bert"
    pooled: bool = False
    offset_positions: bool = False
    blocks: str = "encoder"
    typed: bool = True
    fields: Mapping[str, str] = {}
    fixed: Mapping[str, Any] = {}
    own: Own | None = None

    def pools(self, task: Task) -> bool:
        """Whether a task's model has a pooler."""
        if task == FEATURES:
            return self.pooled
        return (self.heads[task].dense or "").startswith(f"{self.prefix}.")


def _classes(name: str) -> dict[Task, str]:
    return {task: f"{name}{named.ending}" for task, named in NAMED.items()}


_DISTILBERT_FIELDS = {
    "hidden_size": "dim", "intermediate_size": "hidden_dim", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "hidden_act": "activation", "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "seq_classif_dropout",
}  # fmt: skip


_BERT_DEFAULTS = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
_ROBERTA_DEFAULTS = {
    **_BERT_DEFAULTS, "vocab_size": 50265, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def _roberta(name: str, vocab_size: int) -> Kind:
    return Kind(
        prefix="roberta",
        classes=_classes(name),
        defaults={**_ROBERTA_DEFAULTS, "vocab_size": vocab_size},
        heads=HEADS["roberta"],
        pooled=True,
        offset_positions=True,
    )


KINDS: Mapping[str, Kind] = {
    "bert": Kind(
        prefix="bert", classes=_classes("Bert"), defaults=_BERT_DEFAULTS, heads=HEADS["bert"],
        pooled=True,
    ),
    "roberta": _roberta("Roberta", 50265),
    "xlm-roberta": _roberta("XLMRoberta", 30522),
    "camembert": _roberta("Camembert", 30522),
    "electra": Kind(
        prefix="electra",
        # Its masked-LM head belongs to another model, the generator.
        classes={task: name for task, name in _classes("Electra").items() if task != MASKED_LM},
        defaults={
            **_BERT_DEFAULTS, "embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4,
            "intermediate_size": 1024,
        },
        heads=HEADS["electra"],
    ),
    "distilbert": Kind(
        prefix="distilbert",
        classes=_classes("DistilBert"),
        defaults={
            **_BERT_DEFAULTS, "num_hidden_layers": 6, "classifier_dropout": 0.2,
        },
        heads=HEADS["distilbert"],
        family="distilbert",
        blocks="transformer",
        typed=False,
        fields=_DISTILBERT_FIELDS,
        fixed={"layer_norm_eps": 1e-12, "type_vocab_size": 2},
    ),
    "modernbert": Kind(
        prefix="model",
        classes=_classes("ModernBert"),
        defaults={
            "vocab_size": 50368, "hidden_size": 768, "num_hidden_layers": 22,
            "num_attention_heads": 12, "intermediate_size": 1152, "max_position_embeddings": 8192,
            "pad_token_id": 50283, "bos_token_id": 50281, "eos_token_id": 50282,
            "layer_norm_eps": 1e-5, "hidden_dropout_prob": 0.0, "classifier_dropout": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        heads=HEADS["modernbert"],
        family="modernbert",
        blocks="layers",
        typed=False,
        fields={
            "hidden_act": "hidden_activation", "layer_norm_eps": "norm_eps",
            "hidden_dropout_prob": "mlp_dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        fixed={"type_vocab_size": 2},
        own=Own(
            modern_config.KNOWN, modern_config.read_modern, modern_config.write_modern,
            modern_config.head_of,
        ),
    ),
    # Versions 2 and 3, which differ in how they were trained.
    "deberta-v2": Kind(
        prefix="deberta",
        classes=_classes("DebertaV2"),
        defaults={
            **_BERT_DEFAULTS, "vocab_size": 128100, "hidden_size": 1536, "num_hidden_layers": 24,
            "num_attention_heads": 24, "intermediate_size": 6144, "type_vocab_size": 0,
            "layer_norm_eps": 1e-7,
        },
        heads=HEADS["deberta"],
        family="deberta",
        own=Own(
            deberta_config.KNOWN, deberta_config.read_deberta, deberta_config.write_deberta,
            deberta_config.head_of,
        ),
    ),
}  # fmt: skip
