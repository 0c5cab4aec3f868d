"""Loading straight into shards: every kind of file and format, on each mesh, byte by byte."""

import contextlib
import dataclasses
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax import models, quant
from lora_jax.hf.checkpoint import fill, safetensors, weights
from lora_jax.hf.checkpoint.layer import LayerTensor
from lora_jax.hf.checkpoint.names import tensor_of
from lora_jax.hf.gguf import file as gguf_file
from lora_jax.models.registry import architecture_of, names_of
from lora_jax.models.saving import save_model
from lora_jax.models.sharding import RULES
from lora_jax.paths import spell

from tests.support.gguf_files import tensors_of, write_model
from tests.support.mesh_runs import OWN
from tests.support.several import ends_of, free_port

pytestmark = pytest.mark.once

CONFIG = models.LlamaConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=32,
    max_position_embeddings=64,
    initializer_range=0.1,
    tie_word_embeddings=False,
)
MESHES: dict[str, dict[str, Any]] = {
    "8": dict(fsdp=8),
    "2 x 4": dict(data=2, fsdp=4),
    "4 x 2": dict(fsdp=4, tensor=2),
}
WORKER = Path(__file__).parents[1] / "support" / "loader.py"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same model in every kind of file."""
    place = tmp_path_factory.mktemp("files")
    model = models.init(jax.random.key(0), CONFIG)
    found = {"safetensors": place / "safetensors"}
    save_model(found["safetensors"], model, model.params, dtype="bfloat16")
    for kind in ("F16", "Q5_0", "Q4_0", "Q4_1", "Q8_0"):
        path = place / f"{kind}.gguf"
        found[kind] = write_model(path, CONFIG, tensors_of(model), GGMLQuantizationType[kind])
    for kind, double in (("bnb", False), ("bnb double", True)):
        found[kind] = as_bitsandbytes(place / kind, found["safetensors"], double=double)
    return found


def as_bitsandbytes(directory: Path, plain: Path, *, double: bool) -> Path:
    tensors: dict[str, np.ndarray] = {}
    for name, x in load_file(plain / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = x
            continue
        # With float32 scales, which bitsandbytes has.
        held = quant.quantize_array(
            jax.numpy.asarray(x.T), double_quant=double, scale_dtype="float32"
        )
        for part, value in quant.to_bitsandbytes(held).items():
            tensors[f"{name}.{part}" if part else name] = value
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text((plain / "config.json").read_text())
    return directory


def block(**options: Any) -> quant.QuantConfig:
    """Blocks that leave room for shards of the inputs too."""
    return quant.QuantConfig(**{"block_size": 16, **options})


# Kind of file, and `quantize`. The first ones run with `make test` too, on one mesh.
CASES: list[tuple[str, Any]] = [
    ("safetensors", None),
    ("Q5_0", None),
    ("Q4_1", "file"),
    ("bnb double", "file"),
    ("safetensors", block(double_quant=True)),
    ("safetensors", block()),
    ("safetensors", "nf4"),  # of too few superblocks for eight parts: outputs are spread
    ("safetensors", block(format="int4")),
    ("safetensors", block(format="int4", scale_dtype="float32")),
    ("safetensors", block(format="uint4")),
    ("safetensors", block(format="int8")),
    ("F16", block(scale_dtype="float16")),
    ("Q4_0", "file"),
    ("Q8_0", "file"),
    ("bnb", None),
    ("bnb", "file"),
    ("bnb double", None),
]
FAST = 5


def spelled(value: Any) -> str:
    return str(value).replace("QuantConfig", "").replace(" ", "")


@pytest.fixture
def read(monkeypatch):
    """The bytes of each part that is read, by the first byte of its array in the file."""
    parts: list[tuple[int, int]] = []
    original = weights.read_array

    def count(path, start, dtype, shape, *, part=()):
        found = original(path, start, dtype, shape, part=part)
        parts.append((start, found.nbytes))
        return found

    monkeypatch.setattr(safetensors, "read_array", count)
    monkeypatch.setattr(gguf_file, "read_array", count)
    return parts


def combinations() -> list:
    return [
        pytest.param(*case, mesh, marks=[] if i < FAST and mesh == "4 x 2" else [pytest.mark.slow])
        for i, case in enumerate(CASES)
        for mesh in MESHES
    ]


@pytest.mark.parametrize(("kind", "held", "axes"), combinations(), ids=spelled)
def test_shards_are_those_of_the_whole_to_the_bit(files, read, kind, held, axes):
    options: dict[str, Any] = dict(dtype="bfloat16", quantize=held)
    want = models.load(files[kind], **options).params
    once = Counter()
    for start, size in read:
        once[start] += size
    read.clear()
    mesh = models.make_mesh(**MESHES[axes])
    found = models.load(files[kind], mesh=mesh, **options).params
    placed = lora.sharding.place(want, mesh, RULES)
    assert jax.tree.structure(found) == jax.tree.structure(placed)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(placed), strict=True):
        assert x.dtype == y.dtype and x.sharding == y.sharding
        np.testing.assert_array_equal(x, y)
    check_reads(read, once, found)


def check_reads(read: list[tuple[int, int]], once: Counter, found: Any) -> None:
    """No byte of a weight is read twice, and no part is larger than a shard."""
    again, largest = Counter(), Counter()
    for start, size in read:
        again[start] += size
        largest[start] = max(largest[start], size)
    big = {start for start, size in once.items() if size > 1 << 14}
    assert again.keys() == once.keys() and big
    for start in big:
        assert again[start] <= 1.02 * once[start]
    # Every matrix of this model is divided by fsdp.
    parts = found["model"]["embed_tokens"]["embedding"].sharding.mesh.shape["fsdp"]
    for start in big:
        assert largest[start] <= once[start] / parts * 1.1 + 4096


@pytest.mark.parametrize("held", [None, block(), block(double_quant=True)], ids=spelled)
def test_a_device_holds_its_share(files, held):
    mesh = models.make_mesh(fsdp=8)
    params = models.load(files["safetensors"], mesh=mesh, quantize=held).params
    on_device = Counter()
    for x in jax.tree.leaves(params):
        for shard in x.addressable_shards:
            on_device[shard.device] += shard.data.nbytes
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    # Beside the shares only vectors, and the scales of scales.
    assert max(on_device.values()) <= 1.1 * whole / 8 + 24_000
    big = [x for x in jax.tree.leaves(params) if x.nbytes > 1 << 16]
    for x in big:
        assert {s.data.nbytes for s in x.addressable_shards} == {x.nbytes // 8}


@pytest.mark.parametrize("kind", ["safetensors", "Q4_0", "bnb double"])
def test_layers_that_an_axis_shards_are_read_by_their_own_devices(files, read, kind):
    held = block() if kind == "safetensors" else "file"
    axes = {**RULES.axes, "layers": ("data",)}
    rules = lora.sharding.Rules(axes, RULES.leaves)
    want = models.load(files[kind], quantize=held).params
    read.clear()
    found = models.load(
        files[kind], quantize=held, mesh=models.make_mesh(data=2, fsdp=4), rules=rules
    ).params
    assert max(size for _, size in read) <= 512 * 512 * 4 / 4  # of float32, a part in four
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), found, want)
    kernel = found["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.spec == P("data", "fsdp", None)


def test_layers_apart_have_the_same_codes(files):
    mesh = models.make_mesh(fsdp=4, tensor=2)
    options: dict[str, Any] = dict(quantize=block(double_quant=True), scan=False)
    want = models.load(files["safetensors"], **options).params
    found = models.load(files["safetensors"], mesh=mesh, **options).params
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), found, want)


@pytest.mark.parametrize("inside", [False, True])
def test_a_mesh_may_have_explicit_axes_and_be_in_use(files, inside):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    options: dict[str, Any] = dict(quantize=block(double_quant=True))
    want = models.load(files["safetensors"], **options).params
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        found = models.load(files["safetensors"], mesh=mesh, **options).params
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert x.sharding.mesh == mesh
        np.testing.assert_array_equal(x, y)


def test_a_dim_that_does_not_divide_is_whole_and_named(tmp_path):
    config = models.LlamaConfig.from_hf(
        {**CONFIG.to_hf(), "intermediate_size": 500, "vocab_size": 509}
    )
    model = models.init(jax.random.key(0), config)
    save_model(tmp_path / "m", model, model.params)
    with pytest.warns(UserWarning, match=r"every device holds all of `[a-z_.]+` \(") as caught:
        found = models.load(tmp_path / "m", mesh=models.make_mesh(fsdp=4, tensor=2)).params
    (warning,) = (w for w in caught if "holds all" in str(w.message))
    # Checked annotations put frames of their own between.
    assert os.environ.get("LORA_JAX_TYPES") or warning.filename == __file__
    # 509 tokens divide by neither axis, 500 units by 4 and by 2 but not by both.
    assert '(509, 512) along "tensor"' in str(warning.message)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), found, model.params)


def test_a_number_that_is_not_finite_is_found_in_its_part(files, tmp_path):
    (tmp_path / "config.json").write_text((files["safetensors"] / "config.json").read_text())
    tensors = load_file(files["safetensors"] / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][300, 400] = np.inf
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj.weight` has 1 values .* first at \[300, 400\]"):
        models.load(tmp_path, mesh=models.make_mesh(fsdp=8))


@pytest.mark.parametrize("step", [1, 7])
def test_a_stored_head_is_compared_in_parts(files, tmp_path, monkeypatch, step):
    (tmp_path / "config.json").write_text(
        json.dumps({**CONFIG.to_hf(), "tie_word_embeddings": True})
    )
    tensors = load_file(files["safetensors"] / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    monkeypatch.setattr(weights, "_COMPARED", step * table.shape[1])
    save_file({**tensors, "lm_head.weight": table}, tmp_path / "model.safetensors")
    assert "lm_head" not in models.load(tmp_path, mesh=models.make_mesh(fsdp=8)).params
    other = table.copy()
    other[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": other}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="`lm_head.weight` differs from `model.embed_tokens"):
        models.load(tmp_path, mesh=models.make_mesh(fsdp=8))


def test_layers_that_are_quantized_differently(files, tmp_path):
    plain, double = (load_file(files[kind] / "model.safetensors") for kind in ("bnb", "bnb double"))
    first = {n: x for n, x in plain.items() if "layers.1." not in n}
    mixed = first | {n: x for n, x in double.items() if "layers.1." in n}
    (tmp_path / "config.json").write_text((files["bnb"] / "config.json").read_text())
    save_file(mixed, tmp_path / "model.safetensors")
    for mesh in (None, models.make_mesh(fsdp=8)):
        with pytest.raises(ValueError, match="layers of `model.layers.* are quantized differently"):
            models.load(tmp_path, quantize="file", mesh=mesh)
    models.load(tmp_path, quantize="file", scan=False, mesh=models.make_mesh(fsdp=8))
    floats = {n: x for n, x in load_file(files["safetensors"] / "model.safetensors").items()}
    half = first | {n: x for n, x in floats.items() if "layers.1." in n}
    save_file(half, tmp_path / "model.safetensors")
    # Layers in floats are a stack of their own.
    stacked, apart = (models.load(tmp_path, quantize="file", scan=scan) for scan in (True, False))
    assert set(stacked.params["model"]["layers"]) == {"0:1", "1:2"}
    tokens = np.array([[3, 5, 9]])
    got, want = (model.apply(model.params, tokens) for model in (stacked, apart))
    np.testing.assert_allclose(got, want, atol=1e-5)  # float32


def test_a_part_of_a_tensor_is_that_part_of_the_leaf():
    theirs = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    axes = (2, 3, 1, 0)  # of an image's kernel; no permutation that is its own inverse
    ends = ((1, 3), (0, 5), (2, 3), (0, 1))
    source = weights.Weights("a", {}, read=lambda name, part: theirs[part], where=str)
    leaf = fill.Leaf("w", jax.ShapeDtypeStruct((4, 5, 3, 2), "int64"), {(): LayerTensor("w", axes)})
    got = fill._Piece(leaf, source, (), ()).floats(ends)
    np.testing.assert_array_equal(got, theirs.transpose(axes)[tuple(slice(*e) for e in ends)])


def test_an_adapter_goes_from_mesh_to_mesh_over_shards_that_were_quantized(files, tmp_path):
    tokens, held = jax.ShapeDtypeStruct((1, 4), "int32"), block(double_quant=True)
    config = lora.LoraConfig(rank=2, target_modules=("q_proj", "down_proj"), init="random")
    meshes = [models.make_mesh(**MESHES[name]) for name in ("4 x 2", "8")]
    first, second = (models.load(files["safetensors"], quantize=held, mesh=m) for m in meshes)
    plain = models.load(files["safetensors"], quantize=held)
    marks = lora.checkpoint.fingerprint(plain.params)
    assert marks == lora.checkpoint.fingerprint(first.params)
    plan = lora.plan(config, first.apply, first.params, tokens)
    params = lora.init(jax.random.key(0), plan, first.params)
    lora.checkpoint.save(tmp_path / "adapter", params, config)
    for model in (second, plain):
        again, _ = lora.checkpoint.restore(tmp_path / "adapter", model.apply, model.params, tokens)
        for x, y in zip(*(jax.tree.leaves(lora.split(p)[0]) for p in (again, params)), strict=True):
            np.testing.assert_array_equal(x, y)
    a = again["model"]["layers"]["self_attn"]["q_proj"]["kernel"].a
    assert len(a.sharding.device_set) == 1  # where the last base lies


@pytest.mark.slow
@pytest.mark.parametrize("held", [None, block()], ids=spelled)
def test_experts_are_read_by_their_devices_and_adapters_come_back(tmp_path, read, held):
    """Bit by bit, a quarter of each leaf; one device gets the same adapter and text."""
    config = dataclasses.replace(
        CONFIG, model_type="mixtral", num_experts=4, moe_intermediate_size=256
    )
    first = models.init(jax.random.key(0), config)
    save_model(tmp_path / "model", first, first.params)
    plain = models.load(tmp_path / "model", quantize=held)
    read.clear()
    mesh = models.make_mesh(data=2, expert=4)
    spread = models.load(tmp_path / "model", quantize=held, mesh=mesh)
    largest = max(size for _, size in read)
    assert largest <= 4 * 512 * 512 * 1.1  # a matrix of one expert, of its head or of attention
    for x, y in zip(jax.tree.leaves(spread.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_array_equal(x, y)
    experts = spread.params["model"]["layers"]["mlp"]["experts"]
    for x in jax.tree.leaves(experts):
        assert {s.data.nbytes for s in x.addressable_shards} == {x.nbytes // 4}
    tokens = jax.ShapeDtypeStruct((1, 4), "int32")
    targets = ("q_proj", "experts.gate_up_proj", "experts.down_proj")
    adapter = lora.LoraConfig(rank=2, target_modules=targets, init="random")
    plan = lora.plan(adapter, spread.apply, spread.params, tokens)
    params = lora.init(jax.random.key(0), plan, spread.params)
    leaf = params["model"]["layers"]["mlp"]["experts"]["down_proj"]
    assert leaf.a.sharding.spec[1] == leaf.b.sharding.spec[1] == "expert"
    lora.checkpoint.save(tmp_path / "adapter", params, adapter)
    back, _ = lora.checkpoint.restore(tmp_path / "adapter", plain.apply, plain.params, tokens)
    lora.hf.save_peft(tmp_path / "peft", params, adapter, model_type="mixtral")
    theirs, _ = lora.hf.load_peft(
        tmp_path / "peft", plain.apply, plain.params, tokens, model_type="mixtral"
    )
    prompts = [[1, 2, 3], [4, 5]]
    want = models.generate(plain, back, prompts, max_new_tokens=4)
    assert models.generate(spread, params, prompts, max_new_tokens=4) == want
    for other in (back, theirs):
        for x, y in zip(*(jax.tree.leaves(lora.split(p)[0]) for p in (other, params)), strict=True):
            np.testing.assert_array_equal(x, y)


# Real processes.


def processes_of(count: int, devices: int, job: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of `count` processes found, see tests/support/loader.py."""
    port = free_port()
    jobs = [{"id": n, "count": count, "port": port, **job} for n in range(count)]
    lines = [[str(WORKER), json.dumps(each)] for each in jobs]
    ended = ends_of(lines, devices, [None] * count)
    for text, status in ended:
        assert status == 0, text
    return [json.loads(text.strip().splitlines()[-1]) for text, _ in ended]


