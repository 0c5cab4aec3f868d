"""How fast is a training step of an 8B-shaped Llama on a GPU: LoRA and QLoRA, beside HF PEFT?

    python benchmarks/gpu_train.py            under five minutes on one H200
    python benchmarks/gpu_train.py --tiny     a model of two small layers, on any device

Whole optimizer steps at rank 16 on every linear layer, batch 1, in one process, interleaved:
bfloat16 and NF4 base. PEFT's step on a model of the same shape (eager attention replaced by SDPA,
gradient checkpointing on) where torch sees the GPU. Tokens a second, ratios and peak memory go to
`results/gpu_train.json`.
"""

import argparse
import gc
import importlib.util
import os
import statistics
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

import jax
import jax.numpy as jnp
import llama_step
from common import report

import lora_jax as lora
from lora_jax.models import kernels


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

    def __init__(self, forward, params, tokens, *, rank: int):
        lora_params = llama_step.adapted(forward, params, rank=rank, tokens=tokens)
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
    times: dict[str, list] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def our_rows(size: str, length: int, rounds: int, backend: str, layers: int | None) -> list[dict]:
    forward = llama_step.forward_of(size, length=length, layers=layers)
    tokens = jax.random.randint(jax.random.key(1), (1, length), 0, forward.config.vocab_size)
    params = fresh(forward, jax.random.key(0))
    bases = {"bfloat16": params}
    for form in ("nf4", "int4"):
        bases[form] = llama_step.base_params(params, form, backend=backend)
    runs = {name: Run(forward, base, tokens, rank=16) for name, base in bases.items()}
    seconds = timed(runs, rounds)
    rows = [
        {
            "who": "lora_jax", "base": name,
            "attention": attention_of(forward),
            "tokens_per_s": length / seconds[name],
            "step_over_bfloat16": seconds[name] / seconds["bfloat16"],
            "base_gib": runs[name].base_bytes / 2**30,
            "temporaries_gib": runs[name].memory.temp_size_in_bytes / 2**30,
        }
        for name in runs
    ]  # fmt: skip
    for row in rows:
        print(row, flush=True)  # before PEFT's turn, which a lease may not see
    return rows


def peft_rows(
    size: str, length: int, rounds: int, layers: int | None, device: str = "cuda"
) -> list[dict]:
    """HF PEFT's step on the same shape; empty where torch is not there, or has no such device."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "peft")):
        return []
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return []
    rows = []
    for form in ("bfloat16", "nf4"):
        if form == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            continue
        rows.append(_peft_row(torch, size, length, rounds, form, layers, device))
        print(rows[-1], flush=True)
    return rows


def _peft_row(
    torch, size: str, length: int, rounds: int, form: str, layers: int | None, device: str
) -> dict:
    import peft
    import transformers

    s = llama_step.SIZES[size]
    config = transformers.LlamaConfig(
        hidden_size=s["hidden"], intermediate_size=s["inner"], vocab_size=s["vocab"],
        num_hidden_layers=layers or s["layers"], num_attention_heads=s["heads"],
        num_key_value_heads=s["kv"], attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    if form == "nf4":
        _quantize(torch, model, device)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16,
                                                       target_modules="all-linear"))  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    tokens = torch.randint(0, s["vocab"], (1, length), device=device)
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
    row = {"who": f"PEFT {peft.__version__}", "base": form, "tokens_per_s": length / seconds}
    if device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


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
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    if options.tiny:
        our_rows("tiny", 64, 2, "auto", None)
        peft_rows("tiny", 64, 2, None, device="cpu")
        return
    if jax.default_backend() != "gpu":
        raise SystemExit("this benchmark is for a GPU; `--tiny` runs it on a CPU")
    rows = our_rows("8B", options.length, options.rounds, "gpu", options.layers)
    rows += peft_rows("8B", options.length, options.rounds, options.layers)
    report("gpu_train", "A training step of an 8B-shaped Llama at rank 16", rows)


if __name__ == "__main__":
    main()
