"""How fast is a LoRA step of a Llama's shape on a GPU, beside HF PEFT?

    python benchmarks/gpu_train.py                 under eight minutes on one H200
    python benchmarks/gpu_train.py --only "8B 2k"  one setting
    python benchmarks/gpu_train.py --tiny          a model of two small layers, on any device

Whole optimizer steps of the settings below, all in one process. "3B q,v" is that of PEFT's public
comparison on MetaMathQA (Llama-3.2-3B, rank 32 on q and v, four rows a step), whose rows hold 341
tokens on average. PEFT's attention is FlashAttention 2 where its package is installed, else
PyTorch's own; where blocks are rematerialized here, there is gradient checkpointing there. Tokens a
second, ratios and memory go to `results/gpu_train.json` after each setting.
"""

import argparse
import gc
import importlib.util
import os
import statistics
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

import jax
import jax.numpy as jnp
import llama_step
from common import interleaved, report

import lora_jax as lora
from lora_jax.models import kernels


class Setting(NamedTuple):
    """A model, its adapters, a batch without padding, and the forms of the base."""

    name: str
    size: str
    rank: int
    targets: str | tuple[str, ...]
    rows: int
    length: int
    remat: bool
    bases: tuple[str, ...]


SETTINGS = (
    Setting("8B 2k", "8B", 16, "all-linear", 1, 2048, True, ("bfloat16", "nf4", "int4")),
    Setting("3B q,v", "3B", 32, ("q_proj", "v_proj"), 4, 384, False, ("bfloat16",)),
    Setting("8B 8k", "8B", 16, "all-linear", 1, 8192, True, ("bfloat16", "nf4")),
)
TINY = (
    Setting("all", "tiny", 16, "all-linear", 1, 64, True, ("bfloat16", "nf4", "int4")),
    Setting("q,v", "tiny", 4, ("q_proj", "v_proj"), 2, 32, False, ("bfloat16",)),
)


def fresh(forward, key):
    """Parameters of the right size, made leaf by leaf."""
    leaves, tree = jax.tree.flatten(forward.shapes())
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            jax.jit(lambda k, s=s: jax.random.normal(k, s.shape, jnp.bfloat16) / 64)(k)
            for k, s in zip(keys, leaves, strict=True)
        ],
    )


class Run:
    """A step that is called again and again; its state is donated and kept here."""

    def __init__(self, forward, params, tokens, setting: Setting):
        lora_params = llama_step.adapted(
            forward, params, rank=setting.rank, tokens=tokens, targets=setting.targets
        )
        trainable, frozen = lora.split(lora_params)
        self.state = (trainable, llama_step.optimizer().init(trainable))
        self.rest = (frozen, tokens)
        step = jax.jit(llama_step.lora_step(forward), donate_argnums=(0, 1))
        self.program = step.lower(*self.state, *self.rest).compile()
        self.memory = self.program.memory_analysis()
        self.base_bytes = sum(x.nbytes for x in jax.tree.leaves(frozen))

    def __call__(self) -> float:
        *state, loss = self.program(*self.state, *self.rest)
        self.state = tuple(state)
        return float(loss)


def attention_of(forward) -> str:
    """The attention that `auto` takes here."""
    case = kernels.Case(*kernels.target(), dtype=jnp.dtype(forward.dtype),
                        size=forward.config.head_dim, apart=kernels.apart())  # fmt: skip
    return kernels.choose("auto", case).name


