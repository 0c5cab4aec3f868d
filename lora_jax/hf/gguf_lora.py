"""Adapters as llama.cpp's GGUF LoRA files, both ways.

    PEFT       lora_A (r, in)   lora_B (out, r)   scale: alpha/r or alpha/√r, per module
    llama.cpp  lora_a (r, in)   lora_b (out, r)   scale: adapter.lora.alpha / r, one alpha

A module whose scale is not `alpha / r` with the file's one alpha has the rest of it multiplied
into B; where all modules agree nothing is. Three things are llama.cpp's own: rows of B of q and
k are reordered for the architecture `llama`; an embedding's A is (vocabulary, r); and a head
tied to the embedding is the same tensor to it, so that neither can be adapted.

Source: llama.cpp's `convert_lora_to_gguf.py`, `src/llama-adapter.cpp` (what is read),
`src/llama-adapter.h` (`get_scale`), `src/llama-graph.cpp` (`build_lora_mm`, `build_inp_embd`).
"""

import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax import matching
from lora_jax.config import LoraConfig
from lora_jax.hf.gguf_names import MODULES, Base, gguf_names, heads_of, to_halves, to_pairs
from lora_jax.hf.peft_files import check_tensor
from lora_jax.hf.peft_slots import PREFIX
from lora_jax.paths import nearest

DTYPES = ("float32", "float16", "bfloat16")

_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_OURS = (".lora_a", ".lora_b")
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}  # gguf's LlamaFileType
_MERGE = "merge the adapter into the model (lora_jax.merge) and convert the merged model instead"


class Pair(NamedTuple):
    """The adapter of one module as PEFT has it: `a` (r, in), `b` (out, r), and its scale."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    embedding: bool


class Content(NamedTuple):
    """What a GGUF LoRA file holds: the one alpha, and tensors under llama.cpp's names."""

    alpha: float
    tensors: dict[str, np.ndarray]


# --- out ----------------------------------------------------------------------------------------


def save_gguf_lora(
    path: str | os.PathLike,
    lora_params: Any,
    config: LoraConfig,
    *,
    base: Base,
    dtype: str = "float32",
    name: str | None = None,
) -> None:
    """Writes an adapter as a GGUF LoRA file (`llama-cli --lora`), whole or not at all.

    Args:
      path: the file; one that is there is replaced.
      lora_params: tree with the adapter.
      config: the config the adapter was made with.
      base: the model it is for: `lora_jax.hf.gguf_names.base_of(model.config)`.
      dtype: "float32", "float16" or "bfloat16".
      name: written as `general.name`.

    Raises:
      ValueError: llama.cpp could not apply the adapter, the tree and the config disagree, or a
        number is not finite or does not fit the dtype.
      OSError: the file cannot be written; what was there before is intact.

    Example:
      save_gguf_lora("adapter.gguf", params, config, base=base_of(model.config))
    """
    from lora_jax.hf.peft_export import to_peft

    content = to_gguf(to_peft(lora_params, config)[1], config, base)
    write_gguf_lora(path, content, base, dtype=dtype, name=name)


def to_gguf(tensors: Mapping[str, np.ndarray], config: LoraConfig, base: Base) -> Content:
    """The content of a GGUF LoRA file from that of a PEFT directory.

    Raises:
      ValueError: llama.cpp could not apply the adapter.
    """
    _check_plain(config)
    names = gguf_names(base.architecture, base.layers)
    pairs = _pairs(tensors, config, base)
    alpha = _common_alpha(pairs)
    out = {}
    for module, pair in pairs.items():
        if module not in names:
            raise ValueError(
                f"llama.cpp's architecture `{base.architecture}` has no place for an adapter of "
                f"`{module}`; nearest: {nearest(module, names, 1)}; {_MERGE}"
            )
        if base.tied and names[module] in ("token_embd", "output"):
            raise ValueError(
                f"llama.cpp cannot apply an adapter of `{module}` where the output head is the "
                f"embedding table: to it both are one tensor; {_MERGE}"
            )
        a, b = _in_file(module, pair, alpha, base)
        out[f"{names[module]}.weight.lora_a"], out[f"{names[module]}.weight.lora_b"] = a, b
    return Content(alpha, out)


def _check_plain(config: LoraConfig) -> None:
    from lora_jax.hf.peft_config import REPEATABLE_INITS

    for on, what in (
        (config.use_dora, "DoRA (use_dora=True)"),
        (config.bias != "none", f'trained biases (bias="{config.bias}")'),
        (config.init in REPEATABLE_INITS, f'a changed base weight (init="{config.init}")'),
        (config.modules_to_save, f"whole saved modules ({', '.join(config.modules_to_save)})"),
    ):
        if on:
            raise ValueError(f"llama.cpp cannot apply an adapter with {what}; {_MERGE}")