SHARED = [
    ("safetensors", None, dict(fsdp=4)),
    ("safetensors", dict(block_size=16, double_quant=True), dict(fsdp=2, tensor=2)),
    ("Q4_0", "file", dict(data=2, fsdp=2)),
    ("bnb double", "file", dict(fsdp=4)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "held", "mesh"), SHARED, ids=spelled)
def test_two_processes_read_what_their_devices_hold(files, tmp_path, kind, held, mesh):
    job = {"source": str(files[kind]), "quantize": held, "mesh": mesh}
    (alone,) = processes_of(1, 4, job)
    found = processes_of(2, 2, {**job, "params": str(tmp_path / "params")})
    assert (tmp_path / "params" / "meta").is_dir()
    # `data` copies all weights to both.
    parts = 1 if "data" in mesh else 2
    for each in found:
        assert each["read"] <= 1.02 * alone["read"] / parts + 100_000
        assert each["largest"] <= alone["largest"]
    together = found[0]["shards"] | found[1]["shards"]
    assert together == alone["shards"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(fsdp=8), dict(fsdp=4, tensor=2), dict(tensor=8)], ids=str)
def test_two_processes_read_by_a_name_map_and_restore_what_they_hold(files, tmp_path, mesh):
    params = models.load(files["safetensors"], dtype="bfloat16").params
    lora.hf.save_weights(tmp_path / "own", params, OWN, dtype="bfloat16")
    job = {"source": str(files["safetensors"]), "quantize": None, "mesh": mesh}
    job |= {"own": str(tmp_path / "own"), "params": str(tmp_path / "params")}
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    for each in processes_of(2, 4, job):
        assert each["mapped"] <= 0.51 * whole
        # Orbax compresses numbers, and reads files of its own.
        assert 0.3 * whole < each["restored"] <= 0.51 * whole + 100_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "held", [None, dict(block_size=16), dict(block_size=16, double_quant=True)], ids=spelled
)
def test_a_bad_number_that_one_process_reads_ends_all(files, tmp_path, held):
    (tmp_path / "config.json").write_text((files["safetensors"] / "config.json").read_text())
    tensors = load_file(files["safetensors"] / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:, -1] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    job = {"source": str(tmp_path), "quantize": held, "mesh": dict(fsdp=2), "count": 2}
    jobs = [{"id": n, "port": free_port(), **job} for n in range(2)]
    jobs[1]["port"] = jobs[0]["port"]
    ended = ends_of([[str(WORKER), json.dumps(each)] for each in jobs], 1, [None] * 2)
    (first, _), (second, _) = ended
    assert all(status not in (0, None) for _, status in ended)
    assert "up_proj.weight` has" in second.splitlines()[-1]
    assert "process 1: " in first and "up_proj.weight` has" in first


