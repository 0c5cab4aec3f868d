"""The leaves of a LoRA tree: weights with an adapter, whole trained arrays, and their stacks.

    W + scale · A·B        W (in, out)   A (in, r)   B (r, out)

Each dimension of `W` has a role, one letter in `roles`:

    s  stack   one adapter for each index: layers of a scan, experts
    i  in      contracted with the activation: a dim of A
    o  out     produced: a dim of B

`A` holds the stack dims, then the in dims, then the rank; `B` the stack dims, the rank, then the
out dims, each in `W`'s own order. A kernel `(layers, d_model, heads, head_dim)` with roles
`sioo` has `A (layers, d_model, r)` and `B (layers, r, heads, head_dim)`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from lora_jax import compat, paths
from lora_jax.config.arguments import check_tree
from lora_jax.dims import b_dims, check_factors, from_matrix, sizes
from lora_jax.leaf_class import leaf_class, register_with_flax
from lora_jax.quant.array import QuantArray
from lora_jax.quant.ops import take


class Window(NamedTuple):
    """How a convolution slides over the dims of its kernel.

    Attributes:
      dims: the kernel's spatial dims, in the convolution's order (height, width).
      groups: number of feature groups.
    """

    dims: tuple[int, ...]
    groups: int = 1


# A leaf has the shape and dtype of its base weight `w`, because models read them. Every class of
# leaves has these three properties; a base class for them would be inherited by all.
base_shape = property(lambda x: tuple(x.w.shape))
base_ndim = property(lambda x: len(x.w.shape))
base_dtype = property(lambda x: jnp.dtype(x.w.dtype))


@leaf_class(("roles", "dropout", "window", "tied"))
@dataclasses.dataclass(frozen=True, repr=False)
class LoraArray:
    """A weight `w` with a low-rank change `scale · a·b` that is kept apart from it.

    Attributes:
      w: the frozen base weight, any shape: an array or a `QuantArray`.
      a: `(stack..., in..., r)`, trained.
      b: `(stack..., r, out...)`, trained.
      scale: `(stack...)` float32, `alpha / r` (rsLoRA: `alpha / √r`), frozen.
      m: DoRA's magnitude `(stack..., out...)`, trained, or None; or a `Gain`.
      roles: one letter for each dimension of `w`, see the module's docstring.
      dropout: probability in [0, 1) with which an element of the adapter's input is dropped.
      bias: PEFT's `lora_bias` `(stack..., out...)`, trained, or None: the product with the weight
        also gets `+ scale · bias`.
      window: of a convolution's kernel, else None.
      tied: of a lookup table, whether the model also uses it as its output head; None where that
        is not known, and for all other weights.

    Source: Hu et al. 2021, "LoRA", eq. 3; DoRA: Liu et al. 2024, eq. 5.
    """

    w: Any
    a: Any
    b: Any
    scale: Any
    m: Any = None
    roles: str = "io"
    dropout: float = 0.0
    bias: Any = None
    window: Window | None = None
    tied: bool | None = None

    shape, ndim, dtype = base_shape, base_ndim, base_dtype

    @property
    def rank(self) -> int:
        return int(self.a.shape[-1])


@leaf_class(("only", "tied"))
@dataclasses.dataclass(frozen=True, repr=False)
class SavedArray:
    """A leaf trained whole (`modules_to_save`, `bias`): the model sees `value`, `w` is kept.

    Attributes:
      w: the frozen original, any shape.
      value: what is trained and used, the same shape and dtype as `w`.
      only: of stacked layers the ones that train, as indices of the leading dims; the model sees
        `w` for the others, whatever `value` holds there. None: all.
      tied: as in `LoraArray`.
    """

    w: Any
    value: Any
    only: tuple[tuple[int, ...], ...] | None = None
    tied: bool | None = None

    shape, ndim, dtype = base_shape, base_ndim, base_dtype


@leaf_class(("ids", "axis"))
@dataclasses.dataclass(frozen=True, repr=False)
class RowsArray:
    """A table of which a few rows train (`trainable_token_indices`): `w` with `rows` in it.

    Attributes:
      w: the frozen table `(vocabulary, features)`, or an output head `(features, vocabulary)`.
      rows: the trained rows `(len(ids), features)`: their values, not changes of `w`.
      ids: the trained rows, each once.
      axis: the vocabulary's dim of `w`.

    Source: PEFT's `TrainableTokensLayer`.
    """

    w: Any
    rows: Any
    ids: tuple[int, ...]
    axis: int = 0

    shape, ndim, dtype = base_shape, base_ndim, base_dtype


@leaf_class()
@dataclasses.dataclass(frozen=True, repr=False)
class Gain:
    """DoRA's `m / ‖W + s·A·B‖`, computed beforehand: `(stack..., out...)`."""

    value: Any


