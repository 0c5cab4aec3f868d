"""Adapters of vision transformers and the real `peft`: both ways."""

import copy

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft
from lora_jax.recipes import inspect_adapter

from tests.support.peft_oracle import assert_same_files, close, peft_reads, peft_wrote
from tests.support.peft_trees import noisy
from tests.support.torch_models import saver

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PLACE = "hf/peft/vit"
MODELS = {
    "vit": dict(
        model_type="vit", hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, image_size=8, patch_size=4, num_labels=3,
        auto="AutoModelForImageClassification",
    )
}  # fmt: skip
PIXELS = np.asarray(jax.random.normal(jax.random.key(0), (2, 3, 8, 8)))
QV = ["q_proj", "v_proj"]
CASES = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": QV, "modules_to_save": ["classifier"]},
    "all-linear-rslora": {"r": 3, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 4, "target_modules": ["q_proj", "fc2"], "rank_pattern": {r"layers\.1\..*q_proj": 2},
        "alpha_pattern": {"fc2": 3},
    },
    "dora": {"r": 2, "target_modules": [*QV, "fc1"], "use_dora": True},
    "patches": {"r": 2, "target_modules": ["projection", "o_proj"]},
    "norms": {"r": 2, "target_modules": QV, "modules_to_save": ["layernorm_before", "layernorm"]},
    "bias": {"r": 2, "target_modules": QV, "bias": "all"},
    "layers": {"r": 2, "target_modules": QV, "layers_to_transform": [1]},
}  # fmt: skip


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(pixel_values=torch.tensor(PIXELS)).logits.numpy()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saver(PLACE, MODELS, tmp_path_factory)("vit")


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_there_and_back(case, base, tmp_path):
    model = lora.models.load(base.directory)
    logits = jax.jit(lora.lorafy(model.apply))
    want = peft_wrote(
        f"{PLACE}/vit/{case}",
        tmp_path / "theirs",
        lambda: copy.deepcopy(base.model()),
        CASES[case],
        torch_logits,
    )
    params, config = load_peft(tmp_path / "theirs", model.apply, model.params, PIXELS)
    close(np.asarray(logits(params, PIXELS)), want)
    save_peft(tmp_path / "ours", params, config)
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    # The factors of a convolution are shown as matrices.
    assert inspect_adapter.problems(inspect_adapter.read(tmp_path / "ours")) == []


def test_our_adapter_in_peft(base, tmp_path):
    model = lora.models.load(base.directory)
    config = lora.LoraConfig(rank=3, alpha=5, modules_to_save=("classifier",))
    plan = lora.plan(config, model.apply, model.params, PIXELS)
    params = noisy(lora.init(jax.random.key(0), plan, model.params))
    save_peft(tmp_path / "a", params, config)
    want = peft_reads(f"{PLACE}/vit/ours", tmp_path / "a", base.model, torch_logits)
    close(np.asarray(lora.lorafy(model.apply)(params, PIXELS)), want)
    merged = lora.merge(params)
    close(np.asarray(model.apply(merged, PIXELS)), want)
