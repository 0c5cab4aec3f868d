"""A LoRA step of google-tunix with qwix, and ours, in turn in one process.

    make .venv-tunix/.stamp && PYTHONPATH=. .venv-tunix/bin/python benchmarks/tunix_step.py

Twelve layers of SmolLM2-135M's shape with random numbers, float32, 8 rows of 128 tokens, rank 8 on
all linear layers: 976,896 trained numbers, AdamW. Three programs:

- tunix: its Llama with qwix's LoRA, in the jitted step of its `PeftTrainer`;
- tunix, adapted by us: the same trainer and model, adapted by `lora.nnx.adapt`;
- lora_jax: our decoder and the step of `lora-jax train`.

The first step is tracing, compiling and running; compiled programs are dropped before each.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from common import ratio, report
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import lora_jax as lora
from lora_jax import models
from lora_jax.train.batches import Batch
from lora_jax.train.evaluate import lora_loss
from lora_jax.train.step import init_state, make_step

LAYERS, ROWS, LENGTH, RANK, TRAINED = 12, 8, 128, 8, 976_896
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = np.random.default_rng(0).integers(0, 49_152, (ROWS, LENGTH), dtype=np.int32)
THEIRS, MIXED, OURS = "tunix", "tunix, adapted by us", "lora_jax"


def their_base() -> Llama3:
    config = ModelConfig(
        num_layers=LAYERS,
        vocab_size=49_152,
        embed_dim=576,
        hidden_dim=1536,
        num_heads=9,
        head_dim=64,
        num_kv_heads=3,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    return Llama3(config, rngs=nnx.Rngs(0))


def inputs() -> dict:
    """What tunix's default loss takes; every token but the first of a row is learned."""
    causal = jnp.tile(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (ROWS, 1, 1))
    positions = jnp.tile(jnp.arange(LENGTH), (ROWS, 1))
    mask = jnp.ones((ROWS, LENGTH), bool)
    return {
        "input_tokens": jnp.asarray(TOKENS),
        "input_mask": mask,
        "positions": positions,
        "attention_mask": causal,
    }


def with_qwix() -> nnx.Module:
    base = their_base()
    provider = qwix.LoraProvider(module_path=f".*({'|'.join(TARGETS)})", rank=RANK, alpha=16.0)
    return qwix.apply_lora_to_model(base, provider, rngs=nnx.Rngs(1), **base.get_model_input())


def with_ours() -> nnx.Module:
    base = their_base()
    config = lora.LoraConfig(rank=RANK, alpha=16, target_modules=TARGETS)
    return lora.nnx.adapt(base, config, key=jax.random.key(1), **base.get_model_input())


def their_step(model: nnx.Module) -> Callable[[], object]:
    """The step of `PeftTrainer`, jitted as by itself."""
    check_trained(jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    trainer = PeftTrainer(model, optax.adamw(1e-4), TrainingConfig(eval_every_n_steps=10**6))
    step, _ = trainer.jit_train_and_eval_step()
    batch = inputs()
    return lambda: step(batch)[0]


def our_step() -> Callable[[], object]:
    """The step of `lora_jax.train.fit`, with its loss in chunks."""
    config = models.LlamaConfig.from_hf(
        {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": LAYERS, "num_attention_heads": 9, "num_key_value_heads": 3,
            "vocab_size": 49_152, "max_position_embeddings": 2048, "rope_theta": 10_000.0,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
        }
    )  # fmt: skip
    model = models.init(jax.random.key(0), config, remat="projections")
    targets = lora.LoraConfig(rank=RANK, alpha=16, target_modules=TARGETS)
    plan = lora.plan(targets, model.apply, model.params, jnp.asarray(TOKENS))
    trainable, frozen = lora.split(lora.init(jax.random.key(1), plan, model.params))
    check_trained(jax.tree.leaves(trainable))
    tx = optax.adamw(1e-4)
    step = jax.jit(make_step(lora_loss(model), tx), donate_argnums=0)
    state = [init_state(jax.random.key(0), trainable, tx)]
    places = np.arange(ROWS * LENGTH, dtype=np.int32).reshape(ROWS, LENGTH)
    batch = Batch(
        tokens=TOKENS[None],
        positions=places[:, :-1].reshape(1, -1),
        targets=TOKENS[:, 1:].reshape(1, -1),
        weights=np.ones((1, ROWS * (LENGTH - 1)), np.float32),
        segments=None,
    )

    def run() -> object:
        state[0], metrics = step(state[0], frozen, batch)
        return metrics.loss

    return run


def check_trained(leaves: list) -> None:
    count = sum(x.size for x in leaves)
    assert count == TRAINED, f"{count} trained numbers, expected {TRAINED}"


MAKERS = {
    THEIRS: lambda: their_step(with_qwix()),
    MIXED: lambda: their_step(with_ours()),
    OURS: our_step,
}


def timed(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of one call: by the clock, and of all its threads on the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def first_steps(rounds: int) -> tuple[dict[str, Callable], dict[str, list]]:
    """The steps, and the times of the first step of each, made anew in every round."""
    runs, times = {}, {name: [] for name in MAKERS}
    for _ in range(rounds):
        for name, make in MAKERS.items():
            runs[name] = make()
            jax.clear_caches()
            times[name].append(timed(runs[name]))
    return runs, times


def row(name: str, first: dict[str, list], later: dict[str, list]) -> dict:
    """Medians of one program, and of its ratios to ours within a round."""
    cells: dict = {"name": name}
    for step, times in (("step", later), ("first_step", first)):
        for clock in ("wall", "cpu"):
            seconds = {n: [t[clock] for t in found] for n, found in times.items()}
            cells[f"{step}_{clock}_s"] = statistics.median(seconds[name])
            cells[f"{step}_{clock}_over_ours"] = ratio(seconds, name, OURS)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--first-rounds", type=int, default=3)
    args = parser.parse_args()
    runs, first = first_steps(args.first_rounds)
    later = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            found = timed(run)
            if number:  # the first round warms up
                later[name].append(found)
    versions = {name: metadata.version(name) for name in ("google-tunix", "qwix", "flax")}
    report(
        "tunix_step",
        "How long is a LoRA step of google-tunix with qwix beside ours?",
        [row(name, first, later) for name in runs],
        versions=versions,
        rounds=args.rounds,
        first_rounds=args.first_rounds,
        load=os.getloadavg(),
    )


if __name__ == "__main__":
    main()
