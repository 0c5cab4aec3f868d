"""lora_jax/plan_saved.py: which layers of a stack train whole, and which biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.array import SavedArray, effective

pytestmark = pytest.mark.once


def shaped(*shape: int):
    return jax.ShapeDtypeStruct(shape, "float32")


LAYERS = {
    "norm": {"scale": shaped(3, 4)},
    "up": {"kernel": shaped(3, 4, 6), "bias": shaped(3, 6)},
    "down": {"kernel": shaped(3, 6, 4), "bias": shaped(3, 4)},
}
PARAMS = {"net": {"layers": LAYERS}}


def stacked(params, x):
    def step(x, layer):
        h = (x * layer["norm"]["scale"]) @ layer["up"]["kernel"] + layer["up"]["bias"]
        return x + h @ layer["down"]["kernel"] + layer["down"]["bias"], None

    return jax.lax.scan(step, x, params["net"]["layers"])[0]


def planned(**fields):
    config = lora.LoraConfig(**{"rank": 2, "target_modules": ("up",), **fields})
    return lora.plan(config, stacked, PARAMS, shaped(5, 4))


def trained(plan) -> dict:
    return {leaf.path.removeprefix("net.layers."): leaf.only for leaf in plan.saved}


def test_biases_train_where_their_layers_are_adapted():
    assert trained(planned(bias="lora_only")) == {"up.bias": None}
    plan = planned(bias="lora_only", layers_to_transform=(0, 2))
    assert trained(plan) == {"up.bias": ((0,), (2,))}
    assert plan.trainable == 2 * 2 * (4 + 6) + 2 * 6
    assert 'bias="lora_only", 2 layers' in str(plan)
    everything = planned(bias="all", layers_to_transform=(0, 2))
    assert trained(everything) == {"up.bias": None, "down.bias": None}


def test_one_layer_of_a_stack_trains_whole():
    plan = planned(modules_to_save=("layers.1.norm", "2.down"))
    assert trained(plan) == {
        "norm.scale": ((1,),),
        "down.bias": ((2,),),
        "down.kernel": ((2,),),
    }
    assert plan.by_path()["net.layers.down.kernel"].parameters == 24
    assert "in modules_to_save, 1 of 3 layers" in str(plan)
    with pytest.raises(ValueError, match="entry .layers.3.norm. matches no module"):
        planned(modules_to_save=("layers.3.norm",))


def test_layers_that_do_not_train_do_not_move_and_have_no_gradient():
    leaf = SavedArray(jnp.zeros((3, 2)), jnp.ones((3, 2)), ((0,), (2,)))
    np.testing.assert_array_equal(effective(leaf), [[1, 1], [0, 0], [1, 1]])
    np.testing.assert_array_equal(lora.merge({"b": leaf})["b"], effective(leaf))

    def loss(value):
        x = SavedArray(leaf.w, value, leaf.only)
        return jnp.sum(lora.lorafy(lambda p: p["b"] * 3)({"b": x}))

    np.testing.assert_array_equal(jax.grad(loss)(leaf.value), [[3, 3], [0, 0], [3, 3]])


def test_a_listed_target_that_is_wholly_excluded_is_no_fault():
    plan = planned(target_modules=("up", "down"), exclude_modules=("down",))
    assert [leaf.path for leaf in plan.adapted] == ["net.layers.up.kernel"]
    with pytest.raises(ValueError, match="matches nothing in a tree of 5 leaves"):
        planned(target_modules=("down",), exclude_modules=("down",))


def test_a_target_that_trains_whole_is_said_and_one_alone_is_refused_as_by_peft():
    text = '"up" lie in `modules_to_save`, where the whole module trains and gets no adapter'
    with pytest.warns(UserWarning, match=text):
        plan = planned(target_modules=("up", "down"), modules_to_save=("up",))
    assert [leaf.path for leaf in plan.adapted] == ["net.layers.down.kernel"]
    with pytest.raises(ValueError, match=text):
        planned(modules_to_save=("up",))
    # Of two modules that an entry names, one may train whole.
    planned(target_modules=("kernel",), modules_to_save=("up",))


def test_a_weight_without_numbers_gets_advice_that_can_be_followed():
    params, x = {"w": shaped(8, 0), "v": shaped(8, 4)}, shaped(2, 8)
    model = lambda p, x: (x @ p["w"]).sum() + x @ p["v"]  # noqa: E731
    config = lora.LoraConfig(rank=2, target_modules=("w", "v"))
    with pytest.raises(ValueError, match=r"`w` of shape \(8, 0\) has no number.*: exclude it"):
        lora.plan(config, model, params, x)
