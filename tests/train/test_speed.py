"""Model FLOPs against formulas, the speed in the records, and traces."""

import contextlib
import dataclasses
import gzip
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, train
from lora_jax.models import kernels
from lora_jax.train.flops import peak_flops

from tests.support.train_toys import VOCAB, WIDTH, numbers, toy_fit

pytestmark = pytest.mark.once

B, T, R = 2, 16, 3
CONFIG = models.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=32,
)  # fmt: skip
BATCH = train.Batch(
    tokens=np.zeros((B, T), np.int32),
    positions=np.arange(B * T, dtype=np.int32),
    targets=np.zeros(B * T, np.int32),
    weights=np.ones(B * T, np.float32),
)


def llama_flops(adapters: int, products: int) -> int:
    """FLOPs of a step: PaLM's formula, with so many products of each base weight."""
    c = CONFIG
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = 2 * c.hidden_size * (queries + keys) + 3 * c.hidden_size * c.intermediate_size
    weights = c.num_hidden_layers * layer
    attention = 3 * c.num_hidden_layers * 4 * T * queries
    head = 2 * c.hidden_size * c.vocab_size
    each = 2 * products * weights + 6 * adapters + attention + products * head
    return B * T * each


def adapted(model: Any, **fields: Any) -> Any:
    config = lora.LoraConfig(rank=R, target_modules="all-linear", **fields)
    plan = lora.plan(config, model.apply, model.params, BATCH.tokens)
    return lora.init(jax.random.key(0), plan, model.params)


def of_lora(model: Any, **fields: Any) -> int | None:
    trainable, frozen = lora.split(adapted(model, **fields))
    return train.training_flops(train.lora_loss(model), trainable, frozen, BATCH, None)


def test_lora_takes_two_products_of_each_base_weight_and_three_of_its_own():
    model = models.init(jax.random.key(0), CONFIG)
    trainable, _ = lora.split(adapted(model))
    count = sum(x.size for x in jax.tree.leaves(trainable))
    assert of_lora(model) == llama_flops(count, products=2)


@pytest.mark.parametrize("remat", [True, "projections"])
def test_recomputation_is_not_counted(remat):
    model = models.init(jax.random.key(0), CONFIG)
    assert of_lora(models.init(jax.random.key(0), CONFIG, remat=remat)) == of_lora(model)
    trainable, frozen = lora.split(adapted(model))
    chunked = train.losses_of(model, chunk_bytes=4 * CONFIG.vocab_size * 4)

    def loss(trainable: Any, frozen: Any) -> Any:
        each = lora.lorafy(chunked)(
            lora.combine(trainable, frozen), BATCH.tokens, BATCH.positions, BATCH.targets
        )
        return jnp.sum(each)

    assert train.training_flops(loss, trainable, frozen) == of_lora(model)


def test_a_quantized_base_counts_as_the_base():
    model = models.init(jax.random.key(0), CONFIG)
    params = lora.quantize(model.params, ("q_proj", "up_proj"), format="nf4", block_size=16)
    held = dataclasses.replace(model, params=params)
    assert any(map(lora.quant.is_quant, jax.tree.leaves(held.params, is_leaf=lora.quant.is_quant)))
    assert of_lora(held) == of_lora(model)


@pytest.mark.parametrize("backend", ["gpu_interpret", "tpu_interpret"])
def test_kernels_of_a_quantized_product_count_its_flops(backend):
    w = jax.random.normal(jax.random.key(0), (256, 128))
    q = dataclasses.replace(
        lora.quant.quantize_array(w, format="nf4", block_size=64), backend=backend
    )
    for rows in (16, 2048):  # a fused product, and a decoded copy

        def loss(x, q):
            return jnp.sum(lora.quant.matmul(x, q))

        x = jnp.ones((rows, 256), jnp.bfloat16)
        assert train.training_flops(loss, x, q) == 2 * 2 * rows * 256 * 128


def test_attention_by_a_kernel_counts_as_xla_s():
    q, k = jnp.ones((2, 128, 4, 64)), jnp.ones((2, 128, 2, 64))

    def xla(both):
        q, k = both
        return jnp.sum(jax.nn.dot_product_attention(q, k, k, is_causal=True))

    def splash(both):
        q, k = both
        options: dict[str, Any] = dict(window=None, scale=None, softcap=None, interpret=True)
        return jnp.sum(kernels.splash(q, k, k, None, **options))

    for loss in (xla, splash):
        assert train.training_flops(loss, (q, k)) == 3 * 4 * q.size * 128


def test_full_fine_tuning_takes_three_products():
    model = models.init(jax.random.key(0), CONFIG)
    none = jax.tree.map(lambda x: None, model.params)
    found = train.training_flops(train.lora_loss(model), model.params, none, BATCH, None)
    assert found == llama_flops(0, products=3)


X, W = jnp.ones((5, 4)), jnp.ones((4, 4))


def repeated(w, x):
    return jnp.sum(jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0])


def branches(w, x):
    return jnp.sum(jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x @ w @ w, x))


def unknown_if(last):
    """A branch with an endless loop, first or last."""

    def fn(w, x):
        return jnp.sum(jax.lax.cond(x[0, 0] > 0, *([endless, once][:: 1 if last else -1]), x) @ w)

    def endless(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ jnp.ones((4, 4)), x)

    def once(x):
        return x @ jnp.ones((4, 4))

    return fn


def until(w, x):
    frozen = jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ jnp.ones((4, 4)), x)
    return jnp.sum(frozen @ w)


