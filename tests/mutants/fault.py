"""A fault: one line of the package, and the tests that must fail with another in its place."""

from typing import NamedTuple


class Fault(NamedTuple):
    """A fault.

    Attributes:
      file: in `lora_jax/`.
      old: text that the file has exactly once.
      new: what takes its place.
      tests: the tests of the area, as arguments of pytest.
      equivalent: why no test can see it, for those that change nothing.
    """

    file: str
    old: str
    new: str
    tests: str
    equivalent: str = ""


def in_file(file: str, tests: str, *changes: tuple[str, str]) -> list[Fault]:
    """Faults of one file that the same tests notice: pairs of old and new text."""
    return [Fault(file, old, new, tests) for old, new in changes]
