"""llama.cpp (xllamacpp): our GGUF adapter loaded over SmolLM2, its answers beside our decoder's."""

import operator
import tempfile

import jax
import jax.numpy as jnp
import xllamacpp

import lora_jax as lora
from lora_jax import models, train

COLOURS = {"sky": "blue", "grass": "green", "sun": "yellow", "blood": "red", "coal": "black"}
PROMPTS = [f"The colour of {name} is" for name in COLOURS]


def answers(model, adapter):
    """llama.cpp's greedy answers."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = model, 256, 1, False
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server = xllamacpp.Server(params)
    found = []
    for prompt in PROMPTS:
        request = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "cache_prompt": False}
        found.append(server.handle_completions(request)["choices"][0]["text"])
    return found


def main():
    path = models.find_smollm2()
    model = models.load(path)
    rows = zip(PROMPTS, COLOURS.values(), strict=True)
    records = [train.record_of({"prompt": p, "completion": f" quite {c} today."}) for p, c in rows]
    data = train.examples(records, model.tokenizer, max_length=64)
    config = lora.LoraConfig(rank=4, target_modules=("q_proj", "v_proj"))
    plan = lora.plan(config, model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    tree = lora.init(jax.random.key(0), plan, model.params)
    settings = train.TrainConfig(steps=30, batch_size=5, learning_rate=5e-3, progress=False)
    tree = train.fit(model, tree, data, None, settings).lora_params
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/adapter.gguf"
        lora.hf.save_gguf_lora(file, tree, config, base=lora.hf.base_of(model.config))
        theirs = [answers(str(path), adapter) for adapter in (None, file)]
    tokens = [model.tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    options = dict(max_new_tokens=8, stop_tokens=model.tokenizer.stop_ids)
    ours = [models.generate(model, params, tokens, **options) for params in (model.params, tree)]
    ours = [[model.tokenizer.decode(row) for row in rows] for rows in ours]
    equal = [sum(map(operator.eq, *both)) for both in zip(ours, theirs, strict=True)]
    return {
        "prompts": len(PROMPTS),
        "equal_base": equal[0],
        "equal_adapted": equal[1],
        "answers": theirs[1],
    }


if __name__ == "__main__":
    print(main())