def write_big(directory: Path) -> int:
    """A model of 540 MB in bfloat16; returns the bytes of its largest tensor."""
    config = models.LlamaConfig.from_hf(
        {
            **CONFIG.to_hf(),
            **dict(vocab_size=32_000, hidden_size=2048, intermediate_size=5632, head_dim=128),
            **dict(num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=16),
            "tie_word_embeddings": True,
        }
    )
    shapes = architecture_of("llama").forward(config=config, scan=False).shapes()
    rng, tensors = np.random.default_rng(0), {}
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        name, axes = tensor_of(spell(path), family=names_of(config))
        there = weights.shape_there(x.shape, axes)
        tensors[name] = rng.standard_normal(there, np.float32).astype(ml_dtypes.bfloat16)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    assert sum(x.nbytes for x in tensors.values()) > 500_000_000
    return max(x.nbytes for x in tensors.values())


@pytest.mark.slow
def test_a_loading_process_takes_its_shards_a_tensor_and_little_more(tmp_path):
    largest = write_big(tmp_path)
    job = {"source": str(tmp_path), "mesh": dict(fsdp=8)}
    for held, count in ((None, 1), ("nf4", 1), (dict(double_quant=True), 2)):
        for each in processes_of(count, 8 // count, {**job, "quantize": held}):
            assert each["peak"] <= each["held"] + largest + 200_000_000, (held, each["peak"])
            assert each["read"] <= math.ceil(1.01 * 542_150_656 / count)
