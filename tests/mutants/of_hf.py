"""Faults in the files of others: PEFT, safetensors, bitsandbytes, GGUF, name maps, tokenizers."""

from tests.mutants.fault import in_file

FAULTS = [
    *in_file(
        "hf/peft/index.py",
        "tests/hf/peft/test_peft.py",
        ("if unknown and len(found) > 1 and alike:", "if False:"),
    ),
    *in_file(
        "hf/peft/save.py",
        "tests/hf/peft/test_peft.py tests/hf/peft/test_tying.py tests/hf/peft/test_multimodal.py",
        ("(leaf.bias is not None) != config.lora_bias", "False"),
    ),
    *in_file(
        "hf/peft/save.py",
        "tests/hf/peft/test_bert.py",
        ('found if "classifier" in parts_of(tensors) else None', "found"),
    ),
    *in_file(
        "hf/peft/card.py",
        "tests/hf/peft/test_directory.py",
        ('and "decoder" not in parts', ""),
    ),
    *in_file(
        "hf/peft/load.py",
        "tests/hf/peft/test_copies.py tests/hf/peft/test_tying.py tests/hf/peft/test_peft.py",
        ("if spec.part == part and not spec.repeats:", "if spec.part == part:"),
        ('spec.part != "w" and k not in tensors', "k not in tensors"),
    ),
    *in_file(
        "hf/peft/tensors.py",
        "tests/hf/peft/test_tying.py tests/hf/peft/test_peft.py tests/hf/peft/test_shapes.py",
        ("if leaf.window.groups > 1 or len(channel) != 1:", "if len(channel) != 1:"),
        ('"m": _Layout((1, fan_out, *ones))', '"m": _Layout((fan_out, 1, *ones))'),
    ),
    *in_file(
        "hf/peft/tensors.py",
        "tests/hf/peft/test_peft.py",
        ('".base_layer" * wrapped', '".base_layer" * (wrapped > 0)'),
    ),
    *in_file(
        "hf/peft/copies.py",
        "tests/hf/peft/test_copies.py tests/hf/peft/test_tying.py tests/hf/peft/test_peft.py",
        ("table.leaf == head.leaf", "True"),
    ),
    *in_file(
        "hf/peft/settle.py",
        "tests/hf/peft/test_peft.py tests/hf/peft/test_model.py",
        ('kept["exclude_modules"] = ()', "pass"),
    ),
    *in_file(
        "hf/peft/directory.py",
        "tests/hf/peft/test_directory.py tests/hf/peft/test_peft.py",
        ("bool(classes_of(text, fields))", "True"),
    ),
    *in_file(
        "hf/upload.py",
        "tests/hf/test_upload.py",
        ("if private and not api.model_info(repo).private:", "if False:"),
        ("name.endswith(kind.replaced) and name not in contents", "name not in contents"),
        ("    if classes:\n", "    if True:\n"),
    ),
    *in_file(
        "hf/peft/prefixes.py",
        "tests/hf/peft/test_prefixes.py tests/hf/peft/test_multimodal.py",
        ("if len(names) > 1:", "if False:"),
        ("if any(path.startswith(_PARALLEL) for path in paths):", "if False:"),
        ("        if name in plain:\n", "        if False:\n"),
    ),
    *in_file(
        "hf/peft/vllm.py",
        "tests/hf/peft/test_directory.py tests/hf/peft/test_peft.py",
        ("set(ranks.values()) == {config.rank} and", "True and"),
    ),
    *in_file(
        "hf/peft/base.py",
        "tests/hf/peft/test_loftq.py tests/hf/peft/test_multimodal.py",
        ("if turns > 1 and not checked:", "if False:"),
        ("if len(quantized) < len(plan.adapted):", "if False:"),
        ('init="default", loftq_config={}', "loftq_config=plan.config.loftq_config"),
    ),
    *in_file(
        "hf/name_maps/layout.py",
        "tests/hf/name_map/test_layout.py tests/hf/name_map/test_own_model.py",
        ("if size % rest or (not open_names and size != rest):", "if size % rest:"),
        ("if names.count(name) > 1:", "if False:"),
    ),
    *in_file(
        "hf/name_maps/leaves.py",
        "tests/hf/name_map/test_own_model.py tests/hf/name_map/test_flax_names.py",
        ("return bool(leaf.scale != 0)", "return True"),
    ),
    *in_file(
        "hf/checkpoint/bnb.py",
        "tests/hf/checkpoint/test_bnb.py",
        ("if packed != -(-state.count // 2):", "if packed < state.count // 2:"),
        ("code[scales] * outer[group]", "code[scales] * outer[group - group[0, 0]]"),
    ),
    *in_file(
        "hf/checkpoint/bnb.py",
        "tests/hf/checkpoint/test_bnb.py",
        ("start, end = first // state.block,", "start, end = 0 * first,"),
    ),
    *in_file(
        "hf/checkpoint/weights.py",
        "tests/hf/name_map/test_weights.py tests/hf/checkpoint/test_safetensors.py",
        ("and not any(fnmatchcase(n, g) for g in ignored)", ""),
    ),
    *in_file(
        "hf/checkpoint/weights.py",
        "tests/models/test_shards.py",
        ("tuple(shape[axes.index(i)] for i in range(len(shape)))", "tuple(shape[d] for d in axes)"),
        ("return all(processes.exchange(equal)) if shared else equal", "return True"),
    ),
    *in_file(
        "hf/checkpoint/fill.py",
        "tests/models/test_shards.py",
        ("tuple(k * n + a for k, n, a in", "tuple(k + n * a for k, n, a in"),
        ("if len(kinds) > 1:", "if False:"),
    ),
    *in_file(
        "hf/gguf/file.py",
        "tests/hf/gguf/test_file.py",
        ("int) and parts > 1:", "int) and parts > 2:"),
    ),
    *in_file(
        "hf/gguf/weights.py",
        "tests/hf/gguf/test_file.py",
        ('file.metadata.get(f"{kind}.attention.head_count_kv", heads)', "heads"),
    ),
    *in_file(
        "hf/gguf/lora_read.py",
        "tests/hf/gguf/test_lora_read.py tests/hf/gguf/test_lora_write.py",
        ("targets.append(last if unique else module)", "targets.append(last)"),
        ("alpha = alpha or a.shape[0]", "pass"),
    ),
    *in_file(
        "hf/gguf/lora_write.py",
        "tests/hf/gguf/test_lora_read.py tests/hf/gguf/test_lora_write.py",
        ("if base.tied and", "if False and"),
        ('"bfloat16": 32', '"bfloat16": 1'),
        (".most_common(1)[0][0]\n\n\ndef _in_file", ".most_common()[-1][0]\n\n\ndef _in_file"),
    ),
    *in_file(
        "hf/tokenizer/tokenizer.py",
        "tests/hf/tokenizer/test_tokenizer.py tests/hf/tokenizer/test_chat.py",
        ("any(start < b and a < end for", "any(start >= a and end <= b for"),
        ('("eot_token_id", "eom_token_id")', '("eot_token_id",)'),
    ),
    *in_file(
        "hf/tokenizer/directory.py",
        "tests/hf/tokenizer/test_directory.py",
        ("fresh >= rows:", "fresh > rows:"),
        ('bool(settings.get("split_special_tokens", False))', "False"),
        ("own |= more if isinstance(more, dict) else {}", "pass"),
        ("    if not texts:  # a processor's file\n", "    if False:\n"),
        ('"special": x in special, ', ""),
    ),
    *in_file(
        "hf/tokenizer/chat.py",
        "tests/hf/tokenizer/test_tokenizer.py tests/hf/tokenizer/test_chat.py",
        ("if self.made > _MOST_CHARACTERS:", "if False:"),
        ("(budget.written, budget.written + len(text))", "(0, len(text))"),
    ),
    *in_file(
        "hf/tokenizer/backends.py",
        "tests/hf/tokenizer/test_tokenizer.py tests/hf/tokenizer/test_chat.py",
        ("ignore_merges=split.whole_words", "ignore_merges=False"),
        ("special = kind == _CONTROL", "special = True"),
    ),
    *in_file(
        "hf/tokenizer/wordpiece.py",
        "tests/hf/tokenizer/test_wordpiece.py",
        ('settings.get("do_lower_case", True)', 'settings.get("do_lower_case", False)'),
        ('settings.get("strip_accents")', 'settings.get("do_lower_case")'),
        ('(lines[:-1] if lines[-1] == "" else lines)', "lines"),
    ),
    *in_file(
        "hf/peft/tensors.py",
        "tests/hf/peft/test_index.py",
        ("or config.trainable_token_indices:", "or False:"),
        ("shape[::-1], None", "shape[::-1], axes"),
    ),
]  # fmt: skip
