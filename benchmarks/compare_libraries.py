"""One decoder adapted by lora_jax, qwix, Keras and PEFT: what each covers, its time and memory.

    make .venv-integrations/.stamp    # and torch and peft of constraints.txt into it
    PYTHONPATH=. .venv-integrations/bin/python benchmarks/compare_libraries.py

The models are those of compare_models.py, with the same numbers in each framework. Asked for are
adapters on all five weights; one without is left out, in silence if the library neither raised nor
warned. Steps are timed in turn in one process, with adapters on the two layers that all libraries
adapt: float32, 8 rows of 128 tokens, rank 8, Adam. A step's memory is, in JAX, arguments, results
and temporaries of the compiled program; in torch the most that its profiler saw allocated, and the
parameters.
"""

import inspect
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import compare_models as models
import jax
import numpy as np
import optax
import peft
import qwix
import torch
from common import interleaved, ratio, report
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from torch.nn import functional as F

import lora_jax as lora

RANK, ALPHA, RATE = 8, 16, 1e-3
TOKENS = np.random.default_rng(1).integers(0, models.VOCABULARY, (8, 128))
ALL, SHARED = models.NAMES, ("out", "up")
KEY = jax.random.key(0)


class Adapted(NamedTuple):
    """A model with adapters, as a function of arrays.

    Attributes:
      forward: (trained, frozen, tokens) to logits.
      trained, frozen: trees of arrays.
      merged: (trained, frozen, tokens) to the logits after merging; None if the library cannot.
    """

    forward: Callable[..., Any]
    trained: Any
    frozen: Any
    merged: Callable[..., Any] | None = None


# ---- What a user writes to adapt a model: the lines of a function's body are counted -----------


def our_linen(model, params, targets):
    config = lora.LoraConfig(rank=RANK, alpha=ALPHA, target_modules=targets)
    fn, params, _ = lora.linen.functional(model, {"params": params})
    return fn, lora.init(KEY, lora.plan(config, fn, params, TOKENS), params)


def our_nnx(model, targets):
    config = lora.LoraConfig(rank=RANK, alpha=ALPHA, target_modules=targets)
    return lora.nnx.adapt(model, config, TOKENS, key=KEY)


def our_equinox(model, targets):
    config = lora.LoraConfig(rank=RANK, alpha=ALPHA, target_modules=targets)
    fn = lambda model, tokens: model(tokens)  # noqa: E731
    return fn, lora.init(KEY, lora.plan(config, fn, model, TOKENS), model)


def our_keras(model, targets):
    fixed = [v.value for v in model.non_trainable_variables]
    params = {v.path: v.value for v in model.trainable_variables}
    names = [v.path for v in model.trainable_variables]
    fn = lambda p, x: model.stateless_call([p[n] for n in names], fixed, x)[0]  # noqa: E731
    config = lora.LoraConfig(rank=RANK, alpha=ALPHA, target_modules=targets)
    return fn, lora.init(KEY, lora.plan(config, fn, params, TOKENS), params)


def qwix_linen(model, targets):
    paths = ".*" if targets == ALL else f".*({'|'.join(targets)})"
    provider = qwix.LoraProvider(module_path=paths, rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(model, provider)
    return model, model.init(KEY, TOKENS)["params"]


def qwix_nnx(model, targets):
    paths = ".*" if targets == ALL else f".*({'|'.join(targets)})"
    provider = qwix.LoraProvider(module_path=paths, rank=RANK, alpha=ALPHA)
    return qwix.apply_lora_to_model(model, provider, TOKENS, rngs=nnx.Rngs(0))


def keras_own(model, targets):
    # The loop of keras_hub.models.Backbone.enable_lora, for a model that is no Backbone.
    layers = list(model._flatten_layers(include_self=False))
    for layer in layers:
        layer.trainable = False
    for layer in layers:
        if layer.name in targets and hasattr(layer, "enable_lora"):
            layer.trainable = True
            layer.enable_lora(RANK, lora_alpha=ALPHA)


def peft_torch(model, targets):
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[*targets])
    return peft.get_peft_model(model, config)


