"""The memory of a training step, estimated from a configuration: beside XLA's own analysis."""

import json
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from lora_jax import LoraConfig, analysis, models
from lora_jax.analysis.step_memory import fit, liveness, shapes
from lora_jax.analysis.step_memory.compiled import temporaries
from lora_jax.analysis.step_memory.program import HABITS
from lora_jax.analysis.step_memory.shapes import SHAPES, config_of
from lora_jax.analysis.step_memory.step import StepSettings, abstract_step
from lora_jax.cli import main
from lora_jax.models.sharding import RULES, make_mesh
from lora_jax.sharding import shardings

from tests.support.gguf_files import TIED, tensors_of, write_model

pytestmark = pytest.mark.once

GIB = 2**30
LLAMA = {
    **SHAPES["llama-2-7b"], "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2000,
}  # fmt: skip
# What a CPU computes in: in bfloat16 it would hold float32 copies, as no accelerator does.
CPU: dict[str, Any] = dict(batch=2, length=256, dtype="float32", backend="reference")
METHODS = {
    "full": dict(adapter=None),
    "lora": dict(adapter=LoraConfig(rank=8)),
    "qlora": dict(adapter=LoraConfig(rank=8), quantize="nf4"),
}


_FOUND: dict[str, analysis.MemoryEstimate] = {}


def estimated(**options) -> analysis.MemoryEstimate:
    """The estimate of LLAMA, made once: half a second each, and several tests compare the same."""
    key = repr(sorted(options.items()))
    if key not in _FOUND:
        _FOUND[key] = analysis.memory(LLAMA, **options)
    return _FOUND[key]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("batch", "remat"),
    [
        (2, True),
        *(pytest.param(16, each, marks=pytest.mark.slow) for each in (True, "projections", False)),
    ],
)
def test_an_estimate_is_within_a_tenth_of_the_compiled_step(method, batch, remat):
    options = {**CPU, **METHODS[method], "batch": batch, "remat": remat}
    found = estimated(**options)
    compiled = analysis.memory(LLAMA, exact=True, **options)
    assert compiled.exact and compiled.arguments == found.arguments
    assert found.total == pytest.approx(compiled.total, rel=0.1)


def test_a_program_for_a_tpu_needs_what_libtpu_states_as_its_peak():
    stats = SimpleNamespace(
        argument_size_in_bytes=100,
        temp_size_in_bytes=90,
        output_size_in_bytes=30,
        alias_size_in_bytes=30,
        peak_memory_in_bytes=170,
    )

    def program(platform):
        sharding = SimpleNamespace(device_set=(SimpleNamespace(platform=platform),))
        return SimpleNamespace(memory_analysis=lambda: stats, input_shardings=((sharding,), {}))

    assert temporaries(program("tpu")) == 70
    assert temporaries(program("gpu")) == 90


