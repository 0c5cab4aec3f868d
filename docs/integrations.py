"""Writes the table of programs into docs/integrations/index.md, from the figures they recorded.

python docs/integrations.py
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "integrations"
PAGE = FOLDER / "index.md"
START, END = "<!-- table -->\n", "<!-- end of the table -->\n"
# The figure that a row shows: the largest of these, where a program has several.
DIFFERENCE = "difference"


def main() -> None:
    """Writes the table."""
    before, rest = PAGE.read_text("utf-8").split(START)
    after = rest.split(END)[1]
    PAGE.write_text(before + START + table() + END + after, "utf-8")


def table() -> str:
    """One row a program: its lines, the versions, the largest difference."""
    rows = [("program", "with", "lines", "largest difference"), ("---",) * 4]
    for path in sorted((FOLDER / "figures").glob("*.json")):
        record = json.loads(path.read_text("utf-8"))
        versions = ", ".join(
            f"{name} {version}"
            for name, version in sorted(record["versions"].items())
            if name != "lora-jax"
        )
        differences = [x for name, x in record["figures"].items() if DIFFERENCE in name]
        largest = f"{max(differences):.0e}" if differences else ""
        rows.append((f"`{path.stem}.py`", versions, str(record["lines"]), largest))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    main()
