"""Adapters between `lora_jax.models` and the real `peft`: the same logits both ways."""

import dataclasses

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.array import LoraArray
from lora_jax.hf import load_peft, save_peft

from tests.support.peft_llama import (
    CASES,
    TOKENS,
    Base,
    bases,
    jax_logits,
    loaded,
    torch_logits,
)
from tests.support.peft_oracle import (
    assert_orbax_keeps,
    assert_same_files,
    close,
    peft_reads,
    peft_wrote,
)
from tests.support.peft_trees import noisy

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PLACE = "hf/peft/model"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return bases(tmp_path_factory)


@pytest.fixture(scope="module")
def there(made) -> Base:
    """The torch model, and the directory of its weights."""
    return made("llama")


@pytest.fixture(scope="module")
def base(there):
    return loaded(there.directory)


@pytest.fixture(scope="module")
def unrolled(there):
    return loaded(there.directory, scan=False)


@pytest.fixture(scope="module")
def tied(made) -> Base:
    return made("tied")


@pytest.fixture(scope="module")
def tied_base(tied):
    return loaded(tied.directory)


@pytest.mark.parametrize("case", CASES)
def test_pefts_adapter_here_and_back(case, there, base, tmp_path):
    here_and_back(case, CASES[case], there, base, tmp_path)


@pytest.mark.parametrize("case", ["patterns", "layers", "everything"])
def test_pefts_adapter_on_separate_layers(case, there, unrolled, tmp_path):
    here_and_back(case, CASES[case], there, unrolled, tmp_path)


