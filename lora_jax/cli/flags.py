"""The flags of a command, and what to write for one that it has not."""

import argparse
import difflib


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """The long flags of a command."""
    return [f for a in parser._actions for f in a.option_strings if f.startswith("--")]


# Flags of transformers' and PEFT's scripts, and what they are here.
_ELSEWHERE = {
    "--lr": "--learning-rate",
    "--r": "--rank",
    "--lora-r": "--rank",
    "--lora-rank": "--rank",
    "--lora-alpha": "--alpha",
    "--lora-dropout": "--dropout",
    "--lora-target-modules": "--target-modules",
    "--num-train-epochs": "--epochs",
    "--max-steps": "--steps",
    "--per-device-train-batch-size": "--batch-size",
    "--gradient-accumulation-steps": "--accumulation",
    "--gradient-checkpointing": "--remat",
    "--max-grad-norm": "--clip",
    "--lr-scheduler-type": "--schedule",
    "--warmup-ratio": "--warmup",
    "--warmup-steps": "--warmup",
    "--max-seq-length": "--max-length",
    "--length": "--max-length",
    "--batch": "--batch-size",
    "--targets": "--target-modules",
    "--load-in-4bit": "--quantize nf4",
    "--load-in-8bit": "--quantize int8",
    "--bf16": "--dtype bfloat16",
    "--data": "--train-data",
    "--dataset": "--train-data",
    "--model-name-or-path": "--model",
    "--resume-from-checkpoint": "--resume",
    "--save-steps": "--save-every",
    "--eval-steps": "--eval-every",
    "--save-total-limit": "--keep",
}


def instead(unknown: str, parser: argparse.ArgumentParser) -> str:
    """What to write for a flag that the command has not; empty where nothing is known."""
    flags, name = flags_of(parser), unknown.partition("=")[0].replace("_", "-")
    if not name.startswith("-"):
        return ""
    ours = name if name in flags else _ELSEWHERE.get(name, "")
    if ours.partition(" ")[0] in flags:
        return f": it is {ours} here"
    # Beyond some likeness the nearest flag has nothing to do with what was meant.
    like = difflib.get_close_matches(name, flags, n=3, cutoff=0.7)
    listed = ", ".join(f"`{flag}`" for flag in like)
    return f"; the nearest are {listed}" if like else ", and none is like it"