@pytest.mark.parametrize("mesh", [{}, pytest.param({"data": 2}, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("remat", ["projections", pytest.param(False, marks=pytest.mark.slow)])
def test_an_estimate_of_packed_rows_is_within_a_tenth_of_the_compiled_step(remat, mesh):
    options = {**CPU, **METHODS["lora"], "remat": remat, "mesh": mesh}
    found = estimated(**options, packing=True)
    compiled = analysis.memory(LLAMA, exact=True, packing=True, **options)
    assert compiled.arguments == found.arguments
    assert found.total == pytest.approx(compiled.total, rel=0.1)
    # The numbers of the texts: int32 (1, 2, 256), here one row on each of the mesh's devices.
    one = estimated(**options)
    assert found.arguments - one.arguments == 4 * 2 * 256 // found.devices
    assert found.described.startswith("packed 2 x 256 tokens")


def test_the_papers_reduction_of_parameters():
    adapter = LoraConfig(rank=8, target_modules=("q_proj", "v_proj"))
    assert analysis.parameters("llama-2-7b", adapter) == (4_194_304, 6_742_609_920)


def test_what_is_counted_of_a_known_model():
    """By hand: 2 bytes a weight, 4 an adapter's, two moments, a gradient; NF4 4.25 bits."""
    found = analysis.memory("llama-2-7b", adapter=LoraConfig(rank=16), length=128)
    per_block = 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert found.trainable == 32 * per_block == 39_976_960
    assert "39,976,960 || all params: 6,778,392,576 || trainable%: 0.5898" in found.table()
    scales = 4 * 32 * 7  # a float32 scale a matrix and block stays frozen
    assert found.weights == 2 * 6_738_415_616 + scales
    assert found.adapters == found.gradients == 4 * found.trainable
    assert found.optimizer == pytest.approx(2 * found.adapters, rel=1e-4)
    held = analysis.memory("llama-2-7b", adapter=LoraConfig(rank=16), quantize="nf4", length=128)
    matrices = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert held.weights == found.weights - 2 * matrices + matrices * 17 // 32
    full = analysis.memory("llama-2-7b", adapter=None, length=128)
    assert full.weights + full.gradients == 8 * 6_738_415_616
    assert full.optimizer == pytest.approx(8 * 6_738_415_616, rel=1e-6)
    assert 16 * 6_738_415_616 < full.total < 16.5 * 6_738_415_616


def test_what_is_kept_follows_remat():
    """L blocks of B rows of T tokens: the stream before each, or that and the projections."""
    kept = {
        remat: estimated(**CPU, **METHODS["lora"], remat=remat).kept
        for remat in (True, "projections", False)
    }
    tokens = 4 * 2 * 256 * 4  # of all blocks, in bytes a channel
    assert kept[True] == tokens * 512
    assert kept["projections"] == tokens * (512 + 512 + 2 * 256 + 512 + 2 * 1408)
    assert kept[False] > kept["projections"] + 4 * 4 * 2 * 8 * 256 * 256


@pytest.mark.parametrize(("optimizer", "copies"), [("lion", 1), ("sgd", 0)])
def test_optimizers_hold_their_copies(optimizer, copies):
    found = analysis.memory(LLAMA, optimizer=optimizer, length=16)
    assert found.optimizer == pytest.approx(copies * found.adapters, abs=4096)


def test_a_mesh_spreads_weights_and_rows():
    options: dict[str, Any] = {**CPU, **METHODS["full"], "batch": 8, "remat": True}
    one, fsdp, both, data = (
        estimated(mesh=mesh, **options)
        for mesh in ({}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 8})
    )
    norms = 4 * (2 * 4 + 1) * 512
    assert fsdp.devices == 8
    assert fsdp.weights == fsdp.gradients == (one.weights - norms) // 8 + norms
    assert fsdp.kept == data.kept == one.kept // 8
    assert fsdp.all_devices == one.arguments
    assert "on each device" in fsdp.table() and "spread over fsdp 8" in fsdp.table()
    assert both.weights == fsdp.weights and both.kept == one.kept // 2
    assert data.weights == one.weights and data.copied >= 3 * data.weights


def test_adapters_are_spread_as_their_weights_are():
    options: dict[str, Any] = dict(batch=4, length=16, mesh={"fsdp": 4})
    split = 3 * 512 + 512 + 2 * 512 + 1408  # A of q k v, o, gate up, down: by inputs
    whole = 512 + 2 * 256 + 512 + 2 * 1408 + 512
    assert analysis.memory(LLAMA, **options).adapters == 4 * 4 * 8 * (split // 4 + whole)
    # 1408 inputs are no whole superblocks for 4: of `down_proj` the outputs are split, and so B.
    split, whole = split - 1408 + 512, whole - 512 + 1408
    spread = analysis.memory(LLAMA, quantize="nf4", **options)
    assert spread.adapters == 4 * 4 * 8 * (split // 4 + whole)


def _slow(method: str, remat, **mesh: int):
    return pytest.param(method, mesh, remat, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("method", "mesh", "remat"),
    [
        ("lora", dict(data=2, fsdp=2, tensor=2), True),
        ("full", dict(fsdp=8), True),
        _slow("lora", True, data=8),
        _slow("lora", False, data=8),
        _slow("lora", True, fsdp=8),
        _slow("lora", False, fsdp=8),
        _slow("lora", "projections", fsdp=4, data=2),
        _slow("lora", True, tensor=4),
        _slow("lora", False, tensor=4),
        _slow("lora", True, fsdp=2, tensor=4),
        _slow("lora", False, fsdp=2, tensor=4),
        _slow("qlora", True, data=8),
        _slow("qlora", True, fsdp=8),
        _slow("qlora", False, fsdp=8),
        _slow("full", True, data=8),
        _slow("full", False, fsdp=8),
        _slow("full", True, data=2, fsdp=4),
        _slow("full", True, tensor=4),
        _slow("full", False, fsdp=2, tensor=4),
        _slow("full", True, fsdp=2, tensor=4),
        ("lora", dict(context=4), True),
        _slow("lora", False, context=4),
        _slow("lora", "projections", context=8),
        _slow("lora", True, data=2, context=2, tensor=2),
        _slow("qlora", True, data=2, context=4),
        _slow("full", True, context=4),
        _slow("full", True, fsdp=2, context=2, tensor=2),
    ],
    ids=str,
)
def test_an_estimate_on_a_mesh_is_within_a_tenth_of_the_compiled_step(method, mesh, remat):
    options = {**CPU, **METHODS[method], "batch": 8, "mesh": mesh, "remat": remat}
    found = estimated(**options)
    compiled = analysis.memory(LLAMA, exact=True, **options)
    assert compiled.arguments == found.arguments
    # XLA's scheduler for a CPU gathers all weights of a layer before the first is used; for a GPU,
    # whose memory the estimate is for, it gathers each where it is used (benchmarks/estimate.py).
    least = 0.7 if mesh.get("fsdp", 1) > 1 else 0.9
    assert least < found.total / compiled.total < 1.1


def test_a_row_that_the_devices_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="`length` has rows of 254 tokens, which the 4 devices"):
        estimated(length=254, mesh=dict(context=4))


@pytest.mark.parametrize("name", ["gpt2", "bert-base"])
def test_other_families(name):
    found = analysis.memory(name, length=64)
    assert 0 < found.trainable < found.parameters / 50
    assert found.weights == pytest.approx(2 * (found.parameters - found.trainable), rel=1e-5)
    assert found.activations > found.kept == 12 * 64 * 768 * 2


# The encoder's blocks, the decoder's, and what goes from one to the other.
T5 = dict(
    model_type="t5", vocab_size=2000, d_model=512, d_kv=64, d_ff=1408, num_layers=4, num_heads=8,
    feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, {"data": 2}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_an_estimate_of_two_texts_is_within_a_tenth_of_the_compiled_step(method, mesh):
    options = {**CPU, **METHODS[method], "length": 128, "mesh": mesh}
    found = analysis.memory(T5, **options)
    compiled = analysis.memory(T5, exact=True, **options)
    assert compiled.arguments == found.arguments
    assert found.total == pytest.approx(compiled.total, rel=0.1)


def test_two_texts_are_read_whole():
    found = analysis.memory(T5, length=64, adapter=LoraConfig(rank=2, target_modules=["q"]))
    # In bfloat16, what each block is given: of the encoder's and of the decoder's.
    assert found.activations > found.kept >= 2 * 4 * 64 * 512 * 2
    assert analysis.memory(T5, length=513).settings.length == 513  # distances have no end
    with pytest.raises(ValueError, match="axis 'context' divides the tokens of a row, and `t5` ne"):
        analysis.memory(T5, length=64, mesh={"context": 2})
    with pytest.raises(ValueError, match="`packing` .* and `t5` is an encoder-decoder: leave"):
        analysis.memory(T5, length=64, packing=True)


def test_what_is_alive_in_a_program_that_is_known():
    """Two products and an elementwise chain between them; a loop; a donated argument."""

    def fn(x, w):
        y = jnp.tanh(x @ w)
        return jnp.sum(jnp.sin(y) * 2 + 1), y @ w

    x, w = (jax.ShapeDtypeStruct(s, "float32") for s in ((256, 512), (512, 512)))
    product = 256 * 512 * 4
    found = liveness.alive(fn, x, w)
    assert found.bytes == pytest.approx(2 * product, abs=16)
    assert found.largest[0] == ("tanh float32[256, 512]", product)

    def loop(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), jnp.sin(x)), x, w)

    stack = jax.ShapeDtypeStruct((4, 512, 512), "float32")
    found = liveness.alive(loop, x, stack)  # carry, stack of results, slice, product
    assert found.bytes == product + 4 * product + 512 * 512 * 4 + product

    def update(x, g):
        return x - 0.1 * jnp.sin(g), g @ g.T

    assert liveness.alive(update, x, x, donate=(0,)).bytes == 256 * 256 * 4
    assert liveness.alive(update, x, x).bytes == 256 * 256 * 4 + product


def test_what_a_gpus_compiler_leaves_out():
    """Conversions beside products, zeros of several loops, slices between two products."""

    def alive(fn, *args) -> float:
        """In arrays of 256 x 512 numbers of 4 bytes."""
        return liveness.alive(fn, *args, habits=HABITS["gpu"]).bytes / (256 * 512 * 4)

    x = jax.ShapeDtypeStruct((256, 512), "bfloat16")
    w = jax.ShapeDtypeStruct((512, 512), "float32")

    def converted(x, w):
        y = (x.astype(jnp.float32) @ w).astype(jnp.bfloat16)
        return jnp.matmul(y, y.T, preferred_element_type=jnp.float32)

    assert alive(converted, x, w) == 1 / 2 + 1 / 2  # y, and 256 x 256 results

    def chained(c, x):
        for f in (jnp.sin, jnp.cos, jnp.exp):
            x = jax.lax.scan(lambda c, row, f=f: (c, f(row) * c), c, x)[1]
        return c + x.sum(), None

    start = jax.ShapeDtypeStruct((), "float32")
    stack = jax.ShapeDtypeStruct((3, 256, 512), "float32")
    # The slice or the loop before, a loop's own stack, and the zeros of the last.
    assert alive(lambda c, xs: jax.lax.scan(chained, c, xs)[0], start, stack) == pytest.approx(
        3, abs=1e-3
    )

    def used_twice(x, w):
        y = x @ w
        wide = jnp.sin(jnp.concatenate([y] * 4, axis=1))
        return jnp.sum(wide @ wide.T) + y @ w, None

    x = jax.ShapeDtypeStruct((256, 512), "float32")
    ws = jax.ShapeDtypeStruct((3, 512, 512), "float32")
    # Carry, y, the wide array and its square, without the slice, which is twice an x.
    assert alive(lambda x, ws: jax.lax.scan(used_twice, x, ws)[0], x, ws) == 1 + 1 + 4 + 1 / 2


def test_weights_of_a_block_that_waits_are_gathered_then():
    """Of two blocks in a loop's iteration, as in Qwen3.5, where four were counted at once."""

    def peak(prevent_cse: bool) -> int:
        block = jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(x @ w) @ w.T), prevent_cse=prevent_cse)

        def loss(x, ws):
            return jnp.sum(jax.lax.scan(lambda x, w: (block(block(x, w[0]), w[1]), None), x, ws)[0])

        x = jax.ShapeDtypeStruct((512, 512), "float32")
        ws = [jax.ShapeDtypeStruct((4, 512, 2048), "float32")] * 2
        options: dict[str, Any] = dict(gathered=[1, 8, 8], habits=HABITS["gpu"])
        return liveness.alive(jax.grad(loss), x, ws, **options).bytes

    # The other weight, less what the first backward pass hands on.
    assert peak(False) - peak(True) > 512 * 2048 * 4 / 2


