"""What is exported for vLLM passes vLLM's own checks, family by family.

Its `PEFTHelper` runs, and its parser of names; which modules a model takes is read off its source
(tests/support/vllm_source.py). No model of vLLM runs here: that takes its compiled parts.
"""

import ast
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from vllm.config.lora import LoRAConfig  # pyright: ignore[reportMissingImports]
from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]

import lora_jax as lora
from lora_jax.array import leaves_by_path
from lora_jax.hf.checkpoint import names
from lora_jax.hf.peft.vllm import TOGETHER
from lora_jax.paths import bare
from lora_jax.recipes import convert, finetune

from tests.support.decoders import FAMILIES, family
from tests.support.vllm_source import root, taken

# The classes that vLLM's registry has, where they are not `Xxx` of the family `xxx`.
ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3", "ernie4_5": "Ernie4_5",
    "gemma3_text": "Gemma3", "gemma4_text": "Gemma4", "glm4_moe": "Glm4Moe",
    "glm4_moe_lite": "Glm4MoeLite",
    "gpt_neox": "GPTNeoX", "gpt_oss": "GptOss", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe",
    "llama4_text": "Llama4", "qwen3_5_text": "Qwen3_5",
    "qwen3_5_moe_text": "Qwen3_5Moe", "qwen3_next": "Qwen3Next",
    "seed_oss": "SeedOss", "smollm3": "SmolLM3", "stablelm": "StableLm",
}  # fmt: skip
# vLLM 0.33 takes no adapters for the first two, and has no model of its own for the others.
MIXTURES = "mixtral qwen3_moe deepseek_v3 llama4_text gemma4_text gpt_oss qwen3_5_moe_text".split()
# Not compared with this release of vLLM.
LATER = {
    "apertus", "cwm", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "granite_swa",
    "granitemoe", "granitemoe_swa", "hyperclovax", "internlm3", "iquestcoder", "mellum", "olmo",
    "jais2", "ministral3", "nemotron", "solar_open", "vaultgemma", "youtu",
}  # fmt: skip
REFUSED = {"gpt2", "stablelm", "ministral", "helium"}


def of_vllm(file, name, **space):
    """A function or class out of a file of vLLM that imports its kernels."""
    tree = ast.parse((root() / "lora" / file).read_text("utf-8"))
    found = next(x for x in ast.walk(tree) if getattr(x, "name", "") == name)
    exec("from __future__ import annotations\n" + ast.unparse(found), space)
    return space[name]


def parse(name):
    """The module of a tensor, by vLLM's parser."""
    return of_vllm("utils.py", "parse_fine_tuned_lora_name")(name)[0]


def exported(kind, folder, targets):
    """The modules in the file of an adapter with two ranks, exported for vLLM."""
    model = family(kind)
    paths = "\n".join(leaves_by_path(model.params))
    targets = [name for name in targets if name in paths]
    config = lora.LoraConfig(
        rank=4, alpha=6, init="random", target_modules=targets, rank_pattern={targets[-1]: 2}
    )
    tree = finetune.init_adapter(model, config, seed=0)
    convert.save_adapter(model, tree, config, folder, to="vllm")
    with safe_open(folder / "adapter_model.safetensors", "numpy") as file:
        return {parse(name) for name in [*file.keys()]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in LATER])
