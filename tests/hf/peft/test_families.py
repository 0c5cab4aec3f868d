"""Adapters of every family of decoders between `lora_jax.models` and the real `peft`.

Each case combines what test_model.py has one by one for Llama: what differs here are the
families' modules (fused projections, Conv1D, scaled and tied tables).
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft

from tests.support.decoders import DELTA, LATENT
from tests.support.expert_families import EXPERTS
from tests.support.peft_gradients import check_gradients
from tests.support.peft_llama import TOKENS, jax_logits, torch_logits
from tests.support.peft_oracle import assert_same_files, close, peft_reads, peft_wrote, randomize
from tests.support.peft_trees import noisy
from tests.support.torch_models import ADAPTED_SIZES, saver

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PLACE = "hf/peft/families"

MLA = {name: x for name, x in LATENT.items() if "expert" not in name}
# Their experts' own adapters are in test_experts.py, and those of the three left out.
MIXTURES = {
    name: fields
    for name, fields in EXPERTS.items()
    if name not in ("granitemoe", "mellum", "ernie4_5_moe")
}
MIXTURES["dots1"] = dict(EXPERTS["dots1"], sliding_window=4, max_window_layers=1)
FAMILIES = {
    "mistral": dict(
        ADAPTED_SIZES, model_type="mistral", sliding_window=4, tie_word_embeddings=False
    ),
    "qwen2": dict(ADAPTED_SIZES, model_type="qwen2", tie_word_embeddings=False),
    "qwen3": dict(ADAPTED_SIZES, model_type="qwen3", head_dim=8),
    "gemma": dict(ADAPTED_SIZES, model_type="gemma", head_dim=8, attention_bias=True),
    "gemma2": dict(ADAPTED_SIZES, model_type="gemma2", head_dim=8, sliding_window=4),
    "gemma3": dict(ADAPTED_SIZES, model_type="gemma3_text", head_dim=8, sliding_window=4),
    "phi3": dict(ADAPTED_SIZES, model_type="phi3"),
    "olmo2": dict(ADAPTED_SIZES, model_type="olmo2"),
    "olmo3": dict(ADAPTED_SIZES, model_type="olmo3", sliding_window=4),
    "ministral": dict(
        ADAPTED_SIZES,
        model_type="ministral",
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "exaone4": dict(ADAPTED_SIZES, model_type="exaone4", sliding_window=4),
    "glm4": dict(ADAPTED_SIZES, model_type="glm4", head_dim=8),
    "glm": dict(ADAPTED_SIZES, model_type="glm", head_dim=8),
    "ernie4_5": dict(ADAPTED_SIZES, model_type="ernie4_5", head_dim=8),
    "helium": dict(ADAPTED_SIZES, model_type="helium", head_dim=4),
    "stablelm": dict(ADAPTED_SIZES, model_type="stablelm", partial_rotary_factor=0.5),
    "smollm3": dict(ADAPTED_SIZES, model_type="smollm3", no_rope_layers=[1, 0]),
    "granite": dict(ADAPTED_SIZES, model_type="granite", residual_multiplier=0.5),
    "seed_oss": dict(ADAPTED_SIZES, model_type="seed_oss", head_dim=8),
    "arcee": dict(ADAPTED_SIZES, model_type="arcee"),
    "cohere": dict(ADAPTED_SIZES, model_type="cohere", logit_scale=0.5),
    "cohere2": dict(ADAPTED_SIZES, model_type="cohere2", sliding_window=4),
    "starcoder2": dict(ADAPTED_SIZES, model_type="starcoder2", sliding_window=4),
    "gpt_neox": dict(
        {k: v for k, v in ADAPTED_SIZES.items() if k != "num_key_value_heads"},
        model_type="gpt_neox",
        rotary_pct=0.5,
    ),
    "phi": dict(ADAPTED_SIZES, model_type="phi"),
    # Its norms enlarge rounding, most where weights are large.
    "olmo": dict(ADAPTED_SIZES, model_type="olmo", clip_qkv=0.5, initializer_range=0.1),
    "granite_swa": dict(
        ADAPTED_SIZES, model_type="granite_swa", sliding_window=4, attention_multiplier=0.2
    ),
    "vaultgemma": dict(ADAPTED_SIZES, model_type="vaultgemma", head_dim=8, sliding_window=4),
    "apertus": dict(ADAPTED_SIZES, model_type="apertus", head_dim=8),
    "cwm": dict(ADAPTED_SIZES, model_type="cwm", head_dim=8, sliding_window=4),
    "hyperclovax": dict(ADAPTED_SIZES, model_type="hyperclovax", residual_multiplier=0.5),
    "internlm3": dict(ADAPTED_SIZES, model_type="internlm3", head_dim=8),
    "iquestcoder": dict(ADAPTED_SIZES, model_type="iquestcoder", head_dim=8),
    "jais2": dict(ADAPTED_SIZES, model_type="jais2"),
    "ministral3": dict(ADAPTED_SIZES, model_type="ministral3", head_dim=8),
    "nemotron": dict(ADAPTED_SIZES, model_type="nemotron", head_dim=8),
    "youtu": dict({**ADAPTED_SIZES, **MLA, "pad_token_id": None}, model_type="youtu"),
    "qwen3_5_text": dict({**ADAPTED_SIZES, **DELTA}, model_type="qwen3_5_text"),
    # Shared keys, and vectors of each token for each block.
    "gemma4": dict(
        ADAPTED_SIZES,
        model_type="gemma4_text",
        head_dim=4,
        global_head_dim=8,
        sliding_window=4,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=40,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
    ),
    # Mixed blocks; the experts' own adapters are in test_experts.py.
    "llama4": dict(
        ADAPTED_SIZES,
        model_type="llama4_text",
        head_dim=8,
        intermediate_size_mlp=20,
        num_local_experts=3,
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 0],
        attention_chunk_size=4,
    ),
    **MIXTURES,
    "gpt2": dict(model_type="gpt2", vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32),
}
# These differ from the others in what they compute, not in their modules.
LATER = (
    "olmo3",
    "ministral",
    "cohere",
    "exaone4",
    "glm4",
    "smollm3",
    "granite",
    "seed_oss",
    "arcee",
    "cohere2",
    "starcoder2",
    "phi",
    "gpt_neox",
    "glm",
    "ernie4_5",
    "helium",
    "stablelm",
    "qwen3_5_text",
    "gemma4",
    "llama4",
    "olmo",
    "granite_swa",
    "vaultgemma",
    "apertus",
    "cwm",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "ministral3",
    "nemotron",
    "youtu",
    *MIXTURES,
)
# What the modules are called: attention, the table, a norm, the head if it is no table.
LLAMA = ("q_proj", "down_proj", "embed_tokens", "post_attention_layernorm")
MODULES = {
    **dict.fromkeys(FAMILIES, LLAMA),
    **dict.fromkeys(MIXTURES, ("q_proj", "o_proj", "embed_tokens", "post_attention_layernorm")),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
        ("q_b_proj", "o_proj", "embed_tokens", "post_attention_layernorm"),
    ),
    "cohere": ("q_proj", "down_proj", "embed_tokens", "input_layernorm"),
    "cohere2": ("q_proj", "down_proj", "embed_tokens", "input_layernorm"),
    "glm": ("q_proj", "gate_up_proj", "embed_tokens", "post_attention_layernorm"),
    "glm4": ("q_proj", "gate_up_proj", "embed_tokens", "post_attention_layernorm"),
    "phi3": ("qkv_proj", "gate_up_proj", "embed_tokens", "post_attention_layernorm"),
    "qwen3_5_text": ("in_proj_qkv", "down_proj", "embed_tokens", "post_attention_layernorm"),
    "starcoder2": ("q_proj", "c_fc", "embed_tokens", "post_attention_layernorm"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h", "embed_in", "post_attention_layernorm"),
    "phi": ("q_proj", "fc2", "embed_tokens", "input_layernorm"),
    "llama4": ("q_proj", "shared_expert.down_proj", "embed_tokens", "post_attention_layernorm"),
    "gpt2": ("c_attn", "mlp.c_proj", "wte", "ln_2"),
    "olmo": ("q_proj", "down_proj", "embed_tokens", "mlp.up_proj"),  # its norms have no parameters
    "vaultgemma": ("q_proj", "down_proj", "embed_tokens", "pre_feedforward_layernorm"),
    "apertus": ("q_proj", "down_proj", "embed_tokens", "feedforward_layernorm"),
    "youtu": ("kv_b_proj", "down_proj", "embed_tokens", "post_attention_layernorm"),
}
# PEFT cannot run an adapter of Llama 4's router, which returns two results.
LEFT_OUT = {name: {"exclude_modules": ["router"]} for name in ("llama4", "llama4_text")}
# PEFT has no biases for experts, nor for what has the name of one of their layers.
WITHOUT_BIASES = {
    "llama4": ("router", r"gate_up_proj", r"experts.down_proj"),
    **dict.fromkeys(MIXTURES, r".*\.(mlp|feed_forward|experts|router)\..*"),
    **dict.fromkeys(("qwen2_moe", "qwen3_5_moe_text"), r".*\.(experts\..*|gate)"),
}


class Family(NamedTuple):
    """A family's random model: in torch, anew at each call, and ours with the same weights."""

    name: str
    torch: Callable
    ours: lora.models.Model

    @property
    def tied(self) -> bool:
        return self.ours.config.tie_word_embeddings


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    saved = saver(PLACE, FAMILIES, tmp_path_factory)

    def make(name: str) -> Family:
        there, directory = saved(name)
        return Family(name, lambda: copy.deepcopy(there()), lora.models.load(directory))

    return make


