"""Images and their classes: rows of a file, or a folder with a folder of images for each class.

An image is an example whose tokens are the class token and the patches that the model makes of it.
The last of them has the target, as of a text.
"""

import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.compat import require
from lora_jax.config.arguments import SettingsError, kind_of, quoted
from lora_jax.hf.images import FILE, Pixels
from lora_jax.train.examples import Example, check_records
from lora_jax.train.goals import goal_of
from lora_jax.train.jsonl import Record
from lora_jax.train.labelled import target_of

# Names of folders that hold a part of the data, and not a class.
_PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}


def load_folder(path: str | os.PathLike) -> list[Record]:
    """The images of a folder whose own folders are the classes.

        path/cat/1.jpg, path/dog/a/2.png

    Returns:
      A record an image, by class and name; its label is its class.

    Raises:
      FileNotFoundError: no such folder, or none with images in folders of classes.
      ValueError: the folders are parts of the data, such as "train" and "test".

    Warns:
      UserWarning: files that are no images are left out.
    """
    path, pillow = Path(path), require("PIL.Image")
    pillow.init()
    known = {ending for ending, form in pillow.EXTENSION.items() if form in pillow.OPEN}
    classes = sorted(x.name for x in path.glob("*") if x.is_dir() and not x.name.startswith("."))
    files = [
        (name, file)
        for name in classes
        for file in sorted((path / name).rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    ]
    found = [(name, file) for name, file in files if file.suffix.lower() in known]
    if not found:
        what = "a directory" if path.is_dir() else "no such data file or folder"
        raise FileNotFoundError(
            f"{path}: {what}; expected a file of JSON lines, or for a model of images a folder "
            "with a folder of images for each class"
        )
    if {name.lower() for name, _ in found} <= _PARTS:
        raise ValueError(f"{path}: its folders {quoted(classes)} are no classes: give one of them")
    if others := [file for _, file in files if file.suffix.lower() not in known]:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        warnings.warn(f"{others[0]}{more}: no image, left out", stacklevel=2)
    return [Record("image", (str(file),), str(file), label=name) for name, file in found]


def image_examples(records: Iterable[Record], model: Any, *, known: bool = True) -> list[Example]:
    """Reads images and their targets.

    Args:
      records: from `load_folder`, `load_jsonl`, or `record_of({"image": ..., "label": ...})`. An
        image is a path, Pillow's image, an array of whole numbers (H, W, C) from 0 to 255, or what
        transformers' AutoImageProcessor returns of it: floats (C, H, W), taken as they are.
      model: from `lora_jax.models.load`, with its `processor`.
      known: the targets are read; otherwise they are zeros.

    Raises:
      ValueError: a record without an image, an image that cannot be read or has another size than
        the model's, or a label that is none.
    """
    records, goal = list(records), goal_of(model.config)
    check_records(records)
    if goal is None:
        raise SettingsError(f"`{model.config.model_type}` has no head for images: name `labels`")
    if not records:
        raise ValueError("the dataset is empty: there are no records")

    def made(record: Record) -> Example:
        pixels = _pixels(record, model)
        shape, dtype = goal.target(model.config)
        target = target_of(record, goal, model.config.labels) if known else np.zeros(shape, dtype)
        count = model.config.max_position_embeddings
        return Example(
            np.zeros(count, np.int32), np.arange(count) == count - 1, record.source,
            np.asarray(target)[None], image=pixels,
        )  # fmt: skip

    # Pillow leaves Python's lock while it decodes and resizes.
    with ThreadPoolExecutor() as threads:
        return list(threads.map(made, records))


def _pixels(record: Record, model: Any) -> Pixels:
    if record.form != "image":
        raise ValueError(
            f'{record.source}: `{model.config.model_type}` reads images, got "{record.form}": give '
            '"image", a path, and "label"'
        )
    (image,) = record.fields
    if isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating):
        found = Pixels(image)
    elif model.processor is None:
        raise ValueError(
            f"{record.source}: the model came without {FILE}, which says how {kind_of(image)} is "
            "resized and normalized: put one beside it, or give what transformers' "
            "AutoImageProcessor makes of it"
        )
    else:
        try:
            found = model.processor(image)
        except (FileNotFoundError, ValueError) as error:
            # The path of an image of a prompt or a folder is in the error already.
            said = str(error).removeprefix(f"{record.source}: ")
            raise type(error)(f"{record.source}: {said}") from None
    want = (model.config.num_channels, *model.config.image_size)
    if found.values.shape != want:
        raise ValueError(
            f"{record.source}: the image has shape {found.values.shape}, but the model reads "
            f"{want} (channels, height, width)"
        )
    return found
