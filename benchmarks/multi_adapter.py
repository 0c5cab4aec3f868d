"""What does it cost to serve many adapters in one batch, beside one adapter, none, and PEFT's loop?

    python benchmarks/multi_adapter.py [--rows 64] [--rounds 11] [--counts 1 8 64 512 2048]

SmolLM2-135M, rank 8 on q and v, one decoding step with a KV cache for a batch of rows, each row
with an adapter of its own choice out of a stack of `count`. "kept" has the rows' adapters gathered
before, as the server does when it admits a request; otherwise the gathering is timed too, as it
would be if every step had other rows. The cache is written in place, as there. Tokens a second
over those with one adapter, chosen likewise, and over the plain base. PEFT's `adapter_names` on
torch runs the same step without a cache (a forward pass over as many tokens) with 1 and 64
adapters, and transformers runs it without any. One process, interleaved, medians.

Both sides multiply the base's weights for every row, which bounds the ratio between them: `added`
is what adapters cost beyond that, in ms a step over each side's own plain base.

    python benchmarks/multi_adapter.py --strategies [--dim 576] [--rounds 11]

compares the strategies instead (`adapter_strategy`): four square layers with adapters of rank 8,
over shapes from decoding to training and to an adapter for each token; time and temporary memory
of each over those of "gathered", and which of them the rule takes.
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
from lora_jax.models.decoding import runner
from lora_jax.transform.many.grouped import choose_strategy

SLOTS = 64


def template(model):
    config = lora.LoraConfig(rank=8, target_modules=("q_proj", "v_proj"), init="random")
    tokens = jax.ShapeDtypeStruct((2, 8), "int32")
    plan = lora.plan(config, model.apply, model.params, tokens)
    return lora.init(jax.random.key(0), plan, model.params)


def filled(stacked, count: int):
    """A stack of `count` random adapters, in float32 as the model."""

    def fill(x):
        if not is_stack(x):
            return x

        def noise(array):
            shape = [*array.shape[: x.axis], count, *array.shape[x.axis + 1 :]]
            rng = np.random.default_rng(len(shape))
            return jnp.asarray(0.02 * rng.standard_normal(shape, np.float32))

        from dataclasses import replace

        scale = jnp.repeat(x.scale, count, x.axis)
        return replace(x, a=noise(x.a), b=noise(x.b), scale=scale)

    return jax.tree.map(fill, stacked, is_leaf=is_lora)


def decode(model, rows: int):
    """One step: choose each row's adapter, read one token a row, write the next.

    `(params, ids or None, tokens, cache) -> (tokens, cache)`, the cache donated.
    """

    def step(params, ids, tokens, cache):
        chosen = params if ids is None else lora.select(params, ids)
        decoder = runner(model.forward, chosen, rows, SLOTS)
        hidden, cache = decoder.apply(tokens, None, cache)
        return jnp.argmax(decoder.head(hidden)[:, 0], -1).astype(jnp.int32)[:, None], cache

    return jax.jit(step, donate_argnums=(3,))


def again(step, params, ids, tokens, cache):
    """A function of no argument that takes the step at the same place each time."""
    kept = [jax.tree.map(jnp.copy, cache)]

    def run():
        found, cache = step(params, ids, tokens, kept.pop())
        kept.append(cache._replace(length=jnp.zeros_like(cache.length)))
        return found

    return run


def difference(times, base) -> float:
    """The median over rounds of what a step takes beyond the other's."""
    return float(np.median(np.subtract(times, base)))


def peft_loop(source: str, rows: int, counts):
    """Functions of no argument: a forward pass of PEFT with `adapter_names`, and without PEFT."""
    from copy import deepcopy
    from pathlib import Path

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    path = Path(source)
    base = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    bare = deepcopy(base).eval()
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
        with torch.no_grad():
            return bare(input_ids=tokens).logits.argmax(-1)

    return {f"peft {n}": (lambda n=n: forward(n)) for n in counts} | {"peft base": plain}


# rows, tokens of each, adapters in the stack, whether each token has its own, whether it trains
SHAPES = (
    (64, 1, 1, False, False),
    (64, 1, 8, False, False),
    (64, 1, 64, False, False),
    (64, 1, 512, False, False),
    (8, 256, 4, False, False),
    (8, 256, 4, False, True),
    (64, 4, 4, False, True),
    (8, 256, 8, True, False),
    (8, 256, 8, True, True),
    (8, 256, 512, True, False),
)


