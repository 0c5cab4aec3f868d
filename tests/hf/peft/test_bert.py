"""Adapters of encoders and classifiers in `lora_jax.models` and the real `peft`: both ways."""

import copy
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft

from tests.support.peft_gradients import check_gradients
from tests.support.peft_llama import Base
from tests.support.peft_oracle import (
    assert_orbax_keeps,
    assert_same_files,
    close,
    peft_reads,
    peft_wrote,
    randomize,
)
from tests.support.peft_trees import noisy
from tests.support.torch_models import saver

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PLACE = "hf/peft/bert"

SIZES = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=24,
    type_vocab_size=2,
    num_labels=3,
    pad_token_id=1,
)
CLASSIFIER = dict(SIZES, auto="AutoModelForSequenceClassification")
MODELS = {
    "bert": dict(CLASSIFIER, model_type="bert"),
    "roberta": dict(CLASSIFIER, model_type="roberta"),
    "electra": dict(CLASSIFIER, model_type="electra", embedding_size=8),
    "distilbert": dict(
        auto="AutoModelForSequenceClassification",
        model_type="distilbert",
        vocab_size=40,
        dim=16,
        hidden_dim=24,
        n_layers=3,
        n_heads=4,
        max_position_embeddings=24,
        num_labels=3,
        pad_token_id=1,
    ),
    "llama": dict(
        {name: size for name, size in CLASSIFIER.items() if name != "type_vocab_size"},
        model_type="llama",
        num_key_value_heads=2,
    ),
    "modernbert": dict(
        {name: size for name, size in CLASSIFIER.items() if name != "type_vocab_size"},
        model_type="modernbert",
        local_attention=4,
        classifier_pooling="mean",
        bos_token_id=2,
        eos_token_id=3,
    ),
    "deberta": dict(
        CLASSIFIER,
        model_type="deberta-v2",
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=4,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    ),
    "convolved": dict(
        CLASSIFIER,
        model_type="deberta-v2",
        type_vocab_size=0,
        position_biased_input=False,
        conv_kernel_size=3,
        conv_act="gelu",
    ),
    "tokens": dict(SIZES, model_type="bert", auto="AutoModelForTokenClassification"),
    "answers": dict(
        {**SIZES, "num_labels": 2}, model_type="roberta", auto="AutoModelForQuestionAnswering"
    ),
    "bare": dict(SIZES, model_type="bert", auto="AutoModel"),
}
TOKENS = np.array([[3, 5, 9, 30, 2, 17], [4, 4, 39, 7, 1, 1]], np.int32)
MASK = TOKENS != 1
QV = ["query", "value"]

CASES = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": QV},
    "all-linear-rslora": {"r": 3, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 4,
        "target_modules": ["query", "key", "output.dense"],
        "rank_pattern": {"key": 2, r"layer\.1\.attention\.self\.query": 5},
        "alpha_pattern": {"key": 3, r".*\.2\.output\.dense": 1},
    },
    "layers": {"r": 2, "target_modules": QV, "layers_to_transform": [0, 2]},
    "one-layer": {"r": 2, "target_modules": ["intermediate.dense"], "layers_to_transform": 1},
    "dora": {"r": 2, "target_modules": QV, "use_dora": True},
    "bias": {"r": 2, "target_modules": QV, "bias": "all", "task_type": None},
    "bias-saved": {"r": 2, "target_modules": QV, "bias": "all"},
    "bias-lora-only": {"r": 2, "target_modules": QV, "bias": "lora_only"},
    "embedding": {"r": 2, "target_modules": ["word_embeddings", "query"]},
    "saved-norm": {"r": 2, "target_modules": QV, "modules_to_save": ["classifier", "LayerNorm"]},
}


def torch_outputs(model):
    """What a torch model gives for the tokens."""
    import torch

    with torch.no_grad():
        tokens = torch.tensor(TOKENS, dtype=torch.long)
        return model.eval()(input_ids=tokens, attention_mask=torch.tensor(MASK).long())


def torch_logits(model) -> np.ndarray:
    return torch_outputs(model).logits.numpy()


def jax_logits(model, params) -> np.ndarray:
    quick = {"xla_backend_optimization_level": 0}
    run = jax.jit(lora.lorafy(model.apply), compiler_options=quick)
    return np.asarray(run(params, TOKENS, mask=jnp.asarray(MASK)))


