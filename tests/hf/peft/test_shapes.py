"""PEFT's layouts of convolutions and of experts, both ways against the real `peft`."""

import dataclasses
import filecmp
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import lora_jax as lora
from lora_jax.array import LoraArray, Window
from lora_jax.hf import load_peft, save_peft

pytestmark = [pytest.mark.once, pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def close(one, other):
    np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


def randomize(model) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


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


def same_files(one, other):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert filecmp.cmp(one / name, other / name, shallow=False), name


# ---- convolutions


class TorchNet(torch.nn.Module):
    """Two convolutions, a mean over the window, a linear layer."""

    def __init__(self, dims: int, groups: int = 1):
        super().__init__()
        conv: Any = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[dims - 1]
        torch.manual_seed(0)
        self.conv1 = conv(4, 8, (3, 2, 3)[:dims], stride=2, padding=1)
        self.conv2 = conv(8, 6, 1, groups=groups)
        self.fc = torch.nn.Linear(6, 5)

    def forward(self, x):
        x = self.conv2(torch.relu(self.conv1(x)))
        return self.fc(x.flatten(2).mean(-1))


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


def ours_of(net: TorchNet, dims: int, groups: int = 1):
    """The linen network with the torch network's weights, its input, and both inputs."""

    def kernel(weight):  # (out, in, window...) -> (window..., in, out)
        return jnp.asarray(np.moveaxis(weight.detach().numpy(), (0, 1), (-1, -2)))

    params = {
        name: {"kernel": kernel(layer.weight), "bias": jnp.asarray(layer.bias.detach().numpy())}
        for name, layer in (("conv1", net.conv1), ("conv2", net.conv2), ("fc", net.fc))
    }
    x = np.random.default_rng(0).normal(size=(2, 4, 7, 6, 5)[: dims + 2]).astype("f4")
    module = LinenNet(dims, groups)
    fn = lambda params, x: module.apply({"params": params}, x)  # noqa: E731
    return fn, params, jnp.moveaxis(jnp.asarray(x), 1, -1), torch.tensor(x)


def output(net, x) -> np.ndarray:
    with torch.no_grad():
        return net.eval()(x).numpy()


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
    net = TorchNet(dims)
    fn, params, x, torch_x = ours_of(net, dims)
    model = peft.get_peft_model(net, peft.LoraConfig(**CONVS[case]))
    randomize(model)
    model.save_pretrained(str(tmp_path / "theirs"))
    tree, config = load_peft(tmp_path / "theirs", fn, params, x)
    assert tree["conv1"]["kernel"].window == Window(tuple(range(dims)))
    close(quick(lora.lorafy(fn, strict=True), tree, x), output(model, torch_x))
    save_peft(tmp_path / "ours", tree, config, task_type=None)
    same_files(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("case", ["plain", "dora"])
def test_our_convolutions_in_peft(case, tmp_path):
    net = TorchNet(2)
    fn, params, x, torch_x = ours_of(net, 2)
    fields = {k: v for k, v in CONVS[case].items() if k not in ("r", "lora_alpha")}
    config = lora.LoraConfig(rank=2, **fields)
    tree = fresh(config, fn, params, x)
    save_peft(tmp_path / "a", tree, config, task_type=None)
    model = peft.PeftModel.from_pretrained(TorchNet(2), str(tmp_path / "a"))
    close(output(model, torch_x), quick(lora.lorafy(fn), tree, x))
    again, _ = load_peft(tmp_path / "a", fn, params, x)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_grouped_convolutions_are_refused_both_ways(tmp_path):
    net = TorchNet(2, groups=2)
    fn, params, x, _ = ours_of(net, 2, groups=2)
    config = lora.LoraConfig(rank=2, target_modules=("conv2",))
    tree = fresh(config, fn, params, x)
    with pytest.raises(ValueError, match="`conv2.kernel` is the kernel of a convolution with 2 gr"):
        save_peft(tmp_path / "a", tree, config)
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["conv2"]))
    model.save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match="its A mixes the channels of all groups"):
        load_peft(tmp_path / "theirs", fn, params, x)


