"""The figure of a rank sweep."""

import math
import os

from lora_jax.analysis.sweep.result import BASE, FULL, Row, Sweep
from lora_jax.train.plot import save_figure


def plot_sweep(path: str | os.PathLike, sweep: Sweep, *, title: str = "") -> None:
    """Draws the score of every rank, with its 95 % interval, against three costs.

    Where there are several seeds, each one's score is a cross beside their mean.

    Args:
      path: of the PNG; replaced when the new one is whole.
      sweep: what `rank_sweep` found.
      title: above the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
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
        _points(axes, ranks, cost, "tab:blue", "LoRA")
        _points(axes, [r for r in shown if r.rank == FULL], cost, "tab:red", "full")
        for row in sweep.rows:
            if isinstance(row.rank, str):
                color = "tab:red" if row.rank == FULL else "tab:gray"
                text = "full fine-tuning" if row.rank == FULL else "as it came"
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


def _positive(cost) -> bool:
    """Whether an axis, logarithmic perhaps, has a place for it."""
    return isinstance(cost, int | float) and math.isfinite(cost) and cost > 0


def _points(axes, rows: list[Row], cost, color: str, label: str) -> None:
    if not rows:
        return
    scores = [r.score for r in rows]
    # An interval of draws need not hold the score itself.
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
