"""A Hugging Face directory of a model small enough to train in a moment, with a tokenizer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models

import lora_jax as lora
from lora_jax import models
from lora_jax.hf.checkpoint.names import stack_depth, tensor_of
from lora_jax.hf.tokenizer.tokenizer import Tokenizer as OurTokenizer
from lora_jax.models.saving import save_model
from lora_jax.paths import spell
from lora_jax.recipes.demo import task

from tests.support.random_arrays import moved

SPECIAL = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(size: int = 320) -> OurTokenizer:
    """A byte-level BPE that knows the demo's sentences."""
    backend = Tokenizer(token_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    examples, _ = task.make_examples(0, train=200, test=1)
    backend.train_from_iterator([e.text + task.canonical(e.booking) for e in examples], trainer)
    return OurTokenizer(
        backend=backend,
        special={"eos_token": SPECIAL[1], "pad_token": SPECIAL[1]},
        chat_template=TEMPLATE,
    )


# A decoder of two blocks with grouped heads, for token ids without a tokenizer.
SMALL = models.LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.3,
)


# As small as a decoder can be: for files, whose numbers are only compared.
SMALLEST = models.LlamaConfig(
    vocab_size=11,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=2,
    max_position_embeddings=8,
)


def as_hf(model: models.Model) -> dict[str, np.ndarray]:
    """The model's tensors under Hugging Face's names, each layer by itself."""
    out = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(model.params)[0]:
        path = spell(key_path)
        stacked = stack_depth(path) == 1
        for i, block in enumerate(leaf if stacked else [leaf]):
            name, axes = tensor_of(path, (i,) if stacked else ())
            block = np.asarray(block)
            out[name] = np.ascontiguousarray(block if axes is None else block.T)
    return out


def adapter(model: models.Model, seed: int, **config: Any) -> PyTree:
    """The model's parameters with a random adapter, as after training."""
    tokens = jax.ShapeDtypeStruct((2, 8), "int32")
    plan = lora.plan(lora.LoraConfig(**config), model.apply, model.params, tokens)
    return moved(lora.init(jax.random.key(seed), plan, model.params), seed, 0.3)


def tiny_model(*, tied: bool = True, **sizes: Any) -> models.Model:
    """A random decoder with that tokenizer; `sizes` are fields of its config."""
    tokenizer = tiny_tokenizer()
    config = replace(
        SMALL,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        eos_token_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
        pad_token_id=tokenizer.pad_id,
        initializer_range=0.2,
        **sizes,
    )
    fresh = models.init(jax.random.key(0), config)
    return models.Model(fresh.forward, fresh.params, tokenizer)


def write_tiny(directory: Path, *, tied: bool = True, **sizes: Any) -> Path:
    """Writes it as a Hugging Face directory."""
    model = tiny_model(tied=tied, **sizes)
    save_model(directory, model, model.params)
    return directory
