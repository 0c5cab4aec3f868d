"""Adapters whose files repeat tables of the base: resized vocabularies, tied heads, real `peft`."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.array import SavedArray, leaves_by_path
from lora_jax.hf import load_peft, save_peft

from tests.support.oracle import oracle
from tests.support.peft_llama import TOKENS, jax_logits, torch_logits
from tests.support.peft_oracle import (
    CONFIG,
    TENSORS,
    close,
    contents,
    peft_wrote,
    randomize,
    sort_sets,
    write_contents,
)
from tests.support.torch_models import saver

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PLACE = "hf/peft/copies"
V, MORE = 40, 3
BASES = {
    f"{'tied' if tied else 'untied'}-{size}": dict(
        vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    for tied in (False, True)
    for size in (V, V + MORE)
}  # fmt: skip
ROWS = [V - 1, V + 1]
HOW = {
    "targets": {"target_modules": ["q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": ROWS},
    "adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return saver("hf/peft/copies", BASES, tmp_path_factory)


@pytest.fixture(scope="module")
def bases(made):
    return {name: lora.models.load(made(name).directory) for name in BASES}


def resized(name: str, made, how: str):
    """PEFT's directory of an adapter of a model whose vocabulary grew in memory, and its logits."""

    def ask():
        import peft
        import torch
        import transformers

        kind = transformers.LlamaForCausalLM
        old, new = (made(f"{name}-{size}") for size in (V, V + MORE))
        torch.manual_seed(0)
        module = kind.from_pretrained(old.directory)
        module.resize_token_embeddings(V + MORE, mean_resizing=False)
        module.load_state_dict(kind.from_pretrained(new.directory).state_dict())
        config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **HOW[how])
        adapted = peft.get_peft_model(module, config)
        randomize(adapted, 0.1)
        with tempfile.TemporaryDirectory() as scratch:
            adapted.save_pretrained(scratch)
            sort_sets(Path(scratch) / CONFIG)
            answer = contents(Path(scratch))
        # PEFT sees the resize by the directory, whose name is another in every run.
        answer["config"] = answer["config"].replace(str(old.directory), "old")
        return {**answer, "outputs": torch_logits(adapted)}

    return oracle(f"{PLACE}/{name}/{how}.resized", ask)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_an_adapter_of_a_resized_model(name, how, made, bases, tmp_path):
    answer = resized(name, made, how)
    write_contents(tmp_path / "a", answer)
    old, new = bases[f"{name}-{V}"], bases[f"{name}-{V + MORE}"]
    # PEFT trains the two halves of a tied table apart.
    apart = name == "tied" and how in ("saved", "adapted")
    with pytest.raises(ValueError, match="vocabulary was resized|resize the table first"):
        load_peft(tmp_path / "a", old.apply, old.params, TOKENS)
    if apart:
        with pytest.raises(ValueError, match="tie"):
            load_peft(tmp_path / "a", new.apply, new.params, TOKENS)
        return
    params, config = load_peft(tmp_path / "a", new.apply, new.params, TOKENS)
    close(jax_logits(new.apply, params), answer["outputs"])
    # Written again without the copies, it is the same adapter.
    save_peft(tmp_path / "b", params, config)
    again, _ = load_peft(tmp_path / "b", new.apply, new.params, TOKENS)
    close(jax_logits(new.apply, again), answer["outputs"])


@pytest.mark.parametrize("name", [f"untied-{V}", f"tied-{V}"])
def test_a_table_that_differs_trains_whole(name, made, bases, tmp_path):
    """PEFT loads the file's table over the base's."""
    base = bases[name]
    fields = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    peft_wrote(f"{PLACE}/plain/{name}", tmp_path, made(name).model, fields, lambda m: 0)
    tensors = load_file(tmp_path / TENSORS)
    table = np.random.default_rng(0).normal(size=(V, 16)).astype("f4")
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": table}, tmp_path / TENSORS)
    params, config = load_peft(tmp_path, base.apply, base.params, TOKENS)
    leaf = leaves_by_path(params)["model.embed_tokens.embedding"]
    assert isinstance(leaf, SavedArray)
    np.testing.assert_array_equal(leaf.value, table)
    assert "model.embed_tokens" in config.modules_to_save
    # A tied head follows, in PEFT's terms too.
    tied = name.startswith("tied")
    assert config.extra.get("ensure_weight_tying", False) is tied
    save_peft(tmp_path / "b", params, config)
    assert ("base_model.model.lm_head.weight" in load_file(tmp_path / "b" / TENSORS)) is tied


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_adapter_in_fewer_bits_has_the_table_rounded(dtype, made, bases, tmp_path):
    """The copy beside an adapted table is no part of the adapter."""
    name = f"untied-{V}"
    base = bases[name]
    fields = {"r": 2, "task_type": "CAUSAL_LM", **HOW["adapted"]}
    peft_wrote(f"{PLACE}/adapted/{name}", tmp_path, made(name).model, fields, lambda m: 0)
    tensors = {key: x.astype(dtype) for key, x in load_file(tmp_path / TENSORS).items()}
    save_file(tensors, tmp_path / TENSORS)
    params, _ = load_peft(tmp_path, base.apply, base.params, TOKENS)
    leaf = leaves_by_path(params)["model.embed_tokens.embedding"]
    np.testing.assert_array_equal(leaf.w, base.params["model"]["embed_tokens"]["embedding"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**tensors, key: tensors[key] * 2}, tmp_path / TENSORS)
    with pytest.raises(ValueError, match="is not this model's base weight"):
        load_peft(tmp_path, base.apply, base.params, TOKENS)


def test_halves_of_a_tied_table_that_differ_are_refused(made, bases, tmp_path):
    name = f"tied-{V}"
    base = bases[name]
    fields = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    peft_wrote(f"{PLACE}/plain/{name}", tmp_path, made(name).model, fields, lambda m: 0)
    tensors = load_file(tmp_path / TENSORS)
    for i, module in enumerate(("model.embed_tokens", "lm_head")):
        tensors[f"base_model.model.{module}.weight"] = np.full((V, 16), i, np.float32)
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(ValueError, match="its head and embedding are tied"):
        load_peft(tmp_path, base.apply, base.params, TOKENS)
