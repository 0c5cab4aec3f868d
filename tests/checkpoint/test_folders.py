"""Folders that change as a whole, saves in the background, plain parameters, and meshes."""

import os
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import checkpoint
from lora_jax.checkpoint import adapters, swap

from tests.checkpoint.test_adapters import assert_same_bits, moved
from tests.support.places import ROOT
from tests.support.train_toys import CONFIG, TOKENS, Toy, toy_lora, toy_params

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def trained():
    return moved(toy_lora())


def write_text(text):
    def write(folder):
        folder.mkdir()
        (folder / "text").write_text(text)

    return write


@pytest.mark.parametrize("can", [True, False])
def test_a_folder_is_replaced(tmp_path, monkeypatch, can):
    if not can:
        monkeypatch.setattr(swap, "exchange", lambda a, b: False)
    for text in ("one", "two", "three"):
        swap.replace(tmp_path / "deep" / "f", write_text(text))
        assert (tmp_path / "deep" / "f" / "text").read_text() == text
        assert [p.name for p in (tmp_path / "deep").iterdir()] == ["f"]


def test_folders_are_exchanged_in_one_step(tmp_path):
    for name in "ab":
        write_text(name)(tmp_path / name)
    assert swap.exchange(tmp_path / "a", tmp_path / "b") is sys.platform.startswith("linux")
    if sys.platform.startswith("linux"):
        assert (tmp_path / "a" / "text").read_text() == "b"
        with pytest.raises(FileNotFoundError, match="No such file or directory"):
            swap.exchange(tmp_path / "a", tmp_path / "none")


def test_what_the_dead_left_is_removed_and_what_the_living_write_stays(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    swap.replace(tmp_path / "f", write_text("one"))
    names = {who: f".f.{host}-{pid}-0a1b2c3d.new" for who, host, pid in (
        ("dead", swap._host(), dead.pid), ("living", swap._host(), os.getpid()),
        ("far", "elsewhere", dead.pid),
    )}  # fmt: skip
    for name in names.values():
        write_text("half")(tmp_path / name)
    swap.replace(tmp_path / "f", write_text("two"))
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"f", names["living"], names["far"]}


def test_an_old_folder_that_waits_is_named(tmp_path, trained):
    checkpoint.save(tmp_path / "a", trained, CONFIG)
    old = tmp_path / f".a.{swap._host()}-1-0a1b2c3d.new.old"
    (tmp_path / "a").rename(old)
    with pytest.raises(FileNotFoundError, match=f"a save was interrupted: rename .*{old.name}"):
        checkpoint.find(tmp_path / "a")
    assert_same_bits(checkpoint.restore_into(old, toy_lora()), trained)


# Processes are killed at each of these moments of replacing a folder by another, at last one that
# replaces an adapter.
KILLED = """
    import os, pathlib, signal, sys
    sys.path.insert(0, {root!r})
    from lora_jax.checkpoint import swap

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def write(folder, text="after", end=lambda: None):
        folder.mkdir()
        (folder / "text").write_text(text)
        end()

    def no_exchange():
        swap.exchange = lambda a, b: False

    MOMENTS = dict(
        writing=lambda: None,
        written=lambda: setattr(swap, "_sync", die),
        synced=lambda: setattr(swap, "_put", die),
        swapped=lambda: setattr(swap.shutil, "rmtree", die),
        fallback=lambda: (no_exchange(), setattr(swap.shutil, "rmtree", die)),
    )
    for moment, prepare in MOMENTS.items():
        if os.fork() == 0:
            prepare()
            end = die if moment == "writing" else lambda: None
            swap.replace(pathlib.Path({place!r} + moment), lambda f: write(f, end=end))
            os._exit(9)
        assert os.wait()[1] == signal.SIGKILL, moment
    print(" ".join(MOMENTS), flush=True)

    from lora_jax import checkpoint
    from lora_jax.checkpoint import adapters
    from tests.support.train_toys import CONFIG, toy_lora

    adapters._write = lambda folder, *rest: (folder.mkdir(), write(folder / "adapter", end=die))
    checkpoint.save({place!r} + "adapter", toy_lora(), CONFIG)
"""