@leaf_class(("roles", "dropout", "window", "chosen", "tied"))
@dataclasses.dataclass(frozen=True, repr=False)
class LoraStack:
    """Many adapters of one weight, padded to one rank: `W + scale[n] · a[n]·b[n]`, n adapters.

    Attributes:
      w: the frozen base weight, shared.
      a: `(stack..., n, in..., r)`, trained.
      b: `(stack..., n, r, out...)`, trained.
      scale: `(stack..., n)` float32, frozen; 0 where an adapter leaves the weight alone.
      m: DoRA's magnitudes `(stack..., n, out...)`, trained, or None.
      gain: DoRA's gains `(stack..., n, out...)` where the magnitudes do not train, or None.
      bias: `(stack..., n, out...)`, trained, or None.
      roles, dropout, window: as in `LoraArray`.
      chosen: the adapters are those of the rows of a batch, one a row and in their order.
      tied: as in `LoraArray`.
    """

    w: Any
    a: Any
    b: Any
    scale: Any
    m: Any = None
    gain: Any = None
    bias: Any = None
    roles: str = "io"
    dropout: float = 0.0
    window: Window | None = None
    chosen: bool = False
    tied: bool | None = None

    shape, ndim, dtype = base_shape, base_ndim, base_dtype

    @property
    def axis(self) -> int:
        """The axis of the adapters in `a` and `b`: it follows the stack dims."""
        return self.roles.count("s")

    @property
    def count(self) -> int:
        return int(self.a.shape[self.axis])

    @property
    def rank(self) -> int:
        return int(self.a.shape[-1])


@leaf_class(("chosen", "tied"))
@dataclasses.dataclass(frozen=True, repr=False)
class SavedStack:
    """A leaf that trains whole, with one value for each of many adapters.

    Attributes:
      w: the frozen original, shared.
      value: `(n, ...)`, trained; it is `w` for an adapter that does not train the leaf.
      chosen: as in `LoraStack`.
      tied: as in `LoraArray`.
    """

    w: Any
    value: Any
    chosen: bool = False
    tied: bool | None = None

    shape, ndim, dtype = base_shape, base_ndim, base_dtype

    @property
    def axis(self) -> int:
        """The axis of the adapters in `value`."""
        return 0

    @property
    def count(self) -> int:
        return int(self.value.shape[0])


# The fields of each class that `split` gives to the trainable and to the frozen half.
TRAINED_FIELDS: dict[type, tuple[str, ...]] = {
    LoraArray: ("a", "b", "m", "bias"),
    LoraStack: ("a", "b", "m", "bias"),
    SavedArray: ("value",),
    SavedStack: ("value",),
    RowsArray: ("rows",),
}
FROZEN_FIELDS: dict[type, tuple[str, ...]] = {
    LoraArray: ("w", "scale"),
    LoraStack: ("w", "scale", "gain"),
    SavedArray: ("w",),
    SavedStack: ("w",),
    RowsArray: ("w",),
}


def register_leaves() -> None:
    """Lets `flax.serialization` read and write leaves, if it has been imported by now."""
    register_with_flax(*TRAINED_FIELDS, Gain, QuantArray)


register_leaves()  # `lora.init` calls it again, for a program that imports flax later


def is_stack(x: Any) -> bool:
    """Whether `x` is a leaf with many adapters."""
    return isinstance(x, LoraStack | SavedStack)


def is_lora(x: Any) -> bool:
    """Whether `x` is a leaf that trains, of one adapter or of many."""
    return isinstance(x, LoraArray | SavedArray | RowsArray | LoraStack | SavedStack)


def effective(x: SavedArray) -> Any:
    """The array that the model uses for a leaf that trains whole."""
    if x.only is None:
        return x.value
    # `at[...]` takes one array of indices for each stack dim.
    where = tuple(jnp.asarray(dim) for dim in zip(*x.only, strict=True))
    return dense(x.w).at[where].set(x.value[where].astype(x.w.dtype))


def dense(w: Any) -> Any:
    """A base weight as an array: itself, or dequantized."""
    return w.dequantize() if isinstance(w, QuantArray) else w


def base_rows(x: RowsArray) -> Float[Array, "n d"]:
    """The frozen table's values of the trained rows, in the trained rows' dtype."""
    if isinstance(x.w, QuantArray):
        # `take` decodes these rows only, not the whole table.
        return take(x.w, x.ids, x.axis)
    return jnp.moveaxis(jnp.take(x.w, jnp.asarray(x.ids), axis=x.axis), x.axis, 0)


def with_rows(x: RowsArray) -> Float[Array, "..."]:
    """The table with its trained rows put in, in the table's dtype."""
    w = jnp.moveaxis(dense(x.w), x.axis, 0)
    return jnp.moveaxis(w.at[jnp.asarray(x.ids)].set(x.rows.astype(w.dtype)), 0, x.axis)


