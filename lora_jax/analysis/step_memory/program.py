"""A traced program as a list of operations, and which of its arrays are written to memory.

The rules are stated in `lora_jax.analysis.step_memory.liveness`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from lora_jax import compat
from lora_jax.train.memory import tree_bytes
from lora_jax.transform.primitive import READERS, inner_jaxpr
from lora_jax.transform.primitives import row_of

# Where a value comes from, as bits; 0 is computed by the program. HELD: an argument that stays.
# OWNED: an argument whose buffer may be reused. SLICE: a slice of a stack, in a loop. SPREAD: an
# argument that is sharded over devices.
HELD, OWNED, SLICE, SPREAD = 1, 2, 4, 8


class Habits(NamedTuple):
    """Choices in which compilers differ.

    Attributes:
      in_place: an elementwise result may reuse an operand's buffer.
      early_zeros: the stacks that a loop fills are allocated, as zeros, when the loop before it
        ends: they depend on nothing, and the scheduler minimizes time, not memory.
      early_gathers: a sharded argument that is read outside the loops is gathered at the start.
      ahead: the weights of a loop's iteration are all gathered at its start: each gather begins as
        soon as the one before has ended. Those of a block that waits for the gradients of the one
        behind it are gathered then.
      turned: where a product sums over the first dims of both operands, as a weight's gradient
        does, one of them is copied transposed as soon as it is computed: the second, or the first
        if it is far smaller.
      sums_read: a reduction reads its operand from memory: a slice of a stack is copied for it,
        and a value with other readers is written.
      recomputes: what is cheaper to compute or to copy again than to keep is: an elementwise
        operation is fused into every reader, however costly it is, and each product copies the
        slices of stacks that it reads.
      iteration: the program is an iteration of a loop, whose zeros are all allocated at its start:
        those that a scatter adds to, and the stacks that a loop in it fills.
    """

    in_place: bool = True
    early_zeros: bool = False
    early_gathers: bool = False
    ahead: bool = False
    turned: bool = False
    sums_read: bool = False
    recomputes: bool = False
    iteration: bool = False


# By the backend of `StepSettings`, from the buffer assignments that each compiler printed.
# "reference" runs on a CPU.
HABITS: Mapping[str, Habits] = {
    "gpu": Habits(early_zeros=True, ahead=True, recomputes=True),
    "reference": Habits(
        in_place=False, early_gathers=True, ahead=True, turned=True, sums_read=True
    ),
}


@dataclass(eq=False, slots=True)
class Value:
    """An array of the program; views are the same value.

    Attributes:
      aval: its shape and dtype.
      source: where it comes from, the bits above.
      node: the operation that computes it.
      parts: the number of devices that it is sharded over.
    """

    aval: Any
    source: int = 0
    node: "Node | None" = None
    parts: int = 1

    @property
    def bytes(self) -> int:
        """Bytes on one device."""
        return -(-whole_bytes(self.aval) // self.parts)

    @property
    def label(self) -> str:
        """What it is, for a list: `dot_general float32[8,16]`."""
        alone = "gathered" if self.source & SPREAD else "slice"
        op = self.node.op if self.node is not None else alone
        return f"{op} {self.aval.dtype.name}{list(self.aval.shape)}"


@dataclass(eq=False, slots=True)
class Node:
    """An operation.

    Attributes:
      op: the primitive's name.
      ins, outs: its operands and results.
      eqn: the equation of the jaxpr.
      at: its index in the program, which serves as time.
      call: the rematerialization that it is part of, whose operands wait for the gradients behind.
    """

    op: str
    ins: list[Value]
    outs: list[Value]
    eqn: Any
    at: int = 0
    call: Any = None


@dataclass(eq=False)
class Program:
    """A jaxpr with its calls inlined, and which of its values are written to memory.

    Attributes:
      nodes: the operations in order.
      values: the arguments and constants.
      outs: the results.
      stacked_from: results from this index on are slices of stacks that exist outside.
      users: the operations that read a value.
      real: the values that have a buffer; the others are fused into their readers.
      found: `_origins` of the values asked for so far.
    """

    nodes: list[Node]
    values: list[Value]
    outs: list[Value]
    stacked_from: int
    users: dict[Value, list[Node]] = field(default_factory=dict)
    real: set[Value] = field(default_factory=set)
    found: dict[Value, list[Value]] = field(default_factory=dict)


def whole_bytes(aval: Any) -> int:
    """Bytes of an array of this shape and dtype, on all devices together; 0 on the host."""
    if getattr(aval, "memory_space", None) == jax.memory.Space.Host:
        return 0
    return tree_bytes(jax.ShapeDtypeStruct(aval.shape, aval.dtype))


def read(
    jaxpr: Any,
    sources: Iterable[int],
    *,
    stacked_from: int,
    parts: Sequence[int] | None = None,
    habits: Habits = Habits(),  # noqa: B008 (a tuple)
) -> Program:
    """The program of an open jaxpr.

    Args:
      jaxpr: the jaxpr.
      sources: where each of its arguments comes from, as bits.
      stacked_from: results from this index on are slices of stacks that exist outside.
      parts: as in `alive`.
      habits: the compiler's.
    """
    env: dict[Any, Value] = {v: Value(v.aval, HELD) for v in jaxpr.constvars}
    env |= {v: Value(v.aval, s) for v, s in zip(jaxpr.invars, sources, strict=True)}
    arguments = list(env.values())
    nodes: list[Node] = []
    outs = _unfold(jaxpr, env, nodes, {})
    nodes = _rounded(_needed(nodes, outs), outs)  # XLA removes the others
    program = Program(nodes, arguments, outs, stacked_from)
    for at, node in enumerate(nodes):
        node.at = at
        for x in node.ins:
            program.users.setdefault(x, []).append(node)
    _add_buffers(program)
    if not habits.recomputes:
        _add_costly_buffers(program)
    if habits.sums_read:
        _add_buffers_for_sums(program)
    for out, count in zip(outs, parts or (), strict=parts is not None):
        _spread_gradient(program, out, count)
    return program


def _unfold(jaxpr: Any, env: dict, nodes: list[Node], known: dict, call: Any = None) -> list[Value]:
    """Appends the operations of a jaxpr and of its calls, without common subexpressions.

    Args:
      jaxpr: an open jaxpr.
      env: variable to value: the arguments and constants, to which the other variables are added.
      nodes: the operations so far.
      known: the same operations by their key (`_same`), and the literals.
      call: as in `Node`.

    Returns:
      The results.
    """

    def value(v: Any) -> Value:
        if isinstance(v, compat.Literal):
            return known.setdefault((str(v), str(v.aval)), Value(v.aval, HELD))
        return env[v]

    for eqn in jaxpr.eqns:
        op, ins = compat.name_of(eqn), [value(v) for v in eqn.invars]
        memory = row_of(op).memory
        inner = inner_jaxpr(eqn) if memory == "call" else None
        if inner is not None:
            # Inlined with its own variables; equal operations inside and outside are still merged.
            own, _ = compat.open_jaxpr(inner)
            scope = {v: Value(v.aval, HELD) for v in own.constvars}
            scope |= dict(zip(own.invars, ins, strict=True))
            waits = eqn.params.get("differentiated") and eqn.params["prevent_cse"]
            outs = _unfold(own, scope, nodes, known, eqn if waits else call)
        elif memory == "view":
            outs = ins
        else:
            # XLA, too, computes equal operations once.
            same = known.get(key := _same(op, eqn, ins))
            if same is None:
                same = Node(op, ins, [], eqn, call=call)
                same.outs = [Value(v.aval, node=same) for v in eqn.outvars]
                nodes.append(same)
            known[key] = same
            outs = same.outs
        env |= dict(zip(eqn.outvars, outs, strict=True))
    return [value(v) for v in jaxpr.outvars]


def _same(op: str, eqn: Any, ins: list[Value]) -> Any:
    """A key that is equal for equal operations; no two loops or products have the same."""
    return object() if reads_whole(op) else (op, tuple(ins), str(eqn.params))


def _needed(nodes: list[Node], outs: list[Value]) -> list[Node]:
    """The nodes that the results depend on."""
    wanted, kept = set(outs), []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.outs):
            kept.append(node)
            wanted.update(node.ins)
    return kept[::-1]


def _rounded(nodes: list[Node], outs: list[Value]) -> list[Node]:
    """The nodes without conversions to a smaller dtype of what one product computes.

    The product writes the smaller dtype itself, where nobody else reads its result.
    """
    reads = Counter(x for node in nodes for x in node.ins) + Counter(outs)
    kept = []
    for node in nodes:
        found = node.ins[0].node if node.op == "convert_element_type" else None
        if found is None or row_of(found.op).memory != "product" or reads[node.ins[0]] > 1:
            kept.append(node)
        elif node.outs[0].bytes < node.ins[0].bytes:
            found.outs = node.outs
            node.outs[0].node = found
        else:
            kept.append(node)
    return kept


def stores(op: str) -> bool:
    """Whether an operation writes its results to memory, whatever reads them."""
    memory = row_of(op).memory
    return memory in READERS or memory in ("update", "sum")


def reads_whole(op: str) -> bool:
    """Whether an operation reads its operands whole, from memory."""
    return row_of(op).memory in READERS


def _read(node: Node) -> list[Value]:
    """What an operation reads from memory: a product converts smaller dtypes itself."""
    if row_of(node.op).memory != "product":
        return node.ins
    smaller = [(x, _converted(x)) for x in node.ins]
    return [x if small is None else small for x, small in smaller]


def _converted(x: Value) -> Value | None:
    """The value of a smaller dtype that a value is a conversion of, if it is one."""
    if x.node is None or x.node.op != "convert_element_type":
        return None
    (source,) = x.node.ins
    return source if source.bytes < x.bytes else None


def _add_buffers(program: Program) -> None:
    """Adds to `program.real` the values that get buffers."""
    real = program.real
    real.update(x for x in program.values if x.source & (HELD | OWNED))
    real.update(x for node in program.nodes for x in node.ins if x.source & HELD)
    real.update(program.outs[: program.stacked_from])
    for node in program.nodes:
        if stores(node.op):
            real.update(node.outs)
        if reads_whole(node.op):
            real.update(_read(node))
        elif row_of(node.op).memory == "lookup":
            # The table is read whole; the indices may be fused.
            real.add(node.ins[0])


def _add_costly_buffers(program: Program) -> None:
    """Adds the costly values with several readers, each of which would compute them again."""
    costly: set[Value] = set()
    for node in program.nodes:
        costs = row_of(node.op).memory in ("costly", "lookup")
        if costs or any(x in costly and x not in program.real for x in node.ins):
            costly.update(node.outs)
            program.real.update(o for o in node.outs if len(set(program.users.get(o, ()))) > 1)


def _add_buffers_for_sums(program: Program) -> None:
    """Adds the operands of reductions that are slices, or have other readers."""
    summed: set[Value] = set()
    # Backwards: an operation that is fused into a reduction hands its own operands on.
    for node in reversed(program.nodes):
        if row_of(node.op).memory == "sum":
            summed.update(node.ins)
        elif not stores(node.op) and any(o in summed and o not in program.real for o in node.outs):
            summed.update(node.ins)
    for x in summed:
        if x.source & SLICE or (x.node and len(set(program.users[x])) > 1):
            program.real.add(x)


def _origins(program: Program, x: Value) -> list[Value]:
    """The values with buffers that a value is computed from: itself, if it has one."""
    if x in program.real:
        return [x]
    if x not in program.found:
        ins = [] if x.node is None else x.node.ins
        found = {o: None for i in ins for o in _origins(program, i)}
        program.found[x] = list(found)
    return program.found[x]


def inputs(program: Program, node: Node) -> list[Value]:
    """The values that an operation, and what is fused into it, reads from memory."""
    return list({o: None for x in node.ins for o in _origins(program, x)})


def _spread_gradient(program: Program, out: Value, parts: int) -> None:
    """Shards the values between a parameter's gradient and its update as the parameter is."""
    if parts == 1 or out.source:
        return
    out.parts, todo = parts, [out]
    while todo:
        node = todo.pop().node
        # The gradient of a table: its rows are added to zeros.
        adds = node is not None and row_of(node.op).memory == "adds"
        if node is None or (reads_whole(node.op) and not adds):
            continue
        # Values of the same size: the shape may differ, as a transpose is a view.
        for x in inputs(program, node):
            if not x.source and x.parts == 1 and x.aval.size == out.aval.size:
                x.parts = parts
                todo.append(x)
