"""Folders that change as a whole, saves in the background, plain parameters, and meshes."""

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
from lora_jax import checkpoint, files, models
from lora_jax.checkpoint import adapters, checksums, folder
from lora_jax.sharding import LeafDims, Rules

from tests.support.places import ROOT
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


def test_an_old_folder_that_waits_is_named_and_put_back(tmp_path, trained):
    checkpoint.save(tmp_path / "a", trained, CONFIG)
    half = tmp_path / ".a.0a1b2c3d.tmp"
    half.mkdir()
    (half / files.LOCK).touch()
    (tmp_path / "a").rename(half / "a.old")
    with pytest.raises(FileNotFoundError, match=f"interrupted: rename .*{half.name}/a.old to it"):
        checkpoint.find(tmp_path / "a")
    assert_same_bits(checkpoint.restore_into(half / "a.old", toy_lora()), trained)
    files.sweep(tmp_path / "a")
    assert_same_bits(checkpoint.restore_into(tmp_path / "a", toy_lora()), trained)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_checkpoints_that_a_run_replaces_are_not_called_damaged(tmp_path):
    def read(step):
        raise checksums.DamagedError(f"{tmp_path}/{step}: its `meta` cannot be read")

    with pytest.raises(ValueError, match="a run replaces its checkpoints meanwhile; read them"):
        folder.newest_whole(tmp_path, (8, 4), read)


# An adapter is being replaced when the process is killed.
KILLED = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    from lora_jax import checkpoint
    from lora_jax.checkpoint import adapters
    from tests.support.train_toys import CONFIG, toy_lora

    def write(folder, *rest):
        (folder / "adapter").mkdir(parents=True)
        os.kill(os.getpid(), signal.SIGKILL)

    adapters._write = write
    checkpoint.save({place!r}, toy_lora(), CONFIG)
"""


def test_a_save_that_is_killed_leaves_the_one_before(tmp_path, trained):
    checkpoint.save(tmp_path / "adapter", trained, CONFIG)
    code = textwrap.dedent(KILLED).format(root=str(ROOT), place=str(tmp_path / "adapter"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    assert_same_bits(checkpoint.restore_into(tmp_path / "adapter", toy_lora()), trained)
    assert len(list(tmp_path.iterdir())) == 2
    checkpoint.save(tmp_path / "adapter", trained, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


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


@pytest.mark.parametrize("axes", [dict(fsdp=8), dict(fsdp=4, tensor=2)], ids=str)
def test_parameters_are_restored_onto_a_mesh_by_rules(tmp_path, axes):
    kernels = {name: {"kernel": jnp.linspace(-1, 1, 1 << 14).reshape(256, 64)} for name in "ab"}
    params = {**lora.quantize(kernels, ["b"], block_size=16, double_quant=True), "c": jnp.ones(3)}
    checkpoint.save_params(tmp_path / "one", params)
    rules = Rules(
        {"in": ("fsdp",), "out": ("tensor",)}, (LeafDims(r"kernel$", ("in", "out"), (0, 1)),)
    )
    mesh, like = lora.models.make_mesh(**axes), jax.eval_shape(lambda: params)
    found = checkpoint.restore_params(tmp_path / "one", like, mesh=mesh, rules=rules)
    placed = lora.sharding.place(params, mesh, rules)
    assert_same_bits(jax.tree.map(np.asarray, found), params)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(placed), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    checkpoint.save_params(tmp_path / "many", found)  # in shards
    assert_same_bits(checkpoint.restore_params(tmp_path / "many", like), params)


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


@pytest.mark.parametrize("axes", [dict(fsdp=8), dict(fsdp=2), None], ids=str)
def test_arrays_above_the_limit_of_a_read_are_restored(tmp_path, monkeypatch, axes):
    monkeypatch.setattr(folder, "_AT_A_TIME", 64)
    spread = NamedSharding(models.make_mesh(fsdp=8), P(None, "fsdp"))
    params = {"w": jax.device_put(np.arange(128.0, dtype=np.float32).reshape(8, 16), spread)}
    checkpoint.save_params(tmp_path / "p", params)
    like = {"w": jax.ShapeDtypeStruct((8, 16), "float32")}
    if axes is not None:
        devices = jax.devices()[: axes["fsdp"]]
        mesh = models.make_mesh(devices=devices, **axes)
        where = NamedSharding(mesh, P("fsdp", None))
        like = {"w": jax.ShapeDtypeStruct((8, 16), "float32", sharding=where)}
    got = checkpoint.restore_params(tmp_path / "p", like)
    np.testing.assert_array_equal(got["w"], params["w"])


@pytest.mark.parametrize("spec", [P("fsdp", None), P(None, "fsdp"), P(None, None)])
def test_checksums_do_not_depend_on_the_shards(monkeypatch, spec):
    monkeypatch.setattr(checksums, "_HASHED", 100)
    x = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)
    placed = jax.device_put(x, NamedSharding(models.make_mesh(fsdp=8), spec))
    assert checksums._sum(placed) == checksums._sum(x)
