"""Reports on adapters: the columns of the table of changes."""

import pytest

from lora_jax.recipes.inspect_adapter import _short


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["m.layers.attn.c_attn", "m.layers.attn.c_proj", "m.layers.mlp.c_proj"],
         ["c_attn", "attn.c_proj", "mlp.c_proj"]),
        (["encoder.block.layer.0.SelfAttention.k", "decoder.block.layer.0.SelfAttention.k",
          "decoder.block.layer.1.EncDecAttention.k", "encoder.block.layer.1.DenseReluDense.wi",
          "decoder.block.layer.2.DenseReluDense.wi"],
         ["encoder.k", "decoder.SelfAttention.k", "EncDecAttention.k", "encoder.wi", "decoder.wi"]),
        (["bert.encoder.layer.attention.output.dense", "bert.encoder.layer.intermediate.dense",
          "bert.encoder.layer.output.dense"],
         ["attention.output.dense", "intermediate.dense", "layer.output.dense"]),
        (["a", "b.a"], ["a", "b.a"]),
    ],
)  # fmt: skip
def test_modules_of_one_last_name_are_told_apart(names, short):
    assert [_short(names)[name] for name in names] == short
