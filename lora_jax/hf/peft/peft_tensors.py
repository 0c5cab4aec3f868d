"""The tensors of slots: read out of a leaf, written into one, and compared with a file's."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from lora_jax.array import LoraArray, RowsArray, SavedArray
from lora_jax.hf.peft.tensors import Slot
from lora_jax.paths import nearest

# The arrays of a leaf that an adapter's file holds.
PARTS = {LoraArray: ("a", "b", "m", "bias"), SavedArray: ("value",), RowsArray: ("rows",)}


def on_host(leaf, slots: list[Slot]):
    """A leaf with NumPy arrays; an adapter's base weight only where the file repeats it."""
    parts = [*PARTS[type(leaf)]]
    parts += ["scale"] if isinstance(leaf, LoraArray) else []
    if isinstance(leaf, SavedArray) or any(slot.part == "w" for slot in slots):
        parts.append("w")
    host = {p: np.asarray(getattr(leaf, p)) for p in parts if getattr(leaf, p) is not None}
    return dataclasses.replace(leaf, **host)


def read_slot(leaf, slot: Slot) -> np.ndarray:
    """The tensor of a slot, out of a leaf whose arrays are NumPy's.

    Returns:
      An array of `slot.shape`, contiguous.
    """
    return np.ascontiguousarray(_view(getattr(leaf, slot.part), slot)).reshape(slot.shape)


def write_slot(part: np.ndarray, slot: Slot, tensor: np.ndarray) -> None:
    """Puts the tensor of a slot in its place in a leaf's part, an array that may be written."""
    view = _view(part, slot)
    view[...] = tensor.reshape(view.shape)


def _view(part: np.ndarray, slot: Slot) -> np.ndarray:
    """The slot's block of a part, its axes in the file's order: a view."""
    block = part[slot.index]
    if slot.cut is not None:
        block = block[(slice(None),) * slot.cut + (slice(slot.rank),)]
    return block if slot.axes is None else block.transpose(slot.axes)


def check_keys(slots: list[Slot], tensors: Mapping[str, np.ndarray], source: str) -> None:
    """Refuses a file whose tensors are not exactly the slots.

    Raises:
      ValueError: one message with all that is missing, left over or misshapen, each with the
        nearest names.
    """
    wanted = {slot.key: slot for slot in slots}
    missing = [k for k, s in wanted.items() if s.part != "w" and k not in tensors]
    extra = [k for k in tensors if k not in wanted]
    problems = _listed(
        "missing",
        [
            f"`{k}` (nearest in the file: {_near(k, extra)})" if extra else f"`{k}`"
            for k in missing[:3]
        ],
        len(missing),
    )
    problems += _listed(
        "left over",
        [f"`{k}` (nearest expected: {_near(k, wanted)})" for k in extra[:3]],
        len(extra),
    )
    shapes = [
        f"`{k}` is {tensors[k].shape}, expected {s.shape}"
        for k, s in wanted.items()
        if k in tensors and tensors[k].shape != s.shape
    ]
    problems += _listed("misshapen", shapes[:3], len(shapes))
    if problems:
        raise ValueError(f"{source}: the adapter does not fit this model; {'; '.join(problems)}")


def _near(key: str, known) -> str:
    return nearest(key, known, 1)


def _listed(what: str, shown: list[str], count: int) -> list[str]:
    if not count:
        return []
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    return [f"{count} {what}: {', '.join(shown)}{more}"]