def test_what_no_axis_divides_is_counted_whole():
    """A gate of one output in blocks of 64 inputs, as `models.load(mesh=)` leaves it."""
    config = {
        **LLAMA, "model_type": "qwen2_moe", "hidden_size": 64, "intermediate_size": 128,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
    }  # fmt: skip
    options: dict[str, Any] = dict(
        quantize="nf4", length=16, adapter=LoraConfig(target_modules=("q_proj",)), batch=2,
        backend="reference",
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"holds all of `\S+shared_expert_gate.kernel`") as said:
        found = analysis.memory(config, mesh={"fsdp": 2}, **options)
        base = abstract_step(config_of(config)[1], found.settings).base
        places = shardings(base, make_mesh(fsdp=2, devices=jax.devices()[:2]), RULES)
    assert said[0].filename == __file__
    scales = 4 * 4  # of the adapter, in each layer; they do not train
    assert found.weights == scales + sum(
        math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
        for x, place in zip(jax.tree.leaves(base), jax.tree.leaves(places), strict=True)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:every device holds all of")
def test_an_axis_may_cut_a_block():
    """Five blocks of inputs on two devices: each holds the matrix whole."""
    sizes = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 10)
    config = {**LLAMA, **sizes, "hidden_size": 320, "intermediate_size": 640, "vocab_size": 512}
    options = {**CPU, **METHODS["qlora"], "batch": 8, "length": 128, "mesh": {"tensor": 2}}
    found, compiled = (analysis.memory(config, exact=each, **options) for each in (False, True))
    assert compiled.arguments == found.arguments
    assert found.total == pytest.approx(compiled.total, rel=0.1)


