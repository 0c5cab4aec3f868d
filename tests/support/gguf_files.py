"""GGUF files of tiny models and adapters, written by the gguf package as llama.cpp's tools do."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants

import lora_jax as lora
from lora_jax import models
from lora_jax.quant.gguf import GGUF_KINDS
from lora_jax.recipes.finetune import plan_model

from tests.support.peft_trees import randomized
from tests.support.tiny import SMALL

# No value that a file states is a default, so that none is right unless it was read.
TIED = dataclasses.replace(
    SMALL,
    vocab_size=40,
    rms_norm_eps=1e-5,
    rope_theta=5000.0,
    tie_word_embeddings=True,
    eos_token_ids=(3,),
    initializer_range=0.02,
)
UNTIED = models.LlamaConfig.from_hf({**TIED.to_hf(), "tie_word_embeddings": False})

# Our name of a part of a block -> llama.cpp's.
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}


@contextlib.contextmanager
def writing(path: Path, arch: str = "llama") -> Iterator[GGUFWriter]:
    """Yields a writer, and writes the file at the end."""
    writer = GGUFWriter(path, arch)
    yield writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_config(writer: GGUFWriter, config: models.LlamaConfig) -> None:
    """Adds the keys that every Llama file has."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def write_model(
    path: Path,
    config: models.LlamaConfig,
    tensors: Mapping[str, np.ndarray],
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    arch: str = "llama",
    keys: Mapping[str, tuple[str, Any]] | None = None,
    eos: int = 3,
) -> Path:
    """Writes a model, its matrices as blocks of `kind`.

    Args:
      path: of the file.
      config: of the model.
      tensors: from `tensors_of`.
      kind: of the matrices.
      arch: llama.cpp's name of the family.
      keys: further keys: key to the type in the writer's method (`add_uint32`) and the value.
      eos: the token that ends a text.
    """
    with writing(path, arch) as writer:
        add_config(writer, config)
        writer.add_eos_token_id(eos)
        for key, (add, value) in (keys or {}).items():
            getattr(writer, f"add_{add}")(key, value)
        for name, tensor in tensors.items():
            if tensor.ndim == 2 and kind != GGMLQuantizationType.F32:
                writer.add_tensor(name, quants.quantize(tensor, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, tensor)
    return path


def tokenizer_keys(tokenizer: Any) -> dict[str, tuple[str, Any]]:
    """The keys of a byte-level tokenizer, for `write_model`."""
    backend = json.loads(tokenizer.backend.to_str())
    tokens = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].get)
    special = {token["content"] for token in backend["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]]
    return {
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", "gpt-2"),
        "tokenizer.ggml.tokens": ("array", tokens),
        "tokenizer.ggml.merges": ("array", merges),
        "tokenizer.ggml.token_type": ("array", [3 if t in special else 1 for t in tokens]),
        "tokenizer.chat_template": ("string", tokenizer.chat_template),
    }


def tensors_of(model: models.Model) -> dict[str, np.ndarray]:
    """The model's tensors under llama.cpp's names, in its order of rows."""
    inner = model.params["model"]
    out = {
        "token_embd.weight": inner["embed_tokens"]["embedding"],
        "output_norm.weight": inner["norm"]["scale"],
    }
    if "lm_head" in model.params:
        out["output.weight"] = model.params["lm_head"]["kernel"].T
    layers = inner["layers"]
    parts = {**layers["self_attn"], **layers["mlp"]}
    parts |= {name: layers[name] for name in layers if name.endswith("norm")}
    heads = {
        "q_proj": model.config.num_attention_heads,
        "k_proj": model.config.num_key_value_heads,
    }
    for name, leaves in parts.items():
        for kind, leaf in leaves.items():
            for i, block in enumerate(np.asarray(leaf)):
                block = block.T if kind == "kernel" else block
                block = _permuted(block, heads[name]) if name in heads else block
                ending = "bias" if kind == "bias" else "weight"
                out[f"blk.{i}.{NAMES[name]}.{ending}"] = block
    return {name: np.ascontiguousarray(tensor) for name, tensor in out.items()}


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k, as its converter makes it."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_lora(
    path: Path,
    tensors: Mapping[str, Any],
    *,
    keys: Mapping[str, str] | None = None,
    arch: str = "llama",
    kind: str = "adapter",
    alpha: float | None = 8.0,
) -> Path:
    """Writes an adapter; every argument can be one that no reader should take."""
    with writing(path, arch) as writer:
        writer.add_type(kind)
        for key, value in {"adapter.type": "lora", **(keys or {})}.items():
            writer.add_string(key, value)
        if alpha is not None:
            writer.add_float32("adapter.lora.alpha", alpha)
        for name, tensor in tensors.items():
            writer.add_tensor(name, np.asarray(tensor, np.float32))
    return path


def pair(
    name: str = "blk.0.attn_v", rank: int = 2, rows: int = 16, columns: int = 32
) -> dict[str, np.ndarray]:
    """The two tensors of one adapted weight."""
    rng = np.random.default_rng(rank)
    return {
        f"{name}.weight.lora_a": rng.normal(size=(rank, columns)),
        f"{name}.weight.lora_b": rng.normal(size=(rows, rank)),
    }


def config_with(**fields: Any) -> lora.LoraConfig:
    return lora.LoraConfig(
        **{"rank": 4, "alpha": 6, "target_modules": ("q_proj", "v_proj"), **fields}
    )


def adapted(model: models.Model, lora_config: lora.LoraConfig, seed: int = 3) -> Any:
    """The model's parameters with random adapters where the config means them."""
    blank = lora.init(jax.random.key(0), plan_model(model, lora_config), model.params)
    return randomized(blank, lora_config, seed)


def as_llama_cpp(base_path: Path, adapter_path: Path) -> dict[str, np.ndarray]:
    """The base's weights after llama.cpp's `llama_adapter_lora_init` and `build_lora_mm`.

    Written from those functions alone; `ne` is ggml's order of dimensions, the fastest first.
    """
    base = {t.name: t for t in GGUFReader(base_path).tensors}
    file = GGUFReader(adapter_path)
    field = {name: value.contents() for name, value in file.fields.items()}
    assert field["general.type"] == "adapter" and field["adapter.type"] == "lora"
    arch = GGUFReader(base_path).get_field("general.architecture")
    assert arch is not None and field["general.architecture"] == arch.contents()
    found = {t.name: t for t in file.tensors}
    out = {name: np.array(t.data, np.float32) for name, t in base.items()}
    for name in {n.rpartition(".")[0] for n in found}:
        a, b, w = found[f"{name}.lora_a"], found[f"{name}.lora_b"], base[name]
        a_ne, b_ne, w_ne = (list(map(int, t.shape)) for t in (a, b, w))
        scale = field["adapter.lora.alpha"] / b_ne[0]
        values = [quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in (a, b)]
        if name == "token_embd.weight":
            assert w_ne[0] == b_ne[1] and w_ne[1] == a_ne[1] and a_ne[0] == b_ne[0]
            change = values[0] @ values[1].T  # get_rows(a), then mul_mat(b, .)
        else:
            assert w_ne[0] == a_ne[0] and w_ne[1] == b_ne[1] and a_ne[1] == b_ne[0]
            change = values[1] @ values[0]  # mul_mat(b, mul_mat(a, x))
        out[name] = out[name] + (scale * change).astype(np.float32)
    return out


def gguf_bytes(kind, outputs=256, inputs=512, seed=0):
    """Random blocks: every bit of codes and scales of integers, halves near 1/100."""
    rng, row = np.random.default_rng(seed), GGUF_KINDS[kind]
    raw = rng.integers(0, 256, (outputs, inputs // row.inputs, row.size)).astype(np.uint8)
    for field in (row.scale, row.bias, row.scale2):
        if field is not None and field[2] == "float16":
            halves = rng.standard_normal((*raw.shape[:2], 1)).astype(np.float16) / 100
            raw[..., field[0] : field[1]] = halves.view(np.uint8)
    return raw.reshape(outputs, -1)
