"""The result of a rank sweep: scores with intervals, as a table, JSON or a figure.

The intervals come from a paired bootstrap (Efron & Tibshirani 1993, chapter 13; Koehn 2004 for
BLEU): evaluation examples, and seeds if there are several, are resampled with replacement, with the
same draw for every rank and for full fine-tuning, and every score is recomputed. All seeds are
scored on the same examples, so examples and seeds are resampled independently (Owen 2007, "The
pigeonhole bootstrap", Annals of Applied Statistics 1(2): slightly wide at worst). Of S seeds S - 1
are drawn: S draws would give only (S - 1)/S of the variance of their mean, S - 1 give all of it
(Rao & Wu 1988, "Resampling inference with complex survey data", JASA 83(401), section 2). With one
seed the spread between seeds is unknown, which the table notes.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lora_jax.compat import require
from lora_jax.files import write_text
from lora_jax.train.progress import save_figure

FULL = "full"
BASE = "base"
_DRAWS = 1000
_TAILS = (2.5, 97.5)  # percentiles: 95 % lies between them


class Run(NamedTuple):
    """One training: a rank with a learning rate and a seed; the rest is its result.

    Attributes:
      rank: rank of the adapters; "full" is full fine-tuning, "base" the model before training.
      learning_rate: peak learning rate.
      seed: seed of the order of the batches and of the init.
      steps: optimizer steps.
      parameters: number of trained parameters.
      losses: the training loss before each step.
      tuning: the loss that chooses among learning rates, None where there was no choice.
      seconds: training time without compilation; that of the group divided by its members.
      together: adapters in its batch.
      values: float64 (n, ...), a row for each evaluation example; None before scoring.
    """

    rank: int | str
    learning_rate: float
    seed: int
    steps: int
    parameters: int = 0
    losses: Sequence[float] = ()
    tuning: float | None = None
    seconds: float = 0.0
    together: int = 1
    values: np.ndarray | None = None

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.rank}_lr{self.learning_rate:g}_seed{self.seed}_steps{self.steps}"


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      rank: "base", a rank, or "full".
      learning_rate: the chosen one.
      parameters: number of trained parameters.
      seconds: training time.
      score: mean score over the seeds.
      interval: 95 % interval of the score.
      ratio: score divided by that of full fine-tuning; None without full fine-tuning.
      ratio_interval: 95 % interval of the ratio.
      seed_scores: score of each seed, in the order of the runs; one for the base.
    """

    rank: int | str
    learning_rate: float | None
    parameters: int
    seconds: float
    score: float
    interval: tuple[float, float]
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    seed_scores: tuple[float, ...] = ()

    @property
    def deviation(self) -> float | None:
        """The standard deviation between seeds; None with fewer than two."""
        return float(np.std(self.seed_scores, ddof=1)) if len(self.seed_scores) > 1 else None


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep; prints as a table.

    Attributes:
      rows: the base, the ranks in increasing order, full fine-tuning last.
      smallest: the smallest rank within `tolerance` of full fine-tuning; None if no rank is.
      smallest_interval: its 95 % interval over the draws; `inf` is "above the largest rank".
      tolerance: relative, 0.01.
      metric: name of the score.
      lower_is_better: whether a lower score is better.
      runs: all runs, those of the learning-rate search too.
    """

    rows: tuple[Row, ...]
    smallest: int | None
    smallest_interval: tuple[float, float] | None
    tolerance: float
    metric: str
    lower_is_better: bool
    runs: tuple[Run, ...]

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The table, a note on its intervals, and the smallest rank that is enough."""
        head = ("rank", "learning rate", "trained", "seconds", "seeds", self.metric, "between",
                "95 %", "of full")  # fmt: skip
        lines = [head, *(_cells(row) for row in self.rows)]
        if self.seeds == 1:
            lines = [line[:6] + line[7:] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = "\n".join(
            "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
        )
        return f"{text}\n{self.intervals()}\n{self.verdict()}"

    @property
    def seeds(self) -> int:
        """Number of seeds of every rank and of full fine-tuning."""
        return max(len(row.seed_scores) for row in self.rows)

    def intervals(self) -> str:
        """A sentence about the intervals."""
        if self.seeds == 1:
            return (
                f"one seed; 95 % of {_DRAWS:,} draws of the examples: another order of the data "
                "or another start may differ by more"
            )
        return (
            f"means of {self.seeds} seeds, with the standard deviation between them; 95 % of "
            f"{_DRAWS:,} draws of examples and seeds"
        )

    def verdict(self) -> str:
        """The result in a sentence."""
        scores = {row.rank: row.score for row in self.rows}
        if FULL not in scores:
            return "without full fine-tuning there is nothing to measure the ranks against"
        gain = scores[FULL] - scores.get(BASE, math.nan)
        if (gain >= 0) if self.lower_is_better else (gain <= 0):
            return (
                f"full fine-tuning is no better than the base ({scores[FULL]:.4f} and "
                f"{scores[BASE]:.4f}), so this metric tells no ranks apart: train longer, or take "
                "another metric"
            )
        within = f"within {self.tolerance:.0%} of full fine-tuning"
        if self.smallest_interval is None:
            return f"no rank was compared with full fine-tuning ({within})"
        low, high = (_rank_text(x) for x in self.smallest_interval)
        if self.smallest is None:
            return f"none of these ranks is {within} (95 % of the draws: {low} to {high})"
        return f"the smallest rank {within} is {self.smallest} (95 % of the draws: {low} to {high})"

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON; values of single examples are left out."""
        interval = self.smallest_interval
        return {
            "metric": self.metric,
            "lower_is_better": self.lower_is_better,
            "tolerance": self.tolerance,
            "smallest_rank": self.smallest,
            "smallest_rank_interval": interval and [_rank_text(x) for x in interval],
            "seeds": self.seeds,
            "intervals": self.intervals(),
            "verdict": self.verdict(),
            "rows": [row._asdict() for row in self.rows],
            "runs": [
                {
                    **run._asdict(),
                    "values": None,
                    "losses": [round(float(x), 5) for x in run.losses],
                }
                for run in self.runs
            ],
        }

    def save_json(self, path: str | os.PathLike) -> None:
        """Writes `to_dict` as a file."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def plot(self, path: str | os.PathLike, *, title: str = "") -> None:
        """Draws the score against rank, trained parameters and seconds, as a PNG."""
        plot_sweep(path, self, title=title)


def _rank_text(x: float) -> str:
    return "above the largest" if math.isinf(x) else f"{x:g}"


def _cells(row: Row) -> tuple[str, ...]:
    ratio = "" if row.ratio is None else f"{row.ratio:.4f}"
    if row.ratio_interval is not None and row.rank != FULL:
        ratio += f" [{row.ratio_interval[0]:.3f}, {row.ratio_interval[1]:.3f}]"
    trains = row.rank != BASE
    return (
        str(row.rank),
        f"{row.learning_rate:g}" if trains else "",
        f"{row.parameters:,}" if trains else "",
        f"{row.seconds:.1f}" if trains else "",
        str(len(row.seed_scores)) if trains else "",
        f"{row.score:.4f}",
        "" if row.deviation is None else f"±{row.deviation:.4f}",
        f"[{row.interval[0]:.4f}, {row.interval[1]:.4f}]",
        ratio,
    )


def summarize(
    chosen: Mapping[int | str, Sequence[Run]],
    runs: Sequence[Run],
    *,
    reduce: Callable[[np.ndarray], float],
    metric: str,
    lower_is_better: bool,
    tolerance: float,
    seed: int = 0,
) -> Sweep:
    """Makes the table of runs that are all scored.

    Args:
      chosen: for the base, each rank and full fine-tuning, a run a seed.
      runs: all runs, for the record.
      reduce: from the values of the examples, `(n, ...)`, to their score.
      metric: its name.
      lower_is_better: of the score.
      tolerance: how far from full fine-tuning, relatively, is still "within".
      seed: of the draws.
    """
    values = {rank: [np.asarray(r.values) for r in of] for rank, of in chosen.items()}
    each = {rank: tuple(float(reduce(v)) for v in of) for rank, of in values.items()}
    scores = {rank: float(np.mean(of)) for rank, of in each.items()}
    drawn = _draws(values, reduce, seed)
    ranks = sorted(r for r in chosen if isinstance(r, int))
    order = [r for r in (BASE, *ranks, FULL) if r in chosen]
    rows = [_row(r, chosen[r], scores, drawn, each[r]) for r in order]
    smallest, interval = None, None
    if FULL in chosen and ranks:
        within = _within(scores, ranks, lower_is_better, tolerance)
        smallest = int(within) if np.isfinite(within) else None
        places = _within(drawn, ranks, lower_is_better, tolerance)
        # "nearest", since a rank between two others was not trained.
        low, high = np.percentile(places, _TAILS, method="nearest")
        interval = (float(low), float(high))
    return Sweep(
        rows=tuple(rows),
        smallest=smallest,
        smallest_interval=interval,
        tolerance=tolerance,
        metric=metric,
        lower_is_better=lower_is_better,
        runs=tuple(sorted(runs, key=_place)),
    )


def _place(run: Run) -> tuple:
    of_rank = run.rank if isinstance(run.rank, int) else {BASE: 0, FULL: math.inf}[run.rank]
    return of_rank, run.steps, run.learning_rate, run.seed


def _draws(values: Mapping, reduce: Callable, seed: int) -> dict:
    """The scores of every rank under the same draws of examples and seeds, (draws,) each."""
    random = np.random.default_rng(seed)
    count = len(next(iter(values.values()))[0])
    found: dict = {rank: np.empty(_DRAWS) for rank in values}
    for i in range(_DRAWS):
        rows = random.integers(count, size=count)
        which = random.random(max(len(v) for v in values.values()))
        for rank, seeds in values.items():
            # All ranks use the same uniform numbers: draws stay paired if seed counts differ.
            picked = [seeds[int(u * len(seeds))] for u in which[: max(1, len(seeds) - 1)]]
            found[rank][i] = np.mean([reduce(v[rows]) for v in picked])
    return found


def _row(
    rank: int | str,
    runs: Sequence[Run],
    scores: Mapping,
    drawn: Mapping,
    seeds: tuple[float, ...],
) -> Row:
    ratio = ratios = None
    if FULL in scores and scores[FULL]:
        ratio = scores[rank] / scores[FULL]
        # A draw may have a score of 0 for full fine-tuning.
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = _interval(drawn[rank] / drawn[FULL])
    return Row(
        rank=rank,
        learning_rate=None if rank == BASE else runs[0].learning_rate,
        parameters=runs[0].parameters,
        seconds=float(np.mean([r.seconds for r in runs])),
        score=scores[rank],
        interval=_interval(drawn[rank]),
        ratio=ratio,
        ratio_interval=ratios,
        seed_scores=seeds,
    )


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(drawn, _TAILS)
    return float(low), float(high)


def _within(scores: Mapping, ranks: Sequence[int], lower: bool, tolerance: float) -> np.ndarray:
    """The smallest rank within the tolerance of full fine-tuning, `inf` for none."""
    full = np.asarray(scores[FULL])
    room = tolerance * np.abs(full)
    places = np.full(full.shape, np.inf)
    # From the largest down, so that the smallest that is near enough stays.
    for rank in sorted(ranks, reverse=True):
        score = np.asarray(scores[rank])
        near = score <= full + room if lower else score >= full - room
        places = np.where(near, rank, places)
    return places


def plot_sweep(path: str | os.PathLike, sweep: Sweep, *, title: str = "") -> None:
    """Draws the score of every rank, with its 95 % interval, against three costs.

    Where there are several seeds, each one's score is a cross beside their mean.

    Args:
      path: of the PNG; replaced when the new one is whole.
      sweep: what `rank_sweep` found.
      title: above the plot.
    """
    figure = require("matplotlib.figure").Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    trained = [row for row in sweep.rows if row.rank != BASE]
    for axes, cost, label in zip(
        panels,
        (lambda r: r.rank, lambda r: r.parameters, lambda r: r.seconds),
        ("rank", "trained parameters", "seconds of training"),
        strict=True,
    ):
        shown = [row for row in trained if _positive(cost(row))]
        ranks = sorted((r for r in shown if r.rank != FULL), key=cost)
        full = [r for r in shown if r.rank == FULL]
        _points(axes, ranks, cost, color="tab:blue", label="LoRA")
        _points(axes, full, cost, color="tab:red", label="full")
        for row in sweep.rows:
            if isinstance(row.rank, str):
                color = "tab:red" if row.rank == FULL else "tab:gray"
                text = "full fine-tuning" if row.rank == FULL else "before training"
                axes.axhline(row.score, color=color, linestyle="--", linewidth=1, label=text)
        axes.set_xlabel(label)
        if label == "rank":
            axes.set_xscale("log", base=2)
        elif shown and max(map(cost, shown)) > 10 * min(map(cost, shown)):
            axes.set_xscale("log")
    panels[0].set_xticks([r.rank for r in trained if r.rank != FULL])
    panels[0].get_xaxis().set_major_formatter(lambda x, _: f"{x:g}")
    several = f", mean of {sweep.seeds} seeds" if sweep.seeds > 1 else ""
    panels[0].set_ylabel(sweep.metric + several)
    panels[0].legend(fontsize="small")
    figure.suptitle(title)
    save_figure(figure, path)


def _positive(cost: Any) -> bool:
    """Whether a cost can be drawn, on a logarithmic axis too."""
    return isinstance(cost, int | float) and math.isfinite(cost) and cost > 0


def _points(
    axes: Any, rows: list[Row], cost: Callable[[Row], Any], *, color: str, label: str
) -> None:
    if not rows:
        return
    scores = [r.score for r in rows]
    # The interval of the draws need not contain the score itself.
    spread = [
        [max(0.0, r.score - r.interval[0]) for r in rows],
        [max(0.0, r.interval[1] - r.score) for r in rows],
    ]
    for row in rows:
        if (count := len(row.seed_scores)) > 1:
            axes.plot([cost(row)] * count, row.seed_scores, "x", color=color, alpha=0.6)
    style = "o-" if len(rows) > 1 else "s"
    axes.errorbar([cost(r) for r in rows], scores, spread, fmt=style, color=color, capsize=3,
                  label=label)  # fmt: skip