def test_what_would_fit_is_said(monkeypatch):
    """By a model of memory that is a product: batch, twice that without rematerialization."""

    # 1024 devices divide all of its matrices.
    sizes = dict(hidden_size=2**17, intermediate_size=2**17, num_attention_heads=1024)
    wide = {**LLAMA, **sizes, "num_key_value_heads": 1024}

    class Found(NamedTuple):
        model: str
        settings: StepSettings

        @property
        def total(self) -> int:
            s = self.settings
            weights = 8 if s.adapter is None else 4 if s.quantize is None else 1
            return (s.batch * (1 if s.remat == "full" else 2) + weights) * GIB // s.mesh["fsdp"]

        def fits(self, device_memory: int) -> bool:
            return self.total <= device_memory

    def lines(limit: int, **settings) -> list[str]:
        found: Any = Found("m", StepSettings(**settings))
        return fit.remedies(wide, found, limit * GIB)

    def estimated(name: str, config: Any, settings: StepSettings) -> Any:
        tried.append(settings.mesh["fsdp"])
        return Found(name, settings)

    tried = []
    monkeypatch.setattr(fit, "estimate", estimated)
    assert lines(8, batch=4) == []
    assert lines(8, batch=4, remat=False) == [
        "remat full: 8.00 GiB",
        "batch 2, accumulation 2: 8.00 GiB",
        "batch 1, accumulation 4: 6.00 GiB",
        "fsdp 2 as it is, batch 4: 6.00 GiB on each device",
    ]
    assert lines(7, adapter=None) == [
        "LoRA instead of full fine-tuning: 5.00 GiB",
        "QLoRA, base in nf4: 2.00 GiB",
        "fsdp 2 as it is, batch 2: 5.00 GiB on each device",
    ]
    found = lines(2, batch=8)
    together = "batch 1, accumulation 8; QLoRA, base in nf4"
    assert found[0] == f"all of these together ({together}): 2.00 GiB"
    assert found[1] == "fsdp 8 as it is, batch 8: 1.50 GiB on each device"
    assert lines(2, adapter=None, batch=8)[-1].startswith("fsdp 8 as it is, batch 8: 2.00 GiB")
    # Of 10 numbers of devices only the largest are tried where these are not enough.
    tried.clear()
    assert lines(1, batch=8) == [
        f"no change here is enough: with {together}; fsdp 1024 a device still needs 1.00 GiB"
    ]
    assert tried.count(1024) == 2 and set(tried) == {1, 1024}
    assert lines(1, quantize="nf4") == [
        "no change here is enough: with fsdp 1024 a device still needs 1.00 GiB"
    ]


