"""How arrays lie against Hugging Face's tensors: values, round trips, adapters' orders, errors."""

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.hf import to_hugging_face
from lora_jax.hf.name_maps.layout import (
    measured,
    order,
    parse,
    part_to_ours,
    their_shape,
    to_ours,
    to_theirs,
)

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)

# layout, sizes, shape of ours without stacks, and the same by NumPy
CASES = {
    "same": ("a b -> a b", {}, (3, 4), lambda t: t),
    "turned": ("o i -> i o", {}, (3, 4), lambda t: t.T),
    "heads in": ("d (n h) -> n h d", {}, (2, 4, 5), lambda t: t.T.reshape(2, 4, 5)),
    "heads out": (
        "(n h) d -> d n h",
        {},
        (5, 2, 4),
        lambda t: t.reshape(2, 4, 5).transpose(2, 0, 1),
    ),
    # What Meta's and Hugging Face's layouts of rotary planes differ in.
    "planes": (
        "(n p h) d -> d (n h p)",
        {"n": 2, "p": 2},
        (5, 8),
        lambda t: t.reshape(2, 2, 2, 5).swapaxes(1, 2).reshape(8, 5).T,
    ),
    "planes of heads apart": (
        "(n p h) d -> d n (h p)",
        {"p": 2},
        (5, 2, 4),
        lambda t: t.reshape(2, 2, 2, 5).swapaxes(1, 2).reshape(2, 4, 5).transpose(2, 0, 1),
    ),
    "a vector": (
        "(n p h) -> n (h p)",
        {"p": 2},
        (2, 4),
        lambda t: t.reshape(2, 2, 2).swapaxes(1, 2).reshape(2, 4),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_back(case):
    text, sizes, shape, by_numpy = CASES[case]
    layout = parse(text, sizes)
    known = measured(layout, shape)
    tensor = RNG.normal(size=their_shape(layout, known))
    np.testing.assert_array_equal(to_ours(layout, tensor, known), by_numpy(tensor))
    np.testing.assert_array_equal(to_theirs(layout, by_numpy(tensor), known), tensor)


def test_a_stack_is_on_any_axis():
    layout = parse("(n h) d -> d l n h")
    assert layout.stacks == (1,) and layout.block == (("d",), ("n",), ("h",))
    w = RNG.normal(size=(5, 3, 2, 4))
    using = lora.hf.name_map("x", [("w", "m.layers.{}.w.weight", layout.text)])
    there = to_hugging_face({"w": w}, using)
    assert sorted(there) == [f"m.layers.{i}.w.kernel" for i in range(3)]
    np.testing.assert_array_equal(there["m.layers.1.w.kernel"], w[:, 1].reshape(5, 8))


@pytest.mark.parametrize("case", ["heads out", "planes", "planes of heads apart"])
def test_factors_are_permuted_as_the_weight_is(case):
    """B, permuted, times A is the change of weight, permuted."""
    text, sizes, shape, _ = CASES[case]
    layout = parse(text, sizes)
    known = measured(layout, shape)
    ins, outs = order(layout, [0], known), order(layout, range(1, len(shape)), known)
    a, b = RNG.normal(size=(5, 3)), RNG.normal(size=(3, 8))
    change = to_theirs(layout, (a @ b).reshape(shape), known)  # (out, in)
    back = b[:, np.argsort(outs)], a[np.argsort(ins)]
    np.testing.assert_allclose(back[0].T @ back[1].T, change, atol=1e-12)


def test_a_dimension_that_is_in_and_out():
    layout = parse("(i o) -> i o")
    with pytest.raises(ValueError, match=r"\(i o\) holds inputs and outputs of the weight"):
        order(layout, [0], measured(layout, (3, 4)))


RULES = {
    "stars": ([("blocks.*", "model.layers.weight")], r"must have as many `\*`"),
    "numbers": ([("blocks.{}.w", "model.layer.weight")], "at least as many `{}`"),
    "arrow": ([("w", "w.weight", "a b")], "expected `theirs -> ours`, got no arrow"),
    "twice": ([("w", "w.weight", "a a -> a b")], "`a` occurs twice on one side"),
    "left": ([("w", "w.weight", "a b -> a")], "`b` occurs on the left only"),
    "name": ([("w", "w.weight", "a ? -> a b")], r"`\?` is not the name of a dimension"),
    "factor": (
        [("w", "w.weight", "", 0.0)],
        "rule `w`: the factor is 0.0, expected a finite number",
    ),
    "text for a factor": ([("w", "w.weight", "", "2")], "rule `w`: the factor is '2', expected"),
    "stack": ([("w", "w.weight", "a -> (l m) a")], "a stack must be a dimension of its own"),
}


@pytest.mark.parametrize("case", RULES)
def test_a_table_that_makes_no_sense(case):
    rules, text = RULES[case]
    with pytest.raises(ValueError, match=text):
        lora.hf.name_map("x", rules)


SHAPES = {
    "sizes": ("a.weight", "(n p h) -> (n h p)", (8,), r"the sizes of `n`, `h`, `p` are not known"),
    "dims": ("a.weight", "a b -> b a", (8,), r"has 2 dimensions on the right, got shape \(8,\)"),
    "stacks": ("a.{}.weight", "a b -> b a", (8, 2), "0 stacks, but `a.{}.weight` numbers 1"),
    "fit": ("a.weight", "(n t) -> n t", (8, 4), r"\{'t': 3\} does not fit shape \(8, 4\)"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_layout_that_does_not_fit(case):
    tensor, layout, shape, text = SHAPES[case]
    using = lora.hf.name_map("x", [("w", tensor, layout)], sizes={"t": 3})
    with pytest.raises(ValueError, match=f"leaf `w`: .*{text}"):
        to_hugging_face({"w": jnp.zeros(shape)}, using)


def test_sizes_that_are_all_given_must_be_the_arrays():
    layout = parse("(n h) d -> d (n h)", {"n": 2, "h": 4})
    assert measured(layout, (5, 8)) == {"n": 2, "h": 4, "d": 5}
    for width in (16, 12):
        with pytest.raises(ValueError, match=rf"does not fit shape \(5, {width}\)"):
            measured(layout, (5, width))


@pytest.mark.parametrize("case", CASES)
def test_a_part_of_a_block_is_read_alone(case):
    text, sizes, shape, _ = CASES[case]
    layout = parse(text, sizes)
    known = measured(layout, shape)
    tensor = RNG.normal(size=their_shape(layout, known))
    whole = to_ours(layout, tensor, known)
    for _ in range(20):
        starts = [int(RNG.integers(n)) for n in shape]
        stops = [int(RNG.integers(a, n)) + 1 for a, n in zip(starts, shape, strict=True)]
        part = tuple(map(slice, starts, stops))
        got = part_to_ours(layout, lambda there: tensor[there], known, part)
        np.testing.assert_array_equal(got, whole[part])
