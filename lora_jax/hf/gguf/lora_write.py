"""Writing adapters as llama.cpp's GGUF LoRA files; `lora_read` reads them.

    PEFT       lora_A (r, in)   lora_B (out, r)   scale: alpha/r or alpha/√r, per module
    llama.cpp  lora_a (r, in)   lora_b (out, r)   scale: adapter.lora.alpha / r, one alpha

The file has one alpha. Where a module's scale is not `alpha / r`, the ratio is multiplied into its
B. More things differ: rows of B, and columns of A, follow the order of the base's tensors
(`layout`); a weight that is two tensors there has two pairs; an embedding's A is (vocabulary, r);
and llama.cpp holds a head that is tied to the embedding as one tensor with it, so that neither can
be adapted.

Source: llama.cpp's `convert_lora_to_gguf.py`, `src/llama-adapter.cpp` (what is read),
`src/llama-adapter.h` (`get_scale`), `src/llama-graph.cpp` (`build_lora_mm`, `build_inp_embd`).
"""

import errno
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from lora_jax import processes
from lora_jax.array import leaves_by_path
from lora_jax.compat import require
from lora_jax.config import matching
from lora_jax.config.arguments import check_argument
from lora_jax.config.lora import LoraConfig
from lora_jax.config.starts import base_change
from lora_jax.files import replacing
from lora_jax.hf.gguf.experts import GATE_UP, FactorPair, apart, multiplied, multipliers
from lora_jax.hf.gguf.file import open_gguf
from lora_jax.hf.gguf.halves import halved
from lora_jax.hf.gguf.names import Base, column_order_of, gguf_names, row_order_of
from lora_jax.hf.gguf.places import QKV
from lora_jax.hf.hub import is_hub_id
from lora_jax.hf.peft.base_names import BASE_NAME, with_name
from lora_jax.hf.peft.experts import fused
from lora_jax.hf.peft.index import BASE, PREFIX, parameter_of, with_fused_experts
from lora_jax.hf.peft.prefixes import respelled
from lora_jax.hf.peft.save import to_peft
from lora_jax.hf.peft.tensors import SWAPPED
from lora_jax.paths import nearest

DTYPES = ("float32", "float16", "bfloat16")

LINEAR = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}  # gguf's LlamaFileType
HUB = "https://huggingface.co/"
_MERGE = "merge the adapter into the model (`lora.merge`) and convert the merged model instead"


class Content(NamedTuple):
    """The content of a GGUF LoRA file: alpha, tensors by llama.cpp's names, the base's name."""

    alpha: float
    tensors: dict[str, np.ndarray]
    base_name: str | None = None


def save_gguf_lora(
    path: str | os.PathLike,
    lora_params: Any,
    config: LoraConfig,
    *,
    base: Base,
    dtype: str = "float32",
    name: str | None = None,
    base_model_name: str | os.PathLike | None = None,
) -> None:
    """Writes an adapter as a GGUF LoRA file (`llama-cli --lora`), whole or not at all.

    Of several processes all have to call it, and the first one writes.

    Args:
      path: the file; an existing one is replaced.
      lora_params: tree with the adapter.
      config: the config the adapter was made with.
      base: the model it is for: `lora_jax.models.gguf.base_of(model.config)`.
      dtype: "float32", "float16" or "bfloat16".
      name: written as `general.name`.
      base_model_name: Hub id or path of the base model, for `general.base_model`.

    Raises:
      ValueError: llama.cpp could not apply the adapter, the tree and the config disagree, or a
        number is not finite or does not fit the dtype.
      OSError: the file cannot be written; an existing one is intact.

    Example:
      save_gguf_lora("adapter.gguf", params, config, base=base_of(model.config))
    """
    check_argument("hf.save_gguf_lora(path, lora_params, config, base=base)", "base", base, Base)
    row = base.row
    tensors = to_peft(lora_params, config, model_type=row.model_type)[1]
    config = with_fused_experts(leaves_by_path(lora_params), config, row.model_type)
    config = with_name(config, base_model_name)
    content = to_gguf(tensors, config, base, multipliers(lora_params, row))
    processes.by_first(lambda: write_gguf_lora(path, content, base, dtype=dtype, name=name))


