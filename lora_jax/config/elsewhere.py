"""Settings of other tools, mostly transformers' and PEFT's scripts, and their names here.

A value behind "=" belongs to the setting: `load_in_4bit` is `quantize="nf4"`.
"""

ELSEWHERE = {
    "lr": "learning_rate",
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "gradient_checkpointing": "remat=full",
    "max_grad_norm": "clip",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "max_seq_length": "max_length",
    "length": "max_length",
    "batch": "batch_size",
    "targets": "target_modules",
    "load_in_4bit": "quantize=nf4",
    "load_in_8bit": "quantize=int8",
    "bf16": "dtype=bfloat16",
    "data": "train_data",
    "dataset": "train_data",
    "model_name_or_path": "model",
    "resume_from_checkpoint": "resume",
    "sample_packing": "packing",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "save_total_limit": "keep",
}
