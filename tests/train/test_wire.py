"""What devices send each other in a training step, read off XLA's program after partitioning."""

import dataclasses
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, train
from lora_jax.models import mixing
from lora_jax.models.mesh import entered, model_on, placement
from lora_jax.models.sharding import RULES
from lora_jax.train import mesh as meshes
from lora_jax.train import preparation
from lora_jax.train.loss import CHUNK_BYTES, losses_of

from benchmarks.collectives import Collective, collectives
from tests.support.mesh_runs import EXPERTS, KINDS, LLAMA, adapted, data, make

pytestmark = pytest.mark.once

# Two superblocks of codes along every input, so that two axes may divide them.
WIDE = dataclasses.replace(LLAMA, hidden_size=256, intermediate_size=512, head_dim=32)
RANK = 4
BLOCK = Counter({(256, 256): 4, (256, 512): 2, (512, 256): 1})  # q k v o, gate up, down
FACTORS = Counter({(256, RANK): 1, (512, RANK): 1})  # A of q and of down


class Sent(NamedTuple):
    """One array of a collective.

    Attributes:
      kind: `all-gather` and so on.
      dtype: as XLA spells it.
      shape: what a device has afterwards, without dims of size 1.
      loop: whether it is in the scan over layers or chunks.
      backward: whether it belongs to the backward pass.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    loop: bool
    backward: bool

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * {"u8": 1, "bf16": 2}.get(self.dtype, 4)


def sent(text: str) -> list[list[Sent]]:
    """The arrays of every collective of a program."""
    return [
        [
            Sent(one.kind, dtype, tuple(n for n in shape if n > 1), one.loop, _backward(one))
            for dtype, shape in one.arrays
        ]
        for one in collectives(text)
    ]


def _backward(one: Collective) -> bool:
    return "transpose(jvp" in one.line


@cache
def step_program(
    sizes: str,
    quantize: bool = False,
    chunk: int = CHUNK_BYTES,
    batch: int = 16,
    config: models.LlamaConfig = WIDE,
    **options: Any,
) -> list[list[Sent]]:
    """The collectives of a compiled training step."""
    model = models.init(jax.random.key(0), config, **options)
    if quantize:
        params = lora.quantize(model.params, r".*_proj", format="nf4")
        model = dataclasses.replace(model, params=params)
    axes = {a: int(n) for a, n in (part.split("=") for part in sizes.split(","))}
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    mesh = models.make_mesh(devices=devices, **axes)
    settings = EXPERTS if config.num_experts else {}
    params = lora.sharding.place(adapted(model, settings)[1], mesh, RULES)
    job = train.TrainConfig(batch_size=batch, buckets=1, steps=3, progress=False)
    at = placement(model, params)
    with entered(at):
        model, rows = model_on(model, params, at), meshes.rows_of(at, params)
        layout, total, _ = preparation.layout(model, data(), job, rows)
        tx = train.optimizer(job, total)
        trainable, frozen = lora.split(params)
        state = meshes.state_on(train.init_state(jax.random.key(0), trainable, tx), tx, at)
        losses = lora.lorafy(losses_of(model, rows, chunk_bytes=chunk), reverse_only=True)
        summed = train.summed_loss(lambda *inputs: losses(*inputs[:-1], lora_key=inputs[-1]))

        def loss(trainable, frozen, batch, key):
            return summed(lora.combine(trainable, frozen), batch, key)

        results = meshes.results(state, at)
        programs = train.Programs(train.make_step(loss, tx), donate=(0,), results=results)
        batch = meshes.batch_on(train.once(layout)[0], at)
        return sent(programs.compile(state, frozen, batch).as_text())


def arrays(program: list[list[Sent]], kind: str, **fields: Any) -> list[Sent]:
    """All arrays that collectives of a kind send, where these fields have these values."""
    every = (x for collective in program for x in collective if x.kind == kind)
    return [x for x in every if all(getattr(x, name) == value for name, value in fields.items())]


REMAT = pytest.mark.parametrize(
    "remat", [False, pytest.param(True, marks=pytest.mark.slow), "projections"]
)


@REMAT
def test_fsdp_gathers_a_weight_in_the_scan_once_forward_and_once_backward(remat):
    program = step_program("fsdp=4", remat=remat)
    for backward in (False, True):
        gathered = arrays(program, "all-gather", loop=True, backward=backward)
        assert Counter(x.shape for x in gathered) == BLOCK + FACTORS
    # Outside of the scan the head alone, once, and the tokens.
    outside = [x.shape for x in arrays(program, "all-gather", loop=False) if x.dtype == "f32"]
    assert outside == [(256, 128)]


@REMAT
def test_fsdp_gathers_the_codes_of_a_quantized_base(remat):
    program = step_program("fsdp=2", quantize=True, remat=remat)
    weights = sum(int(np.prod(shape)) * n for shape, n in BLOCK.items())
    factors = sum(4 * int(np.prod(shape)) * n for shape, n in FACTORS.items())
    for backward in (False, True):
        gathered = arrays(program, "all-gather", loop=True, backward=backward)
        codes = Counter(x.shape for x in gathered if x.dtype == "u8")
        assert sum(codes.values()) == 7
        # Half a byte a weight, and a float32 scale for 64 weights.
        assert sum(x.bytes for x in gathered) <= weights * (1 / 2 + 4 / 64) + factors


@pytest.mark.parametrize("sizes", ["data=8", "fsdp=4"])
def test_gradients_are_reduced_for_adapters_alone(sizes):
    program = step_program(sizes)
    reduced = arrays(program, "all-reduce") + arrays(program, "reduce-scatter")
    large = Counter(x.shape for x in reduced if x.shape)
    # A and B of q and of down, of one layer or of both.
    assert sum(large.values()) == 4
    assert all(RANK in shape for shape in large)


def test_logits_and_hidden_states_stay_with_their_rows():
    """No collective carries rows: the largest array outside of the scan is the head's weight."""
    program = step_program("fsdp=4")
    outside = [x for collective in program for x in collective if not x.loop]
    rows = [x for x in outside if x.kind != "all-gather" and x.shape]
    # The embedding of each device's tokens, whose features lie on all devices.
    assert {x.kind for x in rows} <= {"all-to-all"}


