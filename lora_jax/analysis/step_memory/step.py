"""The training step of an estimate: the step of `lora_jax.train`, traced over shapes."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import optax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from lora_jax.analysis.step_memory import mesh as memory_mesh
from lora_jax.analysis.step_memory.shapes import Held
from lora_jax.config.arguments import check_count, set_plain_fields
from lora_jax.config.lora import LoraConfig
from lora_jax.models.kernels import AttentionName
from lora_jax.models.mesh import Placement
from lora_jax.models.model import check_options
from lora_jax.models.registry import (
    CAUSAL_LM,
    ENCODER_DECODER,
    IMAGE_ENCODER,
    architecture_of,
    forward_of,
    inputs_of,
)
from lora_jax.models.remat import Remat, remat_name
from lora_jax.models.sharding import EXPERTS, ROWS, RULES, TOKENS
from lora_jax.paths import spell
from lora_jax.plan.decide import plan as make_plan
from lora_jax.quant import sharding as quant_sharding
from lora_jax.quant.array import Backend, QuantArray, abstract, known, resized
from lora_jax.quant.dispatch import BACKENDS
from lora_jax.quant.formats import FormatName
from lora_jax.quant.loading import is_kernel
from lora_jax.quant.scales import HELD, HeldName
from lora_jax.quantize import quantize
from lora_jax.sharding import partition_specs, placed_specs
from lora_jax.train import mesh as meshes
from lora_jax.train.batches import Batch
from lora_jax.train.evaluate import lora_loss
from lora_jax.train.goals import goal_of
from lora_jax.train.loss import TOGETHER, Rows, cross_entropy
from lora_jax.train.preparation import balance_of
from lora_jax.train.step import TrainState, init_state, make_step, split_full
from lora_jax.transform.lorafy import lorafy
from lora_jax.tree import combine, init, split, trained_and_frozen

OptimizerName = Literal["adamw", "lion", "momentum", "sgd"]

# Optimizers by name; the comments count the arrays of state for each trained array. The learning
# rate does not change the memory.
OPTIMIZERS: Mapping[OptimizerName, Any] = {
    "adamw": partial(optax.adamw, 2e-4),  # 2
    "lion": partial(optax.lion, 2e-4),  # 1
    "momentum": partial(optax.sgd, 2e-4, momentum=0.9),  # 1
    "sgd": partial(optax.sgd, 2e-4),  # 0
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The settings that determine the memory of a training step of a model.

    Attributes:
      adapter: the adapter's config; None trains every weight.
      quantize: format of the frozen base's matrices ("nf4", "int4", ...), what files hold, or None.
      batch: rows of one forward pass, on all devices together.
      length: tokens of a row; of an encoder-decoder those of each of its texts.
      accumulation: forward passes of one optimizer step.
      packing: rows hold several examples, as `TrainConfig.packing` makes them.
      balance_experts: as in `TrainConfig`.
      dtype: dtype of the computation and of frozen weights that are not quantized.
      train_dtype: dtype of the weights in full fine-tuning, and so of their gradients and
        optimizer state; adapters are float32.
      remat: as in `lora_jax.models.Forward`; the bools become "full" and "none".
      offload: the same; bytes in the host's memory are not counted.
      attention: as in `lora_jax.models.Forward`; "auto" is what this machine's devices take, or
        those of the mesh that a step is compiled for.
      optimizer: a name of `OPTIMIZERS`, or an `optax.GradientTransformation`.
      clip: whether the gradient's global norm is clipped, as `lora_jax.train` does.
      mesh: axis to number of devices, see `lora_jax.models.sharding`.
      backend: the kernels of quantized products, see `lora_jax.quant.dispatch`.
    """

    adapter: LoraConfig | None = dataclasses.field(default_factory=LoraConfig)
    quantize: FormatName | HeldName | Held | None = None
    batch: int = 1
    length: int = 2048
    accumulation: int = 1
    packing: bool = False
    balance_experts: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    train_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    remat: Remat = "full"
    offload: bool = False
    attention: AttentionName = "auto"
    optimizer: OptimizerName | optax.GradientTransformation = "adamw"
    clip: bool = True
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    backend: Backend = "gpu"

    def __post_init__(self) -> None:
        set_plain_fields(self)
        for name in ("batch", "length", "accumulation"):
            check_count(name, getattr(self, name))
        check_options(self.dtype, self.train_dtype, self.remat, self.offload)
        if isinstance(self.remat, bool):
            object.__setattr__(self, "remat", remat_name(self.remat))
        if self.quantize is not None:
            if isinstance(self.quantize, str):
                known(self.quantize)
            if self.adapter is None:
                raise ValueError(
                    "`quantize` is for a frozen base, and full fine-tuning trains it: pass an "
                    "adapter, or no `quantize`"
                )
        # Annotations are not checked at run time.
        if isinstance(self.optimizer, str) and self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"`optimizer` must be one of {', '.join(OPTIMIZERS)}, or optax's, got "
                f"{self.optimizer!r}"
            )
        if self.backend not in BACKENDS:
            raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {self.backend}")
        # With every axis, so that readers need no defaults.
        mesh = memory_mesh.check_mesh(self.mesh, batch=self.batch, length=self.length)
        object.__setattr__(self, "mesh", mesh)

    @property
    def method(self) -> Literal["full", "LoRA", "QLoRA"]:
        """The method: "full", "LoRA" or "QLoRA"."""
        return "full" if self.adapter is None else "QLoRA" if self.quantize else "LoRA"

    @property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer, after clipping."""
        given = self.optimizer
        tx = OPTIMIZERS[given]() if isinstance(given, str) else given
        return optax.chain(optax.clip_by_global_norm(1.0), tx) if self.clip else tx


class AbstractStep(NamedTuple):
    """A step and the shapes of its arguments.

    Attributes:
      fn: `fn(state, frozen, batch) -> (state, metrics)`; the state is donated.
      params: the whole tree, trained and frozen.
      state, frozen, batch: `ShapeDtypeStruct`s.
      base: the base's parameters, before adapters.
    """

    fn: Any
    params: Any
    state: TrainState
    frozen: Any
    batch: Batch
    base: Any


def abstract_step(
    config: Any,
    settings: StepSettings,
    *,
    at: Placement | None = None,
    part: Mapping[str, int] | None = None,
) -> AbstractStep:
    """The training step of a model, traced over shapes.

    Args:
      config: the model's configuration.
      settings: the settings of the step.
      at: the mesh, for the step as `train.fit` runs it there; it must then be traced under
        `jax.set_mesh`. None leaves out what the model does for a mesh.
      part: the mesh of which the step is a device's part, see `device_step`: tokens and experts
        are spread over its axes, and inputs may be parts of a block.

    Raises:
      ValueError: a length above the model's context, targets that match nothing, a rank that is
        too large, or a block size that divides nothing.
    """
    kind = architecture_of(config.model_type).kind
    context = getattr(config, "context", config.max_position_embeddings)
    decodes, both = kind in (CAUSAL_LM, ENCODER_DECODER), kind == ENCODER_DECODER
    # Distances between tokens, which T5 has, have no end.
    if settings.length > context and not both:
        raise ValueError(
            f"`length` {settings.length} is more than the model's context of {context} tokens"
        )
    if settings.packing and kind != CAUSAL_LM:
        raise ValueError(
            f"`packing` is for language models, and `{config.model_type}` is an "
            f"encoder{'-decoder' * both}: leave it out"
        )
    whole = settings.adapter is None
    forward = forward_of(
        config,
        attention=settings.attention,
        dtype=settings.dtype,
        param_dtype=settings.train_dtype if whole else settings.dtype,
        scan=settings.quantize.scan if isinstance(settings.quantize, Held) else True,
        remat=settings.remat,
        offload=settings.offload,
    )
    balance = balance_of(forward, settings)
    base = _base(forward, settings, pad=part is not None)
    if part is not None and part[EXPERTS] > 1:
        base = _own_experts(base, part[EXPERTS])
    adapter = settings.adapter
    params = base if adapter is None else _adapted(forward, base, adapter)
    trainable, frozen = split_full(params) if whole else split(params)
    tx = settings.tx
    # Abstractly: a model of any size is planned, initialized and traced without its arrays.
    state = jax.eval_shape(lambda t: init_state(jax.random.key(0), t, tx), trainable)
    over = at.tokens if at is not None else TOKENS if part and part[TOKENS] > 1 else None
    undivided = both or kind == IMAGE_ENCODER
    if undivided and over is not None:
        raise ValueError(
            f"`mesh` axis '{TOKENS}' divides the tokens of a row, and `{config.model_type}` needs "
            "whole rows: use data and fsdp"
        )
    forward = forward if undivided else dataclasses.replace(forward, tokens=over)
    if decodes:
        forward, rows = _on_mesh(forward, settings, base=base, params=params, at=at)
        loss = lora_loss(forward, rows, balance=balance)
    else:
        rows = () if at is None else at.rows
        loss = _encoder_loss(dataclasses.replace(forward, rows=rows))
    batch = _batch(settings, config, kind)
    return AbstractStep(make_step(loss, tx), params, state, frozen, batch, base)


def _on_mesh(
    forward: Any, settings: StepSettings, *, base: Any, params: Any, at: Placement | None
) -> tuple[Any, Rows]:
    """The decoder and the rows of its batch on a mesh, as `train.fit` has them."""
    if at is None:
        return forward, TOGETHER
    places = partition_specs(params, placed_specs(base, RULES, settings.mesh))
    rows = meshes.rows_of(at, memory_mesh.placed(params, places, at.mesh))
    return dataclasses.replace(forward, rows=at.rows, gathered=rows.weights), rows


def device_step(config: Any, settings: StepSettings, *, batch: int) -> AbstractStep:
    """The part of a step that one device computes: of so many rows, its own tokens.

    Args:
      config: the configuration of a device's part of the model.
      settings: the settings of the whole step.
      batch: rows of one forward pass on a device.
    """
    spans, experts = settings.mesh[TOKENS], settings.mesh[EXPERTS]
    own = dataclasses.replace(
        settings, batch=batch, length=settings.length // spans,
        mesh={"tensor": settings.mesh["tensor"]},
    )  # fmt: skip
    step = abstract_step(config, own, part=settings.mesh)
    if spans == experts == 1:
        return step
    whole = PartitionSpec()
    fn = jax.shard_map(
        step.fn, mesh=AbstractMesh((spans, experts), (TOKENS, EXPERTS)), in_specs=whole,
        out_specs=whole, check_vma=False,
    )  # fmt: skip
    return step._replace(fn=fn)


def _own_experts(base: Any, devices: int) -> Any:
    """The shapes of a device's weights, which has some of the experts."""
    spread = placed_specs(base, RULES, {EXPERTS: devices})
    mesh = AbstractMesh((devices,), (EXPERTS,))

    def own(x: Any, spec: PartitionSpec) -> Any:
        if isinstance(x, QuantArray):
            parts = jax.tree.map(own, x, quant_sharding.array_specs(x, spec))
            return dataclasses.replace(parts, shape=NamedSharding(mesh, spec).shard_shape(x.shape))
        return jax.ShapeDtypeStruct(NamedSharding(mesh, spec).shard_shape(x.shape), x.dtype)

    return jax.tree.map(own, base, spread, is_leaf=lambda x: isinstance(x, QuantArray))


