"""Training on a mesh of eight devices: the losses and adapters of one device."""

import contextlib
import dataclasses
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import models, train
from lora_jax.models.mesh import Placement, entered, on_mesh, placement
from lora_jax.models.sharding import RULES
from lora_jax.train import mesh as meshes
from lora_jax.train.memory import format_memory, memory

from tests.support.mesh_runs import KINDS, LLAMA, adapted, check_mesh, data, make, one_device, run

pytestmark = pytest.mark.once

MESHES: dict[str, dict[str, Any]] = {
    "data=8": dict(data=8),
    "fsdp=8": dict(fsdp=8),
    "data=2,fsdp=4": dict(data=2, fsdp=4),
    "fsdp=4,tensor=2": dict(fsdp=4, tensor=2),
    "tensor=8": dict(tensor=8),
    "data=2,fsdp=2,tensor=2": dict(data=2, fsdp=2, tensor=2),
    "data=2,expert=4": dict(data=2, expert=4),
    "fsdp=2,expert=2,tensor=2": dict(fsdp=2, expert=2, tensor=2),
    "expert=2,context=4": dict(expert=2, context=4),
}
MIXED = ("data=2,fsdp=4", "fsdp=4,tensor=2")


def cases():
    for kind in KINDS:
        for mesh in MESHES:
            if "expert" in mesh and not kind.startswith(("experts", "lora")):
                continue
            quick = mesh in MIXED[:1] and kind in ("lora", "nf4", "dropout")
            quick = quick or (kind == "lora" and mesh == MIXED[1])
            yield pytest.param(kind, mesh, marks=[] if quick else pytest.mark.slow)


@pytest.mark.filterwarnings("ignore:every device holds all of")
@pytest.mark.parametrize(("kind", "mesh"), cases())
def test_the_losses_and_adapters_are_those_of_one_device(kind, mesh):
    check_mesh(kind, models.make_mesh(**MESHES[mesh]))