def test_a_save_that_is_killed_leaves_the_one_before(tmp_path, trained):
    moments = ("writing", "written", "synced", "swapped", "fallback")
    for moment in moments:
        write_text("before")(tmp_path / moment)
    checkpoint.save(tmp_path / "adapter", trained, CONFIG)
    code = textwrap.dedent(KILLED).format(root=str(ROOT), place=str(tmp_path) + os.sep)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (-9, list(moments)), done.stderr
    for moment in moments:
        wanted = "after" if moment in ("swapped", "fallback") else "before"
        assert (tmp_path / moment / "text").read_text() == wanted
        swap.replace(tmp_path / moment, write_text("next"))  # clears up, too
    assert_same_bits(checkpoint.restore_into(tmp_path / "adapter", toy_lora()), trained)
    assert len(list(tmp_path.iterdir())) > len(moments) + 1
    checkpoint.save(tmp_path / "adapter", trained, CONFIG)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((*moments, "adapter"))


def test_a_save_in_the_background(tmp_path, trained, monkeypatch):
    checkpoint.save(tmp_path / "a", trained, CONFIG)
    go, write = threading.Event(), adapters._write
    monkeypatch.setattr(adapters, "_write", lambda *args: (go.wait(30), write(*args)))
    other = moved(toy_lora(), seed=9)
    expected = jax.tree.map(np.array, other)
    pending = checkpoint.save_async(tmp_path / "a", other, CONFIG)
    assert_same_bits(checkpoint.restore_into(tmp_path / "a", toy_lora()), trained)
    # Training goes on and takes the arrays' memory.
    train = jax.jit(lambda x: jax.tree.map(lambda y: y * 0, x), donate_argnums=0)
    jax.block_until_ready(train(lora.split(other)[0]))
    go.set()
    pending.wait()
    assert_same_bits(checkpoint.restore_into(tmp_path / "a", toy_lora()), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_save_in_the_background_that_fails(tmp_path, trained, monkeypatch):
    checkpoint.save(tmp_path / "a", trained, CONFIG)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "_write", fail)
    pending = checkpoint.save_async(tmp_path / "a", moved(toy_lora(), seed=9), CONFIG)
    with pytest.raises(OSError, match="cannot write .*a: No space left on device; what was there"):
        pending.wait()
    assert_same_bits(checkpoint.restore_into(tmp_path / "a", toy_lora()), trained)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="mine exists and is not an adapter written by lora"):
        checkpoint.save_async(tmp_path / "mine", trained, CONFIG)


def mesh_of(*shape):
    """A mesh under automatic sharding, in every version of JAX."""
    return Mesh(np.array(jax.devices()).reshape(shape), ("data", "model"))


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(2, 4)


def sharded(mesh, params):
    specs = {"embed": {"embedding": P(None, "model")}, "mix": {"kernel": P("data", "model")}}
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, specs)


def test_an_adapter_comes_onto_a_mesh_shard_by_shard(tmp_path, trained, mesh):
    checkpoint.save(tmp_path / "a", trained, CONFIG)
    restored, _ = checkpoint.restore(
        tmp_path / "a", Toy().apply, sharded(mesh, toy_params()), TOKENS
    )
    leaf = restored["mix"]["kernel"]
    assert leaf.a.sharding.spec == P("data", None) and leaf.b.sharding.spec == P(None, "model")
    assert {s.data.shape for s in leaf.a.addressable_shards} == {(8, 2)}
    assert {s.data.shape for s in leaf.b.addressable_shards} == {(2, 4)}
    assert_same_bits(jax.tree.map(np.asarray, restored), trained)
    # And from that mesh onto another, or one device.
    checkpoint.save(tmp_path / "b", restored, CONFIG)
    assert_same_bits(checkpoint.restore_into(tmp_path / "b", toy_lora()), trained)
    other = mesh_of(8, 1)
    again, _ = checkpoint.restore(tmp_path / "b", Toy().apply, sharded(other, toy_params()), TOKENS)
    assert {s.data.shape for s in again["mix"]["kernel"].a.addressable_shards} == {(2, 2)}
    assert_same_bits(jax.tree.map(np.asarray, again), trained)


