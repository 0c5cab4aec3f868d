"""Table, figure and conclusions of `sst2_encoder.py`, from its numbers alone."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sst2 import percent, shrink, wilson

from lora_jax.train.progress import save_figure, smoothed

LORA, FULL, HEAD = "LoRA", "full", "head"
NAMES = {LORA: "LoRA r=8 on query, value", FULL: "full fine-tuning", HEAD: "head alone"}


class Method(NamedTuple):
    """The runs of one method.

    Attributes:
      tried: one for each learning rate, with the first seed.
      runs: one for each seed, with the rate that was best on dev.
    """

    tried: list[dict]
    runs: list[dict]


class Accuracy(NamedTuple):
    """Of one method on one split.

    Attributes:
      mean: over the seeds.
      interval: 95 %, of that share of the split's sentences.
      seeds: of each seed.
    """

    mean: float
    interval: tuple[float, float]
    seeds: list[float]


def accuracy(method: Method, split: str) -> Accuracy:
    each = [float(np.mean(run[split])) for run in method.runs]
    mean, total = float(np.mean(each)), len(method.runs[0][split])
    return Accuracy(mean, wilson(mean * total, total), each)


def differences(found: dict[str, Method]) -> dict[str, dict]:
    """Each method's test accuracy less full fine-tuning's, sentence by sentence.

    The same sentences were judged by both, so their difficulty cancels: the interval is that of
    the mean difference, `1.96 · sd / √n`.
    """
    if FULL not in found:
        return {}
    table = {}
    for method in found:
        if method == FULL:
            continue
        mine, full = (np.mean([r["test"] for r in found[m].runs], axis=0) for m in (method, FULL))
        apart = mine - full
        half = 1.96 * float(np.std(apart, ddof=1)) / math.sqrt(len(apart))
        mean = float(apart.mean())
        table[method] = {"mean": mean, "interval": [mean - half, mean + half]}
    return table


def rows(found: dict[str, Method], steps: dict[str, dict]) -> list[dict]:
    """A row for each method."""
    return [
        {
            "method": NAMES[name],
            "learning rate": method.runs[0]["learning_rate"],
            "dev": accuracy(method, "dev").mean,
            "test": accuracy(method, "test").mean,
            "low": accuracy(method, "test").interval[0],
            "high": accuracy(method, "test").interval[1],
            "trained": method.runs[0]["trained_parameters"],
            "optimizer MiB": method.runs[0]["optimizer_bytes"] / 2**20,
            "step s": steps[name]["seconds"],
            "step / full": steps[name]["over_full"],
        }
        for name, method in found.items()
    ]


def runs(found: dict[str, Method]) -> list[dict]:
    """Every run with its accuracies."""
    seen = {}
    for method in found.values():
        for run in (*method.tried, *method.runs):
            shares = {split: float(np.mean(run[split])) for split in ("dev", "test")}
            seen[run["name"]] = {**run, **shares}
    return list(seen.values())


def conclusions(found: dict[str, Method], steps: dict[str, dict], files: dict | None) -> list[str]:
    """What the numbers say, in sentences."""
    said = [_on_accuracy(name, method) for name, method in found.items()]
    said += [_on_difference(name, d) for name, d in differences(found).items()]
    if FULL in found and LORA in found:
        said.append(_on_cost(found, steps))
    if files is not None:
        said.append(_on_files(files))
    return said


def _on_accuracy(name: str, method: Method) -> str:
    got = accuracy(method, "test")
    each = ", ".join(percent(share) for share in got.seeds)
    return f"{NAMES[name]}: {percent(got.mean, got.interval)} on test (seeds: {each})."


def _on_difference(name: str, difference: dict) -> str:
    low, high = difference["interval"]
    mean = f"{100 * difference['mean']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    if low > 0:
        verdict = "better than full fine-tuning"
    elif high < 0:
        verdict = "worse than full fine-tuning"
    elif low > -0.01:
        verdict = "within a point of full fine-tuning"
    else:
        verdict = "not told apart from full fine-tuning by these sentences"
    return f"{NAMES[name]} is {verdict}: {mean} on test."


def _on_cost(found: dict[str, Method], steps: dict[str, dict]) -> str:
    mine, full = found[LORA].runs[0], found[FULL].runs[0]
    return (
        f"LoRA trains {mine['trained_parameters']:,} of {full['trained_parameters']:,} parameters "
        f"({100 * mine['trained_parameters'] / full['trained_parameters']:.2f} %), its optimizer "
        f"keeps {mine['optimizer_bytes'] / 2**20:.2f} MiB for {full['optimizer_bytes'] / 2**20:.1f}"
        f", and a step takes {steps[LORA]['over_full']:.2f} of full fine-tuning's time."
    )


def _on_files(files: dict) -> str:
    size = sum(files["bytes"].values())
    tensors = files["bytes"].get("adapter_model.safetensors", 0)
    text = f"The adapter as a PEFT directory (SEQ_CLS) is {size:,} bytes, {tensors:,} of tensors"
    if "largest_difference_of_logits" in files:
        text += f"; PEFT's logits differ from ours by {files['largest_difference_of_logits']:.1e}"
    return f"{text}."


def draw(path: Path, found: dict[str, Method], steps: dict[str, dict]) -> None:
    """Writes the figure: accuracy on test, accuracy against rate on dev, loss while training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=80)
    bars, rates, losses = figure.subplots(1, 3, width_ratios=[1, 1, 1.2])
    for i, (name, method) in enumerate(found.items()):
        got, color = accuracy(method, "test"), f"C{i}"
        spread = [[got.mean - got.interval[0]], [got.interval[1] - got.mean]]
        bars.errorbar([i], [got.mean], spread, fmt="o", color=color, capsize=4)
        bars.plot([i] * len(got.seeds), got.seeds, "_", color=color, ms=12)
        tried = sorted(method.tried, key=lambda r: r["learning_rate"])
        shares = [float(np.mean(r["dev"])) for r in tried]
        rates.plot([r["learning_rate"] for r in tried], shares, "o-", color=color, label=name)
        losses.plot(smoothed(method.runs[0]["training_loss"]), color=color, label=name)
    bars.set_xticks(range(len(found)), [_label(name, found[name], steps) for name in found])
    bars.set(xlim=(-0.5, len(found) - 0.5), ylabel="accuracy", title="Test, 95 % (dashes: seeds)")
    rates.set(xscale="log", xlabel="learning rate", title="Dev, first seed")
    losses.set(xlabel="step", ylabel="loss (running mean)", title="Training, chosen rate")
    losses.legend(fontsize="small")
    figure.suptitle("MiniLM (22 M) on SST-2")
    save_figure(figure, path)
    shrink(path)


def _label(name: str, method: Method, steps: dict[str, dict]) -> str:
    over = steps[name]["over_full"]
    time = "" if over is None else f"\nstep x {over:.2f}"
    return f"{name}\n{method.runs[0]['trained_parameters']:,}{time}"
