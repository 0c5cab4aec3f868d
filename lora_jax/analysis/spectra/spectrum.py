"""Singular values of what training changed: how low the rank of a change of weights is.

    ΔW = W_after − W_before = U · diag(σ) · Vᵀ,     σ1 ≥ σ2 ≥ ...

Each weight matrix is analysed, every layer of a stack by itself; the change of an adapter is never
formed, see `changes`. `plot_decay` draws how the singular values of each kind of module fall.

Source: Hu et al. 2021, "LoRA", section 7 (the rank of ΔW).
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.analysis.spectra.changes import changes, singular_values
from lora_jax.compat import require
from lora_jax.train.progress import save_figure

# Singular values below this share of σ1 are rounding errors of float32.
_NOTHING = 1e-6


@dataclass(frozen=True)
class MatrixSpectrum:
    """The singular values of the change of one matrix.

    Attributes:
      path: of the leaf.
      index: position along its stack dims, () if it has none.
      shape: `(in, out)`.
      values: float64, falling, at most min(in, out) of them (an adapter's: its rank).
      before: Frobenius norm of the matrix before.
    """

    path: str
    index: tuple[int, ...]
    shape: tuple[int, int]
    values: np.ndarray
    before: float

    @property
    def name(self) -> str:
        """The path with its layer's numbers, `layers.q_proj.kernel[3]`."""
        return self.path + "".join(f"[{i}]" for i in self.index)

    @property
    def kind(self) -> str:
        """The name of the module, `q_proj`."""
        names = self.path.split(".")
        return names[-2] if len(names) > 1 else self.path

    @property
    def norm(self) -> float:
        """Frobenius norm of the change, `sqrt(Σ σ²)`."""
        return float(np.sqrt(np.sum(self.values**2)))

    @property
    def stable_rank(self) -> float:
        """`Σ σ² / σ1²`, 0 for no change: at most the rank, and insensitive to tiny values."""
        return float(np.sum(self.values**2) / self.values[0] ** 2) if self.norm else 0.0

    @property
    def rank(self) -> int:
        """The number of values above the rounding error of float32."""
        return int(np.sum(self.values > _NOTHING * self.values[0])) if self.norm else 0

    def energy_rank(self, share: float) -> int:
        """The fewest values that hold this share of `Σ σ²`; 0 for no change.

        Args:
          share: in (0, 1].
        """
        if not 0 < share <= 1:
            raise ValueError(f"`share` must be in (0, 1], got {share}")
        if not self.norm:
            return 0
        held = np.cumsum(self.values**2) / np.sum(self.values**2)
        # Room for rounding: a sum of shares that is 0.9 in exact numbers may come out below it.
        return int(np.searchsorted(held, share * (1 - 1e-12)) + 1)

    def energy_share(self, rank: int) -> float:
        """The share of `Σ σ²` in the first `rank` values: what the best change of that rank holds.

        1 for no change (Eckart and Young 1936: no matrix of that rank is nearer).
        """
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}")
        squares = self.values**2
        return float(squares[:rank].sum() / squares.sum()) if self.norm else 1.0

    def fall(self, place: int = 10) -> float:
        """`σ1 / σ_place`: infinite where there are fewer values."""
        # A change of lower rank has no such value: it falls to zero.
        if len(self.values) < place or not self.values[place - 1]:
            return float("inf") if self.norm else 1.0
        return float(self.values[0] / self.values[place - 1])


