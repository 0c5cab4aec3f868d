"""A model of the user's own under a name map, against torch and the real `peft`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_jax as lora
from lora_jax.hf import (
    from_hugging_face,
    load_peft,
    name_map,
    save_peft,
    save_weights,
    to_hugging_face,
)
from lora_jax.hf.checkpoint.safetensors import open_directory
from lora_jax.models.saving import save_model

from tests.support import own_decoder
from tests.support.oracle import oracle
from tests.support.own_decoder import MAP, PARAMS
from tests.support.peft_llama import TOKENS, Base, bases, jax_logits, torch_logits
from tests.support.peft_oracle import (
    assert_orbax_keeps,
    assert_same_files,
    close,
    peft_reads,
    peft_wrote,
)
from tests.support.peft_trees import noisy

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PLACE = "hf/name_map/own_model"


def logits(params) -> np.ndarray:
    return jax_logits(own_decoder.forward, params)


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Base:
    """The torch model, and the directory of its weights."""
    return bases(tmp_path_factory)("llama")


@pytest.fixture(scope="module")
def directory(there):
    return there.directory


@pytest.fixture(scope="module")
def base(directory):
    return from_hugging_face(PARAMS, open_directory(directory), MAP)


def test_the_base_is_read_and_written(there, directory, base, tmp_path):
    close(logits(base), oracle("hf/peft/bases/llama.logits", lambda: torch_logits(there.torch())))
    model = lora.models.load(directory)
    save_model(tmp_path / "again", model, to_hugging_face(base, MAP))
    again = lora.models.load(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


CASES = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "all-linear-rslora": {"r": 3, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj", "o_proj"],
        "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 5},
        "alpha_pattern": {"k_proj": 3, r"^model\.layers\.2\..*q_proj": 1},
        "r": 4,
    },
    "layers": {"r": 2, "target_modules": ["k_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "dora": {"r": 2, "target_modules": ["q_proj", "v_proj", "gate_proj"], "use_dora": True},
    "bias": {"r": 2, "target_modules": ["q_proj", "v_proj"], "bias": "all"},
    "bias-lora-only": {"r": 2, "target_modules": ["k_proj"], "bias": "lora_only"},
    "adapters-bias": {"r": 2, "target_modules": ["k_proj", "o_proj"], "lora_bias": True},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "head": {"r": 4, "target_modules": ["lm_head", "q_proj"]},
    "saved": {
        "r": 2,
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head", "input_layernorm"],
    },
    "tokens": {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [5, 30]},
    "tokens of both tables": {
        "r": 2, "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 30], "lm_head": [1, 5, 9]},
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pefts_adapter_here_and_back(case, there, base, tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    fields = {"task_type": "CAUSAL_LM", **CASES[case]}
    want = peft_wrote(f"{PLACE}/{case}", theirs, there.torch, fields, torch_logits)
    params, config = load_peft(theirs, own_decoder.forward, base, TOKENS, name_map=MAP)
    close(logits(params), want)
    save_peft(ours, params, config, name_map=MAP)
    assert_same_files(theirs, ours)
    if case in ("patterns", "layers", "saved"):
        # Its config has Hugging Face's names, which match nothing in this tree.
        forward, orbax = own_decoder.forward, tmp_path / "orbax"
        assert_orbax_keeps(params, config, forward, base, TOKENS, place=orbax)


OURS = {
    "own names": lora.LoraConfig(rank=4, target_modules=("q", "attn.v", "down")),
    "all-linear": lora.LoraConfig(rank=3, use_rslora=True),
    "patterns": lora.LoraConfig(
        rank=3, target_modules=("q", "up"), rank_pattern={"q": 2}, alpha_pattern={"attn.q": 5}
    ),
    "dora": lora.LoraConfig(rank=2, target_modules=("k", "o"), use_dora=True),
    "one layer": lora.LoraConfig(
        rank=2, target_modules=("o", "gate"), layers_to_transform=(1,), layers_pattern="blocks"
    ),
    "saved": lora.LoraConfig(rank=2, target_modules=("q",), modules_to_save=("out", "last_norm")),
    "parameters": lora.LoraConfig(
        rank=2, target_modules=("q",), target_parameters=("attn.v", "mlp.down")
    ),
    "tokens": lora.LoraConfig(rank=2, target_modules=("q",), trainable_token_indices=(5, 30)),
    "tokens of both tables": lora.LoraConfig(
        rank=2, target_modules=("q",), trainable_token_indices={"table": (5, 30), "out": (1, 9)}
    ),
}


@pytest.mark.parametrize("case", OURS)
def test_our_adapter_in_peft_and_back(case, there, base, tmp_path):
    config = OURS[case]
    plan = lora.plan(config, own_decoder.forward, base, TOKENS)
    params = noisy(lora.init(jax.random.key(0), plan, base))
    save_peft(tmp_path / "a", params, config, name_map=MAP)
    want = peft_reads(f"{PLACE}/ours/{case}", tmp_path / "a", there.torch, torch_logits)
    close(want, logits(params))
    again, _ = load_peft(tmp_path / "a", own_decoder.forward, base, TOKENS, name_map=MAP)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_the_file_speaks_hugging_faces_names(base, tmp_path):
    config = OURS["one layer"]
    plan = lora.plan(config, own_decoder.forward, base, TOKENS)
    save_peft(tmp_path, lora.init(jax.random.key(0), plan, base), config, name_map=MAP)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(fields["target_modules"]) == [
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    assert fields["layers_to_transform"] is None


# Gate and up in one leaf, as gemma and openpi have them.
JOINED = name_map(
    "joined",
    [
        (
            "blocks.mlp.both",
            "model.layers.{}.mlp.{gate,up}_proj.weight",
            "o i -> l c i o",
        ),
        *((r.ours, r.theirs, r.layout, r.factor) for r in MAP.rules),
    ],
    sizes=dict(MAP.sizes),
)


def joined(params):
    mlp = dict(params["blocks"]["mlp"])
    mlp["both"] = jnp.stack([mlp.pop("gate"), mlp.pop("up")], axis=1)
    return {**params, "blocks": {**params["blocks"], "mlp": mlp}}


def joined_forward(params, tokens):
    """The decoder with gate and up in one leaf (l, 2, d, f)."""
    mlp = dict(params["blocks"]["mlp"])
    both = mlp.pop("both")
    mlp |= {"gate": both[:, 0], "up": both[:, 1]}
    return own_decoder.forward({**params, "blocks": {**params["blocks"], "mlp": mlp}}, tokens)


def test_a_leaf_of_tensors_with_other_names(there, directory, base, tmp_path):
    shapes = jax.eval_shape(joined, PARAMS)
    params = from_hugging_face(shapes, open_directory(directory), JOINED)
    jax.tree.map(np.testing.assert_array_equal, params, joined(base))
    save_weights(tmp_path / "weights", params, JOINED)
    again = from_hugging_face(PARAMS, open_directory(tmp_path / "weights"), MAP)
    jax.tree.map(np.testing.assert_array_equal, again, base)
    roles = {"mlp.both": "ssio"}
    config = lora.LoraConfig(rank=2, target_modules=("both", "down"), roles=roles)
    tree = noisy(
        lora.init(jax.random.key(0), lora.plan(config, joined_forward, params, TOKENS), params)
    )
    save_peft(tmp_path / "a", tree, config, name_map=JOINED)
    want = peft_reads(f"{PLACE}/ours/joined", tmp_path / "a", there.torch, torch_logits)
    close(want, jax_logits(joined_forward, tree))
    loaded, _ = load_peft(
        tmp_path / "a", joined_forward, params, TOKENS, name_map=JOINED, roles=roles
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)


# ---- what is refused


def test_a_stack_with_fewer_names_than_tensors():
    short = name_map("short", [("w", "{a,b}.weight", "o i -> c i o")])
    with pytest.raises(ValueError, match=r"leaf `w`: `\{a,b\}.weight` does not have .*\[3\]"):
        to_hugging_face({"w": np.ones((3, 2, 2), np.float32)}, short)


def test_pefts_target_parameters(base, tmp_path):
    fields = {"peft_type": "LORA", "r": 2, "target_parameters": ["mlp.down_proj.weight"]}
    save_file({"base_model.model.a.lora_A.weight": np.ones((2, 2), np.float32)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    text = "`target_parameters` = .* by name map `own decoder`; merge the adapter in PEFT and load"
    with pytest.raises(ValueError, match=text):
        load_peft(tmp_path, own_decoder.forward, base, TOKENS, name_map=MAP)


def test_a_layout_that_renumbers_tokens(base, tmp_path):
    config = OURS["tokens"]
    plan = lora.plan(config, own_decoder.forward, base, TOKENS)
    params = lora.init(jax.random.key(0), plan, base)
    table = ("embed.table", "model.embed_tokens.weight", "(v p) d -> (p v) d")
    other = name_map("other", [table, *((r.ours, r.theirs, r.layout) for r in MAP.rules[1:])],
                     sizes={"p": 2})  # fmt: skip
    with pytest.raises(ValueError, match="leaf `embed.table`: layout .* renumbers the tokens"):
        save_peft(tmp_path / "a", params, config, name_map=other)


def test_what_has_no_rule(base):
    with pytest.raises(ValueError, match="leaf `extra.w`: name map `own decoder` has no rule for"):
        to_hugging_face({**base, "extra": {"w": jnp.ones(3)}}, MAP)


def test_a_checkpoint_that_does_not_fit(directory):
    small = {**PARAMS, "out": jax.ShapeDtypeStruct((16, 41), jnp.float32)}
    text = r"1 misshapen: `lm_head.weight` in model.safetensors has shape \(40, 16\), expected \(41"
    with pytest.raises(ValueError, match=text):
        from_hugging_face(small, open_directory(directory), MAP)
