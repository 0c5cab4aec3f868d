"""Decoders inside models of images and texts: adapters under the names of the real classes."""

import dataclasses
import json
import re
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft
from lora_jax.hf.peft.base import check_names
from lora_jax.models.saving import save_merged

from tests.support.decoders import DELTA, SHARED
from tests.support.oracle import oracle
from tests.support.peft_oracle import (
    CONFIG,
    TENSORS,
    assert_same_files,
    close,
    peft_reads,
    peft_wrote,
)
from tests.support.peft_trees import noisy
from tests.support.torch_models import each_expert_apart, experts_in_one, saver

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PLACE = "hf/peft/multimodal"
WEIGHTS = "model.safetensors"
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
QWEN_IDS = dict(
    image_token_id=39, video_token_id=38, vision_start_token_id=37, vision_end_token_id=36,
)  # fmt: skip
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
    "llava_next": dict(
        model_type="llava_next", auto=AUTO, image_token_index=39,
        text_config={**TEXT, "model_type": "mistral"},
        vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 8},
        image_grid_pinpoints=[[8, 8]],
    ),
    "llava_onevision": dict(
        model_type="llava_onevision", auto=AUTO, image_token_index=39, video_token_index=38,
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        image_grid_pinpoints=[[8, 8]],
    ),
    "internvl": dict(
        model_type="internvl", auto=AUTO, image_token_id=39,
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**VISION, "model_type": "internvl_vision", "image_size": [8, 8],
                       "patch_size": [4, 4]},
    ),
    "qwen2_vl": dict(
        model_type="qwen2_vl", auto=AUTO, **QWEN_IDS,
        text_config={**TEXT, "tie_word_embeddings": True, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 1, 0]}},
        vision_config={"depth": 1, "embed_dim": 8, "num_heads": 2, "hidden_size": 16,
                       "patch_size": 4, "mlp_ratio": 1},
    ),
    "qwen2_5_vl": dict(
        model_type="qwen2_5_vl", auto=AUTO, **QWEN_IDS,
        text_config={**TEXT, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 1, 0]}},
        vision_config={"depth": 1, "hidden_size": 8, "num_heads": 2, "out_hidden_size": 16,
                       "patch_size": 4, "intermediate_size": 8, "fullatt_block_indexes": [0]},
    ),
    "qwen3_vl": dict(
        model_type="qwen3_vl", auto=AUTO, **QWEN_IDS,
        text_config={**TEXT, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 1, 0]}},
        vision_config={"depth": 1, "hidden_size": 8, "num_heads": 2, "out_hidden_size": 16,
                       "patch_size": 4, "intermediate_size": 8, "deepstack_visual_indexes": [0],
                       "num_position_embeddings": 16},
    ),
    "gemma4": dict(
        model_type="gemma4", auto=AUTO, image_token_id=39, boi_token_id=38, eoi_token_id=37,
        video_token_id=36, audio_token_id=35, boa_token_id=34, eoa_token_index=33,
        text_config={**TEXT, "global_head_dim": 8, "sliding_window": 4, "pad_token_id": 0,
                     "layer_types": ["sliding_attention", "full_attention"],
                     "hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 40},
        vision_config={"model_type": "gemma4_vision", "hidden_size": 8, "intermediate_size": 8,
                       "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
                       "head_dim": 4, "patch_size": 4, "position_embedding_size": 16},
        audio_config=None,
    ),
    "llama4": dict(
        model_type="llama4", auto=AUTO, image_token_index=39, boi_token_index=38,
        eoi_token_index=37,
        text_config={**TEXT, "intermediate_size_mlp": 20, "num_local_experts": 2,
                     "interleave_moe_layer_step": 2, "attention_chunk_size": 4, "pad_token_id": 0},
        vision_config={**VISION, "vision_output_dim": 8, "projector_input_dim": 8,
                       "projector_output_dim": 8, "pixel_shuffle_ratio": 0.5},
    ),
    **{
        kind: dict(
            model_type=kind, auto=AUTO, **QWEN_IDS,
            text_config={**TEXT, **DELTA, **more, "rope_parameters": {
                "rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 1, 0],
                "partial_rotary_factor": 0.5}},
            vision_config={"depth": 1, "hidden_size": 8, "num_heads": 2, "out_hidden_size": 16,
                           "patch_size": 4, "intermediate_size": 8, "num_position_embeddings": 16},
            initializer_range=0.1,
        )
        for kind, more in (("qwen3_5", {}), ("qwen3_5_moe", SHARED))
    },
    "mistral3": dict(
        model_type="mistral3", auto=AUTO, image_token_index=39, spatial_merge_size=1,
        text_config={**TEXT, "model_type": "mistral"},
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 4},
    ),
}  # fmt: skip
# The others have the same names: adapters of these go to PEFT and back.
BOTH_WAYS = (
    "gemma3",
    "gemma4",
    "llama4",
    "llava",
    "mistral3",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
)
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


