"""PEFT directories against the real `peft`: read what it wrote, write what it reads."""

import dataclasses
import filecmp
import json

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lora_jax.array import LoraArray, RowsArray, SavedArray, delta, leaves_by_path
from lora_jax.config.lora import LoraConfig
from lora_jax.hf.checkpoint import names
from lora_jax.hf.peft import api as ours
from lora_jax.hf.peft.index import modules_of

from tests.support.peft_trees import nested, planted, randomized

pytestmark = [pytest.mark.once, pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

QV = ["q_proj", "v_proj"]
CASES = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": QV},
    "all-linear-rslora": {"r": 3, "target_modules": "all-linear", "use_rslora": True},
    "regex": {"r": 2, "target_modules": r".*\.(up_proj|k_proj)", "exclude_modules": r".*\.1\..*"},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 5},
        "alpha_pattern": {"k_proj": 3, r"^model\.layers\.2\..*q_proj": 1},
        "r": 4,
    },
    "patterns-rslora": {
        "target_modules": QV,
        "rank_pattern": {r"0\.self_attn\.q_proj": 7},
        "use_rslora": True,
    },
    "layers": {"target_modules": QV, "layers_to_transform": [0, 2]},
    "one-layer": {"target_modules": ["gate_proj"], "layers_to_transform": 1},
    "layers-pattern": {
        "target_modules": ["o_proj"],
        "layers_to_transform": [2],
        "layers_pattern": "layers",
    },
    "full-name": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "head": {"r": 4, "target_modules": ["lm_head", "q_proj"]},
    "embedding-regex": {"r": 4, "target_modules": r".*(embed_tokens|q_proj)"},
    "dora": {"target_modules": QV, "use_dora": True},
    "dora-embedding": {"r": 2, "target_modules": ["embed_tokens"], "use_dora": True},
    "saved-head": {"target_modules": QV, "modules_to_save": ["lm_head"]},
    "saved-norm": {"target_modules": QV, "modules_to_save": ["input_layernorm", "embed_tokens"]},
    "bias-all": {"target_modules": QV, "bias": "all"},
    "bias-lora-only": {"target_modules": QV, "bias": "lora_only"},
    "bias-one-layer": {"target_modules": QV, "bias": "lora_only", "layers_to_transform": [1]},
    "lora-bias": {"r": 2, "target_modules": QV, "lora_bias": True},
    "lora-bias-none": {"r": 2, "target_modules": ["up_proj"], "lora_bias": True, "bias": "all"},
    "tokens": {"r": 2, "target_modules": QV, "trainable_token_indices": [5, 30, 0]},
    "tokens-two": {
        "r": 2,
        "target_modules": QV,
        "trainable_token_indices": {"embed_tokens": [1, 30], "lm_head": [4, 30, 7]},
    },
    "dropout-gaussian": {
        "target_modules": QV,
        "lora_dropout": 0.1,
        "init_lora_weights": "gaussian",
    },
    "everything": {
        "target_modules": "all-linear",
        "use_dora": True,
        "use_rslora": True,
        "bias": "all",
        "modules_to_save": ["lm_head", "embed_tokens"],
        "rank_pattern": {"up_proj": 3},
        "alpha_pattern": {"q_proj": 2.5},
        "exclude_modules": ["down_proj"],
    },
}


def torch_llama(**fields) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=False,
        **fields,
    )
    return LlamaForCausalLM(config).eval()