def task_type(directory):
    return json.loads((directory / "adapter_config.json").read_text())["task_type"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a torch model, anew at each call, and the directory of its weights."""
    make = saver(PLACE, MODELS, tmp_path_factory)

    def model(kind: str) -> Base:
        saved = make(kind)
        return Base(lambda: copy.deepcopy(saved.model()), saved.directory)

    return model


@pytest.fixture(scope="module")
def bases(made):
    """Our models of both kinds, each loaded once."""
    return {
        kind: lora.models.load(made(kind).directory)
        for kind in ("bert", "roberta", "electra", "distilbert", "llama", "modernbert", "deberta",
                     "convolved")
    }  # fmt: skip


def of_both(cases, *robertas):
    """Every case for BERT, and for RoBERTa, whose blocks are the same, those named."""
    return [*(("bert", case) for case in cases), *(("roberta", case) for case in robertas)]


def restore_originals(model, base) -> None:
    """PEFT's unused copies of saved modules are the base's, as no gradient reaches them."""
    import torch

    state = base.state_dict()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".original_module." in name:
                plain = name.removeprefix("base_model.model.").replace("original_module.", "")
                weight.copy_(state[plain])


OTHERS = [
    *(("electra", case) for case in ("all-linear-rslora", "dora", "embedding")),
    # "all-linear" of PEFT takes DistilBERT's classifier, and then cannot train it whole.
    *(("distilbert", case) for case in CASES if case not in ("one-layer", "all-linear-rslora")),
    *(("modernbert", case) for case in CASES if case not in ("bias-saved", "one-layer")),
    *(("deberta", case) for case in CASES),
    *(("convolved", case) for case in ("plain", "all-linear-rslora", "dora", "bias")),
    *(("llama", case) for case in CASES if case != "bias-saved"),
]
LLAMA = {
    "query": "q_proj", "key": "k_proj", "value": "v_proj", "output.dense": "down_proj",
    "intermediate.dense": "up_proj", "word_embeddings": "embed_tokens", "classifier": "score",
    r"layer\.1\.attention\.self\.query": r"layers\.1\.self_attn\.q_proj",
    r".*\.2\.output\.dense": r".*\.2\.mlp\.down_proj", "LayerNorm": "input_layernorm",
}  # fmt: skip
MODERN = {
    "query": "Wqkv", "key": "attn.Wo", "value": "Wi", "output.dense": "mlp.Wo",
    "word_embeddings": "tok_embeddings", "LayerNorm": "mlp_norm",
    r"layer\.1\.attention\.self\.query": r"layers\.1\.attn\.Wqkv",
    r".*\.2\.output\.dense": r".*\.2\.mlp\.Wo",
}  # fmt: skip
DEBERTA = {
    "query": "query_proj",
    "key": "key_proj",
    "value": "value_proj",
    r"layer\.1\.attention\.self\.query": r"layer\.1\.attention\.self\.query_proj",
}
CONVOLVED = {"query": "query_proj", "key": "key_proj", "value": "conv.conv"}
DISTIL = {
    "query": "q_lin", "key": "k_lin", "value": "v_lin", "output.dense": "lin2",
    r"layer\.1\.attention\.self\.query": r"layer\.1\.attention\.q_lin",
    r".*\.2\.output\.dense": r".*\.2\.ffn\.lin2", "LayerNorm": "sa_layer_norm",
}  # fmt: skip


def spelled(kind: str, fields: Any) -> Any:
    """The fields by the names of a model's modules."""
    known = {
        "convolved": CONVOLVED,
        "distilbert": DISTIL,
        "llama": LLAMA,
        "modernbert": MODERN,
        "deberta": DEBERTA,
    }
    names = known.get(kind, {})
    if isinstance(fields, dict):
        return {names.get(k, k): spelled(kind, v) for k, v in fields.items()}
    return [names.get(x, x) for x in fields] if isinstance(fields, list) else fields


@pytest.mark.parametrize(
    "kind, case",
    [
        *of_both(CASES, "bias-saved", "saved-norm"),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in OTHERS),
    ],
)
def test_pefts_adapter_here_and_back(case, kind, made, bases, tmp_path):
    base, there = bases[kind], made(kind).torch
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"

    def randomized(model):
        randomize(model)
        restore_originals(model, there())

    fields = {"task_type": "SEQ_CLS", **spelled(kind, CASES[case])}
    name = f"{PLACE}/{kind}/{case}"
    want = peft_wrote(name, theirs, there, fields, torch_logits, randomized=randomized)
    params, config = load_peft(theirs, base.apply, base.params, TOKENS)
    close(jax_logits(base, params), want)
    save_peft(ours, params, config)
    assert_same_files(theirs, ours)
    if case == "plain":
        # The config names two heads, `classifier` and `score`, of which this model has one.
        orbax = tmp_path / "orbax"
        assert_orbax_keeps(params, config, base.apply, base.params, TOKENS, place=orbax)


OURS = {
    "query-value": lora.LoraConfig(
        rank=4, target_modules=("query", "value"), modules_to_save=("classifier",)
    ),
    "all-linear": lora.LoraConfig(rank=3, use_rslora=True, modules_to_save=("classifier",)),
    "dora-patterns": lora.LoraConfig(
        rank=2,
        target_modules=("query", "output.dense"),
        use_dora=True,
        rank_pattern={r"1\.attention\.self\.query": 4},
        modules_to_save=("classifier",),
    ),
    "bias": lora.LoraConfig(
        rank=2, target_modules=("key",), bias="lora_only", modules_to_save=("classifier",)
    ),
}


