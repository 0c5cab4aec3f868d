"""The interpreter: walks the base model's jaxpr with implicit arrays in place of weights.

Equations that no implicit array reaches are handed back to JAX in runs, untouched. The others
are looked up by name in the context's tables: a sub-jaxpr to enter, or a rule. Where there is no
rule, or a rule finds no low-rank form, the weight is materialized for that equation, and said so.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax import compat
from lora_jax.transform.implicit import Implicit, Unsupported, is_implicit, materialize
from lora_jax.transform.many import rules as slots


class MaterializedWarning(UserWarning):
    """A weight was added up (`W + s·A·B`) because an operation on it has no low-rank form."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What one call of a lorafied function remembers while it is traced.

    Attributes:
      rules: the rule of each primitive.
      control: the primitives that hold a jaxpr of their own, with what enters it.
      strict: whether a fallback is an error.
      uses: how often each path's weight met dropout so far.
      memo: inner jitted functions already rewritten, so that a repeated block is traced once.
      told: fallbacks already warned of, by path, primitive and line, with the reason.
      quiet: whether fallbacks are only collected in `told`, not warned of.
      lines: source lines of the equations entered, innermost last.
      reverse_only: whether the thin products have a backward of their own.
      chooser: where weights hold many adapters, the row's own.
    """

    rules: Mapping[str, Callable]
    control: Mapping[str, Callable]
    strict: bool
    uses: dict = dataclasses.field(default_factory=dict)
    memo: dict = dataclasses.field(default_factory=dict)
    told: dict = dataclasses.field(default_factory=dict)
    lines: list = dataclasses.field(default_factory=lambda: ["unknown line"])
    quiet: bool = False
    reverse_only: bool = False
    chooser: slots.Chooser | None = None

    def next_use(self, v: Implicit) -> int:
        if v.key is None or v.dropout == 0:
            return 0
        path = str(v.path)
        self.uses[path] = self.uses.get(path, -1) + 1
        return self.uses[path]

    def resumable(self, f: Callable) -> Callable:
        """`f` counting uses from where they stand now, however often JAX traces it."""
        start = dict(self.uses)

        def run(*args):
            self.uses.clear()
            self.uses.update(start)
            return f(*args)

        return run

    def fall_back(self, v: Implicit, eqn, reason: str):
        """Materializes a weight, with a warning or (strict) an error that says where and why."""
        if v.slots:
            v = slots.whole(self, v, eqn, reason)
        name, line = compat.name_of(eqn), compat.source_line(eqn, self.lines[-1])
        text = (
            f"`{v.path}` has no low-rank form in `{name}` at {line}: {reason}. "
            f"W + s·A·B is added up for this operation"
            if v.rank
            else f"`{v.path}` is quantized, and `{name}` at {line} needs it as an array: {reason}. "
            f"It is decoded for this operation"
        )
        if self.strict:
            raise ValueError(
                f"{text}; `strict=True` forbids that. Leave the leaf out of `target_modules`, "
                f"or call without `strict`"
            )
        if (said := (str(v.path), name, line)) not in self.told:
            self.told[said] = reason
            if not self.quiet:
                off = "" if v.key is None or v.dropout == 0 else " and so is this use's dropout"
                text = f"{text}: the result is exact, the saving is lost{off}"
                warnings.warn(text, MaterializedWarning, stacklevel=2)
        return materialize(v)


def evaluate(context: Context, jaxpr, consts: Sequence, args: Sequence) -> list:
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
    constant = _constants(eqns)
    last = _last_uses(eqns, jaxpr.outvars)
    pending: list = []

    def flush(end: int):
        if pending:
            _run_plain(jaxpr, pending, env, last, end)
            pending.clear()

    for i, eqn in enumerate(eqns):
        if not any(is_implicit(env.get(v)) for v in eqn.invars if isinstance(v, compat.Var)):
            pending.append(eqn)
            continue
        flush(i)
        values = [_read(env, v) for v in eqn.invars]
        outs = _apply(context, jaxpr, eqn, values, constant)
        env.update(zip(eqn.outvars, outs, strict=True))
        for v in [v for v in env if last.get(v, -1) <= i]:
            del env[v]
    flush(len(eqns))
    return [_read(env, v) for v in jaxpr.outvars]


def enter(context: Context, inner, values: Sequence) -> list:
    """Evaluates an inner jaxpr, closed or open."""
    jaxpr, consts = compat.open_jaxpr(inner)
    return evaluate(context, jaxpr, consts, values)


def _read(env: dict, v):
    return v.val if isinstance(v, compat.Literal) else env[v]


def _live(jaxpr) -> list:
    """The equations the outputs (or an effect) need: a dead one must not force a fallback."""
    needed = {v for v in jaxpr.outvars if isinstance(v, compat.Var)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in eqn.invars if isinstance(v, compat.Var))
    return kept[::-1]


def _constants(eqns: Sequence) -> set:
    """Variables that depend on nothing: made of literals and iotas, such as a resizing matrix."""
    found: set = set()
    for eqn in eqns:
        if all(not isinstance(v, compat.Var) or v in found for v in eqn.invars):
            found.update(eqn.outvars)
    return found


def _refuse_transforms(eqn, values: Sequence, constant: set):
    """A constant matrix that mixes some of the in dims makes another weight: no activation."""
    if compat.name_of(eqn) != "dot_general" or not any(v in constant for v in eqn.invars
                                                       if isinstance(v, compat.Var)):  # fmt: skip
        return
    contracting, _ = eqn.params["dimension_numbers"]
    for v, dims in zip(values, contracting, strict=True):
        for role in "io" if is_implicit(v) else "":
            own = {d for d in range(v.ndim) if v.roles[d] == role}
            if own & set(dims) and own - set(dims):
                raise Unsupported("a constant matrix transforms the weight before its use")


def _last_uses(eqns: Sequence, outvars: Sequence) -> dict:
    last = {v: i for i, eqn in enumerate(eqns) for v in eqn.invars if isinstance(v, compat.Var)}
    return last | {v: len(eqns) + 1 for v in outvars if isinstance(v, compat.Var)}


def _run_plain(jaxpr, eqns: list, env: dict, last: dict, end: int):
    """Runs consecutive equations on dense values as JAX would, keeping what is used after."""
    made = {v for eqn in eqns for v in eqn.outvars}
    inputs = dict.fromkeys(
        v for eqn in eqns for v in eqn.invars if isinstance(v, compat.Var) and v not in made
    )
    outputs = [v for eqn in eqns for v in eqn.outvars if last.get(v, -1) >= end]
    part = compat.segment(jaxpr, list(eqns), list(inputs), outputs)
    env.update(zip(outputs, compat.eval_segment(part, [env[v] for v in inputs]), strict=True))


def _apply(context: Context, jaxpr, eqn, values: list, constant: set) -> list:
    name = compat.name_of(eqn)
    try:
        with compat.equation_context(eqn):
            if name in context.control and not (
                name == "shard_map" and any(map(slots.is_stacked, values))
            ):
                context.lines.append(compat.source_line(eqn, context.lines[-1]))
                try:
                    return list(context.control[name](context, eqn, values))
                finally:
                    context.lines.pop()
            rule = context.rules.get(name, context.control.get(name))
            if rule is None:
                raise Unsupported("the operation has no rule")
            _refuse_transforms(eqn, values, constant)
            out: Any
            if any(map(slots.is_stacked, values)):
                out = slots.apply(context, eqn, values, _binder(eqn), rule)
            else:
                out = rule(context, eqn, values)
        return list(out) if eqn.primitive.multiple_results else [out]
    except Unsupported as reason:
        return _densely(context, jaxpr, eqn, values, str(reason))


def _densely(context: Context, jaxpr, eqn, values: list, reason: str) -> list:
    """One equation with its implicit operands materialized."""
    env = {}
    for v, x in zip(eqn.invars, values, strict=True):
        if isinstance(v, compat.Var) and v not in env:
            env[v] = context.fall_back(x, eqn, reason) if is_implicit(x) else x
    outs = [v for v in eqn.outvars]
    part = compat.segment(jaxpr, [eqn], list(env), outs)
    return compat.eval_segment(part, list(env.values()))


def _binder(eqn) -> Callable:
    return lambda *operands: eqn.primitive.bind(*operands, **eqn.params)
