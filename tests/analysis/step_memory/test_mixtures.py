"""The memory of training a mixture of experts, estimated: beside XLA's own analysis."""

from typing import Any

import pytest

from lora_jax import LoraConfig, analysis

pytestmark = pytest.mark.once

_SIZES = dict(
    vocab_size=2000, hidden_size=512, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=512,
)  # fmt: skip
# Few wide experts, and many narrow ones.
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": dict(
        _SIZES, model_type="mixtral", intermediate_size=1024, num_local_experts=8,
        num_experts_per_tok=2, tie_word_embeddings=False,
    ),
    "qwen3_moe": dict(
        _SIZES, model_type="qwen3_moe", intermediate_size=1024, moe_intermediate_size=256,
        num_experts=16, num_experts_per_tok=4, head_dim=64, tie_word_embeddings=False,
    ),
}  # fmt: skip
ADAPTER = LoraConfig(rank=8, target_modules=("q_proj", "experts.gate_up_proj", "experts.down_proj"))


# With the load-balancing loss, whose weight is in config.json.
BALANCED = {**MODELS["mixtral"], "router_aux_loss_coef": 0.02}


def _slow(kind: str, mesh: dict[str, int], remat: str):
    return pytest.param(kind, mesh, remat, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "mesh", "remat"),
    [
        ("mixtral", {"expert": 4}, "full"),
        *(_slow(kind, {}, remat) for kind in MODELS for remat in ("full", "projections", "none")),
        *(
            _slow(kind, mesh, remat)
            for kind in MODELS
            for mesh in ({"expert": 8}, {"data": 2, "expert": 4})
            for remat in ("full", "projections", "none")
        ),
    ],
    ids=str,
)
def test_an_estimate_of_experts_is_that_of_the_compiled_step(kind, mesh, remat):
    options: dict[str, Any] = dict(
        adapter=ADAPTER, batch=8, length=256, dtype="float32", backend="reference", mesh=mesh,
        remat=remat,
    )  # fmt: skip
    found = analysis.memory(MODELS[kind], **options)
    compiled = analysis.memory(MODELS[kind], exact=True, **options)
    assert compiled.arguments == found.arguments
    # A tenth, but for many narrow experts with "projections" on one device: 0.899.
    assert 0.89 < found.total / compiled.total < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, {"expert": 4}], ids=str)
def test_the_balance_of_experts_is_counted(mesh):
    options: dict[str, Any] = dict(
        adapter=ADAPTER, batch=8, length=256, dtype="float32", backend="reference", mesh=mesh,
        balance_experts=True,
    )  # fmt: skip
    found = analysis.memory(BALANCED, **options)
    compiled = analysis.memory(BALANCED, exact=True, **options)
    # Beside the tokens lie the numbers of the texts, which are padding where there are none.
    assert compiled.arguments == found.arguments
    assert found.total == pytest.approx(compiled.total, rel=0.1)
