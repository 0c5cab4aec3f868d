"""MaxText: a scanned decoder with Llama 3.1's rotary scaling, trained, and in PEFT."""

import jax
import numpy as np
from flax import nnx
from in_transformers import compared, logits_there, trained
from maxtext.configs import pyconfig
from maxtext.utils.model_creation_utils import from_config
from transformers import LlamaConfig, LlamaForCausalLM

import lora_jax as lora

SIZES = dict(base_emb_dim=32, base_num_query_heads=4, base_num_kv_heads=2, base_mlp_dim=48)
SIZES |= dict(base_num_decoder_layers=2, head_dim=8, vocab_size=64, max_target_length=12)
SIZES |= dict(dtype="float32", attention="dot_product", hardware="cpu", run_name="lora")
SIZES |= dict(enable_checkpointing=False, skip_jax_distributed_system=True, rope_type="llama3.1")
MODEL = from_config(pyconfig.initialize(**SIZES), rngs=nnx.Rngs(params=0, dropout=1))
THEIRS = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
THEIRS |= dict(intermediate_size=48, num_hidden_layers=2, vocab_size=64, rms_norm_eps=1e-5)
ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
THEIRS |= dict(rope_parameters=ROPE | dict(rope_theta=1e4, original_max_position_embeddings=8192))
RULES = """self_attention.query.kernel : self_attn.q_proj : (n p h) d -> d l n (h p)
self_attention.key.kernel : self_attn.k_proj : (n p h) d -> d l n (h p)
self_attention.value.kernel : self_attn.v_proj : (n h) d -> d l n h
self_attention.out.kernel : self_attn.o_proj : d (n h) -> n l h d
mlp.wi_0.kernel : mlp.gate_proj : o i -> i l o
mlp.wi_1.kernel : mlp.up_proj : o i -> i l o
mlp.wo.kernel : mlp.down_proj : o i -> i l o
pre_self_attention_layer_norm.scale : input_layernorm : d -> d l
post_self_attention_layer_norm.scale : post_attention_layernorm : d -> d l"""
RULES = [line.split(" : ") for line in RULES.splitlines()]
RULES = [(f"decoder.layers.{a}", f"model.layers.{{}}.{b}.weight", c) for a, b, c in RULES]
RULES[0] += (8**0.5,)  # Llama divides scores by it, MaxText the query's kernel
RULES += [("token_embedder.embedding", "model.embed_tokens.weight")]
RULES += [("decoder.decoder_norm.scale", "model.norm.weight")]
RULES += [("decoder.logits_dense.kernel", "lm_head.weight", "v d -> d v")]
MAP = lora.hf.name_map("MaxText's Llama", RULES, sizes={"p": 2})
TOKENS, AT = np.arange(24).reshape(2, 12) % 7 + 1, np.tile(np.arange(12), (2, 1))
CONFIG = lora.LoraConfig(rank=4, target_modules="all-linear")
FN, PARAMS, _ = lora.nnx.functional(MODEL)


def logits(params, tokens):
    return FN(params, tokens, AT[:, : tokens.shape[1]], enable_dropout=False)


def main():
    key = jax.random.key(1)
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape), PARAMS)
    tree = lora.init(key, lora.plan(CONFIG, logits, params, TOKENS), params)
    tree, losses = trained(logits, tree, TOKENS)
    theirs = LlamaForCausalLM, LlamaConfig(**THEIRS)
    there = logits_there(*theirs, params, tree, CONFIG, MAP, TOKENS)
    here = logits(params, TOKENS), lora.lorafy(logits)(tree, TOKENS)
    return compared(here, there) | {"losses": losses}


if __name__ == "__main__":
    print(main())
