"""Small random transformers models: their directories, made without torch, and what torch answers.

A directory is made from a recorded specification (config.json, and the names, shapes and spread of
the tensors); the numbers depend on a tensor's name. Only a test that asks torch anew loads it.
"""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.support.oracle import oracle, seeded

# float32 products summed in another order, over three blocks.
TOLERANCE = 1e-4
DECODER_SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
ENCODER_SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=40,
    type_vocab_size=2,
    pad_token_id=1,
)
DISTIL = dict(
    vocab_size=97, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=40,
    pad_token_id=1,
)  # fmt: skip
# As the public files of version 3, but that distances share rows of the table from 3 on.
DEBERTA = dict(
    ENCODER_SIZES, relative_attention=True, position_buckets=4, norm_rel_ebd="layer_norm",
    share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
    max_relative_positions=-1,
)  # fmt: skip
MODERN = dict(
    {name: size for name, size in ENCODER_SIZES.items() if name != "type_vocab_size"},
    local_attention=4, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3,
)  # fmt: skip
# Of models whose adapters are compared with PEFT's.
ADAPTED_SIZES = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    pad_token_id=0,
)

# The spread of tensors that transformers begins with a constant.
AROUND = 0.1


class Saved(NamedTuple):
    """A model's directory, and a function that loads it into torch."""

    model: Callable
    directory: Path


def saver(place: str, cases, tmp_path_factory):
    """Writes a random transformers model of a case, once.

    Args:
      place: the name under which specifications are recorded.
      cases: case -> fields of its configuration, and the class that makes it (`auto`) where that
        is not `AutoModelForCausalLM`.
      tmp_path_factory: pytest's.

    Returns:
      A function: case -> `Saved`.
    """

    @functools.cache
    def make(case) -> Saved:
        directory = tmp_path_factory.mktemp("model")
        fields = {"model_type": "llama", "initializer_range": 0.3, **cases[case]}
        spec = oracle(f"{place}/{case}.spec", lambda: specification(fields, directory / "fresh"))
        write(directory, spec)
        return Saved(functools.cache(lambda: load(directory)), directory)

    return make


def specification(fields: dict, scratch: Path) -> dict:
    """config.json, and each tensor's shape, mean and spread, as transformers writes them."""
    import transformers

    auto = getattr(transformers, fields.get("auto", "AutoModelForCausalLM"))
    rest = {key: value for key, value in fields.items() if key != "auto"}
    config = transformers.AutoConfig.for_model(**copy.deepcopy(rest))
    auto.from_config(config).save_pretrained(scratch)
    tensors = {}
    for name, x in sorted(load_file(scratch / "model.safetensors").items()):
        mean = float(x.flat[0]) if np.ptp(x) == 0 else 0.0
        spread = AROUND if np.ptp(x) == 0 else fields["initializer_range"]
        tensors[name] = [list(x.shape), mean, spread]
    return {"config": json.loads((scratch / "config.json").read_text()), "tensors": tensors}


def write(directory: Path, spec: dict) -> None:
    """Writes the directory of a specification."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(spec["config"]))
    tensors = {name: np.asarray(seeded(name, *rest)) for name, rest in spec["tensors"].items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def written(directory: Path) -> dict:
    """What a directory states of its model: the settings, and the tensors' names and shapes.

    An answer about a directory is recorded with it. Together with numbers that come back the same,
    it stands for the files that torch has read.
    """
    settings = {
        name: json.loads((directory / name).read_text())
        for name in ("config.json", "tokenizer_config.json")
        if (directory / name).is_file()
    }
    tensors = load_file(directory / "model.safetensors")
    return {**settings, "tensors": {name: list(x.shape) for name, x in sorted(tensors.items())}}


def load(directory: Path):
    """The torch model of a directory, which it forgets: PEFT would write its path."""
    import transformers

    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    model = getattr(transformers, name).from_pretrained(directory).eval()
    model.name_or_path = model.config._name_or_path = ""
    return model


def texts(padding, lengths=(12, 7, 1)):
    """Texts, the longest first, padded on one side with a token that is a real one."""
    shape = len(lengths), lengths[0]
    tokens = np.asarray(jax.random.randint(jax.random.key(1), shape, 0, 97))
    mask = np.arange(lengths[0]) < np.array(lengths)[:, None]
    return tokens, mask if padding == "right" else mask[:, ::-1].copy()


def both_paddings(*lengths):
    """The texts, padded on the left and on the right, in one batch."""
    sides = (texts(side, *lengths) for side in ("left", "right"))
    return (np.concatenate(both) for both in zip(*sides, strict=True))


def theirs(model, tokens, mask, positions):
    """A torch model's logits."""
    import torch

    with torch.no_grad():
        return model(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            position_ids=None if positions is None else torch.tensor(positions),
        ).logits.numpy()


def greedy(model, tokens, mask, count):
    """A torch model's likeliest tokens."""
    import torch

    with torch.no_grad():
        return model.generate(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )[:, tokens.shape[1] :].tolist()


def experts_in_one(tensors):
    """The tensors with a block's experts in one, (E, out, in)."""
    found: dict[str, list] = {}
    for name in sorted(name for name in tensors if ".experts." in name):
        start, _, layer, _ = name.rsplit(".", 3)
        found.setdefault(f"{start}.{layer}", []).append(tensors.pop(name))
    for start in {name.rpartition(".")[0] for name in found}:
        gate, up, down = (np.stack(found[f"{start}.{n}_proj"]) for n in ("gate", "up", "down"))
        tensors[f"{start}.gate_up_proj"] = np.concatenate((gate, up), axis=1)
        tensors[f"{start}.down_proj"] = down
    return tensors


def each_expert_apart(tensors):
    """The tensors with a module for each layer of an expert; a block's are (E, in, out) in one."""
    for name in [name for name in tensors if ".experts." in name]:
        start, _, layer = name.rpartition(".")
        for number, expert in enumerate(tensors.pop(name)):
            names = ["gate_proj", "up_proj"] if layer == "gate_up_proj" else [layer]
            for part, x in zip(names, np.split(expert.T, len(names)), strict=True):
                tensors[f"{start}.{number}.{part}.weight"] = np.ascontiguousarray(x)
    return tensors
