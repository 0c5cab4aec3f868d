"""Hugging Face's tensor names and our leaf paths, both ways, by the tables of `name_tables`.

Our trees keep Hugging Face's *module* names, so a name differs in three things only: the name of
the parameter (`kernel` for a `Linear`'s `weight`), the order of its dimensions (`(in, out)` for
`(out, in)`), and the numbers of stacked blocks, which our paths leave out:

    model.layers.3.self_attn.q_proj.weight  (out, in)    theirs
    model.layers.self_attn.q_proj.kernel    (L, in, out) ours, index (3,)

A path may carry its numbers itself (`model.layers.3...`, an unstacked tree): then its index is
empty. With two stacks (layers of experts) the index has two numbers, in the path's order. Of layers
of several kinds a path says which it stacks: in `model.layers.3:61.mlp...` index 0 is layer 3.

Reading or writing a whole model (`weights.fill`, `save_model`) uses the table of its architecture
(`lora_jax.models.registry`). Every function here defaults to `ANY`, the union of the known tables.
They do not contradict each other: a component `h` or `layer` stacks blocks in one family and does
not occur in the others, and only GPT-2 has modules called `c_attn`, `c_proj` and `c_fc`, whose
weights (Conv1D) are (in, out) already. A model of your own with other names needs its own `Family`,
or a name map (`lora_jax.hf.name_maps`).
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from lora_jax.hf.checkpoint.name_tables import ANY as ANY
from lora_jax.hf.checkpoint.name_tables import APERTUS as APERTUS
from lora_jax.hf.checkpoint.name_tables import BERT as BERT
from lora_jax.hf.checkpoint.name_tables import ERNIE_MOE as ERNIE_MOE
from lora_jax.hf.checkpoint.name_tables import EXAONE_MOE as EXAONE_MOE
from lora_jax.hf.checkpoint.name_tables import EXPERTS as EXPERTS
from lora_jax.hf.checkpoint.name_tables import GEMMA4 as GEMMA4
from lora_jax.hf.checkpoint.name_tables import GPT2 as GPT2
from lora_jax.hf.checkpoint.name_tables import GPT_OSS as GPT_OSS
from lora_jax.hf.checkpoint.name_tables import GRANITE as GRANITE
from lora_jax.hf.checkpoint.name_tables import GRANITE_MOE_SWA as GRANITE_MOE_SWA
from lora_jax.hf.checkpoint.name_tables import GROUPED as GROUPED
from lora_jax.hf.checkpoint.name_tables import HYPERCLOVAX as HYPERCLOVAX
from lora_jax.hf.checkpoint.name_tables import LLAMA as LLAMA
from lora_jax.hf.checkpoint.name_tables import LLAMA4 as LLAMA4
from lora_jax.hf.checkpoint.name_tables import MELLUM as MELLUM
from lora_jax.hf.checkpoint.name_tables import MIXTRAL as MIXTRAL
from lora_jax.hf.checkpoint.name_tables import NEOX as NEOX
from lora_jax.hf.checkpoint.name_tables import QWEN3_5 as QWEN3_5
from lora_jax.hf.checkpoint.name_tables import QWEN3_NEXT as QWEN3_NEXT
from lora_jax.hf.checkpoint.name_tables import STABLELM as STABLELM
from lora_jax.hf.checkpoint.name_tables import STARCODER2 as STARCODER2
from lora_jax.hf.checkpoint.name_tables import T5 as T5
from lora_jax.hf.checkpoint.name_tables import VIT as VIT
from lora_jax.hf.checkpoint.name_tables import WITH_HEAD as WITH_HEAD
from lora_jax.hf.checkpoint.name_tables import WRAPPED as WRAPPED
from lora_jax.hf.checkpoint.name_tables import Family as Family
from lora_jax.hf.checkpoint.name_tables import Moved as Moved
from lora_jax.hf.checkpoint.name_tables import Rule as Rule
from lora_jax.hf.checkpoint.name_tables import as_held as as_held
from lora_jax.hf.checkpoint.name_tables import within as within
from lora_jax.paths import nearest, numbers_of


class Tensor(NamedTuple):
    """A tensor in a Hugging Face checkpoint: its name, and `ours = theirs.transpose(axes)`."""

    name: str
    axes: tuple[int, ...] | None


class Leaf(NamedTuple):
    """A leaf or one block of it: path, block numbers, `ours = theirs.transpose(axes)`."""

    path: str
    index: tuple[int, ...]
    axes: tuple[int, ...] | None


def tensor_of(path: str, index: Sequence[int] = (), *, family: Family = ANY) -> Tensor:
    """The Hugging Face tensor of a leaf, or of one block of a stacked leaf.

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
    plain = without_numbers(module, family)[0]
    for rule in family.rules:
        if rule.ours in (parameter, "*") and fnmatchcase(plain, rule.module):
            theirs = parameter if rule.theirs == "*" else rule.theirs
            return Tensor(_join(module_name(module, index, family=family), theirs), rule.axes)
    known = ", ".join(dict.fromkeys(f"`{r.ours}`" for r in family.rules))
    raise ValueError(
        f"leaf `{path}`: the {family.name} names have no parameter `{parameter}` there, but "
        f"{known}: a name map says what it is (`name_map`)"
    )


