"""The cache and generation: against runs without a cache, on a small random model."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.models.sharding import RULES

from tests.support import mesh_runs
from tests.support.compilations import compilations
from tests.support.tiny import SMALL

pytestmark = pytest.mark.once

CONFIG = SMALL
PROMPTS = [[5, 9, 11, 3, 7], [8], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]


@pytest.fixture(scope="module")
def model():
    return models.init(jax.random.key(0), CONFIG)


def without_cache(model, prompts, count):
    """Greedy tokens by running the whole texts again for each."""
    padded = np.zeros((len(prompts), 32), np.int32)
    ends = np.array([len(p) for p in prompts])
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    apply, rows = jax.jit(model.apply), np.arange(len(prompts))
    for step in range(count):
        # Padding is on the right, so that no token attends to it.
        logits = np.asarray(apply(model.params, padded))
        padded[rows, ends + step] = logits[rows, ends + step - 1].argmax(-1)
    return [row[end : end + count].tolist() for row, end in zip(padded, ends, strict=True)]


def generate(model, prompts=PROMPTS, count=12, **options):
    return models.generate(model, model.params, prompts, max_new_tokens=count, **options)


@pytest.fixture(scope="module", params=[True, False], ids=["stacked", "apart"])
def whole_run(request):
    """A compiled model, and its logits of two texts of 9 tokens."""
    model = models.init(jax.random.key(0), CONFIG, scan=request.param)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 61)
    mask = jnp.arange(9) >= jnp.array([[0], [3]])
    apply = jax.jit(model.apply)
    return model, apply, tokens, mask, np.asarray(apply(model.params, tokens, mask=mask))


@pytest.mark.parametrize("chunks", [(9,), (4, 5), (1,) * 9])
def test_a_cached_run_equals_a_whole_one(whole_run, chunks):
    model, apply, tokens, mask, whole = whole_run
    cache, at, parts = model.init_cache(2, 11), 0, []
    for size in chunks:
        here = slice(at, at + size)
        out, cache = apply(model.params, tokens[:, here], mask=mask[:, here], cache=cache)
        parts.append(np.asarray(out))
        at += size
    real = np.asarray(mask)
    assert int(cache.length) == 9
    np.testing.assert_array_equal(cache.valid[:, :9], real)
    np.testing.assert_allclose(np.concatenate(parts, 1)[real], whole[real], atol=1e-5)


def test_greedy_equals_a_run_without_a_cache(model):
    got = generate(model)
    assert got == without_cache(model, PROMPTS, 12)
    assert got[1] == generate(model, [PROMPTS[1]])[0]  # alone as in company


def test_hidden_states_and_head_are_the_logits(model):
    tokens = jnp.arange(6)[None]
    hidden = model.apply(model.params, tokens, return_hidden=True)
    assert hidden.shape == (1, 6, 32)
    logits = model.apply(model.params, tokens)
    np.testing.assert_array_equal(model.head(model.params, hidden), logits)
    hidden, cache = model.apply(
        model.params, tokens, return_hidden=True, cache=model.init_cache(1, 6)
    )
    np.testing.assert_allclose(model.head(model.params, hidden), logits, atol=1e-5)


def test_a_row_ends_before_its_first_stop_token(model):
    free = generate(model)
    stop = free[0][4]
    want = [row[: row.index(stop)] if stop in row else row for row in free]
    assert generate(model, stop_tokens=(60, stop)) == want
    assert generate(model, stop_tokens=range(61)) == [[], [], []]


def test_sampling_depends_on_key_and_row_only(model):
    options: dict[str, Any] = dict(temperature=1.0, top_p=0.9)
    a = generate(model, key=jax.random.key(1), **options)
    assert a == generate(model, key=jax.random.key(1), **options)
    assert a != generate(model, key=jax.random.key(2), **options)
    assert a[:1] == generate(model, PROMPTS[:1], key=jax.random.key(1), **options)
    # A hot row draws every token anew: no token is the one before it again and again.
    hot = generate(model, PROMPTS[:1], key=jax.random.key(1), temperature=1e6)[0]
    assert len(set(hot)) > len(hot) // 2
    # With keys of their own, rows do not depend on their places.
    keys = jax.random.split(jax.random.key(5), len(PROMPTS))
    b = generate(model, key=keys, **options)
    assert b[2:] == generate(model, PROMPTS[2:], key=keys[2:], **options)
    # A small temperature and a small nucleus leave the likeliest token only.
    greedy = generate(model)
    assert generate(model, key=jax.random.key(1), temperature=1e-6) == greedy
    assert generate(model, key=jax.random.key(1), temperature=1.0, top_p=1e-6) == greedy


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_tokens_come_as_they_are_written(model, count):
    stop = generate(model)[0][4]
    for options in (
        dict(stop_tokens=(stop,)),
        dict(temperature=1.0, key=jax.random.key(1), stop_tokens=(stop,)),
        dict(stop_tokens=range(61)),
    ):
        came = []
        whole = generate(model, PROMPTS, count, **options, stream=came.append)
        assert whole == generate(model, PROMPTS, count, **options)
        assert [sum(rows, []) for rows in zip(*came, strict=True)] == whole
        # Some at a time, and none after all rows have stopped.
        assert max(len(row) for new in came for row in new) <= 4
        assert len(came) <= -(-count // 4)


def test_samples_follow_the_models_distribution(model):
    # 4000 rows of one token each against softmax(logits / T) cut to the nucleus, renormalized.
    rows, temperature, top_p = 4000, 1.5, 0.8
    got = generate(
        model, [[5, 9]] * rows, 1, temperature=temperature, top_p=top_p, key=jax.random.key(0)
    )
    counts = np.bincount(np.array(got)[:, 0], minlength=61) / rows
    logits = np.asarray(model.apply(model.params, jnp.array([[5, 9]])))[0, -1]
    chances = np.exp(logits / temperature - (logits / temperature).max())
    chances /= chances.sum()
    order = np.argsort(-chances)
    keep = order[: np.searchsorted(np.cumsum(chances[order]), top_p) + 1]
    want = np.zeros(61)
    want[keep] = chances[keep] / chances[keep].sum()
    assert set(np.flatnonzero(counts)) <= set(keep)
    # Five standard deviations of a frequency over 4000 draws.
    assert np.abs(counts - want).max() < 5 * np.sqrt(0.25 / rows)


def test_a_second_call_in_the_same_buckets_compiles_nothing(model):
    def first():
        generate(model, [[1], [2, 3]], 9, temperature=0.5, key=jax.random.key(3))

    def second():
        generate(
            model,
            [[4] * 16, [5, 6]],
            16,
            temperature=0.9,
            top_p=0.5,
            stop_tokens=(1, 2, 3),
            key=jax.random.key(4),
        )

    first()
    assert compilations(second) == 0
    # Nor does another model of the same shape.
    other = models.init(jax.random.key(9), CONFIG)
    assert (
        compilations(
            lambda: generate(other, [[1], [2, 3]], 5, temperature=1.0, key=jax.random.key(0))
        )
        <= 1
    )


@pytest.mark.parametrize(
    "prompts, options, text",
    [
        ([[1], []], {}, "prompt 1 is empty: give at least one token"),
        ([[1], [61]], {}, "prompt 1 has token 61, which is outside the vocabulary 0 to 60"),
        ([[-1]], {}, "prompt 0 has token -1, which is outside the vocabulary"),
        ([[1] * 60], {}, "has 60 tokens; with 12 new ones that is more than the model's context"),
        ([[1]], {"temperature": 1.0}, "`key` is needed to sample"),
        (
            [[1]],
            {"temperature": 1.0, "key": jax.random.split(jax.random.key(0))},
            "2 keys, but .* 1 ",
        ),
        ([[1]], {"temperature": -1.0}, "`temperature` must be at least 0 and `top_p` in"),
        ([[1]], {"top_p": 0.0}, r"`top_p` in \(0, 1\], got 0.0, 0.0"),
        ([[1]], {"count": -1}, "`max_new_tokens` must be an integer of at least 0, got -1"),
        ([[1]], {"count": 2.5}, "`max_new_tokens` must be an integer .* got 2.5"),
        ([[1]], {"temperature": "hot"}, "`temperature` must be a number, got 'hot'"),
        ([[1]], {"temperature": float("nan")}, "`temperature` must be a number, got nan"),
        ([[1]], {"temperature": 1e-45}, "`temperature` = 1e-45 is too small"),
        ([[1]], {"top_p": None}, "`top_p` must be a number, got None"),
        ([[1]], {"stop_tokens": [1.5]}, "`stop_tokens` must be a sequence of integers"),
        ([[1]], {"stop_tokens": "</s>"}, "`stop_tokens` must be a sequence .* got `str`"),
        ([[True, False]], {}, "prompt 0 must be a sequence of integers.* got True"),
        ([{1, 2}], {}, "prompt 0 must be a sequence of integers.* got `set`"),
        ([b"ab"], {}, "prompt 0 must be a sequence of integers.* got `bytes`"),
        ("ab", {}, "`prompts` must be a list of prompts.* got `str` 'ab'"),
        ([[1]], {"adapter_ids": ["ann"]}, "`adapter_ids` must be integers .* got \\['ann'\\]"),
    ],
)
def test_refused(model, prompts, options, text):
    with pytest.raises(ValueError, match=text):
        generate(model, prompts, **options)


def test_prompts_and_stop_tokens_of_any_kind_of_sequence(model):
    want = generate(model, [[1, 2], [3, 4]], 4, stop_tokens=(7, 9))
    array = np.array([[1, 2], [3, 4]])
    for prompts, stops in (
        (array, np.array([7, 9])),
        (jnp.asarray(array), jnp.array([7, 9])),
        ((iter(x) for x in array), {9, 7}),
        ([(1, 2), range(3, 5)], [9, -1, 7, 2**40]),  # files have -1 for "none"
    ):
        assert generate(model, prompts, 4, stop_tokens=stops) == want


def test_logits_that_are_not_finite_end_it_by_the_prompt(model):
    plan = lora.plan(
        lora.LoraConfig(rank=2, target_modules=("q_proj",)),
        model.apply,
        model.params,
        jax.ShapeDtypeStruct((1, 4), "int32"),
    )
    good = lora.init(jax.random.key(0), plan, model.params)
    trainable, frozen = lora.split(good)
    huge = lora.combine(jax.tree.map(lambda x: jnp.full_like(x, 1e30), trainable), frozen)

    def both(ids, **options):
        stack = lora.stack([good, huge])
        return models.generate(
            model, stack, [[1, 2], [3]], max_new_tokens=3, adapter_ids=ids, **options
        )

    assert both([0, -1]) == models.generate(model, model.params, [[1, 2], [3]], max_new_tokens=3)
    for options in ({}, {"temperature": 1.0, "key": jax.random.key(0)}):
        with pytest.raises(FloatingPointError, match="prompt 1: the logits are not finite"):
            both([0, 1], **options)


def test_parameters_that_are_none(model):
    with pytest.raises(TypeError, match="`params` must be a tree of parameters, got `Model`"):
        models.generate(model, model, [[1]], max_new_tokens=1)
    with pytest.raises(TypeError, match="`model` must be a `Model`, .* got `dict`"):
        models.generate(model.params, model.params, [[1]], max_new_tokens=1)


def test_an_encoder_writes_nothing():
    forward: Any = SimpleNamespace(config=SimpleNamespace(model_type="bert"))
    bert = models.Model(forward, {}, None)
    with pytest.raises(ValueError, match="`model` is a `bert`, an encoder, which writes nothing"):
        models.generate(bert, {}, PROMPTS, max_new_tokens=3)


def test_rows_of_padding_only_are_finite_and_so_are_their_gradients(model):
    tokens = jnp.arange(12).reshape(2, 6)
    mask = jnp.array([[False] * 6, [False] * 2 + [True] * 4])

    def loss(params):
        return jnp.where(mask[..., None], model.apply(params, tokens, mask=mask), 0.0).sum()

    both = jax.jit(lambda p: (model.apply(p, tokens, mask=mask), jax.grad(loss)(p)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(both(model.params)))


@pytest.mark.parametrize(
    "tokens, options, text",
    [
        (
            np.ones(3, int),
            {},
            r"`tokens` must be integers of shape \(batch, length\), got int.* of shape \(3,\)",
        ),
        (np.ones((1, 3)), {}, "`tokens` must be integers of shape .*, got float"),
        (np.ones((1, 3), int), {"mask": np.ones((1, 3), int)}, "`mask` must be bool, true at real"),
        (np.ones((1, 3), int), {"mask": np.ones((1, 4), bool)}, r"got bool of shape \(1, 4\)"),
        (np.ones((1, 3), int), {"positions": np.ones((1, 4), int)}, r"got shape \(1, 4\)"),
    ],
)
@pytest.mark.wrong_types
def test_inputs_of_another_shape(model, tokens, options, text):
    with pytest.raises(ValueError, match=text):
        model.apply(model.params, tokens, **options)


def test_nothing_to_do(model):
    assert generate(model, []) == []
    assert generate(model, [[1], [2]], 0) == [[], []]


@pytest.mark.parametrize(
    "options, text",
    [
        ({"dtype": "int8"}, "`dtype` must be one of float32, bfloat16, float16, got 'int8'"),
        ({"param_dtype": "f32"}, "`param_dtype` must be one of"),
        (
            {"remat": "everything"},
            "`remat` must be one of none, projections, full, .* got 'everything'",
        ),
    ],
)
def test_options_that_do_not_exist(options, text):
    with pytest.raises(ValueError, match=text):
        models.init(jax.random.key(0), CONFIG, **options)


@pytest.mark.parametrize(
    ("axes", "kind"),
    [
        (dict(data=2, fsdp=4), {}),
        pytest.param(dict(tensor=8), {}, marks=pytest.mark.slow),
        pytest.param(dict(fsdp=4, tensor=2), dict(quantize=True), marks=pytest.mark.slow),
        pytest.param(dict(data=8), dict(gpt2=True), marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:every device holds all of")
def test_a_mesh_writes_what_one_device_writes(axes, kind):
    model = mesh_runs.make(**kind)
    targets = dict(target_modules=("c_attn",)) if kind.get("gpt2") else {}
    _, params = mesh_runs.adapted(model, {"init": "random", **targets})
    placed = lora.sharding.place(params, models.make_mesh(**axes), RULES)
    prompts = [[1, 2, 3], [4] * 9, [5, 6]]
    options: dict[str, Any] = dict(max_new_tokens=5, temperature=1.0, key=jax.random.key(0))
    want = models.generate(model, params, prompts, **options)
    assert models.generate(model, placed, prompts, **options) == want


def test_adapters_of_the_rows_on_a_mesh_write_what_one_device_writes():
    model = mesh_runs.make()
    _, params = mesh_runs.adapted(model, {"init": "random"})
    stacked = lora.stack([params, params])
    placed = lora.sharding.place(stacked, models.make_mesh(data=2, fsdp=4), RULES)
    options: dict[str, Any] = dict(max_new_tokens=3, adapter_ids=[0, -1, 1])
    prompts = [[1, 2, 3], [4] * 9, [5, 6]]
    want = models.generate(model, stacked, prompts, **options)
    assert models.generate(model, placed, prompts, **options) == want
