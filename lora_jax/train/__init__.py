"""Training: data, loss, optimizer step, metrics and the loop, each usable alone.

records = load_jsonl("train.jsonl")                        text
data = examples(records, tokenizer, max_length=2048)       tokens, and which are learned
result = fit(model, lora_params, data, None, TrainConfig(steps=100))
"""

from lora_jax.train.batches import (
    Batch,
    Loader,
    batches_per_epoch,
    iterate,
    loader,
    once,
    padding_share,
)
from lora_jax.train.buckets import best_ladder
from lora_jax.train.config import TrainConfig, total_steps
from lora_jax.train.evaluate import evaluate, lora_loss
from lora_jax.train.examples import Example, examples, load_examples
from lora_jax.train.flops import training_flops
from lora_jax.train.images import image_examples, load_folder
from lora_jax.train.jsonl import Record, load_jsonl, record_of
from lora_jax.train.loop import Hooks, Result, fit
from lora_jax.train.loss import cross_entropy, losses_of, outputs_of, summed_loss
from lora_jax.train.memory import Memory, format_memory, memory, peak_bytes
from lora_jax.train.metrics import read_metrics
from lora_jax.train.progress import plot_loss
from lora_jax.train.step import (
    Metrics,
    Programs,
    TrainState,
    init_state,
    make_step,
    optimizer,
    schedule,
)

__all__ = [
    "Batch",
    "Example",
    "Hooks",
    "Loader",
    "Memory",
    "Metrics",
    "Programs",
    "Record",
    "Result",
    "TrainConfig",
    "TrainState",
    "batches_per_epoch",
    "best_ladder",
    "cross_entropy",
    "evaluate",
    "examples",
    "fit",
    "format_memory",
    "image_examples",
    "init_state",
    "iterate",
    "load_examples",
    "load_folder",
    "load_jsonl",
    "loader",
    "lora_loss",
    "make_step",
    "memory",
    "once",
    "optimizer",
    "losses_of",
    "outputs_of",
    "padding_share",
    "peak_bytes",
    "plot_loss",
    "read_metrics",
    "record_of",
    "schedule",
    "summed_loss",
    "total_steps",
    "training_flops",
]


def __dir__() -> list[str]:
    return __all__
