"""Name maps: the Hugging Face names of a model of your own, as a table of a few lines.

    DECODER = name_map(
        "my decoder",
        [
            ("embed.table", "model.embed_tokens.weight"),
            ("blocks.attn.q", "model.layers.{}.self_attn.q_proj.weight", "(n h) d -> l d n h"),
            ("blocks.attn.o", "model.layers.{}.self_attn.o_proj.weight", "d (n h) -> l n h d"),
            ("blocks.norm", "model.layers.{}.input_layernorm.weight"),
            ("out", "lm_head.weight", "v d -> d v"),
        ],
    )

Left is a leaf's path here, right the tensor there; `*` is anything and `{}` a number, the same on
both sides. A `{}` on the right only numbers the layers stacked on the leaf, and `{k,v}` names them:
`self_attn.{k,v}_proj.weight` are two tensors of one leaf. The third entry is the layout of
the dimensions (`lora_jax.hf.name_maps.layout`); without it they are in the same order, after the
stacks. The fourth is a factor: the tensor there is the leaf times it. The first rule that matches a
leaf applies.

A tree in Hugging Face's terms is a flat dictionary of leaves, one for each tensor, under the paths
that `lora_jax.hf.checkpoint.names.ANY` gives them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from lora_jax.array import dense, is_lora, leaves_by_path
from lora_jax.config.arguments import check_argument
from lora_jax.hf.checkpoint import names
from lora_jax.hf.name_maps.layout import Layout, measured, parse, their_shape, to_ours, to_theirs
from lora_jax.paths import bare, nearest

# A stack in a tensor's name: `{}` numbers it, `{k,v}` names it.
_STACK = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class MapRule:
    """The name of one kind of leaf, here and there.

    Attributes:
      ours: pattern of the leaf's path.
      theirs: pattern of the tensor's name.
      layout: order of the dimensions, or "" for the same order after the stacks.
      factor: above 0; the tensor is the leaf times it.
    """

    ours: str
    theirs: str
    layout: str = ""
    factor: float = 1.0


@dataclass(frozen=True)
class NameMap:
    """All rules of one kind of model; made by `name_map`.

    Attributes:
      name: what messages call it.
      rules: in order of precedence.
      sizes: sizes that do not follow from shapes alone, as pairs.
      ignored: globs of tensors that checkpoints hold and this model does not have.
    """

    name: str
    rules: tuple[MapRule, ...]
    sizes: tuple[tuple[str, int], ...] = ()
    ignored: tuple[str, ...] = ()


class Part(NamedTuple):
    """One of Hugging Face's tensors in a leaf.

    Attributes:
      tensor: its name there.
      index: position along the leaf's stacks.
      path: its path as `lora_jax.hf.checkpoint.names.ANY` gives it.
      axes: `array under that path = tensor.transpose(axes)`; None leaves the order.
    """

    tensor: str
    index: tuple[int, ...]
    path: str
    axes: tuple[int, ...] | None


class Placed(NamedTuple):
    """A leaf in Hugging Face's terms.

    Attributes:
      layout: how its dimensions lie.
      sizes: of the names in the layout.
      parts: the tensors.
      factor: the tensors are the leaf times it.
    """

    layout: Layout
    sizes: dict[str, int]
    parts: tuple[Part, ...]
    factor: float = 1.0

    def there(self, block: Any) -> Any:
        """The tensor that a block of the leaf is."""
        return scaled(to_theirs(self.layout, block, self.sizes), self.factor)

    def here(self, tensor: Any) -> Any:
        """The block of the leaf that a tensor is."""
        return scaled(to_ours(self.layout, tensor, self.sizes), 1 / self.factor)


def name_map(
    name: str,
    rules: Sequence[tuple[str, str] | tuple[str, str, str] | tuple[str, str, str, float]],
    *,
    sizes: Mapping[str, int] | None = None,
    ignored: Sequence[str] = (),
) -> NameMap:
    """Makes a map from its table.

    Args:
      name: what messages call it.
      rules: (path here, tensor there), (path, tensor, layout) or (path, tensor, layout, factor).
      sizes: sizes of names that layouts use inside parentheses on both sides.
      ignored: globs of tensors that checkpoints hold and this model does not have, such as a
        head that only repeats the embedding.

    Raises:
      ValueError: a layout that cannot be read, a rule whose numbers do not agree, or a factor that
        is not above 0.
    """
    table: Sequence[Any] = rules
    for rule in table:
        if isinstance(table, str | Mapping) or isinstance(rule, str) or not 2 <= len(rule) <= 4:
            raise TypeError(
                f"name map `{name}`: `rules` must be a list of (path here, tensor there), with a "
                f"layout and a factor behind them or without, got {table!r}"
            )
    made = tuple(MapRule(*rule) for rule in table)
    for rule in made:
        if not (isinstance(rule.factor, int | float) and 0 < rule.factor < math.inf):
            raise ValueError(
                f"name map `{name}`, rule `{rule.ours}`: the factor is {rule.factor!r}, expected a "
                "finite number above 0"
            )
        if rule.layout:
            parse(rule.layout)
        # Each `*` and `{}` of the left is copied to the right; further `{}` number stacked layers.
        stars, numbers = rule.ours.count("*"), rule.ours.count("{}")
        if stars != rule.theirs.count("*") or numbers > rule.theirs.count("{}"):
            raise ValueError(
                f"name map `{name}`, rule `{rule.ours}`: `{rule.theirs}` must have as many `*` "
                "and at least as many `{}`"
            )
    return NameMap(name, made, tuple(sorted((sizes or {}).items())), tuple(ignored))


def place(path: str, shape: Sequence[int], using: NameMap) -> Placed:
    """Finds a leaf's tensors.

    Args:
      path: the leaf's path.
      shape: its shape, stacks included.
      using: the map.

    Raises:
      ValueError: no rule fits the path, or the rule does not fit the shape.
    """
    for rule in using.rules:
        if (found := _match(rule, bare(path))) is not None:
            try:
                placed = _place(found, shape, rule.layout, dict(using.sizes))
                return placed._replace(factor=rule.factor)
            except ValueError as error:
                raise ValueError(f"leaf `{path}`: {error}") from None
    near = nearest(bare(path), (rule.ours for rule in using.rules))
    raise ValueError(f"leaf `{path}`: name map `{using.name}` has no rule for it; nearest: {near}")


def places_of(leaves: Mapping[str, Any], using: NameMap) -> dict[str, Placed]:
    """The place of every leaf, by its path; see `place`.

    Leaves without a rule have none, unless they train: an adapter's file has no other tensors.
    """
    return {
        path: place(path, leaf.shape, using)
        for path, leaf in leaves.items()
        if is_lora(leaf) or any(_match(rule, bare(path)) is not None for rule in using.rules)
    }


def _match(rule: MapRule, path: str) -> str | None:
    """The tensor's name with `{}` left where a stack numbers it; None if the rule is another's."""
    tokens = re.split(r"(\{\}|\*)", rule.ours)
    kinds = [token for token in tokens if token in ("{}", "*")]
    pattern = "".join({"{}": r"(\d+)", "*": "(.*)"}.get(t) or re.escape(t) for t in tokens)
    found = re.fullmatch(pattern, path)
    if found is None:
        return None
    filled = rule.theirs
    for kind, text in zip(kinds, found.groups(), strict=True):
        filled = filled.replace(kind, text, 1)
    return filled


def _place(template: str, shape: Sequence[int], text: str, sizes: Mapping[str, int]) -> Placed:
    listed = _STACK.findall(template)
    layout = parse(text, sizes) if text else _same(len(listed), len(shape))
    if len(layout.stacks) != len(listed):
        raise ValueError(
            f"layout `{layout.text}` has {len(layout.stacks)} stacks, but `{template}` numbers "
            f"{len(listed)}"
        )
    known = measured(layout, shape)
    # The braces of a rule are filled in the order of the leaf's stacks.
    counts = [shape[d] for d in layout.stacks]
    words = [
        x.split(",") if x else [str(i) for i in range(n)]
        for x, n in zip(listed, counts, strict=True)
    ]
    if [len(one) for one in words] != counts:
        raise ValueError(
            f"`{template}` does not have as many names as the stacks of layout `{layout.text}` are "
            f"long, {counts}"
        )
    parts = []
    for index in product(*map(range, counts)):
        filled = iter([one[i] for one, i in zip(words, index, strict=True)])
        tensor = _STACK.sub(lambda _, filled=filled: next(filled), template)
        leaf = names.leaf_of(tensor, stacked=False)
        parts.append(Part(tensor, index, leaf.path, leaf.axes))
    return Placed(layout, known, tuple(parts))


def _same(stacks: int, ndim: int) -> Layout:
    if ndim < stacks:
        raise ValueError(f"{stacks} stacks need as many dimensions, got {ndim}")
    dims = " ".join(f"d{i}" for i in range(ndim - stacks))
    return parse(f"{dims} -> {' '.join(f's{i}' for i in range(stacks))} {dims}")


def at(index: Sequence[int], stacks: Sequence[int], ndim: int) -> tuple[Any, ...]:
    """The index of one block of an array whose stacks are any of its dimensions."""
    whole: list[Any] = [slice(None)] * ndim
    for d, i in zip(stacks, index, strict=True):
        whole[d] = i
    return tuple(whole)


def block_there(value: Any, placed: Placed, part: Part) -> Any:
    """One tensor out of a leaf, laid out as under `part.path`."""
    block = value[at(part.index, placed.layout.stacks, value.ndim)]
    tensor = placed.there(block)
    return tensor if part.axes is None else tensor.transpose(part.axes)


def block_here(array: Any, placed: Placed, part: Part) -> Any:
    """The block of a leaf that an array under `part.path` is."""
    tensor = array if part.axes is None else array.transpose(np.argsort(part.axes))
    return placed.here(tensor)


def scaled(x: Any, factor: float) -> Any:
    """An array times a factor, rounded once to its own dtype."""
    if factor == 1:
        return x
    wide = np.promote_types(x.dtype, np.float32)
    return (x.astype(wide) * wide.type(factor)).astype(x.dtype)


def shape_there(placed: Placed, part: Part) -> tuple[int, ...]:
    """The shape of the array under `part.path`."""
    shape = their_shape(placed.layout, placed.sizes)
    return shape if part.axes is None else tuple(shape[d] for d in part.axes)


def to_hugging_face(params: Any, using: NameMap) -> dict[str, np.ndarray]:
    """A model's parameters by their path in `lora_jax.hf.checkpoint.names.ANY`, an array a tensor.

    `lora_jax.models.saving.save_model(directory, model, to_hugging_face(params, MAP))` writes
    them as a Hugging Face directory; `model` gives configuration and tokenizer.

    Args:
      params: plain parameters; merge adapters first.
      using: the map.

    Raises:
      ValueError: a leaf has no rule, or two leaves are the same tensor.
    """
    check_argument("hf.to_hugging_face(params, using)", "using", using, NameMap)
    flat: dict[str, np.ndarray] = {}
    for path, leaf in leaves_by_path(params).items():
        value = np.asarray(dense(leaf))
        placed = place(path, value.shape, using)
        for part in placed.parts:
            if part.path in flat:
                raise ValueError(f"leaf `{path}`: another leaf is tensor `{part.tensor}` already")
            flat[part.path] = block_there(value, placed, part)
    return flat


# GPT-2's Conv1D is (in, out) in torch, and transformers' Flax models keep it (out, in): as for
# every other matrix the two are each other's transpose.
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
FLAX = name_map(
    "transformers' Flax models",
    [
        *((f"*.{name}.kernel", f"*.{name}.weight", "i o -> o i") for name in _CONV1D),
        ("*.kernel", "*.weight", "o i -> i o"),
        ("*.scale", "*.weight"),
        ("*.embedding", "*.weight"),
        ("*.weight", "*.weight"),
        ("*.bias", "*.bias"),
    ],
    ignored=(
        "*.attn.bias", "*.attn.masked_bias", "*.rotary_emb.inv_freq", "*position_ids",
        "lm_head.weight", "*.decoder.weight", "*.decoder.bias",
    ),
)  # fmt: skip


def recognise(leaves: Mapping[str, Any]) -> NameMap | None:
    """The name map of a Flax model of transformers 4.x, where its tree needs one.

    Two signs tell such a tree from ours: norms whose parameter is `weight` beside `kernel`s
    (Llama, Mistral, Gemma), or GPT-2's fused projection, three times as wide as its input, stored
    (out, in). Other Flax models of transformers have our names already.

    Args:
      leaves: parameters by path, with or without leaves that train.

    Returns:
      `FLAX` or None.
    """
    if any(path.endswith("norm.weight") for path in leaves):
        return FLAX if any(path.endswith(".kernel") for path in leaves) else None
    for path, leaf in leaves.items():
        if path.endswith(".attn.c_attn.kernel") and len(leaf.shape) == 2:
            return FLAX if leaf.shape[0] == 3 * leaf.shape[1] else None
    return None