@pytest.mark.parametrize(
    "sizes", ["data=2,fsdp=2,tensor=2", pytest.param("data=2,fsdp=4", marks=pytest.mark.slow)]
)
def test_rows_over_two_axes_are_embedded_where_they_are(sizes):
    """No device has all rows or another part of the vocabulary, which is as large as the head."""
    program = step_program(sizes)
    outside = [x for collective in program for x in collective if not x.loop]
    gathered = [x for x in outside if x.kind == "all-gather" and x.dtype == "f32"]
    assert [x.shape[0] for x in gathered] == [256]  # the head alone
    assert "collective-permute" not in {x.kind for x in outside}


def test_the_head_is_gathered_once_for_all_chunks():
    program = step_program("fsdp=4", chunk=4 * 128 * 8)
    heads = [x for x in arrays(program, "all-gather") if x.shape == (256, 128)]
    assert [x.loop for x in heads] == [False]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["lora", "nf4", *(pytest.param(k, marks=SLOW) for k in ("gpt2", "classes of tokens"))]
)
def test_adapters_add_no_collective_to_tensor_parallelism(kind):
    """The forward pass of an adapted model has the collectives of the base, as many of each."""
    options, settings, _ = KINDS[kind]
    model = models.init(jax.random.key(0), WIDE) if kind in ("lora", "nf4") else make(**options)
    if kind == "nf4":
        params = lora.quantize(model.params, r".*_proj", format="nf4")
        model = dataclasses.replace(model, params=params)
    mesh = models.make_mesh(devices=jax.devices()[:2], tensor=2)
    tokens = np.zeros((2, 16), np.int32)

    def count(fn: Any, params: Any) -> Counter:
        placed = lora.sharding.place(params, mesh, RULES)
        with jax.set_mesh(mesh):
            text = str(jax.jit(fn).lower(placed, tokens).compile().as_text())
        return Counter(collective[0].kind for collective in sent(text))

    base = count(model.apply, model.params)
    assert base["all-reduce"] >= 2
    assert count(lora.lorafy(model.apply), adapted(model, settings)[1]) == base


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_context_axis_gathers_keys_and_values_alone(remat):
    """Those of whole rows, forward and backward, and their gradients are summed and scattered."""
    program = step_program("context=4", batch=4, remat=remat)
    whole, part = (4, 16, 8, 32), (4, 4, 8, 32)  # keys of 16 tokens, and of a device's four
    loops = [x for collective in program for x in collective if x.loop]
    moved = Counter((x.kind, x.shape, x.backward) for x in loops if x.kind != "all-reduce")
    assert moved == {
        ("all-gather", whole, False): 2,
        ("all-gather", whole, True): 2,
        ("reduce-scatter", part, True): 2,
    }
    # The gradients of the adapters; outside of the loop two numbers, and no hidden states.
    assert all(RANK in x.shape for x in loops if x.kind == "all-reduce")
    assert {(x.kind, x.shape) for c in program for x in c if not x.loop} == {("all-reduce", ())}


