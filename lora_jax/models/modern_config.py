"""What ModernBERT's config.json has beside BERT's fields."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

from lora_jax.models.dialect import FULL, SLIDING, read_layer_types
from lora_jax.models.heads import CLASSIFICATION, MASKED_LM, Head, Task
from lora_jax.models.ranges import COUNT, RANGES, check_range

_BIASES = ("attention_bias", "classifier_bias", "decoder_bias", "mlp_bias", "norm_bias")
# Fields without effect here, and those that others repeat.
_CARRIED = (
    "cls_token_id", "deterministic_flash_attn", "embedding_dropout", "initializer_cutoff_factor",
    "reference_compile", "repad_logits_with_grad", "sparse_pred_ignore_index", "sparse_prediction",
)  # fmt: skip
KNOWN = (
    *_BIASES, *_CARRIED, "classifier_activation", "classifier_pooling",
    "global_attn_every_n_layers", "global_rope_theta", "layer_types", "local_attention",
    "local_rope_theta", "rope_parameters",
)  # fmt: skip


class Modern(NamedTuple):
    """How ModernBERT's blocks and heads differ from BERT's.

    Attributes:
      slides: for each block whether its tokens attend to those nearby alone.
      window: how far: half of it on either side.
      thetas: base wavelengths of the rotary embedding, in blocks that slide and in others.
      pooling: what a classifier of texts reads: the first token, or the mean of all.
      activation: of the heads.
      attention_bias, classifier_bias, decoder_bias, mlp_bias, norm_bias: which layers have biases.
    """

    slides: tuple[bool, ...]
    window: int = 128
    thetas: tuple[float, float] = (1e4, 1.6e5)
    pooling: Literal["cls", "mean"] = "cls"
    activation: str = "gelu"
    attention_bias: bool = False
    classifier_bias: bool = False
    decoder_bias: bool = True
    mlp_bias: bool = False
    norm_bias: bool = False


def read_modern(raw: Mapping[str, Any]) -> Modern:
    """Reads the object in config.json.

    Raises:
      ValueError: a rotary embedding of another kind, or a pooling that does not exist.
    """
    blocks = raw.get("num_hidden_layers", 22)
    period = raw.get("global_attn_every_n_layers") or 3
    check_range("global_attn_every_n_layers", period, COUNT)
    slides = read_layer_types(raw, tuple(bool(block % period) for block in range(blocks)))
    pooling = raw.get("classifier_pooling") or "cls"
    if pooling not in ("cls", "mean"):
        raise ValueError(f"config: `classifier_pooling` must be cls or mean, got {pooling!r}")
    ropes = raw.get("rope_parameters") or {}
    thetas = []
    for kind, old, default in ((SLIDING, "local", 1e4), (FULL, "global", 1.6e5)):
        rope = ropes.get(kind) or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"config: `rope_parameters` of type `{rope['rope_type']}` are not supported for "
                "`modernbert`"
            )
        theta = rope.get("rope_theta") or raw.get(f"{old}_rope_theta") or default
        check_range(f"{old}_rope_theta", theta, RANGES["rope_theta"])
        thetas.append(float(theta))
    window = raw.get("local_attention") or 128
    check_range("local_attention", window, RANGES["sliding_window"])
    given = {name: bool(raw[name]) for name in _BIASES if raw.get(name) is not None}
    return Modern(
        slides,
        window=window,
        thetas=cast(Any, tuple(thetas)),
        pooling=pooling,
        activation=raw.get("classifier_activation") or "gelu",
        **given,
    )


def write_modern(modern: Modern) -> dict[str, Any]:
    """The reverse of `read_modern`."""
    local, whole = modern.thetas
    return {
        **{name: getattr(modern, name) for name in _BIASES},
        "classifier_activation": modern.activation,
        "classifier_pooling": modern.pooling,
        "layer_types": [SLIDING if slides else FULL for slides in modern.slides],
        "local_attention": modern.window,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": local},
            FULL: {"rope_type": "default", "rope_theta": whole},
        },
    }


def head_of(own: Modern, task: Task, head: Head) -> Head:
    """A task's head: what a classifier of texts reads, its activation and biases."""
    means = task == CLASSIFICATION and own.pooling == "mean"
    return head._replace(
        reads="mean" if means else head.reads,
        act=own.activation,
        biased=(own.classifier_bias, own.decoder_bias or task != MASKED_LM),
    )