def way_runs(rows: int, tokens: int, slots: int, by_token: bool, train: bool, dim: int):
    """Each strategy's compiled call, its temporary bytes, and the rule's choice."""
    layers, rank = 4, 8
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((layers, dim, dim), np.float32) / dim**0.5)
    x = jnp.asarray(rng.standard_normal((rows, tokens, dim), np.float32))

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    config = lora.LoraConfig(rank=rank, target_modules=("w",), roles={"w": "sio"}, init="random")
    plan = lora.plan(config, fn, {"w": w}, x)
    one = lora.stack([lora.init(jax.random.key(0), plan, {"w": w})], train=True)
    stack = filled(one, slots)
    ids = rng.integers(0, slots, (rows, tokens) if by_token else rows).astype(np.int32)
    trainable, frozen = lora.split(stack)
    strategies = ["gathered", "grouped"] + (["ragged"] if slots <= 8 else [])
    found = {}
    for strategy in strategies:
        run = lora.lorafy(fn, adapter_strategy=strategy, reverse_only=train)

        def forward(trainable, frozen, x, ids, run=run):
            return jnp.sum(run(lora.combine(trainable, frozen), x, adapter_ids=ids) ** 2)

        step = jax.jit(jax.grad(forward) if train else forward)
        compiled = step.lower(trainable, frozen, x, ids).compile()
        size = compiled.memory_analysis().temp_size_in_bytes
        found[strategy] = (lambda c=compiled: c(trainable, frozen, x, ids)), size
    rule = choose_strategy(ids.size, 1 if by_token else tokens, slots, rank)
    return found, rule


def compare_strategies(options):
    table = []
    for shape in SHAPES:
        rows, tokens, slots, by_token, train = shape
        runs, rule = way_runs(*shape, options.dim)
        times = interleaved({n: run for n, (run, _) in runs.items()},
                            rounds=options.rounds, warmup=2)  # fmt: skip
        for strategy, (_, size) in runs.items():
            table.append(
                {
                    "rows": rows,
                    "tokens": tokens,
                    "adapters": slots,
                    "for each": "token" if by_token else "row",
                    "step": "training" if train else "forward",
                    "strategy": strategy,
                    "the rule's": strategy == rule,
                    "ms": 1e3 * float(np.median(times[strategy])),
                    "time / gathered": ratio(times, strategy, "gathered"),
                    "temporary MB": size / 1e6,
                }
            )
        gc.collect()
    report("multi_adapter_ways", "Which strategy for many adapters is cheaper?", table,
           dim=options.dim)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64, 512, 2048])
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--strategies", action="store_true", help="compare the strategies instead")
    parser.add_argument("--dim", type=int, default=576)
    options = parser.parse_args()
    if options.strategies:
        return compare_strategies(options)
    source, rows = str(models.find_smollm2()), options.rows
    model = models.load(source)
    one = lora.stack([template(model)])
    tokens = jnp.ones((rows, 1), jnp.int32)
    step = decode(model, rows)
    cache = runner(model.forward, lora.select(one, np.zeros(rows, int)), rows, SLOTS).cache
    plain_cache = model.init_cache(rows, SLOTS)
    stacks = {count: filled(one, count) for count in options.counts}
    numbers = jnp.arange(rows, dtype=jnp.int32) * 37
    runs = {}
    for count in options.counts:
        chosen = numbers % count
        runs[f"ours {count}"] = again(step, stacks[count], chosen, tokens, cache)
        kept = lora.select(stacks[count], chosen)
        runs[f"ours {count} kept"] = again(step, kept, None, tokens, cache)
    runs["ours base"] = again(step, model.params, None, tokens, plain_cache)
    if not options.no_peft:
        runs |= peft_loop(source, rows, (1, min(64, rows)))
    gc.collect()
    times = interleaved(runs, rounds=options.rounds, warmup=2)
    compiled = step._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    for count in options.counts:  # other ids, same shapes
        again(step, stacks[count], jnp.zeros(rows, jnp.int32), tokens, cache)()
    assert step._cache_size() == compiled  # pyright: ignore[reportAttributeAccessIssue]
    table = []
    for name in runs:
        side, which = name.split(maxsplit=1)
        fewest = options.counts[0] if side == "ours" else 1
        first = f"{side} {fewest}" + (" kept" if "kept" in which else "")
        table.append(
            {
                "side": side,
                "adapters": which,
                "tokens/s": rows / float(np.median(times[name])),
                "/ one adapter": ratio(times, first, name),
                "/ plain base": ratio(times, f"{side} base", name),
                "added": 1e3 * difference(times[name], times[f"{side} base"]),
            }
        )
    extra = {"batch": rows}
    if not options.no_peft:
        most = min(64, max(options.counts))
        peft = f"peft {min(64, rows)}"
        extra["ours / peft at 64"] = ratio(times, peft, f"ours {most}")
        extra["ours / peft at 64, kept"] = ratio(times, peft, f"ours {most} kept")
    report("multi_adapter", __doc__.splitlines()[0], table, **extra)
    print({k: v for k, v in extra.items()})


if __name__ == "__main__":
    main()
