"""What every family of decoders is checked for against transformers.

Each check takes `saved`, of `torch_models.saver`, the place of the recorded answers, and the case.
"""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from lora_jax import models
from lora_jax.models import config_from_hf
from lora_jax.models.saving import save_merged

from tests.support.oracle import oracle
from tests.support.torch_models import (
    TOLERANCE,
    both_paddings,
    greedy,
    load,
    texts,
    theirs,
    written,
)

# Compiling is most of what these tests do.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def positions_of(mask):
    return np.maximum(mask.cumsum(1) - 1, 0)


def check_logits(saved, place, case, *lengths):
    """The logits of texts of these lengths, and the config as it is written and read again."""
    there, directory = saved(case)
    model = models.load(directory)
    tokens, mask = both_paddings(*lengths)
    positions = positions_of(mask)
    want = oracle(f"{place}/{case}.logits", lambda: theirs(there(), tokens, mask, positions))
    got = np.asarray(quick_jit(model.apply)(model.params, tokens, mask=jnp.asarray(mask)))
    assert got.dtype == np.float32
    assert np.abs(got - want)[mask].max() <= TOLERANCE
    assert config_from_hf(model.config.to_hf()) == model.config


def check_greedy_text(saved, place, case, *lengths, count=16):
    """From prompts of 12, 7 and 1 tokens, or of these lengths, beyond windows."""
    there, directory = saved(case)
    model = models.load(directory)
    tokens, mask = texts("left", *lengths)
    prompts = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    want = oracle(f"{place}/{case}.greedy", lambda: greedy(there(), tokens, mask, count))
    assert models.generate(model, model.params, prompts, max_new_tokens=count) == want


def check_steps(saved, case, padding, new):
    """Calls of so many new tokens over a cache give the logits of the whole text."""
    check_steps_of(models.load(saved(case)[1]), *texts(padding), new)


def check_steps_of(model, tokens, mask, new):
    """As `check_steps`, of a model; texts of 12 tokens."""
    whole = np.asarray(quick_jit(model.apply)(model.params, tokens, mask=jnp.asarray(mask)))
    cache, step, parts = model.init_cache(3, 12), quick_jit(model.apply), []
    for at in range(0, 12, new):
        some = slice(at, at + new)
        seen = jnp.asarray(mask[:, some])
        logits, cache = step(model.params, tokens[:, some], mask=seen, cache=cache)
        parts.append(np.asarray(logits))
    assert np.abs(np.concatenate(parts, axis=1) - whole)[mask].max() <= TOLERANCE


def check_blocks_apart(saved, case):
    """Blocks that are not stacked compute the same."""
    _, directory = saved(case)
    stacked, apart = (models.load(directory, scan=scan) for scan in (True, False))
    tokens, mask = texts("left")
    mask = jnp.asarray(mask)
    a = np.asarray(quick_jit(stacked.apply)(stacked.params, tokens, mask=mask))
    b = np.asarray(quick_jit(apart.apply)(apart.params, tokens, mask=mask))
    # The same operations; XLA may fuse them differently.
    np.testing.assert_allclose(a[mask], b[mask], atol=2e-5)


def without_source(model):
    """The model, whose config.json is then written anew."""
    return dataclasses.replace(model, checkpoint=None)


def check_config_kept(model, folder):
    """What is saved has the config.json that was read, and fields that change no results."""
    path = model.checkpoint / "config.json"
    before = path.read_text()
    stated = {**json.loads(before), "sep_token_id": 3, "temperature": 0.5, "_name_or_path": "a/b"}
    path.write_text(json.dumps(stated))
    save_merged(folder, model, model.params, dtype="bfloat16")
    path.write_text(before)
    assert json.loads((folder / "config.json").read_text()) == {**stated, "dtype": "bfloat16"}


def check_saved_again(saved, place, case, scratch):
    """What is saved has the tensors that were read, and is the same model to transformers."""
    there, directory = saved(case)
    model = models.load(directory)
    again = scratch / "again"
    check_config_kept(model, scratch / "kept")
    save_merged(again, without_source(model), model.params)
    ours, base = (load_file(folder / "model.safetensors") for folder in (again, directory))
    assert ours.keys() == base.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], base[name], err_msg=name)

    def read():
        tokens, mask = texts("right")
        positions = positions_of(mask)
        got, want = (theirs(m, tokens, mask, positions) for m in (load(again), there()))
        return {"from": written(again), "same": bool((got[mask] == want[mask]).all())}

    answer = oracle(f"{place}/{case}.again", read)
    assert answer == {"from": written(again), "same": True}