@pytest.mark.parametrize("kind", BOTH_WAYS)
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
    want = ours(base, params)
    close(peft_reads(name, tmp_path / "ours", there.model, torch_logits), want)
    targets = json.loads((tmp_path / "ours" / CONFIG).read_text())["target_modules"]
    place = "language_model.model." if kind == "llama4" else "model.language_model."
    assert targets and all(t.startswith(f"{place}layers.") for t in targets)
    check_merged(kind, base, params, want, tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in BASES if kind not in BOTH_WAYS])
def test_transformers_reads_a_merge(kind, made, tmp_path):
    base = lora.models.load(made(kind).directory)
    params = trained(base, lora.LoraConfig(rank=2, target_modules=("q_proj", "v_proj")))
    check_merged(kind, base, params, ours(base, params), tmp_path)


def check_merged(kind, base, params, want, tmp_path):
    save_merged(tmp_path / "merged", base, params)
    close(oracle(f"{PLACE}/{kind}.merged", lambda: whole(tmp_path / "merged")), want)


def whole(directory) -> np.ndarray:
    """The logits of a directory in which transformers misses nothing and finds nothing unknown."""
    import transformers

    auto = transformers.AutoModelForImageTextToText
    model, info = auto.from_pretrained(directory, output_loading_info=True)  # pyright: ignore
    assert not any(info.values()), info
    return torch_logits(model)


@pytest.mark.parametrize(
    ("kind", "other"), [("qwen3_5_moe", experts_in_one), ("llama4", each_expert_apart)]
)
def test_experts_may_lie_otherwise(kind, other, made, tmp_path):
    """As in Qwen's own files, and in quantized ones of Llama 4; transformers reads the merge."""
    directory = shutil.copytree(made(kind).directory, tmp_path / "one")
    usual = load_file(directory / WEIGHTS)
    tensors = other(dict(usual))
    assert tensors.keys() != usual.keys()
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    base, apart = lora.models.load(directory), lora.models.load(made(kind).directory)
    jax.tree.map(np.testing.assert_array_equal, base.params, apart.params)
    params = trained(base, lora.LoraConfig(rank=2, target_modules=("q_proj", "down_proj")))
    save_merged(tmp_path / "merged", base, params)
    names = (tensors if kind == "qwen3_5_moe" else usual).keys()
    assert load_file(tmp_path / "merged" / WEIGHTS).keys() == names
    want = oracle(f"{PLACE}/{kind}.otherwise", lambda: whole(tmp_path / "merged"))
    close(want, ours(base, params))


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


def test_an_adapter_of_the_vision_tower_too_is_refused(gemma, tmp_path):
    config = lora.LoraConfig(rank=2, target_modules=("q_proj",))
    save_peft(tmp_path, trained(gemma, config), config)
    tensors = load_file(tmp_path / TENSORS)
    tower = {k.replace("language_model", "vision_tower.encoder"): x for k, x in tensors.items()}
    save_file({**tensors, **tower}, tmp_path / TENSORS)
    with pytest.raises(ValueError, match="4 left over: .* the language model alone is loaded"):
        load_peft(tmp_path, gemma.apply, gemma.params, TOKENS)


