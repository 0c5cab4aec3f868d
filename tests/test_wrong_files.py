"""Every wrong file ends in one sentence that names it: mutations of each kind of file, seed fixed.

A file that is still whole after a mutation may load. Otherwise the error is a ValueError or an
OSError of one line with a path in it, and it comes within seconds.
"""

import contextlib
import json
import random
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers import models as token_models

from lora_jax import checkpoint, hf, models, train
from lora_jax.checkpoint.adapters import read_leaves
from lora_jax.cli import commands, settings
from lora_jax.hf.gguf.lora_write import to_gguf, write_gguf_lora
from lora_jax.models.gguf import base_of
from lora_jax.models.saving import save_model

from tests.support import mutations
from tests.support.gguf_files import add_config, tensors_of, writing
from tests.support.train_toys import CONFIG, toy_lora

pytestmark = pytest.mark.once

_LONGEST = 10  # seconds


class Kind(NamedTuple):
    """A kind of file: where it is, what reads it, how it is mutated."""

    path: Path
    read: Callable[[], object]
    mutate: mutations.Mutation

    @property
    def folder(self) -> Path:
        """What an error must name at least: the file's folder, or that which is one checkpoint."""
        return next((p for p in self.path.parents if p.name == "orbax"), self.path.parent)


class TooLongError(BaseException):
    """Not an Exception, so that nothing takes it for its own."""


def _model(directory: Path) -> Path:
    """A tiny Llama in two shards, with a tokenizer of words and a split by an expression."""
    directory.mkdir()
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(37))]
    backend = Backend(
        token_models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    backend.add_special_tokens([AddedToken(w, special=True) for w in words[:3]])
    config = models.LlamaConfig(
        vocab_size=40, hidden_size=8, intermediate_size=16, num_hidden_layers=1, head_dim=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    model = models.init(jax.random.key(0), config)
    save_model(directory / "m", model, model.params, max_shard_size=2000)
    backend.save(str(directory / "m" / "tokenizer.json"))
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    (directory / "m" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special,
                    "chat_template": "{{ messages }}",
                    "added_tokens_decoder": {"1": {"content": "<s>", "special": True}}})
    )  # fmt: skip
    (directory / "m" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2], "temperature": 0.7, "top_p": 0.9, "do_sample": True})
    )
    return directory / "m"


def _peft(directory: Path) -> Path:
    directory.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {
        f"{stem}A.weight": np.ones((2, 8), np.float32),
        f"{stem}B.weight": np.ones((8, 2), np.float32),
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
              "bias": "none", "rank_pattern": {}, "use_dora": False}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


def _gguf(path: Path, model: models.Model) -> Path:
    with writing(path) as writer:
        add_config(writer, model.config)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(list("abcdefgh") + ["ab"] + [f"<{i}>" for i in range(31)])
        writer.add_token_merges(["a b"])
        writer.add_token_types([1] * 9 + [3] * 31)
        for name, tensor in tensors_of(model).items():
            writer.add_tensor(name, tensor)
    return path


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Kind]:
    root = tmp_path_factory.mktemp("wrong")
    directory, adapter = _model(root / "models"), _peft(root / "adapter")
    model = models.load(directory)
    weights = _gguf(root / "model.gguf", model)
    base = base_of(model.config)
    lora = root / "lora.gguf"
    write_gguf_lora(lora, to_gguf(hf.read_peft(adapter)[1], hf.read_peft(adapter)[0], base), base)
    data = root / "data.jsonl"
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    rows = [{"prompt": "w1", "completion": "w2"}, {"text": "w3"}, {"messages": turns}]
    rows += [{"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]}]
    data.write_text("\n".join(map(json.dumps, rows)))
    toml = root / "settings.toml"
    toml.write_text(
        'model = "m"\nmax_length = 64\n[lora]\nrank = 4\nalpha = 8\ntarget_modules = ["q"]\n'
        '[training]\nsteps = 3\nlearning_rate = 1e-3\noutput_dir = "a"\nschedule = "linear"\n'
    )
    checkpoint.save(root / "orbax", toy_lora(), CONFIG)
    options = settings.options(commands.train_sections())

    def read_model() -> None:
        loaded = models.load(directory)
        if loaded.tokenizer is not None:
            loaded.tokenizer.encode("w1 w2 </s>")

    shard = sorted(directory.glob("*.safetensors"))[0]
    jsons = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "model.safetensors.index.json")  # fmt: skip
    found = {name: Kind(directory / name, read_model, mutations.mutate_json) for name in jsons}
    found |= {
        "shard": Kind(shard, read_model, mutations.mutate_safetensors),
        "adapter_config.json": Kind(
            adapter / "adapter_config.json", lambda: hf.read_peft(adapter), mutations.mutate_json
        ),
        "adapter_model": Kind(
            adapter / "adapter_model.safetensors",
            lambda: hf.read_peft(adapter),
            mutations.mutate_safetensors,
        ),
        "gguf": Kind(weights, lambda: models.load(weights), mutations.mutate_gguf),
        "gguf adapter": Kind(
            lora, lambda: hf.read_gguf_lora(lora, base=base), mutations.mutate_gguf
        ),
        "jsonl": Kind(data, lambda: train.load_jsonl(data), mutations.mutate_lines),
        "toml": Kind(toml, lambda: settings.from_toml(toml, options), mutations.mutate_toml),
    }
    for name in ("meta/metadata", "adapter/_METADATA", "adapter/manifest.ocdbt"):
        path = root / "orbax" / name
        mutate = mutations.mutate_bytes if path.suffix else mutations.mutate_json
        read = lambda: read_leaves(checkpoint.find(root / "orbax"))  # noqa: E731
        found[f"orbax {name}"] = Kind(path, read, mutate)
    return found


@contextlib.contextmanager
def _limited():
    def late(number, frame):
        raise TooLongError(f"not back after {_LONGEST} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, _LONGEST, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fault(kind: Kind, content: bytes) -> str | None:
    """What is wrong with how a file of this content ends, or None."""
    before = kind.path.read_bytes()
    kind.path.write_bytes(content)
    try:
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.read()
    except TooLongError:
        return "hang"
    except (ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, UnicodeError) or "\n" in text:
            return f"obscure: {type(error).__name__}: {text[:300]}"
        if str(kind.folder) not in text:
            return f"unnamed: {type(error).__name__}: {text[:300]}"
    except BaseException as error:  # also panics of Rust
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"obscure: {type(error).__name__}: {str(error)[:300]}"
    finally:
        kind.path.write_bytes(before)
    return None


def campaign(kinds: dict[str, Kind], count: int, seed: int) -> list[str]:
    """The faults of so many mutations, spread over the kinds."""
    rng, faults = random.Random(seed), []
    for number in range(count):
        name = list(kinds)[number % len(kinds)]
        content = kinds[name].mutate(rng, kinds[name].path.read_bytes())
        if (found := fault(kinds[name], content)) is not None:
            faults.append(f"{name} ({number}): {found}")
    return faults


def test_the_whole_files_are_read(kinds):
    for kind in kinds.values():
        kind.read()


# Orbax leaves coroutines behind when a read fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_sample_of_wrong_files(kinds):
    assert not campaign(kinds, 150, seed=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_wrong_files(kinds):
    assert not campaign(kinds, 5000, seed=0)
