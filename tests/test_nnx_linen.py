"""linen and NNX modules to functions and back: state kept, adapters inside, called as before."""

import inspect
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax as lora

X = jax.random.normal(jax.random.key(9), (4, 8))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16, name="up")(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(8, name="down")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.norm(self.up(x)))))

    def features(self, x):
        return self.up(x)


CONFIG = lora.LoraConfig(rank=2, target_modules=("up", "down"), init="random")
CONFIG_UP = lora.LoraConfig(rank=2, target_modules=("up",))


def close(x, y):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_linen_takes_a_module_apart_and_puts_it_together():
    module = LinenNet()
    variables = module.init(jax.random.key(0), X)
    fn, params, state = lora.linen.functional(module, variables)
    assert set(state) == {"batch_stats"}
    lp = lora.init(jax.random.key(1), lora.plan(CONFIG, fn, params, X), params)
    merged = lora.linen.variables(lora.merge(lp), state)
    close(lora.lorafy(fn)(lp, X), module.apply(merged, X))
    out, new = lora.lorafy(fn)(lp, X, train=True, state=state, rngs={"dropout": jax.random.key(2)})
    want, changed = module.apply(
        merged, X, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)}
    )
    close(out, want)
    jax.tree.map(close, new, changed)
    assert not np.allclose(
        new["batch_stats"]["BatchNorm_0"]["mean"], state["batch_stats"]["BatchNorm_0"]["mean"]
    )


def test_what_a_linen_model_sows_comes_with_the_state():
    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "x", x)
            return nn.Dense(8, name="up")(x)

    fn, params, state = lora.linen.functional(Sows(), Sows().init(jax.random.key(0), X))
    params = lora.init(jax.random.key(1), lora.plan(CONFIG_UP, fn, params, X), params)
    _, state = lora.lorafy(fn)(params, X, state={**state, "intermediates": {}})
    close(state["intermediates"]["x"][-1], X)
    with pytest.raises(TypeError, match="`mutable` follows `state`: the collections in it are mut"):
        lora.lorafy(fn)(params, X, mutable=["intermediates"])


def test_linen_needs_params():
    with pytest.raises(ValueError, match='has no "params" collection, only'):
        lora.linen.functional(LinenNet(), {"batch_stats": {}})
    collections = LinenNet().init(jax.random.key(0), X)
    fn, *_ = lora.linen.functional(LinenNet(), collections)
    with pytest.raises(ValueError, match="`params` must be the parameters alone, got the collecti"):
        lora.plan(CONFIG, fn, collections, X)


def test_nnx_function_keeps_state_and_refuses_to_lose_it():
    module = NnxNet(nnx.Rngs(0))
    fn, params, state = lora.nnx.functional(module)
    with pytest.raises(ValueError, match="the call changes .*`norm.mean`.*pass `state=state`"):
        fn(params, X)
    lp = lora.init(jax.random.key(1), lora.plan(CONFIG, fn, params, X, state=state), params)
    out, new = lora.lorafy(fn)(lp, X, state=state)
    graph, _, _ = nnx.split(module, nnx.Param, ...)
    reference = nnx.merge(graph, lora.merge(lp), state, copy=True)
    close(out, reference(X))
    close(new["norm"]["mean"].get_value(), reference.norm.mean.get_value())
    module.eval()
    fn, params, _ = lora.nnx.functional(module)
    assert fn(params, X).shape == (4, 8)


def test_adapted_module_is_called_as_before():
    module = NnxNet(nnx.Rngs(0))
    module.eval()
    before = module(X)
    model = lora.nnx.adapt(
        module, lora.LoraConfig(rank=2, target_modules=("up", "down")), X, key=jax.random.key(1)
    )
    close(model(X), before)
    close(model.call("features", X), module.features(X))
    close(lora.nnx.merged(model)(X), before)
    assert set(model.adapters) == {"up/kernel", "down/kernel"}


class Encoder(nnx.Module):
    """A module with data, layers and methods, and a mode of its own."""

    def __init__(self, rngs: nnx.Rngs):
        self.width, self.deterministic = 16, False
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 16, rngs=rngs)])
        self.head = nnx.Linear(16, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.encode(x), deterministic=self.deterministic))

    def encode(self, x, scale=1.0):
        for block in self.blocks:
            x = block(x)
        return scale * x

    @property
    def depth(self):
        return len(self.blocks)


