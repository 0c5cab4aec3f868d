"""Programs of one's own in two processes that load different things, which end with a sentence."""

import json
import time

import jax
import pytest

from lora_jax import models
from lora_jax.models.saving import save_model

from tests.support.mesh_runs import LLAMA
from tests.support.several import ends_of, free_port

pytestmark = [pytest.mark.once, pytest.mark.slow]

# As a user writes it: JAX's own times, and no handler of errors.
PROGRAM = """
import json, sys
import jax
job = json.loads(sys.argv[1])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{job['port']}", 2, job["id"])
import lora_jax as lora
from lora_jax import models, train
from tests.support.mesh_runs import adapted, data
mesh = models.make_mesh(**job["mesh"]) if job["mesh"] else None
model = models.load(job["source"], mesh=mesh, **job["options"])
if job["train"]:
    config = train.TrainConfig(steps=1, batch_size=2, progress=False)
    train.fit(model, adapted(model, {})[1], data(), None, config)
print("done")
"""
MESH = "`mesh` is {'fsdp': 2} in process 0 and {'data': 2} in process 1"
CASES = {
    "mesh": ({"mesh": {"data": 2}}, MESH),
    "order": ({"options": {"scan": False}}, "`scan` is True in process 0 and False in process 1"),
    "held": ({"options": {"quantize": "nf4"}}, "`quantize` is None in process 0 and QuantConfig"),
    "sizes": ({"source": "wide"}, "`config.intermediate_size` is 128 in process 0 and 256 in"),
    "numbers": ({"source": "other"}, "`numbers of the tensors` is "),
    "missing": ({"source": "missing"}, "missing"),
    "no mesh": (
        {"mesh": None, "train": True},
        "process 0 has reached `models.load` and process 1 `train.fit`",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    wide = LLAMA.__class__(**{**vars(LLAMA), "intermediate_size": 256})
    for name, seed, config in (("one", 0, LLAMA), ("other", 1, LLAMA), ("wide", 0, wide)):
        model = models.init(jax.random.key(seed), config)
        save_model(place / name, model, model.params)
    return place


def ended(folder, *changes: dict) -> list:
    job = {"source": "one", "mesh": {"fsdp": 2}, "options": {}, "train": False}
    job["port"] = free_port()
    jobs = [{**job, "id": number, **change} for number, change in enumerate(changes)]
    lines = [["-c", PROGRAM, json.dumps({**j, "source": str(folder / j["source"])})] for j in jobs]
    return ends_of(lines, 1, [None] * 2)


@pytest.mark.parametrize("case", CASES)
def test_processes_that_load_different_things_end_with_a_sentence(folder, case):
    changed, expected = CASES[case]
    start = time.monotonic()
    for text, status in ended(folder, {}, changed):
        assert status == 1 and expected in text.strip().splitlines()[-1], text
    # JAX alone waits for 300 s at the exit of the first one. Most of it is for its imports.
    assert time.monotonic() - start < 120


def test_the_same_files_in_other_folders_are_the_same_model(folder, tmp_path):
    (tmp_path / "copy").symlink_to(folder / "one")
    job = {"train": True}
    for text, status in ended(folder, job, {**job, "source": str(tmp_path / "copy")}):
        assert status == 0 and text.strip().endswith("done"), text
