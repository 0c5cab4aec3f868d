"""Adapters on disk: they come back to the bit, over their own base only, and never half."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import checkpoint, files
from lora_jax.checkpoint import adapters, checksums
from lora_jax.checkpoint.checksums import split_checksums, with_checksums
from lora_jax.checkpoint.flat import differences, flatten, unflatten
from lora_jax.checkpoint.folder import check_space, one_line

from tests.support.random_arrays import moved
from tests.support.train_toys import (
    CONFIG,
    TOKENS,
    Toy,
    assert_same_bits,
    toy_lora,
    toy_params,
)

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def trained():
    return moved(toy_lora())


@pytest.fixture
def saved(tmp_path, trained):
    checkpoint.save(tmp_path / "adapter", trained, CONFIG)
    return tmp_path / "adapter"


def test_adapter_comes_back_with_its_config(saved, trained):
    restored, config = checkpoint.restore(saved, Toy().apply, toy_params(), TOKENS)
    assert_same_bits(restored, trained)
    assert jax.tree.structure(restored) == jax.tree.structure(trained)
    assert config == CONFIG == checkpoint.read_config(saved)
    assert_same_bits(checkpoint.restore_into(saved, toy_lora()), trained)


def test_only_adapters_are_written(saved):
    embedding = np.asarray(toy_params()["embed"]["embedding"]).tobytes()
    files = [p for p in saved.rglob("*") if p.is_file()]
    assert files and not any(embedding[:64] in p.read_bytes() for p in files)
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]  # nothing temporary is left


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_come_back(tmp_path, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), toy_params())
    plan = lora.plan(CONFIG, Toy().apply, params, TOKENS)
    trained = moved(lora.init(jax.random.key(0), plan, params))
    checkpoint.save(tmp_path / "a", trained, CONFIG)
    restored, _ = checkpoint.restore(tmp_path / "a", Toy().apply, params, TOKENS)
    assert [x.dtype for x in jax.tree.leaves(restored)] == [
        x.dtype for x in jax.tree.leaves(trained)
    ]
    assert_same_bits(restored, trained)


def test_a_saved_module_comes_back(tmp_path):
    config = lora.LoraConfig(rank=2, target_modules=("mix",), modules_to_save=("embed",))
    plan = lora.plan(config, Toy().apply, toy_params(), TOKENS)
    trained = moved(lora.init(jax.random.key(0), plan, toy_params()))
    checkpoint.save(tmp_path / "a", trained, config)
    restored, got = checkpoint.restore(tmp_path / "a", Toy().apply, toy_params(), TOKENS)
    assert got == config
    assert_same_bits(restored, trained)


OTHERS = {
    "rank": (dict(rank=4, alpha=8), "rank 2, and `config` gives it 4"),
    "smaller rank": (dict(rank=1, alpha=2), "rank 2, and `config` gives it 1"),
    "scale": (dict(alpha=6), "scale 2, and `config` gives it 0 or 3"),
    "rsLoRA": (dict(use_rslora=True), "scale 2, and `config` gives it 0 or 2.82843"),
    "DoRA": (dict(use_dora=True), "`use_dora` False, and `config` gives it True"),
    "bias": (dict(lora_bias=True), "`lora_bias` False, and `config` gives it True"),
    "dropout": (dict(dropout=0.1), "dropout 0.2, and `config` gives it 0.1"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_config_is_an_error_before_anything_is_written(tmp_path, trained, other):
    changes, text = OTHERS[other]
    config = dataclasses.replace(CONFIG, **changes)
    for save in (checkpoint.save, checkpoint.save_async):
        with pytest.raises(ValueError, match=f"`mix.kernel` has {text}: pass the config that"):
            save(tmp_path / "a", trained, config)
    assert not list(tmp_path.iterdir())


def test_a_base_that_an_optimizer_moved_is_an_error(tmp_path, trained):
    mix = trained["mix"]["kernel"]
    moved_too = dataclasses.replace(mix, scale=mix.scale * 1.001, w=mix.w + 0.01)
    with pytest.raises(ValueError, match="If an optimizer ran on the whole tree, the base has mov"):
        checkpoint.save(tmp_path / "a", {**trained, "mix": {"kernel": moved_too}}, CONFIG)


def test_what_is_no_whole_adapter_is_not_written(tmp_path, trained):
    mix = trained["mix"]["kernel"]
    for field in ("a", "b"):
        broken = dataclasses.replace(mix, **{field: getattr(mix, field).at[0, 1].set(jnp.nan)})
        with pytest.raises(ValueError, match=f"holds NaN or infinity in `mix.kernel.{field}`"):
            checkpoint.save(tmp_path / "a", {**trained, "mix": {"kernel": broken}}, CONFIG)
    with pytest.raises(ValueError, match="is a stack of adapters: pass one of them"):
        checkpoint.save(tmp_path / "a", lora.stack([trained, trained]), CONFIG)
    with pytest.raises(ValueError, match="`lora_params` has no leaf that trains"):
        checkpoint.save(tmp_path / "a", toy_params(), CONFIG)
    assert not list(tmp_path.iterdir())


def test_an_adapter_out_of_a_stack_is_saved_with_its_own_config(tmp_path):
    one = moved(toy_lora(dataclasses.replace(CONFIG, dropout=0.0)))
    larger = dataclasses.replace(CONFIG, dropout=0.0, rank=3)
    stacked = lora.stack([one, moved(toy_lora(larger), seed=5)])
    config = dataclasses.replace(CONFIG, dropout=0.0)
    checkpoint.save(tmp_path / "a", lora.multi.adapter(stacked, 0), config)
    restored, _ = checkpoint.restore(tmp_path / "a", Toy().apply, toy_params(), TOKENS)
    np.testing.assert_array_equal(restored["mix"]["kernel"].a[:, :2], one["mix"]["kernel"].a)


def test_saving_again_replaces(saved, trained):
    other = moved(toy_lora(), seed=9)
    checkpoint.save(saved, other, CONFIG)
    assert_same_bits(checkpoint.restore_into(saved, toy_lora()), other)
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_what_is_not_an_adapter_is_not_replaced(tmp_path, trained):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="exists and is not an adapter written by lora_jax"):
        checkpoint.save(tmp_path, trained, CONFIG)
    with pytest.raises(FileExistsError, match="thesis.tex exists and is not"):
        checkpoint.save(tmp_path / "thesis.tex", trained, CONFIG)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    (tmp_path / "new").mkdir()
    checkpoint.save(tmp_path / "new", trained, CONFIG)  # an empty folder is nobody's


def fail(*args):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("when", ["write", "exchange", "rename"])
def test_failed_save_leaves_the_one_before(saved, trained, monkeypatch, when):
    if when == "write":

        def half(directory, *rest):
            directory.mkdir()
            (directory / "half").write_text("half")
            fail()

        monkeypatch.setattr(adapters, "_write", half)
    elif when == "exchange":
        monkeypatch.setattr(files, "exchange", fail)
    else:
        rename = os.rename
        monkeypatch.setattr(files, "exchange", lambda a, b: False)
        monkeypatch.setattr(
            files.os, "rename", lambda a, b: (fail if ".tmp" in str(a) + str(b) else rename)(a, b)
        )
    with pytest.raises(OSError, match=r"cannot write .*adapter: No space left on device; .*intact"):
        checkpoint.save(saved, moved(toy_lora(), seed=9), CONFIG)
    monkeypatch.undo()
    assert_same_bits(checkpoint.restore_into(saved, toy_lora()), trained)
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_another_base_is_refused(saved):
    def restore(params):
        return checkpoint.restore(saved, Toy().apply, params, TOKENS)

    with pytest.raises(ValueError, match=r"another base model: `embed.embedding` \(float32\[23,16"):
        restore(toy_params(seed=1))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy_params())
    with pytest.raises(ValueError, match=r"`mix.kernel` is bfloat16\[16,16\], was float32"):
        restore(half)
    params = toy_params()
    with pytest.raises(ValueError, match="`mix.kernel` is missing; `mix.w` is new; load the base"):
        restore({"embed": params["embed"], "mix": {"w": params["mix"]["kernel"]}})


def test_adapter_of_another_shape_is_refused(saved):
    config = dataclasses.replace(CONFIG, rank=3, alpha=6)
    with pytest.raises(ValueError, match=r"`mix.kernel.a` is float32\[16,2\], expected .*\[16,3\]"):
        checkpoint.restore_into(saved, toy_lora(config))


def test_another_plan_is_refused(saved):
    dropout = dataclasses.replace(CONFIG, dropout=0.5)
    with pytest.raises(ValueError, match=r"another plan: `mix.kernel`: dropout was 0.2 and is 0.5"):
        checkpoint.restore_into(saved, toy_lora(dropout))
    louder = dataclasses.replace(CONFIG, alpha=5)
    with pytest.raises(ValueError, match=r"`mix.kernel`: scale was 2.0 and is 2.5; use the config"):
        checkpoint.restore_into(saved, toy_lora(louder))
    both = dataclasses.replace(CONFIG, target_modules=("mix", "embed"))
    with pytest.raises(
        ValueError, match="`embed.embedding` has an adapter that the checkpoint lacks"
    ):
        checkpoint.restore_into(saved, toy_lora(both))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_changes_the_base_comes_back(tmp_path, init):
    config = lora.LoraConfig(rank=2, target_modules=("mix",), init=init)
    trained = moved(toy_lora(config))
    checkpoint.save(tmp_path / "a", trained, config)
    restored, got = checkpoint.restore(tmp_path / "a", Toy().apply, toy_params(), TOKENS)
    assert got == config
    assert_same_bits(restored, trained)
    with pytest.raises(ValueError, match="was made over another base model"):
        checkpoint.restore(tmp_path / "a", Toy().apply, toy_params(seed=1), TOKENS)


def test_every_field_of_a_config_comes_back(tmp_path, trained):
    config = lora.LoraConfig(
        rank=2, alpha=4, target_modules=("mix",), exclude_modules=("embed",), dropout=0.2,
        rank_pattern={"mix": 2}, alpha_pattern={"mix": 4}, roles={"mix.kernel": "io"},
        extra={"task_type": "CAUSAL_LM", "revision": "main"},
    )  # fmt: skip
    checkpoint.save(tmp_path / "a", trained, config)
    assert checkpoint.read_config(tmp_path / "a") == config
    assert checkpoint.restore(tmp_path / "a", Toy().apply, toy_params(), TOKENS)[1] == config


def test_damaged_arrays_are_one_line(saved):
    for path in saved.glob("adapter/**/d/*"):
        path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(ValueError, match="adapter: its arrays cannot be read: ") as error:
        checkpoint.restore_into(saved, toy_lora())
    assert "\n" not in str(error.value)


# Orbax leaves coroutines behind when a read fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_byte_is_never_read(saved):
    """Everywhere in every file: an error, or the numbers that were written."""
    whole = checkpoint.restore_into(saved, toy_lora())
    refused = 0
    for path in sorted(p for p in saved.rglob("*") if p.is_file()):
        content = path.read_bytes()
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            found = checkpoint.restore_into(saved, toy_lora())
        except ValueError as error:
            assert str(saved) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert_same_bits(found, whole)
        path.write_bytes(content)
    assert refused > 3


@pytest.mark.parametrize("part", ["checksums", "plan", "config"])
def test_meta_that_was_edited_is_refused(saved, part):
    path = saved / "meta" / "metadata"
    meta = json.loads(path.read_text())
    text = {"checksums": "has no checksums: it is damaged, or written by"}
    path.write_text(json.dumps({k: v for k, v in meta.items() if k != part}))
    with pytest.raises(ValueError, match=text.get(part, "has changed since it was written")):
        checkpoint.find(saved)


def test_leaves_are_read_without_the_model(saved, trained):
    found = checkpoint.find(saved)
    leaf = adapters.read_leaves(found)["mix.kernel"]
    kernel = trained["mix"]["kernel"]
    assert_same_bits((leaf.a, leaf.b, leaf.scale), (kernel.a, kernel.b, kernel.scale))
    assert (leaf.roles, leaf.dropout, leaf.shape, leaf.m) == ("io", 0.2, (16, 16), None)
    assert leaf.w.dtype == kernel.dtype


def test_what_is_no_adapter_is_refused(tmp_path, saved, monkeypatch):
    with pytest.raises(FileNotFoundError, match="none: no such adapter folder"):
        checkpoint.find(tmp_path / "none")
    (tmp_path / "peft").mkdir()
    with pytest.raises(ValueError, match="a PEFT folder is read by lora.hf.load_peft"):
        checkpoint.find(tmp_path / "peft")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="the run has no checkpoint yet"):
        checkpoint.find(tmp_path / "run")
    path = saved / "meta" / "metadata"

    def rewrite(**changes):
        meta, sums = split_checksums(json.loads(path.read_text()), saved)
        meta = {k: v for k, v in {**meta, **changes}.items() if v is not None}
        monkeypatch.setattr(checksums, "_sums", lambda arrays: sums)
        path.write_text(json.dumps(with_checksums(meta, {})))

    rewrite(format="lora_jax adapter 9")
    with pytest.raises(ValueError, match="expected format 'lora_jax adapter 2', got '.* 9'"):
        checkpoint.find(saved)
    rewrite(format="lora_jax adapter 2", plan=None)
    with pytest.raises(ValueError, match="adapter: its `meta` has no `plan`; it is damaged"):
        checkpoint.find(saved)
    path.write_text("{")
    with pytest.raises(ValueError, match="adapter: its `meta` cannot be read: "):
        checkpoint.find(saved)
    with pytest.raises(ValueError, match="is one adapter, not a run: it has no step 3"):
        checkpoint.find(saved, step=3)


def test_fingerprint_sees_the_whole_length_of_a_leaf():
    one = {"w": jnp.zeros((10, 100))}
    for place in [(0, 0), (9, 99)]:
        assert checkpoint.fingerprint({"w": one["w"].at[place].set(1)}) != checkpoint.fingerprint(
            one
        )
    # Two models that differ from some row on, as where only the last layers were trained.
    for row in range(1, 10):
        other = {"w": one["w"].at[row].set(1)}
        assert checkpoint.fingerprint(other) != checkpoint.fingerprint(one)


def test_fingerprint_sees_names_shapes_dtypes_and_numbers():
    params = toy_params()
    one = checkpoint.fingerprint(params)
    assert one == checkpoint.fingerprint(toy_lora())  # an adapted tree has its base's
    assert one == checkpoint.fingerprint(jax.tree.map(np.asarray, params))
    assert set(one) == {"embed.embedding", "mix.kernel"}
    assert one["mix.kernel"].startswith("float32[16,16] ")
    scaled = jax.tree.map(lambda x: x * 1.0001, params)
    assert all(checkpoint.fingerprint(scaled)[n] != one[n] for n in one)
    odd = {"empty": jnp.zeros((0, 3)), "scalar": jnp.float32(2), "one": jnp.ones((1,))}
    assert len(set(checkpoint.fingerprint(odd).values())) == 3


def test_fingerprint_sees_the_order_of_a_quantized_weights_dims():
    """The same codes with inputs and outputs exchanged are another weight."""
    w = np.eye(64, dtype=np.float32)
    one, other = (lora.quantize({"w": w}, ["w"], roles={"w": roles}) for roles in ("io", "oi"))
    np.testing.assert_array_equal(one["w"].packed, other["w"].packed)
    assert checkpoint.fingerprint(one) != checkpoint.fingerprint(other)


def test_an_array_that_changed_on_disk_is_damaged(tmp_path):
    arrays = {"a": np.arange(6.0), "b": np.ones(3)}
    _, sums = split_checksums(with_checksums({}, arrays), tmp_path)
    checksums.check_arrays(arrays, sums, tmp_path)
    with pytest.raises(checksums.DamagedError, match="array `b` has changed since it was written"):
        checksums.check_arrays({**arrays, "b": np.ones(3) + 1e-7}, sums, tmp_path)
    with pytest.raises(checksums.DamagedError, match="array `a` is missing"):
        checksums.check_arrays({"b": arrays["b"]}, sums, tmp_path)


def test_flat_names_every_leaf_once():
    tree = {"a": [jnp.ones(2), None], "b/c": toy_lora()}
    named = flatten(tree)
    assert sorted(named) == [
        "a.0", "b.c.embed.embedding", "b.c.mix.kernel.a", "b.c.mix.kernel.b",
        "b.c.mix.kernel.scale", "b.c.mix.kernel.w",
    ]  # fmt: skip
    assert_same_bits(unflatten(tree, named), tree)
    with pytest.raises(ValueError, match="two leaves of the tree have the same name `b.c`"):
        flatten({"b": {"c": 1}, "b.c": 2})
    assert differences({"x": jnp.ones(2)}, {"y": jnp.ones(2)}) == [
        "`x` is missing", "`y` is left over",
    ]  # fmt: skip


def test_state_with_a_random_key_comes_back(tmp_path):
    state = {"key": jax.random.key(7), "step": jnp.int32(3), "x": [jnp.arange(5.0), None]}
    blank = {"key": jax.random.key(0), "step": jnp.int32(0), "x": [jnp.zeros(5), None]}
    with checkpoint.manager(tmp_path, keep=2) as opened:
        assert checkpoint.read_meta_of(opened) is None
        with pytest.raises(FileNotFoundError, match="there is no checkpoint to restore"):
            checkpoint.restore_state(opened, blank)
        for step in (1, 5, 7):
            checkpoint.save_state(opened, step, state, {"position": {"next_index": step}})
        assert opened.all_steps() == [5, 7]
    with checkpoint.manager(tmp_path) as opened:
        found = checkpoint.restore_state(opened, blank)
        with pytest.raises(ValueError, match="step 7 is of another run: `y` is missing; `step` is"):
            wrong = {k: v for k, v in blank.items() if k != "step"}
            checkpoint.restore_state(opened, {**wrong, "y": jnp.zeros(1)})
    assert (found.step, found.meta) == (7, {"position": {"next_index": 7}})
    assert jax.random.key_data(found.state["key"]).tolist() == [0, 7]
    assert_same_bits(found.state["x"], state["x"])
    assert int(jax.random.bits(found.state["key"])) == int(jax.random.bits(state["key"]))


def test_one_line_of_long_errors():
    assert one_line(OSError(13, "Permission denied", "x")) == "Permission denied"
    assert one_line(ValueError("INTERNAL: tensorstore\n [OS error 28: No space left on device] at"
                               " 0x7f")) == "No space left on device"  # fmt: skip
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError("x" * 300)) == "x" * 200 + "..."
    assert one_line(KeyError()) == "KeyError"


def test_full_disk_is_known_beforehand(tmp_path, monkeypatch, trained):
    import shutil

    check_space(tmp_path, {"x": jnp.ones(3)})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**17))
    with pytest.raises(OSError, match=r"No space left on device \(0.52 MiB are needed and 0.1"):
        check_space(tmp_path, {"x": jnp.ones(2**17)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(OSError, match=r"cannot write .*/a: No space left on device \(0.02 MiB"):
        checkpoint.save(tmp_path / "a", trained, CONFIG)
    assert list(tmp_path.iterdir()) == []