@pytest.fixture(scope="module")
def encoder():
    config = lora.LoraConfig(rank=2, target_modules=("0", "1", "head"), init="random")
    return lora.nnx.adapt(Encoder(nnx.Rngs(0)), config, X, key=jax.random.key(1))


def test_the_base_s_attributes_are_read_through_the_adapted_module(encoder):
    assert encoder.blocks is encoder.base.blocks and encoder.depth == 2 and encoder.width == 16
    assert encoder.head.kernel is encoder.base.head.kernel
    with pytest.raises(
        AttributeError,
        match="neither the adapted module nor its base, a `Encoder`, has an attribute `layers`",
    ):
        encoder.layers  # noqa: B018
    assert not hasattr(encoder, "set_view") and not hasattr(encoder, "__jax_array__")
    blank = object.__new__(lora.nnx.Adapted)
    with pytest.raises(AttributeError, match="`Adapted` has no attribute `head`"):
        blank.head  # noqa: B018


def test_the_base_s_methods_run_with_the_adapters(encoder):
    merged = lora.nnx.merged(encoder)
    close(encoder.encode(X, scale=2.0), merged.encode(X, scale=2.0))
    assert not np.allclose(encoder.encode(X), encoder.base.encode(X), atol=1e-3)
    hidden = encoder.encode(X)
    close(encoder.call("head.__call__", hidden), merged.head(hidden))
    close(encoder.head(hidden), encoder.base.head(hidden))
    with pytest.raises(AttributeError, match="'Encoder' object has no attribute 'pool'"):
        encoder.call("pool", X)


def test_a_method_has_the_base_s_signature():
    # Trainers ask it what a model takes (google-tunix, for its segments).
    module = NnxNet(nnx.Rngs(0))
    model = lora.nnx.adapt(module, CONFIG, X, key=jax.random.key(0))
    for name in ("__call__", "features"):
        found = inspect.signature(getattr(model, name))
        assert found == inspect.signature(getattr(module, name)), name
    assert callable(model) and list(inspect.signature(model.features).parameters) == ["x"]


def test_what_is_read_from_the_base_is_set_there(encoder):
    graph, state = nnx.split(encoder)
    model = nnx.merge(graph, state, copy=True)
    assert not model.deterministic
    model.eval()
    assert model.base.deterministic and "deterministic" not in vars(model)
    close(model(X), lora.nnx.merged(model)(X))
    model.note = "mine"
    assert vars(model)["note"] == "mine" and not hasattr(model.base, "note")
    assert not encoder.deterministic


