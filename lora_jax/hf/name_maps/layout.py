"""How the dimensions of our array follow from those of Hugging Face's tensor, in einops' notation.

    "(n h) d -> d n h"            heads split off, and the order turned
    "(n p h) d -> d (n h p)"      and each head's rotary planes reordered from halves to pairs

Left is Hugging Face's tensor, right ours. A name is a dimension; a group in parentheses is one
dimension made of several, the last the fastest. A name on the right only is a stack: each index of
ours is a tensor there.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Layout:
    """A parsed layout.

    Attributes:
      text: as it was written.
      theirs: names of each of their dimensions.
      ours: names of each of our dimensions.
      sizes: sizes that do not follow from shapes alone, as pairs.
    """

    text: str
    theirs: Groups
    ours: Groups
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def stacks(self) -> tuple[int, ...]:
        """Our dimensions that are stacks."""
        inside = {name for group in self.theirs for name in group}
        return tuple(d for d, group in enumerate(self.ours) if not set(group) & inside)

    @property
    def block(self) -> Groups:
        """Our dimensions without the stacks."""
        return tuple(group for d, group in enumerate(self.ours) if d not in self.stacks)


def parse(text: str, sizes: Mapping[str, int] | None = None) -> Layout:
    """Reads a layout.

    Raises:
      ValueError: it has no arrow, a name occurs twice, or one on the left is missing on the right.
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise ValueError(f"layout `{text}`: expected `theirs -> ours`, got no arrow")
    theirs, ours = _groups(left, text), _groups(right, text)
    known = [name for group in ours for name in group]
    for name in (name for group in theirs for name in group):
        if name not in known:
            raise ValueError(f"layout `{text}`: `{name}` occurs on the left only")
    # One table of sizes serves all rules of a map; each layout keeps those of its own names.
    used = {k: v for k, v in (sizes or {}).items() if k in known}
    layout = Layout(text, theirs, ours, tuple(sorted(used.items())))
    stacked = {name for d in layout.stacks for name in ours[d]}
    if any(len(ours[d]) != 1 for d in layout.stacks) or len(stacked) != len(known) - sum(
        map(len, theirs)
    ):
        raise ValueError(f"layout `{text}`: a stack must be a dimension of its own")
    return layout


def _groups(side: str, text: str) -> Groups:
    # Any other character becomes a token of its own, which the check below then names.
    tokens = re.findall(r"\([^()]*\)|[A-Za-z]\w*|\S", side)
    groups = tuple(tuple(token.strip("()").split()) for token in tokens)
    names = [name for group in groups for name in group]
    for name in names:
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ValueError(f"layout `{text}`: `{name}` is not the name of a dimension")
        if names.count(name) > 1:
            raise ValueError(f"layout `{text}`: `{name}` occurs twice on one side")
    return groups


