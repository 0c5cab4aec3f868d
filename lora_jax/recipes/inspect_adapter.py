"""A report on an adapter: ranks, scales, modules, size, the change of each weight, problems.

The change of a module is the Frobenius norm of s·B·A, from r × r products: B·A is never formed.

    ‖s·B·A‖² = s² · Σ (BᵀB) ∘ (A·Aᵀ)
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.array import LoraArray
from lora_jax.checkpoint import adapters
from lora_jax.compat import is_finite
from lora_jax.config import matching
from lora_jax.config.lora import LoraConfig
from lora_jax.dims import sizes
from lora_jax.files import read_object
from lora_jax.hf.checkpoint.safetensors import load_file
from lora_jax.hf.gguf.file import open_gguf, read_tensor
from lora_jax.hf.mlx import read_mlx
from lora_jax.hf.peft.directory import CONFIG_FILE, TENSOR_FILE
from lora_jax.hf.peft.index import REGISTERED, modules_of
from lora_jax.hf.peft.prefixes import plain_fields, plain_keys
from lora_jax.recipes.convert import kind_of

_SHOWN = 3
_PEFT_PAIRS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
_PREFIX = "base_model.model."


class Module(NamedTuple):
    """One module's adapter, whole or not.

    Attributes:
      name: full name of the module.
      a: (r, in), or None where the file lacks it.
      b: (out, r), likewise.
      scale: None where it is not known.
      experts: how many adapters lie side by side in a and b, (E·r, in) and (out, r·E).
    """

    name: str
    a: np.ndarray | None
    b: np.ndarray | None
    scale: float | None
    experts: int = 1

    @property
    def rank(self) -> int | None:
        """The rank of each expert's adapter, None where A is missing."""
        return None if self.a is None else self.a.shape[0] // self.experts


class Adapter(NamedTuple):
    """An adapter as it was found, whole or not.

    Attributes:
      kind: name of the format, for the report.
      facts: its metadata, by name.
      modules: those with an A or a B.
      others: tensors that are neither an A nor a B.
      problems: those found while reading.
    """

    kind: str
    facts: Mapping[str, Any]
    modules: Sequence[Module]
    others: Mapping[str, np.ndarray]
    problems: tuple[str, ...] = ()


def read(source: str | Path) -> Adapter:
    """Reads an adapter of any format, however incomplete.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a file that cannot be read at all.
    """
    # vLLM's form is a PEFT directory too, and a merged model is no adapter.
    readers = {"peft": _read_peft, "mlx": _read_mlx, "gguf": _read_gguf, "orbax": _read_orbax}
    return readers[kind_of(source)](Path(source))


def facts(found: Adapter) -> dict[str, Any]:
    """The facts of the report by name: the metadata, then those that follow from the tensors."""
    ranks = Counter(m.rank for m in found.modules if m.rank is not None)
    scales = Counter(f"{m.scale:.6g}" for m in found.modules if m.scale is not None)
    kinds = Counter(_layer(m.name)[0].rpartition(".")[2] for m in found.modules)
    size = sum(x.nbytes for x in _arrays(found))
    return {
        **found.facts,
        "ranks": _counts(ranks),
        "scales": _counts(scales),
        "modules": ", ".join(f"{name} ×{n}" for name, n in sorted(kinds.items())) or "none",
        "size": f"{size / 2**20:,.2f} MiB",
    }


def _arrays(found: Adapter) -> Iterable[np.ndarray]:
    yield from (x for m in found.modules for x in (m.a, m.b) if x is not None)
    yield from found.others.values()


def _counts(counts: Counter) -> str:
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} in {n} modules" for value, n in counts.most_common()) or "unknown"


