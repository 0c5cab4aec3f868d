"""Evaluation: the mean loss on held-out data; also the loss function that training uses."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.array import is_leaf, is_lora
from lora_jax.config.arguments import SettingsError, check_count, kind_of
from lora_jax.models.mesh import Placement, check_rows, entered, model_on, params_on, placement
from lora_jax.models.registry import ENCODER, ENCODER_DECODER, IMAGE_ENCODER, kind_of_model
from lora_jax.train.batches import Loader, loader, one_by_one
from lora_jax.train.examples import Example, check_data
from lora_jax.train.goals import Goal, goal_of
from lora_jax.train.loss import TOGETHER, Rows, losses_of, outputs_of, summed_loss
from lora_jax.train.mesh import batch_on, rows_of
from lora_jax.train.step import Programs
from lora_jax.transform.lorafy import lorafy
from lora_jax.tree import combine, trained_and_frozen

_AHEAD = 16  # batches


class Evaluator(NamedTuple):
    """An evaluation that can be repeated without recompiling.

    Attributes:
      layout: the examples, which are batched anew at each evaluation.
      programs: the compiled functions by batch shape, `(trainable, frozen, batch) -> summed loss`.
    """

    layout: Loader
    programs: Programs
    at: Placement | None


def lora_loss(
    model: Any, rows: Rows = TOGETHER, *, balance: float = 0.0, trains: bool = True
) -> Callable:
    """The loss that training differentiates: `(trainable, frozen, batch, key) -> sum`.

    Args:
      model: see `losses_of`.
      rows, balance: the same.
      trains: it is differentiated, by `trainable` alone; an evaluation is not.
    """

    def loss(trainable: Any, frozen: Any, batch: Any, key: Any) -> Any:
        still = frozen_leaves(trainable, frozen) if trains else frozenset()
        losses = lorafy(losses_of(model, rows, balance=balance, frozen=still), reverse_only=True)
        summed = summed_loss(
            lambda *inputs, **packed: losses(*inputs[:-1], lora_key=inputs[-1], **packed)
        )
        return summed(combine(trainable, frozen), batch, key)

    return loss


def frozen_leaves(trainable: Any, frozen: Any) -> frozenset[int]:
    """The numbers of the leaves that do not train, quantized ones among them, for `losses_of`."""
    halves = (jax.tree.leaves(x, is_leaf=_is_whole) for x in (trainable, frozen))
    return frozenset(
        number
        for number, (trains, held) in enumerate(zip(*halves, strict=True))
        if trains is None and not is_lora(held)
    )


def _is_whole(x: Any) -> bool:
    return x is None or is_leaf(x)


def evaluator(
    model: Any,
    data: Sequence[Example],
    *,
    batch_size: int = 8,
    buckets: int | Sequence[int] | None = None,
    at: Placement | None = None,
    rows: Rows = TOGETHER,
) -> Evaluator:
    """Prepares the batches of an evaluation, to lie at `at` by `rows`; compiles nothing yet."""
    loss = lora_loss(model, rows, trains=False)

    def summed(trainable: Any, frozen: Any, batch: Any) -> Any:
        # The first axis holds one microbatch; without a key there is no dropout.
        return loss(trainable, frozen, jax.tree.map(lambda x: x[0], batch), None)

    layout = loader(
        data,
        batch_size=batch_size,
        buckets=buckets,
        pad_id=pad_id_of(model.tokenizer),
        rows=rows,
        segmented=whole_rows(model),
    )
    return Evaluator(layout, Programs(summed), at)


def mean_loss(prepared: Evaluator, trainable: Any, frozen: Any) -> float:
    """Mean cross entropy of all learned tokens, in nats."""
    total, count, ahead = 0.0, 0.0, deque[Any]()
    for batch in one_by_one(prepared.layout):
        # Sent off before earlier sums are waited for; of all batches images would fill the device.
        ahead.append(prepared.programs(trainable, frozen, batch_on(batch, prepared.at)))
        count += float(batch.weights.sum())
        if len(ahead) > _AHEAD:
            total += float(ahead.popleft())
    return (total + sum(float(s) for s in ahead)) / count


def evaluate(
    model: Any, lora_params: Any, data: Sequence[Example], *, batch_size: int = 8
) -> float:
    """Mean cross entropy of the learned tokens of `data`, in nats, without dropout.

    Args:
      model: as for `fit`.
      lora_params: the model's params, adapted or plain.
      data: tokenized examples.
      batch_size: rows of a forward pass; does not change the result.

    Raises:
      ValueError: an encoder, a token outside the vocabulary, or a batch that the mesh does not
        divide.
    """
    check_model("train.evaluate(model, lora_params, data)", model)
    check_data("data", data)
    check_count("batch_size", batch_size)
    check_causal(model)
    at = placement(model, lora_params)
    check_rows(at, batch_size)
    with entered(at):
        placed = params_on(lora_params, at)
        model = model_on(model, placed, at)
        rows = rows_of(at, placed)
        prepared = evaluator(model, data, batch_size=batch_size, at=at, rows=rows)
        check_tokens(model, placed, data, length=prepared.layout.ladder[0])
        return mean_loss(prepared, *trained_and_frozen(placed))


def check_model(call: str, model: Any) -> None:
    """Checks that a model has what training and evaluation call.

    Raises:
      TypeError: it has not.
    """
    missing = [name for name in ("apply", "tokenizer") if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"`model` must have `apply` and `tokenizer`, as one of `lora.models.load` has, "
            f"got {kind_of(model)} without `{missing[0]}`: call `lora.{call}` with the arguments "
            "in this order"
        )


def check_causal(model: Any) -> None:
    """Refuses an encoder without the head of a task: its outputs depend on what they predict.

    Raises:
      ValueError: it is one, of texts or images.
    """
    if kind_of_model(model) == IMAGE_ENCODER and goal_of(model.config) is None:
        raise SettingsError(
            f"`model` is a `{model.config.model_type}` without a head, which has no loss: name "
            "`labels` to classify images, or train it in a loop of your own "
            "(`lora_jax.lorafy(model.apply)`)"
        )
    if kind_of_model(model) == ENCODER and goal_of(model.config) is None:
        raise SettingsError(
            f"`model` is a `{model.config.model_type}`, an encoder, whose outputs depend on the "
            "tokens that they would have to predict: pass a decoder, name `labels` to classify "
            "texts or another `task`, or train it in a loop of your own "
            "(`lora_jax.lorafy(model.apply)`)"
        )


def tokenizer_of(model: Any) -> Any:
    """The model's tokenizer.

    Raises:
      ValueError: it has none.
    """
    if model.tokenizer is None:
        raise ValueError(
            "this model has no tokenizer, so it cannot read text: put tokenizer.json beside it"
        )
    return model.tokenizer


def check_texts(name: str, texts: Any) -> None:
    """Checks that texts, or the messages of chats, are in a list.

    Raises:
      TypeError: they are one text, or hold what is neither.
    """
    listed = isinstance(texts, Sequence) and not isinstance(texts, str)
    if not listed or not all(isinstance(x, Sequence) for x in texts):
        raise TypeError(
            f"`{name}` must be a list of texts, or of chats' messages, got {kind_of(texts)}: one "
            "text alone is `[text]`"
        )


def whole_rows(model: Any) -> bool:
    """Whether the loss reads which tokens of a row are real: an encoder's, and that of answers."""
    goal = goal_of(getattr(model, "config", None))
    return kind_of_model(model) == ENCODER or (goal is not None and goal.per == "answer")