def rows_as_lora(x: RowsArray) -> LoraArray:
    """The same table as a low-rank change, never materialized: `W + E·(rows − W[ids])`.

    `E (vocabulary, n)` has a one for each trained row. Only `rows` has a gradient.
    """
    wide = widened(x.rows.dtype)
    n = len(x.ids)
    one_hot = jnp.zeros((x.shape[x.axis], n), wide).at[jnp.asarray(x.ids), jnp.arange(n)].set(1)
    # Zero at the start. Gradients stop at the frozen rows, which do not train.
    change = x.rows.astype(wide) - jax.lax.stop_gradient(base_rows(x)).astype(wide)
    return LoraArray(x.w, one_hot, change, jnp.float32(1), roles="io" if x.axis == 0 else "oi")


def widened(*dtypes) -> np.dtype:
    """float32, or float64 where a dtype is, if JAX has it: also under strict promotion."""
    # `jnp.promote_types` with float32 is an error under strict promotion.
    double = any(compat.held(d) == jnp.float64 for d in dtypes)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def delta(x: LoraArray) -> Float[Array, "..."]:
    """The change of weight `scale · a·b`, in `w`'s shape and dimension order, in float32.

    Args:
      x: a leaf; float64 factors give float64.

    Raises:
      TypeError: it is no `LoraArray`.
    """
    if not isinstance(x, LoraArray):
        raise TypeError(f"`x` must be one leaf, a `LoraArray`, got `{type(x).__name__}`")
    check_whole(x)
    stack, fan_in, fan_out = sizes(x.shape, x.roles)
    dtype = widened(x.a.dtype, x.b.dtype)
    a = x.a.astype(dtype).reshape(*stack, fan_in, x.rank)
    b = x.b.astype(dtype).reshape(*stack, x.rank, fan_out)
    # The default precision of a TPU is bfloat16, that of a GPU may be TF32.
    change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return from_matrix(change * x.scale.astype(dtype)[..., None, None], x.shape, x.roles)


def spread_outputs(gain: Float[Array, "..."], x: LoraArray) -> Float[Array, "..."]:
    """Reshapes `(stack..., out...)` so that it broadcasts against the weight.

    Args:
      gain: one number for each stack index and output.
      x: the leaf of the weight.
    """
    order = b_dims(x.roles)
    shape = dict(zip(order, gain.shape, strict=True))
    # From (stack..., out...) to the weight's own order, with size 1 where it has in dims.
    gain = jnp.transpose(gain, [order.index(d) for d in sorted(order)])
    return gain.reshape([shape.get(d, 1) for d in range(x.ndim)])


def count(stacked: PyTree) -> int:
    """How many slots a stack has.

    Raises:
      ValueError: the tree is no stack.
    """
    # Leaves that no adapter touches have no axis of adapters.
    counts = {x.count for x in jax.tree.leaves(stacked, is_leaf=is_stack) if is_stack(x)}
    if len(counts) != 1:
        raise ValueError(
            "`stacked` holds no stack of adapters: make one with `lora.stack([...])`"
            if not counts
            else f"`stacked` holds {sorted(counts)} adapters, expected one number at all leaves"
        )
    return counts.pop()


def check_whole(lora_params: PyTree) -> None:
    """Checks that a tree is no half of `split`.

    Raises:
      TypeError: it is no tree.
      ValueError: a leaf has no base weight, or nothing that trains; the message names it.
    """
    check_tree("lora_params", lora_params)
    for path, x in leaves_by_path(lora_params).items():
        trained = TRAINED_FIELDS.get(type(x))
        if trained and (x.w is None or all(getattr(x, name) is None for name in trained)):
            part = "base weight" if x.w is None else "trained array"
            raise ValueError(
                f"`lora_params` has no {part}{f' at `{path}`' if path else ''}: pass the whole "
                "tree, `lora.combine(trainable, frozen)`"
            )
        if type(x) is LoraArray:
            check_factors(path or "lora_params", x)


def check_plain(params: PyTree, also: str = "") -> None:
    """Checks that a tree holds no adapter, for writers of plain parameters.

    Args:
      params: the tree.
      also: another way out, for the message.

    Raises:
      ValueError: a leaf has an adapter; the message names it.
    """
    check_tree("params", params)
    for path, leaf in leaves_by_path(params).items():
        if is_lora(leaf):
            raise ValueError(
                f"`{path}` still has an adapter; merge first: lora.merge(params){also}"
            )


def is_leaf(x: Any) -> bool:
    """Whether `x` is a leaf that holds several arrays: an adapted or a quantized weight."""
    return isinstance(x, QuantArray) or is_lora(x)


def leaves_by_path(params: PyTree) -> dict:
    """The leaves of a tree by their dotted paths; a quantized or adapted weight is one leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    return {paths.spell(key_path): leaf for key_path, leaf in flat}
