"""What does it cost to serve many adapters in one batch, beside one adapter, none, and PEFT's loop?

    python benchmarks/multi_adapter.py [--rows 64] [--rounds 7] [--counts 1 8 64 512 2048]

SmolLM2-135M, rank 8 on q and v, one decoding step with a KV cache for a batch of rows, each row
with an adapter of its own choice out of a stack of `count`; the gathering of the rows' adapters is
timed too, as it would be if every step had other rows. Tokens a second over those with one adapter
and over the plain base. PEFT's `adapter_names` on torch runs the same step (a forward pass over as
many tokens) with 1 and 64 adapters. One process, interleaved, medians.
"""

import argparse
import gc

import jax
import jax.numpy as jnp
import numpy as np
from common import interleaved, ratio, report

import lora_jax as lora
from lora_jax import models
from lora_jax.array import is_lora, is_stack
from lora_jax.multi.decode import runner

SLOTS = 64


def template(model):
    config = lora.LoraConfig(rank=8, target_modules=("q_proj", "v_proj"), init="random")
    tokens = jax.ShapeDtypeStruct((2, 8), "int32")
    plan = lora.plan(config, model.apply, model.params, tokens)
    return lora.init(jax.random.key(0), plan, model.params)


def filled(stacked, count: int):
    """A stack of `count` random adapters in bfloat16, as they would be served."""

    def fill(x):
        if not is_stack(x):
            return x

        def noise(array):
            shape = [*array.shape[: x.axis], count, *array.shape[x.axis + 1 :]]
            rng = np.random.default_rng(len(shape))
            return jnp.asarray(0.02 * rng.standard_normal(shape, np.float32), jnp.bfloat16)

        from dataclasses import replace

        scale = jnp.repeat(x.scale, count, x.axis)
        return replace(x, a=noise(x.a), b=noise(x.b), scale=scale)

    return jax.tree.map(fill, stacked, is_leaf=is_lora)


def decode(model, rows: int, many: bool):
    """One step: choose each row's adapter, read one token a row, write the next."""

    def step(params, ids, tokens, cache):
        chosen = lora.select(params, ids) if many else params
        decoder = runner(model.forward, chosen, rows, SLOTS)
        hidden, cache = decoder.apply(tokens, None, cache)
        return jnp.argmax(decoder.head(hidden)[:, 0], -1).astype(jnp.int32)[:, None], cache

    return jax.jit(step)


def peft_loop(source: str, rows: int, counts):
    """Functions of no argument: a forward pass of HF PEFT with `adapter_names`."""
    from pathlib import Path

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    path = Path(source)
    base = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="a0")
    for number in range(1, max(counts)):
        model.add_adapter(f"a{number}", config)
    model.eval()
    tokens = torch.ones((rows, 1), dtype=torch.long)

    def forward(count):
        names = [f"a{row % count}" for row in range(rows)]
        with torch.no_grad():
            return model(input_ids=tokens, adapter_names=names).logits.argmax(-1)

    def plain():
        with torch.no_grad(), model.disable_adapter():
            return model(input_ids=tokens).logits.argmax(-1)

    return {f"peft {n}": (lambda n=n: forward(n)) for n in counts} | {"peft base": plain}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64, 512, 2048])
    parser.add_argument("--no-peft", action="store_true")
    options = parser.parse_args()
    source, rows = str(models.find_smollm2()), options.rows
    model = models.load(source)
    one = lora.stack([template(model)])
    tokens = jnp.ones((rows, 1), jnp.int32)
    many, none = decode(model, rows, True), decode(model, rows, False)
    cache = runner(model.forward, lora.select(one, np.zeros(rows, int)), rows, SLOTS).cache
    plain_cache = model.init_cache(rows, SLOTS)
    stacks = {count: filled(one, count) for count in options.counts}
    runs = {
        f"ours {count}": lambda s=stacks[count], c=count: many(
            s, jnp.arange(rows, dtype=jnp.int32) * 37 % c, tokens, cache
        )
        for count in options.counts
    }
    runs["ours base"] = lambda: none(model.params, None, tokens, plain_cache)
    if not options.no_peft:
        runs |= peft_loop(source, rows, (1, min(64, rows)))
    gc.collect()
    times = interleaved(runs, rounds=options.rounds, warmup=2)
    compiled = many._cache_size()
    for count in options.counts:  # other ids, same shapes
        many(stacks[count], jnp.zeros(rows, jnp.int32), tokens, cache)
    assert many._cache_size() == compiled
    table = []
    for name in runs:
        side, which = name.split()
        first = f"{side} {options.counts[0]}" if side == "ours" else "peft 1"
        table.append(
            {
                "side": side,
                "adapters": which,
                "tokens/s": rows / float(np.median(times[name])),
                "/ one adapter": ratio(times, first, name),
                "/ plain base": ratio(times, f"{side} base", name),
            }
        )
    extra = {"batch": rows}
    if not options.no_peft:
        extra["ours / peft at 64"] = ratio(times, f"peft {min(64, rows)}",
                                           f"ours {min(64, max(options.counts))}")  # fmt: skip
    report("multi_adapter", __doc__.splitlines()[0], table, **extra)
    print({k: v for k, v in extra.items()})


if __name__ == "__main__":
    main()
