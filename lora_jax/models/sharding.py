"""How the weights of the library's models are spread over a mesh: the rules, and the mesh.

    data     rows of the batch; every weight is copied
    fsdp     rows of the batch, and one dim of every matrix and table: each device keeps a part of
             weights, adapters, gradients and optimizer state, and gathers a layer to use it
    tensor   heads, the hidden units of the MLP, and the vocabulary of Llama's family and T5
             (GPT-2's 50,257 rows are divided by no axis, encoders have no head over theirs)
    expert   rows of the batch, and the experts of a mixture, see `lora_jax.models.experts`; every
             other weight is copied
    context  the tokens of a row, see `lora_jax.models.context`; every weight is copied

    q, k, v, gate, up, head  (in, out)        P("fsdp", "tensor")
    o, down                  (in, out)        P(("tensor", "fsdp"), None), or by outputs where the
                                              blocks of a quantized one leave inputs whole
    table                    (vocabulary, d)  P("tensor", "fsdp")
    experts                  (E, in, out)     P(("expert", "fsdp"), None, "tensor"), and the inner
                                              size of down by "tensor"
    norms, biases                             copied (biases of the first row: P("tensor"), of
                                              experts: P("expert"))

Adapters follow the weights they belong to, see `lora_jax.partition_specs`.

Sources: Rajbhandari et al. 2020, "ZeRO", section 5; Shoeybi et al. 2019, "Megatron-LM", section 3.
"""

import math
import numbers
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from lora_jax.config.arguments import kind_of
from lora_jax.sharding import AXES, LeafDims, Rules

EXPERTS = "expert"  # the axis that the experts of a mixture are spread over, and rows
ROWS = ("data", "fsdp", EXPERTS)  # the axes that the rows of a batch are spread over
TOKENS = "context"  # the axis that the tokens of a row are spread over

# Of all families: those of decoders and T5, then those of BERT's kin.
_T5 = r"(Self|EncDec)Attention\."
_QKV = (
    f"q_proj|k_proj|v_proj|qkv_proj|query_key_value|in_proj_(qkvz?|z|ba?|a)|{_T5}[qkv]|c_attn|q_b_proj|kv_b_proj"
    r"|self\.(query|key|value)|(pos_)?(query|key)_proj|value_proj|[qkv]_lin|Wqkv"
)
_OUT = (
    rf"o_proj|self_attn\.dense|attention\.dense|linear_attn\.out_proj|{_T5}o|attn\.c_proj"
    r"|attention\.output\.dense|out_lin|attn\.Wo"
)
_UP = (
    r"gate_proj|up_proj|gate_up_proj|fc1|dense_h_to_4h|c_fc|wi(_[01])?"
    r"|intermediate\.dense|lin1|Wi"
)
_DOWN = r"down_proj|fc2|dense_4h_to_h|mlp\.c_proj|wo|output\.dense|lin2|mlp\.Wo"


def _named(modules: str, parameter: str) -> str:
    return rf"(^|\.)({modules})\.{parameter}$"


# Matrices prefer their inputs for `fsdp`: to gather outputs takes a transposed copy of every layer.
# Of experts that is the first dim too: their inputs would be copied, those of all layers at once.
# The tables' rows are looked up, so their features come first.
RULES = Rules(
    axes={
        "vocabulary": ("tensor", "fsdp"),
        "heads": ("tensor", "fsdp"),
        "mlp": ("tensor", "fsdp"),
        "hidden": ("fsdp",),
        "outputs": ("tensor", "fsdp"),
        "other": ("fsdp",),
        "layers": (),
        "experts": (EXPERTS, "fsdp"),
        # Of activations, which no leaf has.
        "tokens": (TOKENS,),
    },
    leaves=(
        LeafDims(
            _named("embed_tokens|embed_in|shared", "embedding"), ("vocabulary", "hidden"), (1, 0)
        ),
        LeafDims(_named(_QKV, "kernel"), ("hidden", "heads")),
        LeafDims(_named(_UP, "kernel"), ("hidden", "mlp")),
        LeafDims(r"(^|\.)experts\.gate_up_proj$", ("experts", "hidden", "mlp"), (0, 1, 2)),
        LeafDims(r"(^|\.)experts\.down_proj$", ("experts", "mlp", "hidden"), (0, 1, 2)),
        LeafDims(r"(^|\.)experts\.(gate_up|down)_proj_bias$", ("experts", "bias")),
        LeafDims(r"(^|\.)lm_head\.kernel$", ("hidden", "vocabulary")),
        LeafDims(_named(_OUT, "kernel"), ("heads", "outputs")),
        LeafDims(_named(_DOWN, "kernel"), ("mlp", "outputs")),
        LeafDims(_named(_QKV, "bias"), ("heads",), (0,)),
        LeafDims(_named(_UP, "bias"), ("mlp",), (0,)),
        LeafDims(r"(^|\.)lm_head\.bias$", ("vocabulary",), (0,)),
        LeafDims(_named("relative_attention_bias", "embedding"), ()),
        LeafDims(r"(^|\.)embedding$", ("other", "hidden"), (1, 0)),
        LeafDims(_named("conv1d", "kernel"), ()),
        LeafDims(r"(^|\.)kernel$", ("other", "other")),
        # Norms and other biases, layers stacked or not: copied.
        LeafDims(
            r"(^|\.)(scale|bias|sinks|e_score_correction_bias|dt_bias|A_log|per_expert_scale"
            r"|layer_scalar|alpha_[pn]|beta|eps|cls_token|position_embeddings)$",
            (),
        ),
    ),
)