def pad_id_of(tokenizer: Any) -> int:
    """The padding token; 0 if there is none, as no real token attends to padding."""
    pad = None if tokenizer is None else tokenizer.pad_id
    return 0 if pad is None else pad


def check_tokens(model: Any, lora_params: Any, data: Sequence[Example], *, length: int) -> None:
    """Checks that every token is in the vocabulary; the lookup of any other raises no error.

    Args:
      model, lora_params: the model, and its parameters with adapters.
      data: the examples.
      length: a number of tokens that the model takes.

    Raises:
      ValueError: a token is outside the vocabulary.
    """
    config = getattr(model, "config", None)
    if (goal := goal_of(config)) is not None:
        # The tokens of an image are zeros.
        known = getattr(model.config, "vocab_size", 1)
    else:
        logits = lorafy(outputs_of(model))
        # Shapes alone: nothing is computed.
        token, place = (jax.ShapeDtypeStruct(s, "int32") for s in ((1, length), (1,)))
        known = jax.eval_shape(logits, lora_params, token, place).shape[-1]
    for example in data:
        tokens = example.tokens
        _check_targets(example, goal, config)
        _check_image(example, model)
        if kind_of_model(model) == ENCODER_DECODER:
            if example.read is None:
                raise ValueError(
                    f"{example.source}: the example has nothing for the encoder to read; make it "
                    "with `examples(..., config=model.config)`"
                )
            tokens = np.concatenate((tokens, example.read))
        if not 0 <= tokens.min() <= tokens.max() < known:
            raise ValueError(
                f"{example.source}: the example has token"
                f" {max(tokens, key=lambda t: (t < 0, t))}, but the vocabulary ends at"
                f" {known - 1}; tokenize with the model's own tokenizer"
            )


def _check_image(example: Example, model: Any) -> None:
    """Refuses an image of another shape than the model's, or where it reads none."""
    want, image = None, example.image
    if kind_of_model(model) == IMAGE_ENCODER:
        want = (model.config.num_channels, *model.config.image_size)
    found = None if image is None else image.values.shape
    if found != want:
        raise ValueError(
            f"{example.source}: the example has {_shown(found)}, and the model reads "
            f"{_shown(want)}; make it with `{'examples' if want is None else 'image_examples'}`"
        )


def _shown(shape: tuple[int, ...] | None) -> str:
    return "text" if shape is None else f"images of shape {shape} (channels, height, width)"


def _check_targets(example: Example, goal: Goal | None, config: Any) -> None:
    """Refuses an example of another head than the model's."""
    targets = example.targets
    shape, dtype = ((), "") if goal is None else goal.target(config)
    if (targets is None) != (goal is None) or (
        targets is not None and (targets.shape[1:], targets.dtype.name) != (shape, dtype)
    ):
        raise ValueError(
            f"{example.source}: the example is not for this model"
            f"{'' if goal is None else f', whose head is for {goal.name}'}; make it with "
            "`examples(..., config=model.config)`"
        )
    if targets is not None and dtype == "int32" and len(targets):
        last = len(example.tokens) if shape else len(config.labels)
        if not 0 <= targets.min() <= targets.max() < last:
            raise ValueError(
                f"{example.source}: the example has target {targets.max()}, expected 0 to "
                f"{last - 1}"
            )
