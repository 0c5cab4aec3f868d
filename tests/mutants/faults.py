"""One-line faults that the tests must notice; `make mutants` puts them in one at a time."""

from typing import NamedTuple


class Fault(NamedTuple):
    """A fault.

    Attributes:
      file: in `lora_jax/`.
      old: text that the file has exactly once.
      new: what takes its place.
      tests: the tests of the area, as arguments of pytest.
      equivalent: why no test can see it, for those that change nothing.
    """

    file: str
    old: str
    new: str
    tests: str
    equivalent: str = ""


DORA = "tests/test_dora.py tests/multi/test_stack.py"
STARTS = "tests/methods/test_starts.py"
STACK = "tests/multi/test_stack.py"
WEIGHTED = "tests/multi/test_weighted.py"
QUANT = "tests/quant/test_formats.py"
LOW_RANK = "tests/transform/test_low_rank.py"
BATCHES = "tests/train/test_batches.py"
LOSS = "tests/train/test_loss.py"
ROPE = "tests/models/test_rope.py"
PEFT = "tests/hf/peft/test_index.py tests/hf/peft/test_peft.py tests/hf/peft/test_shapes.py"

# Found in a review: no test had seen them.
NAMED = [
    Fault("dora.py", "lax.stop_gradient(norm(jax.tree.map(lax.stop_gradient, x)))", "norm(x)",
          DORA),
    Fault(
        "quant/matmul.py",
        "(lax.psum(dx, form.spread) if form.spread else dx)",
        "dx",
        "tests/quant/test_sharding.py tests/quant/test_transform.py",
    ),
    Fault("methods/starts.py", "residual(leaf, w, a, b, s=scale_of(leaf))",
          "residual(leaf, w, a, b, s=np.ones_like(scale_of(leaf)))", STARTS),
    Fault("methods/starts.py", "per_stack(leaf, np.maximum(leaf.ranks, 1), \"a\")",
          "per_stack(leaf, np.sqrt(np.maximum(leaf.ranks, 1)), \"a\")", STARTS),
    Fault("multi/stack.py", "gain = full(outs, 1, jnp.float32)",
          "gain = full(outs, 0, jnp.float32)", STACK),
    Fault("transform/many/grouped.py", "(ids < -1) | (ids >= count)", "ids >= count",
          "tests/transform/many/test_run.py"),
    Fault("transform/low_rank.py", "max(floating, key=lambda d: d.itemsize)", "floating[0]",
          LOW_RANK),
    Fault("checkpoint/fingerprint.py", "np.linspace(0, leaf.size - 1, min(_SAMPLES, leaf.size))",
          "np.arange(min(_SAMPLES, leaf.size))", "tests/checkpoint/test_adapters.py"),
    Fault("files.py", "os.rename(old, path)\n        shutil.rmtree", "pass\n        shutil.rmtree",
          "tests/test_files.py"),
    Fault("models/rope.py", "min(high, head_dim - 1)", "min(high, head_dim // 2 - 1)", ROPE),
    Fault("hf/tokenizer/directory.py", "given |= _object(directory / _MAP)",
          "given = _object(directory / _MAP) | given", "tests/hf/tokenizer/test_directory.py"),
    Fault("analysis/spectra/spectrum.py", "share * (1 - 1e-12)", "share",
          "tests/analysis/spectra/test_spectrum.py"),
    Fault("train/buckets.py", "Bucket(int(rung_of(ladder, [lengths[left].max()])[0]), left)",
          "Bucket(int(ladder[-1]), left)", BATCHES),
]  # fmt: skip

