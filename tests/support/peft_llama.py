"""Adapters of PEFT's that the tests share, and the tiny Llama under them."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import lora_jax as lora

from tests.support.torch_models import saver

TOKENS = np.array([[1, 5, 9, 30, 2, 17], [4, 4, 39, 0, 11, 3]], np.int32)
FIELDS = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    initializer_range=0.3,
)
BASES = {
    "llama": dict(FIELDS, tie_word_embeddings=False),
    "tied": dict(FIELDS, tie_word_embeddings=True),
    "larger": dict(
        FIELDS, hidden_size=32, num_hidden_layers=4, attention_bias=False, tie_word_embeddings=False
    ),
}
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


class Base(NamedTuple):
    """A random model: in torch, anew at each call, and its directory."""

    torch: Callable
    directory: Path


def bases(tmp_path_factory) -> Callable[[str], Base]:
    """Makes the models of `BASES`."""
    make = saver("hf/peft/bases", BASES, tmp_path_factory)

    def base(name: str) -> Base:
        saved = make(name)
        return Base(lambda: copy.deepcopy(saved.model()), saved.directory)

    return base


class Loaded(NamedTuple):
    """A model of ours: its function, and its parameters."""

    apply: Callable
    params: dict


def loaded(directory: Path, **options) -> Loaded:
    """Loads a model whose function is traced once for all plans and adapters of the same shapes."""
    model = lora.models.load(directory, **options)
    return Loaded(jax.jit(model.apply), model.params)


def torch_logits(model) -> np.ndarray:
    """A torch model's logits of `TOKENS`."""
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(TOKENS).long()).logits.numpy()


def jax_logits(apply: Callable, params, *, strict: bool = False) -> np.ndarray:
    """Our logits of `TOKENS`."""
    return np.asarray(_quick(apply, strict)(params, TOKENS))


@functools.lru_cache(maxsize=8)
def _quick(apply: Callable, strict: bool) -> Callable:
    # Most cases compile anew and run once: little optimization halves the time.
    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(lora.lorafy(apply, strict=strict), compiler_options=quick)