SIZES = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64,
    initializer_range=0.05, tie_word_embeddings=False,
)  # fmt: skip
SENSITIVE: dict[str, dict[str, Any]] = {
    "gemma4_text": dict(
        head_dim=8, global_head_dim=16, sliding_window=4, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=128, use_double_wide_mlp=True, tie_word_embeddings=True,
    ),
    "qwen3_5_text": dict(
        head_dim=8, linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=8,
        linear_value_head_dim=8, full_attention_interval=2,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:every device holds all of")
@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=4", "fsdp=4,tensor=2"])
@pytest.mark.parametrize("kind", SENSITIVE)
def test_gradients_are_those_of_one_device_where_rounding_grows(kind, mesh):
    """After ten steps their adapters part by 3e-4 and 2e-5, and on one device by 9e-5 and 3e-6."""
    config = models.config_from_hf({"model_type": kind, **SIZES, **SENSITIVE[kind]})
    model = models.init(jax.random.key(0), config)
    held = lora.quantize(model.params, r".*(_proj|in_proj_\w+)", format="nf4")
    model = dataclasses.replace(model, params=held)
    settings = dict(target_modules=r".*\.layers\..*_proj")
    # `b` begins at 0, and Adam divides by its epsilon alone: it becomes the gradient's multiple.
    plain = dict(steps=1, epsilon=100.0, learning_rate=1.0, clip=None)
    meshes = (None, models.make_mesh(**MESHES[mesh]))
    want, got = (run(model, settings, plain, at)[1] for at in meshes)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_base_that_the_user_has_spread_trains_inside_set_mesh(kind):
    """Other shardings than the rules', and axes of either kind."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(kind,) * 2)

    def spread(x):
        spec = P(*[None] * (x.ndim - 1), "fsdp") if x.ndim > 1 else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    model = make()
    model = dataclasses.replace(model, params=jax.tree.map(spread, model.params))
    with jax.set_mesh(mesh):
        losses, _ = run(model, {}, {})
    np.testing.assert_allclose(losses, one_device("lora")[0], rtol=1e-5)


# What `jax.make_mesh` makes unless it is told otherwise.
@pytest.mark.filterwarnings("ignore:every device holds all of")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "kind", [k if k in ("lora", "nf4") else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_explicit_axes_train_as_automatic_ones(kind, inside):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    options, settings, training = KINDS[kind]
    model = make(**options)
    model = dataclasses.replace(model, params=lora.sharding.place(model.params, mesh, RULES))
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        losses, _ = run(model, settings, training)
    relative = 1e-5 if kind != "bfloat16" else 1e-2
    np.testing.assert_allclose(losses, one_device(kind)[0], rtol=relative)


def test_explicit_axes_spread_the_rows_too_and_get_the_results():
    model, results = make(), []
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(kind,) * 2)
        there = dataclasses.replace(model, params=lora.sharding.place(model.params, mesh, RULES))
        config, params = adapted(there, {})
        job = train.TrainConfig(steps=2, batch_size=8, progress=False)
        result = train.fit(there, params, data(), None, job, lora_config=config)
        assert {x.sharding.mesh for x in jax.tree.leaves(result.lora_params)} == {mesh}
        evaluated = train.evaluate(there, result.lora_params, data(), batch_size=8)
        texts = models.generate(there, result.lora_params, [[1, 2], [3]], max_new_tokens=4)
        results.append((result.memory, evaluated, texts))
    # The same bytes in a step: rows that every device computes take eight times as many.
    assert results[0] == results[1]


def test_what_lies_on_a_mesh_of_another_shape_is_copied():
    one, other = models.make_mesh(data=2, fsdp=4), models.make_mesh(data=4, fsdp=2)
    x = jax.device_put(np.arange(8.0), NamedSharding(one, P("fsdp")))
    moved = on_mesh({"x": x}, other)["x"]
    assert moved.sharding == NamedSharding(other, P())
    np.testing.assert_array_equal(moved, x)


@pytest.mark.parametrize("inside", [False, True])
def test_models_run_on_a_mesh_with_explicit_axes(inside):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    tokens = jax.numpy.arange(32, dtype="int32").reshape(4, 8)
    rows = jax.device_put(tokens, NamedSharding(mesh, P("data")))
    config = models.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=16, task="sequence-classification",
        labels=("no", "yes"),
    )  # fmt: skip
    for model in (make(), models.init(jax.random.key(0), config)):
        placed = lora.sharding.place(model.params, mesh, RULES)
        want = model.apply(model.params, tokens)
        with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
            found = model.apply(placed, rows)
            again = model.forward.head(placed, model.apply(placed, rows, return_hidden=True))
        assert found.sharding.spec[0] == "data"
        np.testing.assert_allclose(found, want, atol=1e-5)
        np.testing.assert_allclose(again, want, atol=1e-5)


def test_evaluation_gives_the_loss_of_one_device():
    model, mesh = make(), models.make_mesh(data=2, fsdp=4)
    params = lora.sharding.place(model.params, mesh, RULES)
    want = train.evaluate(model, model.params, data(), batch_size=8)
    assert train.evaluate(model, params, data(), batch_size=8) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("count", [2, 8])
def test_programs_of_several_cpus_are_not_restored_from_the_compile_cache(count):
    """XLA restores them without the order of their collectives."""
    asked = []
    mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
    at = placement(None, jax.device_put(np.ones(8), NamedSharding(mesh, P())))

    def compiled(at):
        asked.clear()
        with entered(at):
            jax.jit(lambda x: x + 1).lower(np.ones(8)).compile()
        return [each for each in asked if each.endswith("compile_requests_use_cache")]

    jax.monitoring.register_event_listener(lambda event, **_: asked.append(event))
    try:
        assert compiled(None) and not compiled(at) and compiled(None)
    finally:
        jax.monitoring.clear_event_listeners()


def test_the_memory_table_is_that_of_a_device():
    model = make()
    _, params = adapted(model, {})
    one = memory(*lora.split(params), opt_state=())
    placed = lora.sharding.place(params, models.make_mesh(data=2, fsdp=4), RULES)
    each = memory(*lora.split(placed), opt_state=())
    # Norms and vectors are copied to all devices.
    assert one.base / 4 < each.base < 1.02 * one.base / 4
    assert (one.devices, each.devices) == (1, 8)
    assert "total on each of 8 devices" in format_memory(each)


def test_a_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(ValueError, match="`batch_size` is 12, but its rows are spread over 8"):
        run(make(), {}, dict(batch_size=12), models.make_mesh(data=2, fsdp=4))


@cache
def wide(kind: str) -> tuple[Any, Any]:
    """The model, and its parameters with adapters: a superblock of NF4's inputs for 8 devices."""
    sizes = dict(hidden_size=1024, intermediate_size=1024, head_dim=128)
    model = models.init(jax.random.key(0), dataclasses.replace(LLAMA, **sizes), dtype="bfloat16")
    if kind == "nf4":
        held = lora.quantize(model.params, r".*_proj", format="nf4")
        model = dataclasses.replace(model, params=held)
    return model, adapted(model, {"target_modules": "all-linear"})[1]


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        pytest.param(kind, mesh, marks=[] if mesh == MIXED[1] else pytest.mark.slow)
        for kind in ("lora", "nf4")
        for mesh in list(MESHES)[:6]
    ],
)
def test_every_device_holds_its_part_alone(kind, mesh):
    """Bytes of base, adapters and optimizer on each device: a share, and what is copied."""
    _, params = wide(kind)
    there = lora.sharding.place(params, models.make_mesh(**MESHES[mesh]), RULES)
    trainable, frozen = lora.split(there)
    tx = optax.adam(1e-3)
    state = meshes.state_on(
        train.init_state(jax.random.key(0), trainable, tx), tx, placement(None, there)
    )
    parts = MESHES[mesh].get("fsdp", 1) * MESHES[mesh].get("tensor", 1)
    most = bytes_of(frozen) / parts + bytes_of(trainable) + bytes_of(state.opt_state)
    held = (frozen, state.trainable, state.opt_state)
    for device in jax.devices():
        assert sum(s.data.nbytes for s in shards_of(held) if s.device == device) <= 1.1 * most


def bytes_of(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def shards_of(tree: Any) -> list[Any]:
    return [shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards]


@pytest.mark.parametrize("kind", ["lora", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_run_on_a_mesh_resumes_on_another(tmp_path, kind):
    options, settings, _ = KINDS[kind]
    whole, _ = run(make(**options), settings, {}, models.make_mesh(fsdp=8))
    first = dict(output_dir=tmp_path, steps=10, save_every=5)
    with pytest.raises(KeyboardInterrupt):
        run(make(**options), settings, first, models.make_mesh(fsdp=8), stop_after=5)
    again = {**first, "resume": True}
    rest, _ = run(make(**options), settings, again, models.make_mesh(data=2, fsdp=4))
    np.testing.assert_allclose(rest, whole, rtol=1e-5)


def test_parameters_that_lie_nowhere_go_to_the_mesh_in_use():
    params = {"w": np.ones(2, np.float32)}
    assert placement(None, params) is None
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert placement(None, params) == Placement(mesh, ("data",), mesh)
    # A mesh that the parameters lie on comes first.
    other = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    there = {"w": jax.device_put(np.ones(4, np.float32), NamedSharding(other, P("fsdp")))}
    assert placement(None, there) == Placement(other, ("fsdp",), other)
