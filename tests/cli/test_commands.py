"""Every command for real, on a model that is small enough: files in, files and text out."""

import contextlib
import io
import json
import re
import sys

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.cli import commands, main
from lora_jax.hf.checkpoint.safetensors import load_file
from lora_jax.models.saving import save_model
from lora_jax.recipes import finetune
from lora_jax.recipes import generate as recipes_generate
from lora_jax.recipes.demo import task
from lora_jax.recipes.forms import read_trained

from tests.support import tiny

# Slow: every command loads and compiles a model.
pytestmark = [pytest.mark.once, pytest.mark.slow]

SENTENCE = "Booking for Iris: 4 guests, 19:30, Friday."


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny.write_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    examples, _ = task.make_examples(0, train=24, test=1)
    more = {"chat_template_kwargs": {"mood": "calm"}}
    lines = (json.dumps({"messages": task.conversation(e), **more}) for e in examples)
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def run(model, data, tmp_path_factory):
    """The folder of a run, from a TOML file with a flag that wins over it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "run.toml").write_text(
        f'model = "{model}"\ntrain_data = "{data}"\neval_data = "{data}"\n'
        "[lora]\nrank = 2\nalpha = 8\ntarget_modules = ['q_proj', 'down_proj']\n"
        f"[training]\nsteps = 3\nlearning_rate = 0.1\noutput_dir = '{folder}/out'\n"
        "progress = false\nbuckets = 1\n"
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["train", str(folder / "run.toml"), "--rank", "4", "--tensorboard"]) == 0
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder / "out"


def test_train_prints_the_losses_and_where_its_files_are(run):
    printed = (run.parent / "printed.txt").read_text()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    evals = [r["eval_loss"] for r in records if r["kind"] == "eval"]
    for step, loss in zip((0, 3), evals, strict=True):
        assert f"eval loss after step {step}: {loss:.4f}\n" in printed
    assert re.search(
        rf"3 steps, \d+ s; loss {losses[0]:.4f} -> {losses[-1]:.4f}; "
        rf"eval loss {evals[0]:.4f} -> {evals[-1]:.4f}\n"
        r".* tokens/s, .* model TFLOP/s a device, padding .* %, first step after .* s\n"
        r"plot and metrics: .*/out/loss.png, ",
        printed,
    )


def test_train_writes_adapter_checkpoint_metrics_and_plot(run):
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3]
    evals = [r["eval_loss"] for r in records if r["kind"] == "eval"]
    assert evals[-1] < evals[0]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "checkpoints" / "3").is_dir()
    assert list((run / "tensorboard").glob("events*"))


def test_train_packs_and_prints_how_much_is_padding(run, model, data, tmp_path, capsys):
    printed = (run.parent / "printed.txt").read_text()
    assert re.search(r"^buckets of \d+ tokens, \d+\.\d% padding \(", printed, re.MULTILINE)
    given = ["--model", model, "--train-data", data, "--output-dir", str(tmp_path / "out")]
    packed = ["--packing", "--packed-length", "400", "--steps", "1", "--no-progress"]
    assert main(["train", *given, *packed]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^packed rows of 400 tokens, \d+\.\d% padding \(", printed, re.MULTILINE)


def test_train_on_a_mesh_gives_the_losses_of_one_device(model, data, tmp_path, capsys):
    def losses(name, *flags):
        command = ["train", "--model", model, "--train-data", data, "--target-modules", "q_proj"]
        command += ["--steps", "2", "--batch-size", "8", "--output-dir", str(tmp_path / name)]
        assert main([*command, *flags]) == 0
        records = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in records]

    want = losses("one")
    assert losses("mesh", "--mesh", "data=2", "fsdp=-1") == pytest.approx(want, rel=1e-5)
    command = [
        "train",
        "--model",
        model,
        "--train-data",
        data,
        "--output-dir",
        str(tmp_path / "no"),
    ]
    capsys.readouterr()
    assert main([*command, "--target-modules", "q_proj", "--mesh", "fsdp=3"]) == 2
    assert "the number of devices is 8" in capsys.readouterr().err


def test_train_refuses_a_folder_that_holds_a_run(run, model, data, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    # Before the model is loaded: there is none of this name.
    line = ["train", "--model", "no.gguf", "--train-data", data, "--output-dir", str(run)]
    assert main([*line, "--no-progress"]) == 2
    error = capsys.readouterr().err
    assert "--output-dir` holds a run already" in error and error.count("\n") == 1
    assert (run / "metrics.jsonl").read_bytes() == before


def test_train_names_file_and_line_of_a_bad_record(model, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"prompt": "no completion"}\n')
    line = ["train", "--model", model, "--train-data", str(bad), "--output-dir"]
    assert main([*line, str(tmp_path / "out")]) == 1
    assert re.match(
        r'lora-jax train: .*bad.jsonl:2: missing field "completion"', capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_train_names_the_nearest_target(model, data, tmp_path, capsys):
    line = ["train", "--model", model, "--train-data", data, "--output-dir", str(tmp_path / "o")]
    assert main([*line, "--target-modules", "q_prj"]) == 2
    assert re.match(
        r'lora-jax train: `--target-modules` entry "q_prj" .*q_proj', capsys.readouterr().err
    )


def test_generate_with_and_without_adapter(model, run, capsys):
    line = ["generate", model, SENTENCE, "--max-new-tokens", "8"]
    loaded = models.load(model)
    adapted, _ = finetune.load_adapter(loaded, run / "adapter")
    chat = loaded.tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": SENTENCE}],
        add_generation_prompt=True,
    )
    cases = [
        (["--system", "Be brief."], loaded.params, chat),
        (["--system", "Be brief.", "--adapter", str(run / "adapter")], adapted, chat),
        (["--raw"], loaded.params, loaded.tokenizer.encode(SENTENCE)),
    ]
    outs = []
    for flags, params, prompt in cases:
        assert main([*line, *flags]) == 0
        (tokens,) = models.generate(
            loaded, params, [prompt], max_new_tokens=8, stop_tokens=[loaded.tokenizer.eos_id]
        )
        outs.append(capsys.readouterr().out)
        assert outs[-1] == loaded.tokenizer.decode(tokens) + "\n"
    assert len(set(outs)) == 3


def test_sampling_is_seeded(model, capsys):
    line = ["generate", model, SENTENCE, "--max-new-tokens", "12", "--temperature", "1.5"]
    outs = []
    for seed in ("1", "1", "2"):
        assert main([*line, "--seed", seed]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]


def test_merge_writes_a_model_that_says_the_same(model, run, tmp_path, capsys):
    assert main(["merge", model, str(run / "adapter"), str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    merged, base = models.load(tmp_path / "merged"), models.load(model)
    tokens = np.arange(12).reshape(1, 12)
    params, _ = finetune.load_adapter(base, run / "adapter")
    expected = lora.lorafy(base.apply)(params, tokens)
    # float32: A·B added to W first, or to its product
    np.testing.assert_allclose(merged.apply(merged.params, tokens), expected, atol=2e-5)
    assert abs(expected - base.apply(base.params, tokens)).max() > 1e-2
    assert main(["merge", model, str(run / "adapter"), str(tmp_path / "merged")]) == 1
    assert "exists already" in capsys.readouterr().err


def test_export_gives_the_adapter_that_train_wrote(model, run, tmp_path, capsys):
    assert main(["export", model, str(run), str(tmp_path / "adapter")]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    assert main(["export", model, str(tmp_path), str(tmp_path / "x")]) == 1
    assert "is neither an adapter" in capsys.readouterr().err
    assert main(["export", model, str(run), str(tmp_path / "x"), "--step", "7"]) == 1
    assert "there is no step 7; kept are 2, 3" in capsys.readouterr().err


def test_a_quantized_run_is_exported_over_its_own_base(model, data, tmp_path, capsys):
    """QLoRA: the checkpoint fits the base as it was held, and nothing else."""
    held, out = ["--quantize", "nf4", "--quantize-block", "16"], tmp_path / "out"
    line = ["train", "--model", model, "--train-data", data, "--output-dir", str(out)]
    assert main([*line, "--no-progress", "--steps", "2", "--rank", "2", *held]) == 0
    adapter = tmp_path / "adapter"
    assert main(["export", model, str(out), str(adapter)]) == 1
    error = capsys.readouterr().err
    assert "one quantized with --quantize nf4, --quantize-block 16, and this one is in" in error
    assert not adapter.exists()
    assert main(["export", model, str(out), str(adapter), *held]) == 0
    name = "adapter_model.safetensors"
    assert (adapter / name).read_bytes() == (out / "adapter" / name).read_bytes()
    # Merged, the base is what its codes stand for.
    assert main(["merge", model, str(adapter), str(tmp_path / "merged"), *held]) == 0
    base = finetune.load_model(model, quantize="nf4", quantize_block=16)
    params, _ = finetune.load_adapter(base, adapter)
    merged, tokens = models.load(tmp_path / "merged"), np.arange(12).reshape(1, 12)
    want = lora.lorafy(base.apply)(params, tokens)
    np.testing.assert_allclose(merged.apply(merged.params, tokens), want, atol=2e-5)
    floats = models.load(model)
    assert abs(want - floats.apply(floats.params, tokens)).max() > 1e-2
    capsys.readouterr()
    flags = ["--max-new-tokens", "4", "--adapter", str(adapter), *held]
    assert main(["generate", model, SENTENCE, *flags]) == 0
    # Every training row had the same system message.
    system = {"role": "system", "content": task.INSTRUCTION}
    chat = base.tokenizer.apply_chat_template(
        [system, {"role": "user", "content": SENTENCE}], add_generation_prompt=True
    )
    (tokens,) = models.generate(
        base, params, [chat], max_new_tokens=4, stop_tokens=[base.tokenizer.eos_id]
    )
    assert capsys.readouterr().out == base.tokenizer.decode(tokens) + "\n"
    with pytest.warns(UserWarning, match='this one is in floats: .* format="nf4", block_size=16'):
        assert main(["generate", model, SENTENCE, *flags[:4]]) == 0


def test_every_format_gives_the_adapter_back(model, run, tmp_path, capsys):
    """train -> gguf -> Orbax -> PEFT and vLLM, over the model and without it."""
    adapter, gguf, own = str(run / "adapter"), str(tmp_path / "a.gguf"), str(tmp_path / "own")
    assert main(["export", model, str(run), gguf, "--to", "gguf"]) == 0
    assert main(["import", model, gguf, own]) == 0
    assert main(["convert", own, str(tmp_path / "peft"), "--to", "peft"]) == 0
    line = ["convert", adapter, str(tmp_path / "b.gguf"), "--to", "gguf", "--base", model]
    assert main(line) == 0
    assert main(["export", model, adapter, str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert main(["export", model, adapter, str(tmp_path / "vllm"), "--to", "vllm"]) == 0
    out = capsys.readouterr().out
    assert out.count("wrote the adapter to") == 5 and "wrote the merged model to" in out
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    tensors = [load_file(d / "adapter_model.safetensors") for d in (run / "adapter",
               tmp_path / "peft", tmp_path / "vllm")]  # fmt: skip
    for other in tensors[1:]:
        jax.tree.map(np.testing.assert_array_equal, tensors[0], other)
    merged, base = models.load(tmp_path / "hf"), models.load(model)
    params, _ = finetune.load_adapter(base, own)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged.params, lora.merge(params)
    )
    for path in (gguf, own):
        assert main(["inspect", path, "--check"]) == 0
        assert "‖s·B·A‖" in capsys.readouterr().out


def test_a_run_keeps_what_all_its_chats_had(run):
    for folder in (run, run / "adapter"):
        kept = read_trained(folder)
        assert kept.form == "messages" and kept.template == {"mood": "calm"}
        assert (
            kept.system
            == task.conversation(task.make_examples(0, train=1, test=1)[0][0])[0]["content"]
        )


def test_export_refuses_another_base(run, tmp_path, capsys):
    other = tiny.tiny_model()
    params = jax.tree.map(lambda x: x + 1, other.params)
    save_model(tmp_path / "other", other, params)
    assert main(["export", str(tmp_path / "other"), str(run), str(tmp_path / "x")]) == 1
    assert "was made over another base model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_export_names_the_form_that_a_run_was_trained_in(model, run, tmp_path, capsys):
    """Leaves of another form may have other names: one sentence, not a list of them."""
    line = ["export", model, str(run), str(tmp_path / "x"), "--quantize", "int4"]
    assert main([*line, "--quantize-block", "16"]) == 1
    said = (
        "one in floats, and this one is quantized with --quantize int4, --quantize-block 16; load"
        " the base it was trained on in the same form: leave `--quantize` out; or give "
        f"{run / 'adapter'}, which loads over the base in any form, with a warning"
    )
    assert capsys.readouterr().err.strip().endswith(said)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("adapter", ["PEFT adapter (LORA)", "lora_alpha", "q_proj", "tensors"]),
        ("", ["Orbax checkpoint", "q_proj ×2", "loss of step 1", "loss of step 3"]),
        ("adapter/adapter_model.safetensors", ["safetensors file", "parameters"]),
    ],
)
def test_inspect_what_a_run_wrote(run, path, words, capsys):
    assert main(["inspect", str(run / path)]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words), out


def test_inspect_counts_a_models_parameters(model, capsys):
    assert main(["inspect", model, "--tensors"]) == 0
    out = capsys.readouterr().out
    count = sum(x.size for x in jax.tree.leaves(models.load(model).params))
    assert f"{count:,} F32" in out
    assert re.search(r"model.layers.1.self_attn.k_proj.weight +F32 +16×32", out)


def test_the_demo_on_a_tiny_model(model, tmp_path, capsys):
    line = ["demo", "--model", model, "--output-dir", str(tmp_path / "demo"), "--no-progress"]
    line += ["--steps", "3", "--batch-size", "4", "--test-examples", "6"]
    outs = []
    for _ in range(2):
        assert main(line) == 0
        outs.append(capsys.readouterr().out)
    found = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert found["before"] == found["after"] == found["reloaded"] == 0.0
    assert "trainable params: " in outs[0] and "optimizer state" in outs[0]
    for name in ("adapter/adapter_model.safetensors", "checkpoints/3", "loss.png", "metrics.jsonl"):
        assert (tmp_path / "demo" / name).exists(), name
    # A repeated run gives the same numbers; only the seconds differ.
    first, second = (re.sub(r"done in .*", "", out) for out in outs)
    assert first == second


def test_a_length_above_the_models_context_is_a_warning(model, data, tmp_path):
    line = ["train", "--model", model, "--train-data", data, "--output-dir", str(tmp_path / "o")]
    with pytest.warns(UserWarning, match="`max_length` 100000 is above the model's context"):
        assert main([*line, "--steps", "1", "--max-length", "100000", "--no-progress"]) == 0


def test_answers_to_several_prompts_stand_under_them(model, capsys):
    line = ["generate", model, "--raw", "--max-new-tokens", "4"]
    outs = []
    for prompts in (["one"], ["two"], ["one", "two"]):
        assert main([*line, *prompts]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[2] == f"> one\n{outs[0]}\n> two\n{outs[1]}\n"


@pytest.mark.parametrize("count", ["1", "9"])
def test_a_terminal_gets_tokens_as_they_come(model, capsys, monkeypatch, count):
    line = ["generate", model, "--raw", "--max-new-tokens", count, "--temperature", "1"]
    for prompts in (["one"], ["one", "two", "one"]):
        assert main([*line, *prompts]) == 0
        whole = capsys.readouterr().out
        parts = []
        with monkeypatch.context() as patched:
            patched.setattr(sys.stdout, "isatty", lambda: True, raising=False)
            patched.setattr(commands, "_write", parts.append)
            assert main([*line, *prompts]) == 0
        assert "".join(parts) == whole
        # Nine tokens come in three parts; label, end and gap are parts of their own.
        assert count == "1" or len(parts) > 4 * len(prompts)


@pytest.mark.parametrize("waits", [True, False])
def test_a_pipe_gets_each_answer_before_it_sends_the_next_prompt(
    model, capsys, monkeypatch, tmp_path, waits
):
    """Prompts in a file are answered in batches; what comes through a pipe may wait for us."""
    seen, path = [], tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n\nthree\n")
    real = recipes_generate.generate_texts

    def counted(*args, **options):
        seen.append(len(args[2]))
        return real(*args, **options)

    monkeypatch.setattr(recipes_generate, "generate_texts", counted)
    with path.open() as file:
        monkeypatch.setattr(sys, "stdin", io.StringIO(path.read_text()) if waits else file)
        assert main(["generate", model, "-", "--raw", "--max-new-tokens", "2"]) == 0
    assert seen == ([1, 1, 1] if waits else [3])
    assert re.findall("^> (.*)$", capsys.readouterr().out, re.M) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--remat ful", "`--remat` must be one of none, projections, full"),
        ("--device-memory 2", "`--device-memory` needs a unit: write 2GB or 2GiB"),
        ("--mesh data=3", "`--mesh` is data=3, but the number of devices is 8"),
        ("--mesh fdsp=8", "`--mesh` has no axis 'fdsp'"),
        ("--mesh data=4 fsdp=2 --batch-size 6", "`--batch-size` is 6, but its rows are spread"),
        ("--packed-length 8", "`--packed-length` is for packed rows: add --packing, or leave it"),
        ("--packing --packed-length 8", "`--packed-length` is 8 tokens, but an example has"),
        ("--profile 2:5", "`--profile` is '2:5', but the run ends after step 2"),
        ("--max-length 0", "`--max-length` must be an integer of at least 2, got 0"),
        ("--roles zz=io", '`--roles` entry "zz" matches no leaf; nearest'),
        ("--processes 2", "`--processes` is for a run of several processes: add --distributed"),
        ("--quantize-block 32", "`--quantize-block` is 32, and the base is not quantized"),
        ("--quantize file", "`--quantize` has no blocks to keep, as"),
    ],
)
def test_a_wrong_setting_is_a_sentence_with_status_2(model, data, tmp_path, capsys, flags, message):
    line = ["train", "--model", model, "--train-data", data, "--output-dir", str(tmp_path / "o")]
    assert main([*line, "--steps", "2", "--no-progress", *flags.split()]) == 2
    assert capsys.readouterr().err.startswith(f"lora-jax train: {message}")


def test_one_prompt_on_standard_input_has_the_answer_of_one_on_the_command_line(
    model, capsys, monkeypatch
):
    line = ["generate", model, "--raw", "--max-new-tokens", "4"]
    assert main([*line, "one"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    assert main([*line, "-"]) == 0
    assert capsys.readouterr().out == expected


def test_a_trace_lies_where_the_summary_says(model, data, tmp_path, capsys):
    out = tmp_path / "o"
    line = ["train", "--model", model, "--train-data", data, "--output-dir", str(out)]
    assert main([*line, "--steps", "2", "--no-progress", "--profile", "2:2"]) == 0
    printed = capsys.readouterr().out
    assert f"trace: {out / 'profile'}, for TensorBoard" in printed
    assert list((out / "profile").rglob("*.xplane.pb"))
    assert "one of 8 devices is used: --mesh data=-1 spreads" in printed
