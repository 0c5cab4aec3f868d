"""Reading adapters from llama.cpp's GGUF LoRA files; `lora_write` describes the format."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.config.arguments import check_argument
from lora_jax.config.lora import LoraConfig
from lora_jax.hf.gguf.experts import (
    EXPERTS,
    GATE_UP,
    FactorPair,
    multiplied,
    multipliers,
    together,
)
from lora_jax.hf.gguf.file import open_gguf, read_tensor
from lora_jax.hf.gguf.halves import whole
from lora_jax.hf.gguf.lora_write import EMBEDDING, HUB, LINEAR
from lora_jax.hf.gguf.names import Base, column_order_of, gguf_names, row_order_of
from lora_jax.hf.peft.api import attach
from lora_jax.hf.peft.base_names import with_name
from lora_jax.hf.peft.directory import check_tensor
from lora_jax.hf.peft.experts import in_one
from lora_jax.hf.peft.index import BASE, PREFIX
from lora_jax.hf.peft.tensors import SWAPPED
from lora_jax.plan.decide import plan

_OURS = (".lora_a", ".lora_b")


def read_gguf_lora(
    path: str | os.PathLike, *, base: Base, params: Any = None
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Reads a GGUF LoRA file without a model.

    Args:
      path: the file.
      base: the model it is for, because the file does not hold its number of heads.
      params: the base parameters, which an adapter of Gemma 4's experts needs.

    Returns:
      A config that gives the file's scales, and PEFT's tensors by their names, in float32.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, no adapter, of another architecture, or has unknown tensors.
    """
    file = open_gguf(Path(path), kind="adapter")
    alpha = _check_metadata(file.metadata, base, file.path)
    modules = {theirs: ours for ours, theirs in gguf_names(base).items()}
    pairs: dict[str, FactorPair] = {}
    for theirs in _pair_names(file.tensors, file.path):
        if theirs not in modules:
            raise ValueError(
                f"{file.path}: tensor `{theirs}.weight.lora_a` has no place in a "
                f"`{base.architecture}` of {base.layers} blocks; is it for another model?"
            )
        if modules[theirs].endswith(base.row.unadapted):
            raise ValueError(
                f"{file.path}: llama.cpp computes a `{base.architecture}` without its adapter of "
                f"`{theirs}`; take the adapter that it was made of"
            )
        a, b = (read_tensor(file, f"{theirs}.weight{ending}") for ending in _OURS)
        pairs[modules[theirs]] = _pair(
            a, b, module=modules[theirs], theirs=theirs, alpha=alpha, base=base, path=file.path
        )
    row = base.row
    by = None if params is None else multipliers(params, row)
    pairs = multiplied(whole(together(pairs), base), row, by, inverse=True)
    config = with_name(_config(pairs, base), _base_name(file.metadata))
    return config, _as_peft(pairs, swapped=row.model_type in SWAPPED)


def load_gguf_lora(
    path: str | os.PathLike,
    fn: Callable,
    params: Any,
    *args: Any,
    base: Base,
    base_model_name: str | os.PathLike | None = None,
    **kwargs: Any,
) -> tuple[Any, LoraConfig]:
    """Loads a GGUF LoRA file onto a model: as `load_peft`, from a file of llama.cpp's.

    Args:
      path: the file.
      fn: the model, a function of its parameters.
      params: the base parameters.
      *args: example arguments for `fn`, shapes are enough; see `lora_jax.plan`.
      base: the model, for llama.cpp: `lora_jax.models.gguf.base_of(model.config)`.
      base_model_name: as for `load_peft`.
      **kwargs: more example arguments for `fn`.

    Returns:
      `params` with LoRA leaves, and a config that gives the file's scales.

    Raises:
      FileNotFoundError, ValueError: as `read_gguf_lora`; also when the adapter is of another
        model: one message names all that is missing, left over or misshapen.

    Warns:
      UserWarning: the adapter names another base than `base_model_name`.
    """
    config, tensors = read_gguf_lora(path, base=base, params=params)
    return attach(
        config,
        tensors,
        lambda c: plan(c, fn, params, *args, **kwargs),
        params,
        source=str(path),
        model_type=base.row.model_type,
        base_model_name=base_model_name,
    )


def _base_name(metadata: Mapping[str, Any]) -> str | None:
    """The base by its hub id, or by its name as it is there, in words, which is no hub id."""
    url, name = (metadata.get(f"general.base_model.0.{key}") for key in ("repo_url", "name"))
    if isinstance(url, str) and url.startswith(HUB):
        return url.removeprefix(HUB).rstrip("/")
    return name if isinstance(name, str) else None


