"""The memory of training over a base as its files hold it: beside the loaded model."""

import jax
import pytest
from gguf import GGMLQuantizationType

import lora_jax as lora
from lora_jax import analysis, models
from lora_jax.cli import main
from lora_jax.models.saving import save_model
from lora_jax.train.memory import device_bytes

from tests.support.gguf_files import tensors_of, write_model
from tests.support.quantized_files import in_groups, in_squares, tiny

pytestmark = pytest.mark.once

CONFIG = models.LlamaConfig(
    vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, head_dim=64, max_position_embeddings=64,
    tie_word_embeddings=False,
)  # fmt: skip
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}


def written(place, kind):
    """A model's files, quantized as `kind` says."""
    if kind == "fp8":
        return tiny(place / "fp8", FP8, in_squares, width=256)
    if kind == "gptq":
        return tiny(place / "gptq", GPTQ, in_groups, width=256)
    model = models.init(jax.random.key(0), CONFIG)
    blocks = GGMLQuantizationType.Q4_0
    return write_model(place / "q4_0.gguf", CONFIG, tensors_of(model), blocks)


MESHES = [{}, {"fsdp": 2}, {"tensor": 2}, {"fsdp": 2, "tensor": 2}]


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("q4_0", {"fsdp": 2}),
        *(
            pytest.param(kind, mesh, marks=pytest.mark.slow)
            for kind in ("q4_0", "fp8")
            for mesh in MESHES
        ),
        # Inputs in an order of their own are not cut.
        pytest.param("gptq", {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_estimate_has_the_bytes_of_the_files_blocks(kind, mesh, tmp_path):
    path = written(tmp_path, kind)
    adapter = lora.LoraConfig(rank=4, target_modules=("q_proj",))
    found = analysis.memory(
        path, quantize="file", adapter=adapter, length=16, batch=2, mesh=mesh, dtype="float32",
        backend="reference",
    )  # fmt: skip
    on = models.make_mesh(**mesh, devices=jax.devices()[: found.devices]) if mesh else None
    model = models.load(path, quantize="file", mesh=on)
    scales = 4 * model.config.num_hidden_layers  # of the adapters: they do not train
    assert found.weights == device_bytes(model.params) + scales
    assert found.settings.method == "QLoRA" and "base as its files hold it" in found.described
    assert found.to_dict()["settings"]["quantize"] == "file"


def test_blocks_are_those_of_files(tmp_path, capsys):
    path = written(tmp_path, "q4_0")
    argv = ["estimate", str(path), "--quantize", "file", "--method", "qlora", "--max-length", "8"]
    assert main(argv) == 0 and "base as its files hold it" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"`model`, `gpt2`, is no directory or .gguf file: give it"
    ):
        analysis.memory("gpt2", quantize="file", length=8)
    model = models.init(jax.random.key(0), CONFIG)
    save_model(tmp_path / "floats", model, model.params)
    with pytest.raises(ValueError, match="`quantize` has no blocks to keep, as .*: name a format"):
        analysis.memory(tmp_path / "floats", quantize="file", length=8)
