"""What a vision transformer reads of an image, as its preprocessor_config.json says.

    x = (f p - mean) / std        p a resized image's pixels, 0 to 255; f is 1/255

As transformers' `ViTImageProcessor` does with Pillow, which resizes whole numbers to whole numbers.
What is transparent is white.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num

from lora_jax.compat import require
from lora_jax.config.arguments import check_count, kind_of
from lora_jax.files import read_object

FILE = "preprocessor_config.json"
# Fields that change no pixels.
_NAMES = (
    "image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb",
    "return_tensors", "data_format", "input_data_format", "device", "_valid_processor_keys",
    "disable_grouping", "do_center_crop", "pad_size", "default_to_square", "image_seq_length",
)  # fmt: skip
_SWITCHES = ("do_", "default_to_square")
# What a class of transformers takes for fields that are missing, where it is not ViT's.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ViT": {},
    "DeiT": {"size": 256, "resample": 3, "crop_size": 224, "do_center_crop": True},
}
_WAY = (
    "process the images with transformers' AutoImageProcessor, give the arrays, and take the file "
    "out of the directory"
)
# Pillow's modes of more than 8 bits, which `convert` would cut off at 255.
_DEEP = ("I", "F")


class Pixels(NamedTuple):
    """The pixels of an image; those of a file are kept as whole numbers, a quarter of the memory.

    Attributes:
      values: (C, H, W), floats as the model reads them, or whole numbers.
      scale, shift: (C, 1, 1), of whole numbers.
    """

    values: Num[np.ndarray, "c h w"]
    scale: Float[np.ndarray, "c 1 1"] | None = None
    shift: Float[np.ndarray, "c 1 1"] | None = None

    def floats(self) -> Float[np.ndarray, "c h w"]:
        """What the model reads."""
        found = self.values.astype(np.float32)
        if self.scale is None or self.shift is None:
            return found
        return found * self.scale + self.shift


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """How images are resized and normalized; fields have Hugging Face's names.

    Attributes:
      size: height and width, in pixels.
      crop_size: height and width of the middle that is kept; None keeps all.
      resample: number of Pillow's filter; 2 is bilinear, 3 bicubic.
      rescale_factor: of whole numbers.
      image_mean, image_std: of each channel.
      do_resize, do_rescale, do_normalize: whether it does so.
    """

    size: tuple[int, int] = (224, 224)
    crop_size: tuple[int, int] | None = None
    resample: int = 2
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True

    def __post_init__(self) -> None:
        for name, lengths in (("size", self.size), ("crop_size", self.crop_size or ())):
            for length in lengths:
                check_count(name, length)
        if type(self.resample) is not int or self.resample not in range(6):
            raise ValueError(f"`resample` must be a number from 0 to 5, got {self.resample!r}")
        many = len(self.image_mean), len(self.image_std)
        if many not in ((1, 1), (3, 3)) or not all(self.image_std):
            raise ValueError(
                "`image_mean` and `image_std` must be a number a channel, 1 or 3, and no deviation "
                f"0, got {self.image_mean} and {self.image_std}"
            )

    @staticmethod
    def from_hf(raw: Mapping[str, Any], *, channels: int = 3) -> "ImageProcessor":
        """Reads the object in preprocessor_config.json.

        Args:
          raw: the object.
          channels: of the images, all of which a mean that is one number is for.

        Raises:
          ValueError: a field whose value changes pixels and is not supported.
        """
        kind = str(raw.get("image_processor_type") or raw.get("feature_extractor_type") or "ViT")
        kind = re.sub("(ImageProcessor|FeatureExtractor)?(Fast|Pil)?$", "", kind, count=1)
        if kind not in _DEFAULTS:
            raise ValueError(
                f"`image_processor_type` is of {kind}, which reads images otherwise than ViT's and "
                f"DeiT's: {_WAY}"
            )
        # To transformers a switch that is null is off.
        off = {name: False for name, x in raw.items() if x is None and name.startswith(_SWITCHES)}
        raw = {name: x for name, x in raw.items() if x is not None} | off
        if isinstance(raw.get("size"), int) and not raw.get("default_to_square", True):
            raw["size"] = {"shortest_edge": raw["size"]}
        raw = {**_DEFAULTS[kind], **raw}
        known = {name: raw[name] for name in _FIELDS if name in raw}
        more = [name for name in raw if name not in (*_FIELDS, *_NAMES) and raw[name] is not False]
        if more:
            raise ValueError(f"field `{more[0]}` = {raw[more[0]]!r} is not supported: {_WAY}")
        if not raw.get("do_center_crop"):
            known.pop("crop_size", None)
        elif "crop_size" not in known:
            raise ValueError("`do_center_crop` is true, and `crop_size` is missing")
        for name in ("size", "crop_size"):
            if name in known:
                known[name] = _size(name, known[name])
        for name in ("image_mean", "image_std"):
            if name in known:
                known[name] = _of_channels(name, known[name], channels)
        return ImageProcessor(**known)

    def to_hf(self) -> dict[str, Any]:
        """The object for preprocessor_config.json; `from_hf` reads it back."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        for name in ("size", "crop_size"):
            if fields[name] is not None:
                fields[name] = dict(zip(("height", "width"), fields[name], strict=True))
        named = {"image_processor_type": "ViTImageProcessor"}
        return {**named, **fields, "do_center_crop": self.crop_size is not None}

    def __call__(self, image: Any) -> Pixels:
        """The pixels that a model reads of an image.

        Args:
          image: path of a file, Pillow's image, or whole numbers (H, W, C) or (H, W), 0 to 255.

        Raises:
          FileNotFoundError: no such file.
          ValueError: a file that is no image, or one of more than 8 bits a channel.
        """
        values = self._resized(image)
        count = len(values)
        mean, std = np.zeros(count), np.ones(count)
        if self.do_normalize:
            mean, std = np.asarray(self.image_mean), np.asarray(self.image_std)
        factor = self.rescale_factor if self.do_rescale else 1.0
        scale, shift = (x.astype(np.float32)[:, None, None] for x in (factor / std, -mean / std))
        return Pixels(values, scale, shift)

    def _resized(self, image: Any) -> Num[np.ndarray, "c h w"]:
        pillow, ops = require("PIL.Image"), require("PIL.ImageOps")
        path = image if isinstance(image, str | Path) else None
        if isinstance(image, np.ndarray):
            image = pillow.fromarray(image)
        elif path is None and not isinstance(image, pillow.Image):
            raise ValueError(f"an image must be a path, Pillow's or an array, got {kind_of(image)}")
        try:
            opened: Any = image if path is None else pillow.open(path)
            if opened.mode.startswith(_DEEP):
                raise ValueError(f"{opened.mode} pixels have more than 8 bits: convert them first")
            # Cameras write how an image was held beside its pixels.
            plain = ops.exif_transpose(opened)
            if plain.has_transparency_data:
                white = pillow.new("RGBA", plain.size, "white")
                plain = pillow.alpha_composite(white, plain.convert("RGBA"))
            plain = plain.convert("L" if len(self.image_mean) == 1 else "RGB")
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such image") from None
        except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
            raise ValueError(f"{path or 'image'}: not an image that can be read: {error}") from None
        if self.do_resize:
            plain = plain.resize(self.size[::-1], resample=self.resample)
        plain = plain if self.crop_size is None else _middle(plain, *self.crop_size)
        found = np.asarray(plain)
        return found[None] if found.ndim == 2 else np.ascontiguousarray(np.moveaxis(found, -1, 0))


