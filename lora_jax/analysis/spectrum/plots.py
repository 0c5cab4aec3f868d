"""Figures of what training changed."""

import os

import numpy as np

from lora_jax.analysis.spectrum.spectrum import Spectrum
from lora_jax.train.plot import save_figure


def plot_decay(path: str | os.PathLike, found: Spectrum, *, title: str = "") -> None:
    """Writes a PNG of how the singular values of every kind of module fall.

    Args:
      path: of the PNG; replaced when the new one is whole.
      found: what `spectrum` found.
      title: above the plot.

    Raises:
      OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    draw_decay(figure.add_subplot(), found)
    figure.suptitle(title or "Singular values of the change of weights")
    save_figure(figure, path)


def draw_decay(axes, found: Spectrum, *, band: bool = True) -> None:
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
