"""What PEFT writes and what it reads, recorded: its directories, and what its models compute."""

import contextlib
import filecmp
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lora_jax import checkpoint

from tests.support.oracle import assert_same, oracle

FILES = TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# PEFT keeps these as sets: the order in its file changes from run to run.
SETS = ("target_modules", "target_parameters", "modules_to_save", "exclude_modules")


def peft_wrote(
    name: str,
    directory: Path,
    model: Callable,
    fields: dict,
    run: Callable,
    *,
    randomized: Callable | None = None,
):
    """Writes the directory of an adapter that PEFT made of random numbers.

    Args:
      name: the name of the recorded answer.
      directory: where to write.
      model: makes the torch model.
      fields: fields of `peft.LoraConfig`.
      run: what to compute with PEFT's model.
      randomized: changes the adapted model in place; `randomize` unless given.

    Returns:
      What `run` gave.
    """

    def ask():
        import peft
        import torch

        # A starts random, and what did not come before in this process counts for nothing.
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model(), peft.LoraConfig(**fields))
        (randomized or randomize)(adapted)
        with tempfile.TemporaryDirectory() as scratch:
            adapted.save_pretrained(scratch)
            sort_sets(Path(scratch) / CONFIG)
            answer = contents(Path(scratch))
            # Nothing of PEFT's bytes is lost.
            write_contents(Path(scratch) / "again", answer)
            assert_same_files(Path(scratch), Path(scratch) / "again")
        return {**answer, "outputs": run(adapted.eval())}

    answer = oracle(f"{name}.wrote", ask)
    write_contents(directory, answer)
    return answer["outputs"]


def peft_reads(
    name: str,
    directory: Path,
    model: Callable,
    run: Callable,
    *,
    same_state: bool = True,
    around: Callable = contextlib.nullcontext,
):
    """What PEFT's model computes with the adapter of a directory that we wrote.

    The recorded answer is of one adapter: the directory has to have that very one.

    Args:
      name: the name of the recorded answer.
      directory: the adapter's.
      model: makes the torch model.
      run: what to compute with PEFT's model.
      same_state: PEFT would write the same tensors again. It does not where it leaves out a tied
        head, or adds the base's table to an adapted one.
      around: the context in which PEFT reads.

    Returns:
      What `run` gave.
    """

    def ask():
        import peft

        with around():
            loaded = peft.PeftModel.from_pretrained(model(), str(directory))
        if same_state:
            # PEFT only warns about keys that it does not find or does not know.
            state = peft.get_peft_model_state_dict(loaded)
            stored = load_file(directory / TENSORS)
            assert state.keys() == stored.keys()
            for key, value in state.items():
                np.testing.assert_array_equal(value.numpy(), stored[key])
        return {**contents(directory), "outputs": run(loaded.eval())}

    answer = oracle(f"{name}.read", ask)
    assert_same(contents(directory), {k: v for k, v in answer.items() if k != "outputs"}, name)
    return answer["outputs"]


def contents(directory: Path) -> dict:
    """The two files of an adapter."""
    with safe_open(str(directory / TENSORS), "numpy") as file:
        metadata = file.metadata()
    tensors = dict(sorted(load_file(directory / TENSORS).items()))
    config = json.loads((directory / CONFIG).read_text())
    # PEFT has sets of names, whose order changes from process to process.
    for value in config.values():
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            value.sort()
    text = json.dumps(config, indent=2, sort_keys=True)
    return {"config": text, "metadata": metadata, "tensors": tensors}


def write_contents(directory: Path, answer: dict) -> None:
    """Writes the two files of an adapter."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(answer["tensors"], directory / TENSORS, answer["metadata"])
    (directory / CONFIG).write_text(answer["config"])


def assert_same_files(one: Path, other: Path) -> None:
    """Two adapters are the same, byte for byte."""
    for name in FILES:
        assert filecmp.cmp(one / name, other / name, shallow=False), name


def randomize(model, scale: float = 1.0) -> None:
    """Adds noise to every trained number in place, which keeps tied parameters tied."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


def assert_orbax_keeps(lora_params, config, fn: Callable, params, *args, place: Path) -> None:
    """What is imported to Orbax can be read back, to the bit and with its config."""
    checkpoint.save(place, lora_params, config)
    back, read = checkpoint.restore(place, fn, params, *args)
    assert read == config
    assert jax.tree.structure(back) == jax.tree.structure(lora_params)
    jax.tree.map(np.testing.assert_array_equal, back, lora_params)


def close(one, other) -> None:
    """float32 computed in another order."""
    np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


def sort_sets(path: Path) -> None:
    """Orders what PEFT writes out of a set: its order is another in every process."""
    text = path.read_text()
    fields = json.loads(text)
    # Sorting is all that changes here.
    assert text == json.dumps(fields, indent=2, sort_keys=True)
    for key in SETS:
        if isinstance(fields.get(key), list):
            fields[key] = sorted(fields[key])
    path.write_text(json.dumps(fields, indent=2, sort_keys=True))
