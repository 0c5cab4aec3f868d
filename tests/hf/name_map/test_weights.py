"""A name map needs rules for what is written only; whole weights are written through one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax.hf.checkpoint.weights import Weights
from lora_jax.sharding import LeafDims, Rules

pytestmark = pytest.mark.once

LAYERS, WIDTH, HEADS = 2, 8, 2
RULES = [
    ("embed", "model.embed_tokens.weight"),
    ("blocks.q", "model.layers.{}.self_attn.q_proj.weight", "(h k) d -> l d h k"),
    ("blocks.out", "model.layers.{}.self_attn.o_proj.weight", "o i -> l i o"),
    ("norm", "model.norm.weight"),
]
MAP = lora.hf.name_map("toy", RULES)
# Nothing but what is adapted below.
PARTIAL = lora.hf.name_map("part of toy", RULES[1:2])
TOKENS = jnp.zeros((1, 3), jnp.int32)


def toy(params, tokens):
    x = params["embed"][tokens]

    def block(x, p):
        q = jnp.einsum("btd,dhk->bthk", x, p["q"])
        return x + q.reshape(x.shape) @ p["out"], None

    return jax.lax.scan(block, x, params["blocks"])[0] * params["norm"]


def toy_params(seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "embed": jax.random.normal(keys[0], (16, WIDTH)),
        "blocks": {
            "q": jax.random.normal(keys[1], (LAYERS, WIDTH, HEADS, WIDTH // HEADS)),
            "out": jax.random.normal(keys[2], (LAYERS, WIDTH, WIDTH)),
        },
        "norm": jax.random.normal(keys[3], (WIDTH,)),
    }


def adapted(*targets: str):
    config = lora.LoraConfig(rank=2, target_modules=targets, init="random")
    plan = lora.plan(config, toy, toy_params(), TOKENS)
    return lora.init(jax.random.key(1), plan, toy_params()), config


def test_an_adapter_needs_rules_for_its_own_leaves_only(tmp_path):
    params, config = adapted("q")
    for using, name in ((PARTIAL, "part"), (MAP, "whole")):
        lora.hf.save_peft(tmp_path / name, params, config, name_map=using, task_type=None)
        again, _ = lora.hf.load_peft(tmp_path / name, toy, toy_params(), TOKENS, name_map=using)
        np.testing.assert_array_equal(again["blocks"]["q"].a, params["blocks"]["q"].a)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("part", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_adapted_leaf_without_a_rule_is_named(tmp_path):
    params, config = adapted("q", "out")
    with pytest.raises(ValueError, match=r"`blocks.out`: name map `part of toy` has no rule"):
        lora.hf.save_peft(tmp_path / "a", params, config, name_map=PARTIAL)
    lora.hf.save_peft(tmp_path / "a", params, config, name_map=MAP)
    with pytest.raises(ValueError, match="o_proj"):
        lora.hf.load_peft(tmp_path / "a", toy, toy_params(), TOKENS, name_map=PARTIAL)


def test_without_a_map_the_errors_name_it(tmp_path):
    params, config = adapted("q")
    lora.hf.save_peft(tmp_path / "a", params, config, name_map=MAP)
    with pytest.raises(ValueError, match="a: .*none of the adapter's modules: .* by `name_map`"):
        lora.hf.load_peft(tmp_path / "a", toy, toy_params(), TOKENS)


@pytest.mark.parametrize("size", ["5GB", 600])
def test_merged_weights_are_a_checkpoint(tmp_path, size):
    merged = lora.merge(adapted("q", "out")[0])
    lora.hf.save_weights(tmp_path / "m", merged, MAP, max_shard_size=size)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert (len(files) > 1) is (size == 600)
    tensors = {name: x for file in files for name, x in load_file(file).items()}
    assert len(tensors) == 2 + 2 * LAYERS
    want = np.asarray(merged["blocks"]["q"])[1].reshape(WIDTH, WIDTH).T
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_proj.weight"], want)
    shapes = jax.eval_shape(toy_params)
    weights = lora.hf.safetensors.open_directory(tmp_path / "m")
    again = lora.hf.from_hugging_face(shapes, weights, MAP)
    by_name = lora.hf.from_hugging_face(merged, tmp_path / "m", MAP)
    jax.tree.map(np.testing.assert_array_equal, again, by_name)
    jax.tree.map(np.testing.assert_array_equal, again, merged)


STACKED_LAST = ("blocks.out", "model.layers.{}.self_attn.o_proj.weight", "o i -> i o l")
SPREAD = Rules(
    {"in": ("fsdp",), "heads": ("tensor",), "layers": ("data",)},
    (
        LeafDims(r"blocks\.q$", ("layers", "in", "heads", "none"), (0, 1, 2, 3)),
        LeafDims(r"blocks\.out$", ("in", "heads")),
        LeafDims(r"embed$", ("in", "heads")),
    ),
)


@pytest.mark.parametrize("axes", [dict(fsdp=4, tensor=2), dict(data=2, fsdp=4)], ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.filterwarnings("ignore:every device holds all of")
def test_weights_are_read_onto_a_mesh_by_their_shards(tmp_path, axes, last):
    using = lora.hf.name_map("toy", [*RULES[:2], STACKED_LAST, RULES[3]]) if last else MAP
    params = toy_params()
    if last:
        params["blocks"]["out"] = jnp.moveaxis(params["blocks"]["out"], 0, -1)
    lora.hf.save_weights(tmp_path / "m", params, using)
    weights, read = lora.hf.safetensors.open_directory(tmp_path / "m"), []

    def counted(*args):
        read.append((args[0], weights.read(*args).size))
        return weights.read(*args)

    mesh, shapes = lora.models.make_mesh(**axes), jax.eval_shape(lambda: params)
    got = lora.hf.from_hugging_face(
        shapes, weights._replace(read=counted), using, mesh=mesh, rules=SPREAD
    )
    jax.tree.map(np.testing.assert_array_equal, got, params)
    placed = lora.sharding.place(params, mesh, SPREAD)
    same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), got, placed)
    assert all(jax.tree.leaves(same))
    # Each device's part of q is read once, and no more than it.
    sizes = [size for name, size in read if "layers.1" in name and "q_proj" in name]
    assert sum(sizes) == WIDTH * WIDTH and max(sizes) <= WIDTH * WIDTH / 4


def test_a_mesh_without_rules_is_refused(tmp_path):
    mesh, unread = lora.models.make_mesh(fsdp=8), Weights("", {}, np.empty, str)
    with pytest.raises(ValueError, match="`mesh` and `rules` go together"):
        lora.hf.from_hugging_face(jax.eval_shape(toy_params), unread, MAP, mesh=mesh)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    new, params = tmp_path / "m", toy_params()
    with pytest.raises(ValueError, match=r"`blocks.q` still has an adapter.*lora.merge"):
        lora.hf.save_weights(new, adapted("q")[0], MAP)
    with pytest.raises(ValueError, match="`blocks.out`: name map `part of toy` has no rule"):
        lora.hf.save_weights(new, params, PARTIAL)
    with pytest.raises(
        ValueError, match="tensor `model.norm.weight` has a number that float16 cannot"
    ):
        lora.hf.save_weights(new, {**params, "norm": jnp.full(WIDTH, 1e30)}, MAP, dtype="float16")
    with pytest.raises(ValueError, match="`norm` is int32, expected floats"):
        lora.hf.save_weights(new, {**params, "norm": jnp.ones(WIDTH, jnp.int32)}, MAP)
    both = lora.hf.name_map("two", [*RULES, ("other", "model.norm.weight")])
    with pytest.raises(ValueError, match="two leaves are tensor `model.norm.weight`"):
        lora.hf.save_weights(new, {**params, "other": params["norm"]}, both)
    assert not list(tmp_path.iterdir())
    new.mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        lora.hf.save_weights(new, params, MAP)
    wrong: Any = params
    with pytest.raises(TypeError, match="`name_map` must be `NameMap`, got .*: call `lora.hf.save"):
        lora.hf.save_weights(new, MAP, wrong)
    with pytest.raises(TypeError, match="`weights` must be .*: call `lora.hf.from_hugging_face"):
        lora.hf.from_hugging_face("merged", wrong, MAP)
