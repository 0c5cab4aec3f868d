"""target_parameters: how PEFT lays out a parameter's factors, by its class and its shape."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.hf import load_peft, save_peft
from lora_jax.recipes.inspect_adapter import facts, norm, problems, read

pytestmark = pytest.mark.once

E, R, ALPHA = 3, 2, 7
RNG = np.random.default_rng(0)


def write(directory, module: str, entry: str, a, b, **fields) -> None:
    directory.mkdir()
    key = f"base_model.model.{module}.lora_"
    tensors = {f"{key}A.weight": a.astype("f4"), f"{key}B.weight": b.astype("f4")}
    save_file(tensors, directory / "adapter_model.safetensors")
    fields = {
        "target_modules": [],
        "target_parameters": [entry],
        "r": R,
        "lora_alpha": ALPHA,
    } | fields
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))


def delta(a, b, *, transposed: bool) -> np.ndarray:
    """PEFT's ParamWrapper.get_delta_weight, for a parameter of three dims."""
    a, b = a.reshape(E, R, -1), b.reshape(b.shape[0], R, E)
    out = np.einsum("ore,eri->eoi", b, a) * ALPHA / R
    return out.swapaxes(1, 2) if transposed else out


def experts(params, h, *, order: str):
    return jnp.einsum(f"tei,{order}->teo", h, params["mlp"]["experts"]["down_proj"])


# order of the model's dims, whether PEFT's class is transposed, model types that say so
ORDERS = {
    "in, out; transposed": ("eio", True, "gpt_oss"),
    "in, out; not transposed": ("eio", False, "llama4_text"),
    "out, in": ("eoi", False, "mixtral"),
}


@pytest.mark.parametrize("sizes", [(4, 4), (4, 6)], ids=["square", "oblong"])
@pytest.mark.parametrize("case", ORDERS)
def test_experts_in_the_order_of_their_class(case, sizes, tmp_path):
    order, transposed, model_type = ORDERS[case]
    dims = {"e": E, "i": sizes[0], "o": sizes[1]}
    w = RNG.normal(size=[dims[d] for d in order]).astype("f4")
    first, last = w.shape[1:]
    fan_in, fan_out = (first, last) if transposed else (last, first)
    a, b = RNG.normal(size=(E * R, fan_in)), RNG.normal(size=(fan_out, R * E))
    write(tmp_path / "a", "mlp.experts", "experts.down_proj", a, b)
    params = {"mlp": {"experts": {"down_proj": jnp.asarray(w)}}}
    fn, h = partial(experts, order=order), jnp.ones((2, E, sizes[0]))
    tree, config = load_peft(tmp_path / "a", fn, params, h, model_type=model_type)
    got = lora.merge(tree)["mlp"]["experts"]["down_proj"]
    np.testing.assert_allclose(got, w + delta(a, b, transposed=transposed), atol=1e-4)
    save_peft(tmp_path / "b", tree, config, model_type=model_type)
    for name in ("a", "b"):
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        np.testing.assert_array_equal(tensors["base_model.model.mlp.experts.lora_A.weight"],
                                      a.astype("f4"))  # fmt: skip
    # A base on this machine tells its family too.
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_peft(tmp_path / "c", tree, config, base_model_name=str(tmp_path / "base"))
    for name, base in (("c", None), ("a", str(tmp_path / "base"))):
        again, _ = load_peft(tmp_path / name, fn, params, h, base_model_name=base)
        jax.tree.map(np.testing.assert_array_equal, again, tree)
    # Of an oblong parameter the shapes show the order.
    if sizes[0] == sizes[1] and order == "eio":
        with pytest.raises(ValueError, match="its experts are square matrices .* pass model_type"):
            load_peft(tmp_path / "a", fn, params, h)
        with pytest.raises(ValueError, match="its experts are square matrices .* pass model_type"):
            save_peft(tmp_path / "d", tree, config)
    else:
        again, _ = load_peft(tmp_path / "a", fn, params, h)
        jax.tree.map(np.testing.assert_array_equal, again, tree)


@pytest.mark.parametrize("inner", [4, 6])
def test_the_weight_of_a_linear_layer(inner, tmp_path):
    """There (out, in): A is (r, in). Of GPT-2's Conv1D (in, out): A is (r, out)."""
    params = {
        "up_proj": {"kernel": jnp.ones((4, inner))},
        "h": {"0": {"c_fc": {"kernel": jnp.ones((4, inner))}}},
    }

    def fn(params, x):
        return x @ params["up_proj"]["kernel"] + x @ params["h"]["0"]["c_fc"]["kernel"]

    x = jnp.ones((1, 4))
    for i, (module, entry) in enumerate(
        (("up_proj", "up_proj.weight"), ("h.0.c_fc", "c_fc.weight"))
    ):
        fan_in, fan_out = (4, inner) if module == "up_proj" else (inner, 4)
        a, b = RNG.normal(size=(R, fan_in)), RNG.normal(size=(fan_out, R))
        write(tmp_path / str(i), module, entry, a, b)
        tree, config = load_peft(tmp_path / str(i), fn, params, x)
        merged = lora.merge(tree)
        got = merged["up_proj"] if module == "up_proj" else merged["h"]["0"]["c_fc"]
        there = b @ a * ALPHA / R
        want = 1 + (there.T if module == "up_proj" else there)
        np.testing.assert_allclose(got["kernel"], want, atol=1e-4)
        save_peft(tmp_path / f"again{i}", tree, config)
        back = load_file(tmp_path / f"again{i}" / "adapter_model.safetensors")
        np.testing.assert_array_equal(
            back[f"base_model.model.{module}.lora_A.weight"], a.astype("f4")
        )


def test_a_report_counts_ranks_and_norms_of_each_expert(tmp_path):
    a, b = RNG.normal(size=(E * R, 5)), RNG.normal(size=(4, R * E))
    write(tmp_path / "a", "layers.0.mlp.experts", "experts.down_proj", a, b)
    found = read(tmp_path / "a")
    assert problems(found) == []
    assert facts(found)["ranks"] == str(R) and facts(found)["scales"] == f"{ALPHA / R:g}"
    want = np.linalg.norm(delta(a, b, transposed=False))
    np.testing.assert_allclose(norm(found.modules[0]), want, rtol=1e-5)