def _pairs(tensors: Mapping[str, np.ndarray], config: LoraConfig, base: Base) -> dict[str, Pair]:
    pairs = {}
    for key, a in tensors.items():
        for (in_a, in_b), embedding in ((_LINEAR, False), (_EMBEDDING, True)):
            if not key.endswith(in_a):
                continue
            module = key.removesuffix(in_a).removeprefix(PREFIX)
            b = tensors.get(key.removesuffix(in_a) + in_b)
            if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise ValueError(f"`{key}`: no pair of matrices (r, in) and (out, r) with its B")
            rank, alpha = a.shape[0], matching.alpha_of(config, module)
            scale = matching.scale_of(config, rank, alpha)
            pairs[module] = Pair(a, b, scale, embedding)
    _check_rest(tensors, pairs, base)
    return pairs


def _check_rest(tensors: Mapping[str, np.ndarray], pairs: Mapping[str, Pair], base: Base) -> None:
    """Every tensor is of a pair, or the base's own weight that PEFT repeats beside an embedding."""
    for key, value in tensors.items():
        if key.endswith((*_LINEAR, *_EMBEDDING)):
            continue
        module = key.removesuffix(".base_layer.weight").removeprefix(PREFIX)
        if module in pairs and value.shape[0] == base.vocab_size:
            continue
        raise ValueError(
            f"llama.cpp cannot apply `{key}`: it reads pairs of lora_A and lora_B only; {_MERGE}"
        )


def _common_alpha(pairs: Mapping[str, Pair]) -> float:
    """The alpha with which most modules need nothing multiplied into B."""
    if not pairs:
        raise ValueError("the adapter has no pair of lora_A and lora_B; there is nothing to write")
    wanted = Counter(float(np.float32(pair.scale * pair.a.shape[0])) for pair in pairs.values())
    return wanted.most_common(1)[0][0]


