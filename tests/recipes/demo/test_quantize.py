"""The demo over a GGUF file's own blocks: the same numbers as over the floats they stand for."""

import json

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora_jax import models
from lora_jax.cli import main
from lora_jax.recipes import finetune
from lora_jax.train.memory import tree_bytes

from tests.support.gguf_files import TIED, tensors_of, tokenizer_keys, write_model
from tests.support.tiny import tiny_tokenizer

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random decoder with the tiny tokenizer in one file, its matrices in Q4_1."""
    tokenizer = tiny_tokenizer()
    keys, tokens = tokenizer_keys(tokenizer), tokenizer.vocab_size
    raw = TIED.to_hf() | {"vocab_size": tokens, "max_position_embeddings": 256}
    config = models.LlamaConfig.from_hf(raw | {"initializer_range": 0.2})
    tensors = tensors_of(models.init(jax.random.key(0), config))
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    assert (eos := tokenizer.eos_id) is not None
    return str(write_model(path, config, tensors, GGMLQuantizationType.Q4_1, keys=keys, eos=eos))


def demo(model, directory, *more):
    line = ["demo", "--model", model, "--output-dir", str(directory), "--no-progress"]
    line += ["--steps", "2", "--batch-size", "2", "--test-examples", "2", *more]
    assert main(line) == 0
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"]


@pytest.mark.slow
def test_the_base_stays_in_its_blocks_and_trains_alike(model, tmp_path, capsys):
    want = demo(model, tmp_path / "floats")
    floats = capsys.readouterr().out
    got = demo(model, tmp_path / "blocks", "--quantize", "file")
    out = capsys.readouterr().out
    assert len(want) == 2 and want[0] != want[1]
    np.testing.assert_allclose(got, want, rtol=1e-4)
    # Four bits and two float16 numbers for every 32 weights; the norms stay floats.
    sizes = [tree_bytes(finetune.load_model(model, quantize=q).params) for q in ("file", None)]
    assert 0.15 < sizes[0] / sizes[1] < 0.35
    assert '(quantized "file"; float32: ' in out and "(float32)" in floats
    scores = [json.loads((tmp_path / n / "demo.json").read_text()) for n in ("floats", "blocks")]
    assert scores[0].keys() == scores[1].keys()
