"""LoraConfig, its module patterns, and PEFT's JSON."""
