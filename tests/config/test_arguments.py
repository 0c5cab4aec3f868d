"""Arguments in another order, half a tree, a seed for a key, PEFT's names: errors that help."""

# pyright: reportArgumentType=false, reportCallIssue=false

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lora_jax as lora
from lora_jax import analysis, train
from lora_jax.recipes import classify, convert, generate

from tests.support.train_toys import Toy, toy_config, toy_data, toy_lora


def model(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


PARAMS = {"up": {"kernel": jnp.eye(4, 8)}, "down": {"kernel": jnp.eye(8, 4)}}
X, KEY = jnp.ones((2, 4)), jax.random.key(0)
CONFIG = lora.LoraConfig(rank=2, dropout=0.5, target_modules=("up", "down"))
UNDROPPED = lora.LoraConfig(rank=2, target_modules=("up", "down"))
PLAN = lora.plan(CONFIG, model, PARAMS, X)
TREE = lora.init(KEY, PLAN, PARAMS)
TRAINABLE, FROZEN = lora.split(TREE)
TOY_LORA, DATA, RUN = toy_lora(), toy_data(4), toy_config()

SMALL = lora.models.LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=8,
)  # fmt: skip
MODEL = lora.models.init(KEY, SMALL)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What holds parameters, as `lora.models.load` returns it."""

    params: dict


ORDERS = {
    "plan(config, fn, params, *args)": [
        lambda _: lora.plan(model, CONFIG, PARAMS, X),
        lambda _: lora.plan(CONFIG, PARAMS, model, X),
        lambda _: lora.plan(PARAMS, model, CONFIG, X),
    ],
    "init(key, plan, params)": [
        lambda _: lora.init(PLAN, KEY, PARAMS),
        lambda _: lora.init(KEY, CONFIG, PARAMS),
        lambda _: lora.init(KEY, PARAMS, PLAN),
    ],
    "lorafy(fn)(lora_params, ...)": [lambda _: lora.lorafy(TREE)],
    "hf.save_peft(directory, lora_params, config)": [
        lambda new: lora.hf.save_peft(new, CONFIG, TREE),
        lambda new: lora.hf.save_peft(TREE, new, CONFIG),
        lambda new: lora.hf.save_peft(TREE, CONFIG, new),
    ],
    "hf.to_peft(lora_params, config)": [lambda _: lora.hf.to_peft(CONFIG, TREE)],
    "hf.load_peft(directory, fn, params, *args)": [
        lambda new: lora.hf.load_peft(new, PARAMS, model, X),
        lambda new: lora.hf.load_peft(PARAMS, model, new, X),
    ],
    "models.load(source)": [lambda _: lora.models.load(PARAMS), lambda _: lora.models.load(None)],
    "checkpoint.save(directory, lora_params, config)": [
        lambda new: lora.checkpoint.save(new, CONFIG, TREE),
        lambda new: lora.checkpoint.save(TREE, new, CONFIG),
    ],
    "checkpoint.save_async(directory, lora_params, config)": [
        lambda new: lora.checkpoint.save_async(new, CONFIG, TREE),
    ],
    "checkpoint.restore(directory, fn, params, *args)": [
        lambda new: lora.checkpoint.restore(new, PARAMS, model, X),
    ],
    "nnx.adapt(module, config, *args, key=key)": [
        lambda _: lora.nnx.adapt(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), X, CONFIG, key=KEY),
    ],
    "train.fit(model, lora_params, train_data, eval_data, config)": [
        lambda _: train.fit(TOY_LORA, Toy(), DATA, None, RUN),
        lambda _: train.fit(Toy().apply, TOY_LORA, DATA, None, RUN),
        lambda _: train.fit(Toy(), TOY_LORA, DATA, RUN, None),
        lambda _: train.fit(Toy(), TOY_LORA, DATA, None, CONFIG),
        lambda _: train.fit(Toy(), TOY_LORA, DATA, None, RUN, lora_config=RUN),
        lambda _: train.fit(Toy(), TOY_LORA, DATA, None, RUN, hooks=print),
    ],
    "train.evaluate(model, lora_params, data)": [
        lambda _: train.evaluate(TOY_LORA, Toy(), DATA),
    ],
}


SETTINGS: Any = {
    train.TrainConfig: {"lr": "it is `learning_rate` here", "bath_size": "the nearest are `batch_"},
    analysis.SweepConfig: {"rank": "the nearest are `ranks`"},
    lora.quant.QuantConfig: {"double_quan": "the nearest are `double_quant`"},
    lora.LoraConfig: {"r": "PEFT's `r` is `rank` here", "lora_rank": "it is `rank` here"},
}


@pytest.mark.parametrize("config", SETTINGS)
def test_an_unknown_setting_is_an_error_that_names_the_known_one(config):
    for name, text in SETTINGS[config].items():
        with pytest.raises(TypeError, match=f"{config.__name__} has no field `{name}`: {text}"):
            config(**{name: 3})
    with pytest.raises(TypeError, match=f"give the fields of {config.__name__} by name: "):
        config(3)


@pytest.mark.wrong_types
def test_a_module_in_place_of_its_function_names_the_way():
    dense, linear = linen.Dense(4), nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="got the module `Dense`: pass `module.apply`"):
        lora.plan(CONFIG, dense, PARAMS, X)
    with pytest.raises(TypeError, match="got the module `Linear`: use `lora.nnx.adapt`"):
        lora.plan(CONFIG, linear, PARAMS, X)
    with pytest.raises(TypeError, match="got the module `Dense`: pass `module.apply`"):
        lora.lorafy(dense)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.wrong_types
def test_another_order_is_an_error_with_the_order(order, tmp_path):
    for call in ORDERS[order]:
        with pytest.raises(TypeError, match=re.escape(f"`lora.{order}` with the arguments in")):
            call(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["lorafy", "grad", "value_and_grad"])
@pytest.mark.wrong_types
def test_parameters_beside_the_function_are_an_error_with_the_call(name: str):
    with pytest.raises(TypeError, match=rf"takes the function alone.*`lora.{name}\(fn\)\(lora_p"):
        getattr(lora, name)(model, TREE)


NO_TREES = {
    "None": (None, "`NoneType`"),
    "path": ("run/adapter", "`str` 'run/adapter'"),
    "class": (lora.LoraConfig, "the class `LoraConfig`"),
    "config": (CONFIG, "`LoraConfig`"),
    "plan": (PLAN, "`Plan`"),
    "module": (linen.Dense(4), "`Dense`"),
    "key": (KEY, "`PRNGKeyArray`"),
}


@pytest.mark.parametrize("name", NO_TREES)
@pytest.mark.wrong_types
def test_what_holds_no_array_is_no_tree(name: str):
    value, shown = NO_TREES[name]
    text = re.escape(f"must be a tree of parameters, got {shown}, which holds no array")
    for call in (lora.split, lora.merge, lora.count_parameters, lora.trainable_mask,
                 lora.dequantize, lambda x: lora.plan(CONFIG, model, x, X)):  # fmt: skip
        with pytest.raises(TypeError, match=text):
            call(value)


@pytest.mark.wrong_types
def test_an_optimizer_state_is_no_tree_of_parameters():
    state = optax.adam(1e-3).init(TREE)
    text = r"got the state of an optimizer \(`ScaleByAdamState`\): pass the parameters"
    for call in (lora.merge, lora.dequantize, lambda x: lora.plan(CONFIG, model, x, X)):
        with pytest.raises(TypeError, match=text):
            call(state)
    trainable, frozen = lora.split(state)
    assert jax.tree.leaves(trainable) and jax.tree.leaves(frozen)


def test_a_tree_without_leaves_is_one():
    half = jax.tree.map(lambda _: None, PARAMS)
    for tree in ({}, (), [None], half):
        assert lora.count_parameters(tree) == (0, 0) and lora.merge(tree) == tree


WHOLE = {
    "merge": lambda tree, new: lora.merge(tree),
    "unmerge": lambda tree, new: lora.unmerge(PARAMS, tree),
    "delta": lambda tree, new: lora.delta(tree["up"]["kernel"]),
    "lorafy": lambda tree, new: lora.lorafy(model)(tree, X),
    "stack": lambda tree, new: lora.stack([tree, tree]),
    "save_peft": lambda tree, new: lora.hf.save_peft(new, tree, CONFIG),
    "to_peft": lambda tree, new: lora.hf.to_peft(tree, CONFIG),
    "save": lambda tree, new: lora.checkpoint.save(new, tree, CONFIG),
    "save_async": lambda tree, new: lora.checkpoint.save_async(new, tree, CONFIG),
}


@pytest.mark.parametrize("half", [TRAINABLE, FROZEN], ids=["trainable", "frozen"])
@pytest.mark.parametrize("call", WHOLE)
def test_half_a_tree_is_an_error_that_names_combine(call, half, tmp_path):
    with pytest.raises(ValueError, match=r"`lora\.combine\(trainable, frozen\)`"):
        WHOLE[call](half, tmp_path / "new")
    assert not (tmp_path / "new").exists()


NO_DATA = {
    "none": (None, "`NoneType`"),
    "path": ("d.jsonl", "`str` 'd.jsonl'"),
    "texts": (["a b"], "one of `str` 'a b'"),
    "records": ([train.record_of({"text": "a"})], "one of `Record`"),
    "arrays": (np.ones((2, 3), int), "`ndarray`"),
    "one": (DATA[0], "`Example`"),
    "iterator": (iter(DATA), "`list_iterator`"),
}


@pytest.mark.parametrize("name", NO_DATA)
@pytest.mark.wrong_types
def test_data_that_are_no_examples_name_what_makes_them(name: str):
    data, shown = NO_DATA[name]
    text = re.escape(f"must be a list of `Example`s, got {shown}: `lora.train.examples(rec")
    calls = {
        "train_data": lambda: train.fit(Toy(), TOY_LORA, data, None, RUN),
        "data": lambda: train.evaluate(Toy(), TOY_LORA, data),
    }
    with pytest.raises(TypeError, match=f"`data` {text}"):
        train.loader(data, batch_size=1)
    if data is not None:  # no evaluation
        calls["eval_data"] = lambda: train.fit(Toy(), TOY_LORA, DATA, data, RUN)
    for argument, call in calls.items():
        with pytest.raises(TypeError, match=f"`{argument}` {text}"):
            call()
    with pytest.raises(TypeError, match="`lora_params` must be a tree of parameters, got `Plan`"):
        train.fit(Toy(), PLAN, DATA, None, RUN)


def test_parameters_are_given_by_keyword_as_to_the_base_function():
    want = lora.lorafy(model)(TREE, X)
    for call in (
        lambda fn: fn(params=TREE, x=X),
        lambda fn: fn(x=X, lora_params=TREE),
        lambda fn: jax.jit(fn)(params=TREE, x=X),
    ):
        np.testing.assert_array_equal(call(lora.lorafy(model)), want)
    with pytest.raises(TypeError, match=r"`lora_params` is missing: call `lora.lorafy\(fn\)\(lora"):
        lora.lorafy(model)(x=X)


def by_hand(**parts):
    """A call with a leaf that is made without `init`."""
    parts = dict(a=jnp.ones((4, 2)), b=jnp.ones((2, 3)), scale=jnp.float32(1)) | parts
    leaf = lora.LoraArray(jnp.ones((4, 3)), **parts)
    return lora.lorafy(lambda params, x: x @ params["w"])({"w": leaf}, X)


REFUSED = {
    "index": (lambda: lora.replace(lora.stack([TREE, TREE]), TREE, 0), "`index` is `dict`, but th"),
    "name": (lambda: lora.replace(lora.stack([TREE]), "a", TREE), "`index` is `str` 'a', but the"),
    "slot": (lambda: lora.multi.adapter(lora.stack([TREE]), None), "`index` is `NoneType`, but"),
    "weight": (lambda: lora.multi.add_weighted_adapter([TREE], 1.0), "list of numbers, got 1.0"),
    "text": (lambda: lora.multi.add_weighted_adapter([TREE], ["a"]), r"of numbers, got \['a'\]"),
    "rate": (lambda: lora.masked(1e-3), "must be an optimizer of optax, got `float` 0.001"),
    "maker": (lambda: lora.masked(optax.adam), "of optax, got the function `adam`: pass"),
    "block": (lambda: lora.quantize(PARAMS, "up", block_size="64"), "must be one of .* got '64'"),
    "roles": (lambda: lora.quantize({"q": jnp.ones((64, 4, 32))}, ("q",)), "the roles are assumed"),
    "keys": (lambda: lora.init(jax.random.split(KEY, 3), PLAN, PARAMS), r"one PRNG key.* \(3,\)"),
    "chosen": (lambda: lora.lorafy(model)(lora.select(lora.stack([TREE]), [0, 0]), X,
                                          adapter_ids=[0, 0]), "has the rows' adapters already"),
    "names": (lambda: lora.hf.to_peft({"a.b": TREE["up"], "a": {"b": TREE["up"]}},
                                      CONFIG), "two leaves of .* have the same name `a.b.kernel`"),
    "plain scale": (lambda: by_hand(scale=1.0), "`w`: `scale` must be an array, got 1.0"),
    "factor": (lambda: by_hand(b=jnp.ones((3, 4))), r"`b` has shape \(3, 4\), expected \(2, 3"),
    "tree": (lambda: lora.quant.quantize_array(PARAMS), "`w` must be an array, got `dict`"),
    "linen": (lambda: lora.nnx.adapt(linen.Dense(4), CONFIG, X), "an `nnx.Module`, got `Dense`: "),
    "keyless": (lambda: lora.nnx.adapt(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), CONFIG, X),
                "`key` must be a PRNG key, got `NoneType`"),
    "token list": (lambda: MODEL.apply(MODEL.params, [[1, 2]]), "an array of integers, .* `list`"),
    "token text": (lambda: MODEL.apply(MODEL.params, "hi"), "array of integers, .* `str` 'hi'"),
    "seed": (lambda: lora.models.init(0, SMALL), "`key` must be a PRNG key, got `int` 0"),
    "fields": (lambda: lora.models.init(KEY, {}), "`config` must be one of `lora.models`, .*`dict"),
    "json": (lambda: lora.models.config_from_hf("config.json"), "the object in config.json, got"),
    "a path": (lambda: lora.models.LlamaConfig.from_hf("m"), "object in config.json, got `str"),
    "b path": (lambda: lora.models.BertConfig.from_hf("m"), "object in config.json, got `str"),
    "g path": (lambda: lora.models.GPT2Config.from_hf("m"), "object in config.json, got `str"),
    "t path": (lambda: lora.models.T5Config.from_hf("m"), "object in config.json, got `str"),
    "v path": (lambda: lora.models.ViTConfig.from_hf("m"), "object in config.json, got `str"),
    "count": (lambda: lora.models.load("nowhere", labels=2, fresh_head=KEY), "names, got 2"),
    "numbers": (lambda: lora.models.load("nowhere", labels=(0, 1), fresh_head=KEY), r"\(0, 1\)"),
    "head": (lambda: lora.models.load("nowhere", labels=("a",), fresh_head=0), "`fresh_head` must"),
    "folder": (lambda: lora.checkpoint.save_params(PARAMS, "x"), "`directory` must be a path, got"),
    "find": (lambda: lora.checkpoint.find(None), "must be a path, got `NoneType`"),
    "print": (lambda: lora.checkpoint.fingerprint(Loaded(PARAMS)), "got `Loaded`: pass its `param"),
    "task": (lambda: lora.hf.save_peft("x", TREE, CONFIG, task_type="causal"), "None, CAUSAL_LM, "),
    "base": (lambda: lora.hf.save_peft("x", TREE, CONFIG, base_model_name=3), "model_name` must b"),
    "rules": (lambda: lora.hf.name_map("x", {"a": "b"}), "must be a list of .path here, tensor th"),
    "data path": (lambda: train.load_jsonl(["a"]), "`path` must be `str` or `PathLike`, got `list"),
    "tokenizer": (lambda: train.examples([], MODEL, max_length=8), "`tokenizer` must be .* `Model"),
    "length": (lambda: train.examples([], None, max_length="8"), "integer of at least 2, got '8'"),
    "rows": (lambda: train.evaluate(Toy(), TOY_LORA, DATA, batch_size=0), "of at least 1, got 0"),
    "total": (lambda: train.optimizer(3, RUN), "`config` must be `TrainConfig`, got `int` 3: call"),
    "state key": (lambda: train.init_state(0, TRAINABLE, optax.sgd(1)), "`key` must be a PRNG key"),
    "state": (lambda: train.init_state(KEY, TREE, optax.sgd(1)), "the first tree of `lora.split"),
    "rate state": (lambda: train.init_state(KEY, TRAINABLE, 1), "must be an optimizer of optax"),
    "mesh": (lambda: analysis.memory("gpt2", mesh="fsdp=8", length=8), "devices by axis, .*'fsdp="),
    "half": (lambda: analysis.spectrum(TRAINABLE), r"`lora\.combine\(trainable, frozen\)`"),
    "ranks": (lambda: analysis.SweepConfig(ranks="4"), "`ranks` must be whole numbers above 0, go"),
    "specs": (lambda: lora.sharding.specs(PARAMS, None, {}), "`rules` must be `Rules`, got `None"),
    "plain": (lambda: lora.nnx.Adapted(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), TREE, PLAN), "got a tr"),
    "prompts": (lambda: generate.as_trained("hi", chat=False, form=None), "`prompts` must be a li"),
    "prompt": (lambda: generate.generate_texts(MODEL, {}, "hi", None), "has no tokenizer"),
    "texts": (lambda: classify.classify_texts(MODEL, {}, "hi"), "`texts` must be a list of texts"),
    "stacked": (lambda: train.fit(Toy(), lora.stack([TOY_LORA]), DATA, None, RUN), "is a stack of"),
    "padding": (lambda: lora.stack([TREE], rank="8"), "`rank` must be an integer of at least 1"),
    "slots": (lambda: lora.stack([TREE], slots="8"), "`slots` must be an integer of at least 1"),
    "gguf": (lambda: lora.hf.save_gguf_lora("x", TREE, CONFIG, base="m"), "`base` must be `Base`,"),
    "hub": (lambda: lora.hf.read_base(MODEL), "`source` must be `str` or `PathLike`, got `Model`"),
    "encoder": (lambda: lora.models.load_encoder(None), "`source` must be `str` or `PathLike`, go"),
    "inspect": (lambda: lora.recipes.inspect.inspect(None), "`source` must be `str` or `PathLike`"),
    "target": (lambda: convert.check_output("x", to="zip", source="y"), "one of .*, got 'zip'"),
    "map": (lambda: lora.hf.save_peft("x", TREE, CONFIG, name_map={}), "`name_map` must be `NameM"),
    "using": (lambda: lora.hf.to_hugging_face(PARAMS, None), "`using` must be `NameMap`, got `Non"),
    "product": (lambda: lora.quant.matmul(X, X), "must be a `QuantArray`, got `ArrayImpl`: `lora."),
    "blocks": (lambda: lora.quant.check(PARAMS), "must be a `QuantArray`, got `dict`"),
    "output": (lambda: train.TrainConfig(output_dir=3), "`output_dir` must be a path, got `int` 3"),
    "nowhere": (lambda: train.TrainConfig(output_dir=""), "`output_dir` must be a path, got `str`"),
    "pushed": (lambda: lora.hf.push("", "a/b"), "`directory` must be a path, got `str` ''"),
    "adapter": (lambda: lora.hf.read_peft(TREE), "`directory` must be a path, got `dict`"),
    "streams": (lambda: lora.init(nnx.Rngs(0), PLAN, PARAMS), "PRNG key, got `Rngs`: `jax.rand"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.wrong_types
def test_a_value_of_another_kind_is_an_error_that_names_it(case: str, tmp_path, monkeypatch):
    call, text = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match=text):
        call()


def test_a_field_that_a_leaf_has_not_is_named():
    leaf: Any = TREE["up"]["kernel"]
    with pytest.raises(AttributeError, match="a `LoraArray` has no `lora_A`; its fields are w, a"):
        leaf.lora_A  # noqa: B018
    with pytest.raises(AttributeError, match="`sum` needs an array, got a `LoraArray`: call the"):
        leaf.sum()


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.wrong_types
def test_arrays_of_torch_are_converted_by_the_caller():
    import torch

    w, text = torch.ones(4, 8), "hold arrays of JAX or numpy, got a `Tensor` of torch: convert it, "
    for call in (
        lambda: lora.plan(CONFIG, model, {"up": {"kernel": w}}, X),
        lambda: lora.plan(CONFIG, model, PARAMS, w),
        lambda: lora.quant.quantize_array(w),
    ):
        with pytest.raises(TypeError, match=text):
            call()


@pytest.mark.parametrize("key", [0, None, 1.5, "0", np.zeros(2), jnp.zeros(2, jnp.int32)])
@pytest.mark.wrong_types
def test_a_seed_is_no_key(key):
    with pytest.raises(TypeError, match=r"`key` must be a PRNG key, got .*jax.random.key\(0\)"):
        lora.init(key, PLAN, PARAMS)
    if key is not None:
        with pytest.raises(TypeError, match="`lora_key` must be a PRNG key"):
            lora.lorafy(model)(TREE, X, lora_key=key)


@pytest.mark.wrong_types
def test_keys_of_both_kinds_are_taken():
    for key in (KEY, jax.random.key_data(KEY), np.asarray(jax.random.PRNGKey(0))):
        lora.lorafy(model)(lora.init(key, PLAN, PARAMS), X, lora_key=key)


def test_gradients_without_the_dropouts_key_are_a_warning():
    """In every order of jit and grad; evaluation, and gradients of the input, have none."""
    fn = lora.lorafy(model)
    jax.jit(fn)(TREE, X)
    jax.grad(lambda x: fn(TREE, x).sum())(X)

    def loss(trainable, x=X, **key):
        return fn(lora.combine(trainable, FROZEN), x, **key).sum()

    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.grad(jax.jit(loss))):
        with pytest.warns(UserWarning, match="`lora_key="):
            gradient(TRAINABLE)
    jax.grad(loss)(TRAINABLE, lora_key=KEY)
    plain, frozen = lora.split(lora.init(KEY, lora.plan(UNDROPPED, model, PARAMS, X), PARAMS))
    jax.grad(lambda t: fn(lora.combine(t, frozen), X).sum())(plain)


def test_parameters_of_another_dtype_are_planned_again():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(ValueError, match=r"`down\.kernel` in bfloat16, planned was float32"):
        lora.init(KEY, PLAN, half)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ({"r": 8}, "PEFT's `r` is `rank` here"),
        ({"lora_alpha": 8}, "PEFT's `lora_alpha` is `alpha` here"),
        ({"lora_dropout": 0.1}, "PEFT's `lora_dropout` is `dropout` here"),
        ({"init_lora_weights": True}, "PEFT's `init_lora_weights` is `init` here"),
        ({"task_type": "CAUSAL_LM"}, "lora.hf.save_peft(..., task_type="),
        ({"fan_in_fan_out": True}, "changes no numbers"),
        ({"layer_replication": []}, "PEFT's `layer_replication` is not supported"),
        ({"rnak": 8}, "the nearest are `rank`"),
    ],
)
def test_an_unknown_field_names_ours(field, text):
    with pytest.raises(TypeError, match=f"LoraConfig has no field.*{re.escape(text)}"):
        lora.LoraConfig(**field)
    with pytest.raises(TypeError, match="by name"):
        lora.LoraConfig(8)


def test_leaves_that_are_no_arrays_are_no_part_of_the_fingerprint(tmp_path):
    """As in an Equinox module that was not partitioned."""
    params = {"up": {**PARAMS["up"], "act": jax.nn.tanh, "eps": 1e-5}, "down": PARAMS["down"]}
    tree = lora.init(KEY, lora.plan(CONFIG, model, params, X), params)
    lora.checkpoint.save(tmp_path / "a", tree, CONFIG)
    for base in (params, PARAMS):
        again, _ = lora.checkpoint.restore(tmp_path / "a", model, base, X)
        np.testing.assert_array_equal(again["up"]["kernel"].a, tree["up"]["kernel"].a)
    other = {"up": {**params["up"], "kernel": 2 * PARAMS["up"]["kernel"]}, "down": PARAMS["down"]}
    with pytest.raises(ValueError, match=r"up\.kernel.*holds other numbers"):
        lora.checkpoint.restore(tmp_path / "a", model, other, X)


def test_a_tree_is_no_function_and_no_module():
    class Adapted:
        def lora_params(self):
            return {}

    for check in (lora.merge, lora.lorafy(lambda p: p), lambda p: lora.hf.to_peft(p, CONFIG)):
        with pytest.raises(
            TypeError, match=r"`lora_params` must be .*`Adapted`: .*`lora_params\(\)`"
        ):
            check(Adapted())
        with pytest.raises(TypeError, match="got the function `lora_params`: call it"):
            check(Adapted().lora_params)


TREES = {
    "plan": lambda tree: lora.plan(CONFIG, model, tree, X),
    "init": lambda tree: lora.init(jax.random.key(0), PLAN, tree),
    "lorafy": lambda tree: lora.lorafy(model)(tree, X),
    "merge": lora.merge,
    "split": lora.split,
    "count": lora.count_parameters,
    "mask": lora.trainable_mask,
    "quantize": lambda tree: lora.quantize(tree, ["kernel"]),
    "dequantize": lora.dequantize,
    "place": lambda tree: lora.sharding.place(
        tree, lora.models.make_mesh(fsdp=-1), lora.models.sharding.RULES
    ),
    "specs": lambda tree: lora.sharding.specs(tree, lora.models.sharding.RULES, {"fsdp": 8}),
    "save_params": lambda tree: lora.checkpoint.save_params("unused", tree),
    "to_peft": lambda tree: lora.hf.to_peft(tree, CONFIG),
}


@pytest.mark.parametrize("call", TREES)
@pytest.mark.wrong_types
def test_a_model_is_no_tree_of_parameters(call):
    with pytest.raises(TypeError, match="must be a tree of parameters, got `Loaded`: pass its `p"):
        TREES[call](Loaded(PARAMS))
