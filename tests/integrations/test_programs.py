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


def test_orbax_safetensors():
    found = figures_of("orbax_safetensors", "orbax-checkpoint", "safetensors")
    assert found["difference"] < CLOSE < 1 < found["moved"]
    assert found["parts"] == [[32, 16], [32, 16]] and "fsdp" in found["factor_sharding"]


def test_fit_data():
    found = figures_of("fit_data", "grain", "datasets")
    for name in ("grain", "datasets"):
        assert found[f"{name}_rows"] == 15
        assert found[f"{name}_losses"][1] < 0.5 * found[f"{name}_losses"][0]


def test_diffrax_ode():
    found = figures_of("diffrax_ode", "diffrax", "equinox")
    for name in ("checkpoints", "direct", "backsolve"):
        # The solver's own tolerance: its steps depend on the rounding of the field.
        assert found[f"{name}_difference"] < CLOSE
        assert found[f"{name}_gradient_difference"] < 10 * CLOSE


def test_qwix_base():
    found = figures_of("qwix_base", "qwix", "flax")
    for bits in ("int8", "int4"):
        # Both decode, then multiply: the same numbers but for the order of sums.
        assert found[f"{bits}_difference"] < CLOSE
        assert found[f"{bits}_losses"][1] < 0.6 * found[f"{bits}_losses"][0]


def test_openpi_lora():
    found = figures_of("openpi_lora", "flax")
    # Sums of a hundred products of normal numbers.
    assert found["difference"] < 10 * CLOSE
    # Five weights with two factors each; k and v, gate and up are two tensors there; three layers.
    assert found["read"] == 3 * 5 and found["exported"] == 3 * 7


@pytest.mark.filterwarnings("ignore::lora_jax.MaterializedWarning")
def test_optimistix_fit():
    found = figures_of("optimistix_fit", "optimistix", "equinox")
    assert len(found) == 4 and max(found.values()) < CLOSE


def test_xllamacpp_adapter():
    found = figures_of("xllamacpp_adapter", "xllamacpp")
    # llama.cpp rounds activations to eight bits, which turns near ties of the base alone.
    assert found["equal_adapted"] == found["prompts"] == 5
    assert " quite black today." in found["answers"]


def test_haliax_mlp():
    found = figures_of("haliax_mlp", "marin-haliax", "equinox")
    assert found["adapted"] == ["up.weight oi", "down.weight oi"]
    assert found["merge_difference"] < CLOSE < 1 < found["moved"]
    assert found["losses"][1] < 0.5 * found["losses"][0]


def test_mlx_lm_adapter():
    found = figures_of("mlx_lm_adapter", "mlx", "mlx-lm")
    assert found["difference"] < CLOSE and found["read_difference"] < CLOSE < 1 < found["moved"]


def test_keras_hub_backbone():
    found = figures_of("keras_hub_backbone", "keras", "keras-hub")
    assert len(found["adapted"]) == 4 and all(x.endswith("kernel ioo") for x in found["adapted"])
    assert found["merge_difference"] < CLOSE < 0.1 < found["moved"]


def test_keras_hub_lora():
    found = figures_of("keras_hub_lora", "keras", "keras-hub")
    differences = found["read_difference"], found["written_difference"]
    assert max(differences) < CLOSE < 1 < min(found["moved"])
    # The query's A for all heads takes as many ranks there as a head has numbers.
    assert found["rank"] == 32 // 4


def test_a_changed_call_is_named(monkeypatch, tmp_path):
    from tests.support import integrations

    program = "import optax\n\n\ndef main():\n    return optax.adam(rate=1.0)\n"
    (tmp_path / "old.py").write_text(program, "utf-8")
    monkeypatch.setattr(integrations, "PROGRAMS", tmp_path)
    with pytest.raises(pytest.fail.Exception, match=r"`optax.adam\(rate=1.0\)` raises Type"):
        figures_of("old", "optax")