def norm(module: Module) -> float:
    """‖s·B·A‖, or NaN where A, B or the scale is missing."""
    a, b = module.a, module.b
    if a is None or b is None or module.scale is None or a.shape[0] != b.shape[1]:
        return float("nan")
    # Expert by expert: slowest in A, fastest in B.
    a = a.astype(np.float64).reshape(module.experts, -1, a.shape[1])
    b = b.astype(np.float64).reshape(b.shape[0], -1, module.experts)
    # (BᵀB) ∘ (A·Aᵀ), summed over r × r and the experts.
    gram_b = np.einsum("ore,oqe->erq", b, b, optimize=True)
    gram_a = np.einsum("eri,eqi->erq", a, a, optimize=True)
    squares = np.sum(gram_b * gram_a)
    return abs(module.scale) * float(np.sqrt(max(squares, 0.0)))


def norm_table(found: Adapter) -> list[str]:
    """The changes as a table of text: a row a layer, a column a module."""
    cells: dict[str, dict[str, float]] = {}
    places = [_layer(module.name) for module in found.modules]
    named = _short({plain for plain, _ in places})
    for module, (plain, layer) in zip(found.modules, places, strict=True):
        row = "-" if layer is None else str(layer)
        cells.setdefault(row, {})[named[plain]] = norm(module)
    columns = sorted({c for row in cells.values() for c in row})
    rows = sorted(cells, key=lambda r: (r != "-", int(r) if r.isdigit() else 0))
    widths = [max(len(c), 9) for c in columns]
    lines = ["layer  " + "  ".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))]
    for row in rows:
        values = [f"{cells[row][c]:.4g}" if c in cells[row] else "" for c in columns]
        texts = (f"{v:>{w}}" for v, w in zip(values, widths, strict=True))
        lines.append(f"{row:>5}  " + "  ".join(texts).rstrip())
    return lines


def _short(names: Iterable[str]) -> dict[str, str]:
    """Each module's name in as few of its parts as tell it from the others; numbers do not count.

    Those of one last name (GPT-2's `attn.c_proj` and `mlp.c_proj`) go by more of it, those of T5's
    two stacks by their first part too (`decoder.SelfAttention.k`).
    """
    parts = {name: tuple(p for p in name.split(".") if not p.isdigit()) for name in names}
    texts = [_forms(own) for own in parts.values()]
    count = Counter(form for forms in texts for form in dict.fromkeys(forms))
    return {
        name: ".".join(next(form for form in forms if count[form] == 1 or form == own))
        for (name, own), forms in zip(parts.items(), texts, strict=True)
    }


