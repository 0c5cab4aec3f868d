"""gemma (Google DeepMind): a checkpoint, as released, trained; the adapter in transformers."""

import tempfile
from dataclasses import replace

import jax
from in_transformers import compared, logits_there, trained
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import lora_jax as lora

from gemma.gm import ckpts, nn  # isort: skip  (torch's triton crashes behind gemma's TensorFlow)

KINDS = (nn.AttentionType.LOCAL_SLIDING, nn.AttentionType.GLOBAL)
SIZES = dict(num_embed=64, embed_dim=32, hidden_dim=48, num_heads=4, num_kv_heads=2, head_dim=8)
SIZES |= dict(sliding_window_size=4, attention_types=KINDS)
MODEL = nn.Gemma3_270M(dtype="float32", config=replace(nn.Gemma3_270M.config, **SIZES))
SAME = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, head_dim=8)
SAME |= dict(query_pre_attn_scalar=8, num_key_value_heads=2, num_hidden_layers=2, sliding_window=4)
THEIRS = Gemma3TextConfig(**SAME, layer_types=["sliding_attention", "full_attention"])
RULES = """embedder.input_embedding : embed_tokens
layer_{}.attn.q_einsum.w : layers.{}.self_attn.q_proj : (n h) d -> n d h
layer_{}.attn.kv_einsum.w : layers.{}.self_attn.{k,v}_proj : (n h) d -> c n d h
layer_{}.attn.attn_vec_einsum.w : layers.{}.self_attn.o_proj : d (n h) -> n h d
layer_{}.attn._query_norm.scale : layers.{}.self_attn.q_norm
layer_{}.attn._key_norm.scale : layers.{}.self_attn.k_norm
layer_{}.mlp.gating_einsum : layers.{}.mlp.{gate,up}_proj : o i -> c o i
layer_{}.mlp.linear : layers.{}.mlp.down_proj : o i -> i o
layer_{}.pre_attention_norm.scale : layers.{}.input_layernorm
layer_{}.*_ffw_norm.scale : layers.{}.*_feedforward_layernorm
layer_{}.*_norm.scale : layers.{}.*_layernorm
final_norm.scale : norm"""
RULES = [rule.split(" : ") for rule in RULES.splitlines()]
MAP = lora.hf.name_map("gemma", [(a, f"model.{b}.weight", *x) for a, b, *x in RULES])
TOKENS = jax.numpy.arange(24).reshape(2, 12) % 7 + 1
CONFIG = lora.LoraConfig(rank=4, roles={"kv_einsum.w": "soio", "gating_einsum": "soi"})


def logits(params, tokens):
    return MODEL.apply({"params": params}, tokens).logits


def main():
    params, key = MODEL.init(jax.random.key(0), TOKENS)["params"], jax.random.key(1)
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape), params)
    with tempfile.TemporaryDirectory() as folder:
        released = ckpts._checkpoint._nested_to_flat(params)
        ckpts.save_params(released, f"{folder}/a", wait_until_finished=True)
        params = ckpts.load_params(f"{folder}/a")
        tree = lora.init(key, lora.plan(CONFIG, logits, params, TOKENS), params)
        tree, losses = trained(logits, tree, TOKENS)
        ckpts.save_params(lora.merge(tree), f"{folder}/b", wait_until_finished=True)
        merged = logits(ckpts.load_params(f"{folder}/b"), TOKENS)
    there = logits_there(Gemma3ForCausalLM, THEIRS, params, tree, CONFIG, MAP, TOKENS)
    here = logits(params, TOKENS), lora.lorafy(logits)(tree, TOKENS)
    return compared(here, there) | {"losses": losses, "merged": float(abs(merged - here[1]).max())}


if __name__ == "__main__":
    print(main())