def make_mesh(*, devices: Sequence[jax.Device] | None = None, **axes: int) -> Mesh:
    """A mesh over the devices, with automatic axes of the names that `RULES` has.

    Args:
      devices: all of them by default, those of other processes included.
      axes: number of devices along `data`, `fsdp`, `tensor`, `expert` and `context`; -1, once, is
        what the others leave.

    Returns:
      The mesh, for `models.load(source, mesh=mesh)` and `lora_jax.sharding.place`.

    Raises:
      TypeError: `devices` are none.
      ValueError: an unknown axis, or numbers that do not multiply up to the devices.

    Example:
      >>> import lora_jax as lora
      >>> dict(lora.models.make_mesh(fsdp=-1).shape)["fsdp"] >= 1
      True
    """
    given = jax.devices() if devices is None else devices
    found = [] if isinstance(given, int) else list(given)
    if not found or not all(isinstance(each, jax.Device) for each in found):
        raise TypeError(
            f"`devices` must be devices, such as `jax.devices()[:4]`, got {kind_of(devices)}: "
            "their number along an axis is that axis' argument, `fsdp=-1` for all of them"
        )
    sizes = mesh_sizes(axes, len(found))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=found,
    )


def check_rules(mesh: Mesh | None, rules: Rules) -> None:
    """Refuses rules of one's own without a mesh, where they would have no effect.

    Raises:
      ValueError: so it is.
    """
    if mesh is None and rules != RULES:
        raise ValueError(
            "`rules` spread weights over a mesh, and `mesh` is None: give one, "
            "`lora.models.make_mesh(fsdp=-1)`, or leave `rules` out"
        )


def check_axes(axes: Mapping[str, int], *, rest: bool) -> None:
    """Checks the names and sizes of a mesh's axes.

    Args:
      axes: axis to number of devices.
      rest: whether a size may be -1, for the devices that the others leave.

    Raises:
      TypeError: no dict.
      ValueError: an unknown axis, or a size that is not a whole number above 0.
    """
    if not isinstance(axes, Mapping):
        raise TypeError(
            f"`mesh` must be the number of devices by axis, {{'fsdp': 8}}, got {kind_of(axes)}"
        )
    for name, size in axes.items():
        if name not in AXES:
            raise ValueError(f"`mesh` has no axis {name!r}; expected {', '.join(AXES)}")
        whole = isinstance(size, numbers.Integral) and not isinstance(size, bool)
        if not (whole and (size > 0 or (rest and size == -1))):
            raise ValueError(
                f'`mesh` axis "{name}" must be a whole number above 0'
                f"{', or -1 for the rest' if rest else ''}, got {size!r}"
            )


def check_length(name: str, length: int, devices: int) -> None:
    """Checks that the tokens of a row can be spread over so many devices.

    Args:
      name: the argument that the length comes from.
      length: tokens of a row.
      devices: the number of devices along `TOKENS`.

    Raises:
      ValueError: they do not divide it.
    """
    if length % devices:
        raise ValueError(
            f"`{name}` has rows of {length} tokens, which the {devices} devices of the mesh axis "
            f'"{TOKENS}" do not divide: take a multiple of {devices}'
        )


def mesh_sizes(axes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The sizes of a mesh's axes, with -1 replaced by the number of devices that are left.

    Raises:
      ValueError: an unknown axis, or numbers that do not multiply up to the devices.
    """
    check_axes(axes, rest=True)
    spelled = " ".join(f"{a}={n}" for a, n in axes.items())
    given = math.prod(n for n in axes.values() if n != -1)
    rest = [a for a, n in axes.items() if n == -1]
    if len(rest) > 1 or (rest and devices % given) or (not rest and given != devices):
        raise ValueError(
            f"`mesh` is {spelled or 'empty'}, but the number of devices is {devices}: the sizes "
            "must multiply up to it; one of them may be -1"
        )
    return {a: devices // given if n == -1 else n for a, n in axes.items()}