# ---- Each as a function of arrays ---------------------------------------------------------------


def ours(fn, tree) -> Adapted:
    def call(trained, frozen, tokens):
        return lora.lorafy(fn)(lora.combine(trained, frozen), tokens)

    def merged(trained, frozen, tokens):
        return fn(lora.merge(lora.combine(trained, frozen)), tokens)

    return Adapted(call, *lora.split(tree), merged)


def of_nnx(model, merge=None) -> Adapted:
    graph, trained, rest = nnx.split(model, nnx.LoRAParam, ...)

    def call(trained, rest, tokens):
        return nnx.merge(graph, trained, rest)(tokens)

    return Adapted(call, trained, rest, merge)


def nnx_ours(targets: Sequence[str]) -> Adapted:
    model = our_nnx(models.NnxModel(), targets)
    fn, _, _ = lora.nnx.functional(models.NnxModel())
    adapted = of_nnx(model)
    graph = nnx.split(model, nnx.LoRAParam, ...)[0]

    def merged(trained, rest, tokens):
        return fn(lora.merge(nnx.merge(graph, trained, rest).lora_params()), tokens)

    return adapted._replace(merged=merged)


def linen_qwix(targets: Sequence[str]) -> Adapted:
    base, numbers = models.linen_model()
    model, params = qwix_linen(base, targets)
    trained = {k: x for k, x in flatten_dict(params).items() if "_lora_" in k[-1]}

    def call(trained, frozen, tokens):
        return model.apply({"params": unflatten_dict({**trained, **frozen})}, tokens)

    return Adapted(call, trained, flatten_dict(numbers))


def keras_theirs(targets: Sequence[str]) -> Adapted:
    model = models.keras_model(TOKENS)
    keras_own(model, targets)
    names = [v.path for v in model.trainable_variables]
    fixed = [v.value for v in model.non_trainable_variables]

    def call(trained, fixed, tokens):
        return model.stateless_call([trained[name] for name in names], fixed, tokens)[0]

    return Adapted(call, {v.path: v.value for v in model.trainable_variables}, fixed)


# (framework, library) -> the function that a user writes, and the model adapted by it.
IN_JAX: dict[tuple[str, str], tuple[Callable, Callable[[Sequence[str]], Adapted]]] = {
    ("linen", "lora_jax"): (our_linen, lambda t: ours(*our_linen(*models.linen_model(), t))),
    ("linen", "qwix"): (qwix_linen, linen_qwix),
    ("NNX", "lora_jax"): (our_nnx, nnx_ours),
    ("NNX", "qwix"): (qwix_nnx, lambda t: of_nnx(qwix_nnx(models.NnxModel(), t))),
    ("Equinox", "lora_jax"): (our_equinox, lambda t: ours(*our_equinox(models.equinox_model(), t))),
    ("Keras", "lora_jax"): (our_keras, lambda t: ours(*our_keras(models.keras_model(TOKENS), t))),
    ("Keras", "Keras"): (keras_own, keras_theirs),
}
TORCH = ("torch", "PEFT")
# Whose time and memory a row's are divided by, where it is not our row of the same framework.
BESIDE = {"torch": "NNX"}


# ---- Measured ------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a library did when it was asked for all five weights."""

    adapted: tuple[str, ...]
    said: str
    merge_difference: float | None


def names_in(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(n for n in ALL if any(re.search(f"(?<![a-z]){n}(?![a-z])", p) for p in paths))


def moved(trained):
    """Random factors, as after training."""
    leaves, tree = jax.tree.flatten(trained)
    rng = np.random.default_rng(2)
    return tree.unflatten([rng.normal(0, 0.1, x.shape).astype(np.float32) for x in leaves])


def asked(make: Callable[[Sequence[str]], Adapted]) -> Found:
    """Asks for all five; a library that refuses is asked for the shared two again."""
    said = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Flax's own renamed calls, in qwix, say nothing of adapters.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            model = make(ALL)
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            model = make(SHARED)
    said = said or "; ".join(str(w.message).splitlines()[0] for w in caught)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(model.trained)]
    if model.merged is None:
        return Found(names_in(paths), said, None)
    trained = moved(model.trained)
    y = jax.jit(model.forward)(trained, model.frozen, TOKENS)
    apart = abs(jax.jit(model.merged)(trained, model.frozen, TOKENS) - y).max()
    return Found(names_in(paths), said, float(apart / abs(y).max()))


