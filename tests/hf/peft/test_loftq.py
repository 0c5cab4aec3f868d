"""LoftQ beside PEFT's own, which runs here over bitsandbytes' NF4 written anew for the CPU."""

import filecmp
import importlib.util
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.utils import loftq_utils

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft

from tests.methods.test_loftq import quantized

pytestmark = [pytest.mark.once, pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

X = np.random.default_rng(3).standard_normal((5, 64)).astype(np.float32)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(64, 128, bias=False)
        self.down = torch.nn.Linear(128, 16, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def fn(p, x):
    return jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"]


@pytest.fixture
def their_loftq(monkeypatch):
    """PEFT asks for bitsandbytes and a GPU; what it computes needs neither."""

    class Params4bit:
        def __init__(self, data, **_):
            self.data, self.quant_state = data, None

        def to(self, _):
            return self

    def decoded(data, _):
        return torch.tensor(quantized(data.numpy().T).T.copy())

    fake = types.ModuleType("bitsandbytes")
    fake.nn = types.SimpleNamespace(Params4bit=Params4bit)
    fake.functional = types.SimpleNamespace(dequantize_4bit=decoded)
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    find = importlib.util.find_spec  # for all else in PEFT there is none
    hidden = lambda name, *more: None if name == "bitsandbytes" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    monkeypatch.setattr(loftq_utils, "is_bnb_available", lambda: True)
    monkeypatch.setattr(loftq_utils, "is_bnb_4bit_available", lambda: True)
    original = torch.Tensor.to

    def to(self, *args, **kwargs):
        kwargs |= {"device": "cpu"} if kwargs.get("device") == "cuda" else {}
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)


@pytest.mark.parametrize("turns", [1, 3])
def test_adapters_of_both_are_read_by_both(turns, their_loftq, tmp_path):
    torch.manual_seed(0)
    net = Net()
    base = {name: {"kernel": jnp.asarray(getattr(net, name).weight.detach().numpy().T)}
            for name in ("up", "down")}  # fmt: skip
    steps = {"loftq_bits": 4, "loftq_iter": turns}
    fields: dict[str, Any] = dict(r=4, lora_alpha=4, target_modules=["up", "down"])
    theirs = peft.get_peft_model(
        net, peft.LoraConfig(init_lora_weights="loftq", loftq_config=steps, **fields)
    )
    config = lora.LoraConfig(rank=4, alpha=4, target_modules=("up", "down"), init="loftq",
                             loftq_config=steps)  # fmt: skip
    ours = lora.init(jax.random.key(0), lora.plan(config, fn, base, X), base)
    for name in ("up", "down"):
        layer = getattr(theirs.base_model.model, name)
        same = np.isclose(ours[name]["kernel"].w.dequantize().T, layer.base_layer.weight.detach())
        assert same.all() if turns == 1 else same.mean() > 0.99
    close: dict[str, Any] = dict(rtol=1e-3, atol=2e-4 if turns == 1 else 5e-3)
    want = theirs(torch.tensor(X)).detach().numpy()
    np.testing.assert_allclose(lora.lorafy(fn)(ours, X), want, **close)

    theirs.save_pretrained(str(tmp_path / "theirs"))
    read, back = load_peft(tmp_path / "theirs", fn, base, X)
    np.testing.assert_allclose(lora.lorafy(fn)(read, X), want, **close)
    save_peft(tmp_path / "again", read, back)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert filecmp.cmp(tmp_path / "theirs" / name, tmp_path / "again" / name, shallow=False)

    save_peft(tmp_path / "ours", ours, config, task_type=None, base_model_name="org/net")
    card = (tmp_path / "ours" / "README.md").read_text("utf-8")
    assert f"started by LoftQ (4 bits, {turns} turns): it belongs to the base model quan" in card
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "ours"))
    got = loaded(torch.tensor(X)).detach().numpy()
    np.testing.assert_allclose(got, lora.lorafy(fn)(ours, X), **close)

    # A base that is quantized already is the adapter's after one turn, and not after more.
    small = lora.quantize(base, ["up", "down"], scale_dtype="float32")
    if turns == 1:
        read, _ = load_peft(tmp_path / "ours", fn, small, X)
        jax.tree.map(np.testing.assert_array_equal, read, ours)
    else:
        with pytest.raises(ValueError, match="started by LoftQ in 3 turns, whose base is not"):
            load_peft(tmp_path / "ours", fn, small, X)
