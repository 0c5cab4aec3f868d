"""The models whose memory is estimated: known shapes, config.json files and hub ids."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lora_jax.config.arguments import kind_of
from lora_jax.files import read_object
from lora_jax.hf.hub import snapshot
from lora_jax.models.gguf import read_config
from lora_jax.models.loading import find_smollm2, held
from lora_jax.models.model import Dtype
from lora_jax.models.registry import config_from_hf
from lora_jax.paths import nearest, spell
from lora_jax.quant.array import QuantArray, is_quant
from lora_jax.quant.loading import FILE

_LLAMA_2: Mapping[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA_3: Mapping[str, Any] = {
    **_LLAMA_2, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
_LLAMA_31: Mapping[str, Any] = {**_LLAMA_3, "max_position_embeddings": 131072}
_QWEN_2: Mapping[str, Any] = {
    **_LLAMA_2, "model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768,
}  # fmt: skip
_QWEN_3: Mapping[str, Any] = {
    **_QWEN_2, "model_type": "qwen3", "max_position_embeddings": 40960, "head_dim": 128,
}  # fmt: skip
_GEMMA_2: Mapping[str, Any] = {
    **_LLAMA_2, "model_type": "gemma2", "vocab_size": 256000, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "sliding_window": 4096, "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip


def _sizes(*, width: int, mlp: int, layers: int, heads: int, kv: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


_SMOLLM2: Mapping[str, Any] = {
    **_LLAMA_2, **_sizes(width=576, mlp=1536, layers=30, heads=9, kv=3), "vocab_size": 49152,
    "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True,
}  # fmt: skip

# The fields of these models' config.json that determine shapes, so that no file is needed.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": {**_LLAMA_2, **_sizes(width=4096, mlp=11008, layers=32, heads=32, kv=32)},
    "llama-2-13b": {**_LLAMA_2, **_sizes(width=5120, mlp=13824, layers=40, heads=40, kv=40)},
    "llama-2-70b": {**_LLAMA_2, **_sizes(width=8192, mlp=28672, layers=80, heads=64, kv=8)},
    "llama-3-8b": {**_LLAMA_3, **_sizes(width=4096, mlp=14336, layers=32, heads=32, kv=8)},
    "llama-3-70b": {**_LLAMA_3, **_sizes(width=8192, mlp=28672, layers=80, heads=64, kv=8)},
    "llama-3.1-8b": {**_LLAMA_31, **_sizes(width=4096, mlp=14336, layers=32, heads=32, kv=8)},
    "llama-3.1-70b": {**_LLAMA_31, **_sizes(width=8192, mlp=28672, layers=80, heads=64, kv=8)},
    "llama-3.1-405b": {**_LLAMA_31, **_sizes(width=16384, mlp=53248, layers=126, heads=128, kv=8)},
    "llama-3.2-1b": {
        **_LLAMA_31, **_sizes(width=2048, mlp=8192, layers=16, heads=32, kv=8),
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        **_LLAMA_31, **_sizes(width=3072, mlp=8192, layers=28, heads=24, kv=8),
        "tie_word_embeddings": True,
    },
    "mistral-7b": {
        **_LLAMA_2, **_sizes(width=4096, mlp=14336, layers=32, heads=32, kv=8),
        "model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096,
    },
    "mixtral-8x7b": {
        **_LLAMA_2, **_sizes(width=4096, mlp=14336, layers=32, heads=32, kv=8),
        "model_type": "mixtral", "max_position_embeddings": 32768, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3-30b-a3b": {
        **_QWEN_3, **_sizes(width=2048, mlp=6144, layers=48, heads=32, kv=4),
        "model_type": "qwen3_moe", "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True,
    },
    "qwen2.5-0.5b": {
        **_QWEN_2, **_sizes(width=896, mlp=4864, layers=24, heads=14, kv=2),
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **_QWEN_2, **_sizes(width=3584, mlp=18944, layers=28, heads=28, kv=4), "vocab_size": 152064,
    },
    "qwen3-0.6b": {
        **_QWEN_3, **_sizes(width=1024, mlp=3072, layers=28, heads=16, kv=8),
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {**_QWEN_3, **_sizes(width=4096, mlp=12288, layers=36, heads=32, kv=8)},
    "qwen3-32b": {**_QWEN_3, **_sizes(width=5120, mlp=25600, layers=64, heads=64, kv=8)},
    "gemma-2-2b": {
        **_GEMMA_2, **_sizes(width=2304, mlp=9216, layers=26, heads=8, kv=4), "head_dim": 256,
    },
    "gemma-2-9b": {
        **_GEMMA_2, **_sizes(width=3584, mlp=14336, layers=42, heads=16, kv=8), "head_dim": 256,
    },
    "phi-3-mini": {
        **_LLAMA_2, **_sizes(width=3072, mlp=8192, layers=32, heads=32, kv=32),
        "model_type": "phi3", "vocab_size": 32064,
    },
    "smollm2-135m": _SMOLLM2,
    "smollm2": _SMOLLM2,
    "gpt2": {"model_type": "gpt2"},
    "bert-base": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
}  # fmt: skip


def config_of(model: str | Path | Mapping[str, Any] | Any) -> tuple[str, Any]:
    """The display name and the configuration of a model.

    Args:
      model: a name of `SHAPES`, the path of a config.json, of its directory or of a .gguf file, a
        hub id (of which config.json alone is fetched), the object in it, or a configuration such
        as `lora_jax.models.LlamaConfig`.

    Raises:
      FileNotFoundError: no such name, file or directory.
      ValueError: an unknown model type or field, or a file that is not JSON.
    """
    if isinstance(model, Mapping):
        return str(model.get("model_type")), config_from_hf(model)
    if not isinstance(model, str | Path):
        if not hasattr(model, "num_hidden_layers"):
            raise ValueError(
                f"`model` must be a name, a path, the object in a config.json or a configuration, "
                f"got {type(model).__name__}"
            )
        return str(model.model_type), model
    if str(model).lower() in SHAPES:
        return str(model).lower(), config_from_hf(SHAPES[str(model).lower()])
    path = Path(model)
    # A hub id is two names with a slash between them; a path may look the same, and goes first.
    # Its dots are no suffixes: Qwen/Qwen2.5-0.5B.
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model)) and path.suffix != ".json"
    if not path.exists() and is_id:
        return str(model), _from_path(snapshot(str(model), patterns=("config.json",)))[1]
    return _from_path(path)


class Held(NamedTuple):
    """How the files of a model hold its weights.

    Attributes:
      scan: which blocks are stacked together, as `forward_of` takes it.
      leaves: the quantized leaves by their path, without arrays.
    """

    scan: bool | tuple[int, ...]
    leaves: Mapping[str, QuantArray]

    def __str__(self) -> str:
        return FILE


def held_of(model: Any, dtype: Dtype) -> Held:
    """What `models.load(model, quantize="file")` holds.

    Args:
      model: as of `config_of`, but one with files.
      dtype: of the weights that are floats.

    Raises:
      ValueError: a model without files, or whose files hold floats.
    """
    path = Path(model) if isinstance(model, str | Path) else None
    path = find_smollm2() if str(path) == "smollm2" else path
    if path is None or not path.exists():
        named = f"`{model}`" if isinstance(model, str) else kind_of(model)
        raise ValueError(
            f'quantize="{FILE}" keeps the blocks of a model\'s files, and `model`, {named}, is no '
            'directory or .gguf file: give its path, or name a format, quantize="nf4"'
        )
    forward, params = held(path.parent if path.suffix == ".json" else path, dtype=dtype)
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quant)
    return Held(forward.scan, {spell(at): x for at, x in found if is_quant(x)})


def _from_path(path: Path) -> tuple[str, Any]:
    if not path.exists():
        raise FileNotFoundError(
            f"`model`: `{path}` is no file or directory, and no known shape (nearest: "
            f"{nearest(str(path).lower(), SHAPES)}); give a hub id, or the path of a config.json"
        )
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".gguf":
        return path.name, read_config(file)
    if file.suffix != ".json":
        raise ValueError(f"{file}: not a config.json; give its path, its directory's or a .gguf's")
    raw = read_object(file)
    # The fields' own errors do not name the file.
    try:
        return path.name if path.is_dir() else str(path), config_from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