def test_merged_parameters_come_back(tmp_path, trained, mesh):
    merged = lora.merge(trained)
    checkpoint.save_params(tmp_path / "m", merged)
    assert_same_bits(checkpoint.restore_params(tmp_path / "m", toy_params()), merged)
    # Any program that knows Orbax reads them.
    with ocp.StandardCheckpointer() as other:
        assert_same_bits(other.restore(tmp_path / "m" / "params"), merged)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        sharded(mesh, merged),
    )
    placed = checkpoint.restore_params(tmp_path / "m", like)
    assert {s.data.shape for s in placed["mix"]["kernel"].addressable_shards} == {(8, 4)}
    assert placed["embed"]["embedding"].sharding.spec == P(None, "model")
    assert_same_bits(jax.tree.map(np.asarray, placed), merged)
    checkpoint.save_params(tmp_path / "m", toy_params())  # replaces
    assert_same_bits(checkpoint.restore_params(tmp_path / "m", merged), toy_params())


def test_a_base_has_one_fingerprint_wherever_it_lies(mesh):
    plain = checkpoint.fingerprint(toy_params())
    assert checkpoint.fingerprint(sharded(mesh, toy_params())) == plain
    assert checkpoint.fingerprint(sharded(jax.make_mesh((2, 4), ("data", "model")), toy_params())
                                  ) == plain  # fmt: skip
    replicated = jax.device_put(toy_params(), NamedSharding(mesh, P()))
    assert checkpoint.fingerprint(replicated) == plain


def test_layers_kept_apart_come_back(tmp_path):
    params = {"layers": {0: {"w": jnp.ones(3)}, 1: {"w": jnp.zeros(3, jnp.bfloat16)}}}
    checkpoint.save_params(tmp_path / "m", params)
    got = checkpoint.restore_params(tmp_path / "m", jax.eval_shape(lambda: params))
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert_same_bits(got, params)


def test_parameters_that_do_not_fit(tmp_path, trained):
    with pytest.raises(ValueError, match=r"`mix.kernel` still has an adapter; merge first"):
        checkpoint.save_params(tmp_path / "m", trained)
    checkpoint.save(tmp_path / "a", trained, CONFIG)
    with pytest.raises(FileExistsError, match="a exists and is not plain parameters written by"):
        checkpoint.save_params(tmp_path / "a", toy_params())
    with pytest.raises(ValueError, match="a is not written by lora.checkpoint.save_params"):
        checkpoint.restore_params(tmp_path / "a", toy_params())
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        checkpoint.restore_params(tmp_path / "none", toy_params())
    checkpoint.save_params(tmp_path / "m", toy_params())
    with pytest.raises(ValueError, match=r"`mix.kernel` is float32\[16,16\], expected .*\[8,8\]"):
        checkpoint.restore_params(tmp_path / "m", toy_params(width=8))


def test_codes_are_not_read_as_those_of_another_format(tmp_path):
    """The arrays of two formats have the same shapes: only what is written beside them tells."""
    w = {"w": jnp.linspace(-1, 1, 32 * 32).reshape(32, 32)}
    params = lora.quantize(w, ["w"], block_size=16)
    checkpoint.save_params(tmp_path / "m", params)
    like = jax.eval_shape(lambda: params)
    assert_same_bits(checkpoint.restore_params(tmp_path / "m", like), params)
    for options, got in [(dict(format="fp4"), r"fp4-16:"), (dict(roles={"w": "oi"}), "nf4-16-oi:")]:
        other = lora.quantize(w, ["w"], block_size=16, **options)
        with pytest.raises(ValueError, match=rf"`w` is nf4-16:float32\[32,32\], expected {got}"):
            checkpoint.restore_params(tmp_path / "m", other)
