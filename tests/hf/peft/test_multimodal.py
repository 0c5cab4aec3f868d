"""Decoders inside models of images and texts: adapters under the names of the real classes."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft
from lora_jax.hf.peft.base import check_names
from lora_jax.models.saving import save_merged

from tests.support.peft_oracle import (
    CONFIG,
    TENSORS,
    assert_same_files,
    close,
    peft_reads,
    peft_wrote,
)
from tests.support.peft_trees import noisy
from tests.support.torch_models import saver

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PLACE = "hf/peft/multimodal"
TOKENS = np.array([[1, 5, 9, 30, 2, 17], [4, 4, 29, 3, 11, 3]], np.int32)
TEXT = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip
VISION = dict(
    hidden_size=8, intermediate_size=8, image_size=8, patch_size=4, num_hidden_layers=1,
    num_attention_heads=2,
)  # fmt: skip
AUTO = "AutoModelForImageTextToText"
BASES = {
    "gemma3": dict(
        model_type="gemma3", auto=AUTO, mm_tokens_per_image=4, image_token_index=39,
        boi_token_index=38, eoi_token_index=37,
        text_config={**TEXT, "sliding_window": 4, "sliding_window_pattern": 2},
        vision_config={**VISION, "model_type": "siglip_vision_model"},
    ),
    "llava": dict(
        model_type="llava", auto=AUTO, image_token_index=39,
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 8},
    ),
    "mistral3": dict(
        model_type="mistral3", auto=AUTO, image_token_index=39, spatial_merge_size=1,
        text_config={**TEXT, "model_type": "mistral"},
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 4},
    ),
}  # fmt: skip
REGEX = r".*language_model.*(q_proj|v_proj)"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return saver(PLACE, BASES, tmp_path_factory)


@pytest.fixture(scope="module")
def gemma(made):
    return lora.models.load(made("gemma3").directory)


def torch_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(TOKENS).long()).logits.numpy()


def trained(base, config):
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    return noisy(lora.init(jax.random.key(0), plan, base.params))


def ours(base, params) -> np.ndarray:
    return np.asarray(jax.jit(lora.lorafy(base.apply))(params, TOKENS))


@pytest.mark.parametrize("kind", BASES)
def test_adapters_both_ways(kind, made, tmp_path):
    there, base = made(kind), lora.models.load(made(kind).directory)
    fields = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": REGEX}
    name = f"{PLACE}/{kind}"
    want = peft_wrote(name, tmp_path / "theirs", there.model, fields, torch_logits)
    params, config = load_peft(tmp_path / "theirs", base.apply, base.params, TOKENS)
    close(ours(base, params), want)
    save_peft(tmp_path / "again", params, config)
    assert_same_files(tmp_path / "theirs", tmp_path / "again")
    # The vision tower has projections of the same names, which PEFT would adapt as well.
    own = lora.LoraConfig(rank=2, target_modules=("q_proj", "v_proj"))
    params = trained(base, own)
    save_peft(tmp_path / "ours", params, own)
    close(peft_reads(name, tmp_path / "ours", there.model, torch_logits), ours(base, params))
    targets = json.loads((tmp_path / "ours" / CONFIG).read_text())["target_modules"]
    assert targets and all(t.startswith("model.language_model.layers.") for t in targets)


@pytest.mark.parametrize("start", ["language_model.model.", "model."])
def test_other_names_of_the_same_decoder(start, gemma, tmp_path):
    """Of transformers before 4.52, and of the text model's own class."""
    config = lora.LoraConfig(rank=2, target_modules=("q_proj",), rank_pattern={r"layers\.1\..*": 3})
    params = trained(gemma, config)
    save_peft(tmp_path, params, config)
    tensors = load_file(tmp_path / TENSORS)
    moved = {k.replace("model.language_model.", start): x for k, x in tensors.items()}
    save_file(moved, tmp_path / TENSORS)
    fields = json.loads((tmp_path / CONFIG).read_text())
    fields["target_modules"] = rf".*{start}layers.*q_proj".replace(".", r"\.").replace(r"\.*", ".*")
    fields["rank_pattern"] = {rf"^{start}layers.1.self_attn.q_proj".replace(".", r"\."): 3}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    again, _ = load_peft(tmp_path, gemma.apply, gemma.params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_merge_names_what_it_leaves_out(gemma, tmp_path):
    params = trained(gemma, lora.LoraConfig(rank=2, target_modules=("q_proj",)))
    with pytest.warns(UserWarning, match="of the `gemma3` only its language model .* vision tower"):
        save_merged(tmp_path / "merged", gemma, params)
    merged = lora.models.load(tmp_path / "merged")
    assert merged.config.wrapper is None
    got = np.asarray(jax.jit(merged.apply)(merged.params, TOKENS))
    close(got, ours(gemma, params))


def test_modules_that_the_base_does_not_have(made, gemma, tmp_path):
    base = str(made("gemma3").directory)
    params = trained(gemma, config := lora.LoraConfig(rank=2, target_modules=("q_proj",)))
    save_peft(tmp_path / "a", params, config, base_model_name=base)
    text = {"model": {**params["model"]["language_model"]}}
    if "lm_head" in params:
        text["lm_head"] = params["lm_head"]
    with pytest.raises(ValueError, match=r"`model.layers.0.self_attn.q_proj` of the adapter is no"):
        save_peft(tmp_path / "b", text, config, base_model_name=base)
    assert not (tmp_path / "b").exists()
    # A hub id is not looked up, nor a tied head, nor experts that files hold one by one.
    save_peft(tmp_path / "b", text, config, base_model_name="org/base")
    check_names(["base_model.model.lm_head.lora_A.weight"], base)
