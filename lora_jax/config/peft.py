"""PEFT's `adapter_config.json` from and to LoraConfig, with every field accounted for.

Each field of PEFT 0.21's LoraConfig is in exactly one of three tables: MAPPED to a field of our
LoraConfig; CARRIED in `LoraConfig.extra`, because it changes no numbers of a finished adapter; or
REFUSED unless it is off, because it changes the numbers and is not supported.
"""

import re
from collections.abc import Mapping
from typing import Any

from lora_jax.config.starts import STARTS, find_start

# PEFT's name of a field -> our name, and PEFT's default.
MAPPED = {
    "r": ("rank", 8),
    "lora_alpha": ("alpha", 8),
    "target_modules": ("target_modules", None),
    "exclude_modules": ("exclude_modules", None),
    "lora_dropout": ("dropout", 0.0),
    "use_rslora": ("use_rslora", False),
    "use_dora": ("use_dora", False),
    "init_lora_weights": ("init", True),
    "loftq_config": ("loftq_config", {}),
    "bias": ("bias", "none"),
    "modules_to_save": ("modules_to_save", None),
    "rank_pattern": ("rank_pattern", {}),
    "alpha_pattern": ("alpha_pattern", {}),
    "layers_to_transform": ("layers_to_transform", None),
    "layers_pattern": ("layers_pattern", None),
    "lora_bias": ("lora_bias", False),
    "target_parameters": ("target_parameters", None),
    "trainable_token_indices": ("trainable_token_indices", None),
}

# PEFT's value of each field that changes no numbers of a finished adapter. fan_in_fan_out is how
# the base stores its weight; A and B are the same either way. ensure_weight_tying is checked
# against the model when an adapter is loaded or saved. The *_config fields only concern a start or
# a layout over devices.
CARRIED = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "fan_in_fan_out": False,
    "inference_mode": True,  # PEFT writes true in every file
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "peft_version": "0.21.2",  # the version whose fields these are
    "qalora_group_size": 16,
    "revision": None,
    "task_type": None,
}

# Kept even if null, and written only if kept: `save_peft` adds it to a config without it, and a
# file that has null must keep null.
_TASK = "task_type"

# Fields that change the numbers and are not supported, with their value when off.
REFUSED = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}

# Types that train inputs of the model, or modules beside its weights: no change of a weight equals
# them, so they cannot be merged.
_NO_WEIGHTS = (
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING",
    "PROMPT_TUNING", "XLORA",
)  # fmt: skip

# What to do about a refused field, where the usual advice does not fit.
_INSTEAD = {
    "alora_invocation_tokens": (
        "it applies only after its invocation tokens, which a merged model cannot do either: train "
        "the adapter without it"
    ),
    "layer_replication": (
        "repeat the layers of these ranges in the base model itself, and set the field to null: "
        "the adapter's tensors are numbered by the repeated layers already"
    ),
}

# PEFT's default target modules by model family (peft/utils/constants.py).
_QV, _BERT, _FUSED = ("q_proj", "v_proj"), ("query", "value"), ("query_key_value",)
DEFAULT_TARGETS = {
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(
        ("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm"),
        _QV,
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _QV),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), _BERT),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "falcon"), _FUSED),
    **dict.fromkeys(("RefinedWebModel", "RefinedWeb"), _FUSED),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}


# A default of `get` that is equal to no value of JSON.
_NONE = object()


def fields_from_peft(fields: Mapping[str, Any], *, model_type: str | None = None) -> dict[str, Any]:
    """The fields of a `LoraConfig` for PEFT's JSON object; see `LoraConfig.from_peft`."""
    check_type(fields)
    _check_fields(fields)
    # In a finished adapter null can only mean that the field was not set, even where PEFT's own
    # loader keeps null in a field that has another default.
    given = {
        name: default if fields.get(name) is None else fields[name]
        for name, (_, default) in MAPPED.items()
    }
    given["init_lora_weights"] = _init_from_peft(given["init_lora_weights"])
    if given["init_lora_weights"] != "loftq":
        given["loftq_config"] = {}  # it has no effect, in PEFT either
    # PEFT adapts no module where only parameters are listed.
    if given["target_modules"] is None and given["target_parameters"]:
        given["target_modules"] = []
    if given["target_modules"] is None:
        given["target_modules"] = _default_targets(model_type)
    ours = {MAPPED[name][0]: value for name, value in given.items()}
    usual = {**CARRIED, **REFUSED}
    extra = {
        name: value
        for name, value in fields.items()
        if name == _TASK
        or (name not in MAPPED and usual.get(name, _NONE) != value and not _is_null(name, value))
    }
    return {**ours, "extra": extra}


