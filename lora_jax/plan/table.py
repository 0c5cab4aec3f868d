"""The plan as a table: every leaf adapted, trained whole, or frozen, and why."""

from collections.abc import Sequence

from lora_jax.plan.decide import LeafPlan, Plan

_HEADER = ("leaf", "shape", "dtype", "kind", "roles", "rank", "alpha", "parameters", "uses / why")


def table(plan: Plan) -> str:
    """Formats a plan, one row a leaf, would-be fallbacks marked, with a total."""
    rows = [_HEADER, *(_row(leaf) for leaf in plan.leaves)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER) - 1)]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "-" * max(len(line) for line in lines[:1]))
    adapted = len(plan.adapted)
    lines.append(
        f"{adapted} of {len(plan.leaves)} leaves adapted, {_whole(plan)}; "
        f"{plan.trainable:,} trainable parameters"
    )
    return "\n".join(line.rstrip() for line in lines)


def _whole(plan: Plan) -> str:
    """How many leaves train whole, and how many in some rows."""
    rows = sum(leaf.kind == "rows" for leaf in plan.saved)
    return f"{len(plan.saved) - rows} trained whole" + (f", {rows} in some rows" if rows else "")


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
    some = sorted({v for v in values})
    if not some:
        return ""
    return f"{some[0]:g}" if len(some) == 1 else f"{some[0]:g}-{some[-1]:g}"


def _uses(leaf: LeafPlan) -> str:
    if leaf.kind != "lora":
        return leaf.reason
    parts = list(dict.fromkeys(f"{u.primitive} {u.line}" for u in leaf.uses if not u.fallback))
    if len(parts) > 3:
        parts = [*parts[:3], f"{len(parts) - 3} more"]
    parts += dict.fromkeys(f"MATERIALIZED for {u.fallback} at {u.line}" for u in leaf.fallbacks)
    if leaf.reason:
        parts.append(leaf.reason)
    return "; ".join(parts)
