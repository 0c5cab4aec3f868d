"""Fields of PEFT's adapter_config.json, as the tests of configurations give them."""

from lora_jax.config.lora import LoraConfig


def full(**fields) -> dict:
    """A complete PEFT 0.21 config with some fields changed."""
    ours = LoraConfig(rank=8, alpha=8, target_modules=("q_proj",)).to_peft()
    return {**ours, "task_type": None, **fields}


EVA = {
    "adjust_scaling_factors": True,
    "label_mask_value": -100,
    "rho": 2.0,
    "tau": 0.99,
    "use_label_mask": True,
    "whiten": False,
}
FULL = [
    {},
    {"r": 4, "lora_alpha": 11.5, "use_rslora": True, "lora_dropout": 0.1},
    {"target_modules": r".*\.(q_proj|v_proj)", "exclude_modules": r".*\.0\..*"},
    {"target_modules": ["v_proj", "q_proj"], "exclude_modules": ["lm_head"]},
    {"target_modules": "all-linear"},
    {"use_dora": True, "bias": "all", "modules_to_save": ["lm_head", "classifier"]},
    {"rank_pattern": {"q_proj": 2, "^v_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    {"layers_to_transform": 3},
    {"layers_to_transform": [0, 2], "layers_pattern": ["layers"]},
    {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "eva", "eva_config": EVA},
    {"task_type": "CAUSAL_LM", "base_model_name_or_path": "org/model", "revision": "main"},
    {"peft_version": "0.15.0", "inference_mode": False, "fan_in_fan_out": True},
    {"auto_mapping": {"base_model_class": "Net", "parent_library": "net"}},
    {"loftq_config": {"loftq_bits": 4, "loftq_iter": 2}, "init_lora_weights": "loftq"},
    {"lora_bias": True},
    {"trainable_token_indices": [7, 3]},
    {"trainable_token_indices": {"wte": [1], "lm_head": [2, 0]}},
    {"target_parameters": ["experts.up", "down"]},
    {"target_parameters": ["experts.up"], "target_modules": []},
    {"future_feature": None, "other_feature": False, "third_feature": {}},
]