def _is_null(name: str, value: Any) -> bool:
    """Whether a field is null although its default is not: then it has the default."""
    return value is None and (CARRIED | REFUSED).get(name) is not None


def fields_to_peft(config: Any) -> dict[str, Any]:
    """The JSON object of a config; see `LoraConfig.to_peft`."""
    mapped = {name: _to_json(getattr(config, ours)) for name, (ours, _) in MAPPED.items()}
    start = find_start(config.init)
    if start is not None and start.peft is not None:
        mapped["init_lora_weights"] = start.peft
    for name in _NONE_WHEN_EMPTY:
        mapped[name] = mapped[name] or None
    carried = {name: value for name, value in CARRIED.items() if name != _TASK}
    return dict(sorted({**carried, **REFUSED, **config.extra, **mapped}.items()))


_NONE_WHEN_EMPTY = (
    "exclude_modules",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)


def _to_json(value: Any) -> Any:
    """A field's value as JSON reads it back: lists in place of tuples."""
    if isinstance(value, tuple):
        return list(value)
    return {k: _to_json(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def check_type(fields: Any) -> None:
    """Refuses a config that is not LoRA's, whatever else it holds.

    Raises:
      ValueError: it is no JSON object, or its `peft_type` is missing or of another method.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"PEFT config: expected a JSON object, got {type(fields).__name__}")
    found = fields.get("peft_type")
    if found is None:
        raise ValueError('PEFT config: "peft_type" is missing; is this an adapter\'s config?')
    if found != "LORA":
        what_to_do = (
            "it changes no weights of the model, so it cannot be converted: train a LoRA instead"
            if found in _NO_WEIGHTS
            else "merge it in PEFT (merge_and_unload) and load the merged model"
        )
        raise ValueError(
            f"PEFT config: peft_type is {found!r}, only LORA can be read; {what_to_do}"
        )


def _check_fields(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in MAPPED or name in CARRIED or value == REFUSED.get(name):
            continue
        # null, false and empty are what PEFT writes for a feature that is off.
        off = value is None or value is False or value in ({}, [], "")
        if not off:
            kind = "is not supported" if name in REFUSED else "is unknown"
            usual = "train the adapter without it, or merge it in PEFT and load the merged model"
            raise ValueError(
                f'PEFT config: "{name}" = {value!r} {kind} and may change the numbers; '
                f"{_INSTEAD.get(name, usual)}"
            )


def _init_from_peft(value: Any) -> str:
    if value is None:
        value = True  # PEFT's default
    for start in STARTS:
        if start.peft is not None and start.peft is value:
            return start.name
    start = find_start(value) if isinstance(value, str) else None
    if not isinstance(value, str) or (start is not None and not start.known):
        raise ValueError(
            f'PEFT config: "init_lora_weights" = {value!r} changes the base weights in a way that '
            "cannot be repeated here; save the adapter in PEFT with "
            "path_initial_model_for_weight_conversion, which converts it to a plain LoRA"
        )
    return value


def _default_targets(model_type: str | None) -> tuple[str, ...] | str:
    if model_type is None:
        raise ValueError(
            'PEFT config: "target_modules" is missing, and its default depends on the model '
            'family, which is unknown; write "target_modules" into the file, or pass `model_type`'
        )
    if model_type not in DEFAULT_TARGETS:
        raise ValueError(
            'PEFT config: "target_modules" is missing, and PEFT has no default for model_type '
            f'{model_type!r}; write "target_modules" into the file'
        )
    return DEFAULT_TARGETS[model_type]


def with_peft_names(text: str) -> str:
    """An error about a `LoraConfig` whose names are those of the file: `rank` is its "r"."""
    theirs = {ours: name for name, (ours, *_) in MAPPED.items()}
    # A name is in backticks, or stands before its value: `init="olora"`.
    named = rf"`({'|'.join(theirs)})`|\b({'|'.join(theirs)})(?==)"
    return re.sub(named, lambda found: f'"{theirs[found[1] or found[2]]}"', text)
