"""PEFT's layouts of convolutions and of experts, both ways against the real `peft`."""

import dataclasses
import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.array import LoraArray, Window
from lora_jax.hf import load_peft, save_peft

from tests.support.oracle import seeded
from tests.support.peft_oracle import assert_same_files, close, peft_reads, peft_wrote, randomize

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PLACE = "hf/peft/shapes"
less_randomized = partial(randomize, scale=0.3)


def noisy(tree):
    """Random numbers in all that trains."""
    rng = np.random.default_rng(0)

    def noise(x):
        if not isinstance(x, LoraArray):
            return x
        parts = {p: getattr(x, p) for p in ("a", "b", "m", "bias") if getattr(x, p) is not None}
        return dataclasses.replace(
            x, **{p: v + 0.3 * rng.normal(size=v.shape).astype("f4") for p, v in parts.items()}
        )

    return jax.tree.map(noise, tree, is_leaf=lora.is_lora)


def quick(fn, *args):
    """The value of a function that is compiled once and runs once: little optimization."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})(*args)


def fresh(config, fn, params, x):
    """A tree whose adapters are all random."""
    plan = lora.plan(config, fn, params, x)
    return noisy(quick(lambda params: lora.init(jax.random.key(0), plan, params), params))


def output_for(x):
    """A function that gives a torch network's output for an array."""

    def run(net):
        from tests.support.torch_nets import output

        return output(net, x)

    return run


# ---- convolutions


