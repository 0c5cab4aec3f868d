"""Files that are written whole or not at all, and a cache of computed JSON."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the same folder, and renames that file to `path` at the end.

    A reader finds the old file or the new one, never half of one, even after a power cut. When
    the block raises, the old file stays and the temporary one is removed.

        with replacing("result.json") as new:
            new.write_text("{}")
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield new
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text as a whole file."""
    with replacing(path) as new:
        new.write_text(text, "utf-8")


def kept(path: str | os.PathLike, make: Callable[[], Any], *, indent: int | None = None) -> Any:
    """Reads the JSON at `path`, or computes it with `make` and writes it there first.

    Args:
      path: a JSON file, its name made of every setting that its values depend on. A missing
        folder is made.
      make: computes the values.
      indent: of the file, as in `json.dumps`.

    Raises:
      ValueError: the file is not JSON.
    """
    path = Path(path)
    if path.is_file():
        try:
            return json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}); remove the file, run again") from None
    text = json.dumps(make(), indent=indent)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    # Parsed again, so that this run gets what the next one reads: lists in place of tuples.
    return json.loads(text)