def _base(forward: Any, settings: StepSettings, *, pad: bool) -> Any:
    shapes, form = forward.shapes(), settings.quantize
    leaves = form.leaves if isinstance(form, Held) else None
    if form is None:
        return shapes

    # On such a mesh a TPU runs no kernels, see `lora_jax.quant.dispatch`.
    unsplit = settings.backend == "tpu" and settings.mesh["tensor"] > 1
    backend: Backend = "reference" if unsplit else settings.backend

    def held(path: Any, x: Any) -> Any:
        name = spell(path)
        if leaves is None:
            found = abstract(x, str(form)) if is_kernel(name, x) else None
        else:
            found = resized(leaves[name], x.shape) if name in leaves else None
        return x if found is None else dataclasses.replace(found, backend=backend)

    if leaves is not None or form in HELD:
        return jax.tree_util.tree_map_with_path(held, shapes)

    def quantized(params: Any) -> Any:
        name = cast(FormatName, form)
        return quantize(params, is_kernel, format=name, backend=backend, pad=pad)

    return jax.eval_shape(quantized, shapes)


def _adapted(forward: Any, base: Any, adapter: LoraConfig) -> Any:
    # The plan does not depend on the size of the input.
    plan = make_plan(adapter, forward.apply, base, *inputs_of(forward.config))
    return jax.eval_shape(lambda p: init(jax.random.key(0), plan, p), base)