def adapted(fields: dict) -> peft.PeftModel:
    """A PEFT model whose every trained number is random."""
    model = peft.get_peft_model(torch_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + torch.randn_like(parameter)
    return model.eval()


def our_params(model: torch.nn.Module) -> dict:
    """A torch model's weights as our stacked tree."""
    flat: dict[str, dict] = {}
    for name, tensor in model.state_dict().items():
        leaf = names.leaf_of(name)
        value = tensor.numpy() if leaf.axes is None else tensor.numpy().transpose(leaf.axes)
        flat.setdefault(leaf.path, {})[leaf.index] = value
    stacked = {
        path: block[()] if () in block else np.stack([block[i] for i in sorted(block)])
        for path, block in flat.items()
    }
    return nested({path: jax.numpy.asarray(value) for path, value in stacked.items()})


def merged_torch(lora_params) -> LlamaForCausalLM:
    """The plain torch model with W + s·A·B as weights, computed by us."""
    model, state = torch_llama(), {}
    for path, leaf in leaves_by_path(lora_params).items():
        depth = names.stack_depth(path)
        value = np.asarray(_merged(leaf))
        for index in np.ndindex(*value.shape[:depth]):
            tensor = names.tensor_of(path, index)
            block = value[index]
            block = block if tensor.axes is None else block.transpose(np.argsort(tensor.axes))
            state[tensor.name] = torch.tensor(block)
    for path, leaf in leaves_by_path(lora_params).items():
        if isinstance(leaf, LoraArray) and leaf.bias is not None:
            _add_biases(model, state, path, leaf)
    model.load_state_dict(state, strict=True)
    return model


def _add_biases(model, state: dict, path: str, leaf: LoraArray) -> None:
    """Adds s·b to the bias of each layer's module, which is given one if it has none."""
    for index, name in modules_of(path, leaf):
        change = torch.tensor(np.asarray(leaf.scale[index] * leaf.bias[index]))
        module = model.get_submodule(name)
        if module.bias is None:
            module.bias = torch.nn.Parameter(torch.zeros_like(change))
        state[f"{name}.bias"] = state.get(f"{name}.bias", 0) + change


def _merged(leaf):
    if isinstance(leaf, SavedArray):
        return leaf.value
    if isinstance(leaf, RowsArray):
        table = np.moveaxis(np.array(leaf.w), leaf.axis, 0)
        table[list(leaf.ids)] = leaf.rows
        return np.moveaxis(table, 0, leaf.axis)
    if not isinstance(leaf, LoraArray):
        return leaf
    changed = leaf.w + delta(leaf)
    if leaf.m is None:
        return changed
    axis = leaf.roles.index("i")
    norm = np.sqrt(np.sum(np.square(changed), axis=axis, keepdims=True))
    # A layer without an adapter keeps its weight: m is the norm there.
    return changed * (np.expand_dims(leaf.m, axis) / norm)


TOKENS = torch.tensor([[1, 5, 9, 30, 2, 17], [4, 4, 39, 0, 11, 3]])


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(TOKENS).logits.numpy()


@pytest.fixture(params=CASES, ids=str)
def theirs(request, tmp_path):
    model = adapted(CASES[request.param])
    model.save_pretrained(str(tmp_path / "theirs"))
    return model, tmp_path / "theirs"


def test_read_what_peft_wrote_and_write_the_same_bytes(theirs, tmp_path):
    model, directory = theirs
    config, tensors = ours.read_peft(directory)
    assert tensors.keys() == load_file(directory / "adapter_model.safetensors").keys()
    tree = ours.fill(planted(our_params(torch_llama()), config), config, tensors)
    np.testing.assert_allclose(logits(merged_torch(tree)), logits(model), atol=1e-4, rtol=1e-4)
    ours.save_peft(tmp_path / "ours", tree, config)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert filecmp.cmp(directory / name, tmp_path / "ours" / name, shallow=False), name


def load_in_peft(directory) -> peft.PeftModel:
    """Loads in PEFT, which only warns about keys: here that is an error."""
    model = peft.PeftModel.from_pretrained(torch_llama(), str(directory))
    tensors = load_file(directory / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(model)
    assert loaded.keys() == tensors.keys()
    for name, value in loaded.items():
        np.testing.assert_array_equal(value.numpy(), tensors[name])
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_we_wrote(case, tmp_path):
    fields = peft.LoraConfig(task_type="CAUSAL_LM", **CASES[case]).to_dict()
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}
    config = LoraConfig.from_peft(fields)
    tree = randomized(planted(our_params(torch_llama()), config), config)
    ours.save_peft(tmp_path / "a", tree, config)
    model = load_in_peft(tmp_path / "a")
    np.testing.assert_allclose(logits(merged_torch(tree)), logits(model), atol=1e-4, rtol=1e-4)
    back_config, tensors = ours.read_peft(tmp_path / "a")
    assert dataclasses.replace(back_config, target_modules=("x",), extra={}) == (
        dataclasses.replace(config, target_modules=("x",), extra={})
    )
    back = ours.fill(planted(our_params(torch_llama()), config), config, tensors)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.parametrize(
    "case",
    ["plain", "all-linear-rslora", "regex", "patterns", "patterns-rslora", "layers", "embedding"],
)
def test_vllm_export_means_the_same_with_one_scale(case, tmp_path):
    model = adapted(CASES[case])
    model.save_pretrained(str(tmp_path / "theirs"))
    config, tensors = ours.read_peft(tmp_path / "theirs")
    tree = ours.fill(planted(our_params(torch_llama()), config), config, tensors)
    ours.save_peft(tmp_path / "vllm", tree, config, target="vllm")
    fields = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert fields["rank_pattern"] == fields["alpha_pattern"] == {}
    assert isinstance(fields["target_modules"], list)
    for key, value in load_file(tmp_path / "vllm" / "adapter_model.safetensors").items():
        assert key.endswith(("lora_A.weight", "lora_B.weight", "embedding_A", "embedding_B"))
        assert fields["r"] == value.shape[0 if "A" in key.rpartition("lora_")[2] else 1]
    again = peft.PeftModel.from_pretrained(torch_llama(), str(tmp_path / "vllm")).eval()
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-4, rtol=1e-4)