@dataclass(frozen=True)
class Spectrum:
    """The spectra of every matrix that changed; prints as a table.

    Attributes:
      matrices: in the tree's order.
    """

    matrices: tuple[MatrixSpectrum, ...]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each matrix: the numbers of the table and of the JSON file."""
        return [
            {
                "name": m.name,
                "shape": list(m.shape),
                "rank_90": m.energy_rank(0.9),
                "rank_99": m.energy_rank(0.99),
                "sigma_1": float(m.values[0]) if len(m.values) else 0.0,
                "sigma_1_over_10": m.fall(10),
                "stable_rank": m.stable_rank,
                "norm": m.norm,
                "relative": m.norm / m.before if m.before else float("inf"),
            }
            for m in self.matrices
        ]

    def to_json(self) -> str:
        """All rows with all singular values; infinite ratios are null, as JSON has no infinity."""
        rows = [
            {**row, "path": m.path, "index": list(m.index), "before": m.before,
             "values": [float(v) for v in m.values]}
            for row, m in zip(self.rows(), self.matrices, strict=True)
        ]  # fmt: skip
        for row in rows:
            row |= {k: None for k, v in row.items() if isinstance(v, float) and not np.isfinite(v)}
        return json.dumps({"matrices": rows}, indent=1)

    @staticmethod
    def from_json(text: str) -> "Spectrum":
        """Reads what `to_json` gave."""
        return Spectrum(
            tuple(
                MatrixSpectrum(
                    path=row["path"],
                    index=tuple(row["index"]),
                    shape=(row["shape"][0], row["shape"][1]),
                    values=np.asarray(row["values"], np.float64),
                    before=row["before"],
                )
                for row in json.loads(text)["matrices"]
            )
        )

    def __str__(self) -> str:
        heads = ["matrix", "shape", "90 %", "99 %", "σ1", "σ1/σ10", "stable rank", "‖ΔW‖/‖W‖"]
        lines = [
            [
                row["name"],
                "x".join(map(str, row["shape"])),
                str(row["rank_90"]),
                str(row["rank_99"]),
                f"{row['sigma_1']:.3g}",
                # An adapter of a rank below 10 has no tenth value to compare with.
                f"{row['sigma_1_over_10']:.3g}" if len(m.values) >= 10 else "-",
                f"{row['stable_rank']:.2f}",
                f"{row['relative']:.2e}",
            ]
            for row, m in zip(self.rows(), self.matrices, strict=True)
        ]
        widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in [heads, *lines]
        )

    def by_kind(self) -> dict[str, list[MatrixSpectrum]]:
        """The matrices by their module's own name, in the order of the tree."""
        groups: dict[str, list[MatrixSpectrum]] = {}
        for m in self.matrices:
            groups.setdefault(m.kind, []).append(m)
        return groups

    def plot(self, path: str | Path) -> None:
        """Draws how the values fall, `σk / σ1` against k, as a PNG; see `plot_decay`."""
        plot_decay(path, self)


def spectrum(
    before: Any, after: Any = None, *, where: tuple[str, ...] | str | None = None
) -> Spectrum:
    """Singular values of every weight's change.

    Args:
      before: parameters before training; or, alone, a tree with LoRA leaves, whose change is the
        adapter's.
      after: parameters after training, plain or with LoRA leaves. Those over the very weights of
        `before` are not merged either.
      where: names or a regular expression of modules to look at, as `target_modules`; all by
        default, but norms' scales and biases.

    Returns:
      A spectrum for each matrix: of leaves with two or more dims; the last two are the matrix,
      those before them number layers (a LoRA leaf's roles say better). Tables that are looked up
      count too.

    Raises:
      ValueError: trees of different structure or shapes, nothing to look at, numbers that are not
        finite.

    Example:
      print(spectrum(base, fine_tuned))        # full fine-tuning
      print(spectrum(lora_params))             # an adapter, without forming its matrices
    """
    return Spectrum(
        tuple(
            MatrixSpectrum(
                path=change.path,
                index=change.index,
                shape=(change.before.shape[0], change.before.shape[1]),
                values=singular_values(change.delta),
                before=float(np.linalg.norm(change.before)),
            )
            for change in changes(before, after, where)
        )
    )


def plot_decay(path: str | os.PathLike, found: Spectrum, *, title: str = "") -> None:
    """Writes a PNG of how the singular values of every kind of module fall.

    Args:
      path: of the PNG; replaced when the new one is whole.
      found: what `spectrum` found.
      title: above the plot.

    Raises:
      OSError: it cannot be written.
    """
    figure = require("matplotlib.figure").Figure(figsize=(7, 4.5), layout="constrained")
    draw_decay(figure.add_subplot(), found)
    figure.suptitle(title or "Singular values of the change of weights")
    save_figure(figure, path)


def draw_decay(axes: Any, found: Spectrum, *, band: bool = True) -> None:
    """Draws `σk / σ1` against k: the median of each kind of module.

    Args:
      axes: matplotlib's.
      found: what `spectrum` found; matrices that did not change are left out.
      band: also from the lowest to the highest.
    """
    for i, (kind, matrices) in enumerate(found.by_kind().items()):
        falls = [m.values / m.values[0] for m in matrices if m.norm]
        if not falls:
            continue
        # Matrices of one kind may differ in rank: only the places that all have are compared.
        stack = np.stack([f[: min(map(len, falls))] for f in falls])
        k = np.arange(1, stack.shape[1] + 1)
        # What is zero cannot stand on a logarithmic axis.
        stack = np.maximum(stack, 1e-9)
        color = f"C{i % 10}"
        if band:
            axes.fill_between(k, stack.min(0), stack.max(0), color=color, alpha=0.12, lw=0)
        axes.plot(k, np.median(stack, 0), color=color, lw=1.2, label=kind)
    axes.set(xlabel="k", ylabel="σk / σ1", yscale="log")
    if axes.lines:
        axes.legend(fontsize="x-small")