def renamed(name: str) -> str:
    """A name of a checkpoint's router, or of ViT's blocks, as transformers 5 and PEFT have it."""
    plain, index = without_numbers(name, VIT)
    for ours, (theirs, *_), _ in VIT.moved:
        if plain.endswith(theirs):
            return module_name(plain.removesuffix(theirs) + ours, index)
    return name.replace(".block_sparse_moe.gate.", ".mlp.gate.")


def tensors_of(path: str, index: Sequence[int] = (), *, family: Family) -> tuple[Tensor, ...]:
    """The Hugging Face tensors of a leaf, or of one block (one expert) of a stacked leaf.

    As `tensor_of`; several lie side by side along the last dim of ours.
    """
    for ours, theirs, axes in family.moved:
        plain, numbers = without_numbers(path, family) if "layers." in ours else (path, ())
        if f".{plain}".endswith(f".{ours}"):
            index = (*numbers, *index)
            own = len(index) - ("{}" in theirs[0])  # the last number is the expert's
            block, expert = plain.removesuffix(ours), index[own:]
            ends = (end.format(*expert) for end in theirs)
            return tuple(
                Tensor(module_name(f"{block}{end}", index[:own], family=family), axes)
                for end in ends
            )
    return (tensor_of(path, index, family=family),)


def leaf_of(name: str, *, family: Family = ANY, stacked: bool = True) -> Leaf:
    """The leaf of a Hugging Face tensor: the inverse of `tensor_of`.

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
    plain, index = without_numbers(module, family)
    for rule in family.rules:
        if rule.theirs in (parameter, "*") and fnmatchcase(plain, rule.module):
            ours = parameter if rule.ours == "*" else rule.ours
            path = _join(plain if stacked else module, ours)
            return Leaf(path, index if stacked else (), rule.axes)
    raise ValueError(
        f"tensor `{name}`: the {family.name} names have no parameter `{parameter}`; "
        f"nearest: {nearest(parameter, (r.theirs for r in family.rules))}"
    )


def unified(names: Iterable[str], family: Family) -> dict[str, str]:
    """Our spelling of each tensor's name -> the checkpoint's.

    Checkpoints of a family differ in how names start: by the class they were saved from, and by the
    release of transformers.
    """
    there = {_start(name, family): name for name in names}
    if not family.prefix or any(name.startswith(family.prefix) for name in there):
        return there
    # Saved from the bare decoder (`AutoModel`): no name has the prefix; the head never has it.
    head = family.tied and family.tied[0]
    return {n if n == head else f"{family.prefix}{n}": old for n, old in there.items()}


def copies(names: Iterable[str], family: Family) -> list[tuple[str, str]]:
    """The tensors of a checkpoint that are one here, in pairs."""
    first: dict[str, str] = {}
    pairs = ((first.setdefault(_start(name, family), name), name) for name in names)
    return [(one, other) for one, other in pairs if one != other]


def _start(name: str, family: Family) -> str:
    for theirs, ours in family.starts:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def module_name(module: str, index: Sequence[int] = (), *, family: Family = ANY) -> str:
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
    wanted = sum(_is_open_stack(parts, i, family) for i in range(len(parts)))
    # A layer itself, which may have parameters beside its modules.
    is_layer = parts[-1] in family.stacks and len(index) == wanted + 1
    for i, part in enumerate(parts):
        if i and numbers_of(part):
            continue  # the number of one of its layers is there
        out.append(part)
        if numbers and _is_open_stack(parts, i, family):
            number, named = numbers.pop(0), numbers_of(parts[i + 1])
            out.append(str(named[number] if named else number))
    if is_layer:
        out.append(str(numbers.pop()))
    elif len(index) != wanted:
        raise ValueError(
            f"module `{module}`: its blocks are numbered by {wanted} number(s), "
            f"got index {tuple(index)}"
        )
    return ".".join(out)


def stack_depth(path: str, *, family: Family = ANY) -> int:
    """How many stack axes a leaf at `path` starts with: numbers that its path leaves out."""
    parts = path.split(".")
    return sum(_is_open_stack(parts, i, family) for i in range(len(parts)))


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _is_open_stack(parts: Sequence[str], i: int, family: Family) -> bool:
    """Whether a block number belongs after `parts[i]` and is not there."""
    if i + 1 == len(parts):
        return False
    # A component such as `3:61` tells a stack of any name.
    stacks = parts[i] in family.stacks or numbers_of(parts[i + 1]) is not None
    return stacks and not parts[i + 1].isdigit()


def without_numbers(module: str, family: Family) -> tuple[str, tuple[int, ...]]:
    """The name of a module or tensor without the numbers of its blocks, and those."""
    parts = module.split(".")
    plain, index = parts[:1], []
    for before, part in zip(parts, parts[1:], strict=False):
        if before in family.stacks and part.isdigit():
            index.append(int(part))
        elif not numbers_of(part):
            plain.append(part)
    return ".".join(plain), tuple(index)
