"""The loss curve as a PNG."""

import os
from collections.abc import Sequence

from lora_jax.files import replacing


def plot_loss(path: str | os.PathLike, history: Sequence[dict], *, title: str = "") -> None:
    """Draws training loss (and its running mean), evaluation loss and learning rate by step.

    Args:
      path: of the PNG; replaced when the new one is whole.
      history: records as `fit` returns them.
      title: above the plot.

    Raises:
      ValueError: no record has a loss.
      OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    train = [(r["step"], r["loss"], r["learning_rate"]) for r in history if r["kind"] == "train"]
    evals = [(r["step"], r["eval_loss"]) for r in history if r["kind"] == "eval"]
    if not train and not evals:
        raise ValueError("`history` has no record with a loss: there is nothing to plot")
    # A figure without pyplot: no global state, no display.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        _draw_train(axes, train)
    if evals:
        axes.plot(*zip(*evals, strict=True), "o-", color="tab:red", label="evaluation loss")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per learned token)", title=title)
    axes.legend(loc="upper right")
    save_figure(figure, path)


def save_figure(figure, path: str | os.PathLike) -> None:
    """Writes a matplotlib `Figure` as a PNG, which replaces an older one when it is whole.

    Raises:
      OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    try:
        with replacing(path) as new:
            FigureCanvasAgg(figure).print_png(str(new))
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise OSError(f"{path}: the plot cannot be written: {why}") from error


def _draw_train(axes, train: Sequence[tuple]) -> None:
    steps, losses, rates = zip(*train, strict=True)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3)
    axes.plot(steps, running_mean(losses), color="tab:blue", label="training loss (running mean)")
    side = axes.twinx()
    side.plot(steps, rates, color="tab:gray", linestyle=":", linewidth=1)
    side.set_ylabel("learning rate (dotted)")
    side.set_ylim(bottom=0)


def running_mean(values: Sequence[float], memory: float = 0.9) -> list[float]:
    """The exponential mean of the values so far, without the pull of its start to zero."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = memory * total + value, memory * weight + 1
        means.append(total / weight)
    return means
