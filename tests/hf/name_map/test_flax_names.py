"""Parameter trees of transformers 4.x's Flax models: their names, and adapters with real `peft`.

`flax_trees.json` has the paths and shapes of tiny models of the real Flax classes, made with
transformers 4.56.2. The functions below compute on such trees as those classes do.
"""

import dataclasses
import filecmp
import json

import jax
import numpy as np
import peft
import pytest
import transformers

import lora_jax as lora
from lora_jax.array import leaves_by_path
from lora_jax.hf import FLAX, from_hugging_face, load_peft, save_peft, to_hugging_face
from lora_jax.hf.checkpoint.safetensors import open_directory
from lora_jax.hf.name_maps.rules import recognise
from lora_jax.models.saving import save_model

from tests.hf.peft.test_model import close, noisy, randomize
from tests.support.peft_trees import nested
from tests.support.places import GOLDEN

pytestmark = [pytest.mark.once, pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

TREES = json.loads((GOLDEN / "flax_trees.json").read_text())
SIZES = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=24,
    initializer_range=0.3,
)
GPT2 = dict(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=24, initializer_range=0.3)
CONFIGS = {
    "gpt2": ("gpt2", GPT2),
    "llama": ("llama", dict(SIZES, num_key_value_heads=2)),
    "mistral": ("mistral", dict(SIZES, num_key_value_heads=2)),
    "gemma": ("gemma", dict(SIZES, num_key_value_heads=2, head_dim=4)),
    "bert": ("bert", dict(SIZES, num_labels=3)),
    "bert-mlm": ("bert", SIZES),
    "roberta": ("roberta", dict(SIZES, num_labels=3)),
}
TOKENS = np.array([[1, 5, 9, 30, 2, 17], [4, 4, 39, 0, 11, 3]], np.int32)


def torch_model(name):
    import torch

    torch.manual_seed(0)
    kind, fields = CONFIGS[name]
    classes = {
        "bert": transformers.AutoModelForSequenceClassification,
        "roberta": transformers.AutoModelForSequenceClassification,
        "bert-mlm": transformers.AutoModelForMaskedLM,
    }
    config = transformers.AutoConfig.for_model(kind, **fields)
    model = classes.get(name, transformers.AutoModelForCausalLM).from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


def shapes(name):
    return nested({p: jax.ShapeDtypeStruct(tuple(s), np.float32) for p, s in TREES[name].items()})


@pytest.mark.parametrize("name", TREES)
def test_the_real_trees_are_torchs_models(name, tmp_path):
    model = torch_model(name)
    model.save_pretrained(tmp_path)
    params = from_hugging_face(shapes(name), open_directory(tmp_path), FLAX)
    assert recognise(leaves_by_path(params)) is (
        FLAX if name in ("gpt2", "llama", "mistral", "gemma") else None
    )
    state = model.state_dict()
    for path, leaf in leaves_by_path(params).items():
        tensor = state[path.rpartition(".")[0] + (".bias" if path.endswith("bias") else ".weight")]
        # What transformers' own conversion does: Linear is turned, Conv1D is turned too.
        turned = path.endswith("kernel")
        np.testing.assert_array_equal(leaf, tensor.numpy().T if turned else tensor.numpy())
    ours = lora.models.load(tmp_path)
    save_model(tmp_path / "again", ours, to_hugging_face(params, FLAX))
    again = lora.models.load(tmp_path / "again").params
    jax.tree.map(np.testing.assert_array_equal, again, ours.params)


# ---- adapters


@pytest.fixture(scope="module", params=["gpt2", "llama", "bert"])
def case(request, tmp_path_factory):
    """A torch model, its Flax tree, and a function that computes on the tree as Flax did."""
    name = request.param
    directory = tmp_path_factory.mktemp("base")
    torch_model(name).save_pretrained(directory)
    params = from_hugging_face(shapes(name), open_directory(directory), FLAX)
    model = lora.models.load(directory, scan=False)
    return name, params, lambda p, tokens: model.apply(_AS_OURS[name](p), tokens)


def _scales(tree):
    """Norms' `weight` under the name that our modules have."""
    if not isinstance(tree, dict):
        return tree
    norm = set(tree) == {"weight"}
    return {"scale" if norm else key: _scales(value) for key, value in tree.items()}


def _turned(tree, inside=""):
    """FlaxConv1D multiplies by its kernel's transpose."""
    if not isinstance(tree, dict):
        return tree
    conv = inside in ("c_attn", "c_proj", "c_fc")
    return {
        key: value.T if conv and key == "kernel" else _turned(value, key)
        for key, value in tree.items()
    }


_AS_OURS = {"gpt2": _turned, "llama": _scales, "bert": lambda tree: tree}
TARGETS = {
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "down_proj"],
    "bert": ["query", "output.dense"],
}
SAVED = {
    "gpt2": ["ln_f", "c_fc"],
    "llama": ["lm_head", "input_layernorm"],
    "bert": ["classifier", "LayerNorm"],
}
TASKS = {"bert": "SEQ_CLS"}


def logits(fn, params) -> np.ndarray:
    quick = {"xla_backend_optimization_level": 0}
    return np.asarray(jax.jit(lora.lorafy(fn), compiler_options=quick)(params, TOKENS))


def torch_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(TOKENS).long()).logits.numpy()


def test_flaxs_logits_are_torchs(case):
    name, params, fn = case
    close(logits(fn, params), torch_logits(torch_model(name)))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": True, "bias": "none"},
        {"layers_to_transform": [1], "use_rslora": True},
    ],
    ids=str,
)
def test_pefts_adapter_here_and_back(case, fields, tmp_path):
    name, params, fn = case
    if fields.get("modules_to_save"):
        fields = {**fields, "modules_to_save": SAVED[name]}
    # A small alpha: in a post-norm encoder large changes lose float32's last digits, in torch too.
    config = peft.LoraConfig(
        task_type=TASKS.get(name, "CAUSAL_LM"),
        r=3,
        lora_alpha=1,
        target_modules=TARGETS[name],
        **fields,
    )
    model = peft.get_peft_model(torch_model(name), config)
    randomize(model)
    model.save_pretrained(str(tmp_path / "theirs"))
    lora_params, config = load_peft(tmp_path / "theirs", fn, params, TOKENS)
    close(logits(fn, lora_params), torch_logits(model))
    save_peft(tmp_path / "ours", lora_params, config)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert filecmp.cmp(tmp_path / "theirs" / file, tmp_path / "ours" / file, shallow=False)


def test_our_adapter_in_peft_and_back(case, tmp_path):
    name, params, fn = case
    config = lora.LoraConfig(rank=2, target_modules=tuple(TARGETS[name]))
    if name == "bert":
        config = dataclasses.replace(config, modules_to_save=("classifier",))
    plan = lora.plan(config, fn, params, TOKENS)
    # A linen model's parameters may come with their collection's name.
    lora_params = noisy(lora.init(jax.random.key(0), plan, params))
    save_peft(tmp_path, {"params": lora_params}, config, task_type=TASKS.get(name, "CAUSAL_LM"))
    model = peft.PeftModel.from_pretrained(torch_model(name), str(tmp_path))
    close(torch_logits(model), logits(fn, lora_params))
    again, _ = load_peft(tmp_path, fn, params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, again, lora_params)


def test_our_own_trees_are_not_taken_for_flaxs(tmp_path):
    for name in ("gpt2", "llama"):
        torch_model(name).save_pretrained(tmp_path / name)
        for scan in (True, False):
            assert (
                recognise(leaves_by_path(lora.models.load(tmp_path / name, scan=scan).params))
                is None
            )
