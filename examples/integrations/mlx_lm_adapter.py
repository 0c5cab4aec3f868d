"""MLX (mlx-lm): an adapter of ours in its model, and one of its own in ours."""

import json
import tempfile
from pathlib import Path

import jax
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model

import lora_jax as lora
from lora_jax import models
from lora_jax.recipes import convert, finetune

FIELDS = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, vocab_size=96, max_position_embeddings=64, head_dim=16,
              initializer_range=0.2)  # fmt: skip
TOKENS = np.arange(20).reshape(2, 10) * 3 % 95


def theirs(folder, adapter=None):
    model, _ = load_model(Path(folder))
    return load_adapters(model, adapter) if adapter else model


def difference(model, params, mlx_model):
    y = np.asarray(mlx_model(mx.array(TOKENS)).astype(mx.float32))
    return float(abs(np.asarray(lora.lorafy(model.apply)(params, TOKENS)) - y).max())


def main():
    model = models.init(jax.random.key(0), models.LlamaConfig(**FIELDS))
    some = dict(target_modules=("q_proj", "o_proj", "down_proj"), layers_to_transform=(0, 2))
    config = lora.LoraConfig(rank=4, alpha=12, init="random", rank_pattern={"o_proj": 2}, **some)
    tree = finetune.init_adapter(model, config, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        base, ours, other = (f"{folder}/{name}" for name in ("base", "ours", "other"))
        models.save_model(base, model, model.params)
        convert.save_adapter(model, tree, config, ours, to="mlx")
        found = {"difference": difference(model, tree, theirs(base, ours))}
        adapted, settings = theirs(base), {"rank": 3, "scale": 5.0, "dropout": 0.0}
        adapted.freeze()
        linear_to_lora_layers(adapted, 2, settings)
        weights = dict(tree_flatten(adapted.trainable_parameters()))
        weights = {name: mx.random.normal(x.shape) * 0.1 for name, x in weights.items()}
        adapted.load_weights(list(weights.items()), strict=False)
        (path := Path(other)).mkdir()
        mx.save_safetensors(f"{other}/adapters.safetensors", weights)
        text = json.dumps({"num_layers": 2, "lora_parameters": settings})
        (path / "adapter_config.json").write_text(text)
        read, _ = finetune.load_adapter(model, other)
        found["read_difference"] = difference(model, read, adapted)
        return found | {"moved": difference(model, model.params, theirs(base, ours))}


if __name__ == "__main__":
    print(main())
