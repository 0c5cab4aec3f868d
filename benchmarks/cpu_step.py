"""Where does the time of a training step on a CPU go, and how near is it to the matrix products'?

    python benchmarks/cpu_step.py [--data ../shared/data] [--rounds 5]

SmolLM2-135M as `lora-jax train` loads it, float32, rank 8 on all linear layers, real texts.
`GFLOP/s` are the operations of a step over its fastest time, `products GFLOP/s` what the machine
reaches in the products of one layer with as many rows, `of them` their ratio. The rest
are shares of the time of a profiled step, by kind of operation.
"""

import argparse
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from common import add_data_option, report
from packing import DATA, Steps, examples

from lora_jax import models, train
from lora_jax.train.preparation import layout

# text, rows of a batch, packed
CASES = (("SST-2", 8, False), ("SST-2", 32, False), ("GSM8K", 4, False), ("SST-2", 2, True))
# What XLA's names of operations on a CPU begin with or hold, the first that fits.
KINDS = {
    "products": ("ynn_fusion", "dot", "custom-call"),
    "slices of stacked weights": ("dynamic-slice",),
    "stacked activations": ("dynamic-update-slice",),
    "zeros": ("wrapped_broadcast",),
    "transposes and copies": ("copy", "transpose"),
    "elementwise": ("",),
}


def items_of(model: models.Model, data, ours: Steps, **options) -> Iterator:
    """Batches of training without an end, after a step of every shape, which compiles it."""
    return itertools.cycle(ours.warm(layout(model, data, train.TrainConfig(seed=0, **options))))


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call."""
    # A library's worker threads spin for a while after its last call, on the cores that the other
    # one needs: whoever came second would pay for it.
    time.sleep(0.5)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def matrix_rate(model: models.Model, tokens: int) -> float:
    """FLOP/s of a layer's products, one after another, with so many rows; the best of ten."""
    c = model.config
    x, w = jnp.ones((tokens, c.hidden_size)), jnp.ones((c.hidden_size, c.intermediate_size))

    @jax.jit
    def run(x, up, down):
        return jax.lax.fori_loop(0, 8, lambda _, x: (x @ up) @ down * 1e-6, x)

    arguments = (x, w, w.T)
    jax.block_until_ready(run(*arguments))
    best = min(timed(lambda: jax.block_until_ready(run(*arguments))) for _ in range(10))
    return 8 * 2 * 2 * x.size * w.shape[1] / best


def shares(run: Callable[[], object]) -> dict[str, float]:
    """Shares of the time of all operations of a call, by kind."""
    seconds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (planes,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(planes)).planes:
            for event in (event for line in plane.lines for event in line.events):
                name = event.name
                # A loop's own event lasts as long as all that runs in it.
                if "hlo_op" in dict(event.stats) and not name.startswith(("while", "call")):
                    seconds[kind_of(name)] += event.duration_ns
    return {kind: seconds[kind] / seconds.total() for kind in KINDS}


def kind_of(operation: str) -> str:
    """The kind of an operation of XLA by its name."""
    return next(k for k, words in KINDS.items() if any(word in operation for word in words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser, "the files of SST-2 and GSM8K")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = models.load(models.find_smollm2(), remat="projections")
    ours = Steps(model)
    rows = []
    for name, size, packed in CASES:
        data = examples(DATA[name](options.data)[:400], model.tokenizer)
        batches = items_of(model, data, ours, batch_size=size, packing=packed)
        item = max(itertools.islice(batches, 8), key=lambda i: i.batch.tokens.size)
        best = min(timed(lambda item=item: ours(item)) for _ in range(options.rounds))
        rate, products = ours.flops(item) / best, matrix_rate(model, item.batch.tokens.size)
        rows.append(
            {
                "texts": name + " packed" * packed,
                "tokens": "x".join(str(n) for n in item.batch.tokens.shape[1:]),
                "ms": 1000 * best,
                "GFLOP/s": rate / 1e9,
                "products GFLOP/s": products / 1e9,
                "of them": rate / products,
                **shares(lambda item=item: ours(item)),
            }
        )
        print(rows[-1], flush=True)
    report("cpu_step", __doc__.splitlines()[0], rows)


if __name__ == "__main__":
    main()