@pytest.mark.parametrize(
    "kind, case",
    [
        *of_both(OURS, "all-linear"),
        *(pytest.param(k, "all-linear", marks=pytest.mark.slow) for k in ("electra", "distilbert")),
        ("llama", "all-linear"),
        pytest.param("deberta", "all-linear", marks=pytest.mark.slow),
        pytest.param("convolved", "all-linear", marks=pytest.mark.slow),
        pytest.param("modernbert", "all-linear", marks=pytest.mark.slow),
    ],
)
def test_our_adapter_in_peft_and_back(case, kind, made, bases, tmp_path):
    base = bases[kind]
    config = dataclasses.replace(
        OURS[case], modules_to_save=tuple(spelled(kind, list(OURS[case].modules_to_save)))
    )
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    params = noisy(lora.init(jax.random.key(0), plan, base.params))
    save_peft(tmp_path / "a", params, config)
    # ModernBERT's heads of texts and of tokens have the same modules.
    assert task_type(tmp_path / "a") == (None if kind == "modernbert" else "SEQ_CLS")
    there, name = made(kind).torch, f"{PLACE}/{kind}/ours/{case}"
    close(peft_reads(name, tmp_path / "a", there, torch_logits), jax_logits(base, params))
    again, _ = load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "modernbert", "deberta"])
def test_slopes_of_classifiers_are_pefts(kind, made, bases, tmp_path):
    fields = {"task_type": "SEQ_CLS", "r": 2, "target_modules": "all-linear"}
    check_gradients(f"{PLACE}/{kind}/slopes", tmp_path, made(kind).torch, bases[kind], fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, task, head",
    [("tokens", "TOKEN_CLS", "classifier"), ("answers", "QUESTION_ANS", "qa_outputs")],
)
def test_heads_of_tokens_and_answers(kind, task, head, made, tmp_path):
    there, base = made(kind).torch, lora.models.load(made(kind).directory)

    def logits(model) -> np.ndarray:
        out = torch_outputs(model)
        if kind == "tokens":
            return out.logits.numpy()
        return np.stack([out.start_logits.numpy(), out.end_logits.numpy()], axis=-1)

    config = lora.LoraConfig(rank=2, target_modules=("query", "value"), modules_to_save=(head,))
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    params = noisy(lora.init(jax.random.key(0), plan, base.params))
    save_peft(tmp_path / "a", params, config)
    assert task_type(tmp_path / "a") == task
    want = peft_reads(f"{PLACE}/{kind}/ours", tmp_path / "a", there, logits)
    close(want[MASK], jax_logits(base, params)[MASK])
    again, _ = load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_an_adapter_of_the_bare_encoder(made, tmp_path):
    """Feature extraction: no prefix in the names."""
    bare = made("bare")

    def outputs(model):
        out = torch_outputs(model)
        return {"pooled": out.pooler_output.numpy(), "hidden": out.last_hidden_state.numpy()}

    fields = {"task_type": "FEATURE_EXTRACTION", "r": 2, "target_modules": QV}
    want = peft_wrote(f"{PLACE}/bare", tmp_path / "a", bare.torch, fields, outputs)
    base = lora.models.load(bare.directory)
    params, _ = load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
    got = lora.lorafy(base.apply)(params, TOKENS, mask=jnp.asarray(MASK))
    close(got.pooled, want["pooled"])
    close(got.hidden[MASK], want["hidden"][MASK])
    # Told by the tree alone, and with its table trained: an encoder has no head that shares it.
    ours = lora.LoraConfig(rank=2, target_modules=("query", "word_embeddings"))
    fresh = lora.init(jax.random.key(0), lora.plan(ours, base.apply, base.params, TOKENS),
                      base.params)  # fmt: skip
    save_peft(tmp_path / "ours", fresh, ours)
    assert task_type(tmp_path / "ours") == "FEATURE_EXTRACTION"
    kind = peft_reads(f"{PLACE}/bare", tmp_path / "ours", bare.torch, lambda m: type(m).__name__)
    assert kind == "PeftModelForFeatureExtraction"
    save_peft(tmp_path / "ours", fresh, ours, task_type=None)
    assert task_type(tmp_path / "ours") is None


def test_a_head_that_peft_would_look_for(made, bases, tmp_path):
    base = bases["roberta"]
    config = lora.LoraConfig(rank=2, target_modules=("key",))
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    params = lora.init(jax.random.key(0), plan, base.params)
    with pytest.raises(ValueError, match='"SEQ_CLS": PEFT would look for the head `classifier`'):
        save_peft(tmp_path / "a", params, config, task_type="SEQ_CLS")
    assert not (tmp_path / "a").exists()
    save_peft(tmp_path / "a", params, config)  # not of that type, then
    assert task_type(tmp_path / "a") is None
    peft_reads(f"{PLACE}/roberta/headless", tmp_path / "a", made("roberta").torch, torch_logits)