def _in_file(module: str, pair: Pair, alpha: float, base: Base) -> tuple[np.ndarray, np.ndarray]:
    a, b = (x.astype(np.float32, copy=False) for x in (pair.a, pair.b))
    wanted = pair.scale * a.shape[0]
    if np.float32(wanted) != np.float32(alpha):
        b = b * np.float32(wanted / alpha)
    if (heads := heads_of(module, base)) is not None:
        b = to_pairs(b, heads)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        _write(Path(temporary), content, base, dtype, name)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _write(path: Path, content: Content, base: Base, dtype: str, name: str | None) -> None:
    from gguf.constants import GGMLQuantizationType, GGUFType, Keys
    from gguf.gguf_writer import GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(path, base.architecture)
    writer.add_type(GGUFType.ADAPTER)
    if name is not None:
        writer.add_name(name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, content.alpha)
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_quantization_version(2)
    kind = {"float16": "F16", "bfloat16": "BF16"}.get(dtype)
    for key, tensor in content.tensors.items():
        if kind is None:
            writer.add_tensor(key, tensor)
            continue
        with np.errstate(over="ignore"):  # found below
            packed = quantize(tensor, GGMLQuantizationType[kind])
        if kind == "F16" and not np.isfinite(packed).all():
            raise ValueError(f"`{key}` has a number that float16 cannot hold; take bfloat16")
        writer.add_tensor(key, packed, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- in -----------------------------------------------------------------------------------------


def read_gguf_lora(
    path: str | os.PathLike, *, base: Base
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Reads a GGUF LoRA file without a model.

    Args:
      path: the file.
      base: the model it is for; the file itself does not say how many heads it has.

    Returns:
      A config that gives the file's scales, and PEFT's tensors by their names, in float32.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, no adapter, of another architecture, or has what is not known.
    """
    from lora_jax.hf.gguf import open_gguf, read_tensor

    file = open_gguf(path, kind="adapter")
    alpha = _check_metadata(file.metadata, base, file.path)
    modules = {theirs: ours for ours, theirs in gguf_names(base.architecture, base.layers).items()}
    pairs: dict[str, Pair] = {}
    for theirs in _pair_names(file.tensors, file.path):
        if theirs not in modules:
            raise ValueError(
                f"{file.path}: tensor `{theirs}.weight.lora_a` has no place in a "
                f"`{base.architecture}` of {base.layers} blocks; is it for another model?"
            )
        read = (read_tensor(file, f"{theirs}.weight{ending}") for ending in _OURS)
        pairs[modules[theirs]] = _pair(modules[theirs], theirs, *read, alpha, base, file.path)
    config = _config(pairs, alpha, base)
    return config, _as_peft(pairs)


def load_gguf_lora(
    path: str | os.PathLike, fn: Callable, params: Any, *args: Any, base: Base, **kwargs: Any
) -> tuple[Any, LoraConfig]:
    """Loads a GGUF LoRA file onto a model: as `load_peft`, from a file of llama.cpp's.

    Args:
      path: the file.
      fn: the model, a function of its parameters.
      params: the base parameters.
      *args: example arguments for `fn`, shapes are enough; see `lora_jax.plan`.
      base: the model, for llama.cpp: `lora_jax.hf.gguf_names.base_of(model.config)`.
      **kwargs: more example arguments for `fn`.

    Returns:
      `params` with LoRA leaves, and a config that gives the file's scales.

    Raises:
      FileNotFoundError, ValueError: as `read_gguf_lora`; also when the adapter is of another
        model: one message names all that is missing, left over or misshapen.
    """
    import lora_jax as lora
    from lora_jax.hf.peft import attach

    config, tensors = read_gguf_lora(path, base=base)
    return attach(
        config, tensors, lambda c: lora.plan(c, fn, params, *args, **kwargs), params, str(path)
    )


def _check_metadata(metadata: Mapping[str, Any], base: Base, path: Path) -> float:
    """The alpha; 0 stands for the scale 1, as llama.cpp has it."""
    if (kind := metadata.get("adapter.type")) != "lora":
        raise ValueError(f"{path}: expected an adapter of type `lora`, got `{kind}`")
    if (arch := metadata.get("general.architecture")) != base.architecture:
        raise ValueError(
            f"{path}: the adapter is for a `{arch}`, the model is a `{base.architecture}`; load "
            "the model it was made for"
        )
    if "adapter.alora.invocation_tokens" in metadata:
        raise ValueError(
            f"{path}: an activated LoRA (`adapter.alora.invocation_tokens`) is not supported"
        )
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float) or not np.isfinite(alpha) or alpha < 0:
        raise ValueError(f"{path}: `adapter.lora.alpha` must be a number above 0, got {alpha!r}")
    return float(alpha)


def _pair_names(tensors: Mapping[str, Any], path: Path) -> list[str]:
    """llama.cpp's names of the modules, each with both its tensors there."""
    names, norms = {}, []
    for tensor in tensors:
        ending = next((e for e in _OURS if tensor.endswith(f".weight{e}")), None)
        if ending is not None:
            names[tensor.removesuffix(f".weight{ending}")] = None
        elif tensor.endswith("_norm.weight"):
            norms.append(tensor)
        else:
            raise ValueError(f"{path}: tensor `{tensor}` is neither a lora_a nor a lora_b")
    for name in names:
        for ending in _OURS:
            if f"{name}.weight{ending}" not in tensors:
                raise ValueError(f"{path}: tensor `{name}.weight{ending}` is missing")
    if not names:
        raise ValueError(f"{path}: holds no adapter: no tensor ends in .lora_a")
    if norms:
        warnings.warn(
            f"{path}: {len(norms)} norms such as `{norms[0]}` are left out, as llama.cpp does",
            stacklevel=3,
        )
    return list(names)


def _pair(
    module: str, theirs: str, a: np.ndarray, b: np.ndarray, alpha: float, base: Base, path: Path
) -> Pair:
    embedding = theirs == "token_embd"
    a = a.T if embedding and a.ndim == 2 else a
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{path}: `{theirs}.weight.lora_a` and `.lora_b` of shapes {a.shape} and {b.shape} "
            "are no pair of one rank"
        )
    for ending, tensor in zip(_OURS, (a, b), strict=True):
        check_tensor(f"{theirs}.weight{ending}", tensor, path)
    if (heads := heads_of(module, base)) is not None:
        if b.shape[0] % (2 * heads):
            raise ValueError(f"{path}: `{theirs}.weight.lora_b` has {b.shape[0]} rows, not whole "
                             f"pairs for each of {heads} heads")  # fmt: skip
        b = to_halves(b, heads)
    scale = alpha / a.shape[0] if alpha else 1.0
    return Pair(np.ascontiguousarray(a), np.ascontiguousarray(b), scale, embedding)


def _as_peft(pairs: Mapping[str, Pair]) -> dict[str, np.ndarray]:
    out = {}
    for module, pair in pairs.items():
        in_a, in_b = _EMBEDDING if pair.embedding else _LINEAR
        out[f"{PREFIX}{module}{in_a}"], out[f"{PREFIX}{module}{in_b}"] = pair.a, pair.b
    return out


def _config(pairs: Mapping[str, Pair], alpha: float, base: Base) -> LoraConfig:
    """A config with the file's ranks and scales: most modules' rank, patterns for the others."""
    ranks = {module: pair.a.shape[0] for module, pair in pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: r for module, r in ranks.items() if r != rank}
    return LoraConfig(
        rank=rank,
        alpha=_short(alpha or rank),
        target_modules=_targets(list(pairs), base),
        rank_pattern=others,
        # Without an alpha every scale is 1: each module's alpha is its rank.
        alpha_pattern={} if alpha else {module: _short(r) for module, r in others.items()},
    )


def _short(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _targets(modules: list[str], base: Base) -> tuple[str, ...]:
    """Names for target_modules that mean exactly these: ends of names where all blocks have it."""
    stack, inner, _ = MODULES[base.architecture]
    rest, targets = set(modules), []
    for module in inner:
        everywhere = {f"{stack}.{i}.{module}" for i in range(base.layers)}
        last = module.rpartition(".")[2]
        if everywhere <= rest:
            unique = sum(other.rpartition(".")[2] == last for other in inner) == 1
            targets.append(last if unique else module)
            rest -= everywhere
    return tuple(sorted([*targets, *rest]))
