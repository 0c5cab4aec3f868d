"""Table, figure and conclusions of `sst2_spectrum.py`, from its numbers alone."""

import statistics
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sst2 import percent, shrink

from lora_jax import analysis
from lora_jax.analysis.spectra.changes import singular_values
from lora_jax.analysis.spectra.spectrum import draw_decay
from lora_jax.train.progress import save_figure

# Singular values that are written of each matrix of full fine-tuning.
_WRITTEN = 16


class Found(NamedTuple):
    """What the experiment found.

    Attributes:
      before: accuracy on dev of the model as it came.
      full, lora: the two runs' numbers.
      changed, adapted: the spectra of their changes.
      overlaps: fields of `analysis.Overlap` for each matrix, full fine-tuning against LoRA.
      full_intruders, lora_intruders: by the matrix's name, of ten directions.
      rank: of LoRA.
    """

    before: dict
    full: dict
    lora: dict
    changed: analysis.Spectrum
    adapted: analysis.Spectrum
    overlaps: list[dict]
    full_intruders: dict[str, int]
    lora_intruders: dict[str, int]
    rank: int


class Random(NamedTuple):
    """A change without any structure: a Gaussian matrix of the same shape."""

    rank_90: int
    share: float


@lru_cache
def random_change(shape: tuple[int, int], rank: int) -> Random:
    """Its rank for 90 % of the energy, and the share in its best part of a rank."""
    noise = np.random.default_rng(0).normal(size=shape)
    values = singular_values(noise)
    drawn = analysis.MatrixSpectrum("noise", (), shape, values, 1.0)
    return Random(drawn.energy_rank(0.9), drawn.energy_share(rank))


def rows(found: Found) -> list[dict]:
    """A row for each kind of projection, medians over the layers.

    Of full fine-tuning's change: rank for 90 % of the energy and that of a random matrix, for 99 %,
    stable rank, fall, what the best change of LoRA's rank holds, and that of a random one. Of
    LoRA's own: rank for 90 %, stable rank. Directions in common on both sides, each beside chance;
    what LoRA's directions hold of what as many could; intruder dimensions of both.
    """
    adapted, overlaps = found.adapted.by_kind(), _by_name(found)
    table = []
    for kind, changed in found.changed.by_kind().items():
        noise = random_change(changed[0].shape, found.rank)
        common = [overlaps[m.name] for m in changed if m.name in overlaps]
        ratios = [o["captured"] / o["best"] for o in common]
        table.append(
            {
                "projection": kind,
                "shape": "x".join(map(str, changed[0].shape)),
                "rank 90%": _median(m.energy_rank(0.9) for m in changed),
                "random": noise.rank_90,
                "rank 99%": _median(m.energy_rank(0.99) for m in changed),
                "stable": _median(m.stable_rank for m in changed),
                "s1/s10": _median(m.fall(10) for m in changed),
                f"best {found.rank}": _median(m.energy_share(found.rank) for m in changed),
                "of random": noise.share,
                "LoRA 90%": _median(m.energy_rank(0.9) for m in adapted[kind]),
                "LoRA stable": _median(m.stable_rank for m in adapted[kind]),
                "inputs": _median(o["inputs"] for o in common),
                "chance in": common[0]["chance_inputs"] if common else None,
                "outputs": _median(o["outputs"] for o in common),
                "chance out": common[0]["chance_outputs"] if common else None,
                "captured": _median(ratios),
                "intruders": sum(found.full_intruders[m.name] for m in changed),
                "of LoRA": sum(found.lora_intruders[m.name] for m in changed),
            }
        )
    return table


def matrices(found: Found) -> list[dict]:
    """A row for each matrix: all numbers of both runs."""
    overlaps = _by_name(found)
    table = []
    for row, m, mine, a in zip(
        found.changed.rows(), found.changed.matrices,
        found.adapted.rows(), found.adapted.matrices, strict=True,
    ):  # fmt: skip
        table.append(
            {
                "name": m.name,
                "shape": list(m.shape),
                "full": _numbers(row, m.values[:_WRITTEN], found.full_intruders[m.name]),
                f"in_best_{found.rank}": _short(m.energy_share(found.rank)),
                "lora": _numbers(mine, a.values, found.lora_intruders[m.name]),
                "overlap": {
                    k: _short(v) for k, v in overlaps.get(m.name, {}).items() if k != "name"
                },
            }
        )
    return table


