"""What `fit` checks and lays out before the first step, so that a fault costs no training."""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import jax

from lora_jax import processes
from lora_jax.checkpoint.agreement import check_adapter
from lora_jax.compat import check_installed
from lora_jax.config.arguments import check_argument, check_tree
from lora_jax.config.lora import LoraConfig
from lora_jax.models.sharding import check_length
from lora_jax.multi.single import check_single
from lora_jax.train.archive import Batched, batched
from lora_jax.train.batches import Loader, loader
from lora_jax.train.buckets import ladder_for, lengths_of, row_multiple, widths_for
from lora_jax.train.config import TrainConfig, check_total, total_steps
from lora_jax.train.evaluate import check_causal, check_model, pad_id_of, whole_rows
from lora_jax.train.examples import Example, check_data, data_hash
from lora_jax.train.loss import TOGETHER, Rows
from lora_jax.train.memory import Memory
from lora_jax.train.packing import Choice, choose
from lora_jax.train.step import split_full
from lora_jax.tree import trained_and_frozen


class Hooks(NamedTuple):
    """Callbacks of `fit`.

    Attributes:
      record: called with every train and eval record.
      memory: called with the `Memory` when the first step is compiled.
      score: called with the adapted tree at every evaluation; the numbers it returns are added to
        the eval record.
      layout: called with a line about the batches: packed or in buckets, and the padding.
    """

    record: Callable[[dict], None] | None = None
    memory: Callable[[Memory], None] | None = None
    score: Callable[[Any], dict[str, float]] | None = None
    layout: Callable[[str], None] | None = None


_CALL = "train.fit(model, lora_params, train_data, eval_data, config)"


def check_call(
    model: Any,
    lora_params: Any,
    train_data: Any,
    eval_data: Any,
    config: Any,
    lora_config: Any,
    hooks: Any,
) -> None:
    """Checks the types of the arguments of `fit`, which are easily confused.

    Raises:
      TypeError: one has another type.
      ModuleNotFoundError: as `check_extra`.
    """
    check_argument(_CALL, "config", config, TrainConfig)
    check_extra(config)
    if lora_config is not None:
        check_argument(_CALL, "lora_config", lora_config, LoraConfig)
    check_argument(_CALL, "hooks", hooks, Hooks)
    check_model(_CALL, model)
    check_tree("lora_params", lora_params)
    check_single(lora_params)
    check_data("train_data", train_data)
    check_data("eval_data", () if eval_data is None else eval_data)


def check_extra(config: TrainConfig) -> None:
    """Raises before the first step for a package that is needed after the last one."""
    needed = {"grain": True, "tqdm": config.progress, "matplotlib": config.output_dir is not None}
    check_installed(*(package for package, used in needed.items() if used))


def check_same(
    config: TrainConfig,
    train_data: Sequence[Example],
    eval_data: Sequence[Example] | None,
    params: Any,
) -> None:
    """Checks that all processes run the same steps; one that goes another way never meets them.

    Raises:
      ValueError: they differ in a setting, in the data, or in the shapes of the parameters.
    """
    if not processes.several():
        return
    processes.check_same(
        {
            **settings_of(config),
            "train_data": data_hash(train_data),
            "eval_data": data_hash(eval_data or ()),
            "lora_params": shapes_hash(params),
        },
        at="train.fit",
    )


def settings_of(*configs: Any) -> dict[str, str]:
    """The settings of dataclasses as text, as far as all processes must have the same."""
    found = {name: repr(value) for one in configs for name, value in asdict(one).items()}
    # Of all settings only this one may differ: it changes nothing that others wait for.
    found.pop("progress", None)
    return found


def shapes_hash(tree: Any) -> str:
    """A hash of the shapes and dtypes of a tree."""
    shapes = repr(jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree))
    return hashlib.sha256(shapes.encode()).hexdigest()[:16]


def halves(lora_params: Any, full: bool, lora_config: LoraConfig | None) -> tuple[Any, Any]:
    """The trainable and the frozen tree.

    Raises:
      ValueError: nothing trains, the adapter is of another config, or a config came with `full`.
    """
    if full:
        if lora_config is not None:
            raise ValueError("`full` trains without an adapter: leave `lora_config` out")
        return split_full(lora_params)
    trainable, frozen = trained_and_frozen(lora_params)
    if not jax.tree.leaves(trainable):
        raise ValueError(
            "`lora_params` has nothing to train; make it with lora.init, or pass full=True to "
            "train every parameter"
        )
    if lora_config is not None:
        check_adapter(lora_params, lora_config)
    return trainable, frozen


_SMALL = 576
_PADDED = 0.2  # the share of padding from which the log names `packing`, where that halves it