def step_of(model: Adapted) -> tuple[Callable[[], Any], int]:
    """A jitted step with Adam, and its bytes."""
    tx = optax.adam(RATE)

    def loss(trained, frozen):
        logits = model.forward(trained, frozen, TOKENS)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    def step(trained, state, frozen):
        value, grads = jax.value_and_grad(loss)(trained, frozen)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state = tx.init(model.trained)
    compiled = jax.jit(step).lower(model.trained, state, model.frozen).compile()
    held = compiled.memory_analysis()
    size = held.argument_size_in_bytes + held.output_size_in_bytes + held.temp_size_in_bytes
    kept = [model.trained, state]

    def run():
        *kept[:], value = compiled(*kept, model.frozen)
        return value

    return run, size - held.alias_size_in_bytes


def torch_asked() -> Found:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft_torch(models.TorchModel(), ALL)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    rng = np.random.default_rng(2)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.copy_(torch.from_numpy(rng.normal(0, 0.1, p.shape).astype(np.float32)))
        y = model(torch.from_numpy(TOKENS))
        apart = (model.merge_and_unload()(torch.from_numpy(TOKENS)) - y).abs().max()
    said = "; ".join(str(w.message).splitlines()[0] for w in caught)
    return Found(names_in(names), said, float(apart / y.abs().max()))


def torch_step() -> tuple[Callable[[], Any], int]:
    model = peft_torch(models.TorchModel(), SHARED)
    trained = [p for p in model.parameters() if p.requires_grad]
    adam, tokens = torch.optim.Adam(trained, RATE), torch.from_numpy(TOKENS)

    def run():
        logits = model(tokens)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        adam.step()
        adam.zero_grad()
        return float(loss.detach())

    run()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as seen:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    totals = [x["args"]["Total Allocated"] for x in events if x["name"] == "[memory]"]
    held = sum(p.nbytes for p in model.parameters()) + 2 * sum(p.nbytes for p in trained)
    return run, held + max(totals) - totals[0]


def lines_of(function: Callable) -> int:
    source = inspect.getsource(function).splitlines()[1:]
    return sum(not line.strip().startswith("#") for line in source)


def main() -> None:
    torch.set_num_threads(2)
    found = {name: asked(make) for name, (_, make) in IN_JAX.items()} | {TORCH: torch_asked()}
    steps = {name: step_of(make(SHARED)) for name, (_, make) in IN_JAX.items()}
    steps[TORCH] = torch_step()
    keys = {name: "/".join(name) for name in steps}
    times = interleaved({keys[n]: run for n, (run, _) in steps.items()}, rounds=15, warmup=3)
    rows = []
    for name, (adapted, said, merge) in found.items():
        beside = (BESIDE.get(name[0], name[0]), "lora_jax")
        function = peft_torch if name == TORCH else IN_JAX[name][0]
        rows.append(
            {
                "framework": name[0],
                "library": name[1],
                "lines": lines_of(function),
                "adapted": " ".join(adapted),
                "left out": " ".join(n for n in ALL if n not in adapted),
                "said": said,
                "merge differs by": merge,
                "step / ours": ratio(times, keys[name], keys[beside]),
                "memory / ours": steps[name][1] / steps[beside][1],
            }
        )
    versions = {name: metadata.version(name) for name in ("qwix", "keras", "peft", "torch", "flax")}
    question = "What do four libraries adapt of one model, and what does a step take?"
    report("compare_libraries", question, rows, versions=versions)


if __name__ == "__main__":
    main()
