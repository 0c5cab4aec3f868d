"""Singular values of what training changed: how low the rank of a change of weights is.

    ΔW = W_after − W_before = U · diag(σ) · Vᵀ,     σ1 ≥ σ2 ≥ ...

Every weight that is a matrix (every layer of a stack by itself) is looked at. Of an adapter
`ΔW = s·A·B` the values are found without forming the `(in, out)` matrix: with `A = Qa·Ra` and
`Bᵀ = Qb·Rb` they are those of the `(r, r)` matrix `s·Ra·Rbᵀ`.

Sources: Hu et al. 2021, "LoRA", section 7 (the rank of ΔW); Shuttleworth et al. 2024, "LoRA vs
full fine-tuning: an illusion of equivalence" (intruder dimensions, definition 3.1 and algorithm 1).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import matching, paths
from lora_jax.array import LoraArray, dense, is_lora, sizes, to_matrix
from lora_jax.merge import merge
from lora_jax.quant.array import is_leaf

# σ below this share of σ1 is what float32 leaves of a zero.
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
    def norm(self) -> float:
        """Frobenius norm of the change, `sqrt(Σ σ²)`."""
        return float(np.sqrt(np.sum(self.values**2)))

    @property
    def stable_rank(self) -> float:
        """`Σ σ² / σ1²`, 0 for no change: at most the rank, and deaf to tiny values."""
        return float(np.sum(self.values**2) / self.values[0] ** 2) if self.norm else 0.0

    @property
    def rank(self) -> int:
        """How many values are more than float32's noise."""
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
        return int(np.searchsorted(held, share * (1 - 1e-12)) + 1)

    def fall(self, place: int = 10) -> float:
        """`σ1 / σ_place`: infinite where there are fewer values."""
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
        """All rows with all singular values; infinite ratios are null."""
        rows = [
            {**row, "values": [float(v) for v in m.values]}
            for row, m in zip(self.rows(), self.matrices, strict=True)
        ]
        for row in rows:
            row |= {k: None for k, v in row.items() if isinstance(v, float) and not np.isfinite(v)}
        return json.dumps({"matrices": rows}, indent=1)

    def __str__(self) -> str:
        heads = ["matrix", "shape", "90 %", "99 %", "σ1", "σ1/σ10", "stable rank", "‖ΔW‖/‖W‖"]
        lines = [
            [
                row["name"],
                "x".join(map(str, row["shape"])),
                str(row["rank_90"]),
                str(row["rank_99"]),
                f"{row['sigma_1']:.3g}",
                f"{row['sigma_1_over_10']:.3g}",
                f"{row['stable_rank']:.2f}",
                f"{row['relative']:.2e}",
            ]
            for row in self.rows()
        ]
        widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in [heads, *lines]
        )

    def plot(self, path: str | Path) -> None:
        """Draws how the values fall, `σk / σ1` against k, one line a matrix, as a PNG or SVG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        kinds = list(dict.fromkeys(m.path.split(".")[-2] for m in self.matrices if "." in m.path))
        for m in self.matrices:
            if not m.norm:
                continue
            kind = m.path.split(".")[-2] if "." in m.path else m.path
            color = f"C{kinds.index(kind) % 10}" if kind in kinds else "0.5"
            axes.semilogy(np.arange(1, len(m.values) + 1), m.values / m.values[0], color=color,
                          alpha=0.5, linewidth=0.8)  # fmt: skip
        for i, kind in enumerate(kinds):
            axes.plot([], [], color=f"C{i % 10}", label=kind)
        axes.set(xlabel="k", ylabel="σk / σ1", title="Singular values of the change of weights")
        if kinds:
            axes.legend(fontsize="small")
        figure.savefig(path, dpi=150)


def spectrum(before, after=None, *, where: tuple[str, ...] | str | None = None) -> Spectrum:
    """Singular values of every weight's change.

    Args:
      before: parameters before training; or, alone, a tree with LoRA leaves, whose change is the
        adapter's.
      after: parameters after training, plain or with LoRA leaves (which are merged).
      where: names or a regular expression of modules to look at, as `target_modules`; all by
        default.

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
    pairs = _alone(before) if after is None else _pairs(before, after)
    found = []
    for path, first, second in pairs:
        if where is None or _named(where, path):
            found += list(_of_leaf(path, first, second))
    if not found:
        raise ValueError(
            "there is no matrix to look at"
            + (f" that `where` = {where!r} names" if where is not None else "")
            + "; pass trees with weights of two or more dims, or a tree with LoRA leaves alone"
        )
    return Spectrum(tuple(found))


