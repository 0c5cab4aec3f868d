"""How many bytes a traced program needs beside its arguments: its jaxpr is read, not compiled.

XLA's buffers are imitated by a few rules:

* a product, a loop, a sum over a dim or a kernel writes its result down; an elementwise operation
  does only if such a one reads it whole, or if it is costly (exp, tanh, ...) and read twice;
  otherwise it is fused into what reads it;
* a reshape or transpose is another view of the same buffer;
* a buffer is free after its last reader; an elementwise result takes the place of an operand of
  its size that is read for the last time, and so does what a donated argument turns into;
* a loop holds its stacked results, its carry, and what one turn needs; of a stacked operand a turn
  holds one slice, as a copy where a product reads it;
* an argument that is spread over devices is gathered once: it is whole from the first product that
  reads it to the last; a gradient is whole until it is summed over them.

The most bytes alive at any operation are the answer. Against XLA's own figures for training steps
of Llama-shaped models (an H200 in bfloat16, a CPU in float32) the temporaries come out within
about a sixth and, with the arguments, the whole within a few per cent: `benchmarks/estimate.py`.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax

from lora_jax import compat
from lora_jax.analysis.step_memory.program import (
    HELD,
    OWNED,
    SLICE,
    SPREAD,
    Node,
    Program,
    Value,
    inputs,
    read,
    stores,
    whole_bytes,
)
from lora_jax.transform.primitives import row_of

_FAR_SMALLER = 8  # times, as an adapter's side of a gradient is


class Habits(NamedTuple):
    """What one compiler does and another does not.

    Attributes:
      in_place: an elementwise result may take the place of an operand.
      early_zeros: the stacks that a loop fills are there, as zeros, when the loop before it is
        done: they depend on nothing, and the scheduler is after time, not memory.
      early_gathers: an argument that is spread, and needed whole outside the loops, is gathered at
        the start.
      turned: where a product sums over the first dims of both operands, as a weight's gradient
        does, one of them is copied transposed, as soon as it is there: the second, or the first if
        it is far smaller.
      sums_read: a sum over a dim reads memory: a slice of a stack is copied for it, and what has
        other readers beside is written down.
    """

    in_place: bool = True
    early_zeros: bool = False
    early_gathers: bool = False
    turned: bool = False
    sums_read: bool = False


# By the backend of `StepSettings`, as seen in what each compiler assigned to buffers.
HABITS: Mapping[str, Habits] = {
    "gpu": Habits(early_zeros=True),
    "reference": Habits(in_place=False, early_gathers=True, turned=True, sums_read=True),  # a CPU
}


class Alive(NamedTuple):
    """The fullest moment of a program.

    Attributes:
      bytes: alive then, arguments not counted.
      kept: stacked results of loops that a later loop reads: what the forward pass keeps, layer
        by layer, for the backward pass.
      largest: `(what, bytes)` of what is alive then, the largest first.
    """

    bytes: int
    kept: int
    largest: tuple[tuple[str, int], ...]


def on_cpu(found: Alive, *, trained: int, single: int) -> Alive:
    """What a CPU holds of a step's gradients beside that.

    It sums squares in kernels that read them whole: a gradient divided by the number of tokens is
    written beside the gradient, which clipping reads again. In the update that is so of all, while
    the blocks' backward pass runs of what is there already: the head's, and the zeros that the
    embedding's will be added to.

    Args:
      found: from `alive`.
      trained: bytes of all gradients on this device.
      single: of those of matrices outside the blocks.
    """
    return found._replace(bytes=max(found.bytes + single, 2 * trained))


def alive(
    fn: Callable,
    *args,
    donate: Sequence[int] = (),
    gathered: Sequence[int] | None = None,
    parts: Sequence[int] | None = None,
    habits: Habits = Habits(),  # noqa: B008 (a tuple)
) -> Alive:
    """The bytes that `fn` needs beside its arguments, at its fullest moment.

    Args:
      fn: a function of trees of arrays.
      *args: trees of arrays or `ShapeDtypeStruct`s; nothing is computed.
      donate: which arguments are donated, as jit's `donate_argnums`.
      gathered: for each array of the arguments, among how many devices it is spread while a
        product needs it whole; 1 by default.
      parts: for each array of the result, among how many devices it, and so the gradient it was
        updated by, is spread; 1 by default.
      habits: of the compiler.
    """
    jaxpr, _ = compat.open_jaxpr(jax.make_jaxpr(fn)(*args))
    sources = []
    for i, arg in enumerate(args):
        sources += [OWNED if i in donate else HELD] * len(jax.tree.leaves(arg))
    if gathered is not None:
        spread = zip(sources, gathered, strict=True)
        sources = [source if n == 1 else source | SPREAD for source, n in spread]
    return _fullest_of(jaxpr, sources, len(jaxpr.outvars), habits, parts)


@dataclass(eq=False, slots=True)
class _Kernel:
    """Something that runs: the values it writes down, and those it reads from memory."""

    at: float
    node: Node | None
    writes: list[Value]
    reads: list[Value]


def _kernels(program: Program, habits: Habits) -> list[_Kernel]:
    """What runs, in the program's order."""
    real, found = program.real, []
    for x in program.values:
        if x.source & SLICE and x in real and (users := program.users.get(x)):
            found.append(_Kernel(users[0].at - 0.5, None, [x], []))
    whole = {x: Value(x.aval, SPREAD) for x in program.values if x.source & SPREAD}
    last, before = set(program.outs[program.stacked_from :]), None
    for node in program.nodes:
        writes = node.outs if stores(node.op) else [o for o in node.outs if o in real]
        if not writes and last.isdisjoint(node.outs):
            continue
        reads = inputs(program, node)
        at: float = node.at
        if not stores(node.op) and writes:
            # What is larger than what it is made of is made when it is needed.
            room = sum(x.bytes for x in reads if not x.source & HELD)
            if sum(o.bytes for o in writes) > room:
                at = max(at, _firstread(program, writes) - 0.25)
        if row_of(node.op).memory == "product":
            reads += [whole[x] for x in reads if x in whole]
        if habits.turned and (x := _turned(node)) is not None:
            copy = Value(x.aval, node=node)
            found.append(_Kernel(x.node.at + 0.25 if x.node else at - 0.25, None, [copy], [x]))
            reads = [copy if y is x else y for y in reads]
        if node.op == "scan" and habits.early_zeros:
            _, carries = compat.scan_counts(node.eqn.params, len(node.eqn.invars))
            if before is not None:
                found.append(_Kernel(before + 0.5, None, writes[carries:], []))
                writes = writes[:carries]
            before = node.at
        found.append(_Kernel(at, node, writes, reads))
    for x, gathered in whole.items():
        readers = [k.at for k in found if gathered in k.reads]
        if readers:
            early = habits.early_gathers and not x.source & SLICE
            at = -1 if early else min(readers) - 0.5
            found.append(_Kernel(at, None, [gathered], []))
    return sorted(found, key=lambda k: k.at)


