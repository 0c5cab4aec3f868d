"""A planned leaf, and the plan of a whole tree with its table."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax

from lora_jax.array import Window
from lora_jax.config.lora import LoraConfig
from lora_jax.dims import sizes

UseKind = Literal["contract", "lookup", "transform", "rows", "picked", "other"]
LeafKind = Literal["lora", "saved", "rows", "frozen"]


def _without_defaults(self: Any) -> str:
    """A dataclass as text, without the fields that have their default value."""
    # Most fields of a leaf are empty, and a tuple of leaves should be readable.
    fields = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)]
    shown = [f"{name}={value!r}" for name, value, default in fields if value != default]
    return f"{type(self).__name__}({', '.join(shown)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Use:
    """One operation that consumes a leaf.

    Attributes:
      primitive: the operation's name.
      line: source line of the model.
      kind: "contract" (summed over against an activation), "lookup" (rows by index), "picked" (by
        an index that chooses a layer or an expert: a scalar that no argument of the function feeds,
        or one of a lookup whose rows are contracted later),
        "transform" and "rows" (as "contract" and "lookup", but with a matrix or indices that no
        argument of the function feeds), or "other".
      contracted: the leaf's dims summed over (contract, transform) or indexed (lookup, rows).
      stacked: the leaf's dims that are batched here, or of which one index was taken before.
      picked: those of `stacked` of which one index was taken.
      constant: whether the other operand depends on none of the function's arguments.
      flat: the size of the operand where one of the leaf's dims is summed over in part only, as of
        matrices that were put into one vector; else 0.
      fallback: why `lorafy` materializes the weight for this use, or ""; from `predict_fallbacks`.
      window: the leaf's spatial dims where it is a convolution's kernel, else None.
    """

    primitive: str
    line: str
    kind: UseKind
    contracted: frozenset = frozenset()
    stacked: frozenset = frozenset()
    picked: frozenset = frozenset()
    constant: bool = False
    flat: int = 0
    fallback: str = ""
    window: Window | None = None

    __repr__ = _without_defaults


@dataclasses.dataclass(frozen=True, repr=False)
class LeafPlan:
    """What happens to one leaf.

    Attributes:
      path: dotted path.
      shape, dtype: of the base weight.
      kind: "lora" (adapted), "saved" (trained whole), "rows" (some rows trained) or "frozen".
      roles: one letter for each dim: s stack, i in, o out; "" when frozen.
      ranks: rank for each stack index (flattened), 0 where a layer is left out; one when unstacked.
      alphas: alpha likewise.
      scales: `alpha/rank`, or with rsLoRA `alpha/√rank`, likewise.
      lookup: whether rows are looked up by index (an embedding), which decides the initial values.
      reason: why the leaf is frozen, or a remark.
      left_out: how to adapt a matrix that the config names and that stays frozen; else "".
      uses: how the function uses it.
      only: the indices of a saved leaf's stack that train, None for all.
      ids, axis: of a "rows" leaf the trained rows, and the dim that they index.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    kind: LeafKind
    roles: str = ""
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    lookup: bool = False
    reason: str = ""
    left_out: str = ""
    uses: tuple[Use, ...] = ()
    only: tuple[tuple[int, ...], ...] | None = None
    ids: tuple[int, ...] = ()
    axis: int = 0

    __repr__ = _without_defaults

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def rank(self) -> int:
        """The rank of the leaf's factors: the largest of its stack."""
        return max(self.ranks, default=0)

    @property
    def parameters(self) -> int:
        """How many parameters train, without the padding of smaller ranks and left-out layers."""
        if self.kind in ("saved", "rows"):
            return saved_parameters(self)
        if self.kind == "frozen":
            return 0
        _, fan_in, fan_out = sizes(self.shape, self.roles)
        # A and B of every layer, each of its own rank.
        return sum(self.ranks) * (fan_in + fan_out)

    @property
    def tied(self) -> bool | None:
        """Of a lookup table, whether it is the output head too; None for all other leaves."""
        return any(use.kind == "contract" for use in self.uses) if self.lookup else None

    @property
    def fallbacks(self) -> tuple[Use, ...]:
        return tuple(use for use in self.uses if use.fallback)


