"""Decoders that differ from Llama in a few fields, against transformers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import models
from lora_jax.models import config_from_hf
from lora_jax.models.saving import save_merged

from tests.support.oracle import oracle
from tests.support.torch_models import (
    DECODER_SIZES,
    TOLERANCE,
    both_paddings,
    greedy,
    load,
    saver,
    texts,
    theirs,
    written,
)

pytestmark = [pytest.mark.once, pytest.mark.oracle]

PLACE = "models/dense_families"
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SIZES = dict(DECODER_SIZES, pad_token_id=0, eos_token_id=1)
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW = dict(sliding_window=4)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=8)
CASES = {
    "olmo2": dict(SIZES, model_type="olmo2"),
    "olmo3": dict(
        SIZES, **WINDOW, model_type="olmo3", layer_types=[SLIDING, FULL, SLIDING],
        rope_scaling=YARN, rope_theta=500.0,
    ),
    "olmo3 by default": dict(SIZES, **WINDOW, model_type="olmo3", num_hidden_layers=4),
    "exaone4": dict(SIZES, **WINDOW, model_type="exaone4", sliding_window_pattern=3),
    "exaone4 without windows": dict(
        SIZES, model_type="exaone4", sliding_window=None, layer_types=[FULL] * 3
    ),
    "glm4": dict(SIZES, model_type="glm4", head_dim=8),
    "glm4 that rotates all": dict(
        SIZES, model_type="glm4", head_dim=8, partial_rotary_factor=1.0, attention_bias=False
    ),
    "smollm3": dict(SIZES, model_type="smollm3", no_rope_layers=[1, 0, 1]),
    "smollm3 by default": dict(
        SIZES, model_type="smollm3", num_hidden_layers=4, attention_bias=True,
        tie_word_embeddings=False,
    ),
    "granite": dict(
        SIZES, model_type="granite", embedding_multiplier=3, residual_multiplier=0.4,
        logits_scaling=1.5, attention_multiplier=0.2, attention_bias=True,
    ),
    "seed_oss": dict(SIZES, model_type="seed_oss", head_dim=8),
    "seed_oss with other biases": dict(
        SIZES, model_type="seed_oss", head_dim=8, attention_bias=False, attention_out_bias=True,
        mlp_bias=True,
    ),
    "arcee": dict(SIZES, model_type="arcee", mlp_bias=True),
    "cohere": dict(SIZES, model_type="cohere", logit_scale=0.5),
    "cohere2": dict(
        SIZES, **WINDOW, model_type="cohere2", layer_types=[SLIDING, FULL, SLIDING],
        attention_bias=True,
    ),
    "cohere2 by default": dict(SIZES, **WINDOW, model_type="cohere2", num_hidden_layers=4),
    "ministral": dict(
        SIZES, **WINDOW, model_type="ministral", head_dim=8, layer_types=[SLIDING, FULL, SLIDING]
    ),
}  # fmt: skip
ONE_EACH = (
    "olmo3",
    "exaone4",
    "glm4",
    "smollm3",
    "granite",
    "seed_oss",
    "arcee",
    "ministral",
    "cohere2",
)
COSTLY = [c if c in ONE_EACH else pytest.param(c, marks=pytest.mark.slow) for c in CASES]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(PLACE, CASES, tmp_path_factory)


def positions_of(mask):
    return np.maximum(mask.cumsum(1) - 1, 0)


@pytest.mark.parametrize("case", COSTLY)
def test_logits_are_transformers(saved, case):
    there, directory = saved(case)
    model = models.load(directory)
    tokens, mask = both_paddings()
    want = oracle(
        f"{PLACE}/{case}.logits", lambda: theirs(there(), tokens, mask, positions_of(mask))
    )
    got = np.asarray(quick_jit(model.apply)(model.params, tokens, mask=jnp.asarray(mask)))
    assert np.abs(got - want)[mask].max() <= TOLERANCE
    assert config_from_hf(model.config.to_hf()) == model.config


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["olmo3", "exaone4", "glm4", "smollm3", "granite", "arcee", "cohere2"]
)
def test_greedy_text_is_transformers(saved, case):
    """From prompts of 12, 7 and 1 tokens, beyond windows."""
    there, directory = saved(case)
    model = models.load(directory)
    tokens, mask = texts("left")
    prompts = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    want = oracle(f"{PLACE}/{case}.greedy", lambda: greedy(there(), tokens, mask, 16))
    got = models.generate(model, model.params, prompts, max_new_tokens=16)
    assert got == want


@pytest.mark.slow
@pytest.mark.parametrize("case", ["exaone4", "smollm3"])
def test_blocks_that_are_not_stacked_compute_the_same(saved, case):
    _, directory = saved(case)
    stacked, apart = (models.load(directory, scan=scan) for scan in (True, False))
    tokens, mask = texts("left")
    mask = jnp.asarray(mask)
    a = np.asarray(quick_jit(stacked.apply)(stacked.params, tokens, mask=mask))
    b = np.asarray(quick_jit(apart.apply)(apart.params, tokens, mask=mask))
    np.testing.assert_allclose(a[mask], b[mask], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_the_same_to_transformers(saved, case, tmp_path):
    there, directory = saved(case)
    model = models.load(directory)
    again = tmp_path / "again"
    save_merged(again, model, model.params)
    ours, base = (load_file(place / "model.safetensors") for place in (again, directory))
    assert ours.keys() == base.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], base[name], err_msg=name)

    def read():
        tokens, mask = texts("right")
        positions = positions_of(mask)
        got, want = (theirs(m, tokens, mask, positions) for m in (load(again), there()))
        return {"from": written(again), "same": bool((got[mask] == want[mask]).all())}

    answer = oracle(f"{PLACE}/{case}.again", read)
    assert answer == {"from": written(again), "same": True}
