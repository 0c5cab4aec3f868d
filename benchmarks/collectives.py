"""The collectives of a compiled program, read off XLA's text for a CPU, an NVIDIA GPU or a TPU.

What the compilers do differently:

    loops     XLA for CPUs and GPUs notes how often a loop runs (`known_trip_count`); libtpu leaves
              the bound to the loop's condition, `compare(i, constant(32)), direction=LT`.
    start     For a GPU a collective is a pair, `all-gather-start` and `all-gather-done`. libtpu
              fuses parts of it into the products that run meanwhile: a start, several steps and a
              done each name the whole collective, all with the same `channel_id`. The steps may be
              in a loop within the loop of the start.
"""

import math
import re
from collections import Counter, defaultdict
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      arrays: dtype, as XLA spells it, and shape of each array that a device has afterwards.
      devices: the number of devices that take part.
      times: how often it runs in a run of the program.
      loop: whether it is in a loop.
      line: the line of the text.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    devices: int
    times: int
    loop: bool
    line: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time, with a ring over the n devices.

        (n-1)/n of what is gathered, scattered or exchanged, twice that of what is reduced, and all
        that is permuted.
        """
        size = sum(math.prod(shape) * _BYTES[dtype] for dtype, shape in self.arrays)
        if self.kind == "collective-permute":
            return size
        if self.kind == "reduce-scatter":
            size *= self.devices  # the result is a part
        return (2 if self.kind == "all-reduce" else 1) * size * (self.devices - 1) / self.devices


def collectives(text: str) -> list[Collective]:
    """The collectives of a program, `compiled.as_text()`, in the order of the text.

    Raises:
      ValueError: a collective in a loop whose number of turns is not in the text, or whose groups
        of devices are spelled in an unknown way.
    """
    bodies = _computations(text)
    # Line -> how often it runs, by the call sites of its computation.
    times: Counter[str] = Counter()
    loops: set[str] = set()

    def walk(name: str, count: int, loop: bool) -> None:
        for line in bodies[name]:
            if _COLLECTIVE.search(line):
                times[line] += count
                loops.update([line] if loop else [])
            whole = re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line)
            if whole:
                turns = _turns(line, bodies[whole[1]])
                if turns is None and _has_collectives(bodies, whole[2]):
                    raise ValueError(f"a loop of unknown length has collectives: {line[:200]}")
                walk(whole[2], count * (turns or 1), True)
            else:
                for called in _called(line):
                    walk(called, count, loop)

    walk("ENTRY", 1, False)
    found = [_read(line, times[line], line in loops) for line in times]
    # Layouts in tiles are libtpu's.
    return _merged(found) if ":T(" in text else found


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation, by its name; the program's own is ENTRY."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = bodies.setdefault("ENTRY" if head[1] else head[2], [])
        elif line.startswith(" "):
            lines.append(line)
    return bodies


def _turns(line: str, condition: list[str]) -> int | None:
    """How often a loop runs; JAX's loops of a fixed length count from 0."""
    if noted := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line):
        return int(noted[1])
    text = "\n".join(condition)
    bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", text)
    return int(bounds[0]) if len(bounds) == 1 and "direction=LT" in text else None


def _called(line: str) -> list[str]:
    """The computations that a line runs; the end of an asynchronous call names it again."""
    if " async-done(" in line or " async-update(" in line:
        return []
    return re.findall(r"(?:calls|to_apply|body)=%?([\w.-]+)", line)


def _has_collectives(bodies: dict[str, list[str]], name: str) -> bool:
    return any(
        _COLLECTIVE.search(line)
        or any(_has_collectives(bodies, called) for called in _called(line))
        for line in bodies[name]
    )


def _merged(found: list[Collective]) -> list[Collective]:
    """Of libtpu's, one collective a channel: the part of it that runs least often is its start.

    Others number the channels of a `shard_map`'s collectives all the same.
    """
    parts: dict[str, list[Collective]] = defaultdict(list)
    for one in found:
        channel = re.search(r"channel_id=(\d+)", one.line)
        parts[channel[1] if channel else one.line].append(one)
    return [min(same, key=lambda one: one.times) for same in parts.values()]


def _read(line: str, times: int, loop: bool) -> Collective:
    match = _COLLECTIVE.search(line)
    assert match is not None
    arrays = [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
    ]
    if match[3] and match[2] in ("all-gather", "reduce-scatter", "collective-permute"):
        # The operands stand before the results, and a permutation's two tokens behind them.
        arrays = [a for a in arrays if a != ("u32", ())]
        arrays = arrays[len(arrays) // 2 :]
    return Collective(match[2], tuple(arrays), _devices(line), times, loop, line)


def _devices(line: str) -> int:
    if "source_target_pairs=" in line:
        return 2  # each sends to one other
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    order = r"(?:, device_ids=\(.*?\))?"
    if found := re.search(rf"replica_groups=mesh\[(.*?)\]{order} ?\{{(.*?)\}}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(found[1].split(","))
    raise ValueError(f"the groups of devices are not known of {line.strip()[:200]}")
