"""A language model from data to a PEFT directory, each part by itself.

The model is a tiny random one, so that this takes seconds; `models.load("DIRECTORY")`, a hub id
or a .gguf file in its place is all that a real one needs (`lora-jax demo` does it with
SmolLM2-135M).
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax import checkpoint, hf, models, train


class Bytes(NamedTuple):
    """A tokenizer of bytes: all that training asks of one."""

    eos_id: int = 256
    pad_id: int = 257
    stop_ids: tuple[int, ...] = (256,)

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())

    def encode_prompt(self, text):
        return self.encode(text)

    def decode(self, tokens):
        return bytes(t for t in tokens if t < 256).decode(errors="replace")


def load_model():
    """A two-layer decoder of the Llama family with random weights."""
    config = models.LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    fresh = models.init(jax.random.key(0), config)
    return models.Model(fresh.forward, fresh.params, Bytes())


def write_data(path):
    """JSON lines with a prompt and a completion; only the completion is learned."""
    pairs = [("red", "rouge"), ("green", "vert"), ("blue", "bleu"), ("black", "noir")]
    lines = [{"prompt": f"{english}: ", "completion": french} for english, french in pairs]
    path.write_text("\n".join(map(json.dumps, lines)))


def main(folder=None):
    folder = Path(folder or tempfile.mkdtemp())
    write_data(folder / "colours.jsonl")
    model = load_model()

    # The names are Hugging Face's, so targets mean what they mean in PEFT.
    config = lora.LoraConfig(rank=8, alpha=32, target_modules="all-linear", dropout=0.0)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    plan = lora.plan(config, model.apply, model.params, tokens)
    start = lora.init(jax.random.key(1), plan, model.params)
    print(lora.format_trainable_parameters(start))

    data = train.load_examples(folder / "colours.jsonl", model.tokenizer, max_length=32)
    job = train.TrainConfig(
        output_dir=folder / "run", steps=60, batch_size=4, learning_rate=1e-2, buckets=1,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    result = train.fit(model, start, data, None, job, lora_config=config)
    losses = [r["loss"] for r in result.history if r["kind"] == "train"]
    print(f"loss: {losses[0]:.2f} -> {losses[-1]:.3f}")
    if result.memory is not None:  # as after a resume with no step left
        print(train.format_memory(result.memory))

    prompts = [model.tokenizer.encode(text) for text in ("red: ", "blue: ")]
    answers = models.generate(
        model, result.lora_params, prompts, max_new_tokens=8, stop_tokens=[model.tokenizer.eos_id]
    )
    said = [model.tokenizer.decode(answer) for answer in answers]
    print("red, blue:", ", ".join(said))

    # For the Hugging Face world, and back.
    hf.save_peft(folder / "adapter", result.lora_params, config, base_model_name="tiny")
    again, _ = hf.load_peft(folder / "adapter", model.apply, model.params, tokens)
    # From the run's newest checkpoint: adapters only, bound to the base by its fingerprint.
    restored, _ = checkpoint.restore(folder / "run", model.apply, model.params, tokens)
    same = all(
        np.array_equal(a, b) and np.array_equal(a, c)
        for a, b, c in zip(
            *map(jax.tree.leaves, (result.lora_params, again, restored)), strict=True
        )
    )
    print("read back from PEFT's and from Orbax's files, bit for bit the same:", same)
    return {"losses": losses, "said": said, "same": same}


if __name__ == "__main__":
    main()