@pytest.fixture(
    scope="module",
    params=[pytest.param(f, marks=pytest.mark.slow) if f in LATER else f for f in FAMILIES],
)
def family(request, families) -> Family:
    return families(request.param)


def everything(family: Family) -> dict:
    """All linear layers, rsLoRA, patterns, every bias, and the head where it is its own."""
    fields = {"r": 3, "target_modules": "all-linear", "use_rslora": True, "bias": "all"}
    fields |= {"rank_pattern": {MODULES[family.name][0]: 2}}
    fields |= {"alpha_pattern": {MODULES[family.name][1]: 5}, **LEFT_OUT.get(family.name, {})}
    return fields if family.tied else {**fields, "modules_to_save": ["lm_head"]}


def one_layer(family: Family) -> dict:
    """DoRA in one layer, whose biases train, with a norm of both."""
    attention, mlp, _, norm = MODULES[family.name]
    return {
        "r": 2,
        "target_modules": [attention, mlp],
        "use_dora": True,
        "layers_to_transform": 1,
        "bias": "lora_only",
        "modules_to_save": [norm],
    }


def table(family: Family) -> dict:
    """The embedding, with the head that is tied to it: PEFT knows `wte` by its head only."""
    attention, _, table, _ = MODULES[family.name]
    name = "lm_head" if family.name == "gpt2" else table
    targets = {"r": 2, "target_modules": [attention, name]}
    return {**targets, "ensure_weight_tying": True} if family.tied else targets


