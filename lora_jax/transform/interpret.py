"""The interpreter: walks the base model's jaxpr with implicit arrays in place of weights.

Equations that no implicit array reaches are handed back to JAX in runs, untouched. The others
are looked up by name in the context's table of primitives. Where there is no rule, or a rule finds
no low-rank form, the weight is materialized for that equation, with a warning.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lora_jax import compat
from lora_jax.transform.implicit import (
    Implicit,
    Unsupported,
    has_many,
    is_implicit,
    materialize,
)
from lora_jax.transform.many.rules import RowAdapters, row_adapter
from lora_jax.transform.origins import Origins
from lora_jax.transform.primitive import Primitive


class MaterializedWarning(UserWarning):
    """A weight was materialized (`W + s·A·B`): an operation on it has no low-rank form."""


class Pair(NamedTuple):
    """The elementwise product of two weights, which only has a low-rank form once it is summed.

    Attributes:
      left, right: the weights, one and the same in a square.
      eqn: the product's equation.
      dtype: of the product.
    """

    left: Implicit
    right: Implicit
    eqn: Any
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Context:
    """What one call of a lorafied function remembers while it is traced.

    Attributes:
      primitives: the row of each primitive, by name.
      strict: whether a fallback is an error.
      uses: how often each path's weight met dropout so far.
      memo: inner jitted functions already interpreted, so that a repeated block is traced once.
      warned: fallbacks already warned of, by path, primitive and line, with the reason.
      quiet: whether fallbacks are only collected in `warned`, without a warning.
      probing: whether a function is run to find its fallbacks, and its result is not used.
      lines: source lines of the equations entered, innermost last.
      reverse_only: whether the thin products have a backward of their own.
      row_adapters: where weights hold many adapters, which of them the row has.
      origins: whether each variable depends on the call's arguments.
    """

    primitives: Mapping[str, Primitive]
    strict: bool
    uses: dict = dataclasses.field(default_factory=dict)
    memo: dict = dataclasses.field(default_factory=dict)
    warned: dict = dataclasses.field(default_factory=dict)
    lines: list = dataclasses.field(default_factory=lambda: ["unknown line"])
    quiet: bool = False
    probing: bool = False
    reverse_only: bool = False
    row_adapters: RowAdapters | None = None
    origins: Origins = dataclasses.field(default_factory=dict)

    def next_use(self, v: Implicit) -> int:
        if v.key is None or v.dropout == 0:
            return 0
        # Counted for each leaf, so that another leaf's uses do not change this one's masks.
        path = str(v.path)
        self.uses[path] = self.uses.get(path, -1) + 1
        return self.uses[path]

    def resumable(self, f: Callable) -> Callable:
        """`f` counting uses from where they stand now, however often JAX traces it."""
        # JAX may trace a body twice (for its derivative, for a carry's type): the same masks.
        start = dict(self.uses)

        def run(*args: Any) -> Any:
            self.uses.clear()
            self.uses.update(start)
            return f(*args)

        return run

    def probe(self) -> "Context":
        """A context to trace with where only the form of the result counts, or its fallbacks."""
        return dataclasses.replace(
            self,
            strict=False,
            quiet=True,
            probing=True,
            warned={},
            memo={},
            uses={},
            lines=list(self.lines),
        )

    def fall_back(self, v: Implicit, eqn: Any, reason: str) -> jax.Array:
        """Materializes a weight, with a warning or (strict) an error with place and reason."""
        if has_many(v):
            v = row_adapter(self, v, eqn, reason)
        if v.derived:
            return materialize(v)
        # Rank 0 is a quantized weight without an adapter: it is only decoded.
        name, line = compat.name_of(eqn), compat.source_line(eqn, self.lines[-1])
        text = (
            f"`{v.path}` has no low-rank form in `{name}` at {line}: {reason}. "
            f"W + s·A·B is materialized for this operation"
            if v.rank
            else f"`{v.path}` is quantized, and `{name}` at {line} needs it as an array: {reason}. "
            f"It is decoded for this operation"
        )
        if self.strict:
            raise ValueError(
                f"{text}; `strict=True` forbids that. Leave the leaf out of `target_modules`, "
                f"or call without `strict`"
            )
        # Once for each place: a loop of layers repeats the same line.
        if (fallback := (str(v.path), name, line)) not in self.warned:
            self.warned[fallback] = reason
            if not self.quiet:
                off = "" if v.key is None or v.dropout == 0 else " and so is this use's dropout"
                text = f"{text}: the result is exact, the saving is lost{off}"
                warnings.warn(text, MaterializedWarning, stacklevel=2)
        return materialize(v)


def evaluate(context: Context, jaxpr: Any, consts: Sequence, args: Sequence) -> list:
    """Evaluates an open jaxpr whose arguments may be implicit arrays.

    Args:
      context: of this call.
      jaxpr: open jaxpr.
      consts: values of its constvars.
      args: values of its invars, arrays or `Implicit`s.

    Returns:
      Values of its outvars, arrays or `Implicit`s.
    """
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    eqns = _live(jaxpr)
    # Values are dropped after their last use, as JAX's own evaluation does: memory in eager calls.
    last = _last_uses(eqns, jaxpr.outvars)
    pending: list = []

    def flush(end: int) -> None:
        if pending:
            _run_plain(jaxpr, pending, env, last=last, end=end)
            pending.clear()

    for i, eqn in enumerate(eqns):
        if not any(_is_lazy(env.get(v)) for v in eqn.invars if isinstance(v, compat.Var)):
            pending.append(eqn)
            continue
        # The pending equations may make operands of this one.
        flush(i)
        values = [_read(env, v) for v in eqn.invars]
        outs = _apply(context, jaxpr, eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
        # Outvars that nothing reads go at once.
        for v in [v for v in env if last.get(v, -1) <= i]:
            del env[v]
    flush(len(eqns))
    return _without_pairs(context, jaxpr, [_read(env, v) for v in jaxpr.outvars])


# A square is a product with itself; jnp.sum casts 16-bit squares before it adds them up.
_TAKE_PAIRS = ("reduce_sum", "convert_element_type")


def _is_lazy(x: Any) -> bool:
    return isinstance(x, Implicit | Pair)


def _without_pairs(context: Context, jaxpr: Any, values: list) -> list:
    """The values with products of two weights as arrays."""

    def dense(pair: Pair) -> jax.Array:
        # A square has one operand, a product two.
        weights = [pair.left, pair.right][: len(pair.eqn.invars)]
        reason = "elementwise product of two weights"
        return _materialized(context, jaxpr, pair.eqn, weights, reason=reason)[0].astype(pair.dtype)

    return [dense(x) if isinstance(x, Pair) else x for x in values]


def enter(context: Context, inner: Any, values: Sequence) -> list:
    """Evaluates an inner jaxpr, closed or open."""
    jaxpr, consts = compat.open_jaxpr(inner)
    return evaluate(context, jaxpr, consts, values)


def _read(env: dict, v: Any) -> Any:
    return v.val if isinstance(v, compat.Literal) else env[v]


def _live(jaxpr: Any) -> list:
    """The equations the outputs (or an effect) need: a dead one must not force a fallback."""
    needed = {v for v in jaxpr.outvars if isinstance(v, compat.Var)}
    kept = []
    # From the outputs back.
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in eqn.invars if isinstance(v, compat.Var))
    return kept[::-1]


def _last_uses(eqns: Sequence, outvars: Sequence) -> dict:
    last = {v: i for i, eqn in enumerate(eqns) for v in eqn.invars if isinstance(v, compat.Var)}
    # Outputs outlive the last equation.
    return last | {v: len(eqns) + 1 for v in outvars if isinstance(v, compat.Var)}


# The interpreter calls JAX once for a run of equations, not once for each: tracing is faster, and
# what is inside a run is freed by JAX itself.
def _run_plain(jaxpr: Any, eqns: list, env: dict, last: dict, end: int) -> None:
    """Runs consecutive equations on dense values as JAX would, keeping what is used after."""
    made = {v for eqn in eqns for v in eqn.outvars}
    inputs = dict.fromkeys(
        v for eqn in eqns for v in eqn.invars if isinstance(v, compat.Var) and v not in made
    )
    # What only equations of the run use need not come out of it.
    outputs = [v for eqn in eqns for v in eqn.outvars if last.get(v, -1) >= end]
    part = compat.segment(jaxpr, list(eqns), list(inputs), outputs)
    env.update(zip(outputs, compat.eval_segment(part, [env[v] for v in inputs]), strict=True))


def _apply(context: Context, jaxpr: Any, eqn: Any, values: list) -> list:
    row = context.primitives.get(compat.name_of(eqn))
    if compat.name_of(eqn) not in _TAKE_PAIRS:
        values = _without_pairs(context, jaxpr, values)
        if not any(map(is_implicit, values)):
            # The pair was the only implicit operand: the equation is a plain one now.
            return _materialized(context, jaxpr, eqn, values, reason="")
    try:
        if row is None or row.rule is None:
            raise Unsupported("the operation has no rule")
        with compat.equation_context(eqn):
            many = row.many if any(map(has_many, values)) else None
            # Equations inside a body may come without a line of the model: then it is this one's.
            if row.body is not None:
                context.lines.append(compat.source_line(eqn, context.lines[-1]))
            try:
                if many is not None:
                    out = many(context, eqn, values, row.rule)
                else:
                    out = row.rule(context, eqn, values)
            finally:
                if row.body is not None:
                    context.lines.pop()
        return list(out) if eqn.primitive.multiple_results else [out]
    except Unsupported as reason:
        values = _without_pairs(context, jaxpr, values)
        return _materialized(context, jaxpr, eqn, values, reason=str(reason))


def _materialized(context: Context, jaxpr: Any, eqn: Any, values: list, *, reason: str) -> list:
    """One equation with its implicit operands materialized."""
    env = {}
    # By variable: an operand that occurs twice is materialized once.
    for v, x in zip(eqn.invars, values, strict=True):
        if isinstance(v, compat.Var) and v not in env:
            env[v] = context.fall_back(x, eqn, reason) if is_implicit(x) else x
    part = compat.segment(jaxpr, [eqn], list(env), list(eqn.outvars))
    return compat.eval_segment(part, list(env.values()))