def here_and_back(case, fields, there, base, tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    fields = {"task_type": "CAUSAL_LM", **fields}
    want = peft_wrote(f"hf/peft/cases/{case}", theirs, there.torch, fields, torch_logits)
    params, config = load_peft(theirs, base.apply, base.params, TOKENS)
    close(jax_logits(base.apply, params), want)
    save_peft(ours, params, config)
    assert_same_files(theirs, ours)


OURS = {
    "plain": lora.LoraConfig(rank=4, target_modules=("q_proj", "v_proj")),
    "all-linear-rslora": lora.LoraConfig(rank=4, use_rslora=True),
    "patterns": lora.LoraConfig(
        rank=3, rank_pattern={"down_proj": 5}, alpha_pattern={r"1\.mlp\.up_proj": 3}
    ),
    "dora": lora.LoraConfig(rank=2, target_modules=("q_proj", "up_proj"), use_dora=True),
    "one-layer": lora.LoraConfig(rank=2, target_modules=("o_proj",), layers_to_transform=(1,)),
    "unnumbered-path": lora.LoraConfig(rank=2, target_modules=("model.layers.mlp.up_proj",)),
    "embedding": lora.LoraConfig(rank=2, target_modules=("embed_tokens", "k_proj")),
    "head": lora.LoraConfig(rank=2, target_modules=("lm_head",)),
    "saved": lora.LoraConfig(rank=2, modules_to_save=("lm_head", "post_attention_layernorm")),
    "bias": lora.LoraConfig(rank=2, target_modules=("q_proj", "o_proj"), bias="lora_only"),
    "bias-one-layer": lora.LoraConfig(
        rank=2, target_modules=("q_proj", "o_proj"), bias="lora_only", layers_to_transform=(2,)
    ),
    "saved-one-layer": lora.LoraConfig(rank=2, modules_to_save=("1.post_attention_layernorm",)),
    "lora-bias": lora.LoraConfig(rank=2, target_modules=("q_proj", "up_proj"), lora_bias=True),
    "tokens": lora.LoraConfig(rank=2, trainable_token_indices=(30, 2, 9)),
    "excluded": lora.LoraConfig(
        rank=2, target_modules=("q_proj", "v_proj"), exclude_modules=("v_proj",)
    ),
    "pissa": lora.LoraConfig(rank=2, target_modules=("q_proj", "up_proj"), init="pissa"),
}


@pytest.mark.parametrize("case", OURS)
def test_our_adapter_in_peft_and_back(case, there, base, tmp_path):
    config = OURS[case]
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    params = noisy(lora.init(jax.random.key(0), plan, base.params))
    if case == "embedding":  # here b starts random and a zero
        table = params["model"]["embed_tokens"]["embedding"]
        noise = np.random.default_rng(1).normal(size=table.a.shape).astype("f4")
        params["model"]["embed_tokens"]["embedding"] = dataclasses.replace(table, a=table.a + noise)
    save_peft(tmp_path / "a", params, config)

    want = peft_reads(f"{PLACE}/{case}", tmp_path / "a", there.torch, torch_logits)
    close(want, jax_logits(base.apply, params))

    again, _ = load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


ALLOWED = {
    "unknown-targets": {"target_modules": ["q_proj", "query_key_value", "c_attn"]},
    "unknown-others": {
        "target_modules": ["q_proj"],
        "exclude_modules": ["dense"],
        "modules_to_save": ["score"],
    },
    "excluded-regex": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.v_proj"},
    "of-other-layers": {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [1]},
    # `lm_head` is a whole name, to which layers do not apply.
    "head-beside-layers": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    "high-rank": {"target_modules": ["k_proj"], "r": 40},
    "high-pattern": {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 20, "dense": 2}},
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_peft_allows_is_read(case, there, base, tmp_path):
    """Names that match nothing, ranks above full rank: PEFT is silent, the file is complete."""
    here_and_back(case, ALLOWED[case], there, base, tmp_path)
    orbax_keeps(tmp_path, base)


def orbax_keeps(tmp_path, base):
    params, config = load_peft(tmp_path / "theirs", base.apply, base.params, TOKENS)
    assert_orbax_keeps(params, config, base.apply, base.params, TOKENS, place=tmp_path / "orbax")


@pytest.mark.parametrize("case", ["patterns", "layers", "saved-norm", "bias-one-layer", "tokens"])
def test_what_was_imported_to_orbax_can_be_read(case, there, base, tmp_path):
    fields = {"task_type": "CAUSAL_LM", **CASES[case]}
    name = f"hf/peft/cases/{case}"
    peft_wrote(name, tmp_path / "theirs", there.torch, fields, torch_logits)
    orbax_keeps(tmp_path, base)


@pytest.mark.parametrize(
    "targets", [["q_proj", "up_proj"], ["q_proj", "embed_tokens"], ["lm_head"]]
)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_change_the_base_are_repeated(init, targets, there, base, tmp_path):
    """PEFT's file holds A and B only: the residual base is made anew from the original.

    An embedding is not decomposed, and the head is in the file with its residual.
    """
    fields = {"r": 2, "target_modules": targets, "init_lora_weights": init}
    fields |= {"task_type": "CAUSAL_LM"}
    name = f"{PLACE}/{init}" + (f".{targets[-1]}" if targets[-1] != "up_proj" else "")
    want = peft_wrote(name, tmp_path / "a", there.torch, fields, torch_logits)
    params, config = load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
    assert config.init == init
    close(jax_logits(base.apply, params), want)


def test_inits_that_cannot_be_repeated_are_refused(there, base, tmp_path):
    fields = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_4"}
    fields |= {"task_type": "CAUSAL_LM"}
    peft_wrote(f"{PLACE}/pissa_niter", tmp_path / "a", there.torch, fields, torch_logits)
    with pytest.raises(ValueError, match='initialised by "pissa_niter_4", which changed the base'):
        load_peft(tmp_path / "a", base.apply, base.params, TOKENS)


def test_another_rank_in_the_config_is_named(there, base, tmp_path):
    fields = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    peft_wrote(f"{PLACE}/rank", tmp_path / "a", there.torch, fields, torch_logits)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 4', '"r": 8'))
    with pytest.raises(ValueError, match="tensors have rank 4, and the config says 8: correct `r`"):
        load_peft(tmp_path / "a", base.apply, base.params, TOKENS)


def test_an_adapter_for_a_larger_model_is_one_error(made, base, tmp_path):
    fields = {"r": 4, "target_modules": ["q_proj"]}
    peft_wrote(f"{PLACE}/larger", tmp_path / "a", made("larger").torch, fields, torch_logits)
    with pytest.raises(ValueError) as caught:
        load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
    text = str(caught.value)
    assert "2 left over: `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`" in text
    assert "6 misshapen" in text and "is (4, 32), expected (4, 16)" in text and "\n" not in text


# ---- a head that is the embedding table


TIED = {
    "adapted": {"target_modules": ["embed_tokens", "q_proj"]},
    "adapted-regex": {"target_modules": r".*(embed_tokens|q_proj)"},
    "adapted-by-head": {"target_modules": ["lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 30]},
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_adapter_of_peft_is_read_and_written(case, tied, tied_base, tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    fields = {"r": 2, "ensure_weight_tying": True, "task_type": "CAUSAL_LM", **TIED[case]}
    want = peft_wrote(f"{PLACE}/tied/{case}", theirs, tied.torch, fields, torch_logits)
    params, config = load_peft(theirs, tied_base.apply, tied_base.params, TOKENS)
    close(jax_logits(tied_base.apply, params), want)
    save_peft(ours, params, config)
    assert_same_files(theirs, ours)


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_our_tied_adapter_is_tied_in_peft(field, tied, tied_base, tmp_path):
    config = lora.LoraConfig(**{"rank": 2, field: ("embed_tokens",)})
    plan = lora.plan(config, tied_base.apply, tied_base.params, TOKENS)
    params = noisy(lora.init(jax.random.key(0), plan, tied_base.params))
    table = params["model"]["embed_tokens"]["embedding"]
    if isinstance(table, LoraArray):
        noise = np.random.default_rng(1).normal(size=table.a.shape).astype("f4")
        params["model"]["embed_tokens"]["embedding"] = dataclasses.replace(table, a=table.a + noise)
    save_peft(tmp_path / "a", params, config)
    want = peft_reads(f"{PLACE}/tied/{field}", tmp_path / "a", tied.torch, torch_logits)
    close(want, jax_logits(tied_base.apply, params))
    again, _ = load_peft(tmp_path / "a", tied_base.apply, tied_base.params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_an_untied_adapter_of_a_tied_model_is_refused(tied, tied_base, tmp_path):
    fields = {"r": 2, "target_modules": ["embed_tokens"], "task_type": "CAUSAL_LM"}
    peft_wrote(f"{PLACE}/tied/untied", tmp_path / "a", tied.torch, fields, torch_logits)
    with pytest.raises(ValueError, match="`model.embed_tokens.embedding` as an embedding only"):
        load_peft(tmp_path / "a", tied_base.apply, tied_base.params, TOKENS)