def our_logits(base, params) -> np.ndarray:
    return jax_logits(base.apply, params, strict=True)


@pytest.mark.parametrize("fields", [everything, one_layer, table])
def test_pefts_adapter_here_and_back(fields, family, tmp_path):
    name, there, base = family
    case = f"{PLACE}/{name}/{fields.__name__}"
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    asked = {"task_type": "CAUSAL_LM", **fields(family)}
    # Routers are steep: with large factors float32 leaves three digits.
    noise = partial(randomize, scale=0.3) if name in MIXTURES else randomize
    want = peft_wrote(case, theirs, there, asked, torch_logits, randomized=noise)
    kind = base.config.model_type
    params, config = load_peft(theirs, base.apply, base.params, TOKENS, model_type=kind)
    close(our_logits(base, params), want)
    save_peft(ours, params, config, model_type=kind)
    if (name, fields) == ("gpt2", table):
        # PEFT leaves the head out of what it writes, and would not tie it again; ours it ties.
        want = peft_reads(case, ours, there, torch_logits, same_state=False)
        close(our_logits(base, params), want)
        return
    if name in MIXTURES:
        # For some PEFT writes a list of no parameters.
        empty, null = ('"target_parameters": ' + x for x in ("[]", "null"))
        config = theirs / "adapter_config.json"
        config.write_text(config.read_text().replace(empty, null))
    assert_same_files(theirs, ours)