def _turned(node: Node) -> Value | None:
    """The operand that is copied transposed for a product, see `Habits.turned`."""
    if node.op != "dot_general":
        return None
    summed, batch = node.eqn.params["dimension_numbers"]
    both = zip(summed, batch, strict=True)
    first = all(max(dims) < len(dims) + len(rows) for dims, rows in both if dims)
    free = all(x.aval.ndim > len(summed[0]) + len(batch[0]) for x in node.ins)
    if not (first and free):
        return None
    one, other = node.ins
    return one if _FAR_SMALLER * one.bytes < other.bytes else other


def _firstread(program: Program, values: list[Value]) -> float:
    """When one of the values is first read by something that runs."""
    first, todo, seen = math.inf, list(values), set(values)
    while todo:
        for node in program.users.get(todo.pop(), ()):
            if stores(node.op) or any(o in program.real for o in node.outs):
                first = min(first, node.at)
                continue
            todo += [o for o in node.outs if o not in seen]
            seen.update(node.outs)
    return 0 if first == math.inf else first


def _fullest_of(jaxpr, sources, stacked_from: int, habits: Habits, parts=None) -> Alive:
    """The fullest moment of a jaxpr; arguments as of `read`."""
    program = read(
        jaxpr, sources, stacked_from=stacked_from, parts=parts, sums_read=habits.sums_read
    )
    return _fullest(program, habits)


