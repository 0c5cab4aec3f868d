"""The heads of tasks as data: the layers of each, what they read and how many logits they have.

z = norm(act(W_1 h + b_1))        where there is such a layer; h the hidden states that it reads
logits = W_2 z + b_2              or the scores of the words, of whose embedding W_2 is the table
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple, get_args

FEATURES: Final = "features"
CLASSIFICATION: Final = "sequence-classification"
MASKED_LM: Final = "masked-lm"
TOKENS: Final = "token-classification"
ANSWERS: Final = "question-answering"
LANGUAGE: Final = "causal-lm"  # of decoders
Task = Literal[
    "features", "sequence-classification", "masked-lm", "token-classification",
    "question-answering",
]  # fmt: skip
TASKS: tuple[Task, ...] = get_args(Task)

# Hugging Face's names of the losses of a classifier of texts.
Problem = Literal["regression", "single_label_classification", "multi_label_classification"]


class Named(NamedTuple):
    """What Hugging Face calls a task.

    Attributes:
      ending: of its classes' names.
      peft: PEFT's type of the task, or None.
      drawn: what messages call a head that can be drawn; None for one that cannot.
    """

    ending: str
    peft: str | None = None
    drawn: str | None = None


NAMED: Mapping[Task, Named] = {
    FEATURES: Named("Model"),
    CLASSIFICATION: Named("ForSequenceClassification", "SEQ_CLS", "classification"),
    MASKED_LM: Named("ForMaskedLM"),
    TOKENS: Named("ForTokenClassification", "TOKEN_CLS", "classification"),
    ANSWERS: Named("ForQuestionAnswering", "QUESTION_ANS", "answering"),
}


class Head(NamedTuple):
    """The layers of a head, by the paths that Hugging Face gives them.

    Attributes:
      last: the layer that gives the logits; None scores the words.
      reads: the hidden states of each token, of the first one, or the mean of all.
      dense: a layer before it, as wide as the model.
      act: activation behind `dense`; None is the model's `hidden_act`.
      norm: the norm behind that.
      bias: what is added to the scores of the words.
      biased: of `dense` and of the logits, whether they have a bias.
    """

    last: str | None
    reads: Literal["each", "first", "mean"] = "each"
    dense: str | None = None
    act: str | None = None
    norm: str | None = None
    bias: str | None = None
    biased: tuple[bool, bool] = (True, True)

    @property
    def paths(self) -> tuple[str, ...]:
        """Of its layers."""
        found = (self.last, self.dense, self.norm, self.bias)
        return tuple(path for path in found if path is not None)


def of_words(start: str, norm: str = "LayerNorm", *, act: str | None = None) -> Head:
    """A masked-LM head whose layers are in one module."""
    return Head(None, dense=f"{start}.dense", norm=f"{start}.{norm}", act=act, bias=f"{start}.bias")


# A row is BERT's but for what it names.
_BERT: Mapping[Task, Head] = {
    CLASSIFICATION: Head("classifier", "first", "bert.pooler.dense", "tanh"),
    MASKED_LM: Head(
        None, dense="cls.predictions.transform.dense", norm="cls.predictions.transform.LayerNorm",
        bias="cls.predictions.bias",
    ),
    TOKENS: Head("classifier"),
    ANSWERS: Head("qa_outputs"),
}  # fmt: skip
_MODERN = Head("classifier", dense="head.dense", norm="head.norm")
HEADS: Mapping[str, Mapping[Task, Head]] = {
    "bert": _BERT,
    "roberta": {
        **_BERT,
        CLASSIFICATION: Head("classifier.out_proj", "first", "classifier.dense", "tanh"),
        # transformers' RobertaLMHead has a gelu, whatever `hidden_act` is.
        MASKED_LM: of_words("lm_head", "layer_norm", act="gelu"),
    },
    "electra": {
        **_BERT, CLASSIFICATION: Head("classifier.out_proj", "first", "classifier.dense", "gelu"),
    },
    "distilbert": {
        **_BERT,
        CLASSIFICATION: Head("classifier", "first", "pre_classifier", "relu"),
        MASKED_LM: Head(
            None, dense="vocab_transform", norm="vocab_layer_norm", bias="vocab_projector.bias"
        ),
    },
    "deberta": {**_BERT, CLASSIFICATION: Head("classifier", "first", "pooler.dense")},
    "modernbert": {
        CLASSIFICATION: _MODERN._replace(reads="first"),
        MASKED_LM: _MODERN._replace(last=None, bias="decoder.bias"),
        TOKENS: _MODERN,
        ANSWERS: _MODERN,
    },
}  # fmt: skip


# Of decoders, beside a language model's.
DECODER_HEADS: Mapping[str, Head] = {
    CLASSIFICATION: Head("score", biased=(False, False)),
    TOKENS: Head("score"),
    ANSWERS: Head("qa_outputs"),
}


def nested(layers: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Values by dotted paths as nested dictionaries."""
    found: dict[str, Any] = {}
    for path, layer in layers:
        *outer, name = path.split(".")
        inside = found
        for each in outer:
            inside = inside.setdefault(each, {})
        inside[name] = layer
    return found