# Static, because a plan holds no arrays: without this, `jit` refuses it as an argument.
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """The plan of a whole tree, in the tree's leaf order; `print(plan)` shows a table.

    A plan may be an argument of a jitted function, which is compiled again for another plan.

    Attributes:
      config: of the adapters.
      leaves: one `LeafPlan` for each leaf that is an array.
    """

    config: LoraConfig
    leaves: tuple[LeafPlan, ...]

    @property
    def adapted(self) -> tuple[LeafPlan, ...]:
        return tuple(leaf for leaf in self.leaves if leaf.kind == "lora")

    @property
    def saved(self) -> tuple[LeafPlan, ...]:
        return tuple(leaf for leaf in self.leaves if leaf.kind in ("saved", "rows"))

    @property
    def left_out(self) -> tuple[LeafPlan, ...]:
        """The matrices that the config names and that are not adapted."""
        return tuple(leaf for leaf in self.leaves if leaf.left_out)

    @property
    def trainable(self) -> int:
        """How many parameters train."""
        vectors = 0  # DoRA's magnitudes, or lora_bias: one number for each output of each layer
        if self.config.use_dora or self.config.lora_bias:
            vectors = sum(
                math.prod(sizes(x.shape, x.roles)[0]) * sizes(x.shape, x.roles)[2]
                for x in self.adapted
            )
        return vectors + sum(leaf.parameters for leaf in self.leaves)

    def by_path(self) -> dict[str, LeafPlan]:
        return {leaf.path: leaf for leaf in self.leaves}

    def __str__(self) -> str:
        return table(self)

    # A model has hundreds of leaves, and an interactive session shows a repr unasked.
    def __repr__(self) -> str:
        return f"<Plan: {_summary(self)}; print(plan) shows every leaf>"


def saved_parameters(leaf: LeafPlan) -> int:
    """How many parameters of a saved leaf train, without layers that stay frozen."""
    if leaf.kind == "rows":
        return len(leaf.ids) * leaf.shape[1 - leaf.axis]
    if leaf.only is None:
        return math.prod(leaf.shape)
    # `only` indexes the leading dims, so the rest of the shape is one layer.
    return len(leaf.only) * math.prod(leaf.shape[len(leaf.only[0]) :])


_HEADER = ("leaf", "shape", "dtype", "kind", "roles", "rank", "alpha", "parameters", "uses / why")


def table(plan: Plan) -> str:
    """A plan as text: one row a leaf, fallbacks marked, and a total."""
    rows = [_HEADER, *(_row(leaf) for leaf in plan.leaves)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER) - 1)]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in (*lines, _summary(plan)))


def _summary(plan: Plan) -> str:
    return (
        f"{len(plan.adapted)} of {len(plan.leaves)} leaves adapted, "
        f"{_whole(plan)}{_left_out(plan)}; {plan.trainable:,} trainable parameters"
    )


def _whole(plan: Plan) -> str:
    """How many leaves train whole, and how many in some rows, as text."""
    rows = sum(leaf.kind == "rows" for leaf in plan.saved)
    return f"{len(plan.saved) - rows} trained whole" + (f", {rows} in some rows" if rows else "")


def _left_out(plan: Plan) -> str:
    count = len(plan.left_out)
    return f", {count} named {'matrix' if count == 1 else 'matrices'} left out" if count else ""


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
    return "  ".join([*cells, row[-1]])


def _row(leaf: LeafPlan) -> tuple[str, ...]:
    return (
        leaf.path,
        "x".join(map(str, leaf.shape)) or "scalar",
        leaf.dtype,
        leaf.kind,
        leaf.roles if leaf.kind == "lora" else "",
        _range(leaf.ranks),
        _range(leaf.alphas),
        f"{leaf.parameters:,}" if leaf.parameters else "",
        _uses(leaf),
    )


def _range(values: Sequence) -> str:
    """The value that all layers share, or the smallest and the largest."""
    some = sorted(set(values))
    if not some:
        return ""
    return f"{some[0]:g}" if len(some) == 1 else f"{some[0]:g}-{some[-1]:g}"


def _uses(leaf: LeafPlan) -> str:
    if leaf.kind != "lora":
        return leaf.reason
    # A Python loop over layers uses a leaf many times on one line, which is shown once.
    parts = list(dict.fromkeys(f"{u.primitive} {u.line}" for u in leaf.uses if not u.fallback))
    if len(parts) > 3:
        parts = [*parts[:3], f"{len(parts) - 3} more"]
    parts += dict.fromkeys(f"MATERIALIZED for {u.fallback} at {u.line}" for u in leaf.fallbacks)
    if leaf.reason:
        parts.append(leaf.reason)
    return "; ".join(parts)
