"""LoftQ beside PEFT's own, which runs here over bitsandbytes' NF4 written anew for the CPU."""

import contextlib
import importlib.util
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft
from lora_jax.hf.peft.base import as_read

from tests.support.nf4 import quantized
from tests.support.oracle import oracle, seeded
from tests.support.peft_oracle import (
    assert_same_files,
    contents,
    peft_reads,
    write_contents,
)

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

X = np.random.default_rng(3).standard_normal((5, 64)).astype(np.float32)
FIELDS: dict[str, Any] = dict(r=4, lora_alpha=4, target_modules=["up", "down"])
SHAPES = {"up": (64, 128), "down": (128, 16)}


def fn(p, x):
    return jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"]


def torch_net():
    """The same network in torch."""
    import torch

    layers = {name: torch.nn.Linear(*shape, bias=False) for name, shape in SHAPES.items()}
    for name, linear in layers.items():
        linear.weight.data = torch.tensor(weight(name).T.copy())

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = layers["up"], layers["down"]

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    return Net()


def weight(name):
    return seeded(name, SHAPES[name], scale=SHAPES[name][0] ** -0.5)


@contextlib.contextmanager
def their_loftq():
    """PEFT needs bitsandbytes and a GPU for this; what it computes needs neither."""
    import torch
    from peft.utils import loftq_utils

    class Params4bit:
        def __init__(self, data, **_):
            self.data, self.quant_state = data, None

        def to(self, _):
            return self

    def decoded(data, _):
        return torch.tensor(quantized(data.numpy().T).T.copy())

    fake: Any = types.ModuleType("bitsandbytes")
    fake.nn = types.SimpleNamespace(Params4bit=Params4bit)
    fake.functional = types.SimpleNamespace(dequantize_4bit=decoded)
    find = importlib.util.find_spec  # the rest of PEFT must not find it
    hidden = lambda name, *more: None if name == "bitsandbytes" else find(name, *more)  # noqa: E731
    original = torch.Tensor.to

    def to(self, *args, **kwargs):
        kwargs |= {"device": "cpu"} if kwargs.get("device") == "cuda" else {}
        return original(self, *args, **kwargs)

    with (
        mock.patch.dict(sys.modules, bitsandbytes=fake),
        mock.patch.object(importlib.util, "find_spec", hidden),
        mock.patch.object(loftq_utils, "is_bnb_available", lambda: True),
        mock.patch.object(loftq_utils, "is_bnb_4bit_available", lambda: True),
        mock.patch.object(torch.Tensor, "to", to),
    ):
        yield


def started_by_peft(steps):
    """PEFT's quantized base, its output and the files of its adapter."""
    import peft
    import torch

    torch.manual_seed(0)
    with their_loftq():
        model = peft.get_peft_model(
            torch_net(), peft.LoraConfig(init_lora_weights="loftq", loftq_config=steps, **FIELDS)
        )
    inner = model.base_model.model
    base = {name: getattr(inner, name).base_layer.weight.numpy(force=True) for name in SHAPES}
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        files = contents(Path(scratch))
    return {"base": base, "files": files, "outputs": outputs(model)}


def outputs(model):
    import torch

    return model(torch.tensor(X)).numpy(force=True)


@pytest.mark.parametrize("turns", [1, 3])
def test_adapters_of_both_are_read_by_both(turns, tmp_path):
    base = {name: {"kernel": jnp.asarray(weight(name))} for name in SHAPES}
    steps = {"loftq_bits": 4, "loftq_iter": turns}
    theirs = oracle(f"hf/peft/loftq/{turns}.wrote", lambda: started_by_peft(steps))
    config = lora.LoraConfig(rank=4, alpha=4, target_modules=("up", "down"), init="loftq",
                             loftq_config=steps)  # fmt: skip
    ours = lora.init(jax.random.key(0), lora.plan(config, fn, base, X), base)
    for name in SHAPES:
        same = np.isclose(ours[name]["kernel"].w.dequantize().T, theirs["base"][name])
        assert same.all() if turns == 1 else same.mean() > 0.99
    close: dict[str, Any] = dict(rtol=1e-3, atol=2e-4 if turns == 1 else 5e-3)
    np.testing.assert_allclose(lora.lorafy(fn)(ours, X), theirs["outputs"], **close)

    write_contents(tmp_path / "theirs", theirs["files"])
    read, back = load_peft(tmp_path / "theirs", fn, base, X)
    np.testing.assert_allclose(lora.lorafy(fn)(read, X), theirs["outputs"], **close)
    save_peft(tmp_path / "again", read, back)
    assert_same_files(tmp_path / "theirs", tmp_path / "again")

    save_peft(tmp_path / "ours", ours, config, task_type=None, base_model_name="org/net")
    card = (tmp_path / "ours" / "README.md").read_text("utf-8")
    assert f"started by LoftQ (4 bits, {turns} turns): it belongs to the base model quan" in card
    got = peft_reads(
        f"hf/peft/loftq/{turns}", tmp_path / "ours", torch_net, outputs, around=their_loftq
    )
    np.testing.assert_allclose(got, lora.lorafy(fn)(ours, X), **close)

    # A base that is quantized already is the adapter's after one turn, and not after more.
    small = lora.quantize(base, ["up", "down"], scale_dtype="float32")
    if turns == 1:
        read, _ = load_peft(tmp_path / "ours", fn, small, X)
        jax.tree.map(np.testing.assert_array_equal, read, ours)
    else:
        with pytest.raises(ValueError, match="started by LoftQ in 3 turns, whose base is not"):
            load_peft(tmp_path / "ours", fn, small, X)


def test_a_base_that_is_quantized_in_part_is_refused():
    params = lora.quantize({name: {"kernel": weight(name)} for name in SHAPES}, ["up"])
    config = lora.LoraConfig(rank=4, init="loftq", target_modules=("up", "down"))
    with pytest.raises(ValueError, match="`up.kernel` is quantized and `down.kernel` is not"):
        as_read(lora.plan(config, fn, params, X), params, source="adapter")
