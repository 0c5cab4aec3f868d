"""The form of one row of `PRIMITIVES`: how every part of the library treats one JAX primitive.

Four walks over a jaxpr read the rows. The interpreter (`interpret.evaluate`) runs a model with
implicit weights, the dataflow (`plan.usage`) finds how a model uses each weight, the token follower
(`many.token_axis`) finds the axis that numbers the tokens, and the memory estimate
(`analysis.step_memory.program`) decides which arrays are written to memory.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from lora_jax import compat

Dims = tuple[frozenset, ...]  # for each current dim, the original dims it is made of
Axes = frozenset  # of the axes of an array that number the tokens

# What a primitive runs inside itself: one jaxpr on the same operands, or the bodies of a loop or of
# a branch, or the functions of a linear solve, whose operands each walk assigns in its own way.
Body = Literal["call", "scan", "while", "cond", "solve"]

# How the memory estimate treats a primitive:
#   view     the result is the operand's own buffer
#   call     unfolded: the operations inside it take its place
#   fused    computed inside whatever reads the result
#   costly   fused too, but written down if more than one operation reads the result
#   lookup   costly, and reads its first operand (a table) whole from memory
#   sum      writes its result; its operands are computed on the way
#   update   writes its result; as `sum`, but without the habits compilers have for sums
#   reader   reads its operands whole from memory and writes its result
#   adds     a reader that adds into its first operand
#   kernel   a reader whose result may not take the place of an operand
#   product  a kernel that needs the whole of an operand that is spread over devices
Memory = Literal[
    "view", "call", "fused", "costly", "lookup", "sum", "update", "reader", "adds", "kernel",
    "product",
]  # fmt: skip
READERS: frozenset[Memory] = frozenset({"reader", "adds", "kernel", "product"})

# `rule(context, eqn, values)` gives the results; it raises `Unsupported` where there is no
# low-rank form.
Rule = Callable[[Any, Any, list], Any]
# `many(context, eqn, values, rule)`: the same for weights that hold many adapters.
ManyRule = Callable[[Any, Any, list, Rule], Any]
# `tokens(eqn, shapes of the operands, their token axes)`: the token axes of all results, or a list
# with those of each.
TokenRule = Callable[[Any, Sequence[tuple], Sequence[Axes]], Axes | list[Axes]]


class DimFlow(NamedTuple):
    """Which dims of operand `k` come out where. Every field is a function of `(eqn, k)`.

    Attributes:
      maps: for each result, for each of its dims, the dims of the operand it is made of; None where
        they do not come out as dims of their own.
      contracted: the operand's `(contracted, batched)` axes if it may be a weight there, else None.
      picked: the operand's dims of which the operation takes one index at a time.
      keeps_rows: whether rows looked up by index are still rows of the table afterwards, not
        features.
      takes_data: whether the operand is still a weight afterwards if the other operands depend on
        the function's arguments: they are indices, or factors that scale it.
      pairwise: whether result `j` is operand `j`, for every `j`.
    """

    maps: Callable[[Any, int], list | None]
    contracted: Callable[[Any, int], tuple[Sequence[int], Sequence[int]] | None]
    picked: Callable[[Any, int], Sequence[int]]
    keeps_rows: Callable[[Any, int], bool]
    takes_data: Callable[[Any, int], bool]
    pairwise: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Primitive:
    """One row. No field has a default: whoever adds a primitive decides on each.

    Attributes:
      rule: for implicit weights; None where they are materialized.
      many: for weights that hold many adapters; None where `rule` works for them as it is.
      body: what the primitive runs inside itself, or None.
      dims: for the dataflow.
      tokens: for the token follower; not used where `body` is not None.
      memory: for the memory estimate.
    """

    rule: Rule | None
    many: ManyRule | None
    body: Body | None
    dims: DimFlow
    tokens: TokenRule
    memory: Memory


def binder(eqn: Any) -> Callable:
    """`f(*operands)` that binds the equation's own primitive, with its parameters."""
    return lambda *operands: eqn.primitive.bind(*operands, **eqn.params)


def inner_jaxpr(eqn: Any) -> Any:
    """The jaxpr that a primitive with body "call" runs, or None."""
    # The parameter's name depends on the primitive and on the JAX version.
    found = (eqn.params.get(name) for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"))
    return next((x for x in found if x is not None), None)


def solve_bodies(eqn: Any, operands: Sequence, vectors: Sequence) -> list[tuple[Any, list]]:
    """The jaxprs of a linear solve, first the matrix's product, last the solution.

    Args:
      eqn: the equation.
      operands: of it, or what is known of them.
      vectors: what is known of the vectors that each function is applied to.

    Returns:
      Each jaxpr with its operands.
    """
    jaxprs, lengths, start, found = eqn.params["jaxprs"], eqn.params["const_lengths"], 0, []
    for name, count in zip(lengths._fields, lengths, strict=True):
        if name in ("matvec", "solve"):
            consts = operands[start : start + count]
            inner, _ = compat.open_jaxpr(getattr(jaxprs, name))
            found.append((inner, [*consts, *vectors[: len(inner.invars) - count]]))
        start += count
    return found
