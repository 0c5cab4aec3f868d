"""The programs of examples/integrations work with the packages that they are for.

Figures are recorded with LORA_JAX_FIGURES=record in docs/integrations/figures.
"""

import pytest

from tests.support.integrations import figures_of

# Two programs of the same arithmetic in float32, of values up to ten.
CLOSE = 1e-4


def test_jax_export():
    found = figures_of("jax_export")
    assert found["difference"] < CLOSE < 1 < found["moved"]


def test_flax_train_state():
    found = figures_of("flax_train_state", "flax", "optax")
    assert found["last_loss"] < 0.1 * found["first_loss"]
    assert found["moments"] == found["trained"] == 4 * (8 + 64 + 64 + 4)
    assert found["restored"]


def test_nnx_transforms():
    found = figures_of("nnx_transforms", "flax", "optax")
    assert found["last_loss"] < 0.3 * found["first_loss"]
    assert found["trained"] == 2 * 2 * (8 + 16)
    assert found["vmap_difference"] < CLOSE and found["scan_difference"] < CLOSE


def test_optax_partition():
    found = figures_of("optax_partition", "optax")
    assert found["lora_plus_loss"] < found["lora_loss"] < 0.5 * found["first_loss"]
    assert found["lora_fa_loss"] < 0.5 * found["first_loss"]
    assert found["lora_fa_a_moved"] == 0 < found["lora_plus_a_moved"]


def test_equinox_modules():
    found = figures_of("equinox_modules", "equinox")
    assert found["adapted"] == 6 and found["kept"]
    assert found["merge_difference"] < CLOSE < 1 < found["moved"]
    assert found["restored_difference"] == 0 < found["least_gradient"]


def test_a_changed_call_is_named(monkeypatch, tmp_path):
    from tests.support import integrations

    program = "import optax\n\n\ndef main():\n    return optax.adam(rate=1.0)\n"
    (tmp_path / "old.py").write_text(program, "utf-8")
    monkeypatch.setattr(integrations, "PROGRAMS", tmp_path)
    with pytest.raises(pytest.fail.Exception, match=r"`optax.adam\(rate=1.0\)` raises Type"):
        figures_of("old", "optax")
