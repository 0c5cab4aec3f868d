"""Adapters of encoders between `lora_jax.models` and the real `peft`: the same logits both ways."""

import filecmp
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft

from tests.hf.peft.test_model import noisy, randomize

pytestmark = [pytest.mark.once, pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

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
    initializer_range=0.3,
)
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


def torch_classifier(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        tokens = torch.tensor(TOKENS, dtype=torch.long)
        return model.eval()(input_ids=tokens, attention_mask=torch.tensor(MASK)).logits.numpy()


def jax_logits(model, params) -> np.ndarray:
    quick = {"xla_backend_optimization_level": 0}
    run = jax.jit(lora.lorafy(model.apply), compiler_options=quick)
    return np.asarray(run(params, TOKENS, mask=jnp.asarray(MASK)))


def task_type(directory):
    return json.loads((directory / "adapter_config.json").read_text())["task_type"]


def close(one, other):
    np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Our models of both kinds, each loaded once."""
    loaded = {}
    for kind in ("bert", "roberta"):
        path = tmp_path_factory.mktemp("base")
        torch_classifier(kind).save_pretrained(str(path))
        loaded[kind] = lora.models.load(path)
    return loaded


def of_both(cases, *robertas):
    """Every case for BERT, and for RoBERTa, whose blocks are the same, those named."""
    return [*(("bert", case) for case in cases), *(("roberta", case) for case in robertas)]


def restore_originals(model, base) -> None:
    """PEFT's unused copies of saved modules are the base's, as no gradient reaches them."""
    state = base.state_dict()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".original_module." in name:
                plain = name.removeprefix("base_model.model.").replace("original_module.", "")
                weight.copy_(state[plain])


@pytest.mark.parametrize("kind, case", of_both(CASES, "bias-saved", "saved-norm"))
def test_pefts_adapter_here_and_back(case, kind, bases, tmp_path):
    base = bases[kind]
    config = peft.LoraConfig(**{"task_type": "SEQ_CLS", **CASES[case]})
    model = peft.get_peft_model(torch_classifier(kind), config)
    randomize(model)
    restore_originals(model, torch_classifier(kind))
    model.save_pretrained(str(tmp_path / "theirs"))
    params, config = load_peft(tmp_path / "theirs", base.apply, base.params, TOKENS)
    close(jax_logits(base, params), torch_logits(model))

    save_peft(tmp_path / "ours", params, config)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert filecmp.cmp(tmp_path / "theirs" / name, tmp_path / "ours" / name, shallow=False)


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


@pytest.mark.parametrize("kind, case", of_both(OURS, "all-linear"))
def test_our_adapter_in_peft_and_back(case, kind, bases, tmp_path):
    base = bases[kind]
    config = OURS[case]
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    params = noisy(lora.init(jax.random.key(0), plan, base.params))
    save_peft(tmp_path / "a", params, config)
    assert task_type(tmp_path / "a") == "SEQ_CLS"
    model = peft.PeftModel.from_pretrained(torch_classifier(kind), str(tmp_path / "a"))
    close(torch_logits(model), jax_logits(base, params))
    again, _ = load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_an_adapter_of_the_bare_encoder(tmp_path):
    """Feature extraction: no prefix in the names."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("bert", **SIZES)
    bare = transformers.AutoModel.from_config(config).eval()
    bare.save_pretrained(str(tmp_path / "base"))
    fields = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=QV)
    model = peft.get_peft_model(bare, fields)
    randomize(model)
    model.save_pretrained(str(tmp_path / "a"))
    base = lora.models.load(tmp_path / "base")
    params, _ = load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
    got = lora.lorafy(base.apply)(params, TOKENS, mask=jnp.asarray(MASK))
    with torch.no_grad():
        tokens = torch.tensor(TOKENS, dtype=torch.long)
        want = model.eval()(input_ids=tokens, attention_mask=torch.tensor(MASK))
    close(got.pooled, want.pooler_output.numpy())
    close(got.hidden[MASK], want.last_hidden_state.numpy()[MASK])
    # Told by the tree alone, and with its table trained: an encoder has no head that shares it.
    ours = lora.LoraConfig(rank=2, target_modules=("query", "word_embeddings"))
    fresh = lora.init(jax.random.key(0), lora.plan(ours, base.apply, base.params, TOKENS),
                      base.params)  # fmt: skip
    save_peft(tmp_path / "ours", fresh, ours)
    assert task_type(tmp_path / "ours") == "FEATURE_EXTRACTION"
    plain = transformers.AutoModel.from_pretrained(tmp_path / "base").eval()
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path / "ours"))
    assert isinstance(loaded, peft.PeftModelForFeatureExtraction)
    save_peft(tmp_path / "ours", fresh, ours, task_type=None)
    assert task_type(tmp_path / "ours") is None


def test_a_head_that_peft_would_look_for(bases, tmp_path):
    base = bases["roberta"]
    config = lora.LoraConfig(rank=2, target_modules=("key",))
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    params = lora.init(jax.random.key(0), plan, base.params)
    with pytest.raises(ValueError, match='"SEQ_CLS": PEFT would look for the head `classifier`'):
        save_peft(tmp_path / "a", params, config, task_type="SEQ_CLS")
    assert not (tmp_path / "a").exists()
    save_peft(tmp_path / "a", params, config)  # not of that type, then
    assert task_type(tmp_path / "a") is None
    model = torch_classifier(base.config.model_type)
    peft.PeftModel.from_pretrained(model, str(tmp_path / "a"))
