"""Which dims of which leaves the axes of a mesh shard, as data; see `lora_jax.sharding`."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lora_jax.config.arguments import kind_of


@dataclasses.dataclass(frozen=True)
class LeafDims:
    """The logical dims of the leaves whose path a pattern matches.

    Attributes:
      pattern: a regular expression, searched for in the path.
      dims: names of the last dims; a dim before them is `layers`.
      order: the positions in `dims` in the order in which a mesh axis tries them.
    """

    pattern: str
    dims: tuple[str, ...]
    order: tuple[int, ...] = (0, 1)

    def __post_init__(self) -> None:
        _check_names("LeafDims", "dims", self.dims, "dims")
        try:
            re.compile(self.pattern)
        except (TypeError, re.error) as error:
            raise ValueError(
                f"`pattern` of `LeafDims` must be a regular expression for paths, got "
                f"{kind_of(self.pattern)}: {error}"
            ) from error
        if self.dims and any(d not in range(len(self.dims)) for d in self.order):
            raise ValueError(
                f"`order` of `LeafDims` must have positions in `dims` {self.dims}, 0 to "
                f"{len(self.dims) - 1}, got {self.order!r}"
            )


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axes shard which dims.

    Attributes:
      axes: a logical dim to the mesh axes that may shard it. An axis of a mesh that is named for
        no dim copies the weights, with a warning unless it is "data" or "context"; name an axis of
        the rows for a dim of its own, `"rows": ("batch",)`.
      leaves: the logical dims of every leaf; the first row that matches counts. A leaf that none
        matches is copied to every device, with a warning if it is a matrix; a row without dims
        copies in silence.
    """

    axes: Mapping[str, tuple[str, ...]]
    leaves: tuple[LeafDims, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.axes, Mapping):
            raise ValueError(
                "`axes` of `Rules` must map a logical dim to mesh axes, such as "
                f'{{"hidden": ("fsdp",)}}, got {kind_of(self.axes)}'
            )
        for dim, axes in self.axes.items():
            _check_names("Rules", f'axes["{dim}"]', axes, "mesh axes")
        wrong = [row for row in self.leaves if not isinstance(row, LeafDims)]
        if wrong:
            raise ValueError(
                f"`leaves` of `Rules` must be `LeafDims`, got {kind_of(wrong[0])} among them"
            )


def _check_names(cls: str, field: str, value: Any, what: str) -> None:
    """Checks that a field is a tuple of names: a text would be taken letter by letter."""
    if not (isinstance(value, tuple | list) and all(isinstance(x, str) for x in value)):
        raise ValueError(
            f"`{field}` of `{cls}` must be a tuple of names of {what}, such as "
            f'("fsdp",), got {kind_of(value)}'
        )
