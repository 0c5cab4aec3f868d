"""Adapters of T5 between `lora_jax.models` and the real `peft`."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft
from lora_jax.models.registry import inputs_of

from tests.support.peft_llama import TOKENS
from tests.support.peft_oracle import assert_same_files, close, peft_reads, peft_wrote
from tests.support.peft_trees import noisy
from tests.support.torch_models import saver

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PLACE = "hf/peft/t5"
SIZES = dict(
    auto="AutoModelForSeq2SeqLM", vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2,
    num_heads=4, decoder_start_token_id=0, pad_token_id=0,
)  # fmt: skip
GATED = dict(SIZES, feed_forward_proj="gated-gelu")
MODELS = {
    "t5": dict(SIZES, model_type="t5"),
    "mt5": dict(GATED, model_type="mt5"),
    "umt5": dict(GATED, model_type="umt5"),
}
CASES = {
    "plain": {"r": 4, "target_modules": ["q", "v"]},
    "all rsLoRA": {"r": 3, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": ["q", "k", "wo"], "r": 4,
        "rank_pattern": {"decoder.*EncDecAttention.q": 2, "k": 3},
        "alpha_pattern": {r"encoder.block.1.*q": 7},
    },
    "dora": {"r": 2, "target_modules": ["q", "o", "wo"], "use_dora": True},
    "one layer": {
        "target_modules": ["q", "wo"], "layers_to_transform": [1], "layers_pattern": "block",
        "modules_to_save": ["final_layer_norm"],
    },
    "trained rows": {"target_modules": ["q"], "trainable_token_indices": {"shared": [3, 5]}},
}  # fmt: skip
ASKED = [
    pytest.param(model, case, marks=[] if model == "t5" and case < "b" else pytest.mark.slow)
    for model in MODELS
    for case in CASES
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    make = saver(PLACE, MODELS, tmp_path_factory)

    def find(name):
        there, directory = make(name)
        return (lambda: copy.deepcopy(there())), lora.models.load(directory)

    return find


def theirs(model):
    import torch

    tokens = torch.tensor(TOKENS).long()
    with torch.no_grad():
        return model(input_ids=tokens, decoder_input_ids=tokens[:, :4]).logits.numpy()


def ours(base, params):
    # Not strict: these texts are too short for the low-rank form of trained rows in a product.
    return np.asarray(lora.lorafy(base.apply)(params, TOKENS, TOKENS[:, :4]))


@pytest.mark.parametrize(("model", "case"), ASKED)
def test_pefts_adapter_here_and_back(model, case, saved, tmp_path):
    there, base = saved(model)
    asked = {"task_type": "SEQ_2_SEQ_LM", **CASES[case]}
    want = peft_wrote(f"{PLACE}/{model}/{case}", tmp_path / "a", there, asked, theirs)
    params, config = load_peft(tmp_path / "a", base.apply, base.params, *inputs_of(base.config))
    close(ours(base, params), want)
    save_peft(tmp_path / "b", params, config)
    assert_same_files(tmp_path / "a", tmp_path / "b")


def test_our_adapter_in_peft(saved, tmp_path):
    there, base = saved("t5")
    config = lora.LoraConfig(rank=3, rank_pattern={"q": 2}, alpha_pattern={"wo": 5})
    plan = lora.plan(config, base.apply, base.params, *inputs_of(base.config))
    params = noisy(lora.init(jax.random.key(0), plan, base.params))
    save_peft(tmp_path / "a", params, config)
    want = peft_reads(f"{PLACE}/t5/ours", tmp_path / "a", there, theirs)
    close(want, ours(base, params))


@pytest.mark.slow
def test_slopes_are_pefts(saved, tmp_path):
    there, base = saved("t5")

    def run(model):
        import torch

        tokens = torch.tensor(TOKENS).long()
        out = model(input_ids=tokens, decoder_input_ids=tokens[:, :4])
        torch.sin(out.logits).sum().backward()
        return {n: p.grad.numpy() for n, p in sorted(model.named_parameters()) if p.requires_grad}

    fields = {"task_type": "SEQ_2_SEQ_LM", "r": 2, "target_modules": "all-linear"}
    want = peft_wrote(f"{PLACE}/t5/slopes", tmp_path / "a", there, fields, run)
    params, config = load_peft(tmp_path / "a", base.apply, base.params, *inputs_of(base.config))
    trainable, frozen = lora.split(params)

    def loss(trainable):
        run = lora.lorafy(base.apply, strict=True)
        return jnp.sin(run(lora.combine(trainable, frozen), TOKENS, TOKENS[:, :4])).sum()

    slopes = lora.combine(jax.grad(loss)(trainable), frozen)
    _, got = lora.hf.to_peft(slopes, config)
    size = max(np.abs(x).max() for x in want.values())
    assert {name.replace(".default", "") for name in want} == set(got)
    for name, value in want.items():
        # float32 sums of hundreds of terms, against the largest slope.
        np.testing.assert_allclose(got[name.replace(".default", "")], value, atol=1e-4 * size)


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_an_adapter_of_the_table_is_refused(field, saved, tmp_path):
    _, base = saved("t5")
    config = lora.LoraConfig(**{"rank": 2, "target_modules": ("q",), field: ("shared",)})
    plan = lora.plan(config, base.apply, base.params, *inputs_of(base.config))
    with pytest.raises(ValueError, match="has no effect in PEFT, where encoder and decoder read"):
        save_peft(tmp_path / "a", lora.init(jax.random.key(0), plan, base.params), config)
