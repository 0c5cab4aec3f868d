"""What the config.json of DeBERTa-v2 and v3 has beside BERT's fields."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_jax.models.heads import MASKED_LM, Head, Task, of_words
from lora_jax.models.layers import ACTIVATIONS
from lora_jax.models.ranges import COUNT, check_range

_SPLIT = "|"  # between the words of a field
# Fields without effect here.
_CARRIED = ("cls_dropout", "mask_token_id", "padding_idx", "pooler_dropout", "sep_token_id")
KNOWN = (
    *_CARRIED, "attention_head_size", "conv_act", "conv_groups", "conv_kernel_size", "legacy",
    "max_relative_positions",
    "norm_rel_ebd", "pooler_hidden_act", "pooler_hidden_size", "pos_att_type",
    "position_biased_input", "position_buckets", "relative_attention", "share_att_key", "z_steps",
)  # fmt: skip
_PARTS = ("c2p", "p2c")


class Deberta(NamedTuple):
    """How DeBERTa's attention and heads differ from BERT's.

    Attributes:
      parts: which products with the table of distances are added to the scores: "c2p" (queries
        with it), "p2c" (keys with it).
      distances: the farthest distance in the table; it has a row for each from `-distances` to
        `distances - 1`, the nearest is used beyond. 0 without a table.
      buckets: rows on either side, where distances beyond half of them share rows by their
        logarithm; 0 gives each distance its own.
      normed: there is a norm, of the table.
      shared: the table has the projections of queries and keys, not projections of its own.
      placed: embeddings have a table of positions too.
      pooler_act: activation of the classifier's first layer.
      legacy: the masked-LM head has BERT's names.
      taps: tokens that the convolution beside the first block reads; 0 without one.
      groups: of its channels.
      conv_act: its activation.
    """

    parts: tuple[str, ...] = ()
    distances: int = 0
    buckets: int = 0
    normed: bool = False
    shared: bool = False
    placed: bool = True
    pooler_act: str = "gelu"
    legacy: bool = True
    taps: int = 0
    groups: int = 1
    conv_act: str = "tanh"

    @property
    def span(self) -> int:
        """Rows of the table on either side of distance 0."""
        return self.buckets or self.distances


def read_deberta(raw: Mapping[str, Any]) -> Deberta:
    """Reads the object in config.json.

    Raises:
      ValueError: a field whose value changes results and is not supported.
    """
    width = raw["hidden_size"]
    for name, only in (
        ("attention_head_size", width // raw["num_attention_heads"]),
        ("pooler_hidden_size", width),
        ("z_steps", 0),
    ):
        if raw.get(name) not in (None, only):
            raise ValueError(
                f"config: `{name}` {raw[name]} is not supported for `deberta-v2`; supported: {only}"
            )
    norms = set(_words(raw.get("norm_rel_ebd") or "none"))
    parts = tuple(sorted(_words(raw.get("pos_att_type") or "")))
    act = raw.get("pooler_hidden_act") or "gelu"
    taps, groups, conv_act = _convolution(raw)
    for name, got, known in (
        ("norm_rel_ebd", norms, ("none", "layer_norm")),
        ("pos_att_type", {*parts}, _PARTS),
        ("pooler_hidden_act", {act}, ACTIVATIONS),
        ("conv_act", {conv_act}, ACTIVATIONS),
    ):
        if not got <= {*known}:
            raise ValueError(f"config: `{name}` must be of {', '.join(known)}, got {raw[name]!r}")
    # Parts and the norm are there without a table too, where the parts count in the scale.
    plain = Deberta(
        parts,
        normed="layer_norm" in norms,
        placed=raw.get("position_biased_input") is not False,
        pooler_act=act,
        legacy=raw.get("legacy") is not False,
        taps=taps,
        groups=groups,
        conv_act=conv_act,
    )
    if not raw.get("relative_attention"):
        return plain
    most = raw.get("max_relative_positions") or -1
    return plain._replace(
        distances=_at_least_one("max_relative_positions", most) or raw["max_position_embeddings"],
        buckets=_at_least_one("position_buckets", raw.get("position_buckets") or -1),
        shared=bool(raw.get("share_att_key")),
    )


def _convolution(raw: Mapping[str, Any]) -> tuple[int, int, str]:
    """Taps, groups and activation of the convolution, with transformers' defaults."""
    taps = _at_least_one("conv_kernel_size", raw.get("conv_kernel_size") or 0)
    groups = raw.get("conv_groups") or 1
    if not taps:
        return 0, 1, "tanh"
    check_range("conv_groups", groups, COUNT)
    # torch pads an even number of taps to one token less, which no class of transformers takes.
    for name, wrong, want in (
        ("conv_kernel_size", not taps % 2, "odd"),
        ("conv_groups", raw["hidden_size"] % groups, "a divisor of `hidden_size`"),
    ):
        if wrong:
            raise ValueError(f"config: `{name}` must be {want}, got {raw[name]}")
    return taps, groups, raw.get("conv_act") or "tanh"


def _words(value: Any) -> list[str]:
    words = value.lower().split(_SPLIT) if isinstance(value, str) else value
    return [word.strip() for word in words if word.strip()]


def _at_least_one(name: str, value: Any) -> int:
    """The value, or 0 for one below 1, which means none."""
    if type(value) is int and value < 1:
        return 0
    check_range(name, value, COUNT)
    return value


def write_deberta(own: Deberta) -> dict[str, Any]:
    """The reverse of `read_deberta`."""
    return {
        "legacy": own.legacy,
        "max_relative_positions": own.distances or -1,
        "norm_rel_ebd": "layer_norm" if own.normed else "none",
        "pooler_hidden_act": own.pooler_act,
        "pos_att_type": [*own.parts],
        "position_biased_input": own.placed,
        "position_buckets": own.buckets or -1,
        "relative_attention": own.distances > 0,
        "share_att_key": own.shared,
        **({"conv_kernel_size": own.taps, "conv_groups": own.groups, "conv_act": own.conv_act}
           if own.taps else {}),
    }  # fmt: skip


def head_of(own: Deberta, task: Task, head: Head) -> Head:
    """A task's head: the classifier's activation, and the masked-LM head that is not BERT's."""
    if task == MASKED_LM:
        return head if own.legacy else of_words("lm_predictions.lm_head")
    return head._replace(act=own.pooler_act)