def measured(layout: Layout, shape: Sequence[int]) -> dict[str, int]:
    """The size of every name, from the shape of our whole array.

    Raises:
      ValueError: the shape does not fit, or leaves a size open.
    """
    if len(shape) != len(layout.ours):
        raise ValueError(
            f"layout `{layout.text}` has {len(layout.ours)} dimensions on the right, got shape "
            f"{tuple(shape)}"
        )
    known = dict(layout.sizes)
    for size, group in zip(shape, layout.ours, strict=True):
        # Of a group one size follows from the dimension and the others.
        open_names = [name for name in group if name not in known]
        rest = math.prod(known[name] for name in group if name in known)
        if len(open_names) > 1:
            raise ValueError(
                f"layout `{layout.text}`: the sizes of {', '.join(f'`{n}`' for n in open_names)} "
                "are not known; give all but one of them in `sizes`"
            )
        if size % rest or (not open_names and size != rest):
            raise ValueError(
                f"layout `{layout.text}`: {dict(layout.sizes)} does not fit shape {tuple(shape)}"
            )
        known |= {name: size // rest for name in open_names}
    return known


def their_shape(layout: Layout, known: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of Hugging Face's tensor."""
    return tuple(math.prod(known[name] for name in group) for group in layout.theirs)


def to_theirs(layout: Layout, block: Any, known: Mapping[str, int]) -> Any:
    """One block of ours, without its stacks, as Hugging Face's tensor.

    Args:
      layout: the layout.
      block: an array, NumPy's or JAX's.
      known: sizes, from `measured`.
    """
    source, target = _flat(layout.block), _flat(layout.theirs)
    apart = block.reshape([known[name] for name in source])
    turned = apart.transpose([source.index(name) for name in target])
    return turned.reshape(their_shape(layout, known))


def to_ours(layout: Layout, tensor: Any, known: Mapping[str, int]) -> Any:
    """Hugging Face's tensor as one block of ours: the inverse of `to_theirs`."""
    source, target = _flat(layout.theirs), _flat(layout.block)
    apart = tensor.reshape([known[name] for name in source])
    turned = apart.transpose([source.index(name) for name in target])
    return turned.reshape([math.prod(known[name] for name in group) for group in layout.block])


def part_to_ours(
    layout: Layout,
    read: Callable[[tuple[slice, ...]], np.ndarray],
    known: Mapping[str, int],
    part: Sequence[slice],
) -> np.ndarray:
    """A part of one block of ours, for which no more of their tensor is read than it spans.

    Args:
      layout: the layout.
      read: reads a part of Hugging Face's tensor.
      known: sizes, from `measured`.
      part: a slice of each dimension of the block.
    """
    ranges: dict[str, range] = {}
    cut = []
    for group, wanted in zip(layout.block, part, strict=True):
        # Of a dimension made of several, the first is cut and the others are whole.
        inner = math.prod(known[name] for name in group[1:])
        first, last = wanted.start // inner, -(-wanted.stop // inner)
        ranges |= {name: range(known[name]) for name in group[1:]}
        ranges |= {name: range(first, last) for name in group[:1]}
        cut.append(slice(wanted.start - first * inner, wanted.stop - first * inner))
    # Where the wanted numbers stand along each of their dimensions.
    places = [_places(group, ranges, known) for group in layout.theirs]
    spans = [(int(x.min()), int(x.max()) + 1) for x in places]
    found = read(tuple(slice(*span) for span in spans))
    apart = [x - start for x, (start, _) in zip(places, spans, strict=True)]
    found = found[np.ix_(*apart)] if found.ndim else found
    return to_ours(layout, found, {n: len(r) for n, r in ranges.items()})[tuple(cut)]


def _places(
    group: tuple[str, ...], ranges: Mapping[str, range], known: Mapping[str, int]
) -> np.ndarray:
    places = np.zeros(1, np.int64)
    for name in group:
        places = (places[:, None] * known[name] + np.asarray(ranges[name])).reshape(-1)
    return places


def order(layout: Layout, dims: Sequence[int], known: Mapping[str, int]) -> np.ndarray:
    """Where the elements of some of our dimensions, flattened, stand in theirs.

    Args:
      layout: the layout.
      dims: dimensions of our whole array: the in dims, or the out dims, of a weight.
      known: sizes, from `measured`.

    Returns:
      `o` with `ours_flat = theirs_flat[o]`, for a vector over those dimensions.

    Raises:
      ValueError: Hugging Face's tensor mixes them with others in one dimension.
    """
    here = [name for d in dims for name in layout.ours[d]]
    # A is permuted by inputs and B by outputs alone, so no dimension there may mix them.
    for group in layout.theirs:
        if set(group) & set(here) and set(group) - set(here):
            raise ValueError(
                f"layout `{layout.text}`: their dimension ({' '.join(group)}) holds inputs and "
                "outputs of the weight; an adapter of it cannot be split into A and B"
            )
    there = [name for name in _flat(layout.theirs) if name in here]
    numbers = np.arange(math.prod(known[name] for name in there), dtype=np.int64)
    # Numbering their elements and permuting the numbers as the weight is permuted gives the order.
    apart = numbers.reshape([known[name] for name in there])
    return apart.transpose([there.index(name) for name in here]).reshape(-1)


def _flat(groups: Groups) -> list[str]:
    return [name for group in groups for name in group]