def to_gguf(
    tensors: Mapping[str, np.ndarray],
    config: LoraConfig,
    base: Base,
    by: Mapping[str, np.ndarray] | None = None,
) -> Content:
    """The content of a GGUF LoRA file from that of a PEFT directory.

    `by` are the base's `multipliers`, None without its weights.

    Raises:
      ValueError: llama.cpp could not apply the adapter.
    """
    # llama.cpp reads A, B and one alpha, and ignores anything else without an error.
    _check_plain(config)
    names = gguf_names(base)
    # llama.cpp names a decoder alike wherever it is.
    config, tensors = respelled(config, tensors, names)
    row = base.row
    if row.experts:
        paths, swapped = [f".{row.experts}.{GATE_UP}"], row.model_type in SWAPPED
        config, tensors = fused(config, tensors, paths, "the adapter", swapped=swapped)
    pairs = _pairs(tensors, config, base)
    for outer in row.encoder:
        pairs = {module.removeprefix(f"{outer}."): pair for module, pair in pairs.items()}
    _check_applied(pairs, base)
    pairs = multiplied(halved(pairs, base), row, by)
    alpha = _common_alpha(pairs)
    for module in pairs:
        if module not in names:
            raise ValueError(
                f"llama.cpp's architecture `{base.architecture}` has no place for an adapter of "
                f"`{module}`; nearest: {nearest(module, names, 1)}; {_MERGE}"
            )
        # llama.cpp applies an adapter by the tensor's name, and a tied head has none of its own.
        if base.tied and names[module] in ("token_embd", "output"):
            raise ValueError(
                f"llama.cpp cannot apply an adapter of `{module}` where the output head is the "
                f"embedding table: to it both are one tensor; {_MERGE}"
            )
    out = {}
    for module in (m for m in names if m in pairs):  # the same order for every source
        a, b = _in_file(module, pairs[module], alpha, base)
        out[f"{names[module]}.weight.lora_a"], out[f"{names[module]}.weight.lora_b"] = a, b
    return Content(alpha, out, config.extra.get(BASE_NAME))


def _check_applied(pairs: Mapping[str, FactorPair], base: Base) -> None:
    row = base.row
    own = [name for name in pairs if base.fused_qkv and name.endswith(QKV)]
    if own:
        raise ValueError(
            f"the base's file has queries, keys and values in one tensor, beside which llama.cpp "
            f"takes no adapter of `{own[0]}`: convert the base without --fuse-qkv, or {_MERGE}"
        )
    if names := [name for name in pairs if name.endswith(row.unadapted)]:
        applied = (name.rpartition(".")[2] for name in row.linears if name not in row.unadapted)
        raise ValueError(
            f"llama.cpp's architecture `{base.architecture}` reads an adapter of `{names[0]}` but "
            f"computes without it; it applies those of {', '.join(dict.fromkeys(applied))} and "
            f"experts; {_MERGE}"
        )


def _check_plain(config: LoraConfig) -> None:
    for on, what in (
        (config.use_dora, "DoRA (use_dora=True)"),
        (config.bias != "none", f'trained biases (bias="{config.bias}")'),
        (
            base_change(config.init) == "repeatable",
            f'a changed base weight (init="{config.init}"; see `lora.rebase`)',
        ),
        (config.modules_to_save, f"whole saved modules ({', '.join(config.modules_to_save)})"),
    ):
        if on:
            raise ValueError(f"llama.cpp cannot apply an adapter with {what}; {_MERGE}")


def _pairs(
    tensors: Mapping[str, np.ndarray], config: LoraConfig, base: Base
) -> dict[str, FactorPair]:
    pairs = {}
    for key, a in tensors.items():
        for (in_a, in_b), embedding in ((LINEAR, False), (EMBEDDING, True)):
            if not key.endswith(in_a):
                continue
            module = key.removesuffix(in_a).removeprefix(PREFIX)
            b = tensors.get(key.removesuffix(in_a) + in_b)
            if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise ValueError(f"`{key}`: no pair of matrices (r, in) and (out, r) with its B")
            parameter = parameter_of(module, config) if _is_experts(module) else None
            name = parameter or module
            rank = matching.rank_of(config, name) if parameter else a.shape[0]
            scale = matching.scale_of(config, rank, matching.alpha_of(config, name))
            pair = FactorPair(a, b, scale * rank, embedding)
            row = base.row
            pairs |= apart(parameter, pair, rank, row) if parameter else {module: pair}
    _check_rest(tensors, pairs, base)
    return pairs


