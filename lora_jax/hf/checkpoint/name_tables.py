"""Hugging Face's names of parameters as data: a table of rules for each family of models."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple


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
      axes: `ours = theirs.transpose(axes)` for one block or expert; `None` leaves the order.
    """

    ours: str
    theirs: tuple[str, ...]
    axes: tuple[int, ...] | None = (1, 0)


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
      moved: parameters that the rules do not name; kernels and experts are (out, in) there.
    """

    name: str
    stacks: tuple[str, ...]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    starts: tuple[tuple[str, str], ...] = ()
    tied: tuple[str, str] | None = None
    moved: tuple[Moved, ...] = ()


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
# K-EXAONE has that number beside the router, and the further layers by another name.
EXAONE_MOE = replace(
    GROUPED,
    name="exaone_moe",
    moved=(
        *GROUPED.moved,
        Moved("mlp.gate.e_score_correction_bias", ("mlp.e_score_correction_bias",), None),
    ),
    ignored=(*GROUPED.ignored, "mtp.*"),
)
ERNIE_MOE = replace(
    EXPERTS,
    name="ernie4_5_moe",
    moved=(
        *EXPERTS.moved,
        Moved(
            "mlp.gate.e_score_correction_bias", ("mlp.moe_statics.e_score_correction_bias",), None
        ),
    ),
    ignored=(*EXPERTS.ignored, "model.mtp_*"),
)
MELLUM = replace(EXPERTS, name="mellum", ignored=(*EXPERTS.ignored, "mtp.*"))
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

# Experts are one array of a block, (E, out, in) there.
_FUSED = tuple(Rule("*experts", name, name, (0, 2, 1)) for name in ("gate_up_proj", "down_proj"))

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
_SINKS = Rule("*self_attn", "sinks", "sinks")
GPT_OSS = replace(
    LLAMA4,
    name="gpt_oss",
    rules=(
        *(Rule("*experts", name, name) for name in ("gate_up_proj_bias", "down_proj_bias")),
        _SINKS,
        *LLAMA4.rules,
    ),
)

GEMMA4 = replace(
    LLAMA,
    name="gemma4",
    stacks=("layers",),
    rules=(*_FUSED, *_GEMMA4_RULES, *LLAMA.rules),
)

# Linear layers under the names of GPT-2's Conv1D.
_STARCODER2_RULES = tuple(
    Rule(f"*layers.mlp.{name}", "weight", "kernel", (1, 0)) for name in ("c_fc", "c_proj")
)
STARCODER2 = replace(LLAMA, name="starcoder2", rules=(*_STARCODER2_RULES, *LLAMA.rules))

_POST_NORM = Rule("*post_norm?", "weight", "scale")
HYPERCLOVAX = replace(LLAMA, name="hyperclovax", rules=(_POST_NORM, *LLAMA.rules))

_XIELU = tuple(Rule("*act_fn", name, name) for name in ("alpha_p", "alpha_n", "beta", "eps"))
APERTUS = replace(LLAMA, name="apertus", rules=(*_XIELU, *LLAMA.rules))

_INPUT, _OUTPUT = (f"block_sparse_moe.{name}_linear.weight" for name in ("input", "output"))
GRANITE = replace(
    LLAMA,
    name="granite",
    stacks=("layers",),
    rules=(_SINKS, *LLAMA.rules),
    moved=(
        Moved("block_sparse_moe.router.kernel", ("block_sparse_moe.router.layer.weight",)),
        Moved("block_sparse_moe.experts.gate_up_proj", (_INPUT,), (0, 2, 1)),
        Moved("block_sparse_moe.experts.down_proj", (_OUTPUT,), (0, 2, 1)),
    ),
)
# Its files have the names of transformers' modules.
GRANITE_MOE_SWA = replace(GRANITE, rules=(*_FUSED, *GRANITE.rules), moved=())

# The norms of queries and keys are numbered, one for each head.
_HEAD_NORMS = Rule("*layernorm.norms", "weight", "scale")
STABLELM = replace(
    LLAMA, name="stablelm", stacks=("layers", "norms"), rules=(_HEAD_NORMS, *LLAMA.rules)
)

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
    # DeBERTa's, (taps, in, out) here.
    Rule("*encoder.conv.conv", "weight", "kernel", (2, 1, 0)),
)

# The norm of RoBERTa's masked-LM head is called `layer_norm`.
BERT = Family(
    name="bert",
    stacks=("layer", "layers"),
    rules=(*_BERT_RULES, _NORM, _LINEAR, _BIAS),
)

# transformers 5 has other modules in its classes, and the old ones in files; the kernel of the
# patches is (height, width, in, out) here.
_VIT_RULES = (
    Rule("*layernorm_before", "weight", "scale"),
    Rule("*layernorm_after", "weight", "scale"),
    *(Rule("*embeddings", name, name) for name in ("cls_token", "position_embeddings")),
    Rule("*patch_embeddings.projection", "weight", "kernel", (2, 3, 1, 0)),
)
_VIT_LAYERS = {
    **{f"attention.{x[0]}_proj": f"attention.attention.{x}" for x in ("query", "key", "value")},
    "attention.o_proj": "attention.output.dense",
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
VIT = Family(
    name="vit",
    stacks=("layers", "layer"),
    rules=(*_VIT_RULES, _NORM, _LINEAR, _BIAS),
    moved=tuple(
        Moved(
            f"layers.{ours}.{parameter}",
            (f"encoder.layer.{theirs}.{there}",),
            (1, 0) if parameter == "kernel" else None,
        )
        for ours, theirs in _VIT_LAYERS.items()
        for parameter, there in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias"))
        if (parameter == "kernel") == ("norm" not in ours) or parameter == "bias"
    ),
)

# Encoder, decoder and, unless it is tied, the head have one table in common.
T5 = Family(
    name="t5",
    stacks=("block",),
    rules=(
        _NORM,
        *(
            Rule(f"*{name}", "weight", "embedding")
            for name in ("shared", "relative_attention_bias")
        ),
        _LINEAR,
    ),
    # Of old checkpoints; the attention to the encoder's text has no distances.
    ignored=("*.EncDecAttention.relative_attention_bias.weight",),
    starts=(("encoder.embed_tokens.", "shared."), ("decoder.embed_tokens.", "shared.")),
    tied=("lm_head.weight", "shared.weight"),
)

ANY = Family(
    name="known",
    stacks=("layers", "experts", "h", "layer"),
    rules=(
        *_DELTA,
        *_XIELU,
        _NORM,
        _POST_NORM,
        _HEAD_NORMS,
        _EMBEDDING,
        _EMBEDDING_IN,
        *_GEMMA4_RULES,
        *_STARCODER2_RULES,
        *_GPT2_RULES,
        *_BERT_RULES,
        *_VIT_RULES,
        _LINEAR,
        _BIAS,
        Rule("*", "weight", "embedding"),  # of a module of the user's own
    ),
    ignored=LLAMA.ignored,
)


def within(own: Family, whole: Family) -> Family:
    """The names of a decoder inside a model of images and texts."""
    return replace(whole, stacks=own.stacks, rules=own.rules, moved=own.moved)


# Each expert's modules have names of their own there.
_APART = (
    Moved("experts.gate_up_proj", ("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight")),
    Moved("experts.down_proj", ("experts.{}.down_proj.weight",)),
)


def as_held(family: Family, names: Iterable[str]) -> Family:
    """The names in a checkpoint of these tensors, in which experts may lie otherwise.

    Qwen3.5-MoE's own files have the experts of a block in one array, where transformers writes each
    of them; and quantized files of Llama 4 each of them, where transformers has one array.
    """
    names = list(names)
    rest = tuple(each for each in family.moved if "{}" not in each.theirs[0])
    if rest != family.moved:
        if not any(name.endswith(".experts.gate_up_proj") for name in names):
            return family
        stacks = tuple(stack for stack in family.stacks if stack != "experts")
        return replace(family, stacks=stacks, rules=(*_FUSED, *family.rules), moved=rest)
    if not any(".experts.0.gate_proj." in name for name in names):
        return family
    return replace(family, stacks=(*family.stacks, "experts"), moved=(*rest, *_APART))