# ---- experts kept as one parameter

E, D, F, L = 3, 4, 5, 2


class TorchExperts(torch.nn.Module):
    """Experts as transformers 5 keeps them: (E, out, in), or (E, in, out) where transposed."""

    def __init__(self, transposed: bool):
        super().__init__()
        self.is_transposed = transposed
        shapes = {"gate_up_proj": (E, F, D), "down_proj": (E, D, F)}
        for name, (e, out, into) in shapes.items():
            shape = (e, into, out) if transposed else (e, out, into)
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))

    def forward(self, x, weights):
        up = self.gate_up_proj if self.is_transposed else self.gate_up_proj.mT
        down = self.down_proj if self.is_transposed else self.down_proj.mT
        hidden = torch.tanh(torch.einsum("td,edf->tef", x, up))
        return torch.einsum("te,ted->td", weights, torch.einsum("tef,efd->ted", hidden, down))


class TorchMoe(torch.nn.Module):
    def __init__(self, transposed: bool):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList()
        for _ in range(L):
            layer = torch.nn.Module()
            layer.experts = TorchExperts(transposed)
            layer.router = torch.nn.Linear(D, E, bias=False)
            self.layers.append(layer)

    def forward(self, x):
        layer: Any
        for layer in self.layers:
            x = x + layer.experts(x, torch.softmax(layer.router(x), -1))
        return x


def moe(params, x, *, transposed: bool):
    """The same in JAX, its layers stacked."""
    up, down = ("edf", "efd") if transposed else ("efd", "edf")

    def step(x, layer):
        weights = jax.nn.softmax(x @ layer["router"]["kernel"])
        hidden = jnp.tanh(jnp.einsum(f"td,{up}->tef", x, layer["experts"]["gate_up_proj"]))
        each = jnp.einsum(f"tef,{down}->ted", hidden, layer["experts"]["down_proj"])
        return x + jnp.einsum("te,ted->td", weights, each), None

    return jax.lax.scan(step, x, params["layers"])[0]


def moe_params(net: TorchMoe):
    def stacked(get):
        return jnp.stack([jnp.asarray(get(layer).detach().numpy()) for layer in net.layers])

    names = ("gate_up_proj", "down_proj")
    experts = {n: stacked(lambda layer, n=n: getattr(layer.experts, n)) for n in names}
    router = {"kernel": stacked(lambda layer: layer.router.weight.T)}
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
    net = TorchMoe(transposed)
    fn, params = partial(moe, transposed=transposed), moe_params(net)
    fields = {"r": 2, "target_modules": [], **EXPERTS[case]}
    model = peft.get_peft_model(net, peft.LoraConfig(**fields))
    randomize(model)
    model.save_pretrained(str(tmp_path / "theirs"))
    tree, config = load_peft(tmp_path / "theirs", fn, params, X)
    close(quick(lora.lorafy(fn, strict=True), tree, X), output(model, torch.tensor(X)))
    save_peft(tmp_path / "ours", tree, config, task_type=None)
    same_files(tmp_path / "theirs", tmp_path / "ours")


def test_our_experts_in_peft(tmp_path):
    transposed = False
    net = TorchMoe(transposed)
    fn, params = partial(moe, transposed=transposed), moe_params(net)
    config = lora.LoraConfig(
        rank=2, target_modules=("router",), target_parameters=("gate_up_proj", "down_proj")
    )
    tree = fresh(config, fn, params, X)
    save_peft(tmp_path / "a", tree, config, task_type=None)
    model = peft.PeftModel.from_pretrained(TorchMoe(transposed), str(tmp_path / "a"))
    close(output(model, torch.tensor(X)), quick(lora.lorafy(fn), tree, X))
    again, _ = load_peft(tmp_path / "a", fn, params, X)
    jax.tree.map(np.testing.assert_array_equal, again, tree)