def test_an_adapter_of_llama4s_text_model_in_the_whole_model(made, tmp_path):
    """With the head, which the whole model has inside."""
    base = lora.models.load(made("llama4").directory)
    config = lora.LoraConfig(
        rank=2, target_modules=("q_proj",), modules_to_save=("lm_head",), alpha=3
    )
    params = trained(base, config)
    save_peft(tmp_path, params, config)
    tensors = load_file(tmp_path / TENSORS)
    assert "base_model.model.language_model.lm_head.weight" in tensors
    moved = {k.replace("model.language_model.", "model.", 1): x for k, x in tensors.items()}
    save_file(moved, tmp_path / TENSORS)
    fields = json.loads((tmp_path / CONFIG).read_text())
    fields |= {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    again, _ = load_peft(tmp_path, base.apply, base.params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def since_4_52(name: str) -> str:
    """transformers saves Llava under the names of before."""
    name = name.replace("language_model.model.", "model.language_model.")
    name = name.replace("language_model.lm_head.", "lm_head.")
    return re.sub(r"^(vision_tower|multi_modal_projector)", r"model.\1", name)


@pytest.mark.parametrize("rename", [str, since_4_52])
def test_a_merge_keeps_the_rest_of_the_checkpoint(rename, made, tmp_path):
    source = shutil.copytree(made("llava").directory, tmp_path / "base")
    tensors = {rename(name): x for name, x in load_file(source / WEIGHTS).items()}
    # Numbers of another dtype, and a buffer of indices.
    rest: dict[str, np.ndarray] = {
        name: x.astype(np.float16)
        for name, x in tensors.items()
        if "vision" in name or "projector" in name
    }
    rest["model.vision_tower.position_ids"] = np.arange(5)[None]
    save_file({**tensors, **rest}, source / WEIGHTS, {"format": "pt"})
    (source / "preprocessor_config.json").write_text('{"size": 8}')
    (source / "LICENSE").write_text("free")
    base = lora.models.load(source)
    params = trained(base, lora.LoraConfig(rank=2, target_modules=("q_proj",)))
    save_merged(tmp_path / "merged", base, params, dtype="bfloat16", max_shard_size="4KB")
    got = {}
    for file in sorted((tmp_path / "merged").glob("*.safetensors")):
        got |= load_file(file)
    assert got.keys() == {*tensors, *rest}
    for name, x in got.items():
        if name in rest:
            np.testing.assert_array_equal(x, rest[name], strict=True)
        else:
            assert x.dtype.name == "bfloat16"
            assert np.array_equal(x, tensors[name].astype(x.dtype)) == ("q_proj" not in name)
    config = json.loads((source / "config.json").read_text())
    written = json.loads((tmp_path / "merged/config.json").read_text())
    assert written == {**config, "dtype": "bfloat16"}
    assert (tmp_path / "merged/preprocessor_config.json").read_text() == '{"size": 8}'
    assert (tmp_path / "merged/LICENSE").read_text() == "free"
    again = lora.models.load(tmp_path / "merged")
    assert again.config == base.config
    merged = lora.merge(params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2**-8), again.params, merged)


def test_a_decoder_whose_other_tensors_are_not_known(gemma, tmp_path):
    alone = dataclasses.replace(gemma, checkpoint=None)
    with pytest.raises(ValueError, match="the decoder inside a `gemma3`, whose other tensors are"):
        save_merged(tmp_path / "merged", alone, gemma.params)
    gone = dataclasses.replace(gemma, checkpoint=tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="gone: no such directory"):
        save_merged(tmp_path / "merged", gone, gemma.params)
    assert not (tmp_path / "merged").exists()


def test_qwen_before_transformers_4_52(made, tmp_path):
    """A flat config.json, `mrope`, and names without `language_model`."""
    source = made("qwen2_5_vl").directory
    config = json.loads((source / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {**text, **config, "rope_theta": rope["rope_theta"]}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    tensors = load_file(source / WEIGHTS)
    tensors = {
        n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): x
        for n, x in tensors.items()
    }
    save_file(tensors, tmp_path / WEIGHTS)
    new, old = lora.models.load(source), lora.models.load(tmp_path)
    assert old.config == new.config
    jax.tree.map(np.testing.assert_array_equal, old.params, new.params)
    save_merged(tmp_path / "merged", old, old.params)
    assert load_file(tmp_path / "merged" / WEIGHTS).keys() == tensors.keys()
    check_names(["base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight"],
                str(tmp_path))  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "paligemma",
            "inside a `paligemma` cannot be read: it attends to its whole prompt in both",
        ),
        (
            "gemma3n",
            "cannot be read: its blocks carry several streams.* nearest: `gemma3`.*/name-map",
        ),
        (
            "idefics3",
            "inside a `idefics3` cannot be read; of models of images .* gemma3, gemma4, internvl",
        ),
    ],
)
def test_decoders_that_are_not_read(kind, text, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "text_config": {}}))
    with pytest.raises(ValueError, match=text):
        lora.models.load(tmp_path)


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