def decay(found: Found) -> dict[str, dict[str, list]]:
    """`σk / σ1` of full fine-tuning at k = 1, 2, 4, ..., the median over layers of each kind."""
    out = {}
    for kind, matrices in found.changed.by_kind().items():
        falls = [m.values / m.values[0] for m in matrices if m.norm]
        if falls:
            middle = np.median(np.stack(falls), axis=0)
            places = [2**i for i in range(len(middle).bit_length())]
            out[kind] = {"k": places, "fall": [_short(float(middle[k - 1])) for k in places]}
    return out


def _numbers(row: dict, values: np.ndarray, intruders: int) -> dict:
    kept = {k: _short(v) for k, v in row.items() if k not in ("name", "shape", "sigma_1")}
    return {**kept, "intruders": intruders, "values": [_short(float(v)) for v in values]}


def _short(value):
    """Four digits; None for what is not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _by_name(found: Found) -> dict[str, dict]:
    return {o["name"]: o for o in found.overlaps}


def _median(values) -> float | None:
    values = [v for v in values if v is not None and np.isfinite(v)]
    return float(statistics.median(values)) if values else None


def conclusions(found: Found) -> list[str]:
    """What the numbers say, in sentences."""
    said = [_on_accuracy(found), _on_rank(found), _on_depth(found)]
    return [*said, _on_overlap(found), _on_intruders(found)]


def _on_accuracy(found: Found) -> str:
    full, lora = found.full["dev"], found.lora["dev"]
    gap = 100 * (lora["accuracy"] - full["accuracy"])
    apart = lora["interval"][1] < full["interval"][0] or full["interval"][1] < lora["interval"][0]
    share = found.lora["trained_parameters"] / found.full["trained_parameters"]
    return (
        f"Accuracy on dev went from {percent(found.before['accuracy'], found.before['interval'])} "
        f"to {percent(full['accuracy'], full['interval'])} with full fine-tuning and to "
        f"{percent(lora['accuracy'], lora['interval'])} with LoRA of rank {found.rank}, which "
        f"trains {100 * share:.2f} % of the parameters: {gap:+.1f} points, "
        + ("beyond" if apart else "within")
        + " what the 95 % intervals can tell."
    )


def _on_rank(found: Found) -> str:
    changed = found.changed.matrices
    rank = _median(m.energy_rank(0.9) for m in changed)
    size = _median(min(m.shape) for m in changed)
    held = _median(m.energy_share(found.rank) for m in changed)
    noise = [random_change(shape, found.rank) for shape in dict.fromkeys(m.shape for m in changed)]
    random_held = statistics.median(n.share for n in noise)
    random_rank = statistics.median(n.rank_90 for n in noise)
    if rank is None or held is None:
        return "Full fine-tuning changed nothing."
    if rank <= found.rank:
        verdict = f"The change of full fine-tuning is of rank {found.rank} for most purposes"
    elif rank <= 0.1 * size:
        verdict = f"The change of full fine-tuning is of low rank, though not of {found.rank}"
    elif rank <= 0.5 * random_rank:
        verdict = "The change of full fine-tuning has structure, but is not of low rank"
    else:
        verdict = "The change of full fine-tuning is not of low rank, against the textbook"
    return (
        f"{verdict}: 90 % of its energy take a median of {rank:.0f} directions of {size:.0f} "
        f"(a random matrix: {random_rank:.0f}), and the best change of rank {found.rank} holds "
        f"{percent(held)} (of a random one: {percent(random_held)})."
    )


def _on_depth(found: Found) -> str:
    layers = 1 + max(m.index[-1] for m in found.changed.matrices)
    third = max(1, layers // 3)
    first, last = (
        [m for m in found.changed.matrices if inside(m.index[-1])]
        for inside in (lambda i: i < third, lambda i: i >= layers - third)
    )
    ranks = [statistics.median(m.energy_rank(0.9) for m in part) for part in (first, last)]
    held = [statistics.median(m.energy_share(found.rank) for m in part) for part in (first, last)]
    verdict = "falls with depth" if ranks[1] < ranks[0] / 2 else (
        "rises with depth" if ranks[1] > 2 * ranks[0] else "is much the same at all depths"
    )  # fmt: skip
    return (
        f"That rank {verdict}: a median of {ranks[0]:.0f} in the first {third} layers, where the "
        f"best rank {found.rank} holds {percent(held[0])}, and of {ranks[1]:.0f} in the last "
        f"{third}, where it holds {percent(held[1])}."
    )


def _on_overlap(found: Found) -> str:
    if not found.overlaps:
        return "The two trainings have no matrix in common."
    said = []
    for side in ("inputs", "outputs"):
        shared = statistics.median(o[side] for o in found.overlaps)
        times = statistics.median(o[side] / o[f"chance_{side}"] for o in found.overlaps)
        verdict = "largely the same" if shared > 0.5 else (
            "in part the same" if times > 3 else "no more alike than chance"
        )  # fmt: skip
        said.append(
            f"on the side of the {side} {verdict} ({percent(shared)}, {times:.1f} x chance)"
        )
    ratio = statistics.median(o["captured"] / o["best"] for o in found.overlaps)
    return (
        f"The {found.rank} main directions of full fine-tuning and LoRA's are {said[0]} and "
        f"{said[1]}; LoRA's hold {percent(ratio)} of the energy of the full change that as many "
        "directions could. (LoRA's inputs' directions begin as those of its random A, while B "
        "begins at zero and takes the gradient's.)"
    )


def _on_intruders(found: Found) -> str:
    full, lora = sum(found.full_intruders.values()), sum(found.lora_intruders.values())
    total = 10 * len(found.full_intruders)
    as_said = "as Shuttleworth et al. report" if lora > full else (
        "unlike what Shuttleworth et al. report of longer trainings"
    )  # fmt: skip
    return (
        f"Intruder dimensions among the ten largest directions of each matrix: {full} of {total} "
        f"after full fine-tuning, {lora} after LoRA ({as_said})."
    )


def draw(path: Path, found: Found) -> None:
    """Writes the figure: decay, share of the best rank, rank for 90 %, overlap, by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.2), layout="constrained", dpi=80)
    panels = figure.subplots(2, 2)
    draw_decay(panels[0, 0], found.changed, band=False)
    for matrices in found.adapted.by_kind().values():
        falls = [m.values / m.values[0] for m in matrices if m.norm]
        if falls:
            middle = np.median(np.stack(falls), axis=0)
            panels[0, 0].plot(np.arange(1, len(middle) + 1), middle, "k:", lw=1)
    panels[0, 0].set(xscale="log", ylim=(1e-4, 1.3), title="Decay (dotted: LoRA's own)")
    groups = found.changed.by_kind()
    noise = {k: random_change(m[0].shape, found.rank) for k, m in groups.items()}
    held = {k: [m.energy_share(found.rank) for m in ms] for k, ms in groups.items()}
    _by_layer(panels[0, 1], held, noise["gate_proj"].share)
    panels[0, 1].set(ylabel=f"energy in the best rank {found.rank}", ylim=(0, 1),
                     title="What rank 8 could hold (dashed: random)"
                     .replace("8", str(found.rank)))  # fmt: skip
    ranks = {k: [float(m.energy_rank(0.9)) for m in ms] for k, ms in groups.items()}
    _by_layer(panels[1, 0], ranks, noise["gate_proj"].rank_90)
    panels[1, 0].set(ylabel="rank for 90 % of the energy", title="Rank of the full change")
    overlaps = _by_name(found)
    common = {k: [overlaps.get(m.name, {}).get("outputs", np.nan) for m in ms]
              for k, ms in groups.items()}  # fmt: skip
    _by_layer(panels[1, 1], common, found.overlaps[0]["chance_outputs"] if found.overlaps else 0)
    panels[1, 1].set(ylabel="overlap of the outputs' directions",
                     title="Overlap with LoRA (dashed: chance)")  # fmt: skip
    full, lora = (percent(run["dev"]["accuracy"]) for run in (found.full, found.lora))
    figure.suptitle(
        f"SmolLM2-135M on SST-2: {percent(found.before['accuracy'])} before, {full} full, "
        f"{lora} LoRA of rank {found.rank}"
    )
    save_figure(figure, path)
    shrink(path)


def _by_layer(axes, values: dict[str, Sequence[float]], level: float) -> None:
    for i, (_, series) in enumerate(values.items()):
        axes.plot(range(len(series)), series, ".-", color=f"C{i % 10}", lw=1, ms=4)
    axes.axhline(level, color="0.4", ls="--", lw=1)
    axes.set_xlabel("layer")
