"""What does the transform cost to trace, lower, compile and run, beside LoRA by hand and qwix?

    python benchmarks/overhead.py [--layers 12] [--rounds 9]

A linen transformer (width 512, hidden 2048, 2 x 64 tokens), rank 8 on its six matrices a layer,
gradient of a loss with respect to the adapters; unrolled, and as one scan over layers. Ratios are
to LoRA written by hand into the same modules; medians over rounds, interleaved in one process.
qwix (if it is installed) adapts the same modules in its own way.
"""

import argparse
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
from common import interleaved, ratio, report

import lora_jax as lora

WIDTH, HIDDEN, HEADS, RANK, SCALE = 512, 2048, 8, 8, 2.0
NAMES = ("query", "key", "value", "out", "up", "down")


class HandDense(nn.Module):
    """A dense layer with LoRA written into it: what a careful user would write."""

    features: int

    @nn.compact
    def __call__(self, x):
        w = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        a = self.param("lora_a", nn.initializers.normal(0.02), (x.shape[-1], RANK))
        b = self.param("lora_b", nn.initializers.normal(0.02), (RANK, self.features))
        return x @ w + SCALE * ((x @ a) @ b)


class PlainDense(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, use_bias=False, name="dense")(x)


class Block(nn.Module):
    dense: type[nn.Module]

    @nn.compact
    def __call__(self, x, _=None):
        def linear(name, features, x):
            return self.dense(features, name=name)(x)

        h = nn.LayerNorm(name="norm1")(x)
        q, k, v = (
            linear(n, WIDTH, h).reshape(*x.shape[:2], HEADS, -1) for n in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + linear("out", WIDTH, mixed.reshape(x.shape))
        h = jax.nn.gelu(linear("up", HIDDEN, nn.LayerNorm(name="norm2")(x)))
        return x + linear("down", WIDTH, h), None


class Net(nn.Module):
    dense: type[nn.Module]
    layers: int
    scan: bool

    @nn.compact
    def __call__(self, x):
        if not self.scan:
            for i in range(self.layers):
                x, _ = Block(self.dense, name=f"layer_{i}")(x)
            return x
        stacked = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        return stacked(self.dense, name="layers")(x, None)[0]


def loss_of(fn):
    return lambda *args: jnp.mean(jnp.square(fn(*args)))


def ours(layers: int, scan: bool, x):
    net = Net(PlainDense, layers, scan)
    params = net.init(jax.random.key(0), x)
    loss = loss_of(net.apply)
    config = lora.LoraConfig(rank=RANK, alpha=RANK * SCALE, target_modules="all-linear")
    plan = lora.plan(config, loss, params, x)
    trainable, frozen = lora.split(lora.init(jax.random.key(1), plan, params))
    adapted = lora.lorafy(loss, strict=True)
    return (lambda t, f, x: adapted(lora.combine(t, f), x)), (trainable, frozen, x)


def _partitioned(module, params, x, is_adapter):
    """Gradient arguments of a module whose adapters are ordinary parameters."""
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    mine = [is_adapter(jax.tree_util.keystr(path)) for path, _ in flat]
    trainable = [leaf for (_, leaf), own in zip(flat, mine, strict=True) if own]
    frozen = [leaf for (_, leaf), own in zip(flat, mine, strict=True) if not own]
    loss = loss_of(module.apply)

    def split_loss(trainable, frozen, x):
        a, b = iter(trainable), iter(frozen)
        return loss(jax.tree.unflatten(tree, [next(a) if own else next(b) for own in mine]), x)

    return split_loss, (trainable, frozen, x)


def by_hand(layers: int, scan: bool, x):
    net = Net(HandDense, layers, scan)
    return _partitioned(net, net.init(jax.random.key(0), x), x, lambda name: "lora_" in name)


def with_qwix(layers: int, scan: bool, x):
    import qwix

    provider = qwix.LoraProvider(module_path=".*/dense", rank=RANK, alpha=RANK * SCALE)
    net = qwix.apply_lora_to_model(Net(PlainDense, layers, scan), provider)
    params = net.init(jax.random.key(0), x)
    found = sum("_lora_a" in jax.tree_util.keystr(p)
                for p, _ in jax.tree_util.tree_leaves_with_path(params))  # fmt: skip
    assert found == len(NAMES) * (1 if scan else layers), f"qwix made {found} adapters"
    return _partitioned(net, params, x, lambda name: "_lora_" in name)


def prepare(make, layers: int, scan: bool, x) -> dict:
    loss, args = make(layers, scan, x)
    program = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
    text = program.as_text()
    return {
        "loss": loss,
        "args": args,
        "run": lambda: program(*args),
        "dots": text.count(" dot(") + text.count("onednn$matmul"),
        "temp_mib": program.memory_analysis().temp_size_in_bytes / 2**20,
    }


def build_times(made: dict, rounds: int) -> dict[str, list[tuple[float, float, float]]]:
    """Seconds to trace, lower and compile each variant afresh, in turn."""
    times: dict = {name: [] for name in made}
    for _ in range(rounds):
        for name, one in made.items():
            jax.clear_caches()
            start = time.perf_counter()
            traced = jax.jit(jax.value_and_grad(one["loss"])).trace(*one["args"])
            first = time.perf_counter()
            lowered = traced.lower()
            second = time.perf_counter()
            lowered.compile()
            done = time.perf_counter()
            times[name].append((first - start, second - first, done - second))
    return times


def compare(layers: int, scan: bool, rounds: int) -> list[dict]:
    x = jax.random.normal(jax.random.key(2), (2, 64, WIDTH))
    makers = {"lora_jax": ours, "by hand": by_hand, "qwix": with_qwix}
    try:
        import qwix  # noqa: F401
    except ImportError:
        print("qwix is not installed: left out")
        makers.pop("qwix")
    made = {name: prepare(make, layers, scan, x) for name, make in makers.items()}
    steps = interleaved({name: one["run"] for name, one in made.items()}, rounds=3 * rounds)
    builds = build_times(made, max(3, rounds // 3))
    rows = []
    for name, one in made.items():
        pairs = list(zip(builds[name], builds["by hand"], strict=True))

        def part(i, pairs=pairs):
            return statistics.median(a[i] / b[i] for a, b in pairs)

        rows.append(
            {
                "layers": "scanned" if scan else "unrolled",
                "variant": name,
                "trace": part(0),
                "lower": part(1),
                "compile": part(2),
                "all three": statistics.median(sum(a) / sum(b) for a, b in pairs),
                "step": ratio(steps, name, "by hand"),
                "dots": one["dots"],
                "temp": one["temp_mib"] / made["by hand"]["temp_mib"],
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    rows = [r for scan in (False, True) for r in compare(options.layers, scan, options.rounds)]
    report("overhead", __doc__.splitlines()[0], rows, options=vars(options))


if __name__ == "__main__":
    main()
