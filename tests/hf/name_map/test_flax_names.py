"""Parameter trees of transformers 4.x's Flax models: their names, and adapters with real `peft`.

`flax_trees.json` has the paths and shapes of tiny models of the real Flax classes, made with
transformers 4.56.2. The functions below compute on such trees as those classes do.
"""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax.array import leaves_by_path
from lora_jax.hf import FLAX, from_hugging_face, load_peft, save_peft, to_hugging_face
from lora_jax.hf.checkpoint.safetensors import open_directory
from lora_jax.hf.name_maps.rules import recognise
from lora_jax.models.saving import save_model

from tests.support.oracle import oracle
from tests.support.peft_llama import TOKENS, Base, jax_logits, torch_logits
from tests.support.peft_oracle import assert_same_files, close, peft_reads, peft_wrote
from tests.support.peft_trees import nested, noisy
from tests.support.places import GOLDEN
from tests.support.torch_models import saver

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PLACE = "hf/name_map/flax_names"

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
LABELS = dict(num_labels=3, auto="AutoModelForSequenceClassification")
CONFIGS = {
    "gpt2": dict(GPT2, model_type="gpt2"),
    "llama": dict(SIZES, model_type="llama", num_key_value_heads=2),
    "mistral": dict(SIZES, model_type="mistral", num_key_value_heads=2),
    "gemma": dict(SIZES, model_type="gemma", num_key_value_heads=2, head_dim=4),
    "bert": dict(SIZES, **LABELS, model_type="bert"),
    "bert-mlm": dict(SIZES, model_type="bert", auto="AutoModelForMaskedLM"),
    "roberta": dict(SIZES, **LABELS, model_type="roberta"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a case's torch model, anew at each call, and its directory."""
    make = saver(PLACE, CONFIGS, tmp_path_factory)

    def model(name: str) -> Base:
        saved = make(name)
        return Base(lambda: copy.deepcopy(saved.model()), saved.directory)

    return model


def shapes(name):
    return nested({p: jax.ShapeDtypeStruct(tuple(s), np.float32) for p, s in TREES[name].items()})


@pytest.mark.parametrize("name", TREES)
def test_the_real_trees_are_torchs_models(name, made, tmp_path):
    directory = made(name).directory
    params = from_hugging_face(shapes(name), open_directory(directory), FLAX)
    assert recognise(leaves_by_path(params)) is (
        FLAX if name in ("gpt2", "llama", "mistral", "gemma") else None
    )
    # Under the names and in the layout of the torch model's state.
    state = load_file(directory / "model.safetensors")
    for path, leaf in leaves_by_path(params).items():
        tensor = state[path.rpartition(".")[0] + (".bias" if path.endswith("bias") else ".weight")]
        # What transformers' own conversion does: Linear is turned, Conv1D is turned too.
        turned = path.endswith("kernel")
        np.testing.assert_array_equal(leaf, tensor.T if turned else tensor)
    ours = lora.models.load(directory)
    save_model(tmp_path / "again", ours, to_hugging_face(params, FLAX))
    again = lora.models.load(tmp_path / "again").params
    jax.tree.map(np.testing.assert_array_equal, again, ours.params)


# ---- adapters


@pytest.fixture(scope="module", params=["gpt2", "llama", "bert"])
def case(request, made):
    """A torch model, its Flax tree, and a function that computes on the tree as Flax did."""
    name = request.param
    there = made(name)
    params = from_hugging_face(shapes(name), open_directory(there.directory), FLAX)
    model = lora.models.load(there.directory, scan=False)
    return name, there.torch, params, lambda p, tokens: model.apply(_AS_OURS[name](p), tokens)


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


def test_flaxs_logits_are_torchs(case):
    name, there, params, fn = case
    want = oracle(f"{PLACE}/{name}.logits", lambda: torch_logits(there()))
    close(jax_logits(fn, params), want)


FIELDS = {
    "plain": {},
    "dora": {"use_dora": True},
    "saved": {"modules_to_save": True, "bias": "none"},
    "one-layer-rslora": {"layers_to_transform": [1], "use_rslora": True},
}


@pytest.mark.parametrize("kind", FIELDS)
def test_pefts_adapter_here_and_back(case, kind, tmp_path):
    name, there, params, fn = case
    fields = FIELDS[kind]
    if fields.get("modules_to_save"):
        fields = {**fields, "modules_to_save": SAVED[name]}
    # A small alpha: in a post-norm encoder large changes lose float32's last digits, in torch too.
    asked = {
        "task_type": TASKS.get(name, "CAUSAL_LM"),
        "r": 3,
        "lora_alpha": 1,
        "target_modules": TARGETS[name],
        **fields,
    }
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    want = peft_wrote(f"{PLACE}/{name}/{kind}", theirs, there, asked, torch_logits)
    lora_params, config = load_peft(theirs, fn, params, TOKENS)
    close(jax_logits(fn, lora_params), want)
    save_peft(ours, lora_params, config)
    assert_same_files(theirs, ours)


def test_our_adapter_in_peft_and_back(case, tmp_path):
    name, there, params, fn = case
    config = lora.LoraConfig(rank=2, target_modules=tuple(TARGETS[name]))
    if name == "bert":
        config = dataclasses.replace(config, modules_to_save=("classifier",))
    plan = lora.plan(config, fn, params, TOKENS)
    # A linen model's parameters may come with their collection's name.
    lora_params = noisy(lora.init(jax.random.key(0), plan, params))
    save_peft(tmp_path, {"params": lora_params}, config, task_type=TASKS.get(name, "CAUSAL_LM"))
    want = peft_reads(f"{PLACE}/{name}/ours", tmp_path, there, torch_logits)
    close(want, jax_logits(fn, lora_params))
    again, _ = load_peft(tmp_path, fn, params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, again, lora_params)


def test_our_own_trees_are_not_taken_for_flaxs(made):
    for name in ("gpt2", "llama"):
        directory = made(name).directory
        for scan in (True, False):
            params = lora.models.load(directory, scan=scan).params
            assert recognise(leaves_by_path(params)) is None
