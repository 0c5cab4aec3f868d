"""LoraConfig: which modules are adapted, and how.

The names follow PEFT's where they mean the same; `from_peft` and `to_peft` translate PEFT's
`adapter_config.json` without loss.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import regex

from lora_jax.config.arguments import quoted, set_plain_fields, with_known_fields
from lora_jax.config.peft import fields_from_peft, fields_to_peft, with_peft_names
from lora_jax.config.starts import STARTS, find_start, lacking_for_experts

ALL_LINEAR = "all-linear"

BIASES = ("none", "all", "lora_only")


# Static, like a plan: an argument of `jit` that is compared, not traced.
@jax.tree_util.register_static
@with_known_fields
@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What to adapt: `y = x·W + s·(x·A)·B`, with `s = alpha/rank`, or `alpha/√rank` (rsLoRA).

    Sequences given as lists become tuples; everything is checked when the config is made.

    Attributes:
      rank: inner dimension of A·B.
      alpha: numerator of the scale.
      target_modules: the modules to adapt: a list of names, each the whole name of a module or its
        end after a dot ("q_proj", "self_attn.q_proj"); or one regular expression that matches the
        whole name; or "all-linear", every weight used by a matrix product except the output head
        and the embeddings.
      exclude_modules: names (or one regular expression) that are never adapted.
      dropout: probability with which an element of the adapters' input is zeroed, in [0, 1).
      use_rslora: scale by alpha/√rank.
      use_dora: also learn the magnitude of each output column (DoRA).
      init: how A and B start: "default" (A uniform, B zero), "random", "gaussian", "orthogonal",
        "pissa", "pissa_niter_4" (or another number), "olora" or "loftq". A config of PEFT's with
        "eva" or "mica" is read, but `init` cannot start from it.
      loftq_config: for init="loftq", as in PEFT: "loftq_iter", how often to quantize and
        decompose in turn (1), and "loftq_bits" (4) for a base that is not quantized yet.
      bias: which biases of the base train: "none", "all", or "lora_only" (of adapted modules).
      lora_bias: add a bias to B, `y = x·W + s·((x·A)·B + b)`; it works with init="default" and
        "random" only, and merging then needs a bias in the base.
      modules_to_save: modules trained whole instead of adapted, by the end of their names.
      trainable_token_indices: rows of an embedding table that train while the others are frozen:
        token ids of the input embedding (the largest table that an argument is looked up in), or a
        dict from the end of a module's name to ids. A head tied to the table uses the same rows.
      target_parameters: further parameters to adapt, by the end of their names. PEFT needs them
        listed where they are not the weight of a module: experts stored as one array
        ("experts.gate_up_proj").
      rank_pattern: rank of the modules that a pattern matches, {"down_proj": 16}; the first pattern
        that matches the end of a name (after a dot) wins, "^" anchors it.
      alpha_pattern: the same for alpha.
      layers_to_transform: layer number, or numbers, to adapt; None adapts all.
      layers_pattern: name, or names, of the module list that holds the layers; None takes the
        first number behind two names, as PEFT does: 3 in "model.layers.3.up".
      roles: the role of each dimension of a leaf, in place of the one inferred from its uses: one
        letter a dim, s (stack), i (in) or o (out), by pattern as in rank_pattern:
        {"experts.up": "sio"}.
      extra: fields of a PEFT file that change no numbers, where they differ from PEFT's
        defaults.

    Raises:
      TypeError: a field has the wrong type.
      ValueError: a field has a value out of range, or two fields contradict each other.

    Example:
      LoraConfig(rank=16, alpha=32, target_modules=("q_proj", "v_proj"))

    Source: PEFT 0.21, `LoraConfig`; Hu et al. 2021, arXiv:2106.09685.
    """

    rank: int = 8
    alpha: float = 16
    target_modules: Sequence[str] | str = ALL_LINEAR
    exclude_modules: Sequence[str] | str = ()
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "default"
    loftq_config: Mapping[str, int] = field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    modules_to_save: Sequence[str] = ()
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] = ()
    target_parameters: Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_plain_fields(self)
        for name in _NORMALIZED:
            object.__setattr__(self, name, _normalized(name, getattr(self, name)))
        # `b` was the letter of a stack dim before 0.2.
        stacked = {k: v.replace("b", "s") for k, v in self.roles.items() if isinstance(v, str)}
        object.__setattr__(self, "roles", {**self.roles, **stacked})
        if self.init == "loftq":
            object.__setattr__(self, "loftq_config", _LOFTQ | dict(self.loftq_config))
        _check_numbers(self)
        _check_names(self)
        _check_patterns(self)
        _check_layers(self)
        _check_choices(self)
        _check_loftq(self)
        _check_tokens(self)
        _check_combinations(self)

    def __hash__(self) -> int:
        # Without the dicts, which have no hash; equal configs still hash alike.
        return hash(tuple(v for v in vars(self).values() if not isinstance(v, dict)))

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], *, model_type: str | None = None) -> "LoraConfig":
        """Translates the content of PEFT's `adapter_config.json`.

        Absent fields have PEFT's defaults (r=8, lora_alpha=8).

        Args:
          fields: the JSON object.
          model_type: Hugging Face's name of the model family ("llama"), used as PEFT does to
            find the target modules where the file names none.

        Raises:
          ValueError: the file is of another method, or a field changes the numbers and is not
            supported; the message names the field.
        """
        ours = fields_from_peft(fields, model_type=model_type)
        try:
            return cls(**ours)
        except (TypeError, ValueError) as error:
            # The same class: a caller may treat a wrong type unlike a wrong value.
            raise type(error)(f"PEFT config: {with_peft_names(str(error))}") from None

    def to_peft(self) -> dict[str, Any]:
        """The fields of PEFT 0.21's `adapter_config.json`, ready for `json.dumps`.

        `task_type` is there only where the config came with one (`extra`): `save_peft` adds it.
        """
        return fields_to_peft(self)