def test_a_context_axis_leaves_rows_and_heads_on_their_devices():
    program = step_program("fsdp=2,context=2,tensor=2", batch=4)
    gathered = Counter(
        x.shape for x in arrays(program, "all-gather", loop=True) if len(x.shape) > 2
    )
    assert gathered == {(2, 16, 4, 32): 4}  # of a device's rows and heads, forward and backward
    # The embedding goes from features to rows, and is never whole.
    assert not [x for x in arrays(program, "all-gather", loop=False) if len(x.shape) > 2]
    assert not arrays(program, "collective-permute")


MIXTURE = dataclasses.replace(WIDE, model_type="mixtral", num_experts=8, moe_intermediate_size=64)


@pytest.mark.parametrize("remat", [False, pytest.param("projections", marks=pytest.mark.slow)])
def test_an_expert_axis_sends_tokens_and_their_sums_alone(remat):
    """To the experts and back: in the forward pass, and again for the gradients."""
    program = step_program("expert=4", config=MIXTURE, remat=remat)
    whole, part = (4, 4, 16, 256), (4, 16, 256)  # the rows of four devices, and a device's own
    loops = [x for collective in program for x in collective if x.loop]
    moved = Counter((x.kind, x.shape, x.backward) for x in loops if x.shape[-1:] == (256,))
    reduced = {key: n for key, n in moved.items() if key[0] == "all-reduce"}
    assert moved - Counter(reduced) == {
        ("all-gather", whole, False): 1,
        # The tokens again, and the gradients of the sums.
        ("all-gather", whole, True): 2,
        ("reduce-scatter", part, False): 1,
        ("reduce-scatter", part, True): 1,
    }
    # Gradients of attention's adapters alone: each expert's adapter has one device.
    assert {x.shape for x in loops if x.kind == "all-reduce"} == {(RANK, 256)}
    # What tokens choose, and how much of it.
    others = {x.shape[-1] for x in loops if x.shape[-1:] != (256,) and x.kind != "all-reduce"}
    assert others == {2}


def test_experts_of_a_data_mesh_send_no_tokens():
    loops = [x for c in step_program("data=4", config=MIXTURE) for x in c if x.loop]
    assert {x.kind for x in loops} == {"all-reduce"}
    assert all(RANK in x.shape for x in loops)


def test_attention_in_parts_sends_no_heads(monkeypatch):
    """Its loop runs over parts of each device's own heads."""
    monkeypatch.setattr(mixing, "MOST_SCORES", 1)
    program = step_program("fsdp=2,tensor=2", batch=4)
    loops = [x for collective in program for x in collective if x.loop]
    gathered = {x.shape[-1] for x in loops if x.kind == "all-gather"}
    assert WIDE.head_dim not in gathered
    assert {x.kind for x in loops} <= {"all-gather", "all-reduce"}
