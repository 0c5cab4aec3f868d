"""One process of a run of several: `python process.py '{"id": 0, "count": 2, ...}'`.

It trains a model of tests/support/mesh_runs.py and prints the losses as the last line.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

from lora_jax import models, processes, train
from lora_jax.models.saving import save_merged
from lora_jax.models.sharding import RULES

job: dict[str, Any] = json.loads(sys.argv[1])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
processes.HEARTBEAT = 10
if job["count"] > 1:
    processes.join(f"127.0.0.1:{job['port']}", job["count"], job["id"])

# After `join`: they make arrays.
import lora_jax as lora  # noqa: E402

from tests.support.mesh_runs import KINDS, OWN, adapted, data_of, make  # noqa: E402


def stop(record: dict) -> None:
    if record["kind"] == "train" and record["step"] == job.get("stop_after"):
        if job["id"] == job.get("stopped", 0):
            if job["signal"] == "raise":
                raise RuntimeError("stopped")
            os.kill(os.getpid(), getattr(signal, job["signal"]))


try:
    options, settings, extra = KINDS[job.get("kind", "lora")]
    model = make(**options)
    config, params = adapted(model, settings)
    if job["mesh"]:
        params = lora.sharding.place(params, models.make_mesh(**job["mesh"]), RULES)
    usual = dict(batch_size=16, buckets=1, learning_rate=1e-2, epsilon=1e-3, progress=False)
    training = {**usual, "steps": 10, **extra, **job["training"]}
    examples = data_of(model)[job.get("skip", 0) :]
    result = train.fit(
        model,
        params,
        examples,
        examples[:8] if job.get("evaluate") else None,
        train.TrainConfig(**training),
        hooks=train.Hooks(record=stop),
    )
    if job.get("evaluate"):
        last = next(r["eval_loss"] for r in reversed(result.history) if r["kind"] == "eval")
        loss = train.evaluate(model, result.lora_params, examples[:8], batch_size=8)
        np.testing.assert_allclose(loss, last, rtol=1e-5)
    if "adapter" in job:
        kind = model.config.model_type
        lora.hf.save_peft(job["adapter"], result.lora_params, config, model_type=kind)
    if "merged" in job:
        save_merged(job["merged"], model, result.lora_params)
        lora.hf.save_weights(job["merged"] + "-own", lora.merge(result.lora_params), OWN)
        base = lora.hf.base_of(model.config)
        lora.hf.save_gguf_lora(job["merged"] + ".gguf", result.lora_params, config, base=base)
    if "orbax" in job:
        lora.checkpoint.save(job["orbax"], result.lora_params, config)
        restored = lora.checkpoint.restore_into(job["orbax"], params)
        for x, y in zip(*map(jax.tree.leaves, (restored, result.lora_params)), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
            np.testing.assert_array_equal(processes.whole(x), processes.whole(y))
    print(json.dumps([r["loss"] for r in result.history if r["kind"] == "train"]), flush=True)
except (Exception, SystemExit) as error:
    traceback.print_exc()
    print(f"{type(error).__name__}: {error}", flush=True)
    processes.leave(getattr(error, "status", 1))