def _forms(parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Short forms of a name, from its end, in the order in which they are tried."""
    ends = [parts[-n:] for n in range(1, len(parts))]
    firsts = [(parts[0], *end) for end in ends[:2]]
    return [*ends[:2], *firsts, *ends[2:], parts]


def _layer(name: str) -> tuple[str, int | None]:
    """A module's name without its block's number, and the number."""
    # The first number is the block's; further ones number experts.
    found = re.search(r"\.(\d+)(?=\.)", name)
    return (name, None) if found is None else (name.replace(found[0], "", 1), int(found[1]))


def problems(found: Adapter) -> list[str]:
    """The problems, one sentence each."""
    modules = found.modules
    checks = {
        "has no lora_A": [m.name for m in modules if m.a is None],
        "has no lora_B": [m.name for m in modules if m.b is None],
        "has an A and a B of different ranks": [
            m.name
            for m in modules
            if m.a is not None and m.b is not None and m.a.shape[0] != m.b.shape[1]
        ],
        "holds NaN or infinity": [m.name for m in modules if not (_finite(m.a) and _finite(m.b))]
        + [n for n, x in found.others.items() if not _finite(x)],
        "was not trained: its B is zero": [
            m.name for m in modules if m.b is not None and not m.b.any()
        ],
        "has no effect: its A is zero": [
            m.name for m in modules if m.a is not None and not m.a.any()
        ],
    }
    wrong = [*found.problems, *(_phrase(names, what) for what, names in checks.items() if names)]
    return wrong if modules else [*wrong, "it has no pair of lora_A and lora_B"]


def _phrase(names: list[str], what: str) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(f'`{n}`' for n in names[:_SHOWN])}{more} {what}"


def _finite(x: np.ndarray | None) -> bool:
    return x is None or is_finite(x)


# --- readers ------------------------------------------------------------------------------------

# Fields of a PEFT config that are always shown; the others only when they are set.
FIELDS = ("base_model_name_or_path", "r", "lora_alpha", "target_modules")
_HIDDEN = ("peft_type", "inference_mode", "auto_mapping", "peft_version", "revision")


def _read_peft(path: Path) -> Adapter:
    fields = plain_fields(read_object(path / CONFIG_FILE))
    shown = _shown(fields)
    wrong: list[str] = []
    # With a config that cannot be used, the tensors can still be shown.
    try:
        config = LoraConfig.from_peft(fields)
    except (TypeError, ValueError) as error:
        config, wrong = None, [f"{CONFIG_FILE}: {error}"]
    tensors = plain_keys(load_file(path / TENSOR_FILE), str(path))
    modules = _pairs(tensors, config)
    paired = {f"{_PREFIX}{m.name}{end}" for m in modules for ends in _PEFT_PAIRS for end in ends}
    rest = {n: x for n, x in tensors.items() if n not in paired}
    if config is not None:
        wrong += _against(config, modules)
    return Adapter(
        kind=f"PEFT adapter ({fields.get('peft_type', 'of no type')})",
        facts=shown,
        modules=modules,
        others=rest,
        problems=tuple(wrong),
    )


def _shown(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a PEFT config that the report has, by name."""
    set_ones = [n for n, v in fields.items() if v not in (None, False, 0, {}, [], "")]
    others = sorted(n for n in set_ones if n not in (*FIELDS, *_HIDDEN))
    return {n: fields.get(n) for n in (*FIELDS, *others)}


def _read_mlx(path: Path) -> Adapter:
    config, tensors = read_mlx(path)
    shown = {"r": config.rank, "lora_alpha": config.alpha}
    return Adapter("MLX adapter", shown, _pairs(tensors, config), {})


def _pairs(tensors: Mapping[str, np.ndarray], config: LoraConfig | None) -> list[Module]:
    # Module to its A (0) and B (1); one of the two may be missing.
    halves: dict[str, dict[int, np.ndarray]] = {}
    for name, value in tensors.items():
        for ends in _PEFT_PAIRS:
            for half, end in enumerate(ends):
                if name.endswith(end) and value.ndim >= 2:
                    module = name.removesuffix(end).removeprefix(_PREFIX)
                    # Of a convolution: A reads a window, B has one of a single place.
                    halves.setdefault(module, {})[half] = value.reshape(len(value), -1)
    return [_module(config, name, found.get(0), found.get(1)) for name, found in halves.items()]


def _module(
    config: LoraConfig | None, name: str, a: np.ndarray | None, b: np.ndarray | None
) -> Module:
    if config is None or a is None:
        return Module(name, a, b, None)
    parameter = _parameter(config, name)
    rank, experts = a.shape[0], 1
    if parameter is not None:
        # The file does not say how many experts there are: that follows from the config's rank.
        rank = matching.rank_of(config, parameter)
        rank, experts = (rank, a.shape[0] // rank) if a.shape[0] % rank == 0 else (a.shape[0], 1)
    scale = matching.scale_of(config, rank, matching.alpha_of(config, parameter or name))
    return Module(name=name, a=a, b=b, scale=scale, experts=experts)


def _parameter(config: LoraConfig, name: str) -> str | None:
    """The parameter of target_parameters whose adapter has a module's name in the file, or None.

    PEFT wraps a module once for each of its parameters, the first of them innermost.
    """
    # "mlp.experts.base_layer": one ".base_layer" for each wrapper around it.
    module, *wrappers = name.split(".base_layer")
    own = [e for e in config.target_parameters if _holds(module, e.rpartition(".")[0])]
    ordered = sorted(own, key=lambda e: _order(e.rpartition(".")[2]))
    if len(wrappers) >= len(ordered):
        return None
    last = ordered[len(ordered) - 1 - len(wrappers)].rpartition(".")[2]
    return f"{module}.{last}"


def _holds(module: str, entry: str) -> bool:
    return not entry or matching.ends_with(module, entry)


def _order(parameter: str) -> int:
    return REGISTERED.index(parameter) if parameter in REGISTERED else len(REGISTERED)


def _against(config: LoraConfig, modules: Sequence[Module]) -> list[str]:
    """Problems where tensors and config disagree."""
    wrong = [
        m.name
        for m in modules
        if m.rank not in (None, matching.rank_of(config, _parameter(config, m.name) or m.name))
    ]
    phrases = [_phrase(wrong, "is of another rank than the config says")] if wrong else []
    names = [m.name for m in modules]
    if isinstance(config.target_modules, tuple):
        unused = [e for e in config.target_modules
                  if not any(matching.ends_with(n, e) for n in names)]  # fmt: skip
        if unused:
            phrases.append(_phrase(unused, "of target_modules is no module of the file"))
    return phrases


def _read_gguf(path: Path) -> Adapter:
    file = open_gguf(path, kind="adapter")
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    shown = {n: v for n, v in file.metadata.items() if isinstance(v, str | int | float)}
    halves: dict[str, dict[int, np.ndarray]] = {}
    rest, wrong = {}, []
    for name in file.tensors:
        # One damaged tensor is listed among the problems, and the others are read.
        try:
            value = read_tensor(file, name)
        except ValueError as error:
            wrong.append(str(error).removeprefix(f"{path}: "))
            continue
        module, _, end = name.rpartition(".weight.lora_")
        if end not in ("a", "b") or value.ndim != 2:
            rest[name] = value
            continue
        # llama.cpp looks rows of an embedding's A up, so it is stored as (vocabulary, r).
        value = value.T if module == "token_embd" and end == "a" else value
        halves.setdefault(module, {})["ab".index(end)] = value
    modules = []
    for name, found in halves.items():
        b = found.get(1)
        # As llama.cpp does: without an alpha the scale is 1.
        scale = None if b is None else (alpha / b.shape[1] if alpha else 1.0)
        modules.append(Module(name, found.get(0), b, scale))
    return Adapter(
        kind="GGUF LoRA adapter for llama.cpp",
        facts=shown,
        modules=modules,
        others=rest,
        problems=tuple(wrong),
    )


def _read_orbax(path: Path) -> Adapter:
    stored = adapters.find(path)
    shown = {"in": str(stored.directory), **_shown(stored.config)}
    del shown["base_model_name_or_path"]  # not part of a `LoraConfig`
    modules, rest = [], {}
    for name, leaf in adapters.read_leaves(stored).items():
        if not isinstance(leaf, LoraArray):
            rest[name] = leaf.value if hasattr(leaf, "value") else leaf.rows
            continue
        stack, fan_in, fan_out = sizes(leaf.shape, leaf.roles)
        a = leaf.a.reshape(*stack, fan_in, leaf.rank)
        b = leaf.b.reshape(*stack, leaf.rank, fan_out)
        vectors = {
            end: x.reshape(*stack, -1)
            for end, x in (("lora_magnitude_vector", leaf.m), ("lora_B.bias", leaf.bias))
            if x is not None
        }
        for index, module in _names(name, leaf, stack):
            scale = float(leaf.scale[index])
            modules.append(Module(name=module, a=a[index].T, b=b[index].T, scale=scale))
            rest |= {f"{module}.{end}": x[index] for end, x in vectors.items()}
    shown["base"] = f"{len(stored.base)} weights"
    return Adapter("Orbax checkpoint", shown, modules, rest)


def _names(name: str, leaf: Any, stack: tuple[int, ...]) -> Iterable[tuple[tuple, str]]:
    """Each layer's name in Hugging Face's spelling, or the path with the layer's number."""
    try:
        return list(modules_of(name, leaf))
    except ValueError:
        return [(i, ".".join((name, *map(str, i)))) for i in np.ndindex(*stack)]
