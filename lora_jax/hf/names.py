"""Hugging Face's tensor names and our leaf paths, both ways, one table for each family.

Our trees keep Hugging Face's *module* names, so a name differs in three things only: the name of
the parameter (`kernel` for a `Linear`'s `weight`), the order of its dimensions (`(in, out)` for
`(out, in)`), and the numbers of stacked blocks, which our paths leave out:

    model.layers.3.self_attn.q_proj.weight  (out, in)    theirs
    model.layers.self_attn.q_proj.kernel    (L, in, out) ours, index (3,)

A path may carry its numbers itself (`model.layers.3...`, an unstacked tree): then its index is
empty. With two stacks (layers of experts) the index has two numbers, in the path's order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from lora_jax.paths import nearest


class Rule(NamedTuple):
    """How one sort of tensor is called there and here.

    Attributes:
      module: glob over the module's name without its numbers; the first rule that fits decides.
      theirs: name of the parameter there.
      ours: name of the parameter here.
      axes: `ours = theirs.transpose(axes)` for one block; `None` leaves the order.
    """

    module: str
    theirs: str
    ours: str
    axes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Family:
    """The names of one family of models.

    Attributes:
      name: what messages call it.
      stacks: components of a path that are followed by a block's number there.
      rules: in order of precedence, special modules before `*`.
      ignored: globs of tensors that checkpoints carry and that are computed here.
    """

    name: str
    stacks: tuple[str, ...]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()


class Tensor(NamedTuple):
    """A tensor in a Hugging Face checkpoint: its name, and `ours = theirs.transpose(axes)`."""

    name: str
    axes: tuple[int, ...] | None


class Leaf(NamedTuple):
    """A leaf or one block of it: path, block numbers, `ours = theirs.transpose(axes)`."""

    path: str
    index: tuple[int, ...]
    axes: tuple[int, ...] | None


# Decoders with separate projections: Llama, SmolLM2, Mistral, Qwen2, Qwen3; fused projections
# (Phi-3's qkv_proj, gate_up_proj) and numbered experts need no rule of their own.
LLAMA = Family(
    name="llama",
    stacks=("layers", "experts"),
    rules=(
        Rule("*norm", "weight", "scale"),
        Rule("*embed_tokens", "weight", "embedding"),
        Rule("*", "weight", "kernel", (1, 0)),
        Rule("*", "bias", "bias"),
    ),
    ignored=("*.rotary_emb.inv_freq",),
)

FAMILIES = {LLAMA.name: LLAMA}


def tensor_of(path: str, index: Sequence[int] = (), *, family: Family = LLAMA) -> Tensor:
    """Names the Hugging Face tensor that a leaf, or one block of a stacked leaf, corresponds to.

    Args:
      path: dotted path of the leaf.
      index: the block's numbers, one for each stack that the path leaves out.
      family: the table of names.

    Returns:
      The tensor's name, and the order of its dimensions against one block of ours.

    Raises:
      ValueError: no rule knows the path, or the index has too few or too many numbers.

    Example:
      >>> tensor_of("model.layers.self_attn.q_proj.kernel", (3,))
      Tensor(name='model.layers.3.self_attn.q_proj.weight', axes=(1, 0))
    """
    module, _, parameter = path.rpartition(".")
    plain = _without_numbers(module, family)[0]
    for rule in family.rules:
        if rule.ours == parameter and fnmatchcase(plain, rule.module):
            return Tensor(f"{module_name(module, index, family=family)}.{rule.theirs}", rule.axes)
    known = ", ".join(dict.fromkeys(f"`{r.ours}`" for r in family.rules))
    raise ValueError(
        f"leaf `{path}`: the {family.name} names know no parameter `{parameter}` there; "
        f"its parameters end in {known}"
    )


def leaf_of(name: str, *, family: Family = LLAMA, stacked: bool = True) -> Leaf:
    """Finds the leaf that a Hugging Face tensor corresponds to: the inverse of `tensor_of`.

    Args:
      name: the tensor's name, for example `model.layers.3.self_attn.q_proj.weight`.
      family: the table of names.
      stacked: take the blocks' numbers out of the path and into the index.

    Returns:
      Path, index (empty if not `stacked`), and `axes` with `ours = theirs.transpose(axes)`.

    Raises:
      ValueError: no rule knows the tensor.
    """
    module, _, parameter = name.rpartition(".")
    plain, index = _without_numbers(module, family)
    for rule in family.rules:
        if rule.theirs == parameter and fnmatchcase(plain, rule.module):
            path = f"{plain if stacked else module}.{rule.ours}"
            return Leaf(path, index if stacked else (), rule.axes)
    raise ValueError(
        f"tensor `{name}`: the {family.name} names know no parameter `{parameter}`; "
        f"nearest: {nearest(parameter, (r.theirs for r in family.rules))}"
    )


def module_name(module: str, index: Sequence[int] = (), *, family: Family = LLAMA) -> str:
    """Writes a module's block numbers where Hugging Face writes them.

    Args:
      module: dotted path of a module, `model.layers.mlp.up_proj`.
      index: one number for each stack that the path leaves out.

    Returns:
      For index `(3,)`: `model.layers.3.mlp.up_proj`.

    Raises:
      ValueError: the index has too few or too many numbers for the path.
    """
    parts, numbers, out = module.split("."), list(index), []
    for i, part in enumerate(parts):
        out.append(part)
        if _is_open_stack(parts, i, family):
            out.append(str(numbers.pop(0)) if numbers else "")
    if numbers or "" in out:
        wanted = sum(_is_open_stack(parts, i, family) for i in range(len(parts)))
        raise ValueError(
            f"module `{module}`: its blocks are numbered by {wanted} number(s), "
            f"got index {tuple(index)}"
        )
    return ".".join(out)


def stack_depth(path: str, *, family: Family = LLAMA) -> int:
    """How many stack axes a leaf at `path` starts with: numbers that its path leaves out."""
    parts = path.split(".")
    return sum(_is_open_stack(parts, i, family) for i in range(len(parts)))


def _is_open_stack(parts: Sequence[str], i: int, family: Family) -> bool:
    """Whether a block number belongs after `parts[i]` and is not there."""
    return parts[i] in family.stacks and i + 1 < len(parts) and not parts[i + 1].isdigit()


def _without_numbers(module: str, family: Family) -> tuple[str, tuple[int, ...]]:
    parts = module.split(".")
    plain, index = parts[:1], []
    for before, part in zip(parts, parts[1:], strict=False):
        if before in family.stacks and part.isdigit():
            index.append(int(part))
        else:
            plain.append(part)
    return ".".join(plain), tuple(index)