def _check_metadata(metadata: Mapping[str, Any], base: Base, path: Path) -> float:
    """The alpha; llama.cpp takes 0 for the scale 1."""
    check_argument("hf.load_gguf_lora(path, fn, params, *args, base=base)", "base", base, Base)
    if (kind := metadata.get("adapter.type")) != "lora":
        raise ValueError(f'{path}: expected an adapter of type "lora", got "{kind}"')
    if (arch := metadata.get("general.architecture")) != base.architecture:
        raise ValueError(
            f"{path}: the adapter is for a `{arch}`, the model is a `{base.architecture}`; load "
            "the model it was made for"
        )
    # llama.cpp switches such an adapter on only after these tokens of a prompt.
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
    # A factor without its other half would be an adapter that changes nothing.
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
    a: np.ndarray,
    b: np.ndarray,
    *,
    module: str,
    theirs: str,
    alpha: float,
    base: Base,
    path: Path,
) -> FactorPair:
    embedding = theirs == "token_embd"
    # llama.cpp looks rows up in an embedding's A, which is therefore (vocabulary, r).
    a = a.T if embedding and a.ndim == 2 else a
    dims = 3 if theirs.endswith(tuple(EXPERTS.values())) else 2
    alike = (a.ndim, b.ndim) == (dims, dims) and a.shape[:-2] == b.shape[:-2]
    if not alike or a.shape[-2] != b.shape[-1]:
        raise ValueError(
            f"{path}: `{theirs}.weight.lora_a` and `.lora_b` of shapes {a.shape} and {b.shape} "
            "are no pair of one rank"
        )
    for ending, tensor in zip(_OURS, (a, b), strict=True):
        check_tensor(f"{theirs}.weight{ending}", tensor, path)
    try:
        order = row_order_of(module, b.shape[-2], base)
        inputs = column_order_of(module, a.shape[-1], base)
    except ValueError as error:
        raise ValueError(f"{path}: `{theirs}.weight.lora_b` has {error}") from None
    if order is not None:  # outputs are reordered, so only B is
        b = b[np.argsort(order)]
    if inputs is not None:
        a = a[:, np.argsort(inputs)]
    # Without an alpha every scale is 1.
    alpha = alpha or a.shape[-2]
    return FactorPair(np.ascontiguousarray(a), np.ascontiguousarray(b), alpha, embedding)


def _as_peft(pairs: Mapping[str, FactorPair], *, swapped: bool) -> dict[str, np.ndarray]:
    out = {}
    for module, pair in pairs.items():
        if pair.a.ndim == 3:
            inside, _, last = module.rpartition(".")
            inner = BASE * (last == GATE_UP and f"{inside}.down_proj" in pairs)
            out |= in_one(f"{PREFIX}{inside}{inner}", pair.a, pair.b, swapped=swapped)
            continue
        in_a, in_b = EMBEDDING if pair.embedding else LINEAR
        out[f"{PREFIX}{module}{in_a}"], out[f"{PREFIX}{module}{in_b}"] = pair.a, pair.b
    return out


def _config(pairs: Mapping[str, FactorPair], base: Base) -> LoraConfig:
    """A config with the file's ranks and alphas: those of most modules, patterns for the others."""
    rank, ranks = _common({module: pair.a.shape[-2] for module, pair in pairs.items()})
    alpha, alphas = _common({module: _short(pair.alpha) for module, pair in pairs.items()})
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        target_modules=_targets([name for name, pair in pairs.items() if pair.a.ndim == 2], base),
        target_parameters=_parameters([n for n, pair in pairs.items() if pair.a.ndim == 3], base),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and the entries that have another."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {name: value for name, value in values.items() if value != common}


def _short(number: float) -> float:
    # PEFT's alpha is an integer by its annotation.
    return int(number) if float(number).is_integer() else number


def _parameters(names: list[str], base: Base) -> tuple[str, ...]:
    """Entries for target_parameters that match exactly these."""
    row, rest = base.row, set(names)
    for entry in (f"{row.experts}.{last}" for last in (GATE_UP, "down_proj")):
        every = {f"{row.stack}.{i}.{entry}" for i in range(base.layers)}
        if every <= rest:
            rest = rest - every | {entry}
    return tuple(sorted(rest))


def _targets(modules: list[str], base: Base) -> tuple[str, ...]:
    """Entries for target_modules that match exactly these: ends of names that all blocks share."""
    row = base.row
    stack, inner = row.stack, row.linears
    rest, targets = set(modules), []
    for module in inner:
        # A module that every block adapts is one short entry; others are listed by whole names.
        everywhere = {f"{stack}.{i}.{module}" for i in range(base.layers)}
        last = module.rpartition(".")[2]
        if everywhere <= rest:
            if any(other.endswith(f".{module}") for other in inner):
                continue  # the entry would match that too
            unique = sum(other.rpartition(".")[2] == last for other in inner) == 1
            targets.append(last if unique else module)
            rest -= everywhere
    return tuple(sorted([*targets, *rest]))