def conv_weights(dims: int, groups: int = 1) -> dict[str, np.ndarray]:
    """The state of the torch network."""
    ones = (1,) * dims
    shapes = {
        "conv1.weight": (8, 4, *(3, 2, 3)[:dims]),
        "conv1.bias": (8,),
        "conv2.weight": (6, 8 // groups, *ones),
        "conv2.bias": (6,),
        "fc.weight": (5, 6),
        "fc.bias": (5,),
    }
    return {name: seeded(name, shape, scale=0.3) for name, shape in shapes.items()}


def torch_conv(dims: int, groups: int = 1):
    from tests.support.torch_nets import ConvNet, with_weights

    return with_weights(ConvNet(dims, groups), conv_weights(dims, groups))


class LinenNet(nn.Module):
    dims: int
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        window = (3, 2, 3)[: self.dims]
        x = nn.Conv(8, window, strides=2, padding=((1, 1),) * self.dims, name="conv1")(x)
        ones = (1,) * self.dims
        x = nn.Conv(6, ones, feature_group_count=self.groups, name="conv2")(nn.relu(x))
        return nn.Dense(5, name="fc")(x.reshape(x.shape[0], -1, 6).mean(1))


def ours_of(dims: int, groups: int = 1):
    """The linen network with the torch network's weights, its input, and that of torch."""
    weights = conv_weights(dims, groups)

    def kernel(weight):  # (out, in, window...) -> (window..., in, out)
        return jnp.asarray(np.moveaxis(weight, (0, 1), (-1, -2)))

    params = {
        name: {
            "kernel": kernel(weights[f"{name}.weight"]),
            "bias": jnp.asarray(weights[f"{name}.bias"]),
        }
        for name in ("conv1", "conv2", "fc")
    }
    x = np.random.default_rng(0).normal(size=(2, 4, 7, 6, 5)[: dims + 2]).astype("f4")
    module = LinenNet(dims, groups)
    fn = lambda params, x: module.apply({"params": params}, x)  # noqa: E731
    return fn, params, jnp.moveaxis(jnp.asarray(x), 1, -1), x


CONVS = {
    "plain": {"r": 3, "target_modules": ["conv1", "conv2"]},
    "dora": {"r": 2, "target_modules": ["conv1", "conv2", "fc"], "use_dora": True},
    "lora-bias": {"r": 2, "target_modules": ["conv1"], "lora_bias": True, "lora_alpha": 5},
}


@pytest.mark.parametrize(
    "case, dims",
    [("plain", 1), ("plain", 2), ("plain", 3), ("dora", 1), ("dora", 2), ("lora-bias", 2)],
)
def test_convolutions_of_peft_here_and_back(case, dims, tmp_path):
    fn, params, x, torch_x = ours_of(dims)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    want = peft_wrote(
        f"{PLACE}/conv{dims}/{case}",
        theirs,
        partial(torch_conv, dims),
        CONVS[case],
        output_for(torch_x),
        randomized=less_randomized,
    )
    tree, config = load_peft(theirs, fn, params, x)
    assert tree["conv1"]["kernel"].window == Window(tuple(range(dims)))
    close(quick(lora.lorafy(fn, strict=True), tree, x), want)
    save_peft(ours, tree, config, task_type=None)
    assert_same_files(theirs, ours)


@pytest.mark.parametrize("case", ["plain", "dora"])
def test_our_convolutions_in_peft(case, tmp_path):
    fn, params, x, torch_x = ours_of(2)
    fields = {k: v for k, v in CONVS[case].items() if k not in ("r", "lora_alpha")}
    config = lora.LoraConfig(rank=2, **fields)
    tree = fresh(config, fn, params, x)
    save_peft(tmp_path / "a", tree, config, task_type=None)
    name, there = f"{PLACE}/conv2/ours/{case}", partial(torch_conv, 2)
    want = peft_reads(name, tmp_path / "a", there, output_for(torch_x))
    close(want, quick(lora.lorafy(fn), tree, x))
    again, _ = load_peft(tmp_path / "a", fn, params, x)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_grouped_convolutions_are_refused_both_ways(tmp_path):
    fn, params, x, torch_x = ours_of(2, groups=2)
    config = lora.LoraConfig(rank=2, target_modules=("conv2",))
    tree = fresh(config, fn, params, x)
    with pytest.raises(ValueError, match="`conv2.kernel` is the kernel of a convolution with 2 gr"):
        save_peft(tmp_path / "a", tree, config)
    there = partial(torch_conv, 2, groups=2)
    fields = {"r": 2, "target_modules": ["conv2"]}
    peft_wrote(f"{PLACE}/grouped", tmp_path / "theirs", there, fields, output_for(torch_x))
    with pytest.raises(ValueError, match="its A mixes the channels of all groups"):
        load_peft(tmp_path / "theirs", fn, params, x)


# ---- experts kept as one parameter

E, D, F, L = 3, 4, 5, 2


def expert_shapes(transposed: bool) -> dict[str, tuple[int, ...]]:
    if transposed:
        return {"gate_up_proj": (E, D, F), "down_proj": (E, F, D)}
    return {"gate_up_proj": (E, F, D), "down_proj": (E, D, F)}


def moe_weights(transposed: bool) -> dict[str, np.ndarray]:
    """The state of the torch network."""
    shapes = {f"experts.{name}": shape for name, shape in expert_shapes(transposed).items()}
    shapes["router.weight"] = (E, D)
    names = {f"layers.{i}.{name}": shape for i in range(L) for name, shape in shapes.items()}
    return {name: seeded(name, shape) for name, shape in names.items()}


def torch_moe(transposed: bool):
    from tests.support.torch_nets import Moe, with_weights

    return with_weights(Moe(L, expert_shapes(transposed), transposed), moe_weights(transposed))


def moe(params, x, *, transposed: bool):
    """The same in JAX, its layers stacked."""
    up, down = ("edf", "efd") if transposed else ("efd", "edf")

    def step(x, layer):
        weights = jax.nn.softmax(x @ layer["router"]["kernel"])
        hidden = jnp.tanh(jnp.einsum(f"td,{up}->tef", x, layer["experts"]["gate_up_proj"]))
        each = jnp.einsum(f"tef,{down}->ted", hidden, layer["experts"]["down_proj"])
        return x + jnp.einsum("te,ted->td", weights, each), None

    return jax.lax.scan(step, x, params["layers"])[0]


def moe_params(transposed: bool) -> dict:
    weights = moe_weights(transposed)

    def stacked(name: str):
        return jnp.stack([jnp.asarray(weights[f"layers.{i}.{name}"]) for i in range(L)])

    experts = {name: stacked(f"experts.{name}") for name in ("gate_up_proj", "down_proj")}
    router = {"kernel": jnp.swapaxes(stacked("router.weight"), 1, 2)}
    return {"layers": {"experts": experts, "router": router}}


X = np.random.default_rng(2).normal(size=(6, D)).astype("f4")
EXPERTS = {
    "both": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "other-order": {"target_parameters": ["down_proj", "experts.gate_up_proj"]},
    "one": {"target_parameters": ["layers.1.experts.down_proj"]},
    "patterns": {
        "target_parameters": ["gate_up_proj", "down_proj"],
        "rank_pattern": {"gate_up_proj": 3},
        "alpha_pattern": {r"layers\.1\.experts\.down_proj": 3},
        "use_rslora": True,
    },
    "router": {"target_parameters": ["gate_up_proj"], "target_modules": ["router"]},
}


@pytest.mark.parametrize(
    "case, transposed", [(c, c in ("both", "patterns")) for c in EXPERTS] + [("both", False)]
)
def test_experts_of_peft_here_and_back(case, transposed, tmp_path):
    fn, params = partial(moe, transposed=transposed), moe_params(transposed)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    want = peft_wrote(
        f"{PLACE}/experts/{case}{'-transposed' * transposed}",
        theirs,
        partial(torch_moe, transposed),
        {"r": 2, "target_modules": [], **EXPERTS[case]},
        output_for(X),
        randomized=less_randomized,
    )
    tree, config = load_peft(theirs, fn, params, X)
    close(quick(lora.lorafy(fn, strict=True), tree, X), want)
    save_peft(ours, tree, config, task_type=None)
    assert_same_files(theirs, ours)


def test_our_experts_in_peft(tmp_path):
    fn, params = partial(moe, transposed=False), moe_params(False)
    config = lora.LoraConfig(
        rank=2, target_modules=("router",), target_parameters=("gate_up_proj", "down_proj")
    )
    tree = fresh(config, fn, params, X)
    save_peft(tmp_path / "a", tree, config, task_type=None)
    there = partial(torch_moe, False)
    want = peft_reads(f"{PLACE}/experts/ours", tmp_path / "a", there, output_for(X))
    close(want, quick(lora.lorafy(fn), tree, X))
    again, _ = load_peft(tmp_path / "a", fn, params, X)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


@pytest.mark.parametrize(
    "targets",
    [[f"layers.{i}.experts.{j}.up" for i in range(3) for j in range(4)],
     [f"experts.{j}.up" for j in range(4)], r".*experts\.\d+\.up"],
    ids=("names", "ends", "expression"),
)  # fmt: skip
def test_a_config_may_name_each_expert_of_a_stack(targets, tmp_path):
    x = np.ones((4, 2, 8), np.float32)
    params = {"layers": {"experts": {"up": np.ones((3, 4, 8, 8), np.float32)}}}

    def model(params, x):
        return jax.lax.map(lambda w: jax.vmap(jnp.matmul)(x, w), params["layers"]["experts"]["up"])

    config = lora.LoraConfig(rank=2, target_modules=("up",), init="random")
    tree = lora.init(jax.random.key(0), lora.plan(config, model, params, x), params)
    lora.hf.save_peft(tmp_path, tree, config)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": targets}))
    again, _ = lora.hf.load_peft(tmp_path, model, params, x)
    jax.tree.map(np.testing.assert_array_equal, again, tree)
