"""Vision transformers against transformers on the same random weights, in float32."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.analysis import memory
from lora_jax.array import leaves_by_path
from lora_jax.models.vit_config import ViTConfig
from lora_jax.quant import QuantArray
from lora_jax.quant.loading import QuantConfig
from lora_jax.recipes.classify import classify_texts

from tests.support.oracle import oracle
from tests.support.torch_models import TOLERANCE, load, saver

pytestmark = [pytest.mark.once, pytest.mark.oracle]

PLACE = "models/vit"
SIZES = dict(
    model_type="vit", hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=48, image_size=16, patch_size=4, auto="AutoModelForImageClassification",
)  # fmt: skip
CASES = {
    "classifies": dict(SIZES, num_labels=3),
    # Of a spread that three steps on another mesh do not multiply rounding by.
    "mild": dict(SIZES, num_labels=3, initializer_range=0.05),
    # Pixels beyond the last whole patch are not seen.
    "wide": dict(
        SIZES, image_size=[9, 16], patch_size=[4, 5], num_channels=1, qkv_bias=False,
        hidden_act="gelu_new", layer_norm_eps=1e-3,
    ),
    "features": dict(SIZES, auto="AutoModel", pooler_output_size=24, pooler_act="relu"),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(PLACE, CASES, tmp_path_factory)


def images(config):
    shape = (2, config.num_channels, *config.image_size)
    return np.asarray(jax.random.normal(jax.random.key(0), shape))


def theirs(model, pixels):
    import torch

    with torch.no_grad():
        out = model(pixel_values=torch.tensor(pixels))
    return {name: x.numpy() for name, x in out.items()}


def close(got, want):
    np.testing.assert_allclose(np.asarray(got), want, atol=TOLERANCE, rtol=0)


def compare(got, want):
    if "logits" in want:
        close(got, want["logits"])
    else:
        close(got.hidden, want["last_hidden_state"])
        close(got.pooled, want["pooler_output"])


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_transformers_there_and_back(saved, case, tmp_path):
    there, directory = saved(case)
    model = lora.models.load(directory)
    pixels = images(model.config)
    got = model.apply(model.params, pixels)
    compare(got, oracle(f"{PLACE}/{case}.outputs", lambda: theirs(there(), pixels)))
    hidden = model.forward.apply(model.params, pixels, return_hidden=True)
    assert hidden.shape == (2, model.config.max_position_embeddings, 32)

    lora.models.save_model(tmp_path / "again", model, model.params)
    tensors = load_file(tmp_path / "again" / "model.safetensors")
    original = load_file(directory / "model.safetensors")
    assert not (tmp_path / "again" / "generation_config.json").exists()
    # Names are those of transformers' files, which its classes do not have.
    assert tensors.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(tensors[name], tensor)

    def read():
        again = load(tmp_path / "again")
        config = json.loads((tmp_path / "again" / "config.json").read_text())
        return {"config": config, **theirs(again, pixels)}

    want = oracle(f"{PLACE}/{case}.again", read)
    assert want["config"] == json.loads((tmp_path / "again" / "config.json").read_text())
    compare(got, want)
    again = lora.models.load(tmp_path / "again", scan=False)
    assert again.config == model.config
    blocks = again.params if case == "features" else again.params["vit"]
    assert set(blocks["layers"]) == {"0", "1", "2"}
    jax.tree.map(close, again.apply(again.params, pixels), got)


def test_a_fresh_head(saved, tmp_path):
    for case in ("classifies", "features"):
        made = lora.models.load(
            saved(case).directory, labels=("a", "b"), fresh_head=jax.random.key(0)
        )
        assert made.config.labels == ("a", "b") and made.config.problem_type is None
        assert made.params["classifier"]["kernel"].shape == (32, 2)
        logits = made.apply(made.params, images(made.config))
        assert logits.shape == (2, 2) and abs(logits[0] - logits[1]).max() > 1e-4
        lora.models.save_model(tmp_path / case, made, made.params)
        again = lora.models.load(tmp_path / case)
        jax.tree.map(np.testing.assert_array_equal, again.params, made.params)


# The mesh, for the page of families.
SPREAD: dict[str, Any] = {"vit": {"fsdp": -1, "tensor": 2}}


def test_it_trains_on_a_mesh_as_on_one_device(saved):
    """Rows and weights spread over the devices; adapters of every layer, in two steps."""
    directory = saved("mild").directory
    labels, config = np.arange(8) % 3, lora.LoraConfig(rank=2, init="random")
    pixels = np.tile(images(ViTConfig(image_size=(16, 16))), (4, 1, 1, 1))
    pixels += np.arange(8)[:, None, None, None] / 8

    def losses(mesh):
        model = lora.models.load(directory, mesh=mesh)
        plan = lora.plan(config, model.apply, model.params, pixels)
        params = lora.init(jax.random.key(0), plan, model.params)

        @jax.jit
        @lora.value_and_grad
        def loss(params, pixels):
            logits = lora.lorafy(model.apply)(params, pixels)
            return -jax.nn.log_softmax(logits)[np.arange(8), labels].mean()

        found = []
        for _ in range(3):
            value, grads = loss(params, pixels)
            params = jax.tree.map(
                lambda x, g: x if g is None else x - 0.02 * g,
                params,
                grads,
                is_leaf=lambda x: x is None,
            )
            found.append(float(value))
        return found

    alone = losses(None)
    assert alone[2] < alone[0]
    # Sums of float32 in another order.
    np.testing.assert_allclose(losses(lora.models.make_mesh(**SPREAD["vit"])), alone, rtol=1e-5)


REFUSED = {
    "class": (
        dict(architectures=["ViTForMaskedImageModeling"]),
        "`ViTForMaskedImageModeling`, which",
    ),
    "field": (dict(window=3), "field `window` = 3 is not known for model_type `vit`"),
    "heads": (dict(num_attention_heads=5), r"`hidden_size` \(32\) is not a multiple of"),
    "patch": (dict(patch_size=17), r"no patch of `patch_size` \(17, 17\) fits `image_size`"),
    "size": (dict(image_size="big"), "`image_size` must be a whole number from 1"),
    "sizes": (dict(image_size=[1, 2, 3]), "must be a number or height and width, got"),
    "act": (dict(hidden_act="laplace"), "hidden_act `laplace` is not one of silu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(saved, case, tmp_path):
    fields, text = REFUSED[case]
    raw = json.loads((saved("classifies").directory / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"config.json: .*{text}"):
        lora.models.load(tmp_path)


def test_calls_that_are_refused(saved):
    model = lora.models.load(saved("classifies").directory)
    fresh = {"labels": ("a", "b"), "fresh_head": jax.random.key(0)}
    found = lora.models.load(saved("classifies").directory, **fresh, problem="regression")
    assert found.config.to_hf()["problem_type"] == "regression"
    for task in ("token-classification", "question-answering"):
        own = {**fresh, "labels": fresh["labels"] if "token" in task else ()}
        text = f'config.json: task="{task}" is for texts, and a `vit` reads images: leave `task`'
        with pytest.raises(ValueError, match=text):
            lora.models.load(saved("classifies").directory, **own, task=task)
    with pytest.raises(ValueError, match='`vit` reads images, got "text"'):
        classify_texts(model, model.params, ["a"])
    with pytest.raises(ValueError, match=r"`pixels` must be floats of shape \(batch, 3, 16, 16\)"):
        model.apply(model.params, np.zeros((1, 16, 16, 3), np.float32))
    with pytest.raises(ValueError, match="got uint8 of shape"):
        model.apply(model.params, np.zeros((1, 3, 16, 16), np.uint8))
    with pytest.raises(ValueError, match="`length` 7 is for texts, and an image of this `vit`"):
        memory(model.config.to_hf(), length=7)


def test_all_but_patches_and_head_is_held_in_blocks(saved):
    held = lora.models.load(
        saved("classifies").directory, quantize=QuantConfig(format="int8", block_size=16)
    )
    blocks = {p for p, x in leaves_by_path(held.params).items() if isinstance(x, QuantArray)}
    assert len(blocks) == 6 and all(path.startswith("vit.layers.") for path in blocks)
    floats, pixels = lora.dequantize(held.params), images(held.config)
    # Sums of float32 in another order.
    np.testing.assert_allclose(
        held.apply(held.params, pixels), held.apply(floats, pixels), atol=1e-5
    )
