"""The peak memory of a traced program beside its arguments, from its jaxpr, without compiling.

A liveness analysis with a few rules that approximate XLA's fusion and buffer assignment:

* a product, a loop, a reduction or a kernel writes its result to memory; an elementwise operation
  does so only if one of these reads it whole, or on a CPU if it is costly (exp, tanh, ...) and read
  twice; otherwise it is fused into its readers;
* a product converts its operands from a smaller dtype, and its result to one, by itself;
* a reshape or transpose is a view of the same buffer;
* a buffer is freed after its last reader; an elementwise result reuses the buffer of an operand of
  its size that is read for the last time, and an updated argument that of the donated one;
* a loop holds its stacked results, its carry, and the buffers of one iteration; an iteration holds
  one slice of a stacked operand, as a copy where a product reads it, on a GPU one for each product;
* zeros that loops fill and scatters add to are one array for all of a size, which the last takes;
* a sharded argument is gathered once, before the first product that reads it, and freed after the
  last; a gradient has its full size until it is reduced over the devices.

The estimate is the largest number of bytes alive at any operation. For training steps of
Llama-shaped models (an H200 in bfloat16, a CPU in float32) the temporaries are within about a sixth
of XLA's own figures, and the total, with the arguments, within a few per cent:
`benchmarks/estimate.py`.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from lora_jax import compat
from lora_jax.analysis.step_memory.program import (
    HELD,
    OWNED,
    SLICE,
    SPREAD,
    Habits,
    Node,
    Program,
    Value,
    inputs,
    read,
    reads_whole,
    stores,
    whole_bytes,
)
from lora_jax.paths import spell
from lora_jax.transform.primitives import row_of

# How many times smaller the first operand must be for XLA to copy it rather than the second; an
# adapter's side of a gradient is.
_FAR_SMALLER = 8


class Alive(NamedTuple):
    """The memory of a program at its peak.

    Attributes:
      bytes: bytes alive at the peak, without the arguments.
      kept: bytes of the stacked results of loops that a later loop reads: what the forward pass
        keeps of each layer for the backward pass.
      largest: `(what, bytes)` of the largest values alive at the peak, in falling order.
    """

    bytes: int
    kept: int
    largest: tuple[tuple[str, int], ...]


def on_cpu(found: Alive, trainable: Any, shards: Sequence[int], *, trained: int) -> Alive:
    """Adds the copies of gradients that XLA makes on a CPU.

    Its kernels for a sum of squares read whole arrays, so each gradient divided by the number of
    tokens is written beside the gradient itself, which clipping reads again. During the update all
    gradients exist twice; while the blocks' backward pass runs, only those of the matrices outside
    the blocks do: the head's, and the zeros that the embedding's rows are added to.

    Args:
      found: from `alive`.
      trainable: the trained parameters.
      shards: the number of devices that each of them is spread over.
      trained: bytes of all gradients on this device.
    """
    named = jax.tree_util.tree_leaves_with_path(trainable)
    # The gradient of an unstacked kernel (the head) has its full size: it is the result of a
    # product that is reduced over the devices.
    single = sum(
        -(-whole_bytes(x) // (1 if spell(path).endswith("kernel") else n))
        for (path, x), n in zip(named, shards, strict=True)
        if x.ndim == 2
    )
    return found._replace(bytes=max(found.bytes + single, 2 * trained))


def alive(
    fn: Callable,
    *args: Any,
    donate: Sequence[int] = (),
    gathered: Sequence[int] | None = None,
    parts: Sequence[int] | None = None,
    habits: Habits = Habits(),  # noqa: B008 (a tuple)
) -> Alive:
    """The bytes that `fn` needs beside its arguments, at its peak.

    Args:
      fn: a function of trees of arrays.
      *args: trees of arrays or `ShapeDtypeStruct`s; nothing is computed.
      donate: which arguments are donated, as jit's `donate_argnums`.
      gathered: for each array of the arguments, the number of devices that it is gathered from
        for a product; 1 by default.
      parts: for each array of the result, the number of devices that it, and so the gradient that
        updated it, is sharded over; 1 by default.
      habits: the compiler's.
    """
    jaxpr, _ = compat.open_jaxpr(jax.make_jaxpr(fn)(*args))
    sources = []
    for i, arg in enumerate(args):
        sources += [OWNED if i in donate else HELD] * len(jax.tree.leaves(arg))
    if gathered is not None:
        spread = zip(sources, gathered, strict=True)
        sources = [source if n == 1 else source | SPREAD for source, n in spread]
    return _peak_of(jaxpr, sources, stacked_from=len(jaxpr.outvars), habits=habits, parts=parts)


@dataclass(eq=False, slots=True)
class _Kernel:
    """A kernel: the values that it writes to memory, and those that it reads from there.

    `node` is None for a copy, a gather or an allocation, which the jaxpr does not have.
    """

    at: float
    node: Node | None
    writes: list[Value]
    reads: list[Value]


def _kernels(program: Program, habits: Habits) -> list[_Kernel]:
    """The kernels of a program, in the order in which they run.

    Node i runs at time i; fractions place the copies and gathers around it.
    """
    real, found = program.real, []
    # Of the rematerializations that wait; -1 is the start of the program.
    begins = {id(node.call): node.at for node in reversed(program.nodes) if node.call is not None}
    # A slice of a stack is copied just before its first reader, or gathered.
    for x in program.values:
        if x.source & SLICE and x in real and x in program.users and not _is_recopied(x, habits):
            first = program.users[x][0]
            if habits.ahead and x.source & SPREAD:
                start = begins.get(id(first.call), -0.5)
            else:
                start = first.at
            found.append(_Kernel(start - 0.5, None, [x], []))
    # A product reads the gathered copy of a sharded argument, which is a value of its own.
    spread = [x for x in program.values if x.source & SPREAD and not x.source & SLICE]
    whole = {x: Value(x.aval, SPREAD) for x in spread}
    last, before = set(program.outs[program.stacked_from :]), None
    zeros = _zeros(program, habits)
    for node in program.nodes:
        writes = node.outs if stores(node.op) else [o for o in node.outs if o in real]
        if not writes and last.isdisjoint(node.outs):
            continue
        reads = inputs(program, node)
        at: float = node.at
        if not stores(node.op) and writes:
            # XLA's scheduler delays a result that is larger than the operands it would free.
            room = sum(x.bytes for x in reads if not x.source & HELD)
            if sum(o.bytes for o in writes) > room:
                at = max(at, _first_read(program, writes) - 0.25)
        if row_of(node.op).memory == "product":
            reads += [whole[x] for x in reads if x in whole]
        if node.op == "scan":
            # What every iteration reads, as the chunks of the loss read the head; not the layers,
            # of which an iteration has its own.
            consts, _ = compat.scan_counts(node.eqn.params, len(node.eqn.invars))
            reads += [whole[x] for x in node.ins[:consts] if x in whole]
        if reads_whole(node.op):
            again = {x: Value(x.aval, SLICE) for x in reads if _is_recopied(x, habits)}
            found.append(_Kernel(at - 0.5, None, list(again.values()), []))
            reads = [again.get(x, x) for x in reads]
        if habits.turned and (x := _turned(node)) is not None:
            copy = Value(x.aval, node=node)
            found.append(_Kernel(x.node.at + 0.25 if x.node else at - 0.25, None, [copy], [x]))
            reads = [copy if y is x else y for y in reads]
        if habits.iteration and _fills(node):
            if habits.recomputes and zeros.isdisjoint(writes):
                continue  # the array of a later reader
            at = -1
        if node.op == "scan" and (habits.early_zeros or habits.iteration):
            _, carries = compat.scan_counts(node.eqn.params, len(node.eqn.invars))
            start = -1 if habits.iteration else before
            if start is not None:
                early = [x for x in writes[carries:] if x in zeros]
                found.append(_Kernel(start + 0.5, None, early, []))
                writes = [x for x in writes if x not in early]
            before = node.at
        found.append(_Kernel(at, node, writes, reads))
    for x, gathered in whole.items():
        readers = [k.at for k in found if gathered in k.reads]
        if readers:
            early = habits.early_gathers and not x.source & SLICE
            at = -1 if early else min(readers) - 0.5
            found.append(_Kernel(at, None, [gathered], []))
    return sorted(found, key=lambda k: k.at)


def _is_recopied(x: Value, habits: Habits) -> bool:
    """Whether a value is a slice of a stack that every reader has its own copy of."""
    return habits.recomputes and x.source & (SLICE | SPREAD) == SLICE


def _fills(node: Node) -> bool:
    """Whether an operation makes zeros, or repeats another number."""
    return all(x.source & HELD and not x.aval.ndim for x in node.ins)


def _zeros(program: Program, habits: Habits) -> set[Value]:
    """The zeros that have a buffer of their own from the start: of as many numbers, the last used.

    As many zeros are one array, of which each scatter and each loop but the last takes a copy. Of
    a loop, the stacks that it fills stand for their zeros. On a CPU each scatter has its own.
    """
    found = []
    for node in program.nodes:
        if node.op == "scan":
            _, carries = compat.scan_counts(node.eqn.params, len(node.eqn.invars))
            # Behind the carries, the results are the stacks that the loop fills.
            found += [(node.at, x) for x in node.outs[carries:]]
        elif habits.iteration and habits.recomputes and _fills(node):
            found += [(program.users[x][-1].at, x) for x in node.outs if x in program.users]
    # The later ones replace the earlier.
    ordered = sorted(found, key=lambda one: one[0])
    return set({(x.aval.size, x.aval.dtype): x for _, x in ordered}.values())


def _turned(node: Node) -> Value | None:
    """The operand that is copied transposed for a product, or None; see `Habits.turned`."""
    if node.op != "dot_general":
        return None
    summed, batch = node.eqn.params["dimension_numbers"]
    both = zip(summed, batch, strict=True)
    # The summed dims are the first ones behind the batch dims, and each operand has further dims.
    first = all(max(dims) < len(dims) + len(rows) for dims, rows in both if dims)
    free = all(x.aval.ndim > len(summed[0]) + len(batch[0]) for x in node.ins)
    if not (first and free):
        return None
    one, other = node.ins
    return one if _FAR_SMALLER * one.bytes < other.bytes else other


def _first_read(program: Program, values: list[Value]) -> float:
    """The time at which a kernel first reads one of the values, 0 if none does."""
    first, todo, seen = math.inf, list(values), set(values)
    while todo:
        for node in program.users.get(todo.pop(), ()):
            if stores(node.op) or any(o in program.real for o in node.outs):
                first = min(first, node.at)
                continue
            # Fused: what reads this node's results reads the values.
            todo += [o for o in node.outs if o not in seen]
            seen.update(node.outs)
    return 0 if first == math.inf else first


def _peak_of(
    jaxpr: Any,
    sources: Sequence[int],
    *,
    stacked_from: int,
    habits: Habits,
    parts: Sequence[int] | None = None,
) -> Alive:
    """The peak of a jaxpr; arguments as of `read`."""
    return _peak(
        read(jaxpr, sources, stacked_from=stacked_from, parts=parts, habits=habits), habits
    )


def _peak(program: Program, habits: Habits) -> Alive:
    """Goes through the kernels in order and adds up what is alive."""
    kernels = _kernels(program, habits)
    last = {x: number for number, kernel in enumerate(kernels) for x in kernel.reads}
    # The program's results outlive every kernel.
    last |= dict.fromkeys(program.outs, len(kernels))
    held: dict[Value, int] = {}
    size, best = 0, Alive(0, 0, ())
    for number, kernel in enumerate(kernels):
        dying = [x for x in kernel.reads if last[x] == number and (x in held or x.source & OWNED)]
        takes = _takes_over(kernel, dying, habits)
        # A result that nobody reads gets no buffer.
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
    """The results that reuse the buffer of an operand, and that operand.

    Args:
      kernel: the kernel.
      dying: its operands that no later kernel reads.
      habits: the compiler's.
    """
    node = kernel.node
    if node is None or node.op == "cond" or row_of(node.op).memory in ("product", "kernel"):
        return {}
    # A donated argument first: its buffer lives as long as the program in any case.
    pairs, free = {}, sorted(dying, key=lambda x: not x.source & OWNED)
    if not habits.in_place and node.op != "scan":
        free = [x for x in free if x.source & OWNED]
    # A loop can update its carry in place, but none of its other operands.
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
    """The peak within a kernel: an iteration of a loop, or a gradient before its reduction."""
    nothing, node = Alive(0, 0, ()), kernel.node
    if node is None:
        return nothing
    if node.op == "scan":
        inner, _ = compat.open_jaxpr(node.eqn.params["jaxpr"])
        consts, carries = compat.scan_counts(node.eqn.params, len(node.eqn.invars))
        slices = [SLICE | x.source & SPREAD for x in node.ins[consts + carries :]]
        sources = [HELD] * consts + [OWNED] * carries + slices
        inside = habits._replace(iteration=True)
        return _peak_of(inner, sources, stacked_from=carries, habits=inside)
    if node.op in ("cond", "while"):
        bodies = node.eqn.params.get("branches") or (node.eqn.params["body_jaxpr"],)
        every = [compat.open_jaxpr(body)[0] for body in bodies]
        peaks = (
            _peak_of(j, [HELD] * len(j.invars), stacked_from=len(j.outvars), habits=habits)
            for j in every
        )
        return max(peaks, key=lambda a: a.bytes)
    # Each device computes a whole gradient; the reduction leaves it its own part.
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