def stopped(w, x):
    return jnp.sum(jax.lax.stop_gradient(x @ w) @ w)


PRODUCT = 2 * 5 * 4 * 4


# `x` has no gradient at first: only the forward product and the weight's gradient.
@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda w, x: jnp.sum(x @ w), 2 * PRODUCT),
        (lambda w, x: jnp.sum(jax.jit(jnp.matmul)(x, w) @ w), 5 * PRODUCT),
        (lambda w, x: jnp.sum(jax.checkpoint(lambda w: x @ w @ w)(w)), 5 * PRODUCT),
        (repeated, 7 * 3 * PRODUCT),
        (branches, 5 * PRODUCT),
        (until, None),
        (unknown_if(last=True), None),
        (unknown_if(last=False), None),
        (stopped, (2 + 2) * PRODUCT),
        (lambda w, x: jnp.sum(jnp.argmax(x @ w) + x), 2 * PRODUCT),
        (lambda w, x: jnp.sum(w * 2.0), 0),
    ],
)
def test_products_by_what_has_a_gradient(fn, expected):
    assert train.training_flops(fn, W, X) == expected


def test_a_convolution_counts_its_window():
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))

    def fn(kernel, image):
        numbers = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return jnp.sum(out)

    assert train.training_flops(fn, kernel, image) == 2 * 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)


def test_a_grouped_product_counts_the_rows_and_not_the_groups():
    rows, experts, sizes = jnp.ones((6, 4)), jnp.ones((3, 4, 5)), jnp.array([2, 0, 4])

    def fn(experts, rows):
        return jnp.sum(jax.lax.ragged_dot(rows, experts, sizes))

    assert train.training_flops(fn, experts, rows) == 2 * 2 * 6 * 4 * 5


def test_known_chips_have_a_peak():
    class Device:
        device_kind = ""

    def peak(kind: str) -> float | None:
        device: Any = Device()
        device.device_kind = kind
        return peak_flops(device)

    # Names as jax.Device.device_kind spells them.
    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == 989e12
    assert (peak("NVIDIA H100 PCIe"), peak("TPU v5 lite"), peak("TPU v5p")) == (
        756e12,
        197e12,
        459e12,
    )
    assert peak("NVIDIA L4") == 121e12 and peak("NVIDIA L40S") == 362e12
    assert peak("cpu") is None


def test_records_have_the_padding_and_the_flops():
    result = toy_fit(evals=0, accumulation=2, steps=3)
    records = [r for r in result.history if r["kind"] == "train"]
    (shape,) = result.compiled
    for record in records:
        assert record["padding"] == 1 - record["tokens"] / math.prod(shape[:3])
        assert "mfu" not in record  # of a CPU the peak is not known
        # A dense layer on embeddings without a gradient, its adapter of rank 2, and a tied head.
        layer = 2 * WIDTH * (WIDTH + 2 * 2 + 3 * 2) * math.prod(shape[:3])
        head = 2 * 2 * WIDTH * VOCAB * shape[0] * shape[3]
        flops = record["flops_per_second"] * record["seconds"]
        assert flops == pytest.approx(layer + head)
    assert result.first_step > records[0]["seconds"]


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ("1:1", ["begin", 1, "end", 2, 3, 4, 5]),
        ("2:3", [1, "begin", 2, 3, "end", 4, 5]),
        ("4:5", [1, 2, 3, "begin", 4, 5, "end"]),
    ],
)
def test_a_trace_has_the_steps_that_were_named(tmp_path, monkeypatch, profile, expected):
    seen = []

    @contextlib.contextmanager
    def trace(directory):
        assert directory == str(tmp_path / "profile")
        seen.append("begin")
        yield
        seen.append("end")

    monkeypatch.setattr("jax.profiler.trace", trace)
    hooks = train.Hooks(record=lambda record: seen.append(record["step"]))
    toy_fit(tmp_path, hooks=hooks, evals=0, steps=5, profile=profile)
    assert seen == expected


def test_steps_to_trace_are_checked(tmp_path):
    for wrong in ("3", "0:2", "3:2", "a:b", "1:2:3"):
        with pytest.raises(ValueError, match="`profile` must be the first and the last step"):
            train.TrainConfig(output_dir=tmp_path, profile=wrong)
    with pytest.raises(ValueError, match="`profile` needs an `output_dir`"):
        train.TrainConfig(profile="2:3")
    with pytest.raises(ValueError, match="`profile` is '6:7', but the run ends after step 5"):
        toy_fit(tmp_path, steps=5, profile="6:7")
    assert not list(tmp_path.iterdir())


def test_a_warm_up_ends_before_the_run():
    train.TrainConfig(steps=5, warmup=5)
    with pytest.raises(ValueError, match="`warmup` is 6 steps, but the run ends after step 5"):
        train.TrainConfig(steps=5, warmup=6)
    with pytest.raises(ValueError, match="`warmup` is 90 steps, but the run ends after step"):
        toy_fit(steps=None, epochs=1, warmup=90)


def test_a_trace_of_some_steps_is_read_by_the_profilers(tmp_path):
    whole = toy_fit(evals=0, steps=5)
    traced = toy_fit(tmp_path, evals=0, steps=5, profile="2:3")
    assert numbers(traced.history) == numbers(whole.history)
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/*.trace.json.gz")  # for Perfetto
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("step" in str(e.get("name", "")) for e in events)
    (planes,) = trace.parent.glob("*.xplane.pb")  # for TensorBoard
    names = {plane.name for plane in jax.profiler.ProfileData.from_file(str(planes)).planes}
    assert "/host:CPU" in names
