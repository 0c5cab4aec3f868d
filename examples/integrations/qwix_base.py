"""qwix: post-training-quantized weights as a base, code by code, and adapters trained on them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax.traverse_util import flatten_dict, unflatten_dict

import lora_jax as lora

MODEL = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(4)])


def ours(tree):
    """qwix's parameters with a `QuantArray` for each `QArray`; neither is decoded."""
    flat = flatten_dict(nn.unbox(tree))
    for path, leaf in flat.items():
        if isinstance(q := getattr(leaf, "array", leaf), qwix.QArray):
            if q.zero_point is not None:
                raise ValueError(f"{path}: codes with a zero point are not read here")
            bits, codes = jnp.dtype(q.qtype).name, np.asarray(q.qvalue, np.int8)
            # Codes of four bits are 0 to 15 here, and 8 stands for zero.
            codes = codes if bits == "int8" else (codes + 8).astype(np.uint8)
            tile = q.scale_tile_shape[0]
            flat[path] = lora.quant.from_codes(codes, q.scale, format=bits, block_size=tile)
    return unflatten_dict(flat)


def main():
    x = jax.random.normal(jax.random.key(0), (96, 32))
    fn, params, _ = lora.linen.functional(MODEL, MODEL.init(jax.random.key(1), x))
    config, found = lora.LoraConfig(rank=4, target_modules=("layers_0", "layers_2")), {}

    @jax.jit
    @jax.value_and_grad
    def loss(trained, frozen):
        logits = lora.lorafy(fn)(lora.combine(trained, frozen), x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, x[:, :4].argmax(-1)).mean()

    for bits, tile in {"int8": None, "int4": 16}.items():
        rule = qwix.QuantizationRule(module_path=".*", weight_qtype=bits, tile_size=tile)
        model = qwix.quantize_model(MODEL, qwix.PtqProvider([rule]))
        shapes = jax.eval_shape(model.init, jax.random.key(1), x)["params"]
        base = ours(theirs := qwix.quantize_params(params, shapes))
        tree = lora.init(jax.random.key(2), lora.plan(config, fn, base, x), base)
        apart = lora.lorafy(fn)(tree, x) - model.apply({"params": theirs}, x)
        found[f"{bits}_difference"] = float(abs(apart).max())
        (trained, frozen), losses = lora.split(tree), []
        for _ in range(41):
            value, grads = loss(trained, frozen)
            losses.append(float(value))
            trained = jax.tree.map(lambda p, g: p - 0.05 * g, trained, grads)
        found[f"{bits}_losses"] = losses[:: len(losses) - 1]
    return found


if __name__ == "__main__":
    print(main())
