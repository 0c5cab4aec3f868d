"""MLX's two files, written and read; `make integrations` compares with mlx-lm itself."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax import hf
from lora_jax.config.lora import LoraConfig
from lora_jax.hf.mlx import MLX_FILE, read_mlx, write_mlx
from lora_jax.recipes.convert import convert, kind_of
from lora_jax.recipes.inspect import inspect

pytestmark = pytest.mark.once

NAME = "base_model.model.model.layers.1.mlp.up_proj"
TABLE = "base_model.model.model.embed_tokens"


def random_tensors() -> dict[str, np.ndarray]:
    shapes = {
        f"{NAME}.lora_A.weight": (2, 6), f"{NAME}.lora_B.weight": (4, 2),
        f"{TABLE}.lora_embedding_A": (3, 9), f"{TABLE}.lora_embedding_B": (6, 3),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


CONFIG = LoraConfig(
    rank=2, alpha=3, dropout=0.25, target_modules=("up_proj", "embed_tokens"), use_rslora=True,
    rank_pattern={"embed_tokens": 3},
)  # fmt: skip


def test_both_files_hold_the_change_of_every_module(tmp_path):
    tensors = random_tensors()
    write_mlx(tmp_path / "a", CONFIG, tensors)
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["num_layers"] == -1 and fields["fine_tune_type"] == "lora"
    settings = fields["lora_parameters"]
    assert settings["keys"] == ["mlp.up_proj", "model.embed_tokens"]
    assert (settings["rank"], settings["dropout"]) == (3, 0.25)
    saved = load_file(tmp_path / "a" / MLX_FILE)
    a, b = (saved[f"model.layers.1.mlp.up_proj.lora_{x}"] for x in "ab")
    assert (a.shape, b.shape) == ((6, 3), (3, 4))
    # rsLoRA's scale of rank 2, as MLX multiplies: scale · (x a) b.
    wanted = 3 / 2**0.5 * tensors[f"{NAME}.lora_B.weight"] @ tensors[f"{NAME}.lora_A.weight"]
    np.testing.assert_allclose(settings["scale"] * (a @ b), wanted.T, rtol=1e-5)  # float32
    config, read = read_mlx(tmp_path / "a")
    assert config.target_modules == ("model.embed_tokens", "model.layers.1.mlp.up_proj")
    assert {*read} == {*tensors}
    scale = config.alpha / config.rank
    b, a = (read[f"{TABLE}.lora_embedding_{x}"] for x in "BA")
    b0, a0 = (tensors[f"{TABLE}.lora_embedding_{x}"] for x in "BA")
    np.testing.assert_allclose(scale * b @ a, 3 / 3**0.5 * b0 @ a0, rtol=1e-5)


def test_one_scale_of_rslora_is_mlxs(tmp_path):
    tensors = {name: x for name, x in random_tensors().items() if name.startswith(NAME)}
    config = dataclasses.replace(CONFIG, rank_pattern={}, target_modules=("up_proj",))
    write_mlx(tmp_path / "a", config, tensors)
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["lora_parameters"]["scale"] == pytest.approx(3 / 2**0.5)


def test_it_is_converted_from_and_to_peft_and_described(tmp_path):
    write_mlx(tmp_path / "a", CONFIG, random_tensors())
    assert kind_of(tmp_path / "a") == "mlx"
    convert(tmp_path / "a", tmp_path / "peft", to="peft")
    convert(tmp_path / "peft", tmp_path / "b", to="mlx")
    (config, one), (again, other) = read_mlx(tmp_path / "a"), read_mlx(tmp_path / "b")
    assert again == config
    for name in one:
        np.testing.assert_array_equal(other[name], one[name])
    assert hf.read_peft(tmp_path / "peft")[0].alpha == config.alpha
    assert "MLX adapter" in inspect(str(tmp_path / "a"))


def test_a_tree_goes_to_mlx_and_back_under_a_name_map(tmp_path):
    using = hf.name_map(
        "two layers", [("blocks.w", "model.layers.{}.mlp.up_proj.weight", "o i -> l i o")]
    )
    params = {"blocks": {"w": np.ones((2, 6, 4), np.float32)}}
    x = np.ones((3, 6), np.float32)

    def model(params, x):
        return jax.lax.map(lambda w: x @ w, params["blocks"]["w"])

    config = LoraConfig(rank=2, alpha=6, target_modules=("w",), init="random")
    tree = lora.init(jax.random.key(0), lora.plan(config, model, params, x), params)
    hf.save_mlx(tmp_path / "a", tree, config, name_map=using, base_model_name="org/tiny-1b")
    saved = load_file(tmp_path / "a" / MLX_FILE)
    assert saved["model.layers.1.mlp.up_proj.lora_a"].shape == (6, 2)
    again, found = hf.load_mlx(tmp_path / "a", model, params, x, name_map=using)
    assert found.rank == 2 and found.alpha == 6
    jax.tree.map(np.testing.assert_array_equal, again, tree)
    # As mlx-lm writes it, which keeps its arguments in the file.
    assert (
        json.loads((tmp_path / "a" / "adapter_config.json").read_text())["model"] == "org/tiny-1b"
    )
    for name in "other/Tiny-1b-4bit", tmp_path / "tiny-1b":
        hf.load_mlx(tmp_path / "a", model, params, x, name_map=using, base_model_name=name)
    with pytest.warns(UserWarning, match="names the base `org/tiny-1b`, and `org/tiny-1b-chat` is"):
        hf.load_mlx(
            tmp_path / "a", model, params, x, name_map=using, base_model_name="org/tiny-1b-chat"
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type is 'dora'; only adapters of 'lora' are read"),
        ({"lora_parameters": {"rank": 2}}, "must have a rank and a scale, got {'rank': 2}"),
        ({"lora_parameters": {"rank": 5, "scale": 1.0}}, r"`x.lora_a` of the shape .* of rank 5"),
    ],
    ids=str,
)
def test_what_is_read_only_as_lora(tmp_path, fields, message):
    save_file({"x.lora_a": np.ones((4, 2), np.float32)}, tmp_path / MLX_FILE)
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        read_mlx(tmp_path)


def test_what_mlx_has_no_place_for_is_refused(tmp_path):
    config = LoraConfig(target_modules=("up_proj",), use_dora=True)
    with pytest.raises(ValueError, match="MLX cannot serve an adapter with DoRA"):
        write_mlx(tmp_path / "a", config, random_tensors())
    write_mlx(tmp_path / "a", CONFIG, random_tensors())
    with pytest.raises(FileExistsError, match="a"):
        write_mlx(tmp_path / "a", CONFIG, random_tensors())


_TOKENS, _ROWS = np.array([1, 2]), np.ones((2, 8), np.float32)
_OWN = {  # models of one's own: parameters' shapes, the model, what is adapted, its input
    "tied": ({"wte": {"w": (11, 8)}}, lambda p, t: p["wte"]["w"][t] @ p["wte"]["w"].T, _TOKENS),
    "looked up": (
        {"tok": {"embedding": (8, 8)}, "o": (8, 5)},
        lambda p, t: p["tok"]["embedding"][t] @ p["o"], _TOKENS,
    ),
    "a matrix": (
        {"embed_tokens": {"kernel": (8, 8)}}, lambda p, x: x @ p["embed_tokens"]["kernel"], _ROWS,
    ),
    "experts": (
        {"experts": {"up": (4, 8, 6), "down": (4, 6, 8)}},
        lambda p, x: jax.vmap(lambda u, d: x @ u @ d)(p["experts"]["up"], p["experts"]["down"]),
        _ROWS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("shapes, model, x", _OWN.values(), ids=_OWN)
def test_tables_and_experts_of_ones_own_come_back(tmp_path, shapes, model, x):
    rng = np.random.default_rng(0)
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    params = jax.tree.map(lambda s: rng.normal(size=s).astype("float32"), shapes, is_leaf=is_shape)
    targets = r".*(w|tok|o|embed_tokens|up|down|wte)"
    config = LoraConfig(rank=2, alpha=2, target_modules=targets, init="random")
    tree = lora.init(jax.random.key(0), lora.plan(config, model, params, x), params)
    hf.save_mlx(tmp_path / "a", tree, config)
    again, _ = hf.load_mlx(tmp_path / "a", model, params, x)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_adapted_parameters_are_refused_before_their_layout_is_asked_for(tmp_path):
    params = {"experts": {"up": np.ones((4, 8, 8), np.float32)}}
    model = jax.vmap(lambda p, x: x @ p["experts"]["up"], in_axes=(0, None))
    config = LoraConfig(rank=2, target_modules=(), target_parameters=("experts.up",))
    tree = lora.init(jax.random.key(0), lora.plan(config, model, params, _ROWS), params)
    with pytest.raises(ValueError, match="MLX cannot serve an adapter with adapted parameters"):
        hf.save_mlx(tmp_path / "a", tree, config)
