"""Hugging Face's tensor names and our leaf paths, both ways, one table for each family.

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
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from lora_jax.paths import nearest, numbers_of


class Rule(NamedTuple):
    """The name of one kind of tensor, there and here.

    Attributes:
      module: glob over the module's name without its numbers; the first rule that fits decides.
      theirs: name of the parameter there; `*` is any.
      ours: name of the parameter here; `*` is the same as there.
      axes: `ours = theirs.transpose(axes)` for one block; `None` leaves the order.
    """

    module: str
    theirs: str
    ours: str
    axes: tuple[int, ...] | None = None


class Moved(NamedTuple):
    """A parameter whose names there no rule gives: another module's, or those of several tensors.

    Attributes:
      ours: the end of its path, behind the block: "mlp.experts.gate_up_proj".
      theirs: the ends of the tensors' names, which lie side by side along our last dim. A `{}` is
        the number of an expert.
    """

    ours: str
    theirs: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """The names of one family of models.

    Attributes:
      name: what messages call it.
      stacks: components of a path that are followed by a block's number there.
      rules: in order of precedence, special modules before `*`.
      ignored: globs of tensors that checkpoints hold and that are computed here.
      prefix: the start of every name but the head's, which checkpoints saved from the model
        without its head leave out.
      starts: other starts of names in some checkpoints, and what they are replaced by.
      tied: the tensor that may be left out because it repeats another, and that other one.
      moved: parameters that the rules do not name, all of them matrices that are (out, in) there.
    """

    name: str
    stacks: tuple[str, ...]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    starts: tuple[tuple[str, str], ...] = ()
    tied: tuple[str, str] | None = None
    moved: tuple[Moved, ...] = ()


class Tensor(NamedTuple):
    """A tensor in a Hugging Face checkpoint: its name, and `ours = theirs.transpose(axes)`."""

    name: str
    axes: tuple[int, ...] | None


class Leaf(NamedTuple):
    """A leaf or one block of it: path, block numbers, `ours = theirs.transpose(axes)`."""

    path: str
    index: tuple[int, ...]
    axes: tuple[int, ...] | None


_NORM = Rule("*norm", "weight", "scale")
# Gemma 4's: norms with a number, a second table, and scales of routers and layers.
_GEMMA4_RULES = (
    Rule("*norm_?", "weight", "scale"),
    Rule("*embed_tokens_per_layer", "weight", "embedding"),
    *(Rule("*router", name, name) for name in ("scale", "per_expert_scale")),
    Rule("*layers", "layer_scalar", "layer_scalar"),
)
_EMBEDDING = Rule("*embed_tokens", "weight", "embedding")
_EMBEDDING_IN = Rule("*embed_in", "weight", "embedding")
_LINEAR = Rule("*", "weight", "kernel", (1, 0))
_BIAS = Rule("*", "bias", "bias")

# Decoders with RMS norms and rotary positions: Llama, SmolLM2, Mistral, Qwen2, Qwen3, Gemma,
# Gemma 2, Gemma 3; fused projections (Phi-3's qkv_proj, gate_up_proj) and numbered experts need no
# rule of their own.
LLAMA = Family(
    name="llama",
    stacks=("layers", "experts"),
    rules=(_NORM, _EMBEDDING, _LINEAR, _BIAS),
    ignored=("*.rotary_emb.inv_freq",),
    prefix="model.",
    tied=("lm_head.weight", "model.embed_tokens.weight"),
)

# Experts lie in one leaf of a block here, gate beside up, as in transformers 5 and its adapters;
# there each is a module of its own.
EXPERTS = replace(
    LLAMA,
    name="experts",
    moved=(
        Moved(
            "mlp.experts.gate_up_proj",
            ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        ),
        Moved("mlp.experts.down_proj", ("mlp.experts.{}.down_proj.weight",)),
    ),
)
# DeepSeek-V3's and GLM-4's router has a number for each expert that decides the choice alone. The
# layers beyond the last predict further tokens, and are not loaded.
GROUPED = replace(
    EXPERTS,
    name="grouped experts",
    rules=(Rule("*mlp.gate", "e_score_correction_bias", "e_score_correction_bias"), *LLAMA.rules),
)
MIXTRAL = replace(
    LLAMA,
    name="mixtral",
    moved=(
        Moved("mlp.gate.kernel", ("block_sparse_moe.gate.weight",)),
        Moved(
            "mlp.experts.gate_up_proj",
            ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
        ),
        Moved("mlp.experts.down_proj", ("block_sparse_moe.experts.{}.w2.weight",)),
    ),
)

# Of gated delta nets; the kernel of the convolution is (taps, 1, channels) here.
_DELTA = (
    *(Rule("*linear_attn", name, name) for name in ("A_log", "dt_bias")),
    Rule("*linear_attn.conv1d", "weight", "kernel", (2, 1, 0)),
)
# The layers that predict further tokens have names of their own.
QWEN3_NEXT = replace(
    EXPERTS,
    name="qwen3_next",
    rules=(*_DELTA, *LLAMA.rules),
    ignored=(*LLAMA.ignored, "mtp.*"),
)

QWEN3_5 = replace(QWEN3_NEXT, name="qwen3_5", moved=())

# Experts are one array of a block, (E, in, out) as here.
LLAMA4 = replace(
    LLAMA,
    name="llama4",
    stacks=("layers",),
    rules=(
        *(Rule("*experts", name, name) for name in ("gate_up_proj", "down_proj")),
        *LLAMA.rules,
    ),
)
GPT_OSS = replace(
    LLAMA4,
    name="gpt_oss",
    rules=(
        *(Rule("*experts", name, name) for name in ("gate_up_proj_bias", "down_proj_bias")),
        Rule("*self_attn", "sinks", "sinks"),
        *LLAMA4.rules,
    ),
)

# Experts are one array of a block, (E, out, in) there.
GEMMA4 = replace(
    LLAMA,
    name="gemma4",
    stacks=("layers",),
    rules=(
        *(Rule("*experts", name, name, (0, 2, 1)) for name in ("gate_up_proj", "down_proj")),
        *_GEMMA4_RULES,
        *LLAMA.rules,
    ),
)

# Linear layers under the names of GPT-2's Conv1D.
_STARCODER2_RULES = tuple(
    Rule(f"*layers.mlp.{name}", "weight", "kernel", (1, 0)) for name in ("c_fc", "c_proj")
)
STARCODER2 = replace(LLAMA, name="starcoder2", rules=(*_STARCODER2_RULES, *LLAMA.rules))

# transformers 5 has the head as `lm_head`, and in files as `embed_out`.
NEOX = replace(
    LLAMA,
    name="gpt_neox",
    ignored=(*LLAMA.ignored, "*.attention.bias", "*.attention.masked_bias"),
    rules=(_NORM, _EMBEDDING_IN, _LINEAR, _BIAS),
    prefix="gpt_neox.",
    starts=(("lm_head.", "embed_out."),),
    tied=("embed_out.weight", "gpt_neox.embed_in.weight"),
    moved=(Moved("lm_head.kernel", ("embed_out.weight",)),),
)

# A decoder inside a model of images and texts, whose vision tower and projector are not loaded.
# The last start is of bare models (AutoModel); the others are those of transformers before 4.52.
WRAPPED = replace(
    LLAMA,
    name="multimodal",
    rules=(*_DELTA, *LLAMA.rules),
    ignored=(
        *LLAMA.ignored,
        *("*vision_tower.*", "*multi_modal_projector.*", "*image_newline", "*visual.*", "mtp.*"),
        *("*audio_tower.*", "*embed_vision.*", "*embed_audio.*"),
    ),
    prefix="model.language_model.",
    starts=(
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        *(
            (f"model.{part}.", f"model.language_model.{part}.")
            for part in ("embed_tokens", "layers", "norm")
        ),
        ("language_model.", "model.language_model."),
    ),
    tied=("lm_head.weight", "model.language_model.embed_tokens.weight"),
)

# Llama 4's holds the whole language model, its head included.
WITH_HEAD = replace(
    LLAMA,
    name="multimodal",
    ignored=(*LLAMA.ignored, "vision_model.*", "multi_modal_projector.*"),
    prefix="language_model.model.",
    tied=("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
)

_GPT2_RULES = (
    Rule("*ln_?", "weight", "scale"),
    Rule("*wte", "weight", "embedding"),
    Rule("*wpe", "weight", "embedding"),
    *(Rule(f"*.{name}", "weight", "kernel") for name in ("c_attn", "c_proj", "c_fc")),
)

# Conv1D weights are (in, out) there too; the causal mask is a tensor in old checkpoints.
GPT2 = Family(
    name="gpt2",
    stacks=("h",),
    rules=(*_GPT2_RULES, _LINEAR, _BIAS),
    ignored=("*.attn.bias", "*.attn.masked_bias"),
    prefix="transformer.",
    tied=("lm_head.weight", "transformer.wte.weight"),
)

# Encoders with numbered `layer`s, BERT and RoBERTa, or `layers`, ModernBERT.
_BERT_RULES = (
    Rule("*LayerNorm", "weight", "scale"),
    Rule("*_embeddings", "weight", "embedding"),
)

# The norm of RoBERTa's masked-LM head is called `layer_norm`.
BERT = Family(
    name="bert",
    stacks=("layer", "layers"),
    rules=(*_BERT_RULES, _NORM, _LINEAR, _BIAS),
)

ANY = Family(
    name="known",
    stacks=("layers", "experts", "h", "layer"),
    rules=(
        *_DELTA,
        _NORM,
        _EMBEDDING,
        _EMBEDDING_IN,
        *_GEMMA4_RULES,
        *_STARCODER2_RULES,
        *_GPT2_RULES,
        *_BERT_RULES,
        _LINEAR,
        _BIAS,
        Rule("*", "weight", "embedding"),  # of a module of the user's own
    ),
    ignored=LLAMA.ignored,
)


def within(own: Family, whole: Family) -> Family:
    """The names of a decoder inside a model of images and texts."""
    return replace(whole, stacks=own.stacks, rules=own.rules, moved=own.moved)


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
    """A name of a checkpoint's router as transformers 5 and PEFT have it."""
    return name.replace(".block_sparse_moe.gate.", ".mlp.gate.")