class Layout(NamedTuple):
    """The data of a run.

    Attributes:
      loader: as many epochs of it as the run has.
      steps: optimizer steps of the run.
      text: how the data is batched, and the share of padding.
    """

    loader: Loader
    steps: int
    text: str


def arrange(
    model: Any, data: Sequence[Example], config: TrainConfig, spans: int = 1
) -> tuple[tuple[int, ...], Choice, int]:
    """The buckets, whether to pack, and the optimizer steps of a run; needs no parameters.

    A run that is resumed has those of its checkpoint, whatever is chosen today.

    Args:
      model, data, config: as for `fit`.
      spans: the parts of a row on a mesh.

    Raises:
      ValueError: an encoder, there is no data, it does not fit, the model takes no packed rows, or
        the run ends before its warm-up or its profile.
    """
    check_causal(model)
    lengths = lengths_of(data)
    rows = config.batch_size * config.accumulation
    kept = batched(config)
    ladder = ladder_for(
        data, lengths, _buckets(config, kept, lengths, spans), rows=rows, spans=spans
    )
    able = _takes_packed(model, config)
    if kept is not None and config.packing == "auto":
        length = kept.packed and (config.packed_length or kept.packed)
        config = replace(config, packing=kept.packed is not None, packed_length=length)
    choice = choose(
        lengths,
        ladder,
        _row_length(config, lengths, spans),
        rows=rows,
        # A model of the user's own may have no config: that of a small one.
        width=getattr(getattr(model, "config", None), "hidden_size", _SMALL),
        packing=config.packing if able else None,
        widths=widths_for(data, ladder),
    )
    packed, padded = choice.padding
    if able and config.packing is False and padded > _PADDED and 2 * packed < padded:
        choice = choice._replace(text=f"{choice.text}; consider packing")
    total = total_steps(config, choice.steps)
    check_total(config, total)
    return ladder, choice, total


def _buckets(
    config: TrainConfig, kept: Batched | None, lengths: Sequence[int], spans: int
) -> int | tuple[int, ...] | None:
    """The buckets of the config, or those of the checkpoint where they hold this data."""
    ladder = None if kept is None or kept.packed else kept.ladder
    fits = ladder and max(lengths) <= ladder[-1] and not any(rung % spans for rung in ladder)
    return ladder if fits and not isinstance(config.buckets, tuple) else config.buckets


def layout(
    model: Any, data: Sequence[Example], config: TrainConfig, rows: Rows = TOGETHER
) -> Layout:
    """Lays the data out in buckets, or in packed rows; raises as `arrange`."""
    ladder, choice, total = arrange(model, data, config, rows.spans)
    prepared = loader(
        data,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        buckets=ladder,
        packed=choice.length,
        pad_id=pad_id_of(model.tokenizer),
        seed=config.seed,
        epochs=-(-total // choice.steps),
        rows=rows,
        # Without them the load of experts would count padding, and an encoder would read it.
        segmented=config.balance_experts or whole_rows(model),
    )
    return Layout(prepared, total, choice.text)


def balance_of(model: Any, config: Any) -> float:
    """The weight of the load-balancing loss of experts; 0 unless `config.balance_experts`.

    Raises:
      ValueError: it is asked for, and the model has none.
    """
    if not config.balance_experts:
        return 0.0
    given = getattr(model, "config", None)
    weight = getattr(given, "router_aux_loss_coef", 0.0)
    if getattr(given, "num_experts", None) is None or not weight:
        raise ValueError(
            "`balance_experts` is for a mixture of experts whose config.json has a "
            "`router_aux_loss_coef` above 0: leave it out"
        )
    return weight


def _row_length(config: TrainConfig, lengths: Sequence[int], spans: int) -> int:
    """Tokens of a packed row: by default no more than those of the longest bucket."""
    if config.packed_length:
        check_length("packed_length", config.packed_length, spans)
        return config.packed_length
    return -(-max(lengths) // row_multiple(spans)) * row_multiple(spans)


def _takes_packed(model: Any, config: TrainConfig) -> bool:
    """Whether the model keeps the examples of a row apart.

    Raises:
      ValueError: it does not, and `packing` is True.
    """
    able = "segments" in inspect.signature(model.apply).parameters and not whole_rows(model)
    if config.packing is True and not able:
        raise ValueError(
            "`packing` is True, but the model's `apply` has no argument `segments`, without which "
            "the examples of a row attend to each other, or its head finds answers, in rows of "
            "their own: leave `packing` out, or give `apply` the argument, as "
            "`lora_jax.models.Forward.apply` has it"
        )
    return able