_FIELDS = tuple(ImageProcessor.__dataclass_fields__)


def _middle(image: Any, height: int, width: int) -> Any:
    """The middle of an image; zeros around one that is smaller."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _of_channels(name: str, given: Any, channels: int) -> tuple[float, ...]:
    """A number for each channel, of one number or a list."""
    listed = given if isinstance(given, list | tuple) else [given] * channels
    if not all(type(x) in (int, float) and math.isfinite(x) for x in listed):
        raise ValueError(f"`{name}` must be a number, or a list of one a channel, got {given!r}")
    return tuple(map(float, listed))


def _size(name: str, given: Any) -> tuple[int, int]:
    """Height and width, of a number, a list or an object with both."""
    if isinstance(given, int):
        return given, given
    if isinstance(given, Mapping) and set(given) == {"height", "width"}:
        return given["height"], given["width"]
    if isinstance(given, list | tuple) and len(given) == 2:
        return given[0], given[1]
    raise ValueError(f"`{name}` must be a number, or height and width, got {given!r}: {_WAY}")


def read_processor(directory: Path, *, channels: int) -> ImageProcessor | None:
    """The processor of a Hugging Face directory, or None where it has none.

    Args:
      directory: the directory.
      channels: of the images that the model reads.

    Raises:
      ValueError: a broken file, or one that is not supported.
    """
    raw = read_object(directory / FILE, optional=True)
    if not raw:
        return None
    try:
        found = ImageProcessor.from_hf(raw, channels=channels)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory / FILE}: {error}") from None
    if (count := len(found.image_mean)) != channels:
        raise ValueError(
            f"{directory / FILE}: `image_mean` is of {count} channels, and the model's "
            f"`num_channels` is {channels}"
        )
    return found
