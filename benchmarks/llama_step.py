"""A training step of a Llama-shaped model from shapes alone: base in bfloat16 or quantized.

Shared by `memory.py`, which compiles it for a device that is not there, and by `gpu_train.py`,
which runs it.
"""

import jax
import jax.numpy as jnp
import optax

import lora_jax as lora
from lora_jax import models, train
from lora_jax.train.evaluate import frozen_leaves

LINEAR = r"model\.layers\..*kernel"
SIZES = {
    "tiny": dict(hidden=128, inner=256, layers=2, heads=4, kv=2, vocab=512),
    "3B": dict(hidden=3072, inner=8192, layers=28, heads=24, kv=8, vocab=128256, tied=True),
    "7B": dict(hidden=4096, inner=11008, layers=32, heads=32, kv=32, vocab=32000),
    "8B": dict(hidden=4096, inner=14336, layers=32, heads=32, kv=8, vocab=128256),
    "13B": dict(hidden=5120, inner=13824, layers=40, heads=40, kv=40, vocab=32000),
    "70B": dict(hidden=8192, inner=28672, layers=80, heads=64, kv=8, vocab=32000),
}


def forward_of(
    size: str, *, length: int, layers: int | None = None, remat: bool | str = True
) -> models.Forward:
    """A Llama of a known size, in bfloat16, its blocks scanned and, by default, rematerialized."""
    s = SIZES[size]
    config = models.LlamaConfig.from_hf(
        {
            "model_type": "llama", "hidden_size": s["hidden"], "intermediate_size": s["inner"],
            "num_hidden_layers": layers or s["layers"], "num_attention_heads": s["heads"],
            "num_key_value_heads": s["kv"], "vocab_size": s["vocab"],
            "max_position_embeddings": max(length, 256), "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": s.get("tied", False), "hidden_act": "silu",
        }
    )  # fmt: skip
    return models.Forward(
        config=config, dtype="bfloat16", param_dtype="bfloat16", scan=True, remat=remat
    )


def loss_of(forward: models.Forward, frozen: frozenset[int] = frozenset()):
    """Mean next-token cross entropy, `(params, tokens) -> ()`, by the trainer's own loss."""
    losses = train.losses_of(forward, frozen=frozen)

    def loss(params, tokens):
        at = jnp.arange(tokens.size)
        targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))).reshape(-1)
        # The last token of a row has no next one.
        learned = (at + 1) % tokens.shape[1] != 0
        each = losses(params, tokens, at, targets)
        return jnp.sum(each * learned) / (tokens.size - tokens.shape[0])

    return loss


def base_params(params, form: str | None, *, backend: str):
    """The base, its layers' kernels quantized."""
    if form is None:
        return params
    return lora.quantize(params, LINEAR, format=form, backend=backend)


def adapted(forward: models.Forward, params, *, rank: int, tokens, targets="all-linear"):
    """LoRA parameters, by default of every linear layer inside the blocks; works on shapes."""
    config = lora.LoraConfig(rank=rank, alpha=16, target_modules=targets)
    plan = lora.plan(config, forward.apply, params, tokens)
    return lora.init(jax.random.key(0), plan, params)


def optimizer() -> optax.GradientTransformation:
    return optax.adamw(2e-4)


def lora_step(forward: models.Forward):
    """`step(trainable, opt_state, frozen, tokens) -> (trainable, opt_state, loss)`."""
    tx = optimizer()

    def step(trainable, state, frozen, tokens):
        still = frozen_leaves(trainable, frozen)
        loss = lora.lorafy(loss_of(forward, still), reverse_only=True)
        value, grads = jax.value_and_grad(
            lambda t: loss(lora.combine(t, frozen), tokens)
        )(trainable)  # fmt: skip
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return step


def lora_shapes(forward: models.Forward, form: str | None, *, rank: int, batch: int, length: int,
                backend: str):  # fmt: skip
    """The step's arguments as shapes; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    base = jax.eval_shape(lambda p: base_params(p, form, backend=backend), forward.shapes())
    params = jax.eval_shape(lambda p: adapted(forward, p, rank=rank, tokens=tokens), base)
    trainable, frozen = lora.split(params)
    return trainable, jax.eval_shape(optimizer().init, trainable), frozen, tokens
