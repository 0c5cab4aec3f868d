"""How many bytes a traced program needs beside its arguments: its jaxpr is read, not compiled.

XLA's buffers are imitated by a few rules:

* a product, a loop, a sum over a dim or a kernel writes its result down; an elementwise operation
  does only if such a one reads it whole, or if it is costly (exp, tanh, ...) and read twice;
  otherwise it is fused into what reads it;
* a reshape or transpose is another view of the same buffer;
* a buffer is free after its last reader; an elementwise result takes the place of an operand of
  its size that is read for the last time, and so does what a donated argument turns into;
* a loop holds its stacked results, its carry, and what one turn needs; of a stacked operand a turn
  holds one slice, as a copy where a product reads it.

The most bytes alive at any operation are the answer. Against XLA's own figures for training steps
of Llama-shaped models (an H200 in bfloat16, a CPU in float32) the temporaries come out within
about a sixth and, with the arguments, the whole within a few per cent: `benchmarks/estimate.py`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax import compat

_VIEWS = frozenset(
    {
        "copy", "expand_dims", "name", "optimization_barrier", "pvary", "reshape",
        "sharding_constraint", "squeeze", "stop_gradient", "transpose",
    }
)  # fmt: skip
_CALLS = frozenset(
    {"jit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat", "shard_map"}
)
# What reads its operands whole, from memory.
_READERS = frozenset(
    {
        "cond", "conv_general_dilated", "cumlogsumexp", "cummax", "cumprod", "cumsum",
        "custom_call", "dot_general", "gather", "pallas_call", "ragged_dot",
        "ragged_dot_general", "random_bits", "scan", "scatter", "scatter-add", "sort",
        "threefry2x32", "top_k", "while",
    }
)  # fmt: skip
# Readers whose result may not lie where an operand lay.
_APART = frozenset(
    {"conv_general_dilated", "dot_general", "gather", "pallas_call", "ragged_dot_general"}
)
_COSTLY = frozenset(
    {
        "cbrt", "cos", "div", "erf", "erf_inv", "exp", "exp2", "expm1", "log", "log1p",
        "logistic", "pow", "rem", "rsqrt", "sin", "sqrt", "tanh",
    }
)  # fmt: skip


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


def alive(
    fn: Callable,
    *args,
    donate: Sequence[int] = (),
    gathered: Sequence[int] | None = None,
    parts: Sequence[int] | None = None,
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
    """
    jaxpr, _ = compat.open_jaxpr(jax.make_jaxpr(fn)(*args))
    sources = []
    for i, arg in enumerate(args):
        sources += [_OWNED if i in donate else _HELD] * len(jax.tree.leaves(arg))
    if gathered is not None:
        spread = zip(sources, gathered, strict=True)
        sources = [source if n == 1 else source | _SPREAD for source, n in spread]
    program = _read(jaxpr, sources, stacked_from=len(jaxpr.outvars), parts=parts)
    return _fullest(program)


# Where a value comes from, as bits: computed here (none), an argument that stays, an argument
# whose buffer may be written over, a slice of a stack, and one that other devices hold parts of.
_HELD, _OWNED, _SLICE, _SPREAD = 1, 2, 4, 8


