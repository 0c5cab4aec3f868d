"""An adapter that names another base than the loaded one."""

import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora
from lora_jax.hf.peft.base_names import warn_of_name

_HASH = "9f0b6c1d" * 5


def _cached(name):
    owner, _, last = name.rpartition("/")
    folder = f"models--{owner}--{last}" if owner else f"models--{last}"
    return f"/home/u/.cache/huggingface/hub/{folder}/snapshots/{_HASH}"


OTHER = [
    ("HuggingFaceTB/SmolLM2-135M-Instruct", _cached("HuggingFaceTB/SmolLM2-135M")),
    ("HuggingFaceTB/SmolLM2-135M", "/site-packages/llm/SmolLM2-135M-Instruct.Q4_1.gguf"),
    ("HuggingFaceTB/SmolLM2-135M", "/models/SmolLM2-135M-Instruct"),
    ("SmolLM2 135M", "/models/SmolLM2-135M-Instruct"),
    ("Qwen/Qwen3-0.6B", _cached("Qwen/Qwen3-0.6B-Base")),
    ("Qwen/Qwen2.5-0.5B", "models/qwen2.5-coder-0.5b"),
    ("Qwen/Qwen2-0.5B", "/models/Qwen2.5-0.5B"),
    ("mistralai/Mistral-7B-v0.1", _cached("mistralai/Mistral-7B-v0.3")),
    ("mistralai/Mistral-7B-v0.1", _cached("HuggingFaceH4/zephyr-7b-beta")),
    ("meta-llama/Llama-2-7b-hf", "llama2-7b-chat.Q4_K_M.gguf"),
    ("meta-llama/Llama-2-7b-hf", _cached("lmsys/vicuna-7b-v1.5")),
    ("meta-llama/Meta-Llama-3-8B", "/data/Llama-3.1-8B"),
    ("bert-base-uncased", _cached("google-bert/bert-base-cased")),
    ("/old/disk/gemma-2b", "/new/disk/gemma-2b-it"),
    (_cached("google/gemma-2b"), _cached("google/gemma-2b-it")),
    ("microsoft/Phi-3-mini-4k-instruct", _cached("microsoft/Phi-3-mini-128k-instruct")),
    (r"C:\models\gemma-2b", "/new/disk/gemma-2b-it"),
]

