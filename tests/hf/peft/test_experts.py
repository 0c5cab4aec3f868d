"""Adapters of mixtures of experts between `lora_jax.models` and the real `peft`.

transformers holds a layer's experts in two parameters, which PEFT adapts with one A and one B an
expert.
"""

import copy
import filecmp
import json
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft
from lora_jax.hf.peft.experts import fused

from tests.support.expert_families import EXPERTS
from tests.support.oracle import oracle, seeded
from tests.support.peft_gradients import check_gradients
from tests.support.peft_llama import TOKENS, jax_logits, torch_logits
from tests.support.peft_oracle import (
    TENSORS,
    assert_same_files,
    close,
    peft_reads,
    peft_wrote,
    randomize,
)
from tests.support.peft_trees import noisy
from tests.support.torch_models import saver

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PLACE = "hf/peft/experts"
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
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
    "regex": dict(target_modules=r".*(q_proj|q_b_proj|down_proj)"),
}
# With an adapter of a module PEFT cannot run Llama 4's router, which returns two results.
LEFT_OUT = {("llama4_text", "all-linear"): dict(exclude_modules=["router"])}


def of(family: str, fields: dict) -> Any:
    """The fields by the names of a family."""
    swaps = {
        **dict.fromkeys(
            ("gpt_oss", "llama4_text", "granitemoe"),
            {"gate": "router", "gate.weight": "router.weight"},
        ),
        "gemma4_text": {"gate": "router.proj", "gate.weight": "proj.weight"},
        **dict.fromkeys(
            ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
            {"q_proj": "q_b_proj", "v_proj": "kv_b_proj"},
        ),
    }.get(family, {})
    return {
        key: type(x)(swaps.get(name, name) for name in x) if isinstance(x, list | tuple) else x
        for key, x in fields.items()
    }


def rows(cases, quick):
    """Each family with each case; all but the quick ones only among all tests."""
    return [
        pytest.param(family, case, marks=() if (family, case) in quick else pytest.mark.slow)
        for family in EXPERTS
        for case in cases
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(PLACE, EXPERTS, tmp_path_factory)


@pytest.mark.parametrize(
    "family, case", rows(THEIRS, [("olmoe", "parameters"), ("mixtral", "all-linear")])
)
def test_pefts_adapter_here_and_back(family, case, saved, tmp_path):
    there, directory = saved(family)
    base = lora.models.load(directory)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    fields = {"task_type": "CAUSAL_LM", **of(family, THEIRS[case])}
    fields |= LEFT_OUT.get((family, case), {})
    want = peft_wrote(
        f"{PLACE}/{family}/{case}",
        theirs,
        lambda: copy.deepcopy(there()),
        fields,
        torch_logits,
        # Limits of gates and steep softmaxes: with large factors float32 leaves three digits.
        randomized=partial(randomize, scale=0.3) if family == "gpt_oss" else None,
    )
    params, config = load_peft(theirs, base.apply, base.params, TOKENS, model_type=family)
    close(jax_logits(base.apply, params, strict=True), want)
    save_peft(ours, params, config, model_type=family)
    if case != "all-linear":  # of which PEFT writes a list in another order
        assert_same_files(theirs, ours)
    again, _ = load_peft(ours, base.apply, base.params, TOKENS, model_type=family)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama4_text", "qwen2_moe", "qwen3_5_moe_text"])
def test_names_of_an_mlp_beside_experts_are_not_theirs(family, saved, tmp_path):
    """PEFT has no modules for the experts of these families, whatever its config names."""
    there, directory = saved(family)
    base = lora.models.load(directory)
    fields = {"r": 2, "target_modules": ["o_proj", "down_proj"], "use_dora": True}
    want = peft_wrote(
        f"{PLACE}/{family}/beside experts",
        tmp_path / "a",
        lambda: copy.deepcopy(there()),
        {"task_type": "CAUSAL_LM", **fields},
        torch_logits,
    )
    params, config = load_peft(tmp_path / "a", base.apply, base.params, TOKENS, model_type=family)
    assert config.exclude_modules == r".*\.experts\..*"
    close(jax_logits(base.apply, params, strict=True), want)
    save_peft(tmp_path / "b", params, config, model_type=family)
    assert filecmp.cmp(tmp_path / "a" / TENSORS, tmp_path / "b" / TENSORS, shallow=False)
    fields = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert set(fields["target_modules"]) == {"o_proj", "down_proj"}


@pytest.mark.parametrize("family, case", rows(OURS, [("qwen3_moe", "all-linear")]))
def test_our_adapter_in_peft_and_back(family, case, saved, tmp_path):
    """PEFT finds experts as parameters only, however our config names them."""
    there, directory = saved(family)
    base = lora.models.load(directory)
    config = lora.LoraConfig(rank=2, alpha=4, **of(family, OURS[case]))
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


@pytest.mark.parametrize("family, case", rows(OURS, [("llama4_text", "all-linear")]))
def test_an_adapter_written_for_vllm_is_read_here(family, case, saved, tmp_path):
    base = lora.models.load(saved(family)[1])
    config = lora.LoraConfig(rank=2, alpha=4, **of(family, OURS[case]))
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    params = noisy(lora.init(jax.random.key(0), plan, base.params))
    save_peft(tmp_path / "a", params, config, target="vllm", model_type=family)
    again, _ = load_peft(tmp_path / "a", base.apply, base.params, TOKENS, model_type=family)
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-5), lora.merge(again), lora.merge(params)
    )