_NORMALIZED = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "roles",
    "extra",
    "loftq_config",
    "trainable_token_indices",
    "target_parameters",
)


def _normalized(name: str, value: Any) -> Any:
    if name in ("rank_pattern", "alpha_pattern", "roles", "extra", "loftq_config"):
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise TypeError(f"`{name}` must be a dict, got {value!r}")
        return dict(value)
    if name == "trainable_token_indices" and isinstance(value, Mapping):
        ids = {k: tuple(v) if isinstance(v, (list, range)) else v for k, v in value.items()}
        return ids or ()
    if isinstance(value, (set, frozenset)):
        # A set has no order of its own; sorted, equal configs print and save alike.
        return tuple(sorted(value))
    if isinstance(value, list):
        return tuple(value)
    if name == "target_modules" and isinstance(value, str) and value.lower() == ALL_LINEAR:
        return ALL_LINEAR  # PEFT compares it without regard to case
    return () if name in _EMPTY_FOR_NONE and value is None else value


_EMPTY_FOR_NONE = (
    "exclude_modules",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
)


def _is_int(value: Any) -> bool:
    # In Python a bool, JSON's true, is an int.
    return isinstance(value, int) and not isinstance(value, bool)


def _check_rank(name: str, value: Any) -> None:
    if not _is_int(value):
        raise TypeError(f"`{name}` must be an integer of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}")


def _check_alpha(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number above 0, got {value!r}")
    # The scale is held in float32.
    if not 1e-30 <= value <= 1e30:
        raise ValueError(f"`{name}` must be a number from 1e-30 to 1e30, got {value}")


def _check_numbers(config: LoraConfig) -> None:
    _check_rank("rank", config.rank)
    _check_alpha("alpha", config.alpha)
    dropout = config.dropout
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"`dropout` must be a number, 0 <= dropout < 1, got {dropout!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must be at least 0 and below 1, got {dropout}")
    for name in ("use_rslora", "use_dora", "lora_bias"):
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"`{name}` must be True or False, got {getattr(config, name)!r}")


def _check_strings(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"`{name}` must be a tuple or list of module names, got {value!r}")
    # Every name ends with "", so an empty entry would match all.
    if "" in value:
        raise ValueError(f"`{name}` holds an empty name, which would match every module")


# `regex` writes repetitions out: `a{99999999}` in a downloaded adapter would take 24 GB.
_MOST_REPEATS = 10_000
# Each is an expression, which every module is compared with.
_MOST_SAVED = 1000


def _check_repeats(name: str, pattern: str) -> None:
    counts = [int(digits[:9]) for digits in re.findall(r"\{(\d+)", pattern)]
    if math.prod(max(count, 1) for count in counts) > _MOST_REPEATS:
        raise ValueError(
            f"`{name}`: {pattern!r} repeats a part more than {_MOST_REPEATS:,} times, which takes "
            "memory for each: write `*` or `+`"
        )


def _check_regex(name: str, pattern: Any) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise TypeError(f"`{name}` must be a regular expression, not empty, got {pattern!r}")
    try:
        re.compile(pattern)  # PEFT's own
        _check_repeats(name, pattern)
        regex.compile(pattern)  # what matches here, see `matching.fits`
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"`{name}`: {pattern!r} is not a regular expression: {error}; escape what should be "
            "taken literally"
        ) from None


def _check_names(config: LoraConfig) -> None:
    targets, excluded = config.target_modules, config.exclude_modules
    if isinstance(targets, str):
        _check_regex("target_modules", targets)
    else:
        _check_strings("target_modules", targets)
        if not targets and not config.target_parameters:
            raise ValueError(
                '`target_modules` is empty, so nothing would be adapted; name modules ("q_proj") '
                'or use "all-linear"'
            )
    if isinstance(excluded, str):
        _check_regex("exclude_modules", excluded)
    else:
        _check_strings("exclude_modules", excluded)
    _check_strings("target_parameters", config.target_parameters)
    _check_strings("modules_to_save", config.modules_to_save)
    if (count := len(config.modules_to_save)) > _MOST_SAVED:
        raise ValueError(f"`modules_to_save` has {count:,} names, more than {_MOST_SAVED:,}")
    for name in config.modules_to_save:
        # PEFT puts these names into a regular expression as well.
        _check_regex("modules_to_save", name)