class Twice(nnx.Module):
    """One layer under two names."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Dict(up=nnx.Linear(8, 8, rngs=rngs), down=nnx.Linear(8, 8, rngs=rngs))
        self.last = nnx.Dict(up=self.first.up)

    def __call__(self, x):
        return self.last.up(self.first.down(self.first.up(x)))


def test_a_layer_that_is_named_by_its_second_path_is_said():
    def adapt(pattern):
        config = lora.LoraConfig(rank=2, target_modules=pattern)
        return lora.nnx.adapt(Twice(nnx.Rngs(0)), config, X, key=jax.random.key(1)).plan.adapted

    with pytest.warns(
        lora.LeftOutWarning, match="`last.up`, which `target_modules` names, is `fir"
    ):
        assert [leaf.path for leaf in adapt(r".*down|last\..*")] == ["first.down.kernel"]
    assert len(adapt(r"first\..*")) == len(adapt(("up", "down"))) == 2


def test_adapted_module_updates_its_state_like_the_base():
    module = NnxNet(nnx.Rngs(0))
    config = lora.LoraConfig(rank=2, target_modules=("up", "down"))
    model = lora.nnx.adapt(module, config, X, key=jax.random.key(1))
    got, want = model(X), module(X)
    close(got, want)
    close(model.base.norm.mean.get_value(), module.norm.mean.get_value())


@pytest.mark.parametrize("transform", [jax.grad, jax.checkpoint, jax.jit])
def test_a_module_that_changes_nothing_is_closed_over_like_the_base(transform):
    model = lora.nnx.adapt(NnxNet(nnx.Rngs(0)), CONFIG, X, key=jax.random.key(1))
    model.eval()
    want = transform(lambda x: lora.nnx.merged(model)(x).sum())(X)
    close(transform(lambda x: model(x).sum())(X), want)


def test_adapted_module_trains_only_its_adapters():
    module = NnxNet(nnx.Rngs(0))
    module.eval()
    model = lora.nnx.adapt(module, CONFIG, X, key=jax.random.key(1))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=lora.nnx.LoraParam)
    kernel = np.asarray(model.base.up.kernel.get_value())
    target = jnp.ones((4, 8))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(X) - target) ** 2)

        wrt = nnx.DiffState(0, lora.nnx.LoraParam)
        value, grads = nnx.value_and_grad(loss, argnums=wrt)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_array_equal(kernel, model.base.up.kernel.get_value())
    moments = [x for x in jax.tree.leaves(nnx.state(optimizer)) if jnp.ndim(x) > 0]
    adapter = sum(x.size for x in jax.tree.leaves(nnx.state(model, lora.nnx.LoraParam)))
    assert sum(x.size for x in moments) == 2 * adapter


class Table(nnx.Param):
    """A parameter of a class of its own."""


class Shared(nnx.Module):
    """Scanned layers that are found by `nnx.Param`, a table used twice, and a class of its own."""

    def __init__(self, rngs: nnx.Rngs):
        keys = jax.random.split(rngs.params(), 3)
        make = nnx.vmap(lambda key: nnx.Linear(8, 8, rngs=nnx.Rngs(key)), in_axes=0, out_axes=0)
        self.layers = make(keys)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.table = Table(jax.random.normal(rngs.params(), (16, 8)))
        self.again = self.table

    def __call__(self, x):
        scan = nnx.scan(
            lambda layer, x: layer(x),
            in_axes=(nnx.StateAxes({nnx.Param: 0}), nnx.Carry),
            out_axes=nnx.Carry,
        )
        return self.up(scan(self.layers, x)) @ (self.table + self.again)


def test_every_usual_filter_selects_the_adapters_alone():
    module = Shared(nnx.Rngs(0))
    config = lora.LoraConfig(rank=2, target_modules=("layers", "up"), init="random")
    model = lora.nnx.adapt(module, config, X, key=jax.random.key(1))
    found = nnx.state(model, nnx.Param)
    assert list(found) == ["adapters"] and issubclass(lora.nnx.LoraParam, nnx.LoRAParam)
    assert jax.tree.structure(found) == jax.tree.structure(nnx.state(model, nnx.LoRAParam))
    assert jax.tree.structure(found) == jax.tree.structure(nnx.state(model, lora.nnx.LoraParam))
    close(model(X), lora.nnx.merged(model)(X))
    before = jax.tree.map(np.asarray, nnx.state(model, lora.nnx.FrozenParam))

    # As one trains any NNX module, without a word about adapters.
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.mean(model(X) ** 2))(model)
    optimizer.update(model, grads)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, lora.nnx.FrozenParam), before)
    assert not np.allclose(model(X), module(X), atol=1e-3)

    assert model.base.table is model.base.again
    merged = lora.nnx.merged(model)
    assert type(merged.table) is Table and merged.table is merged.again
    assert jax.tree.structure(nnx.state(merged)) == jax.tree.structure(nnx.state(module))


@pytest.mark.wrong_types
def test_a_tree_and_a_plan_that_do_not_belong_together():
    module = NnxNet(nnx.Rngs(0))
    fn, params, state = lora.nnx.functional(module)

    def made(**fields):
        config = lora.LoraConfig(**{"rank": 2, "target_modules": ("up",), **fields})
        plan = lora.plan(config, fn, params, X, state=state)
        return plan, lora.init(jax.random.key(1), plan, params)

    plan, tree = made()
    for fields, text in (
        (dict(rank=4, alpha=32), "rank 2 in `lora_params`, and 4 in `plan`"),
        (dict(alpha=4), r"scale \[8.0\] in `lora_params`, and \[2.0\] in `plan`"),
        (dict(dropout=0.5), "dropout 0.0 in `lora_params`, and 0.5 in `plan`"),
    ):
        with pytest.raises(ValueError, match=f"`up.kernel` has {text}: pass the plan that"):
            lora.nnx.Adapted(module, tree, made(**fields)[0])
    for other in (dict(target_modules=("down",)), dict(modules_to_save=("up",), bias="all")):
        with pytest.raises(ValueError, match="`up.kernel` is a `LoraArray` in .*`plan` has kind"):
            lora.nnx.Adapted(module, tree, made(**{"target_modules": ("down",), **other})[0])
    with pytest.raises(ValueError, match="is a stack of adapters"):
        lora.nnx.Adapted(module, lora.stack([tree]), plan)
    with pytest.raises(
        TypeError, match="`base` must be an `nnx.Module`, got `State`: pass the module"
    ):
        lora.nnx.Adapted(params, tree, plan)


def _another(**fields):
    """An adapted module, of another rank or scale than `CONFIG`, with factors that are not zero."""
    fields = {"rank": 2, "target_modules": ("up", "down"), "init": "random", **fields}
    module = NnxNet(nnx.Rngs(0))
    module.eval()
    return lora.nnx.adapt(module, lora.LoraConfig(**fields), X, key=jax.random.key(1))


@pytest.mark.parametrize("fields", [dict(alpha=32), dict(rank=4, alpha=4), dict(use_dora=True)])
def test_an_update_brings_the_scale_of_the_adapter(fields):
    model, other = _another(), _another(**fields)
    state = nnx.state(other, lora.nnx.LoraParam)
    nnx.update(model, state)
    close(model(X), other(X))
    close(model.lora_params()["up"]["kernel"].scale, other.lora_params()["up"]["kernel"].scale)
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=lora.nnx.LoraParam)
    grads = nnx.grad(lambda model: jnp.mean(model(X) ** 2))(model)
    optimizer.update(model, grads)
    assert not np.allclose(model(X), other(X), atol=1e-4)
    # Its own state brings its own scale back.
    nnx.update(model, nnx.state(_another(**fields), lora.nnx.LoraParam))
    close(model(X), _another(**fields)(X))


def test_an_update_with_a_part_of_another_adapter_is_refused():
    of_two = (
        "`down.kernel` has parts of two adapters, .*: update from the whole `nnx.state.other, lora"
    )
    model = _another()
    nnx.update(model, nnx.state(_another(alpha=32), lambda path, _: path[-1] == "a"))
    with pytest.raises(ValueError, match=of_two):
        model(X)
    # Arrays alone bring no scale; another rank is seen.
    model = _another()
    state = nnx.state(model, lora.nnx.LoraParam)
    other = nnx.to_pure_dict(nnx.state(_another(rank=4), lora.nnx.LoraParam))
    nnx.replace_by_pure_dict(state, other)
    nnx.update(model, state)
    with pytest.raises(ValueError, match=of_two):
        model(X)
    # A plain adapter would leave DoRA's magnitudes of the old one.
    model = _another(use_dora=True)
    nnx.update(model, nnx.state(_another(), lora.nnx.LoraParam))
    with pytest.raises(ValueError, match=of_two):
        model(X)


@pytest.mark.wrong_types
def test_modules_of_the_other_flax_are_sent_to_their_own_room():
    linen: Any = LinenNet()
    module = NnxNet(nnx.Rngs(0))
    variables = linen.init(jax.random.key(0), X)
    wrong: Any
    for wrong in (linen, variables):
        text = f"`module` must be an `nnx.Module`, got `{type(wrong).__name__}`: `lora.linen.funct"
        with pytest.raises(TypeError, match=text):
            lora.nnx.adapt(wrong, CONFIG, X, key=jax.random.key(1))
        with pytest.raises(TypeError, match=text):
            lora.nnx.functional(wrong)
    for wrong in (module, variables, linen.apply):
        with pytest.raises(TypeError, match="`module` must be a `flax.linen.Module`, got"):
            lora.linen.functional(wrong, variables)
    with pytest.raises(
        TypeError, match="`variables` must be a dict of collections, got `LinenNet`"
    ):
        lora.linen.functional(linen, linen)


def test_adapted_module_with_saved_leaf_and_pissa():
    module = NnxNet(nnx.Rngs(0))
    module.eval()
    config = lora.LoraConfig(
        rank=2, target_modules=("up",), modules_to_save=("down",), init="pissa"
    )
    model = lora.nnx.adapt(module, config, X, key=jax.random.key(1))
    close(model(X), module(X))
    assert set(model.adapters["down/kernel"]) == {"value"}
    assert not np.allclose(model.base.up.kernel.get_value(), module.up.kernel.get_value())


def test_what_has_adapters_and_what_has_none():
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    config = lora.LoraConfig(rank=2, target_modules="all-linear")
    model = lora.nnx.adapt(module, config, jnp.ones((1, 4)), key=jax.random.key(0))
    with pytest.raises(ValueError, match="`module` has adapters already: train it as it is, or"):
        lora.nnx.adapt(model, config, jnp.ones((1, 4)), key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"nnx.merged\(model\)"):
        lora.nnx.merged(cast(Any, module))
    again = lora.nnx.adapt(lora.nnx.merged(model), config, jnp.ones((1, 4)), key=jax.random.key(1))
    np.testing.assert_array_equal(again(jnp.ones((1, 4))), module(jnp.ones((1, 4))))