def timed(runs: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each, called in turn; the first round is not counted."""
    times = interleaved(runs, rounds=rounds)
    return {name: statistics.median(t) for name, t in times.items()}


def our_rows(setting: Setting, rounds: int, backend: str, layers: int | None) -> list[dict]:
    """Our steps over each form of the base, interleaved."""
    forward = llama_step.forward_of(
        setting.size, length=setting.length, layers=layers, remat=setting.remat
    )
    shape = (setting.rows, setting.length)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, forward.config.vocab_size)
    params = fresh(forward, jax.random.key(0))
    runs = {}
    for form in setting.bases:
        quantized = None if form == "bfloat16" else form
        base = llama_step.base_params(params, quantized, backend=backend)
        runs[form] = Run(forward, base, tokens, setting)
    seconds = timed(runs, rounds)
    rows = [
        {
            "setting": setting.name, "who": "lora_jax", "base": name,
            "attention": attention_of(forward),
            "tokens_per_s": tokens.size / seconds[name],
            "step_over_bfloat16": seconds[name] / seconds["bfloat16"],
            "base_gib": run.base_bytes / 2**30,
            "temporaries_gib": run.memory.temp_size_in_bytes / 2**30,
        }
        for name, run in runs.items()
    ]  # fmt: skip
    for row in rows:
        print(row, flush=True)  # before PEFT's turn, which a lease may not see
    return rows


def peft_rows(
    setting: Setting, ours: list[dict], rounds: int, layers: int | None, device: str = "cuda"
) -> list[dict]:
    """HF PEFT's step on the same shape; empty where torch is not there, or has no such device.

    The ratio of our tokens a second to PEFT's is in PEFT's row.
    """
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "peft")):
        return []
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return []
    rows = []
    for form in setting.bases:
        if form == "int4":  # bitsandbytes has no such format
            continue
        if form == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            continue
        row = _peft_row(torch, setting, form, rounds, layers, device)
        speed = next(r["tokens_per_s"] for r in ours if r["base"] == form)
        rows.append(row | {"lora_jax / PEFT": speed / row["tokens_per_s"]})
        print(rows[-1], flush=True)
    return rows


def _peft_row(
    torch, setting: Setting, form: str, rounds: int, layers: int | None, device: str
) -> dict[str, Any]:
    import peft

    model, attention = _peft_base(torch, setting, layers, device)
    if form == "nf4":
        _quantize(torch, model, device)
    if setting.remat:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    targets = setting.targets if isinstance(setting.targets, str) else list(setting.targets)
    config = peft.LoraConfig(r=setting.rank, lora_alpha=16, target_modules=targets)
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    vocabulary = llama_step.SIZES[setting.size]["vocab"]
    tokens = torch.randint(0, vocabulary, (setting.rows, setting.length), device=device)
    if device == "cuda":  # of the step, not of what it was made from
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def step():
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = timed({form: step}, rounds)[form]
    row = {
        "setting": setting.name, "who": f"PEFT {peft.__version__}", "base": form,
        "attention": attention, "tokens_per_s": tokens.numel() / seconds,
    }  # fmt: skip
    if device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def _peft_base(torch, setting: Setting, layers: int | None, device: str):
    """A model of transformers in bfloat16 with the fastest attention here, and its name."""
    import transformers

    s = llama_step.SIZES[setting.size]
    flash = device == "cuda" and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    config = transformers.LlamaConfig(
        hidden_size=s["hidden"], intermediate_size=s["inner"], vocab_size=s["vocab"],
        num_hidden_layers=layers or s["layers"], num_attention_heads=s["heads"],
        num_key_value_heads=s["kv"], tie_word_embeddings=s.get("tied", False),
        attn_implementation=attention, use_cache=False, dtype="bfloat16",
    )  # fmt: skip
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    return model, attention


def _quantize(torch, model, device: str):
    """Replaces the linear layers of the blocks by bitsandbytes' NF4 ones."""
    import bitsandbytes as bnb

    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, torch.nn.Linear):
                    new = bnb.nn.Linear4bit(
                        layer.in_features, layer.out_features, bias=False,
                        compute_dtype=torch.bfloat16, quant_type="nf4",
                    )  # fmt: skip
                    new.weight = bnb.nn.Params4bit(
                        layer.weight.data.cpu(), requires_grad=False, quant_type="nf4"
                    )
                    setattr(parent, name, new.to(device))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true",
                        help="two small layers, on any device; PEFT on the CPU")  # fmt: skip
    parser.add_argument("--only", choices=[s.name for s in SETTINGS])
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    if options.tiny:
        for setting in TINY:
            peft_rows(setting, our_rows(setting, 2, "auto", None), 2, None, device="cpu")
        return
    if jax.default_backend() != "gpu":
        raise SystemExit("this benchmark is for a GPU; `--tiny` runs it on a CPU")
    rows: list[dict] = []
    for setting in SETTINGS:
        if options.only in (None, setting.name):
            ours = our_rows(setting, options.rounds, "gpu", options.layers)
            rows += ours
            gc.collect()  # the arrays of that setting, for torch
            rows += peft_rows(setting, ours, options.rounds, options.layers)
            gc.collect()
            report("gpu_train", "A training step of a Llama's shape", rows)


if __name__ == "__main__":
    main()
