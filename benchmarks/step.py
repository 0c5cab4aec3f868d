"""What does a LoRA step cost beside full fine-tuning, and beside LoRA written by hand?

    python benchmarks/step.py [--rounds 9] [--batch 4] [--length 128] [--layers 30]

Whole optimizer steps (forward, backward, AdamW) of a SmolLM2-135M-shaped model on the same batch,
in one process, interleaved; ratios are medians over rounds. Also: dot operations in the optimized
HLO, temporary bytes, optimizer bytes, and the time to trace, lower and compile.
"""

import argparse
import dataclasses
import time

import handwritten
import jax
import jax.numpy as jnp
import optax
from common import interleaved, ratio, report

import lora_jax as lora
from lora_jax import models


def smollm2_config(layers: int) -> models.LlamaConfig:
    return models.LlamaConfig.from_hf(
        {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": layers, "num_attention_heads": 9, "num_key_value_heads": 3,
            "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
        }
    )  # fmt: skip


def cross_entropy(logits, tokens):
    target = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits[:, :-1], axis=-1) - target[..., 0])


def step_of(loss, tx):
    """An AdamW step of `loss(trainable, frozen, tokens)`; repeatable: nothing is donated."""

    def step(trainable, state, frozen, tokens):
        value, grads = jax.value_and_grad(loss)(trainable, frozen, tokens)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return step


def compiled(name: str, loss, tx, trainable, frozen, tokens) -> dict:
    """Compiles a step and says what it is made of."""
    state = tx.init(trainable)
    start = time.perf_counter()
    traced = jax.jit(step_of(loss, tx)).trace(trainable, state, frozen, tokens)
    traced_at = time.perf_counter()
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    text = program.as_text()
    return {
        "name": name,
        "run": lambda: program(trainable, state, frozen, tokens),
        "dots": text.count(" dot(") + text.count("__onednn$matmul") + text.count("ynn_fusion"),
        "temp_mib": program.memory_analysis().temp_size_in_bytes / 2**20,
        "adapter_mib": _bytes(trainable) / 2**20,
        "optimizer_mib": (_bytes(state) - 4) / 2**20,
        "trace_s": traced_at - start,
        "lower_s": lowered_at - traced_at,
        "compile_s": done - lowered_at,
    }


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def variants(config: models.LlamaConfig, tokens) -> list[dict]:
    """Full fine-tuning and LoRA as `lora-jax train` runs them; LoRA plainly, and by hand."""
    tx = optax.adamw(1e-4)
    plain = models.init(jax.random.key(0), config)
    # What training uses: only the projections are kept for the backward pass.
    kept = models.Model(dataclasses.replace(plain.forward, remat="projections"), plain.params)

    def loss_of(model):
        return lambda params, tokens: cross_entropy(model.apply(params, tokens), tokens)

    def adapted(model, **options):
        call = lora.lorafy(loss_of(model), strict=True, **options)
        return lambda trainable, frozen, tokens: call(lora.combine(trainable, frozen), tokens)

    lora_config = lora.LoraConfig(rank=8, target_modules="all-linear")
    plan = lora.plan(lora_config, loss_of(plain), plain.params, tokens)
    lora_params = lora.init(jax.random.key(0), plan, plain.params)
    trainable, frozen = lora.split(lora_params)

    def hand_loss(adapters, params, tokens):
        logits = handwritten.logits(adapters, params, tokens, config=config, scale=2.0)
        return cross_entropy(logits, tokens)

    full = loss_of(kept)
    factors = handwritten.factors(lora_params)
    losses = [
        jax.jit(adapted(kept, reverse_only=True))(trainable, frozen, tokens),
        jax.jit(hand_loss)(factors, plain.params, tokens),
    ]
    assert abs(float(losses[0]) - float(losses[1])) < 1e-4, losses
    as_trained = adapted(kept, reverse_only=True)
    return [
        compiled("full, as trained", lambda p, _, t: full(p, t), tx, plain.params, {}, tokens),
        compiled("LoRA, as trained", as_trained, tx, trainable, frozen, tokens),
        compiled("lorafy(loss)", adapted(plain), tx, trainable, frozen, tokens),
        compiled("by hand", hand_loss, tx, factors, plain.params, tokens),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=30)
    options = parser.parse_args()
    config = smollm2_config(options.layers)
    shape = (options.batch, options.length)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)
    rows = variants(config, tokens)
    runs = {row["name"]: row.pop("run") for row in rows}
    times = interleaved(runs, rounds=options.rounds)
    for row in rows:
        row["step_s"] = sorted(times[row["name"]])[options.rounds // 2]
        row["step / full"] = ratio(times, row["name"], "full, as trained")
        row["step / by hand"] = ratio(times, row["name"], "by hand")
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        row["temp / by hand"] = row["temp_mib"] / by_name["by hand"]["temp_mib"]
    report("step", __doc__.splitlines()[0], rows, options=vars(options))


if __name__ == "__main__":
    main()