SAME = [
    (None, "/models/Llama-2-7b-hf"),
    ("", "/models/Llama-2-7b-hf"),
    ("meta-llama/Llama-2-7b-hf", None),
    ("meta-llama/Llama-2-7b-hf", "."),
    ("meta-llama/Llama-2-7b-hf", _cached("meta-llama/Llama-2-7b-hf")),
    ("meta-llama/Llama-2-7b-hf", _cached("NousResearch/Llama-2-7b-hf")),
    ("meta-llama/Llama-2-7b-hf", "/models/llama2-7b"),
    ("meta-llama/Llama-2-7b-hf", "/models/llama-2-7b-base/"),
    ("meta-llama/Llama-2-7b-hf", "/models/llama"),
    ("meta-llama/Llama-2-7b-hf", "llama-2-7b.Q4_K_M.gguf"),
    ("meta-llama/Llama-2-7b-hf", "ggml-model-f16.gguf"),
    ("meta-llama/Llama-2-7b-hf", "/tmp/base"),
    ("meta-llama/Llama-2-7b-hf", f"/tmp/{_HASH}"),
    ("meta-llama/Llama-2-7b-hf", "/runs/7/checkpoint-500"),
    ("meta-llama/Llama-2-7b-chat-hf", "/models/my-model"),
    ("meta-llama/Llama-2-7b-chat-hf", _cached("TheBloke/Llama-2-7B-Chat-GPTQ")),
    ("meta-llama/Llama-3.1-8B-Instruct", _cached("meta-llama/Meta-Llama-3.1-8B-Instruct")),
    ("unsloth/Meta-Llama-3.1-8B-Instruct-unsloth-bnb-4bit", "/m/Llama-3.1-8B-Instruct"),
    ("unsloth/mistral-7b-bnb-4bit", _cached("mistralai/Mistral-7B-v0.1")),
    ("meta-llama/Llama-3.1-8B-Instruct", _cached("neuralmagic/Llama-3.1-8B-Instruct-w4a16")),
    ("meta-llama/Llama-3.1-8B-Instruct", _cached("hugging-quants/Llama-3.1-8B-Instruct-AWQ-INT4")),
    ("unsloth/tinyllama-bnb-4bit", _cached("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T")),
    ("Qwen/Qwen2.5-0.5B-Instruct", _cached("Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4")),
    ("Qwen/Qwen2.5-0.5B-Instruct", "/m/qwen2.5-0.5b-instruct-q4_k_m.gguf"),
    ("SmolLM2 135M Instruct", _cached("HuggingFaceTB/SmolLM2-135M-Instruct")),
    ("mistralai/Mixtral-8x7B-v0.1", "/m/mixtral-8x7b"),
    ("gpt2", _cached("openai-community/gpt2")),
    ("bert-base-uncased", _cached("google-bert/bert-base-uncased")),
    ("bert-base-uncased", "/m/bert-base"),
    ("base", _cached("HuggingFaceTB/SmolLM2-135M")),
    ("runs/base", _cached("HuggingFaceTB/SmolLM2-135M")),
    ("models/llama-2-7b-mine", _cached("meta-llama/Llama-2-7b-hf")),
    ("out/merged", "/m/SmolLM2-135M-Instruct"),
    ("/scratch/SmolLM2-135M-Instruct", "/m/SmolLM2-135M-Instruct-2026-11"),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "/m/SmolLM2-135M-Instruct.Q4_1.gguf"),
    (r"C:\models\gemma-2b-it", "/new/disk/gemma-2b-it"),
    (_cached("google/gemma-2b"), "/m/gemma-2b"),
    ("7b", "/m/7b-chat"),
    ("meta-llama/Llama-2-7b-hf", "/m/acme-7b-chat"),
    ("...", "???"),
]


@pytest.mark.parametrize(("trained", "loaded"), OTHER)
def test_another_model_is_said(trained, loaded):
    for given in _spellings(loaded):
        with pytest.warns(UserWarning, match="ad: the adapter names the base .* is loaded"):
            warn_of_name(trained, given, "ad")


@pytest.mark.parametrize(("trained", "loaded"), SAME)
def test_another_name_of_the_same_model_passes(trained, loaded):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in _spellings(loaded):
            warn_of_name(trained, given, "ad")


def _spellings(place):
    """A path and text; and the hub id of a folder in the cache."""
    cached = re.search(r"models--([\w.-]+)--([\w.-]+)", place or "")
    return [place and Path(place), place, *(["/".join(cached.groups())] if cached else [])]


def test_directories_of_other_kinds_of_models_are_said(tmp_path):
    for name, kind in (("a", "qwen3"), ("b", "llama"), ("c", "qwen3")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    with pytest.warns(UserWarning, match="and `b` is loaded, whose shapes fit too"):
        warn_of_name(str(tmp_path / "a"), tmp_path / "b", "adapter")
    warn_of_name(str(tmp_path / "a"), tmp_path / "c", "adapter")
    warn_of_name(str(tmp_path / "gone"), tmp_path / "b", "adapter")


def test_load_peft_takes_the_base(tmp_path):
    def model(params, x):
        return x @ params["up"]["kernel"]

    params, x = {"up": {"kernel": jnp.ones((4, 6))}}, jnp.ones((1, 4))
    config = lora.LoraConfig(rank=2, target_modules=("up",))
    tree = lora.init(jax.random.key(0), lora.plan(config, model, params, x), params)
    lora.hf.save_peft(tmp_path, tree, config, base_model_name="org/tiny-1b")
    for same in None, "mirror/Tiny-1b-hf", tmp_path / "base":
        lora.hf.load_peft(tmp_path, model, params, x, base_model_name=same)
    with pytest.warns(UserWarning, match=r"the base `org/tiny-1b`, and `tiny-1b-instruct` is load"):
        lora.hf.load_peft(tmp_path, model, params, x, base_model_name="/m/tiny-1b-instruct")
