"""What is kept for the backward pass changes no number, wherever it lies."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

import lora_jax as lora
from lora_jax import models
from lora_jax.analysis.step_memory.compiled import placement
from lora_jax.analysis.step_memory.mesh import placed
from lora_jax.analysis.step_memory.step import StepSettings, abstract_step, spread
from lora_jax.models.mesh import entered
from lora_jax.models.registry import forward_of
from lora_jax.models.remat import remat_name

from tests.support.tiny import SMALL

pytestmark = pytest.mark.once

POLICIES = jax.checkpoint_policies
OFFLOADED = POLICIES.offload_dot_with_no_batch_dims("device", "pinned_host")
CASES = {
    "none": dict(remat="none"),
    "full": dict(remat="full"),
    "projections": dict(remat="projections"),
    "a policy's name": dict(remat="dots_with_no_batch_dims_saveable"),
    "a policy": dict(remat=POLICIES.save_only_these_names("projection")),
    "full, offloaded": dict(remat="full", offload=True),
    "projections, offloaded": dict(remat="projections", offload=True),
    "products, offloaded": dict(remat="dots_with_no_batch_dims_saveable", offload=True),
    "a policy that offloads": dict(remat=OFFLOADED),
}
CONFIG = dataclasses.replace(SMALL, num_hidden_layers=3)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)


def adapter_gradient(**options):
    """The function from adapters to their gradient, as training has it, and the adapters."""
    model = models.init(jax.random.key(0), CONFIG, **options)
    config = lora.LoraConfig(rank=2, target_modules="all-linear", init="random")
    plan = lora.plan(config, model.apply, model.params, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    trainable, frozen = lora.split(lora.init(jax.random.key(1), plan, model.params))
    apply = lora.lorafy(model.apply, reverse_only=True)

    def loss(trainable):
        return jnp.sum(jnp.sin(apply(lora.combine(trainable, frozen), TOKENS)))

    return jax.grad(loss), trainable


def test_blocks_in_turns_are_computed_again_one_at_a_time():
    """Else XLA holds a whole turn of Gemma 4: 1,321 MiB for 639 on an H200, ahead of time."""
    sizes = dict(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    kinds = ["sliding_attention", "full_attention"] * 2
    gemma = dict(
        sizes, model_type="gemma4_text", global_head_dim=12, sliding_window=4, layer_types=kinds,
        hidden_size_per_layer_input=0, num_kv_shared_layers=0,
    )  # fmt: skip
    for raw, barriers in ((gemma, True), (dict(sizes, model_type="llama"), False)):
        forward = forward_of(models.config_from_hf(raw), remat="full")

        def loss(params, forward=forward):
            return jnp.sum(forward.apply(params, TOKENS))

        text = jax.jit(jax.grad(loss)).lower(forward.shapes()).as_text()
        assert ("optimization_barrier" in text) == barriers


QUICK = ("full", "projections", "full, offloaded", "projections, offloaded")


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_gradients_are_those_of_no_rematerialization(case):
    gradient, trainable = adapter_gradient(**CASES[case])
    got = jax.jit(gradient)(trainable)
    want = jax.jit(adapter_gradient()[0])(trainable)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def kept(**options):
    """Shapes of what the forward scan keeps for the backward one, and where they lie."""
    gradient, trainable = adapter_gradient(**options)
    text = str(jax.make_jaxpr(gradient)(trainable))
    # Of the three layers and the two rows of nine tokens.
    rows = re.escape("[3,2,9,")
    return {found for found in re.findall(rf"f32(?:<host>)?{rows}\d+\]", text)}


def test_full_keeps_what_goes_from_block_to_block():
    assert kept(remat="full") == {"f32[3,2,9,32]"}
    # Widths of the block's input and outputs, of the keys and values, and of the MLP.
    assert kept(remat="projections") == {"f32[3,2,9,32]", "f32[3,2,9,16]", "f32[3,2,9,64]"}


def test_what_is_offloaded_lies_on_the_host():
    assert kept(remat="full", offload=True) == {"f32<host>[3,2,9,32]"}
    assert kept(remat="projections", offload=True) == {
        "f32<host>[3,2,9,32]", "f32<host>[3,2,9,16]", "f32<host>[3,2,9,64]"
    }  # fmt: skip


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(remat="everything"),
         "`remat` must be one of none, projections, full, .*got 'everything'"),
        (dict(remat="save_only_these_names"), "makes a policy from arguments: pass what `jax"),
        (dict(offload=True), '`offload` is for `remat` full, projections, .* got "none": choose'),
        (dict(remat="dots_saveable", offload=True), '`offload` is for .* got "dots_saveable"'),
        (dict(remat=OFFLOADED, offload=True), "or pass a policy that offloads, .*, without `off"),
    ],
)  # fmt: skip
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        models.init(jax.random.key(0), SMALL, **options)


def test_an_encoder_is_not_offloaded():
    config = models.config_from_hf({"model_type": "bert", "architectures": ["BertModel"]})
    with pytest.raises(ValueError, match="`offload` is for decoders, and `bert` is an encoder"):
        models.init(jax.random.key(0), config, remat="full", offload=True)


def test_names():
    assert [remat_name(x) for x in (True, False, "full")] == ["full", "none", "full"]
    assert remat_name(OFFLOADED) == "offload_dot_with_no_batch_dims"


APART = {"expert": 4, "fsdp": 2}


@pytest.mark.parametrize(
    ("form", "mesh", "remat"),
    [
        (None, {"fsdp": 8}, "none"),
        ("nf4", {"fsdp": 8}, "none"),
        (None, APART, "none"),
        (None, APART, "projections"),
    ],
    ids=str,
)
def test_nothing_of_other_devices_is_kept(form, mesh, remat):
    """Neither the gathered experts, the one that each tile of rows picks, nor others' tokens."""
    config = dataclasses.replace(
        CONFIG, model_type="mixtral", num_experts=8, hidden_size=128, head_dim=32,
        moe_intermediate_size=256,
    )  # fmt: skip
    settings = StepSettings(
        adapter=lora.LoraConfig(rank=3, target_modules=("q_proj", "experts.down_proj")),
        quantize=form, batch=8, length=8, remat=remat, mesh=mesh, backend="reference",
    )  # fmt: skip
    at = placement(settings)
    step = abstract_step(config, settings, at=at)
    places = spread(step, settings)
    specs = (places.state, places.frozen, places.batch)
    args = placed((step.state, step.frozen, step.batch), specs, at.mesh)
    with entered(at):
        loops = scans(jax.make_jaxpr(step.fn)(*args).jaxpr)
    found = [x.aval for eqn in loops for x in eqn.outvars[eqn.params["num_carry"] :]]
    found = [x for x in found if x.shape[0] == config.num_hidden_layers]
    assert len(found) > (10 if remat == "none" else 5)
    # The fewest bytes of experts: the codes of down. What experts make of others' tokens is more.
    assert max(x.size for x in found) < 3 * 8 * 256 * 128 // 2
    # The factors that a tile picks, and a float32 copy of what a token's two experts make.
    tails = {(str(x.dtype), *x.shape[-2:]) for x in found if x.ndim > 3}
    assert tails.isdisjoint({("bfloat16", 256, 3), ("bfloat16", 3, 128), ("float32", 2, 128)})


def scans(jaxpr):
    """The loops of a program, those inside of others included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from scans(getattr(inner, "jaxpr", inner))


def is_jaxpr(x):
    return isinstance(x, Jaxpr | ClosedJaxpr)
