"""A run on a file, what it prints and keeps, and a run that goes on from its adapter."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_jax as lora
from lora_jax import models
from lora_jax.analysis.step_memory.fit import fastest
from lora_jax.config.arguments import SettingsError
from lora_jax.config.lora import LoraConfig
from lora_jax.hf.checkpoint.safetensors import load_file
from lora_jax.recipes import finetune, fitting
from lora_jax.recipes.finetune import FinetuneConfig
from lora_jax.recipes.fitting import (
    examples_of,
    fitted,
    head_of,
    records_of,
    with_classes,
    with_head,
)
from lora_jax.recipes.forms import (
    FORM_FILE,
    Trained,
    carry_form,
    form_of,
    read_form,
    read_trained,
    system_of,
    template_of,
    write_form,
)
from lora_jax.recipes.reports import summary
from lora_jax.train import TrainConfig, record_of
from lora_jax.train.memory import device_bytes

from tests.support import tiny

pytestmark = pytest.mark.once

LORA = LoraConfig(rank=2, alpha=4, target_modules=("q_proj", "v_proj"))
RUN = TrainConfig(steps=2, batch_size=2, progress=False, tensorboard=False, buckets=1)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    rows = [{"question": "Booking for Iris: ", "answer": "4 guests"}] * 4
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return FinetuneConfig(
        model=str(tiny.write_tiny(folder / "model")),
        train_data=folder / "data.jsonl",
        eval_data=folder / "data.jsonl",
        fields={"prompt": "question", "completion": "answer"},
    )


@pytest.fixture(scope="module")
def run(job, tmp_path_factory):
    """The folder of a run and what it printed."""
    folder, lines = tmp_path_factory.mktemp("runs") / "out", []
    config = dataclasses.replace(RUN, output_dir=folder)
    finetune.finetune(job, LORA, config, log=lines.append)
    return folder, lines


def test_a_run_prints_its_evaluations_and_ends_with_a_summary(run):
    folder, lines = run
    evals = [line for line in lines if line.startswith("eval loss after step ")]
    assert [line.split(":")[0][-1] for line in evals] == ["0", "2"]
    first, last = (line.split()[-1] for line in evals)
    assert f"eval loss {first} -> {last}" in lines[-2]
    assert lines[-1] == f"wrote the adapter to {folder}/adapter"


def test_the_form_of_the_training_is_kept_with_the_run_and_its_adapter(run):
    folder, _ = run
    assert read_form(folder) == read_form(folder / "adapter") == "prompt"


def test_a_run_chooses_what_fits_the_memory_of_a_device(job, tmp_path):
    lines, job = [], dataclasses.replace(job, eval_data=None, device_memory="1GB")
    config = dataclasses.replace(RUN, output_dir=tmp_path / "fits", steps=1, accumulation=2)
    result = finetune.finetune(job, LORA, config, log=lines.append)
    line = next(x for x in lines if x.startswith("for 1GB: "))
    assert line.startswith(
        "for 1GB: batch_size 4 (instead of 2), accumulation 1 (instead of 2), remat projections, ab"
    )
    # One pass of all four rows.
    assert [shape[:2] for shape in result.compiled] == [(1, 4)]
    # The weights alone are more than 200 KB.
    small = dataclasses.replace(job, device_memory="200KB")
    with pytest.raises(ValueError, match="`device_memory` is 195.3 KiB, and the smallest step"):
        finetune.finetune(small, LORA, dataclasses.replace(config, resume=True), log=lines.append)


def test_offloading_on_a_host_is_refused(job):
    with pytest.raises(SettingsError, match="`offload` .* this device is the host: leave it out"):
        finetune.load_model(job.model, offload=True)


def test_training_goes_on_from_an_adapter(job, run, tmp_path):
    job = dataclasses.replace(job, adapter=str(run[0] / "adapter"), eval_data=None)
    config = dataclasses.replace(RUN, output_dir=tmp_path / "on", steps=1, learning_rate=1e-9)
    lines = []
    finetune.finetune(job, LoraConfig(), config, log=lines.append)
    assert lines[0] == f"goes on from {job.adapter}: rank 2, alpha 4, on q_proj v_proj"
    old, new = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (run[0] / "adapter", tmp_path / "on" / "adapter")
    )
    assert set(old) == set(new)
    for name, tensor in old.items():
        np.testing.assert_allclose(new[name], tensor, atol=1e-7)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"rank": 16}, "`rank` is 16, but the adapter .* has 2: leave it out"),
        ({"use_dora": True}, "`use_dora` is True, but the adapter"),
        ({"init": "pissa"}, "`init` is 'pissa', but the adapter"),
        ({"target_modules": "all-linear"}, None),  # the default
        ({"rank": 2, "dropout": 0.1}, None),
    ],
)
def test_settings_that_differ_from_the_adapters_are_refused(monkeypatch, given, text):
    monkeypatch.setattr(finetune, "load_adapter", lambda model, source: ("params", LORA))
    config = LoraConfig(**given)
    if text is None:
        want = dataclasses.replace(LORA, dropout=config.dropout)
        assert finetune.continued(None, "old", config) == ("params", want)
    else:
        with pytest.raises(ValueError, match=text):
            finetune.continued(None, "old", config)


def test_a_missing_adapter_is_refused_before_anything_is_loaded(job, tmp_path):
    job = dataclasses.replace(job, adapter=str(tmp_path / "none"), train_data=tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="none"):
        finetune.finetune(job, LORA, dataclasses.replace(RUN, output_dir=tmp_path / "out"))


def test_rows_that_a_mesh_does_not_divide_are_refused_before_anything_is_loaded(job, tmp_path):
    job = dataclasses.replace(job, train_data=tmp_path / "none", mesh={"fsdp": 8})
    config = dataclasses.replace(RUN, output_dir=tmp_path / "out", batch_size=6)
    with pytest.raises(ValueError, match="`batch_size` is 6, but its rows are spread over 8 dev"):
        finetune.finetune(job, LORA, config)


def test_an_output_that_is_a_file_is_refused_before_anything_is_loaded(job, tmp_path):
    (tmp_path / "a").touch()
    job = dataclasses.replace(job, train_data=tmp_path / "none")
    config = dataclasses.replace(RUN, output_dir=tmp_path / "a" / "out")
    with pytest.raises(NotADirectoryError, match="`output_dir` is .*out, and .*a is a file"):
        finetune.finetune(job, LORA, config)


@pytest.mark.parametrize(
    ("run_fields", "job_fields", "rank", "text"),
    [
        ({"packed_length": 3, "packing": True}, {}, 2, "`packed_length` is 3 tokens, but an exam"),
        ({"profile": "8:9"}, {}, 2, "`profile` is '8:9', but the run ends after step 2"),
        ({"warmup": 7}, {}, 2, "`warmup` is 7 steps, but the run ends after step 2"),
        ({"buckets": (4,)}, {}, 2, "`buckets`"),
        ({}, {"max_length": 9}, 2, "the example has .* tokens, more than `max_length`, 9"),
        ({"resume": True, "learning_rate": 0.5}, {}, 2, "another config: `learning_rate` was"),
        ({"resume": True}, {}, 4, "another config: .*`rank` was 2 and is 4"),
        ({"resume": True}, {"fields": {"prompt": "answer", "completion": "question"}}, 2,
         "was trained on other data"),
        ({"resume": True}, {}, 2, "1 missing: `model.norm"),  # as far as the weights
    ],
)  # fmt: skip
def test_what_needs_no_weights_is_refused_before_they_are_read(
    job, run, tmp_path, run_fields, job_fields, rank, text
):
    model = shutil.copytree(job.model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors")
    job = dataclasses.replace(job, model=str(model), **job_fields)
    if "resume" in run_fields:
        shutil.copytree(run[0], tmp_path / "out")
        run_fields = {"steps": 2, **run_fields}
    epochs = {"steps": None, "epochs": 1, "output_dir": tmp_path / "out"}
    config = dataclasses.replace(RUN, **{**epochs, **run_fields})
    with pytest.raises(ValueError, match=text):
        finetune.finetune(job, dataclasses.replace(LORA, rank=rank), config)


def test_an_adapter_in_place_of_a_model_is_named(run):
    with pytest.raises(ValueError, match="adapter: an adapter, not a model: give the model"):
        finetune.load_model(str(run[0] / "adapter"))


@pytest.mark.parametrize(
    ("given", "kept", "want"),
    [
        ("ab", None, ("a", "b")),
        ("", "ba", ("b", "a")),
        ("ba", "ba", ("b", "a")),
        ("ab", "ba", '`labels` are "a", "b", but the head .* has "b", "a", in this order'),
        ("a", None, '`labels` must be at least two classes, got "a"'),
        ("aba", None, '`labels` must be different names, got "a", "b", "a"'),
    ],
)
def test_classes_are_those_of_the_adapter(job, tmp_path, given, kept, want):
    if kept is not None:
        write_form(tmp_path, "text", Trained(labels=tuple(kept)))
    adapter = None if kept is None else str(tmp_path)
    job = dataclasses.replace(job, labels=tuple(given), adapter=adapter)
    if isinstance(want, tuple):
        assert head_of(job, job.adapter).labels == want
    else:
        with pytest.raises(ValueError, match=want):
            head_of(job, job.adapter)


def test_loftq_names_the_settings_for_smaller_blocks(job, tmp_path):
    config = TrainConfig(output_dir=tmp_path / "o", steps=1)
    with pytest.raises(ValueError, match='has 32 inputs, .* quantize="nf4" and quantize_block=32'):
        finetune.finetune(job, LoraConfig(init="loftq"), config)


def test_loftq_in_8_bits_names_the_setting_it_needs(job, tmp_path):
    config = LoraConfig(init="loftq", loftq_config={"loftq_bits": 8})
    with pytest.raises(SettingsError, match='needs a base in 8 bits: add quantize="int8"'):
        finetune.finetune(job, config, TrainConfig(output_dir=tmp_path / "a"))


def test_forms(tmp_path):
    prompt, text = record_of({"prompt": "a", "completion": "b"}), record_of({"text": "a"})
    assert form_of([prompt, prompt]) == "prompt" and form_of([prompt, text]) == "mixed"
    assert read_form(tmp_path) is None
    write_form(tmp_path, "mixed")
    assert read_form(tmp_path) == "mixed"
    turns = {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")]}
    plain = record_of({**turns, "tools": [{"name": "x"}]})
    one, other = (record_of({**turns, "chat_template_kwargs": {"mood": x}}) for x in "ab")
    assert template_of([one, text, one]) == {"mood": "a"}
    assert template_of([one, other]) == template_of([one, plain]) == template_of([text]) == {}
    both = record_of({**turns, "tools": [{"name": "x"}], "chat_template_kwargs": {"mood": "b"}})
    assert template_of([plain, both, plain]) == {"tools": [{"name": "x"}]}
    led = [{"role": "system", "content": "Be brief."}, *turns["messages"]]
    brief, other = record_of({"messages": led}), record_of({"messages": [{**led[0], "content": "x"},
                                                                         *led[1:]]})  # fmt: skip
    assert system_of([brief, text, brief]) == "Be brief."
    assert system_of([brief, other]) is system_of([brief, one]) is system_of([one, text]) is None
    kept = Trained("messages", template=template_of([one]), system="Be brief.")
    write_form(tmp_path, "messages", kept)
    assert read_trained(tmp_path) == kept
    (tmp_path / FORM_FILE).write_text('{"form": "messages", "template": 3}')
    with pytest.raises(ValueError, match="`template` must be an object, got 3"):
        read_form(tmp_path)
    (tmp_path / FORM_FILE).write_text('{"form": "poem"}')
    with pytest.raises(ValueError, match=f"{FORM_FILE}: `form` must be one of prompt, .*'poem'"):
        read_form(tmp_path)


def test_a_copy_of_an_adapter_has_its_form(tmp_path):
    known, unknown, output = (tmp_path / name for name in ("known", "unknown", "output"))
    for folder in (known, unknown, output):
        folder.mkdir()
    write_form(known, "text")
    carry_form(known, output)
    assert read_form(output) == "text"
    carry_form(unknown, output)
    assert read_form(output) is None
    (tmp_path / "a.gguf").touch()
    carry_form(known, tmp_path / "a.gguf")


def record(step: int, loss: float) -> dict:
    return {"kind": "train", "step": step, "loss": loss, "seconds": 0.5, "tokens": 300}


def test_the_summary_has_the_first_and_the_last_losses():
    text = summary([record(1, 2.5), record(2, 1.25)], 1234.5, Path("run"))
    assert text == (
        "2 steps, 1,234 s; loss 2.5000 -> 1.2500\n600 tokens/s\n"
        "plot and metrics: run/loss.png, metrics.jsonl"
    )
    evaluated = [{"kind": "eval", "step": 0, "eval_loss": 3.0}, record(1, 2.5)]
    assert "; eval loss 3.0000 -> 3.0000\n" in summary(evaluated, 1, Path("run"))
    assert summary([], 1, Path("run")) == "no step was left to take; the run is in run"


def test_the_summary_has_the_speed_of_the_steps():
    records = [
        record(step, 2.0) | {"padding": padding, "flops_per_second": flops, "mfu": flops / 1e15}
        for step, padding, flops in [(1, 0.0, 1e14), (2, 0.5, 3e14)]
    ]
    text = summary(records, 9, Path("run"), first_step=4.26, peak=3 << 29)
    assert text.splitlines()[1] == (
        "600 tokens/s, 200 model TFLOP/s a device, MFU 20.0 %, padding 33.3 %, "
        "first step after 4.3 s, peak memory 1.50 GiB"
    )


@pytest.mark.parametrize(("last", "rose"), [(2.9, False), (3.1, True), (1e9, True)])
def test_a_loss_that_rose_is_in_the_summary(last, rose):
    text = summary([record(1, 2.5), record(3, last)], 1, Path("run"))
    assert ("the loss rose: train again with a lower learning rate" in text) is rose


def test_an_encoder_with_a_head_fits_a_memory(monkeypatch):
    """Encoders offload nothing and take no packed rows, and the estimate asks for neither."""
    config = models.BertConfig(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, labels=("a", "b"),
        task="sequence-classification",
    )  # fmt: skip
    fresh = models.init(jax.random.key(0), config)
    model = dataclasses.replace(fresh, tokenizer=tiny.tiny_tokenizer())
    adapter = with_head(model, LoraConfig(rank=2))
    # What a bare encoder lacks trains whole; PEFT's type is the task's, unless another is given.
    assert set(adapter.modules_to_save) == {"classifier", "pooler"}
    assert adapter.extra["task_type"] == "SEQ_CLS"
    given = LoraConfig(rank=2, extra={"task_type": "FEATURE_EXTRACTION"})
    assert with_head(model, given).extra == given.extra
    params = finetune.init_adapter(model, adapter, seed=0)
    rows = [{"text": "Dinner" * n, "label": "a"} for n in (1, 1, 4, 4)]
    data = examples_of(model, [record_of(row) for row in rows], max_length=None)
    said: list[str] = []
    asked: list[tuple] = []

    def noted(model, settings, memory, *, weights):
        asked.append((settings.length, settings.packing, weights))
        return fastest(model, settings, memory, weights=weights)

    monkeypatch.setattr(fitting, "fastest", noted)
    fitted(
        model, params, data, device_memory="1GB", lora_config=adapter,
        config=TrainConfig(batch_size=2, progress=False), log=said.append,
    )  # fmt: skip
    assert said[0].startswith("for 1GB: batch_size 2, accumulation 1, remat")
    longest = max(len(row.tokens) for row in data)
    assert asked == [(-(-longest // 8) * 8, False, device_bytes(lora.split(params)[1]))]


def test_a_folder_of_images_takes_no_fields_and_has_one_class_each(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(SettingsError, match="`fields` are those of a file's rows, and .* a folder"):
        records_of(tmp_path, {"image": "picture"})
    job = FinetuneConfig(model="m", train_data=tmp_path, labels=("a",), problem="regression")
    with pytest.raises(SettingsError, match='problem="regression" needs a file whose rows have'):
        with_classes(job, [], print)
