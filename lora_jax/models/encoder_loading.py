"""Loading an encoder from a Hugging Face directory, complete or with a fresh head."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from jax.sharding import Mesh
from jaxtyping import Array

from lora_jax.config.arguments import check_argument
from lora_jax.files import check_links, read_object
from lora_jax.hf.checkpoint.fill import Spread, fill, is_shared
from lora_jax.hf.checkpoint.names import BERT
from lora_jax.hf.checkpoint.safetensors import open_directory
from lora_jax.hf.checkpoint.weights import Weights, check_counts, renamed, same
from lora_jax.hf.hub import snapshot
from lora_jax.hf.tokenizer.directory import from_directory
from lora_jax.models.bert_config import BertConfig
from lora_jax.models.classifier import check_labels
from lora_jax.models.encoder import EncoderForward
from lora_jax.models.heads import ANSWERS, FEATURES, NAMED, TASKS, Problem, Task
from lora_jax.models.init import draw
from lora_jax.models.model import Dtype, Model
from lora_jax.models.opening import (
    Found,
    Opened,
    opened_gguf,
    read_together,
    stacked_by_format,
)
from lora_jax.models.sharding import RULES, check_rules
from lora_jax.quant.loading import QuantConfig, quant_config
from lora_jax.sharding import Rules, spreading

# Prefixes of an encoder's tensors; all others in a checkpoint belong to a head.
_ENCODER = (
    "embeddings.", "embeddings_project.", "encoder.", "transformer.", "pooler.", "layers.",
    "final_norm.",
)  # fmt: skip
# Tasks whose heads can be drawn, and what their heads are called.
_DRAWN = {task: named.drawn for task, named in NAMED.items() if named.drawn}
# BERT's head that says whether a text follows another one, beside the one of words.
_NEXT = "cls.seq_relationship."
# Buffers that old checkpoints store: 0, 1, 2, ... and zeros. They hold nothing learned.
_CONSTANTS = ("embeddings.position_ids", "embeddings.token_type_ids")


def load_encoder(
    source: str | Path,
    *,
    task: Task | None = None,
    labels: Sequence[str] | None = None,
    fresh_head: Array | None = None,
    problem: Problem | None = None,
    dtype: Dtype = "float32",
    param_dtype: Dtype | None = None,
    scan: bool = True,
    remat: bool | str = False,
    quantize: str | QuantConfig | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> Model:
    """Loads an encoder (BERT, ELECTRA, ModernBERT, RoBERTa and others) and its tokenizer.

    Without `task` the model is the one that config.json names, and every tensor of the checkpoint
    must be used. With `task` the heads of other tasks are left out; a missing head is an error
    unless `fresh_head` draws it.

    Args:
      source: a Hugging Face directory, a hub id, or a path to a .gguf file, which has no heads.
      task: "features", "sequence-classification", "masked-lm", "token-classification" or
        "question-answering".
      labels: names of the classes of a fresh classification head.
      fresh_head: PRNG key; draws the head (and BERT's pooler, if it is needed and the checkpoint
        has none) and ignores the checkpoint's; not a masked LM's.
      problem: of a fresh head for texts, as in `load`.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters, `dtype` by default.
      scan: stack the blocks and scan over them; otherwise they are kept apart and unrolled.
      remat: see `Forward`.
      quantize, mesh, rules: as in `load`.

    Returns:
      The model; its tokenizer is None if the source has none.

    Raises:
      FileNotFoundError: the source or one of its files does not exist.
      ConnectionError: a hub id that is not cached, offline.
      ValueError: a broken file, an unsupported model, missing or unused tensors, or options that
        contradict each other.

    Warns:
      UserWarning: weights that every device of the mesh holds whole.

    Example:
      model = load_encoder("bert-base-uncased", task="sequence-classification",
                           labels=("no", "yes"), fresh_head=jax.random.key(0))
    """
    options = dict(dtype=dtype, param_dtype=param_dtype or dtype, scan=scan, remat=remat)
    head = dict(task=task, labels=labels, fresh_head=fresh_head, problem=problem)
    head |= dict(quantize=quant_config(quantize))
    check_rules(mesh, rules)
    own = dict(**head, mesh=mesh, rules=rules)
    with spreading(mesh, rules) as spread:
        return read_together(
            lambda: open_encoder(source, options, **cast(Any, head)),
            spread,
            {**options, **own},
        )


def open_encoder(
    source: str | Path,
    options: Mapping[str, Any],
    *,
    task: Task | None = None,
    labels: Sequence[str] | None = None,
    fresh_head: Array | None = None,
    problem: Problem | None = None,
    quantize: QuantConfig | None = None,
) -> Opened:
    """As `load_encoder`; the other options are those of `EncoderForward`."""
    path = _path(source)
    _check_head(task, labels, fresh_head)
    in_file = path.suffix == ".gguf"
    found = opened_gguf(path) if in_file else _in_directory(path, task)
    config = _for_task(found, task, labels)
    if fresh_head is not None:
        config = replace(config, problem_type=problem)
    # llama.cpp's files have heads that are not the whole of a task's.
    weights = _as_ours(found.weights, config, chosen=task is not None or in_file)
    if config.task == FEATURES:
        config = replace(config, pooler="pooler.dense.weight" in weights.shapes)
    forward = EncoderForward(config=config, **options)
    tokenizer = found.tokenizer(config.vocab_size)

    def read(spread: Spread | None, fill: Callable[..., Any] = fill) -> tuple[Any, dict[str, Any]]:
        held = stacked_by_format(forward, weights, BERT, quantize)
        filling = partial(fill, family=BERT, quantize=quantize, spread=spread)
        return held, _fill(held, weights, fresh_head, spread, filling)

    return Opened(Model(forward, {}, tokenizer, checkpoint=path), weights, read)


def _in_directory(directory: Path, task: Task | None) -> Found:
    check_links(directory)
    path = directory / "config.json"
    raw = read_object(path)
    try:
        config = BertConfig.from_hf(raw, task=task)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    weights = open_directory(directory)
    check_counts(config, weights, path)
    return Found(config, path, weights, lambda rows: from_directory(directory, rows=rows))


def _path(source: str | Path) -> Path:
    check_argument("models.load_encoder(source)", "source", source, (str, os.PathLike))
    if Path(source).is_dir() or Path(source).suffix == ".gguf":
        return Path(source)
    if Path(source).exists():
        raise ValueError(f"{source}: not a directory")
    return snapshot(str(source))


def _check_head(task: Task | None, labels: Sequence[str] | None, fresh_head: Array | None) -> None:
    if task is not None and task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}")
    if fresh_head is not None and task not in _DRAWN:
        known = " or ".join(f'"{name}"' for name in _DRAWN)
        raise ValueError(f"`fresh_head` needs task={known}, got task={task!r}")
    if labels is not None and fresh_head is None:
        raise ValueError("`labels` are the checkpoint's own unless `fresh_head` draws a new head")
    check_labels(labels or ())


def _for_task(found: Found, task: Task | None, labels: Sequence[str] | None) -> BertConfig:
    """The configuration with a head, of which a GGUF file states nothing."""
    config = found.config
    if not isinstance(config, BertConfig):
        raise ValueError(f"{found.path}: a `{config.model_type}` is no encoder: use `models.load`")
    try:
        if task is not None and task != config.task:
            config = replace(config, task=task, pooler=config.kind.pools(task))
        return config if labels is None else replace(config, labels=tuple(labels))
    except ValueError as error:
        raise ValueError(f"{found.path}: {error}") from None


def _as_ours(weights: Weights, config: BertConfig, *, chosen: bool) -> Weights:
    """The checkpoint under the names of the task's class.

    Checkpoints with a head have the family's prefix, those of the bare encoder do not. Checkpoints
    converted from TensorFlow name the parameters of a norm gamma and beta.
    """
    prefix = f"{config.kind.prefix}."
    prefixed = any(name.startswith(prefix) for name in weights.shapes)
    theirs: dict[str, str] = {}
    for name in weights.shapes:
        inside = name.startswith(prefix if prefixed else _ENCODER)
        bare = name.removeprefix(prefix) if inside else name
        if bare in _CONSTANTS or (chosen and not _belongs(bare, inside, config)):
            continue
        if not config.placed and bare == "embeddings.position_embeddings.weight":
            continue  # Microsoft's files have a table that is not used
        ours = prefix + bare if inside and config.task != FEATURES else bare
        ours = ours.replace("LayerNorm.gamma", "LayerNorm.weight")
        theirs[ours.replace("LayerNorm.beta", "LayerNorm.bias")] = name
    return renamed(weights, theirs)


def _belongs(bare: str, inside: bool, config: BertConfig) -> bool:
    """Whether a tensor is part of the task: of the encoder, or of the task's own head."""
    if inside:
        return not bare.startswith("pooler.") or config.task == FEATURES or config.needs_pooler
    return bare.startswith(config.head_modules) and not bare.startswith(_NEXT)