def tensors_of(path: str, index: Sequence[int] = (), *, family: Family) -> tuple[Tensor, ...]:
    """The Hugging Face tensors of a leaf, or of one block (one expert) of a stacked leaf.

    As `tensor_of`; several lie side by side along the last dim of ours.
    """
    for ours, theirs in family.moved:
        if f".{path}".endswith(f".{ours}"):
            own = len(index) - ("{}" in theirs[0])  # the last number is the expert's
            block, expert = path.removesuffix(ours), index[own:]
            ends = (end.format(*expert) for end in theirs)
            return tuple(
                Tensor(module_name(f"{block}{end}", index[:own], family=family), (1, 0))
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
        if i and parts[i - 1] in family.stacks and numbers_of(part):
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
    return parts[i] in family.stacks and i + 1 < len(parts) and not parts[i + 1].isdigit()


def without_numbers(module: str, family: Family) -> tuple[str, tuple[int, ...]]:
    """The name of a module or tensor without the numbers of its blocks, and those."""
    parts = module.split(".")
    plain, index = parts[:1], []
    for before, part in zip(parts, parts[1:], strict=False):
        if before in family.stacks and part.isdigit():
            index.append(int(part))
        elif not (before in family.stacks and numbers_of(part)):
            plain.append(part)
    return ".".join(plain), tuple(index)
