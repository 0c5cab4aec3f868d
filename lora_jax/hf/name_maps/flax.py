"""The parameter trees of transformers 4.x's Flax models, which transformers 5 no longer has.

    params["transformer"]["h"]["0"]["attn"]["c_attn"]["kernel"]          (out, in): FlaxConv1D
    params["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]      (in, out)
    params["model"]["layers"]["0"]["input_layernorm"]["weight"]
    params["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"]

Their modules are named as in PyTorch, so that one table serves all whose weights are matrices:
GPT-2, Llama, Mistral, Gemma, BERT, RoBERTa, XLM-RoBERTa, and others that keep to the pattern.

Source: transformers 4.56, `modeling_flax_pytorch_utils.py` and `modeling_flax_*.py`.
"""

from typing import Any

from lora_jax.hf.name_maps.rules import NameMap, name_map
from lora_jax.hf.peft.modules import leaves_of

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


def recognise(params: Any) -> NameMap | None:
    """The map of a tree that is a Flax model's of transformers 4.x, where it needs one.

    Such a tree is told by what no tree of ours has: norms whose parameter is `weight` beside
    `kernel`s (Llama, Mistral, Gemma), or a fused projection of GPT-2's that gives three times
    what it takes, stored (out, in). The others have our own names already.

    Args:
      params: parameters, with or without leaves that train.

    Returns:
      `FLAX` or None.
    """
    leaves = leaves_of(params)
    if any(path.endswith("norm.weight") for path in leaves):
        return FLAX if any(path.endswith(".kernel") for path in leaves) else None
    for path, leaf in leaves.items():
        if path.endswith(".attn.c_attn.kernel") and len(leaf.shape) == 2:
            return FLAX if leaf.shape[0] == 3 * leaf.shape[1] else None
    return None