def _fill(
    forward: EncoderForward,
    weights: Weights,
    fresh_head: Array | None,
    spread: Spread | None,
    filling: Callable[..., Any],
) -> dict[str, Any]:
    weights = _without_tied(weights, forward.config, shared=is_shared(spread))
    if fresh_head is not None:
        return _with_fresh_head(forward, weights, filling, partial(draw, fresh_head, spread=spread))
    try:
        return filling(forward.shapes(), weights)
    except ValueError as error:
        raise ValueError(f"{error}{_hint(weights, forward.config)}") from None


def _hint(weights: Weights, config: BertConfig) -> str:
    heads = [n for n in weights.shapes if n.startswith(config.head_modules)]
    if config.task in _DRAWN and not heads:
        labels = "" if config.task == ANSWERS else ", `labels`"
        return (
            f"; the checkpoint has no {_DRAWN[config.task]} head: pass `fresh_head` (a PRNG key)"
            f'{labels} and task="{config.task}" to draw one'
        )
    return "; pass `task` to leave out the heads of other tasks"


def _with_fresh_head(
    forward: EncoderForward,
    weights: Weights,
    filling: Callable[..., Any],
    drawing: Callable[..., Any],
) -> dict[str, Any]:
    """The encoder from the checkpoint, which is filled, with a fresh head, which is drawn."""
    config = forward.config
    shapes, prefix = forward.shapes(), config.kind.prefix
    if config.pooler and f"{prefix}.pooler.dense.weight" not in weights.shapes:
        # A masked-LM checkpoint has no pooler, but BERT's classifier reads one.
        drawn = ("pooler",)
        rest = {name: s for name, s in shapes[prefix].items() if name not in drawn}
    else:
        drawn, rest = (), shapes[prefix]
    own = {part.removesuffix(".") for part in config.head_modules} & {*shapes}
    wanted = {prefix: rest}
    if "head.dense.weight" in weights.shapes:  # ModernBERT's, which its tasks have in common
        wanted["head"] = shapes["head"]
        own -= {"head"}
    kept = {n: s for n, s in weights.shapes.items() if n.partition(".")[0] in wanted}
    loaded = filling(wanted, weights._replace(shapes=kept))
    fresh = {**{n: shapes[n] for n in own}, prefix: {n: shapes[prefix][n] for n in drawn}}
    made = drawing(fresh, config)
    return {**made, **loaded, prefix: {**loaded[prefix], **made[prefix]}}


def _without_tied(weights: Weights, config: BertConfig, *, shared: bool) -> Weights:
    """Leaves out copies of the embedding table and of the head's bias.

    Some checkpoints store both names of a tied tensor.
    """
    table = f"{config.kind.prefix}.embeddings.word_embeddings.weight"
    repeats = {
        "cls.predictions.decoder.weight": table,
        "cls.predictions.decoder.bias": "cls.predictions.bias",
        "lm_head.decoder.weight": table,
        "lm_head.decoder.bias": "lm_head.bias",
        "vocab_projector.weight": table,
        "decoder.weight": f"{config.kind.prefix}.embeddings.tok_embeddings.weight",
    }
    found = [n for n in repeats if n in weights.shapes and repeats[n] in weights.shapes]
    for name in found:
        if not same(weights, name, repeats[name], shared=shared):
            raise ValueError(
                f"{weights.source}: `{name}` differs from `{repeats[name]}`, but the model has one "
                "tensor for the two (`tie_word_embeddings`): save it with equal ones, or load it "
                'without the head of words, as task="features"'
            )
    shapes = {name: shape for name, shape in weights.shapes.items() if name not in found}
    return weights._replace(shapes=shapes)