def _fullest(program: Program, habits: Habits) -> Alive:
    """Runs the kernels in order and counts what is alive."""
    kernels = _kernels(program, habits)
    last = {x: number for number, kernel in enumerate(kernels) for x in kernel.reads}
    last |= dict.fromkeys(program.outs, len(kernels))
    held: dict[Value, int] = {}
    size, best = 0, Alive(0, 0, ())
    for number, kernel in enumerate(kernels):
        dying = [x for x in kernel.reads if last[x] == number and (x in held or x.source & OWNED)]
        takes = _takes_over(kernel, dying, habits)
        new = [o for o in kernel.writes if o in last or o in program.users]
        inside = _inside(kernel, habits)
        cost = {o: held.get(takes[o], 0) if o in takes else o.bytes for o in new}
        now = size + sum(b for o, b in cost.items() if o not in takes) + inside.bytes
        if now > best.bytes:
            best = Alive(now, 0, _largest({**held, **cost}, inside))
        for o in new:
            if o in takes:
                held.pop(takes[o], None)
            held[o] = cost[o]
        for x in [x for x in (*held,) if last.get(x, -1) <= number]:
            del held[x]
        size = sum(held.values())
    return best._replace(kept=_kept(program))


def _takes_over(kernel: _Kernel, dying: list[Value], habits: Habits) -> dict[Value, Value]:
    """Which results lie where an operand lay that is read for the last time."""
    node = kernel.node
    if node is None or node.op == "cond" or row_of(node.op).memory in ("product", "kernel"):
        return {}
    # A donated argument first: its buffer is there in any case.
    pairs, free = {}, sorted(dying, key=lambda x: not x.source & OWNED)
    if not habits.in_place and node.op != "scan":
        free = [x for x in free if x.source & OWNED]
    if node.op == "scan":
        consts, carries = compat.scan_counts(node.eqn.params, len(node.eqn.invars))
        inits = node.eqn.invars[consts : consts + carries]
        by_aval = Counter((v.aval.shape, v.aval.dtype) for v in inits)
        free = [x for x in free if by_aval[x.aval.shape, x.aval.dtype]]
    for o in kernel.writes[:carries] if node.op == "scan" else kernel.writes:
        match = next((x for x in free if whole_bytes(x.aval) == whole_bytes(o.aval)), None)
        if match is not None:
            pairs[o] = match
            free.remove(match)
    return pairs


def _inside(kernel: _Kernel, habits: Habits) -> Alive:
    """What a loop needs for a turn, and a product for a gradient that is spread."""
    nothing, node = Alive(0, 0, ()), kernel.node
    if node is None:
        return nothing
    if node.op == "scan":
        inner, _ = compat.open_jaxpr(node.eqn.params["jaxpr"])
        consts, carries = compat.scan_counts(node.eqn.params, len(node.eqn.invars))
        rest = len(inner.invars) - consts - carries
        sources = [HELD] * consts + [OWNED] * carries + [SLICE] * rest
        return _fullest_of(inner, sources, carries, habits)
    if node.op in ("cond", "while"):
        bodies = node.eqn.params.get("branches") or (node.eqn.params["body_jaxpr"],)
        every = [compat.open_jaxpr(body)[0] for body in bodies]
        done = (_fullest_of(j, [HELD] * len(j.invars), len(j.outvars), habits) for j in every)
        return max(done, key=lambda a: a.bytes)
    # A gradient is whole on each device before it is summed over them and each keeps its part.
    size = sum(whole_bytes(o.aval) - o.bytes for o in kernel.writes)
    return nothing._replace(bytes=size)


def _largest(held: dict[Value, int], inside: Alive, count: int = 6) -> tuple[tuple[str, int], ...]:
    found = [(x.label, b) for x, b in held.items() if b] + list(inside.largest)
    return tuple(sorted(found, key=lambda item: -item[1])[:count])


def _kept(program: Program) -> int:
    """Bytes of the stacks that one loop writes and a later one reads."""
    kept = 0
    for node in program.nodes:
        if node.op != "scan":
            continue
        _, carries = compat.scan_counts(node.eqn.params, len(node.eqn.invars))
        for o in node.outs[carries:]:
            if any(user.op == "scan" for user in program.users.get(o, ())):
                kept += o.bytes
    return kept
