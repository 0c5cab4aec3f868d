"""The configuration of Llama-like decoders, from and to Hugging Face's config.json.

A field that could change results is never ignored: an unknown one is an error unless its value is
the neutral one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_jax.models.classifier import renamed_decoder, write_classes
from lora_jax.models.delta_rule import DeltaSizes
from lora_jax.models.dialect import (
    BEFORE,
    Kind,
    Modules,
    Norms,
    Routing,
    scalar_if_one,
    unknown_type,
)
from lora_jax.models.families import DIALECTS
from lora_jax.models.heads import LANGUAGE
from lora_jax.models.layers import ACTIVATIONS, XIELU
from lora_jax.models.mixing import Mixing
from lora_jax.models.ranges import RANGES, check_fields, check_object, check_range, check_rotation
from lora_jax.models.reading import PLAIN, read_fields, with_plain_windows
from lora_jax.models.rope import RopeScaling, scaling_to_hf


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A Llama-like decoder; fields have Hugging Face's names where these exist.

    Attributes:
      model_type: the family, a key of `lora_jax.models.families.DIALECTS`.
      vocab_size: rows of the embedding table.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP.
      gated_mlp: the MLP is `W_down (act(W_gate x) * W_up x)`, else `W_down act(W_up x)`.
      num_experts: parts of an MLP that is a mixture of experts, see `lora_jax.models.experts`; None
        is one dense MLP.
      num_experts_per_tok: experts that a token uses.
      moe_intermediate_size: width of an expert; None is `intermediate_size`.
      dense_layers: for each block whether it has one dense MLP beside others with experts; None is
        none of them.
      routing: how experts are chosen in groups; None is by a softmax over all of them.
      shared_expert_size: width of an MLP that every token uses beside its experts, or None.
      shared_gate: what that MLP adds is multiplied by a sigmoid of each token.
      norm_topk_prob: the weights of a token's experts add up to 1.
      expert_inputs_scaled: what goes into an expert is multiplied by the sigmoid of its logit, in
        place of what comes out by a weight.
      expert_bias: the router and the experts have biases.
      swiglu_limit: c, where experts compute `g sigmoid(swiglu_alpha g) (u + 1)`, with the gate g at
        most c, u in `[-c, c]`, and their numbers in turns; None is the MLP's activation.
      swiglu_alpha: the factor there.
      router_aux_loss_coef: weight of the load-balancing loss, for whoever adds it.
      num_hidden_layers: blocks.
      predicting_layers: further ones in the files, which predict tokens beyond the next and are not
        loaded.
      num_attention_heads: query heads.
      num_key_value_heads: key and value heads; each serves as many query heads.
      head_dim: size of one head.
      global_head_dim, num_global_key_value_heads: those in blocks that do not slide; None are the
        same, of `num_global_key_value_heads` also where `global_head_dim` is set.
      k_eq_v: in blocks that do not slide, values are the keys before norm and rotation.
      v_norm: values are normalized head by head, without a scale.
      num_kv_shared_layers: last blocks, which attend to the keys and values of the last one before
        them that slides as they do.
      wide_shared_mlp: the MLPs of those blocks are twice as wide.
      per_layer_size: size of a vector that each block has for each token and multiplies into what
        it adds last, see `lora_jax.models.beside`; None is none.
      per_layer_vocab: rows of the table of those vectors.
      layer_scalar: what a block returns is multiplied by a number of its own, which does not train.
      experts_beside: experts lie beside the MLP of every block, see `lora_jax.models.beside`.
      kv_lora_rank: size of the vector of a token that its keys and values are made of, see
        `lora_jax.models.latent`; None is a projection each.
      q_lora_rank: size of the one for the queries, or None.
      qk_rope_head_dim, v_head_dim: with `kv_lora_rank`, the dims of a head that are rotated, and
        those of its values.
      max_position_embeddings: the context, in tokens.
      rms_norm_eps: added to the mean square before the root.
      rope_theta: base wavelength of the rotary embedding.
      rope_scaling: how the rotary embedding reaches beyond its trained context, or None.
      rope_local_base_freq: base wavelength in blocks that slide, without scaling; None is the same
        embedding in all blocks.
      partial_rotary_factor: the part of each head that is rotated.
      rope_interleaved: the two numbers that are rotated together lie side by side.
      rope_layers: for each block whether it rotates queries and keys; None is all of them. With
        windows, those with one rotate.
      tie_word_embeddings: the output head is the embedding table.
      qkv_bias, o_bias, mlp_bias, head_bias: which projections have a bias.
      qk_norm: queries and keys are normalized head by head.
      qk_norm_whole: with `qk_norm`, all heads of a token are normalized together.
      qk_norm_by_head: with `qk_norm`, each head has a scale of its own.
      attention_gate: what a head mixes is multiplied by a sigmoid of numbers that the projection of
        queries has beside its own.
      qk_norm_plain: queries and keys are normalized head by head, without a scale, in blocks that
        rotate them.
      floor_scale: in blocks that do not rotate, queries grow with every so many tokens of a text,
        by `1 + attn_scale log(1 + floor((p + 1) / floor_scale))` at position p; None is never.
      attn_scale: the factor there.
      floor_everywhere: queries grow in all blocks, by `floor(p / floor_scale)`.
      attention_sinks: each head has a score of its own in the softmax, of no key.
      clip_qkv: queries, keys and values are limited to `[-clip_qkv, clip_qkv]`, or None.
      fused_projections: queries, keys and values are one projection.
      qkv_by_head: with `fused_projections`, those of each head lie side by side.
      fused_mlp: gate and up are one projection.
      sliding_window: tokens that a token attends to, itself included, or None for all before it.
      sliding_layers: for each block whether it slides; None is all of them, if there is a window.
      linear_layers: for each block whether it has a gated delta net in place of attention, see
        `lora_jax.models.delta_net`; None is none of them.
      delta: the sizes of those nets, or None.
      chunked: windows do not slide: a text is cut into pieces of `sliding_window` tokens, and a
        token attends to those before it in its piece.
      hidden_activation: a key of `lora_jax.models.layers.ACTIVATIONS`, or Apertus' "xielu".
      norm_offset: norms multiply by `1 + scale`.
      norm_centered: norms subtract the mean first.
      norm_bias: norms that are centered add a bias.
      norm_plain: norms that are centered have no parameters.
      norm_wide: norms multiply in float32 and round once, which shows in 16 bits.
      parallel_mlp: the MLP reads what the attention reads, each with its norm or both with the one
        before the attention, and both are added at once.
      norms: the names of a block's norms: before and after attention and MLP.
      modules: the names of other modules.
      scale_embeddings: embeddings are multiplied by the root of the width.
      embedding_multiplier: factor of the embeddings.
      residual_multiplier: factor of what attention and MLP add to the residual stream.
      logits_scaling: divides the logits.
      attention_multiplier: factor of the products of queries and keys, in place of the root.
      query_pre_attn_scalar: queries are divided by its root; None is the size of a head.
      attn_logit_softcapping, final_logit_softcapping: c in `c tanh(logits / c)`, or None.
      bos_token_id, pad_token_id: or None.
      eos_token_ids: the tokens that end a text.
      initializer_range: standard deviation of fresh weights.
      wrapper: model type of the vision-language model that holds this decoder, or None; the
        parameters then have that model's names.
      task: what the head is for, a key of `lora_jax.models.heads.DECODER_HEADS`, or "causal-lm".
      labels: the classes of such a head; () is a language model.
      problem_type: Hugging Face's name of the classifier's loss, or None.
    """

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    gated_mlp: bool = True
    num_experts: int | None = None
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    dense_layers: tuple[bool, ...] | None = None
    routing: Routing | None = None
    shared_expert_size: int | None = None
    shared_gate: bool = False
    norm_topk_prob: bool = True
    expert_inputs_scaled: bool = False
    expert_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    router_aux_loss_coef: float = 0.0
    num_hidden_layers: int
    predicting_layers: int = 0
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    global_head_dim: int | None = None
    num_global_key_value_heads: int | None = None
    k_eq_v: bool = False
    v_norm: bool = False
    num_kv_shared_layers: int = 0
    wide_shared_mlp: bool = False
    per_layer_size: int | None = None
    per_layer_vocab: int = 0
    layer_scalar: bool = False
    experts_beside: bool = False
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_local_base_freq: float | None = None
    partial_rotary_factor: float = 1.0
    rope_interleaved: bool = False
    rope_layers: tuple[bool, ...] | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    qk_norm_by_head: bool = False
    attention_gate: bool = False
    qk_norm_plain: bool = False
    floor_scale: int | None = None
    attn_scale: float = 0.1
    floor_everywhere: bool = False
    attention_sinks: bool = False
    clip_qkv: float | None = None
    fused_projections: bool = False
    qkv_by_head: bool = False
    fused_mlp: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    linear_layers: tuple[bool, ...] | None = None
    delta: DeltaSizes | None = None
    chunked: bool = False
    hidden_activation: str = "silu"
    norm_offset: bool = False
    norm_centered: bool = False
    norm_bias: bool = False
    norm_plain: bool = False
    norm_wide: bool = False
    parallel_mlp: bool = False
    norms: Norms = BEFORE
    modules: Modules = Modules()
    scale_embeddings: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attention_multiplier: float | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    initializer_range: float = 0.02
    wrapper: str | None = None
    task: str = LANGUAGE
    labels: tuple[str, ...] = ()
    problem_type: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: `num_attention_heads` ({self.num_attention_heads}) is not a multiple of "
                f"`num_key_value_heads` ({self.num_key_value_heads})"
            )
        check_rotation(self)
        for name, each in (
            ("layer_types", self.sliding_layers),
            ("rope_layers", self.rope_layers),
            ("dense_layers", self.dense_layers),
            ("linear_layers", self.linear_layers),
        ):
            if each is not None and len(each) != self.num_hidden_layers:
                raise ValueError(
                    f"config: {len(each)} `{name}` for {self.num_hidden_layers} `num_hidden_layers`"
                )
        learned = self.hidden_activation == XIELU == DIALECTS[self.model_type].act
        if self.hidden_activation not in ACTIVATIONS and not learned:
            raise ValueError(
                f"config: `hidden_activation` `{self.hidden_activation}` is not one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        if self.sliding_window is not None:
            check_range(
                "sliding_window", self.sliding_window, RANGES["sliding_window"]._replace(least=1)
            )
        if self.num_experts is not None and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"config: `num_experts_per_tok` is {self.num_experts_per_tok}, of only "
                f"{self.num_experts} experts"
            )

    @property
    def held_with_head(self) -> bool:
        """Whether the vision-language model holds the language model whole, its head included."""
        return self.wrapper in ("llama4",)

    @property
    def place(self) -> tuple[str, ...]:
        """Where the decoder is, by the names of modules."""
        own = "transformer" if renamed_decoder(self) else self.modules.decoder
        place = (*filter(None, [self.wrapper and "language_model"]), own)
        return place if self.held_with_head else place[::-1]

    @property
    def context(self) -> int:
        """Maximum number of tokens in a text."""
        scaling = self.rope_scaling
        # With the other kinds `max_position_embeddings` is the extended context already.
        if scaling is None or scaling.rope_type not in ("dynamic", "linear"):
            return self.max_position_embeddings
        assert scaling.factor is not None  # the reader of a config refuses these kinds without it
        return int(self.max_position_embeddings * scaling.factor)

    @property
    def longrope_limit(self) -> int | None:
        """Tokens of the longest text with LongRoPE's short factors; None without LongRoPE.

        In a longer text every token is rotated differently, from the first on.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type != "longrope":
            return None
        return scaling.original_max_position_embeddings

    @property
    def expert_size(self) -> int:
        """Width of an expert."""
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.qk_rope_head_dim or int(self.head_dim * self.partial_rotary_factor)

    def rotary_dim_of(self, slides: bool) -> int:
        """As `rotary_dim`, in blocks that slide or in others."""
        return self.rotary_dim if slides or not self.global_head_dim else self.global_head_dim

    def heads_of(self, slides: bool | None) -> tuple[int, int]:
        """Key heads, and the size of a head, of blocks that slide or not."""
        if slides is not False or self.global_head_dim is None:
            return self.num_key_value_heads, self.head_dim
        return self.num_global_key_value_heads or self.num_key_value_heads, self.global_head_dim

    @property
    def value_dim(self) -> int:
        """Dimensions of a head's values."""
        return self.v_head_dim or self.head_dim

    @property
    def dense(self) -> tuple[bool, ...]:
        """For each block whether its MLP is a dense one."""
        return self.dense_layers or (self.num_experts is None,) * self.num_hidden_layers

    @property
    def linear(self) -> tuple[bool, ...]:
        """For each block whether it has a gated delta net."""
        return self.linear_layers or (False,) * self.num_hidden_layers

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What decides the parameters of each block."""
        slides = self.mixing.slides if self.global_head_dim else (None,) * self.num_hidden_layers
        first = self.num_hidden_layers - self.num_kv_shared_layers
        each = enumerate(zip(self.dense, self.linear, slides, strict=True))
        return tuple(Kind(*facts, i >= first) for i, facts in each)

    @property
    def mixing(self) -> Mixing:
        """How queries weigh keys, and which blocks slide or have a delta net.

        Without a window the blocks that rotate stand for those that slide: the two kinds of blocks
        then differ in their rotations alone.
        """
        slides = self.sliding_layers or (True,) * self.num_hidden_layers
        if self.sliding_window is None:
            slides = self.rope_layers or (False,) * self.num_hidden_layers
        scalar = self.query_pre_attn_scalar
        return Mixing(
            slides=tuple(None if n else s for n, s in zip(self.linear, slides, strict=True)),
            window=self.sliding_window,
            chunked=self.chunked,
            apart=self.global_head_dim is not None,
            shared=self.num_kv_shared_layers,
            scale=self.attention_multiplier if scalar is None else scalar**-0.5,
            softcap=self.attn_logit_softcapping,
            sinks=self.attention_sinks,
            delta=self.delta,
        )

    @property
    def fresh_scale(self) -> float:
        """Initial value of a norm's `scale`."""
        return 0.0 if self.norm_offset else 1.0

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the object in config.json.

        Raises:
          ValueError: an unknown family, a missing size, or a field whose value changes results and
            is not supported.
        """
        check_object(raw)
        kind = str(raw.get("model_type"))
        if kind not in DIALECTS:
            raise unknown_type(kind, DIALECTS)
        return with_plain_windows(LlamaConfig(**read_fields(raw, DIALECTS[kind])))

    def to_hf(self) -> dict[str, Any]:
        """The object for config.json; `from_hf` reads it back unchanged."""
        out = {name: getattr(self, name) for name in PLAIN}
        out["eos_token_id"] = scalar_if_one(self.eos_token_ids)
        out["rope_scaling"] = scaling_to_hf(self.rope_scaling)
        dialect = DIALECTS[self.model_type]
        fixed = {
            **write_classes(self, dialect.architecture),
            dialect.activation: self.hidden_activation,
        }
        return {**out, **fixed, **dialect.write(self)}