@pytest.mark.parametrize("family", [pytest.param("mixtral", marks=pytest.mark.slow), "qwen3_moe"])
def test_peft_reads_what_is_written_for_vllm(family, saved, tmp_path):
    """A module for each expert's layers, as before transformers 5."""
    there, directory = saved(family)
    base = lora.models.load(directory)
    config = lora.LoraConfig(rank=2, alpha=4, target_modules="all-linear")
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    params = noisy(lora.init(jax.random.key(0), plan, base.params))
    save_peft(tmp_path / "a", params, config, target="vllm", model_type=family)
    want = peft_reads(
        f"{PLACE}/{family}/for vLLM",
        tmp_path / "a",
        lambda: copy.deepcopy(there()),
        torch_logits,
        same_state=False,
    )
    close(want, jax_logits(base.apply, params, strict=True))


def test_experts_for_vllm_need_the_models_type(saved, tmp_path):
    base = lora.models.load(saved("mixtral")[1])
    config = lora.LoraConfig(rank=2, target_modules=("down_proj",))
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    params = lora.init(jax.random.key(0), plan, base.params)
    with pytest.raises(
        ValueError, match="vLLM names the experts in `model.layers.0.mlp.experts` by"
    ):
        save_peft(tmp_path / "a", params, config, target="vllm")
    with pytest.raises(ValueError, match=r"MLX cannot serve an adapter with adapted parameters"):
        lora.hf.save_mlx(tmp_path / "b", params, config)


def test_a_directory_of_mixtral_is_the_base_of_its_adapter(saved, tmp_path):
    """transformers 5 renames the modules of its files."""
    directory = saved("mixtral")[1]
    base = lora.models.load(directory)
    config = lora.LoraConfig(rank=2, target_modules="all-linear")
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    params = noisy(lora.init(jax.random.key(0), plan, base.params))
    save_peft(tmp_path / "a", params, config, base_model_name=str(directory))
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(directory)


@pytest.mark.parametrize(
    "option",
    [
        dict(use_dora=True),
        dict(dropout=0.1),
        dict(lora_bias=True),
        dict(init="pissa"),
        dict(init="orthogonal"),
    ],
)
def test_what_peft_lacks_for_experts_is_refused(option, saved, tmp_path):
    base = lora.models.load(saved("mixtral")[1])
    config = lora.LoraConfig(rank=2, target_modules="all-linear", **option)
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    params = lora.init(jax.random.key(0), plan, base.params)
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}=.* does not work with experts in PEFT, and .mlp"):
        save_peft(tmp_path / "a", params, config, model_type="mixtral")
    without = lora.LoraConfig(
        rank=2, target_modules="all-linear", exclude_modules=("gate_up_proj", "down_proj"), **option
    )
    plan = lora.plan(without, base.apply, base.params, TOKENS)
    params = lora.init(jax.random.key(0), plan, base.params)
    save_peft(tmp_path / "b", params, without, model_type="mixtral")


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPERTS)
def test_gradients_are_pefts(family, saved, tmp_path):
    there, directory = saved(family)
    base = lora.models.load(directory)
    fields = {"task_type": "CAUSAL_LM", **of(family, THEIRS["parameters"])}
    check_gradients(
        f"{PLACE}/{family}/gradients", tmp_path, lambda: copy.deepcopy(there()), base, fields
    )