def test_the_fastest_that_fits_is_chosen(monkeypatch):
    """By a model of memory: a row takes 1, 4 or 9 GiB by what is kept of it, the weights 2."""
    tried = []

    class Found(NamedTuple):
        settings: StepSettings
        weights: int = 2 * GIB

        @property
        def kept(self) -> int:
            s = self.settings
            row = {"full": 1, "projections": 4, "none": 9}.get(str(s.remat), 3)
            return row * s.batch * GIB // (s.mesh["fsdp"] * s.mesh["data"])

        @property
        def arguments(self) -> int:
            return self.weights

        @property
        def total(self) -> int:
            return self.weights + self.kept

        def fits(self, device_memory: int) -> bool:
            return self.total <= device_memory

    def estimated(name: str, config: Any, settings: StepSettings) -> Any:
        tried.append((settings.batch, settings.remat))
        return Found(settings)

    def chosen(limit: int, **settings) -> tuple:
        found = fit.fastest(config_of(LLAMA)[1], StepSettings(**settings), limit * GIB).settings
        assert found.batch * found.accumulation == 8
        return found.batch, found.accumulation, found.remat

    monkeypatch.setattr(fit, "estimate", estimated)
    monkeypatch.setattr(fit, "remedies", lambda *_: ["more devices"])
    eight = dict(batch=4, accumulation=2, length=2048)
    assert chosen(80, **eight) == (8, 1, "none")
    assert chosen(40, **eight) == (4, 2, "none")
    assert chosen(10, **eight) == (2, 4, "projections")
    assert chosen(5, **eight) == (2, 4, "full")
    # Each device has at least a row.
    assert chosen(5, **eight, mesh={"fsdp": 4}) == (8, 1, "full")
    # A policy stays.
    assert chosen(8, **eight, remat="dots_saveable") == (2, 4, "dots_saveable")
    offloaded = dict(eight, remat="projections", offload=True)
    assert chosen(80, **offloaded) == (8, 1, "projections")
    # A CPU computes again faster than it stores and reads.
    assert chosen(80, **eight, backend="reference") == (8, 1, "projections")
    tried.clear()
    chosen(5, **eight)
    assert (8, "none") not in tried and len(tried) == len(set(tried)) <= 5
    message = (
        r"`device_memory` is 2.00 GiB, and the smallest step takes about 3.00 GiB \(batch_size 1, "
        r"accumulation 8, remat full\). A shorter `max_length` (?s:.)* more devices"
    )
    with pytest.raises(ValueError, match=message):
        chosen(2, **eight)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("24 GiB", 24 * GIB), ("1.5gb", 15 * 10**8), (2 * GIB, 2 * GIB)],
)
def test_sizes_are_spelled_in_two_ways(text, size):
    assert fit.parse_bytes(text) == size


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "mistralai/Mistral-7B-v0.1", "a/b"])
def test_a_hub_id_may_have_dots(monkeypatch, tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    asked = []
    monkeypatch.setattr(shapes, "snapshot", lambda id, **_: asked.append(id) or tmp_path)
    assert shapes.config_of(name)[0] == name and asked == [name]
    # Paths of files are none.
    for path in ("models/config.json", "../model", "./model"):
        with pytest.raises(FileNotFoundError, match="no file or directory"):
            shapes.config_of(path)


def test_a_gguf_file_has_the_estimate_of_its_configuration(tmp_path):
    path = write_model(tmp_path / "m.gguf", TIED, tensors_of(models.init(jax.random.key(0), TIED)))
    found, wanted = (analysis.memory(x, length=64, dtype="float32") for x in (path, TIED))
    assert found.model == "m.gguf" and found.to_dict() == {**wanted.to_dict(), "model": "m.gguf"}


def test_tensor_divides_t5_and_images_have_one_length():
    t5: dict[str, Any] = dict(
        model_type="t5", vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    one, two = (analysis.memory(t5, length=8, mesh={"tensor": n}) for n in (1, 2))
    # Scales and the tables of distances, 2 bytes a number, lie on both devices.
    copied = 2 * (7 * 16 + 2 * 32 * 2)
    assert two.weights == pytest.approx((one.weights - copied) / 2 + copied, abs=64)
    assert two.activations < one.activations
    vit: dict[str, Any] = dict(
        model_type="vit", architectures=["ViTForImageClassification"], hidden_size=16,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8,
        patch_size=4,
    )  # fmt: skip
    found = analysis.memory(vit, batch=2, mesh={"data": 2})
    assert found.settings.length == 5
    # The image, a target, its weight and place beside the moments of the adapters.
    assert found.optimizer > 2 * found.adapters + 4 * 3 * 8 * 8
    with pytest.raises(ValueError, match="`length` 8 is for texts, and an image of this `vit` has"):
        analysis.memory(vit, length=8)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("llama-2-8b", {}, "`llama-2-8b` is no file or directory, and no known shape .nearest: "
         "`llama-2-7b`"),
        ({**LLAMA, "model_type": "llama5"}, {}, "model_type `llama5` is not one of"),
        ({**LLAMA, "moe_layers": 3}, {}, "field `moe_layers` = 3 is not known for model_type"),
        (7, {}, "`model` must be a name, a path, .* got int"),
        (LLAMA, dict(batch=0), "`batch` must be an integer of at least 1, got 0"),
        (LLAMA, dict(length=5000), "`length` 5000 is more than the model's context of 4096"),
        (LLAMA, dict(dtype="int3"), "`dtype` must be one of float32, bfloat16"),
        (LLAMA, dict(remat="some"), "`remat` must be one of none, projections, full"),
        (LLAMA, dict(optimizer="adam2"), "`optimizer` must be one of adamw, lion"),
        (LLAMA, dict(adapter=None, quantize="nf4"), "`quantize` is for a frozen base"),
        (LLAMA, dict(quantize="nf3"), "nf3"),
        (LLAMA, dict(mesh={"model": 2}), "`mesh` has no axis 'model'; expected data, fsdp, tensor"),
        (LLAMA, dict(mesh={"fsdp": 0}), "`mesh` axis .fsdp. must be a whole number above 0"),
        (LLAMA, dict(mesh={"fsdp": 4}), "`batch` 1 cannot be divided among the 4 devices"),
        (LLAMA, dict(mesh={"tensor": 3}), ".tensor. = 3 does not divide `num_attention_heads` = 8"),
        ("gpt2", dict(mesh={"tensor": 2}), ".tensor. is not estimated for model_type `gpt2`"),
        (LLAMA, dict(adapter=LoraConfig(target_modules=("q_prj",))), "q_prj"),
        (LLAMA, dict(balance_experts=True), "`balance_experts` is for a mixture of experts whose"),
        ("bert-base", dict(balance_experts=True), "`balance_experts` is for a mixture of experts"),
        ("bert-base", dict(packing=True), "`packing` is for language models, and `bert` is an enc"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(model, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        analysis.memory(model, **{"length": 16, **options})
    assert "\n" not in str(caught.value)


def test_a_size_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`device_memory` must be a size above 0 such as 80GB"):
        fit.parse_bytes("80 apples")
    with pytest.raises(ValueError, match="needs a unit: write 16GB or 16GiB"):
        fit.parse_bytes("16")


def test_the_command_reads_a_directory_and_says_what_fits(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    argv = ["estimate", str(tmp_path), "--max-length", "64", "--device-memory", "100MB"]
    assert main([*argv, "--method", "full", "lora"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()[1:4]]
    assert [row[1] for row in rows] == ["method", "full", "LoRA"]
    assert [row[-1] for row in rows] == ["fits", "no", "yes"]
    assert "full, does not fit; what would:\n  LoRA instead of full fine-tuning: 0.0" in out


def test_the_command_writes_json(capsys):
    argv = ["estimate", "smollm2-135m", "--max-length", "64", "--method", "lora", "--json"]
    assert main([*argv, "--rank", "8", "--target-modules", "q_proj", "v_proj"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["estimates"]
    assert found["parameters"] == 134_515_008 + found["trainable"]
    assert found["settings"]["adapter"]["r"] == 8
    assert found["total"] == found["arguments"] + found["temporaries"]


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert main(["estimate", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(
        f"lora-jax estimate: {tmp_path}/config.json:1: not JSON"
    )