def test_our_adapter_in_peft_and_back(family, tmp_path):
    """All linear layers, patterns, biases of adapters and trained tokens."""
    name, there, base = family
    attention, mlp, _, norm = MODULES[name]
    config = lora.LoraConfig(
        rank=3,
        use_rslora=True,
        lora_bias=True,
        rank_pattern={attention: 2},
        alpha_pattern={mlp: 5},
        modules_to_save=(f"1.{norm}",),
        trainable_token_indices=(30, 2, 9),
        exclude_modules=WITHOUT_BIASES.get(name, ()),
    )
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    params = noisy(lora.init(jax.random.key(0), plan, base.params))
    kind = base.config.model_type
    save_peft(tmp_path / "a", params, config, model_type=kind)
    want = peft_reads(f"{PLACE}/{name}/ours", tmp_path / "a", there, torch_logits)
    close(want, our_logits(base, params))
    again, _ = load_peft(tmp_path / "a", base.apply, base.params, TOKENS, model_type=kind)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.slow
def test_slopes_are_pefts(family, tmp_path):
    name, there, base = family
    fields = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": "all-linear"}
    fields |= LEFT_OUT.get(name, {})
    check_gradients(f"{PLACE}/{name}/slopes", tmp_path, there, base, fields)


@pytest.mark.parametrize("family", ["gpt2", "gemma"], indirect=True)
@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_our_tied_table_is_tied_in_peft(field, family, tmp_path):
    name, there, base = family
    table = MODULES[name][2]
    config = lora.LoraConfig(**{"rank": 2, "target_modules": (MODULES[name][0],), field: (table,)})
    plan = lora.plan(config, base.apply, base.params, TOKENS)
    trainable, frozen = lora.split(lora.init(jax.random.key(0), plan, base.params))
    params = lora.combine(jax.tree.map(lambda x: x + 0.1, trainable), frozen)
    save_peft(tmp_path / "a", params, config)
    # PEFT leaves GPT-2's adapted head, which is the table, out of what it writes.
    same = (name, field) != ("gpt2", "target_modules")
    asked = f"{PLACE}/{name}/{field}"
    want = peft_reads(asked, tmp_path / "a", there, torch_logits, same_state=same)
    close(want, our_logits(base, params))
    again, _ = load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_an_embedding_that_peft_does_not_tie_is_refused(families, tmp_path):
    _, there, base = families("gpt2")
    fields = {"r": 2, "target_modules": ["wte"], "ensure_weight_tying": True}
    peft_wrote(f"{PLACE}/gpt2/untied", tmp_path / "a", there, fields, torch_logits)
    with pytest.raises(ValueError, match="`transformer.wte.embedding` as an embedding only"):
        load_peft(tmp_path / "a", base.apply, base.params, TOKENS)


def test_an_adapter_of_a_tied_head_alone_is_refused(families, tmp_path):
    _, there, base = families("gpt2")
    fields = {"r": 2, "target_modules": ["lm_head"]}
    peft_wrote(f"{PLACE}/gpt2/head", tmp_path / "a", there, fields, torch_logits)
    with pytest.raises(ValueError, match="the output head only .* ensure_weight_tying=True, or"):
        load_peft(tmp_path / "a", base.apply, base.params, TOKENS)