def _batch(settings: StepSettings, config: Any, kind: str) -> Batch:
    # The microbatches of a step are stacked: (accumulation, ...).
    def whole(*shape: int, dtype: Any = "int32") -> Any:
        return jax.ShapeDtypeStruct((settings.accumulation, *shape), dtype)

    goal, batch, length = goal_of(config), settings.batch, settings.length
    decodes = kind in (CAUSAL_LM, ENCODER_DECODER)
    answers = goal is not None and goal.per == "answer" and decodes
    # A classifier has one target per row, a masked LM one per token, as a language model.
    one_a_row = answers or (goal is not None and goal.per == "text")
    places = batch if one_a_row else batch * length
    shape, dtype = goal.target(config) if goal is not None and decodes else ((), "int32")
    segmented = settings.packing or answers or settings.balance_experts
    images = None
    if kind == IMAGE_ENCODER:
        images = whole(batch, config.num_channels, *config.image_size, dtype="float32")
    return Batch(
        tokens=whole(batch, length),
        positions=whole(places),
        targets=whole(places, *shape, dtype=dtype),
        weights=whole(places, dtype="float32"),
        segments=whole(batch, length) if segmented else None,
        reads=whole(batch, length) if kind == ENCODER_DECODER else None,
        images=images,
    )


def _encoder_loss(forward: Any) -> Callable[..., jax.Array]:
    """Cross entropy of the head's logits, or of the hidden states of an encoder without a head."""
    apply = lorafy(forward.apply, reverse_only=True)

    def loss(trainable: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        read = batch.tokens if batch.images is None else batch.images
        out = apply(combine(trainable, frozen), read, lora_key=key)
        logits = jax.tree.leaves(out)[0]
        logits = logits.reshape(batch.targets.shape[0], logits.shape[-1])
        return cross_entropy(logits, batch.targets, batch.weights)

    return loss


class Spread(NamedTuple):
    """The shardings of a step: trees of `PartitionSpec`s of the same structure as its arguments."""

    params: Any
    state: Any
    frozen: Any
    batch: Any


def spread(step: AbstractStep, settings: StepSettings) -> Spread:
    """The specs of a step's arguments.

    Warns:
      UserWarning: a mesh that does not divide a matrix.
    """
    base = placed_specs(step.base, RULES, settings.mesh, stacklevel=5)  # the caller of `memory`
    params = partition_specs(step.params, base)
    whole = settings.adapter is None
    trainable, frozen = (params, step.frozen) if whole else trained_and_frozen(params)
    copied: Any = PartitionSpec()
    moments = optax.tree_utils.tree_map_params(
        settings.tx,
        # Factored moments (Adafactor) have fewer dims than their weight: they are not sharded.
        lambda x, spec: spec if len(spec) <= len(x.shape) else copied,
        step.state.opt_state,
        trainable,
        transform_non_params=lambda x: copied,
    )
    # Microbatches follow one another in time: their rows are sharded, not they.
    rows: Any = PartitionSpec(None, ROWS)
    # A classifier has one place a row.
    by_token = step.batch.positions.size == step.batch.tokens.size
    places = PartitionSpec(None, (*ROWS, TOKENS)) if by_token else rows
    own: dict[str, Any] = dict.fromkeys(("positions", "targets", "weights"), places)
    own["tokens"] = PartitionSpec(None, ROWS, TOKENS)
    fields = step.batch._asdict().items()
    specs: dict[str, Any] = {n: None if x is None else own.get(n, rows) for n, x in fields}
    state = TrainState(copied, trainable, moments, copied)
    return Spread(params, state, frozen, Batch(**specs))