# By hand, room by room.
MORE = [
    Fault("dora.py", "square + 2 * s * cross", "square + s * cross", DORA),
    Fault("dora.py", "s * s * jnp.sum(gram * b", "s * jnp.sum(gram * b", DORA),
    Fault("dora.py", "jnp.square(w.astype(wide)), axis=-2)", "jnp.square(w.astype(wide)), axis=-1)",
          DORA),
    Fault("methods/starts.py", "first, a_shape, 1 / np.sqrt(sizes(leaf.shape, leaf.roles)[1])",
          "first, a_shape, 1 / np.sqrt(sizes(leaf.shape, leaf.roles)[2])", STARTS),
    Fault("methods/starts.py", "bound = 1 / np.sqrt(np.maximum(leaf.ranks, 1))",
          "bound = 1 / np.maximum(leaf.ranks, 1)", STARTS),
    Fault("methods/starts.py", "r[..., : leaf.rank, :]", "r[..., -leaf.rank :, :]", STARTS),
    Fault("methods/starts.py", "q[..., 0::2, :], q[..., 1::2, :]",
          "q[..., 0::2, :], q[..., 0::2, :]", STARTS),
    Fault("methods/starts.py", "(*stack, fan_in, half)), odd) / 10",
          "(*stack, fan_in, half)), odd)", STARTS),
    Fault("methods/factors.py", "values[..., :rank] / s[..., 0]", "values[..., :rank]", STARTS),
    Fault("methods/factors.py", "change = s * jnp.matmul", "change = jnp.matmul", STARTS),
    Fault("methods/factors.py", "(w.astype(a.dtype) - from_matrix",
          "(w.astype(a.dtype) + from_matrix", STARTS),
    Fault("multi/stack.py", "if rank < largest:", "if rank < largest - 1:", STACK),
    Fault("multi/stack.py", "[blank] * (slots - len(column)))", "[blank] * (len(column) - slots))",
          STACK),
    Fault("multi/stack.py", "if slots < len(adapters):", "if slots < len(adapters) - 1:", STACK),
    Fault("multi/stack.py", "if train and len({x.dropout for x in factored}) > 1:",
          "if train and len({x.dropout for x in factored}) > 2:", STACK),
    Fault("multi/stack.py", "[*values, *[base] * (slots - len(column))]", "[*values]", STACK),
    Fault("multi/weighted.py", "if len(ranks) != 1:", "if len(ranks) > 2:", WEIGHTED),
    Fault("multi/weighted.py", "if not 0 < density <= 1:", "if not 0 <= density <= 1:", WEIGHTED),
    Fault("multi/weighted.py", "own = None if key is None else jax.random.fold_in(key, number)",
          "own = key", WEIGHTED),
    Fault("quant/formats.py", "scale = (jnp.max(blocks, axis=-2) - low) / 15",
          "scale = (jnp.max(blocks, axis=-2) - low) / 16", QUANT),
    Fault("quant/formats.py", "blocks = blocks - bias.astype(jnp.float32)[..., None, :]",
          "blocks = blocks - low[..., None, :]", QUANT),
    Fault("quant/formats.py", "jnp.where(top > -bottom, top, bottom) / -8",
          "jnp.where(top > -bottom, top, bottom) / 8", QUANT),
    Fault("quant/formats.py", "jnp.round(x), -127, 127)", "jnp.round(x), -126, 126)", QUANT),
    Fault("quant/formats.py", "sum((x > m).astype", "sum((x >= m).astype", QUANT),
    Fault("quant/formats.py", "return -(-inputs // rows) * rows", "return inputs // rows * rows",
          QUANT),
    Fault("quant/formats.py", "superblock * block + inside % block", "superblock * block + inside",
          "tests/quant/test_formats.py tests/quant/test_transform.py"),
    Fault("quant/formats.py", "inside // block == slab", "inside // block != slab",
          "tests/quant/test_formats.py tests/quant/test_transform.py"),
    Fault("quant/formats.py", "offset = jnp.mean(flat)", "offset = jnp.max(flat)", QUANT),
    Fault("quant/formats.py", "scaled, side=\"left\")", "scaled, side=\"right\")", QUANT),
    Fault("quant/matmul.py", "want = fan_out if transposed else fan_in", "want = fan_in",
          "tests/quant/test_transform.py"),
    Fault("quant/matmul.py", "preferred=like.dtype", "preferred=jnp.dtype(jnp.float32)",
          "tests/quant/test_transform.py"),
    Fault("transform/low_rank.py", "a_first = \"i\" in roles or \"o\" not in roles",
          "a_first = True", "tests/laws/test_value.py tests/transform/test_low_rank.py",
          "the order of the two thin products changes their cost, and no value"),
    Fault("transform/low_rank.py", "if dtype.itemsize >= 2 else", "if dtype.itemsize >= 1 else",
          LOW_RANK),
    Fault("models/rope.py", "(turns - low) / (high - low)", "(turns - high) / (high - low)", ROPE),
    Fault("models/rope.py", "scaling.beta_fast or 32", "scaling.beta_fast or 16", ROPE),
    Fault("models/rope.py", "if scaling.truncate is not False:", "if scaling.truncate:", ROPE),
    Fault("train/batches.py", "predicts[:, :-1] = learned[:, 1:]", "predicts[:, :] = learned",
          BATCHES),
    Fault("train/batches.py", "targets[:, :-1] = tokens[:, 1:]", "targets[:, 1:] = tokens[:, :-1]",
          BATCHES),
    Fault("train/batches.py", "learned=np.zeros_like(rows[0].learned)", "learned=rows[0].learned",
          BATCHES),
    Fault("train/batches.py", "if p >= needed)", "if p > needed)", BATCHES),
    Fault("train/batches.py", "best + 1 < _BATCHES", "best < _BATCHES", BATCHES),
    Fault("train/batches.py", "spared[best] < _SPARED * top", "spared[best] < 2 * _SPARED * top",
          BATCHES),
    Fault("train/buckets.py", "left = members[whole:]", "left = members[:0]", BATCHES),
    Fault("train/buckets.py", "counter=[0, 0, 0, 1]", "counter=[0, 0, 0, 0]", BATCHES),
    Fault("train/buckets.py", "key=[seed, epoch]).random_raw(count)",
          "key=[seed, 0]).random_raw(count)", BATCHES),
    Fault("train/buckets.py", "np.searchsorted(ladder, lengths)",
          "np.searchsorted(ladder, lengths, side=\"right\")", BATCHES),
    Fault("train/config.py", "config.epochs * steps_per_epoch - 1e-9",
          "config.epochs * steps_per_epoch", "tests/train/test_fit.py tests/train/test_batches.py"),
    Fault("train/loss.py", "if positions.shape[0] == flat.shape[0]:",
          "if positions.shape[0] >= flat.shape[0] - 1:", LOSS),
    Fault("train/loss.py", "logits = logits.astype(jnp.float32)", "pass", LOSS),
    Fault("train/loss.py", "jnp.sum(each * batch.weights)", "jnp.sum(each)", LOSS),
    Fault("train/step.py", "0.5 * (1 + jnp.cos(jnp.pi * t))", "0.5 * (1 + jnp.cos(t))",
          "tests/train/test_fit.py"),
    Fault("train/step.py", "rise * (floor + (1 - floor) * decay(t))", "rise * decay(t)",
          "tests/train/test_fit.py"),
    Fault("hf/peft/save.py", "abs(scale - row.scale) > 1e-6 * abs(row.scale)",
          "abs(scale - row.scale) > abs(row.scale)", PEFT),
    Fault("hf/peft/load.py", "scale[row.layer] = row.scale", "scale[row.layer] = rows[0].scale",
          PEFT),
    Fault("hf/peft/index.py", "scale=found.scale)", "scale=found.alpha / found.rank)", PEFT),
    Fault("hf/peft/vllm.py", "np.float32(1 if uniform else scales[module])", "np.float32(1)",
          "tests/hf/peft/test_directory.py tests/hf/peft/test_peft.py"),
    Fault("hf/peft/vllm.py", '"lora_alpha": rank, "use_rslora": False', '"lora_alpha": rank',
          "tests/hf/peft/test_directory.py tests/hf/peft/test_peft.py"),
    Fault("hf/peft/tensors.py", "return block if spec.axes is None else block.transpose(spec.axes)",
          "return block if spec.axes is None else block.transpose(np.argsort(spec.axes))", PEFT),
    Fault("analysis/spectra/spectrum.py", "np.searchsorted(held,", "np.searchsorted(held[1:],",
          "tests/analysis/spectra/test_spectrum.py"),
    Fault("analysis/spectra/spectrum.py", "self.values[0] / self.values[place - 1]",
          "self.values[0] / self.values[place - 2]", "tests/analysis/spectra/test_spectrum.py"),
    Fault("analysis/sweep/sweep.py", "best = min(rates, key=loss)", "best = max(rates, key=loss)",
          "tests/analysis/sweep/test_sweep.py"),
    Fault("analysis/sweep/train.py", "at.seconds * at.step / at.timed if at.timed",
          "at.seconds if at.timed", "tests/analysis/sweep"),
]  # fmt: skip

FAULTS = [*NAMED, *MORE]
