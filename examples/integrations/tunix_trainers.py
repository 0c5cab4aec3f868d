"""google-tunix: an adapted model in PeftTrainer and DPOTrainer, where the reference is its base."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft.dpo import dpo_trainer as dpo
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

import lora_jax as lora

CONFIG = lora.LoraConfig(rank=4, target_modules=("q_proj", "v_proj"))
SIZE = dict(num_layers=2, vocab_size=64, embed_dim=32, hidden_dim=64, num_heads=4, head_dim=8)
SIZE |= dict(num_kv_heads=2, rope_theta=10_000, norm_eps=1e-5)
TOKENS, MASK = np.arange(32).reshape(4, 8) % 7 + 1, np.ones((4, 8), bool)
CAUSAL = MASK[:, None] & np.tri(8, dtype=bool)
INPUTS = dict(positions=jnp.tile(jnp.arange(8), (4, 1)), attention_mask=CAUSAL)


def adapted(base):
    return lora.nnx.adapt(base, CONFIG, TOKENS, cache=None, key=jax.random.key(0), **INPUTS)


def logits(model):
    return model(TOKENS, cache=None, **INPUTS)[0]


def trainer(model, folder):
    config = TrainingConfig(eval_every_n_steps=99, max_steps=30, checkpoint_root_directory=folder)
    made = PeftTrainer(model, optax.adam(1e-2), config)
    return made.with_gen_model_input_fn(lambda x: {**vars(x), **INPUTS})


def main():
    base = Llama3(ModelConfig(**SIZE), rngs=nnx.Rngs(0))
    model, again, policy = adapted(base), adapted(base), adapted(base)
    with tempfile.TemporaryDirectory() as folder:
        first = trainer(model, folder)
        first.train([TrainingInput(input_tokens=TOKENS, input_mask=MASK)] * 30)
        trainer(again, folder)  # restores tunix's checkpoint of the adapters
    # The policy's own base: the two share their variables, so there is no second copy of it.
    config = dpo.DPOTrainingConfig(eval_every_n_steps=99, max_steps=30)
    pairs = dpo.TrainingInput(TOKENS, MASK, TOKENS, MASK, TOKENS + 9, MASK)
    dpo.DPOTrainer(policy, policy.base, optax.adam(1e-2), config).train([pairs] * 30)
    moments, before = nnx.state(first.optimizer, nnx.optimizer.OptState), logits(base)
    return {
        "optimizer_numbers": sum(x.size for x in jax.tree.leaves(moments)),
        "moved": float(abs(logits(model) - before).max()),
        "policy_moved": float(abs(logits(policy) - before).max()),
        "checkpoint_difference": float(abs(logits(again) - logits(model)).max()),
        "base_difference": float(abs(logits(policy.base) - before).max()),
    }


if __name__ == "__main__":
    print(main())
