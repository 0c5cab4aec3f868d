"""What is exported for vLLM passes vLLM's own checks, family by family.

Its `PEFTHelper` runs, and its parser of names; which modules a model takes is read off its source
(tests/support/vllm_source.py). No model of vLLM runs here: that takes its compiled parts.
"""

import ast

import pytest
from safetensors import safe_open
from vllm.config.lora import LoRAConfig  # pyright: ignore[reportMissingImports]
from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]

import lora_jax as lora
from lora_jax.array import leaves_by_path
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
REFUSED = {"gpt2", "stablelm", "ministral", "helium"}


def parse(name):
    """The module of a tensor, by vLLM's parser, out of a file that imports its kernels."""
    body = ast.parse((root() / "lora" / "utils.py").read_text("utf-8")).body
    wanted = "parse_fine_tuned_lora_name"
    space: dict = {}
    exec(next(ast.unparse(x) for x in body if getattr(x, "name", "") == wanted), space)
    return space[wanted](name)[0]


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
@pytest.mark.parametrize("kind", FAMILIES)
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
    if takes is not None and takes.adapters and takes.modules is not None:
        assert {name.rpartition(".")[2] for name in modules} <= takes.modules