def _is_experts(module: str) -> bool:
    return module.removesuffix(BASE).endswith(".experts")


def _check_rest(
    tensors: Mapping[str, np.ndarray], pairs: Mapping[str, FactorPair], base: Base
) -> None:
    """Refuses tensors but pairs, and the base weights that PEFT repeats beside an embedding."""
    for key, value in tensors.items():
        if key.endswith((*LINEAR, *EMBEDDING)):
            continue
        module = key.removesuffix(".base_layer.weight").removeprefix(PREFIX)
        if module in pairs and value.shape[0] == base.vocab_size:
            continue
        raise ValueError(
            f"llama.cpp cannot apply `{key}`: it reads pairs of lora_A and lora_B only; {_MERGE}"
        )


def _common_alpha(pairs: Mapping[str, FactorPair]) -> float:
    """The alpha with which most modules keep their B as it is."""
    if not pairs:
        raise ValueError("the adapter has no pair of lora_A and lora_B; there is nothing to write")
    # Rounded to float32 as the file stores it, so that equal scales of different ranks count alike.
    wanted = Counter(float(np.float32(pair.alpha)) for pair in pairs.values())
    return wanted.most_common(1)[0][0]


def _in_file(
    module: str, pair: FactorPair, alpha: float, base: Base
) -> tuple[np.ndarray, np.ndarray]:
    a, b = (x.astype(np.float32, copy=False) for x in (pair.a, pair.b))
    # Where the file's alpha is right, B is written to the bit.
    if np.float32(pair.alpha) != np.float32(alpha):
        b = b * np.float32(pair.alpha / alpha)
    if (order := row_order_of(module, len(b), base)) is not None:
        # The base's rows are in llama.cpp's order: the adapter's must be too.
        b = b[order]
    if (order := column_order_of(module, a.shape[-1], base)) is not None:
        a = a[:, order]
    return np.ascontiguousarray(a.T if pair.embedding else a), np.ascontiguousarray(b)


def write_gguf_lora(
    path: str | os.PathLike,
    content: Content,
    base: Base,
    *,
    dtype: str = "float32",
    name: str | None = None,
) -> None:
    """Writes the content of `to_gguf` as a file; see `save_gguf_lora`."""
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: expected a file to write the adapter to, got a directory")
    with replacing(path) as new:
        _write(new, content, base, dtype=dtype, name=name)


def _write(path: Path, content: Content, base: Base, *, dtype: str, name: str | None) -> None:
    gguf = require("gguf")
    writer = gguf.GGUFWriter(path, base.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    if name is not None:
        writer.add_name(name)
    if base_name := content.base_name:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, PurePath(base_name).name.replace("-", " "))
        if is_hub_id(base_name):
            writer.add_base_model_repo_url(0, f"{HUB}{base_name}")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, content.alpha)
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_quantization_version(2)
    kind = {"float16": "F16", "bfloat16": "BF16"}.get(dtype)
    written = {}
    for key, tensor in content.tensors.items():
        if kind is None:
            written[key] = tensor
            writer.add_tensor(key, tensor)
            continue
        with np.errstate(over="ignore"):  # found below
            packed = gguf.quantize(tensor, gguf.GGMLQuantizationType[kind])
        if kind == "F16" and not np.isfinite(packed).all():
            raise ValueError(f"`{key}` has a number that float16 cannot hold; take bfloat16")
        written[key] = packed
        writer.add_tensor(key, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise _cut_short(path, error.strerror or str(error)) from error
    finally:
        writer.close()
    _check_written(path, written)


def _check_written(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Reads the tensors back: the writer uses numpy's `tofile`, which hides some failed writes.

    Raises:
      OSError: the file lacks bytes.
    """
    try:
        file = open_gguf(path, kind="adapter")
    except ValueError as error:
        raise _cut_short(path, "bytes are missing") from error
    for key, tensor in tensors.items():
        if file.stored(key).tobytes() != tensor.tobytes():
            raise _cut_short(path, f"bytes of tensor `{key}` are missing")


def _cut_short(path: Path, reason: str) -> OSError:
    # EIO, because numpy drops the number; `replacing` puts the final path in.
    return OSError(errno.EIO, f"not written whole ({reason}): is the disk full?", str(path))
