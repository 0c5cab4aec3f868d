"""The configuration of vision transformers, from and to Hugging Face's config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from lora_jax.models.bert_config import Problem
from lora_jax.models.bert_kinds import FEATURES
from lora_jax.models.classifier import labels_of, write_labels
from lora_jax.models.dialect import refuse_unsupported
from lora_jax.models.layers import ACTIVATIONS
from lora_jax.models.ranges import COUNT, check_fields, check_object, check_range, check_raw

IMAGES: Final = "image-classification"
ImageTask = Literal["features", "image-classification"]
_CLASSES: Mapping[ImageTask, str] = {FEATURES: "ViTModel", IMAGES: "ViTForImageClassification"}
_PLAIN = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "image_size", "patch_size", "num_channels", "hidden_act", "layer_norm_eps", "qkv_bias",
    "initializer_range", "problem_type", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "encoder_stride", "pooler_act", "pooler_output_size",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A vision transformer; fields have Hugging Face's names if there are any.

    Attributes:
      model_type: "vit".
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP.
      num_hidden_layers: number of blocks.
      num_attention_heads: number of heads; each has `hidden_size / num_attention_heads` dimensions.
      image_size: height and width of an image, in pixels.
      patch_size: height and width of a patch.
      num_channels: of an image.
      hidden_act: one of `lora_jax.models.layers.ACTIVATIONS`.
      layer_norm_eps: added to the variance before the root.
      qkv_bias: queries, keys and values have biases.
      initializer_range: standard deviation of fresh weights.
      task: "features" (hidden states and pooled state) or "image-classification" (logits).
      pooler: whether there is a pooler (a dense layer on the first hidden state).
      pooler_act, pooler_output_size: its activation and width; None is `hidden_size`.
      labels: the classes' names, in the order of the logits.
      problem_type: the loss that transformers would use, or None; read and written only.
      hidden_dropout_prob, attention_probs_dropout_prob, encoder_stride: read and written only.
    """

    model_type: str = "vit"
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = 3
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    initializer_range: float = 0.02
    task: ImageTask = IMAGES
    pooler: bool = False
    pooler_act: str = "tanh"
    pooler_output_size: int | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: Problem | None = None
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    encoder_stride: int = 16

    def __post_init__(self) -> None:
        check_fields(self)
        check_range("num_channels", self.num_channels, COUNT)
        for name, sizes in (("image_size", self.image_size), ("patch_size", self.patch_size)):
            for size in sizes:
                check_range(name, size, COUNT)
        for name, given, known in (
            ("model_type", self.model_type, ("vit",)),
            ("task", self.task, get_args(ImageTask)),
            ("hidden_act", self.hidden_act, ACTIVATIONS),
            ("pooler_act", self.pooler_act, ("tanh", *ACTIVATIONS)),
        ):
            if given not in known:
                raise ValueError(f"config: {name} `{given}` is not one of {', '.join(known)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config: `hidden_size` ({self.hidden_size}) is not a multiple of "
                f"`num_attention_heads` ({self.num_attention_heads})"
            )
        if min(self.grid) < 1:
            raise ValueError(
                f"config: no patch of `patch_size` {self.patch_size} fits `image_size` "
                f"{self.image_size}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; what is left of an image beyond them is not seen."""
        height, width = (i // p for i, p in zip(self.image_size, self.patch_size, strict=True))
        return height, width

    @property
    def max_position_embeddings(self) -> int:
        """Rows of the position table: the class token, and the patches."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def fresh_scale(self) -> float:
        """Initial value of a norm's `scale`."""
        return 1.0

    @property
    def norm_bias(self) -> bool:
        """Whether norms subtract the mean and have a bias."""
        return True

    @property
    def embedded_size(self) -> int:
        """Width of the tables."""
        return self.hidden_size

    @staticmethod
    def from_hf(raw: Mapping[str, Any], *, task: ImageTask | None = None) -> "ViTConfig":
        """Reads the object in config.json.

        Args:
          raw: the object.
          task: what `architectures` names by default.

        Raises:
          ValueError: an unknown class, or a field whose value changes results and is not supported.
        """
        check_object(raw)
        check_raw(raw)
        refuse_unsupported(raw, (*_PLAIN, "num_labels", "pooler"), {"is_encoder_decoder": (False,)})
        given = {name: raw[name] for name in _PLAIN if raw.get(name) is not None}
        for name in ("image_size", "patch_size"):
            if name in given:
                given[name] = _pair(name, given[name])
        named = (raw.get("architectures") or [_CLASSES[FEATURES]])[0]
        found: ImageTask | None = next((k for k, name in _CLASSES.items() if name == named), None)
        if task is None and found is None:
            raise ValueError(
                f"config: `architectures` names `{named}`, which is not one of "
                f"{', '.join(_CLASSES.values())}"
            )
        return ViTConfig(**given, task=task or found or IMAGES, labels=labels_of(raw))

    def to_hf(self) -> dict[str, Any]:
        """The object for config.json; `from_hf` reads it back."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        for name in ("image_size", "patch_size"):
            height, width = plain[name]
            plain[name] = height if height == width else [height, width]
        return {**plain, "architectures": [_CLASSES[self.task]], **write_labels(self.labels)}


def _pair(name: str, size: Any) -> tuple[Any, Any]:
    """Height and width, from one number or two."""
    if not isinstance(size, list | tuple):
        return size, size
    if len(size) != 2:
        raise ValueError(f"config: `{name}` must be a number or height and width, got {size}")
    return size[0], size[1]