def _named(where, path: str) -> bool:
    from lora_jax.config import LoraConfig

    config = LoraConfig(target_modules=where)
    return any(matching.is_target(config, name) for name in (path, paths.module_of(path)))


def _alone(tree) -> Iterator[tuple[str, Any, Any]]:
    for key_path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        if is_lora(x):
            yield paths.spell(key_path), x, None


def _pairs(before, after) -> Iterator[tuple[str, Any, Any]]:
    first, tree = jax.tree_util.tree_flatten_with_path(before, is_leaf=is_leaf)
    second, other = jax.tree.flatten(after, is_leaf=is_leaf)
    if tree != other:
        raise ValueError(
            "`before` and `after` are trees of different structure: pass the same model's "
            "parameters before and after training"
        )
    for (key_path, x), y in zip(first, second, strict=True):
        path = paths.spell(key_path)
        if tuple(x.shape) != tuple(y.shape):
            raise ValueError(
                f"`{path}` has shape {tuple(x.shape)} before and {tuple(y.shape)} after; pass the "
                "same model's parameters before and after training"
            )
        yield path, x, y


def _of_leaf(path: str, x, y) -> Iterator[MatrixSpectrum]:
    """The spectra of a leaf against another, or of an adapter by itself."""
    if len(x.shape) < 2:
        return
    if y is None and isinstance(x, LoraArray) and x.m is None:
        values, base = _adapter_values(x), to_matrix(_plain(x, base=True), x.roles)
    else:
        roles = _roles(x, y)
        base = _matrix(_plain(x, base=y is None), roles)
        values = jnp.linalg.svd(
            _matrix(_plain(x if y is None else y), roles) - base, compute_uv=False
        )
    norms = np.asarray(jnp.linalg.norm(base, axis=(-2, -1)), np.float64)
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"`{path}`: the change is not finite (NaN or infinity)")
    shape = (int(base.shape[-2]), int(base.shape[-1]))
    for index in np.ndindex(*values.shape[:-1]):
        yield MatrixSpectrum(path, index, shape, values[index], float(norms[index]))


def _plain(x, *, base: bool = False):
    """A leaf's weight in float32: with its adapter merged, or the frozen base."""
    return dense(x.w if base and is_lora(x) else merge(x)).astype(jnp.float32)


def _roles(*leaves) -> str | None:
    return next((x.roles for x in leaves if isinstance(x, LoraArray)), None)


def _matrix(w, roles: str | None):
    return w if roles is None else to_matrix(w, roles)


def _adapter_values(x: LoraArray):
    """The singular values of `s·A·B` from its factors."""
    stack, fan_in, fan_out = sizes(x.shape, x.roles)
    a = x.a.astype(jnp.float32).reshape(*stack, fan_in, x.rank)
    b = x.b.astype(jnp.float32).reshape(*stack, x.rank, fan_out)
    first = jnp.linalg.qr(a, mode="r")
    second = jnp.linalg.qr(jnp.swapaxes(b, -1, -2), mode="r")
    small = jnp.matmul(first, jnp.swapaxes(second, -1, -2), precision=jax.lax.Precision.HIGHEST)
    return jnp.linalg.svd(small * jnp.abs(x.scale)[..., None, None], compute_uv=False)


def intruder_dimensions(
    before, after, *, top: int = 10, similarity: float = 0.5, where=None
) -> dict[str, int]:
    """Counts the singular directions of the trained weights that the weights before had not.

    A left singular vector among the `top` first of `W_after` is an intruder if its cosine with
    every left singular vector of `W_before` is below `similarity` in size.

    Args:
      before, after: as for `spectrum`.
      top: how many of the largest directions are looked at, at least 1.
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
    counts = {}
    for path, x, y in _pairs(before, after):
        if len(x.shape) < 2 or (where is not None and not _named(where, path)):
            continue
        roles = _roles(x, y)
        old, new = (_matrix(_plain(z, base=b), roles) for z, b in ((x, True), (y, False)))
        # Of (in, out) matrices the outputs' directions are the right vectors, the `U` of (out, in).
        _, _, had = jnp.linalg.svd(old, full_matrices=False)
        _, _, has = jnp.linalg.svd(new, full_matrices=False)
        cosine = jnp.abs(jnp.matmul(has[..., :top, :], jnp.swapaxes(had, -1, -2)))
        found = np.asarray(jnp.sum(jnp.max(cosine, axis=-1) < similarity, axis=-1))
        for index in np.ndindex(*found.shape):
            counts[path + "".join(f"[{i}]" for i in index)] = int(found[index])
    if not counts:
        raise ValueError("there is no matrix to look at; pass trees with weights of two dims")
    return counts
