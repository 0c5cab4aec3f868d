"""Spelling of paths: pytrees of every kind, modules, stacked layers, nearest names."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import meta

from lora_jax import paths


class Pair(NamedTuple):
    up: Any
    down: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: Any


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Unnamed:
    """As many libraries register a class: its leaves have numbers alone."""

    leaves: tuple

    def tree_flatten(self):
        return self.leaves, None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(tuple(leaves))


def spelled(tree) -> list[str]:
    return [paths.spell(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]


ONE = jnp.ones(())


@pytest.mark.parametrize(
    ("tree", "want"),
    [
        ({"a": {"kernel": ONE}}, "a.kernel"),
        ({"layers": [ONE]}, "layers.0"),
        (Pair(ONE, None), "up"),
        ({"layer": Layer(ONE)}, "layer.weight"),
        ({"mlp/~/linear_0": {"w": ONE}}, "mlp.~.linear_0.w"),
        ({"Dense layer": {"my kernel": ONE}}, "Dense layer.my kernel"),
        ({0: ONE}, "0"),
        ({"k": meta.Partitioned(ONE, ("x",))}, "k"),
        ({"value": ONE}, "value"),
    ],
)
def test_spell(tree, want: str):
    assert spelled(tree) == [want]


def test_leaves_without_names_have_paths_of_their_own():
    inner = Unnamed((ONE, ONE))
    assert spelled({"a": Unnamed((inner, ONE, inner))}) == ["a", "a.0.1", "a.1", "a.2", "a.2.1"]


def test_spell_nnx_state():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert sorted(spelled(state)) == ["bias", "kernel"]
    assert sorted(spelled(nnx.to_pure_dict(state))) == ["bias", "kernel"]


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("model.layers.q_proj.kernel", "model.layers.q_proj"),
        ("model.embed.embedding", "model.embed"),
        ("blocks.up", "blocks.up"),
        ("kernel", "kernel"),
        ("a.w", "a"),
    ],
)
def test_module_of(path: str, module: str):
    assert paths.module_of(path) == module


def test_expand_puts_the_number_after_the_list():
    assert paths.expand("model.layers.self_attn.q_proj", 2) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert paths.expand("encoder.up", 2) == []
    assert paths.expand("model.layers.3.up", 2) == []


def test_nearest_puts_the_likeliest_first():
    known = ["model.layers.q_proj", "model.layers.v_proj", "model.embed", "lm_head"]
    assert paths.nearest("qproj", known).startswith("`model.layers.q_proj`, `model.layers.v_proj`")
    assert paths.nearest("x", []) == "none: there are no names"
