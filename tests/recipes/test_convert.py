"""Adapters from format to format: over the model and without it, to the same bits."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import checkpoint, models
from lora_jax.config.arguments import SettingsError
from lora_jax.files import read_json
from lora_jax.hf.checkpoint.safetensors import load_file
from lora_jax.hf.peft.api import load_peft, save_peft
from lora_jax.hf.peft.directory import trained_over
from lora_jax.models import loading
from lora_jax.models.saving import save_model
from lora_jax.recipes import convert, inspect_adapter
from lora_jax.recipes.export import merge_adapter
from lora_jax.recipes.finetune import plan_model
from lora_jax.recipes.inspect import inspect

from tests.support.gguf_files import (
    UNTIED,
    adapted,
    as_llama_cpp,
    config_with,
    tensors_of,
    write_model,
)

pytestmark = pytest.mark.once

TOKENS = jax.ShapeDtypeStruct((1, 2), jnp.int32)
CONFIG = config_with(target_modules=("q_proj", "k_proj", "down_proj"), rank_pattern={"k_proj": 2})


@pytest.fixture(scope="module")
def model():
    return models.init(jax.random.key(0), UNTIED)


@pytest.fixture(scope="module")
def trained(model):
    return adapted(model, CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, trained):
    """The adapter in every format, and its base."""
    folder = tmp_path_factory.mktemp("formats")
    for to in ("peft", "vllm", "mlx", "orbax"):
        convert.save_adapter(model, trained, CONFIG, folder / to, to=to)
    convert.save_adapter(model, trained, CONFIG, folder / "a.gguf", to="gguf")
    save_model(folder / "base", model, model.params)
    return folder


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


KINDS = {"peft": "peft", "vllm": "peft", "mlx": "mlx", "orbax": "orbax", "a.gguf": "gguf"}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_every_format_is_recognized_and_loads(folder, model, trained, name, kind):
    assert convert.kind_of(folder / name) == kind
    loaded, read = convert.load_adapter(model, folder / name, lambda c: plan_model(model, c))
    merged, want = lora.merge(loaded), lora.merge(trained)
    if kind == "orbax":
        assert read == CONFIG
    if name in ("vllm", "mlx"):  # each scale was multiplied into B
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, want)
    else:
        same(merged, want)


@pytest.mark.parametrize(("name", "kind"), [x for x in KINDS.items() if x[1] != "orbax"])
def test_an_adapter_of_another_model_is_said(model, trained, tmp_path, name, kind):
    adapter, chat, to = tmp_path / name, Path("models/tiny-1b-instruct"), name.rpartition(".")[2]
    convert.save_adapter(model, trained, CONFIG, adapter, to=to, base_model_name="org/tiny-1b")
    with pytest.warns(UserWarning, match="names the base `org/tiny-1b`, and `tiny-1b-instruct` is"):
        convert.load_adapter(
            dataclasses.replace(model, checkpoint=chat), adapter, lambda c: plan_model(model, c)
        )


def test_a_merge_in_floats_is_no_gguf_file(tmp_path):
    with pytest.raises(ValueError, match="ends as a GGUF file.*requantize=True"):
        merge_adapter("smollm2", tmp_path, tmp_path / "new.gguf")
    assert not [*tmp_path.iterdir()]


def test_the_merged_model_and_the_gguf_file_say_the_same(folder, model, trained, tmp_path):
    convert.save_adapter(model, trained, CONFIG, tmp_path / "hf", to="hf")
    merged = models.load(tmp_path / "hf")
    base = write_model(tmp_path / "base.gguf", UNTIED, tensors_of(model))
    want = as_llama_cpp(base, folder / "a.gguf")
    for name, tensor in tensors_of(merged).items():
        np.testing.assert_allclose(tensor, want[name], atol=1e-5, rtol=1e-5)


# source, format, and whose file the result must be
CONVERSIONS = [
    ("peft", "gguf", "a.gguf"),
    ("orbax", "gguf", "a.gguf"),
    ("a.gguf", "gguf", "a.gguf"),
    ("orbax", "peft", "peft"),
    ("peft", "peft", "peft"),
    ("peft", "vllm", "vllm"),
    ("orbax", "vllm", "vllm"),
]


@pytest.mark.parametrize(("source", "to", "like"), CONVERSIONS)
def test_converting_without_the_model_writes_what_exporting_over_it_does(
    folder, tmp_path, source, to, like
):
    convert.convert(folder / source, tmp_path / like, to=to, base=folder / "base")
    if to == "gguf":
        assert (tmp_path / like).read_bytes() == (folder / like).read_bytes()
        return
    got, want = (load_file(d / like / "adapter_model.safetensors") for d in (tmp_path, folder))
    assert got.keys() == want.keys()
    same(got, want)
    got, want = (read_json(d / like / "adapter_config.json") for d in (tmp_path, folder))
    assert {n: v for n, v in got.items() if n != "task_type"} == {
        n: v for n, v in want.items() if n != "task_type"
    }


def test_the_base_is_named_as_for_training(folder, tmp_path, monkeypatch):
    convert.convert(folder / "a.gguf", tmp_path / "path", to="peft", base=folder / "base")
    want = (tmp_path / "path" / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(loading, "find_smollm2", lambda: folder / "base")
    monkeypatch.setattr(convert, "snapshot", lambda name, patterns: folder / "base")
    for name in ("smollm2", "owner/name"):
        convert.convert(folder / "a.gguf", tmp_path / "named", to="peft", base=name)
        assert (tmp_path / "named" / "adapter_model.safetensors").read_bytes() == want


def test_a_gguf_file_becomes_a_peft_directory(folder, model, trained, tmp_path):
    convert.convert(folder / "a.gguf", tmp_path / "p", to="peft", base=folder / "base")
    loaded, read = load_peft(tmp_path / "p", model.apply, model.params, TOKENS)
    same(lora.merge(loaded), lora.merge(trained))
    assert read.rank_pattern == {f"model.layers.{i}.self_attn.k_proj": 2 for i in range(2)}
    assert read.target_modules == ("down_proj", "k_proj", "q_proj")


def test_the_tensors_of_a_run_with_saved_modules_take_the_model(model, tmp_path):
    saved = config_with(modules_to_save=("lm_head",))
    checkpoint.save(tmp_path / "a", adapted(model, saved), saved)
    with pytest.raises(ValueError, match="`lm_head.kernel` takes the model to convert"):
        convert.convert(tmp_path / "a", tmp_path / "b", to="peft")
    table = config_with(target_modules=("embed_tokens",))
    checkpoint.save(tmp_path / "t", adapted(model, table), table)
    with pytest.raises(ValueError, match="`model.embed_tokens.embedding` takes the model to conv"):
        convert.convert(tmp_path / "t", tmp_path / "b", to="peft")
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_done_is_said(folder, model, trained, tmp_path):
    for source, to in (("a.gguf", "peft"), ("peft", "gguf")):
        with pytest.raises(ValueError, match="`base` is missing: a GGUF adapter orders some rows"):
            convert.convert(folder / source, tmp_path / "x", to=to)
    with pytest.raises(ValueError, match="`to` must be one of peft, vllm, gguf, mlx, got 'orbax'"):
        convert.convert(folder / "peft", tmp_path / "x", to="orbax")
    with pytest.raises(ValueError, match="`to` must be one of peft, vllm, gguf, mlx, hf, orbax"):
        convert.save_adapter(model, trained, CONFIG, tmp_path / "x", to="zip")
    with pytest.raises(ValueError, match="peft keeps the adapter's own float32; dtype float16 is"):
        convert.save_adapter(model, trained, CONFIG, tmp_path / "x", to="peft", dtype="float16")
    with pytest.raises(ValueError, match="has no step 3: it is no training run"):
        convert.check_source(folder / "peft", step=3)
    with pytest.raises(ValueError, match="holds a GGUF of type .model., not an adapter"):
        convert.check_source(write_model(tmp_path / "base.gguf", UNTIED, tensors_of(model)))
    assert [p.name for p in tmp_path.iterdir()] == ["base.gguf"]


# --- what an adapter is -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["peft", "orbax", "a.gguf"])
def test_the_report_of_an_adapter(folder, trained, name):
    found = inspect_adapter.read(folder / name)
    assert inspect_adapter.problems(found) == []
    facts = inspect_adapter.facts(found)
    assert facts["ranks"] == "4 in 4 modules, 2 in 2 modules"
    assert facts["scales"] == "1.5 in 4 modules, 3 in 2 modules"
    names = {"a.gguf": "attn_k ×2, attn_q ×2, ffn_down ×2"}
    assert facts["modules"] == names.get(name, "down_proj ×2, k_proj ×2, q_proj ×2")
    assert facts["size"] == "0.01 MiB"
    leaf = trained["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    for layer in range(2):
        change = float(leaf.scale[layer]) * np.linalg.norm(leaf.a[layer] @ leaf.b[layer])
        module = next(m for m in found.modules if f".{layer}." in m.name and "down" in m.name)
        np.testing.assert_allclose(inspect_adapter.norm(module), change, rtol=1e-5)
    text = inspect(str(folder / name), check=True)
    column = "ffn_down" if name == "a.gguf" else "down_proj"
    assert f"layer  {'attn_k' if name == 'a.gguf' else column:>9}" in text
    assert f"{change:.4g}" in text
    assert re.search(r"^  problems +none$", text, re.MULTILINE)


def test_an_adapter_is_not_written_over_itself(folder):
    with pytest.raises(SettingsError, match="is the adapter that is read: name another place"):
        convert.convert(folder / "peft", folder / "." / "peft", to="vllm")


@pytest.mark.parametrize("to", ["vllm", "mlx", "gguf"])
def test_a_start_that_changed_the_base_is_exported_as_a_plain_adapter(model, tmp_path, to):
    config = dataclasses.replace(CONFIG, init="pissa")
    tree = adapted(model, config)
    convert.save_adapter(model, tree, config, tmp_path / f"a.{to}", to=to)
    back, found = convert.load_adapter(model, tmp_path / f"a.{to}", lambda c: plan_model(model, c))
    assert found.init == "default"
    tokens = jnp.array([[1, 2, 3, 4]])
    want = lora.lorafy(model.apply)(tree, tokens)
    assert float(jnp.abs(want - model.apply(model.params, tokens)).max()) > 0.01
    got = lora.lorafy(model.apply)(back, tokens)
    # Factors of decompositions in float32.
    np.testing.assert_allclose(got, want, atol=1e-4 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_a_run_and_its_export_have_equal_reports(model, tmp_path, settings):
    config = config_with(modules_to_save=("lm_head",), **settings)
    tree = adapted(model, config)
    checkpoint.save(tmp_path / "orbax", tree, config)
    save_peft(tmp_path / "peft", tree, config)
    texts = [inspect(str(tmp_path / kind)).splitlines() for kind in ("peft", "orbax")]
    words = ("tensors", "parameters", "size", "modules_to_save", *settings)
    lines, of_run = ([x for x in text if x.split()[0] in words] for text in texts)
    assert lines == of_run and len(lines) == len(words)


def broken(folder, tmp_path, model, **changes):
    """The PEFT directory with some tensors replaced or (None) removed."""
    from lora_jax.hf.peft import directory

    fields, tensors = directory.read_directory(folder / "peft")
    for name, change in changes.items():
        key = next(k for k in tensors if k.replace(".", "_").endswith(name))
        if change is None:
            del tensors[key]
        else:
            tensors[key] = change(tensors[key])
    directory.write_directory(tmp_path / "broken", fields, tensors)
    return tmp_path / "broken"


B = "0_mlp_down_proj_lora_B_weight"
A = "0_mlp_down_proj_lora_A_weight"
MODULE = "`model.layers.0.mlp.down_proj`"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({B: None}, f"{MODULE} has no lora_B"),
        ({A: None}, f"{MODULE} has no lora_A"),
        ({B: lambda x: x * 0}, f"{MODULE} was not trained: its B is zero"),
        ({A: lambda x: x * 0}, f"{MODULE} has no effect: its A is zero"),
        ({A: lambda x: x * np.nan}, f"{MODULE} holds NaN or infinity"),
        ({A: lambda x: x[:3]}, f"{MODULE} has an A and a B of different ranks"),
        ({A: lambda x: x[:3], B: lambda x: np.ascontiguousarray(x[:, :3])},
         f"{MODULE} is of another rank than the config says"),
    ],
)  # fmt: skip
def test_what_looks_wrong_is_said_and_with_check_an_error(folder, tmp_path, model, changes, text):
    path = broken(folder, tmp_path, model, **changes)
    said = inspect(str(path))
    assert f"looks wrong              {text}" in said
    with pytest.raises(ValueError, match="broken: ") as error:
        inspect(str(path), check=True)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_config_that_is_not_supported_still_gets_a_report(folder, tmp_path, model):
    import json

    path = broken(folder, tmp_path, model) / "adapter_config.json"
    fields = {**json.loads(path.read_text()), "use_qalora": True}
    path.write_text(json.dumps({**fields, "target_modules": ["q_proj", "up_proj"]}))
    text = inspect(str(path.parent))
    assert '"use_qalora" = True is not supported' in text and "nan" in text
    path.write_text(json.dumps({**fields, "target_modules": ["up_proj"], "use_qalora": False}))
    assert "`up_proj` of target_modules is no module of the file" in inspect(str(path.parent))


def test_a_fresh_adapter_looks_untrained(model, tmp_path):
    fresh = lora.init(jax.random.key(0), plan_model(model, CONFIG), model.params)
    save_peft(tmp_path / "fresh", fresh, CONFIG)
    assert "and 3 more was not trained: its B is zero" in inspect(str(tmp_path / "fresh"))


def test_plain_parameters_are_described(model, tmp_path):
    checkpoint.save_params(tmp_path / "p", model.params)
    text = inspect(str(tmp_path / "p"), tensors=True)
    count = sum(x.size for x in jax.tree.leaves(model.params))
    assert f"{count:,} float32" in text and "model.layers.mlp.up_proj.kernel" in text


@pytest.mark.parametrize("source", ["peft", "orbax"])
def test_what_the_base_was_quantized_with_goes_from_file_to_file(model, tmp_path, source):
    held = dataclasses.replace(
        model, params=lora.quantize(model.params, ["q_proj"], format="int4", block_size=32)
    )
    config = config_with(target_modules=("q_proj",))
    convert.save_adapter(held, adapted(held, config), config, tmp_path / source, to=source)
    convert.convert(tmp_path / source, tmp_path / "again", to="peft")
    assert trained_over(tmp_path / "again") == 'format="int4", block_size=32'