def _check_patterns(config: LoraConfig) -> None:
    for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
        for pattern, value in getattr(config, name).items():
            _check_regex(name, pattern)
            check(f"{name}[{pattern!r}]", value)
    for pattern, roles in config.roles.items():
        _check_regex("roles", pattern)
        if not isinstance(roles, str) or not roles or set(roles) - set("sio"):
            raise ValueError(
                f"`roles[{pattern!r}]` must be letters s (stack), i (in), o (out), got {roles!r}"
            )


def _check_layers(config: LoraConfig) -> None:
    layers, pattern = config.layers_to_transform, config.layers_pattern
    numbers = (layers,) if isinstance(layers, int) else layers or ()
    if not all(_is_int(n) for n in numbers):
        raise TypeError(
            f"`layers_to_transform` must be a layer number or a list of them, got {layers!r}"
        )
    if any(n < 0 for n in numbers):
        raise ValueError(f"`layers_to_transform` counts layers from 0, got {layers!r}")
    for name, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
        if value is not None and isinstance(config.target_modules, str):
            raise ValueError(
                f"`{name}` needs `target_modules` as a list of names, got the string "
                f'"{config.target_modules}"; list the modules, or put the layer numbers into '
                "the regular expression"
            )
    if pattern and layers is None:
        raise ValueError(f"layers_pattern={pattern!r} needs `layers_to_transform` as well")
    if pattern is not None and not isinstance(pattern, (str, tuple)):
        raise TypeError(f"`layers_pattern` must be a name or a list of names, got {pattern!r}")
    # In PEFT "" is no pattern.
    for part in (pattern,) if isinstance(pattern, str) and pattern else pattern or ():
        _check_regex("layers_pattern", part)


def _check_choices(config: LoraConfig) -> None:
    if config.bias not in BIASES:
        raise ValueError(f"`bias` must be one of {quoted(BIASES)}, got {config.bias!r}")
    init = config.init
    known = quoted(start.name for start in STARTS if start.known)
    if not isinstance(init, str):
        raise TypeError(
            f'`init` must be one of {known}, got {init!r}; PEFT\'s True is "default", its False is '
            '"random"'
        )
    start = find_start(init)
    if start is None or not start.known:
        raise ValueError(f'`init` must be one of {known}, got "{init}"')
    if init == "orthogonal" and config.rank % 2:
        raise ValueError(f'init="orthogonal" needs an even rank, got rank={config.rank}')


_LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}  # PEFT's defaults; it needs both


def _check_loftq(config: LoraConfig) -> None:
    given = config.loftq_config
    if given and config.init != "loftq":
        raise ValueError(f'`loftq_config` needs init="loftq", got init="{config.init}"')
    for name, value in given.items():
        if name not in _LOFTQ:
            raise ValueError(f'`loftq_config` has "loftq_bits" and "loftq_iter", got {name!r}')
        if not _is_int(value) or value < 1:
            raise ValueError(f"`loftq_config[{name!r}]` must be an integer from 1, got {value!r}")
    if given and given["loftq_bits"] not in (4, 8):
        raise ValueError(f"`loftq_config['loftq_bits']` must be 4 or 8, got {given['loftq_bits']}")


def _check_tokens(config: LoraConfig) -> None:
    rows = config.trainable_token_indices
    named = rows if isinstance(rows, dict) else {"": rows} if rows != () else {}
    for module, ids in named.items():
        where = "trainable_token_indices" + (f"[{module!r}]" if module else "")
        if not isinstance(ids, tuple) or not all(_is_int(i) for i in ids):
            raise TypeError(f"`{where}` must be a list of token ids, got {ids!r}")
        if not ids or min(ids) < 0 or len(set(ids)) < len(ids):
            raise ValueError(f"`{where}` must be token ids from 0, each once, got {list(ids)}")
        if module and module in config.modules_to_save:
            raise ValueError(
                f"`{module}` is in `modules_to_save` and in `trainable_token_indices`: train it "
                "whole or some of its rows, not both"
            )
    if isinstance(rows, dict):
        _check_strings("trainable_token_indices", tuple(rows))


def _check_combinations(config: LoraConfig) -> None:
    """Raises for combinations that PEFT rejects too, or computes in another way."""
    if config.lora_bias and config.use_dora:
        raise ValueError("lora_bias=True does not work with use_dora=True: choose one of them")
    start = find_start(config.init)
    if config.lora_bias and not (start and start.allows_bias):
        raise ValueError(
            f'lora_bias=True works with init="default" or init="random" only, got "{config.init}"'
        )
    own = [x for x in config.target_parameters if x.rpartition(".")[2] not in ("weight", "kernel")]
    if config.target_parameters and (given := lacking_for_experts(config, experts=bool(own))):
        raise ValueError(
            f"`target_parameters` does not work with {given} in PEFT: leave one out, or name the "
            "parameters in `target_modules`"
        )