@dataclass(eq=False, slots=True)
class _Value:
    """An array of the program; views are the same value."""

    aval: Any
    source: int = 0
    node: "_Node | None" = None
    parts: int = 1

    @property
    def bytes(self) -> int:
        return -(-whole_bytes(self.aval) // self.parts)

    @property
    def label(self) -> str:
        op = self.node.op if self.node is not None else "slice"
        return f"{op} {self.aval.dtype.name}{list(self.aval.shape)}"


@dataclass(eq=False, slots=True)
class _Node:
    """An operation."""

    op: str
    ins: list[_Value]
    outs: list[_Value]
    eqn: Any
    at: int = 0


@dataclass(eq=False, slots=True)
class _Kernel:
    """Something that runs: the values it writes down, and those it reads from memory."""

    at: float
    node: _Node | None
    writes: list[_Value]
    reads: list[_Value]


@dataclass(eq=False)
class _Program:
    """A jaxpr with its calls unfolded, and which of its values are written down."""

    nodes: list[_Node]
    values: list[_Value]
    outs: list[_Value]
    stacked_from: int
    users: dict[_Value, list[_Node]] = field(default_factory=dict)
    real: set[_Value] = field(default_factory=set)
    found: dict[_Value, list[_Value]] = field(default_factory=dict)


def whole_bytes(aval) -> int:
    """Bytes of an array of this shape and dtype; fewer than 8 bits are packed."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return 8 * math.prod(aval.shape)
    try:
        bits = jnp.iinfo(aval.dtype).bits
    except ValueError:
        bits = aval.dtype.itemsize * 8
    return -(-math.prod(aval.shape) * bits // 8)


def _read(jaxpr, sources: Iterable[int], *, stacked_from: int, parts=None) -> _Program:
    """The program of an open jaxpr.

    Args:
      jaxpr: it.
      sources: of its arguments.
      stacked_from: results from here on are written into a stack that exists outside.
      parts: as in `alive`.
    """
    env: dict[Any, _Value] = {v: _Value(v.aval, _HELD) for v in jaxpr.constvars}
    env |= {v: _Value(v.aval, s) for v, s in zip(jaxpr.invars, sources, strict=True)}
    arguments = list(env.values())
    nodes: list[_Node] = []
    _unfold(jaxpr, env, nodes)
    # A result that is a literal stays one: it takes no room worth counting.
    literal = _Value(jax.ShapeDtypeStruct((), jnp.float32), _HELD)
    outs = [env.get(v, literal) for v in map(_hashable, jaxpr.outvars)]
    nodes = _needed(nodes, outs)
    program = _Program(nodes, arguments, outs, stacked_from)
    for at, node in enumerate(nodes):
        node.at = at
        for x in node.ins:
            program.users.setdefault(x, []).append(node)
    _write_down(program)
    for out, count in zip(outs, parts or (), strict=parts is not None):
        _spread_gradient(program, out, count)
    return program


def _hashable(v):
    return None if isinstance(v, compat.Literal) else v


def _unfold(jaxpr, env: dict, nodes: list[_Node]) -> None:
    """Appends the operations of a jaxpr, those inside its calls included."""
    for eqn in jaxpr.eqns:
        op = compat.name_of(eqn)
        ins = [None if isinstance(v, compat.Literal) else env.get(v) for v in eqn.invars]
        inner = _body(eqn) if op in _CALLS else None
        if inner is not None:
            own, _ = compat.open_jaxpr(inner)
            scope = {v: _Value(v.aval, _HELD) for v in own.constvars}
            for v, x in zip(own.invars, ins, strict=True):
                if x is not None:
                    scope[v] = x
            _unfold(own, scope, nodes)
            for v, o in zip(eqn.outvars, map(_hashable, own.outvars), strict=True):
                if o in scope:
                    env[v] = scope[o]
        elif op in _VIEWS:
            for v, x in zip(eqn.outvars, ins, strict=True):
                if x is not None:
                    env[v] = x
        else:
            node = _Node(op, [x for x in ins if x is not None], [], eqn)
            node.outs = [_Value(v.aval, node=node) for v in eqn.outvars]
            env |= dict(zip(eqn.outvars, node.outs, strict=True))
            nodes.append(node)


def _body(eqn):
    found = (eqn.params.get(name) for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"))
    return next((x for x in found if x is not None), None)


def _needed(nodes: list[_Node], outs: list[_Value]) -> list[_Node]:
    """Those that the results depend on."""
    wanted, kept = set(outs), []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.outs):
            kept.append(node)
            wanted.update(node.ins)
    return kept[::-1]


def _writes(op: str) -> bool:
    """Whether an operation writes its results down, whoever reads them."""
    return op in _READERS or op.startswith(("reduce_", "arg")) or op == "dynamic_update_slice"


def _write_down(program: _Program) -> None:
    """Finds the values that get buffers."""
    real = program.real
    real.update(x for x in program.values if x.source & (_HELD | _OWNED))
    real.update(program.outs[: program.stacked_from])
    for node in program.nodes:
        if _writes(node.op):
            real.update(node.outs)
        if node.op in _READERS:
            real.update(node.ins)
    costly: set[_Value] = set()
    for node in program.nodes:
        if node.op in _COSTLY or any(x in costly and x not in real for x in node.ins):
            costly.update(node.outs)
            real.update(o for o in node.outs if len(set(program.users.get(o, ()))) > 1)


def _origins(program: _Program, x: _Value) -> list[_Value]:
    """The buffers that a value is computed from; itself, if it has one."""
    if x in program.real:
        return [x]
    if x not in program.found:
        ins = [] if x.node is None else x.node.ins
        found = {o: None for i in ins for o in _origins(program, i)}
        program.found[x] = list(found)
    return program.found[x]


def _inputs(program: _Program, node: _Node) -> list[_Value]:
    return list({o: None for x in node.ins for o in _origins(program, x)})


def _spread_gradient(program: _Program, out: _Value, parts: int) -> None:
    """An updated parameter's gradient is spread as the parameter is."""
    if parts == 1 or out.node is None:
        return
    for x in _inputs(program, out.node):
        if not x.source and x.aval.shape == out.aval.shape:
            x.parts = parts
    out.parts = parts


def _kernels(program: _Program) -> list[_Kernel]:
    """What runs, in the program's order."""
    real, found = program.real, []
    for x in program.values:
        if x.source & _SLICE and x in real and (users := program.users.get(x)):
            found.append(_Kernel(users[0].at - 0.5, None, [x], []))
    last = set(program.outs[program.stacked_from :])
    for node in program.nodes:
        writes = node.outs if _writes(node.op) else [o for o in node.outs if o in real]
        if not writes and last.isdisjoint(node.outs):
            continue
        reads = _inputs(program, node)
        at: float = node.at
        if not _writes(node.op) and writes:
            # What is larger than what it is made of is made when it is needed.
            room = sum(x.bytes for x in reads if not x.source & _HELD)
            if sum(o.bytes for o in writes) > room:
                at = max(at, _first_read(program, writes) - 0.25)
        found.append(_Kernel(at, node, writes, reads))
    return sorted(found, key=lambda k: k.at)


def _first_read(program: _Program, values: list[_Value]) -> float:
    """When one of the values is first read by something that runs."""
    first, todo, seen = math.inf, list(values), set(values)
    while todo:
        for node in program.users.get(todo.pop(), ()):
            if _writes(node.op) or any(o in program.real for o in node.outs):
                first = min(first, node.at)
                continue
            todo += [o for o in node.outs if o not in seen]
            seen.update(node.outs)
    return 0 if first == math.inf else first


def _fullest(program: _Program) -> Alive:
    """Runs the kernels in order and counts what is alive."""
    kernels = _kernels(program)
    last = {x: number for number, kernel in enumerate(kernels) for x in kernel.reads}
    last |= dict.fromkeys(program.outs, len(kernels))
    held: dict[_Value, int] = {}
    size, best = 0, Alive(0, 0, ())
    for number, kernel in enumerate(kernels):
        dying = [x for x in kernel.reads if last[x] == number and (x in held or x.source & _OWNED)]
        takes = _takes_over(kernel, dying)
        new = [o for o in kernel.writes if o in last or o in program.users]
        inside = _inside(kernel)
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


def _takes_over(kernel: _Kernel, dying: list[_Value]) -> dict[_Value, _Value]:
    """Which results lie where an operand lay that is read for the last time."""
    node = kernel.node
    if node is None or node.op in _APART or node.op == "cond":
        return {}
    # A donated argument first: its buffer is there in any case.
    pairs, free = {}, sorted(dying, key=lambda x: not x.source & _OWNED)
    if node.op == "scan":
        consts, carries = compat.scan_counts(node.eqn.params, len(node.eqn.invars))
        inits = node.eqn.invars[consts : consts + carries]
        by_aval = Counter((v.aval.shape, v.aval.dtype) for v in inits)
        free = [x for x in free if by_aval[x.aval.shape, x.aval.dtype]]
    for o in kernel.writes[: carries] if node.op == "scan" else kernel.writes:
        match = next((x for x in free if x.bytes == o.bytes), None)
        if match is not None:
            pairs[o] = match
            free.remove(match)
    return pairs


def _inside(kernel: _Kernel) -> Alive:
    """What a loop needs for a turn, and a product for a weight that is spread."""
    nothing, node = Alive(0, 0, ()), kernel.node
    if node is None:
        return nothing
    if node.op == "scan":
        inner, _ = compat.open_jaxpr(node.eqn.params["jaxpr"])
        consts, carries = compat.scan_counts(node.eqn.params, len(node.eqn.invars))
        rest = len(inner.invars) - consts - carries
        sources = [_HELD] * consts + [_OWNED] * carries + [_SLICE] * rest
        return _fullest(_read(inner, sources, stacked_from=carries))
    if node.op in ("cond", "while"):
        bodies = node.eqn.params.get("branches") or (node.eqn.params["body_jaxpr"],)
        every = [compat.open_jaxpr(body)[0] for body in bodies]
        done = [_read(j, [_HELD] * len(j.invars), stacked_from=len(j.outvars)) for j in every]
        return max(map(_fullest, done), key=lambda a: a.bytes)
    if node.op in ("dot_general", "ragged_dot_general"):
        spread = [x for x in kernel.reads if x.source & _SPREAD]
        return nothing._replace(bytes=sum(x.bytes for x in spread))
    return nothing


def _largest(held: dict[_Value, int], inside: Alive, count: int = 6):
    found = [(x.label, b) for x, b in held.items() if b] + list(inside.largest)
    return tuple(sorted(found, key=lambda item: -item[1])[:count])


def _kept(program: _Program) -> int:
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
