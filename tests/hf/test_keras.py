"""What `.lora.h5` files are refused, without h5py; `make integrations` runs keras-hub itself."""

import numpy as np
import pytest

import lora_jax as lora
from lora_jax.array import LoraArray

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
