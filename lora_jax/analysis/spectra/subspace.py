"""Compares the directions that training changed with another training's, or with the base's own.

Sources: Hu et al. 2021, "LoRA", section 7.2, equation 4 (similarity of subspaces); Shuttleworth et
al. 2024, "LoRA vs full fine-tuning: an illusion of equivalence", definition 3.1 and algorithm 1
(intruder dimensions).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.analysis.spectra.changes import Change, Directions, Factors, changes, directions

# Directions below this share of the largest singular value are taken for float32 noise.
_NOTHING = 1e-6


@dataclass(frozen=True)
class Overlap:
    """How much the main directions of two changes of one matrix agree.

    Attributes:
      name: the matrix.
      top: number of directions compared.
      inputs: `‖U1ᵀ U2‖² / top` of the input directions, 0 to 1.
      outputs: the same for the output directions.
      chance_inputs: expected value for random input directions, `top / in`.
      chance_outputs: the same for output directions, `top / out`.
      captured: share of the first change's energy `‖ΔW1‖²` within the second's directions,
        `‖U2ᵀ ΔW1 V2‖² / ‖ΔW1‖²`.
      best: the largest share that any `top` directions capture.
    """

    name: str
    top: int
    inputs: float
    outputs: float
    chance_inputs: float
    chance_outputs: float
    captured: float
    best: float


def overlap(
    before: Any,
    first: Any,
    second: Any,
    *,
    top: int = 8,
    where: tuple[str, ...] | str | None = None,
) -> list[Overlap]:
    """Compares the `top` main directions of two trainings of the same weights.

    Args:
      before: parameters before training.
      first: after one training, plain or with LoRA leaves.
      second: after the other training, likewise.
      top: number of directions, at least 1; fewer if a change has fewer.
      where: as for `spectrum`.

    Returns:
      One `Overlap` for each matrix that both trainings changed.

    Raises:
      ValueError: as `spectrum`; no matrix was changed by both.

    Source: Hu et al. 2021, equation 4, for `i = j = top`.
    """
    if top < 1:
        raise ValueError(f"`top` must be at least 1, got {top}")
    pairs = zip(changes(before, first, where), changes(before, second, where), strict=True)
    found = [o for one, other in pairs if (o := _overlap(one, other, top)) is not None]
    if not found:
        raise ValueError("no matrix was changed by both `first` and `second`")
    return found


def _overlap(one: Change, other: Change, top: int) -> Overlap | None:
    first, second = _real(directions(one.delta, top)), _real(directions(other.delta, top))
    # Subspaces of one dimension are compared: the smaller of the two ranks limits both.
    count = min(len(first.values), len(second.values))
    if not count:
        return None
    (u1, s1, v1), (u2, _, v2) = _head(first, count), _head(second, count)
    energy = _energy(one.delta)
    return Overlap(
        one.name,
        count,
        inputs=float(np.sum((u1.T @ u2) ** 2) / count),
        outputs=float(np.sum((v1.T @ v2) ** 2) / count),
        chance_inputs=count / u1.shape[0],
        chance_outputs=count / v1.shape[0],
        captured=float(np.sum(_between(u2, one.delta, v2) ** 2) / energy),
        best=float(np.sum(s1**2) / energy),
    )


def _real(found: Directions) -> Directions:
    return _head(found, int(np.sum(found.values > _NOTHING * found.values[:1])))


def _head(found: Directions, count: int) -> Directions:
    return Directions(found.inputs[:, :count], found.values[:count], found.outputs[:, :count])


def _between(u: np.ndarray, delta: np.ndarray | Factors, v: np.ndarray) -> np.ndarray:
    """`Uᵀ ΔW V`."""
    if isinstance(delta, Factors):
        return (u.T @ delta.a) @ (delta.b @ v)
    return u.T @ delta @ v


def _energy(delta: np.ndarray | Factors) -> float:
    if isinstance(delta, Factors):
        # ‖A·B‖² = tr(AᵀA·BBᵀ): the product is never formed.
        return float(np.sum((delta.a.T @ delta.a) * (delta.b @ delta.b.T)))
    return float(np.sum(delta**2))


def intruder_dimensions(
    before: Any,
    after: Any,
    *,
    top: int = 10,
    similarity: float = 0.5,
    where: tuple[str, ...] | str | None = None,
) -> dict[str, int]:
    """Counts the singular directions of the trained weights that are new.

    One of the first `top` left singular vectors of `W_after` is an intruder if its cosine with
    every left singular vector of `W_before` is below `similarity` in absolute value.

    Args:
      before, after: as for `spectrum`.
      top: number of the largest directions to check, at least 1.
      similarity: in (0, 1).
      where: as for `spectrum`.

    Returns:
      Matrix name to number of intruders, 0 to `top`.

    Raises:
      ValueError: as `spectrum`; `top` or `similarity` out of range.

    Source: Shuttleworth et al. 2024, algorithm 1.
    """
    if top < 1 or not 0 < similarity < 1:
        raise ValueError(
            f"`top` must be at least 1 and `similarity` in (0, 1), got {top} and {similarity}"
        )
    return {
        change.name: _intruders(change, top, similarity) for change in changes(before, after, where)
    }


def _intruders(change: Change, top: int, similarity: float) -> int:
    # The paper's weights are (out, in): its left vectors are the output directions here.
    delta = change.delta
    step = delta.a @ delta.b if isinstance(delta, Factors) else delta
    if not step.any():
        return 0
    had = directions(change.before).outputs
    has = directions(change.before + step, top).outputs
    return int(np.sum(np.max(np.abs(has.T @ had), axis=1, initial=0.0) < similarity))
