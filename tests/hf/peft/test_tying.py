"""Which table is the output head is read off the model, not off names or sizes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.array import leaves_by_path
from lora_jax.hf.peft.directory import CONFIG_FILE, TENSOR_FILE
from lora_jax.hf.peft.save import with_task

pytestmark = pytest.mark.once

# A vocabulary of characters is smaller than the context.
V, T, D = 11, 24, 8
TOKENS = np.array([[1, 5, 9, 2]])


def params(**heads) -> dict:
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def table(*shape):
        return jax.random.normal(next(keys), shape)

    return {
        "transformer": {
            "wte": {"embedding": table(V, D)},
            "wpe": {"embedding": table(T, D)},
            "mix": {"kernel": table(D, D)},
        },
        **{name: {"kernel": table(D, V)} for name in heads},
    }


def decoder(p, tokens):
    inner = p["transformer"]
    x = inner["wte"]["embedding"][tokens] + inner["wpe"]["embedding"][jnp.arange(tokens.shape[1])]
    x = x + jnp.tanh(x @ inner["mix"]["kernel"])
    if "unembed" in p:
        return x @ p["unembed"]["kernel"]
    return x @ inner["wte"]["embedding"].T


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("table, heads, tied", [
    ("wte", {}, True),
    ("wpe", {}, False),
    ("wte", {"unembed": 1}, False),
])  # fmt: skip
def test_the_tied_table_is_the_models(table, heads, tied, field):
    base = params(**heads)
    names = {"target_modules": ("mix",), "modules_to_save": ()}
    config = lora.LoraConfig(rank=2, **{**names, field: (*names[field], table)})
    plan = lora.plan(config, decoder, base, TOKENS)
    tree = lora.init(jax.random.key(0), plan, base)
    fields, tensors = with_task(leaves_by_path(tree), config, "CAUSAL_LM")
    assert fields["ensure_weight_tying"] is tied
    assert any("lm_head" in key for key in tensors) is tied
    assert ("lm_head" in fields[field]) is tied


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_tied_heads_copy_that_differs_is_refused(part, tmp_path):
    base = params()
    config = lora.LoraConfig(rank=2, init="random", target_modules=("mix", "wte"))
    plan = lora.plan(config, decoder, base, TOKENS)
    lora.hf.save_peft(tmp_path, lora.init(jax.random.key(0), plan, base), config)
    lora.hf.load_peft(tmp_path, decoder, base, TOKENS)
    tensors = load_file(tmp_path / TENSOR_FILE)
    key = f"base_model.model.lm_head.{part}.weight"
    save_file({**tensors, key: tensors[key] + 1}, tmp_path / TENSOR_FILE)
    with pytest.raises(ValueError, match=f"`{key}` differs from the embedding's"):
        lora.hf.load_peft(tmp_path, decoder, base, TOKENS)


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_an_adapter_of_a_tied_head_alone_is_refused(field, tmp_path):
    """PEFT gives the head a matrix of its own, where nothing in its config ties it."""
    base = params()
    config = lora.LoraConfig(rank=2, target_modules=("mix",))
    plan = lora.plan(config, decoder, base, TOKENS)
    lora.hf.save_peft(tmp_path, lora.init(jax.random.key(0), plan, base), config)
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    fields[field] = [*(fields[field] or []), "lm_head"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields))
    head = {
        "target_modules": {"lora_A.weight": np.ones((2, D)), "lora_B.weight": np.ones((V, 2))},
        "modules_to_save": {"weight": np.ones((V, D))},
    }[field]
    own = {f"base_model.model.lm_head.{k}": x.astype(np.float32) for k, x in head.items()}
    save_file({**load_file(tmp_path / TENSOR_FILE), **own}, tmp_path / TENSOR_FILE)
    with pytest.raises(
        ValueError, match="changes the output head only .*lm_head.*, but .*wte.* is not tied"
    ):
        lora.hf.load_peft(tmp_path, decoder, base, TOKENS)


def test_a_layer_in_front_of_a_tied_table_is_not_the_head(tmp_path):
    """RoBERTa's head of words has a linear layer and a norm, in a module `lm_head`."""
    base = {**params(), "lm_head": {"dense": {"kernel": jnp.eye(D)}}}

    def words(p, tokens):
        hidden = p["transformer"]["wte"]["embedding"][tokens]
        return hidden @ p["lm_head"]["dense"]["kernel"] @ p["transformer"]["wte"]["embedding"].T

    config = lora.LoraConfig(rank=2, init="random", target_modules=("dense",))
    plan = lora.plan(config, words, base, TOKENS)
    tree = lora.init(jax.random.key(0), plan, base)
    lora.hf.save_peft(tmp_path, tree, config)
    again, _ = lora.hf.load_peft(tmp_path, words, base, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, again, tree)
