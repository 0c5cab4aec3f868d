"""A model of your own: weights from a Hugging Face directory, and an adapter back to one.

The decoder below is Llama's, written in a manner of its own: names that are nobody's, heads apart
from their size, rotary planes side by side (Meta's layout) where Hugging Face has them in two
halves. A table of a few lines says how its leaves lie against Hugging Face's tensors; with it
`from_hugging_face`, `load_peft` and `save_peft` know what to do.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from lora_jax.hf.checkpoint.safetensors import open_directory
from lora_jax.models.saving import save_model

WIDTH, HEADS, SIZE, INNER, WORDS, LAYERS = 32, 4, 8, 64, 48, 2

# Path here, tensor there, and how it lies: theirs -> ours, as in einops. `{}` numbers the stacked
# layers, `l` is where they are here; p is the two planes' halves of a head.
LAYER = "model.layers.{}"
MAP = lora.hf.name_map(
    "my decoder",
    [
        ("words", "model.embed_tokens.weight"),
        ("layers.query", f"{LAYER}.self_attn.q_proj.weight", "(n p h) d -> l d n (h p)"),
        ("layers.key", f"{LAYER}.self_attn.k_proj.weight", "(n p h) d -> l d n (h p)"),
        ("layers.value", f"{LAYER}.self_attn.v_proj.weight", "(n h) d -> l d n h"),
        ("layers.out", f"{LAYER}.self_attn.o_proj.weight", "d (n h) -> l n h d"),
        ("layers.*", f"{LAYER}.mlp.*_proj.weight", "o i -> l i o"),
        ("norms.attention", f"{LAYER}.input_layernorm.weight"),
        ("norms.mlp", f"{LAYER}.post_attention_layernorm.weight"),
        ("norms.last", "model.norm.weight"),
        ("head", "lm_head.weight", "v d -> d v"),
    ],
    sizes={"p": 2},
)
SHAPES = {
    "words": (WORDS, WIDTH),
    "layers": {
        "query": (LAYERS, WIDTH, HEADS, SIZE),
        "key": (LAYERS, WIDTH, HEADS, SIZE),
        "value": (LAYERS, WIDTH, HEADS, SIZE),
        "out": (LAYERS, HEADS, SIZE, WIDTH),
        "gate": (LAYERS, WIDTH, INNER),
        "up": (LAYERS, WIDTH, INNER),
        "down": (LAYERS, INNER, WIDTH),
    },
    "norms": {"attention": (LAYERS, WIDTH), "mlp": (LAYERS, WIDTH), "last": (WIDTH,)},
    "head": (WIDTH, WORDS),
}


def decoder(params, tokens):
    """Logits (b, t, v) of tokens (b, t)."""
    norms = {"attention": params["norms"]["attention"], "mlp": params["norms"]["mlp"]}
    x, _ = jax.lax.scan(block, params["words"][tokens], (params["layers"], norms))
    return normed(x, params["norms"]["last"]) @ params["head"]


def block(x, layer):
    w, norms = layer
    h = normed(x, norms["attention"])
    query, key, value = (jnp.einsum("btd,dnh->btnh", h, w[n]) for n in ("query", "key", "value"))
    mixed = jax.nn.dot_product_attention(turned(query), turned(key), value, is_causal=True)
    x = x + jnp.einsum("btnh,nhd->btd", mixed, w["out"])
    h = normed(x, norms["mlp"])
    return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None


def normed(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def turned(x):
    """Rotary positions of planes (0, 1), (2, 3), ..."""
    angles = jnp.arange(x.shape[1])[:, None] / 10000.0 ** (jnp.arange(0, SIZE, 2) / SIZE)
    turn = jnp.exp(1j * angles)[None, :, None]
    planes = (x[..., ::2] + 1j * x[..., 1::2]) * turn
    return jnp.stack([planes.real, planes.imag], axis=-1).reshape(x.shape)


def checkpoint(directory: Path) -> lora.models.Model:
    """A Llama in Hugging Face's form; yours would come from the Hub."""
    config = lora.models.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=SIZE,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = lora.models.init(jax.random.key(0), config)
    save_model(directory, model, model.params)
    return model


def train(lora_params, tokens, steps: int = 30):
    """Learns to say the same words again."""
    trainable, frozen = lora.split(lora_params)
    tx = optax.adam(2e-2)

    def loss(trainable):
        logits = lora.lorafy(decoder)(lora.combine(trainable, frozen), tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(trainable, state):
        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = tx.init(trainable), []
    for _ in range(steps):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    return lora.combine(trainable, frozen), losses


def main():
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, WORDS)
    with tempfile.TemporaryDirectory() as folder:
        base = checkpoint(Path(folder) / "base")
        params = lora.hf.from_hugging_face(shapes, open_directory(Path(folder) / "base"), MAP)
        here, there = jax.jit(lora.lorafy(decoder)), jax.jit(lora.lorafy(base.apply))
        gap = float(jnp.abs(here(params, tokens) - there(base.params, tokens)).max())
        print(f"logits of both decoders on the same weights: at most {gap:.1e} apart")

        # Adapters under the model's own names, saved under Hugging Face's.
        config = lora.LoraConfig(rank=8, alpha=16, target_modules=("query", "value", "down"))
        plan = lora.plan(config, decoder, params, tokens)
        trained, losses = train(lora.init(jax.random.key(2), plan, params), tokens)
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps")
        adapter = Path(folder) / "adapter"
        lora.hf.save_peft(adapter, trained, config, name_map=MAP)

        # Anybody's Llama takes it: here this library's, elsewhere PEFT's.
        loaded, found = lora.hf.load_peft(adapter, base.apply, base.params, tokens)
        print(f"in the file: {', '.join(found.target_modules)}")
        apart = float(jnp.abs(there(loaded, tokens) - here(trained, tokens)).max())
        print(f"logits with the adapter: at most {apart:.1e} apart")

        # And back.
        again, _ = lora.hf.load_peft(adapter, decoder, params, tokens, name_map=MAP)
        same = all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(trained)))
    return {"gap": gap, "losses": losses, "apart": apart, "same": same}


if __name__ == "__main__":
    main()
