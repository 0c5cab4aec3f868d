"""PEFT directories against the real `peft`: read what it wrote, write what it reads."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax.array import LoraArray, RowsArray, SavedArray, delta, leaves_by_path
from lora_jax.config.lora import LoraConfig
from lora_jax.hf.peft import api as ours

from tests.support.oracle import oracle
from tests.support.peft_llama import CASES, TOKENS, Base, bases, torch_logits
from tests.support.peft_oracle import TENSORS, assert_same_files, close, peft_reads, peft_wrote
from tests.support.peft_trees import nested, planted, randomized

pytestmark = [pytest.mark.once, pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PLACE = "hf/peft/oracle"


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Base:
    """The torch model, and the directory of its weights."""
    return bases(tmp_path_factory)("llama")


@pytest.fixture(scope="module")
def model(there) -> lora.models.Model:
    """Our model with the same weights."""
    return lora.models.load(there.directory)


@pytest.fixture(scope="module")
def logits(model):
    """The logits of a tree whose adapters are merged, W + s·A·B, by what is written here."""
    run = jax.jit(lora.lorafy(model.apply))

    def of(lora_params) -> np.ndarray:
        return np.asarray(run(merged(lora_params), TOKENS))

    return of


def merged(lora_params) -> dict:
    """The tree of plain weights, but for adapters that have a bias where their module has none."""
    flat: dict[str, Any] = leaves_by_path(lora_params)
    out = {path: _merged(leaf) for path, leaf in flat.items()}
    for path, leaf in flat.items():
        if not isinstance(leaf, LoraArray) or leaf.bias is None:
            continue
        bias = f"{path.rpartition('.')[0]}.bias"
        if bias not in out:
            out[path] = leaf
            continue
        scale = np.reshape(leaf.scale, (*np.shape(leaf.scale), *(1,) * (leaf.bias.ndim - 1)))
        out[bias] = out[bias] + scale * leaf.bias
    return nested({path: leaf if isinstance(leaf, LoraArray) else jax.numpy.asarray(leaf)
                   for path, leaf in out.items()})  # fmt: skip


def _merged(leaf):
    if isinstance(leaf, SavedArray):
        return leaf.value
    if isinstance(leaf, RowsArray):
        table = np.moveaxis(np.array(leaf.w), leaf.axis, 0)
        table[list(leaf.ids)] = leaf.rows
        return np.moveaxis(table, 0, leaf.axis)
    if not isinstance(leaf, LoraArray):
        return leaf
    changed = leaf.w + delta(leaf)
    if leaf.m is None:
        return changed
    axis = leaf.roles.index("i")
    norm = np.sqrt(np.sum(np.square(changed), axis=axis, keepdims=True))
    # A layer without an adapter keeps its weight: m is the norm there.
    return changed * (np.expand_dims(leaf.m, axis) / norm)


@pytest.mark.parametrize("case", CASES)
def test_read_what_peft_wrote_and_write_the_same_bytes(case, there, model, logits, tmp_path):
    directory = tmp_path / "theirs"
    want = wrote(case, directory, there)
    config, tensors = ours.read_peft(directory)
    assert tensors.keys() == load_file(directory / TENSORS).keys()
    tree = ours.fill(planted(model.params, config), config, tensors)
    close(logits(tree), want)
    ours.save_peft(tmp_path / "ours", tree, config)
    assert_same_files(directory, tmp_path / "ours")


def wrote(case: str, directory, there: Base):
    """Writes PEFT's adapter of a case; returns its logits."""
    fields = {"task_type": "CAUSAL_LM", **CASES[case]}
    return peft_wrote(f"hf/peft/cases/{case}", directory, there.torch, fields, torch_logits)


def pefts_fields(case: str) -> dict:
    import peft

    fields = peft.LoraConfig(task_type="CAUSAL_LM", **CASES[case]).to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_we_wrote(case, there, model, logits, tmp_path):
    config = LoraConfig.from_peft(oracle(f"{PLACE}/{case}.fields", lambda: pefts_fields(case)))
    tree = randomized(planted(model.params, config), config)
    ours.save_peft(tmp_path / "a", tree, config)
    want = peft_reads(f"{PLACE}/{case}", tmp_path / "a", there.torch, torch_logits)
    close(logits(tree), want)
    back_config, tensors = ours.read_peft(tmp_path / "a")
    assert dataclasses.replace(back_config, target_modules=("x",), extra={}) == (
        dataclasses.replace(config, target_modules=("x",), extra={})
    )
    back = ours.fill(planted(model.params, config), config, tensors)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.parametrize(
    "case",
    ["plain", "all-linear-rslora", "regex", "patterns", "patterns-rslora", "layers", "embedding"],
)
def test_vllm_export_means_the_same_with_one_scale(case, there, model, tmp_path):
    want = wrote(case, tmp_path / "theirs", there)
    config, tensors = ours.read_peft(tmp_path / "theirs")
    tree = ours.fill(planted(model.params, config), config, tensors)
    ours.save_peft(tmp_path / "vllm", tree, config, target="vllm")
    fields = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert fields["rank_pattern"] == fields["alpha_pattern"] == {}
    assert isinstance(fields["target_modules"], list)
    for key, value in load_file(tmp_path / "vllm" / TENSORS).items():
        assert key.endswith(("lora_A.weight", "lora_B.weight", "embedding_A", "embedding_B"))
        assert fields["r"] == value.shape[0 if "A" in key.rpartition("lora_")[2] else 1]
    name, directory = f"{PLACE}/vllm/{case}", tmp_path / "vllm"
    # PEFT would add the base's table.
    same = case != "embedding"
    close(peft_reads(name, directory, there.torch, torch_logits, same_state=same), want)