# The names of an expert's layers before transformers 5: gate, up, down.
BEFORE_5 = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def write_before_5(directory, base, family: str, **fields) -> None:
    """The file of an adapter on every expert's layers, the router and the queries."""
    module, layers = BEFORE_5[family]
    config = base.config
    width, inner, rank = config.hidden_size, config.expert_size, 2
    shapes = {"self_attn.q_proj": (width, 4 * config.head_dim)}
    shapes[f"{module}.gate"] = (width, config.num_experts)
    for expert, layer in np.ndindex(config.num_experts, 3):
        down = (inner, width) if layer == 2 else (width, inner)
        shapes[f"{module}.experts.{expert}.{layers[layer]}"] = down
    tensors = {}
    for block in range(config.num_hidden_layers):
        for name, (fan_in, fan_out) in shapes.items():
            key = f"base_model.model.model.layers.{block}.{name}.lora_"
            tensors[f"{key}A.weight"] = seeded(f"{key}A", (rank, fan_in))
            tensors[f"{key}B.weight"] = seeded(f"{key}B", (fan_out, rank))
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    modules = ["q_proj", "gate", *layers]
    written = dict(peft_type="LORA", r=rank, lora_alpha=3, target_modules=modules, **fields)
    (directory / "adapter_config.json").write_text(json.dumps(written))


@pytest.mark.parametrize("family", BEFORE_5)
def test_an_adapter_from_before_transformers_5(family, saved, tmp_path):
    there, directory = saved(family)
    base = lora.models.load(directory)
    write_before_5(tmp_path / "a", base, family)

    def ask():
        import peft

        model = copy.deepcopy(there())
        return torch_logits(peft.PeftModel.from_pretrained(model, str(tmp_path / "a")).eval())

    want = oracle(f"{PLACE}/{family}/before 5.logits", ask)
    params, config = load_peft(tmp_path / "a", base.apply, base.params, TOKENS, model_type=family)
    close(jax_logits(base.apply, params, strict=True), want)
    save_peft(tmp_path / "b", params, config, model_type=family)
    again, _ = load_peft(tmp_path / "b", base.apply, base.params, TOKENS, model_type=family)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("case", ["one layer", "one expert", "patterns"])
def test_an_adapter_of_some_experts_layers_is_refused(case, saved, tmp_path):
    base = lora.models.load(saved("mixtral")[1])
    fields = {"rank_pattern": {"w1": 4}} if case == "patterns" else {}
    write_before_5(tmp_path / "a", base, "mixtral", **fields)
    path = tmp_path / "a" / "adapter_model.safetensors"
    without = {"one layer": ".w3.", "one expert": ".experts.0.w2.", "patterns": " "}[case]
    save_file({k: v for k, v in load_file(path).items() if without not in k}, path)
    messages = {
        "one layer": "only one of gate and up has an adapter",
        "one expert": r"the experts \[1, 2, 3\] have a lora_A of down; all of them",
        "patterns": "`rank_pattern` {'w1': 4} with an adapter for each expert's layers",
    }
    with pytest.raises(ValueError, match=messages[case]):
        load_peft(tmp_path / "a", base.apply, base.params, TOKENS, model_type="mixtral")


@pytest.mark.parametrize("rslora, factor", [(False, 2), (True, 2**0.5)])
def test_gate_and_up_in_one_have_the_scale_of_each(rslora, factor):
    """Of twice the rank: alpha / r, or alpha / √r."""
    block = "base_model.model.model.layers.0.mlp.experts"
    tensors = {
        f"{block}.{expert}.{layer}.lora_{part}.weight": np.ones(shape, np.float32)
        for expert in (0, 1) for layer in ("w1", "w3")
        for part, shape in (("A", (3, 8)), ("B", (6, 3)))
    }  # fmt: skip
    config = lora.LoraConfig(rank=3, alpha=5, target_modules=("w1", "w3"), use_rslora=rslora)
    paths = ["model.layers.0.mlp.experts.gate_up_proj"]
    found, named = fused(config, tensors, paths, "file")
    assert set(named) == {f"{block}.lora_{part}.weight" for part in "AB"}
    # With an adapter of down beside it, PEFT has that of gate and up inside.
    down = {f"{block}.{e}.w2.lora_{part}.weight": np.ones((3, 3)) for e in (0, 1) for part in "AB"}
    _, both = fused(config, {**tensors, **down}, paths, "file")
    inside = {f"{block}.base_layer.lora_{part}.weight" for part in "AB"}
    assert set(both) == {*named, *inside}
    assert found.rank_pattern == {r".*\.gate_up_proj": 6}
    assert found.alpha_pattern == {r".*\.gate_up_proj": 5 * factor}
