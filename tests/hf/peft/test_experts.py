"""Adapters of mixtures of experts between `lora_jax.models` and the real `peft`.

transformers holds a layer's experts in two parameters, which PEFT adapts with one A and one B an
expert.
"""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft

from tests.support.peft_llama import TOKENS, jax_logits, torch_logits
from tests.support.peft_oracle import assert_same_files, close, peft_reads, peft_wrote
from tests.support.peft_trees import noisy
from tests.support.torch_models import saver

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PLACE = "hf/peft/experts"
SIZES = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    num_experts_per_tok=2,
    pad_token_id=0,
)
FAMILIES = {
    "mixtral": dict(SIZES, model_type="mixtral", num_local_experts=4),
    "qwen3_moe": dict(
        SIZES, model_type="qwen3_moe", head_dim=8, moe_intermediate_size=12, num_experts=3
    ),
    # Square experts: their shapes do not show the order of their dims.
    "olmoe": dict(SIZES, model_type="olmoe", num_experts=3, intermediate_size=16),
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
THEIRS = {
    "parameters": dict(r=2, target_modules=["q_proj"], target_parameters=BOTH),
    "one parameter": dict(
        r=3, target_modules=[], target_parameters=["experts.down_proj"], use_rslora=True
    ),
    "router": dict(r=2, target_modules=["v_proj"], target_parameters=["gate.weight"]),
    # PEFT fuses what was a module each before transformers 5, with the sum of the ranks.
    "all-linear": dict(r=2, lora_alpha=3, target_modules="all-linear"),
}
OURS = {
    "all-linear": dict(target_modules="all-linear", use_rslora=True),
    "one layer": dict(
        target_modules=("down_proj", "gate_up_proj", "q_proj"), layers_to_transform=(1,)
    ),
    "patterns": dict(
        target_modules=("down_proj", "gate_up_proj", "gate"),
        rank_pattern={"gate_up_proj": 3},
        alpha_pattern={"down_proj": 5},
    ),
    "regex": dict(target_modules=r".*(q_proj|down_proj)"),
}


def rows(cases, quick):
    """Each family with each case; all but the quick ones only among all tests."""
    return [
        pytest.param(family, case, marks=() if (family, case) in quick else pytest.mark.slow)
        for family in FAMILIES
        for case in cases
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(PLACE, FAMILIES, tmp_path_factory)


@pytest.mark.parametrize(
    "family, case", rows(THEIRS, [("olmoe", "parameters"), ("mixtral", "all-linear")])
)
def test_pefts_adapter_here_and_back(family, case, saved, tmp_path):
    there, directory = saved(family)
    base = lora.models.load(directory)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    fields = {"task_type": "CAUSAL_LM", **THEIRS[case]}
    want = peft_wrote(
        f"{PLACE}/{family}/{case}", theirs, lambda: copy.deepcopy(there()), fields, torch_logits
    )
    params, config = load_peft(theirs, base.apply, base.params, TOKENS, model_type=family)
    close(jax_logits(base.apply, params, strict=True), want)
    save_peft(ours, params, config, model_type=family)
    if case != "all-linear":  # of which PEFT writes a list in another order
        assert_same_files(theirs, ours)
    again, _ = load_peft(ours, base.apply, base.params, TOKENS, model_type=family)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("family, case", rows(OURS, [("qwen3_moe", "all-linear")]))
def test_our_adapter_in_peft_and_back(family, case, saved, tmp_path):
    """PEFT finds experts as parameters only, however our config names them."""
    there, directory = saved(family)
    base = lora.models.load(directory)
    config = lora.LoraConfig(rank=2, alpha=4, **OURS[case])
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    params = noisy(lora.init(jax.random.key(0), plan, base.params))
    save_peft(tmp_path / "a", params, config, model_type=family)
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert any(entry.endswith("experts.down_proj") for entry in fields["target_parameters"])
    want = peft_reads(
        f"{PLACE}/{family}/ours {case}",
        tmp_path / "a",
        lambda: copy.deepcopy(there()),
        torch_logits,
    )
    close(want, jax_logits(base.apply, params, strict=True))
    again, _ = load_peft(tmp_path / "a", base.apply, base.params, TOKENS, model_type=family)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def torch_gradients(model) -> dict:
    """Gradients of `sum(sin(logits))` for PEFT's adapters, by the names in its file."""
    import peft
    import torch

    torch.sin(model(torch.tensor(TOKENS, dtype=torch.long)).logits).sum().backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data = parameter.grad
    state = peft.get_peft_model_state_dict(model)
    return {name: value.detach().numpy() for name, value in sorted(state.items())}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_pefts(family, saved, tmp_path):
    there, directory = saved(family)
    base = lora.models.load(directory)
    fields = {"task_type": "CAUSAL_LM", **THEIRS["parameters"]}
    want = peft_wrote(
        f"{PLACE}/{family}/gradients",
        tmp_path / "a",
        lambda: copy.deepcopy(there()),
        fields,
        torch_gradients,
    )
    params, config = load_peft(tmp_path / "a", base.apply, base.params, TOKENS, model_type=family)
    trainable, frozen = lora.split(params)

    def loss(trainable):
        run = lora.lorafy(base.apply, strict=True)
        return jnp.sin(run(lora.combine(trainable, frozen), TOKENS)).sum()

    slopes = lora.combine(jax.grad(loss)(trainable), frozen)
    save_peft(tmp_path / "b", slopes, config, model_type=family)
    got = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert got.keys() == want.keys()
    size = max(np.abs(x).max() for x in want.values())
    for name, value in want.items():
        # float32 sums of hundreds of terms, against the largest slope.
        np.testing.assert_allclose(got[name], value, atol=1e-4 * size, err_msg=name)