def test_a_family_passes_vllms_checks(kind, tmp_path):
    is_latent = kind in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
    targets = "q_proj query_key_value qkv_proj c_attn o_proj dense c_proj".split()
    targets = ("o_proj", "kv_b_proj") if is_latent else targets
    modules = exported(kind, tmp_path / "a", targets)
    helper = PEFTHelper.from_local_dir(str(tmp_path / "a"), None)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    with pytest.raises(ValueError, match="LoRA rank 4 is greater than max_lora_rank 1"):
        helper.validate_legal(LoRAConfig(max_lora_rank=1))
    assert helper.get_rank_and_scaling("x")[0] == 4
    takes = taken(f"{ARCHITECTURES.get(kind, kind.capitalize())}ForCausalLM")
    takes = takes or taken(f"{kind.upper()}LMHeadModel")
    assert (takes is None or not takes.adapters) == (kind in REFUSED)
    if kind in MIXTURES:
        assert takes is not None and takes.together == (kind in TOGETHER)
    if takes is not None and takes.adapters and takes.modules is not None:
        assert {name.rpartition(".")[2] for name in modules} <= takes.modules


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("targets", ["all-linear", ("down_proj",), ("gate_up_proj",)], ids=str)
def test_vllm_packs_the_adapters_of_experts(kind, targets, tmp_path):
    """Its own packing of a file gives each expert the change that it has here."""
    model = family(kind)
    config = lora.LoraConfig(
        rank=4, alpha=6, init="random", target_modules=targets, rank_pattern={"o_proj": 2}
    )
    tree = finetune.init_adapter(model, config, seed=0)
    convert.save_adapter(model, tree, config, tmp_path / "a", to="vllm")
    helper = PEFTHelper.from_local_dir(str(tmp_path / "a"), None)
    weights = of_vllm("lora_weights.py", "LoRALayerWeights")
    loras = {}
    for name, tensor in load_file(tmp_path / "a" / "adapter_model.safetensors").items():
        module = parse(name)
        one = loras.setdefault(module, weights.from_config(module, helper))
        setattr(one, "lora_a" if "lora_A" in name else "lora_b", tensor)
    checked = 0
    for path, leaf in leaves_by_path(tree).items():
        if not path.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        change = np.zeros(leaf.shape, "float32")
        if isinstance(leaf, lora.LoraArray):
            change = np.asarray(lora.merge({"w": leaf})["w"] - leaf.w)
        outer = path.rpartition(".")[0]
        for layer in np.ndindex(*leaf.shape[:-3]):
            module = names.module_name(bare(outer), layer)
            found = packed(kind, loras, module, leaf.shape[-3])
            gate_up = np.concatenate(found[:2], 1) if len(found) == 3 else found[0]
            there = gate_up if path.endswith("gate_up_proj") else found[-1]
            np.testing.assert_allclose(there.swapaxes(1, 2), change[layer], atol=1e-5)
            checked += abs(change[layer]).max() > 0.01
    assert checked


def packed(kind, loras, module, count):
    """B·A of all experts for gate, up and down, or for gate beside up and down: (E, out, in)."""
    if kind in TOGETHER:
        stack = of_vllm("model_manager.py", "_stack_moe_lora_weights", torch=torch)
        w13 = SimpleNamespace(shape=(1, count))
        layer = SimpleNamespace(w13_lora_a_stacked=[w13], global_num_experts=count, ep_rank=0)
        mine = {name: copy.copy(one) for name, one in loras.items() if name.startswith(module)}
        scale = [mine[f"{module}.base_layer"].scaling, mine[module].scaling]
        manager = SimpleNamespace(
            _is_3d_moe_model=True, _get_lora_layer_weights=lambda model, name: model.loras.get(name)
        )
        model = SimpleNamespace(loras=mine)
        stack(manager, model, layer, module)
        pairs = zip(mine[module].lora_a, mine[module].lora_b, scale, strict=True)
    else:
        weights = of_vllm("lora_weights.py", "LoRALayerWeights")
        pack = of_vllm(
            "lora_weights.py", "PackedLoRALayerWeights", LoRALayerWeights=weights, torch=torch
        )
        module = module.replace(".mlp.", ".block_sparse_moe.") if kind == "mixtral" else module
        ends = ("w1", "w2", "w3") if kind == "mixtral" else ("gate_proj", "down_proj", "up_proj")
        experts = [copy.copy(loras[f"{module}.{e}.{end}"]) for e in range(count) for end in ends]
        one = pack.pack_moe(experts, module)
        order = (0, 2, 1)
        pairs = ((one.lora_a[i], one.lora_b[i], one.scaling[i]) for i in order)
    return [(scale * (b @ a)).numpy() for a, b, scale in pairs]
