"""A traced program as a list of operations, and which of its arrays are written to memory.

The rules are stated in `lora_jax.analysis.step_memory.liveness`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax

from lora_jax import compat
from lora_jax.train.memory import tree_bytes
from lora_jax.transform.primitive import READERS, inner_jaxpr
from lora_jax.transform.primitives import row_of

# Where a value comes from, as bits: computed here (none), an argument that stays, an argument
# whose buffer may be written over, a slice of a stack, and one that other devices hold parts of.
HELD, OWNED, SLICE, SPREAD = 1, 2, 4, 8


@dataclass(eq=False, slots=True)
class Value:
    """An array of the program; views are the same value."""

    aval: Any
    source: int = 0
    node: "Node | None" = None
    parts: int = 1

    @property
    def bytes(self) -> int:
        return -(-whole_bytes(self.aval) // self.parts)

    @property
    def label(self) -> str:
        alone = "gathered" if self.source & SPREAD else "slice"
        op = self.node.op if self.node is not None else alone
        return f"{op} {self.aval.dtype.name}{list(self.aval.shape)}"


@dataclass(eq=False, slots=True)
class Node:
    """An operation."""

    op: str
    ins: list[Value]
    outs: list[Value]
    eqn: Any
    at: int = 0


@dataclass(eq=False)
class Program:
    """A jaxpr with its calls unfolded, and which of its values are written down."""

    nodes: list[Node]
    values: list[Value]
    outs: list[Value]
    stacked_from: int
    users: dict[Value, list[Node]] = field(default_factory=dict)
    real: set[Value] = field(default_factory=set)
    found: dict[Value, list[Value]] = field(default_factory=dict)


def whole_bytes(aval) -> int:
    """Bytes of an array of this shape and dtype."""
    return tree_bytes(jax.ShapeDtypeStruct(aval.shape, aval.dtype))


def read(
    jaxpr, sources: Iterable[int], *, stacked_from: int, parts=None, sums_read: bool = False
) -> Program:
    """The program of an open jaxpr.

    Args:
      jaxpr: open.
      sources: of its arguments.
      stacked_from: results from here on are written into a stack that exists outside.
      parts: as in `alive`.
      sums_read: as in `liveness.Habits`.
    """
    env: dict[Any, Value] = {v: Value(v.aval, HELD) for v in jaxpr.constvars}
    env |= {v: Value(v.aval, s) for v, s in zip(jaxpr.invars, sources, strict=True)}
    arguments = list(env.values())
    nodes: list[Node] = []
    outs = _unfold(jaxpr, env, nodes, {})
    nodes = _needed(nodes, outs)
    program = Program(nodes, arguments, outs, stacked_from)
    for at, node in enumerate(nodes):
        node.at = at
        for x in node.ins:
            program.users.setdefault(x, []).append(node)
    _write_down(program)
    if sums_read:
        _write_down_for_sums(program)
    for out, count in zip(outs, parts or (), strict=parts is not None):
        _spread_gradient(program, out, count)
    return program


def _unfold(jaxpr, env: dict, nodes: list[Node], known: dict) -> list[Value]:
    """Appends the operations of a jaxpr, those inside its calls included, each once.

    Args:
      jaxpr: open; its arguments and constants are in `env`, and its variables come to be.
      env: variable to value.
      nodes: the operations so far.
      known: what they are by `_same`, and literals.

    Returns:
      The results.
    """

    def value(v) -> Value:
        if isinstance(v, compat.Literal):
            return known.setdefault((str(v), str(v.aval)), Value(v.aval, HELD))
        return env[v]

    for eqn in jaxpr.eqns:
        op, ins = compat.name_of(eqn), [value(v) for v in eqn.invars]
        memory = row_of(op).memory
        inner = inner_jaxpr(eqn) if memory == "call" else None
        if inner is not None:
            own, _ = compat.open_jaxpr(inner)
            scope = {v: Value(v.aval, HELD) for v in own.constvars}
            scope |= dict(zip(own.invars, ins, strict=True))
            outs = _unfold(own, scope, nodes, known)
        elif memory == "view":
            outs = ins
        else:
            same = known.get(key := _same(op, eqn, ins))
            if same is None:
                same = Node(op, ins, [], eqn)
                same.outs = [Value(v.aval, node=same) for v in eqn.outvars]
                nodes.append(same)
            known[key] = same
            outs = same.outs
        env |= dict(zip(eqn.outvars, outs, strict=True))
    return [value(v) for v in jaxpr.outvars]


def _same(op: str, eqn, ins: list[Value]) -> Any:
    """What operations have in common that compute the same; loops and products are not merged."""
    return object() if reads_whole(op) else (op, tuple(ins), str(eqn.params))


def _needed(nodes: list[Node], outs: list[Value]) -> list[Node]:
    """Those that the results depend on."""
    wanted, kept = set(outs), []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.outs):
            kept.append(node)
            wanted.update(node.ins)
    return kept[::-1]


def stores(op: str) -> bool:
    """Whether an operation writes its results to memory, whoever reads them."""
    memory = row_of(op).memory
    return memory in READERS or memory in ("update", "sum")


def reads_whole(op: str) -> bool:
    """Whether an operation reads its operands whole, from memory."""
    return row_of(op).memory in READERS


def _write_down(program: Program) -> None:
    """Finds the values that get buffers."""
    real = program.real
    real.update(x for x in program.values if x.source & (HELD | OWNED))
    real.update(x for node in program.nodes for x in node.ins if x.source & HELD)
    real.update(program.outs[: program.stacked_from])
    for node in program.nodes:
        if stores(node.op):
            real.update(node.outs)
        if reads_whole(node.op):
            real.update(node.ins)
        elif (
            row_of(node.op).memory == "lookup"
        ):  # of a table; the places may be computed on the way
            real.add(node.ins[0])
    costly: set[Value] = set()
    for node in program.nodes:
        costs = row_of(node.op).memory in ("costly", "lookup")
        if costs or any(x in costly and x not in real for x in node.ins):
            costly.update(node.outs)
            real.update(o for o in node.outs if len(set(program.users.get(o, ()))) > 1)


def _write_down_for_sums(program: Program) -> None:
    """Slices, and what has other readers, where a sum over a dim is made of them."""
    summed: set[Value] = set()
    for node in reversed(program.nodes):
        if row_of(node.op).memory == "sum":
            summed.update(node.ins)
        elif not stores(node.op) and any(o in summed and o not in program.real for o in node.outs):
            summed.update(node.ins)
    for x in summed:
        if x.source & SLICE or (x.node and len(set(program.users[x])) > 1):
            program.real.add(x)


def _origins(program: Program, x: Value) -> list[Value]:
    """The buffers that a value is computed from; itself, if it has one."""
    if x in program.real:
        return [x]
    if x not in program.found:
        ins = [] if x.node is None else x.node.ins
        found = {o: None for i in ins for o in _origins(program, i)}
        program.found[x] = list(found)
    return program.found[x]


def inputs(program: Program, node: Node) -> list[Value]:
    return list({o: None for x in node.ins for o in _origins(program, x)})


def _spread_gradient(program: Program, out: Value, parts: int) -> None:
    """What an updated parameter is made of, back to its gradient, is spread as it is."""
    if parts == 1 or out.source:
        return
    out.parts, todo = parts, [out]
    while todo:
        node = todo.pop().node
        adds = node is not None and row_of(node.op).memory == "adds"  # to zeros, of a table's rows
        if node is None or (reads_whole(node.op) and not adds):
            continue
        for x in inputs(program, node):  # by size: a transposed one is another view of it
            if not x.source and x.parts == 1 and x.aval.size == out.aval.size:
                x.parts = parts
                todo.append(x)
