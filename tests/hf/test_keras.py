"""What `.lora.h5` files are refused, without h5py; `make integrations` runs keras-hub itself."""

import numpy as np
import pytest

import lora_jax as lora
from lora_jax.array import LoraArray
from lora_jax.hf.keras import _filled, _Pair, _pair

pytestmark = pytest.mark.once

LEAF = LoraArray(
    w=np.ones((4, 2, 3), np.float32), a=np.ones((4, 2), np.float32),
    b=np.ones((2, 2, 3), np.float32), scale=np.float32(1), roles="ioo",
)  # fmt: skip


@pytest.mark.parametrize(
    ("path", "layers", "message"),
    [
        ("a.h5", {0: "q/kernel"}, r"`path` must end in `.lora.h5`, as keras-hub requires, got"),
        ("a.lora.h5", {0: "v/kernel"}, "leaf `q.kernel` trains and is no kernel of `layers`"),
    ],
)
def test_what_is_not_written(tmp_path, path, layers, message):
    with pytest.raises(ValueError, match=message):
        lora.hf.save_keras_lora(tmp_path / path, {"q/kernel": LEAF}, layers=layers)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        lora.hf.load_keras_lora(tmp_path / "a.lora.h5", lambda p, x: x, {}, 1.0, layers={})


@pytest.mark.parametrize("roles", ["io", "ioo"])
def test_both_factors_hold_the_change(roles):
    """Also a part of it that is a thousandth of the largest."""
    draw = np.random.default_rng(0)
    outs = (2, 3)[-len(roles) + 1 :]
    a, b = (draw.normal(size=shape).astype(np.float32) for shape in ((4, 2), (2, *outs)))
    a *= np.array([1, 1e-3], np.float32)
    leaf = LoraArray(np.ones((4, *outs), np.float32), a, b, np.float32(0.5), roles=roles)
    pair = _pair("q", leaf)
    want = 0.5 * np.tensordot(a, b, 1)
    np.testing.assert_allclose(np.tensordot(pair.a, pair.b, 1), want, atol=1e-6)


def test_heads_get_their_own_a_and_the_same_b():
    draw = np.random.default_rng(0)
    pair = _Pair(draw.normal(size=(4, 2, 5)), draw.normal(size=(5, 3)))
    blank = LoraArray(
        np.ones((4, 2, 3), np.float32), np.ones((2, 4, 5), np.float32),
        np.ones((2, 5, 3), np.float32), np.ones(2, np.float32), roles="iso",
    )  # fmt: skip
    leaf = _filled(blank, pair, "a.lora.h5")
    for head in (0, 1):
        np.testing.assert_array_equal(leaf.a[head], pair.a[:, head].astype(np.float32))
        np.testing.assert_array_equal(leaf.b[head], pair.b.astype(np.float32))
