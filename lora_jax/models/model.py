"""A decoder: its parameters, and pure functions of them.

`Forward` describes the computation and holds no array; it is hashable, so that a program compiled
for one model serves all others of the same shape. `Model` adds parameters and tokenizer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial, reduce
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lora_jax import compat
from lora_jax.config.arguments import kind_of
from lora_jax.dims import AnyArray
from lora_jax.models.attention import Cache, Kept, Stored, attention, positions_of, starts_of
from lora_jax.models.classifier import last_states
from lora_jax.models.context import of_own_tokens, of_whole_rows
from lora_jax.models.delta_net import first_states
from lora_jax.models.experts import Load, balance
from lora_jax.models.heads import CLASSIFICATION
from lora_jax.models.kernels import AttentionName, check_attention
from lora_jax.models.layers import Specs, automatic, on_rows, on_tokens, run_blocks
from lora_jax.models.llama import CausalLM
from lora_jax.models.remat import Remat, check_remat, remat_name, rematerialized
from lora_jax.models.structure import module_with, stacked, structure
from lora_jax.quant.array import is_quant
from lora_jax.transform import eager, lorafy

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The computation of a model, without its parameters.

    Attributes:
      config: the architecture.
      dtype: dtype of the computation; norms, softmax, rotations and logits stay float32.
      param_dtype: dtype of the parameters.
      scan: blocks stacked on a leading axis and scanned, or kept apart by number. With a number for
        each block, those that have one number are stacked: the others are held in other formats.
      remat: what the backward pass recomputes of a block: "full" (or True) everything but what goes
        from block to block; "projections" what is cheap (norms, rotations, softmax, activations),
        on a CPU a third of the memory of "none" and a little faster than it; "none" (or False)
        nothing; or a policy of `jax.checkpoint_policies`, by name or itself.
      offload: what is kept of a block lies in the host's memory until the backward pass.
      attention: the implementation that a call without a cache takes, by name, or "auto"; see
        `lora_jax.models.kernels`.
      module: the NNX class, with the methods of `lora_jax.models.llama.CausalLM`.
      rows: axes of the mesh (`jax.set_mesh`) that the batch's rows are spread over, such as
        ("data", "fsdp"); see `lora_jax.models.layers.on_rows`. () adds no constraint.
      tokens: axis of the mesh that the tokens of a row are spread over, "context", in calls without
        a cache; it must divide a row's length. See `lora_jax.models.context`.
      gathered: what a block gathers of its weights before it uses them, by path; see
        `lora_jax.models.layers.gather`. What is not here is left to XLA's partitioner.
    """

    config: Any
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    scan: bool | tuple[int, ...] = True
    remat: Remat = False
    offload: bool = False
    attention: AttentionName = "auto"
    module: Callable[..., Any] = CausalLM
    rows: tuple[str, ...] = ()
    tokens: str | None = None
    gathered: Specs = ()

    def __post_init__(self) -> None:
        check_options(self.dtype, self.param_dtype, self.remat, self.offload)
        check_attention(self.attention)

    def apply(
        self,
        params: Any,
        tokens: Int[AnyArray, "b t"],
        *,
        positions: Int[AnyArray, "b t"] | None = None,
        mask: Bool[AnyArray, "b t"] | None = None,
        segments: Int[AnyArray, "b t"] | None = None,
        cache: Cache | None = None,
        return_hidden: bool = False,
        balanced: bool = False,
    ) -> Any:
        """Logits, or hidden states, of new tokens.

        Args:
          params: nested dictionaries of arrays, as in `Model.params`.
          tokens: token ids.
          positions: each token's place in its text; by default real tokens are counted from 0,
            or from what the cache holds.
          mask: true at real tokens; padding may be on either side. Texts padded on the right
            need none: no real token attends to what follows it.
          segments: for rows of several texts side by side, each token's text: equal numbers above
            0 within a text, another number in the next one, 0 at padding. Tokens attend to their
            own text alone, and positions begin at 0 in each. Not with `mask` or `cache`.
          cache: from `init_cache` or an earlier call. It must have room for the tokens.
          return_hidden: return the input of the head instead of logits.
          balanced: return the load-balancing loss of the experts too, see
            `lora_jax.models.experts.balance`.

        Returns:
          Float32 logits (b, t, v), of classes of texts (b, c), of tokens (b, t, c), of answers
          (b, t, 2); or hidden states (b, t, d) in the compute dtype; if `balanced`, the pair of
          that and float32 (); with a cache, the pair of that and the new cache.

        Raises:
          ValueError: tokens, mask, segments or positions of another shape or dtype, or parameters
            of another model.
        """
        check_inputs(tokens, mask, positions)
        check_segments(tokens, segments, mask=mask, cache=cache)
        if balanced and getattr(self.config, "num_experts", None) is None:
            raise ValueError(
                f"`balanced` is for mixtures of experts, and `{self.config.model_type}` has no "
                "experts: leave it out"
            )
        if segments is not None and self._of_texts and not return_hidden:
            raise ValueError(
                "`segments` came for a classifier, which reads the last token of a row: give one "
                "text a row, or take `return_hidden=True` and `head`"
            )
        run = partial(self._apply, return_hidden=return_hidden, balanced=balanced)
        inputs = {"positions": positions, "mask": mask, "segments": segments, "cache": cache}
        return automatic(run, params, tokens, with_number=balanced, **inputs)

    @property
    def _of_texts(self) -> bool:
        """Whether the head reads the last token of each row alone."""
        return self.config.task == CLASSIFICATION

    @eager.compiled("self", "return_hidden", "balanced")
    def _apply(
        self,
        params: Any,
        tokens: Int[AnyArray, "b t"],
        *,
        positions: Int[AnyArray, "#b t"] | None,
        mask: Bool[AnyArray, "b t"] | None,
        segments: Int[AnyArray, "b t"] | None,
        cache: Cache | None,
        return_hidden: bool,
        balanced: bool,
    ) -> Any:
        lm = module_with(self, params)
        real = None
        if balanced:
            everywhere = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask)
            real = everywhere if segments is None else jnp.asarray(segments) > 0
        hidden, new_cache, load = self._hidden_states(
            lm, tokens, positions=positions, mask=mask, segments=segments, cache=cache, real=real
        )
        if return_hidden:
            out = hidden
        elif self._of_texts:
            out = lm.head(last_states(hidden, tokens, mask, self.config.pad_token_id))[:, 0]
        else:
            out = lm.head(hidden)
        if load is not None:
            out = out, balance(load)
        return out if cache is None else (out, new_cache)

    def head(self, params: Any, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Float32 logits of hidden states that `apply(..., return_hidden=True)` returned."""

        def run(params: Any, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
            return module_with(self, params).head(hidden)

        return automatic(run, params, hidden)

    def _hidden_states(
        self,
        lm: Any,
        tokens: Int[AnyArray, "b t"],
        *,
        positions: Int[AnyArray, "#b t"] | None,
        mask: Bool[AnyArray, "b t"] | None,
        segments: Int[AnyArray, "b t"] | None,
        cache: Cache | None,
        real: Bool[AnyArray, "b t"] | None,
    ) -> tuple[Float[Array, "b t d"], Cache | None, Load | None]:
        """Runs the decoder up to its final norm; returns that and the cache."""
        # The new tokens after a cache are few.
        over = self.tokens if cache is None else None
        mask, segments = (of_whole_rows(x, over) for x in (mask, segments))
        if positions is None:
            count = of_whole_rows(tokens, over).shape[1]
            counted = jnp.arange(count, dtype=jnp.int32)[None]  # (1, t)
            positions = counted if mask is None else positions_of(mask)
            if segments is not None:
                # Padding is at 0, which makes no text longer than it is.
                positions = jnp.where(segments > 0, counted - starts_of(segments), 0)
            if cache is not None:
                # Real tokens only: padding in the cache has no position.
                positions = positions + cache.valid.sum(axis=1, dtype=jnp.int32)[:, None]
            positions = of_own_tokens(positions, over)
        config = self.config
        turns = lm.turns(config, positions)
        attend_of, stored, cache = attention(
            tokens, mask, cache, segments=segments, turns=turns, wanted=self.attention, over=over,
            mixing=config.mixing._replace(again=remat_name(self.remat) != "none"),
        )  # fmt: skip

        embedded = lm.embed(on_tokens(tokens, self.rows, over), positions)
        given = lm.of_blocks(tokens, embedded)
        embedded = on_tokens(embedded, self.rows, over)
        if stored is None and config.mixing.shared:
            # A scan goes on with arrays of the same shapes: these are never attended to.
            empty = {
                each: jnp.zeros((*tokens.shape, *config.heads_of(each)), embedded.dtype)
                for each in set(config.mixing.slides)
            }
            stored = Kept(empty, empty)

        # What is the same for every block is computed before their scan.
        known = {slides: attend_of(slides) for slides in set(config.mixing.slides)}

        def run(
            block: Any,
            carry: tuple[Float[Array, "b t d"], Stored, Load | None],
            number: Int[Array, ""],
            slides: bool | Bool[Array, ""] | None,
            given: Array | None = None,
        ) -> tuple[Float[Array, "b t d"], Stored, Load | None]:
            x, stored, load = carry
            attend = attend_of(slides) if isinstance(slides, Array) else known[slides]
            x = on_rows(x, self.rows, over)
            more = {} if given is None else {"given": given}
            if real is None:
                x, stored = block(x, attend, stored, number, **more)
            else:
                x, stored, own = block.counted(x, attend, stored, block=number, real=real, **more)
                load = load if own is None else jax.tree.map(jnp.add, load, own)
            return on_rows(x, self.rows, over), stored, load

        load = None
        if real is not None:
            # Summed over the blocks before the product, as transformers does: its loss is one of
            # all blocks together, not the sum of theirs.
            load = Load(*(jnp.zeros(config.num_experts) for _ in Load._fields))
        x, stored, load = run_blocks(
            reduce(getattr, lm.blocks(config), lm),  # by its names, such as `lm.model.layers`
            (on_rows(embedded, self.rows, over), stored, load),
            run,
            wrap=rematerialized(self.remat, self.gathered, offload=self.offload, tokens=over),
            each=config.mixing.slides,
            given=given,
        )
        if cache is not None:
            cache = cache._replace(**stored._asdict())
        return lm.final(x), cache, load

    def shapes(self) -> dict[str, Any]:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""
        shapes = structure(self)[1]
        count = self.config.num_hidden_layers
        return stacked(shapes, self.module.blocks(self.config), count) if self.scan else shapes

    def init_cache(self, batch: int, cache_length: int) -> Cache:
        """An empty cache of `cache_length` tokens a row."""
        config = self.config
        delta, slides = config.mixing.delta, config.mixing.slides
        nets = slides.count(None)
        slides = slides[: len(slides) - config.mixing.shared]

        def empty(count: int, heads: int, size: int) -> Array:
            return jnp.zeros((count, batch, cache_length, heads, size), self.dtype)

        if config.mixing.apart:
            kept = {each: empty(slides.count(each), *config.heads_of(each)) for each in set(slides)}
        else:
            kept = empty(len(slides) - nets, config.num_key_value_heads, config.head_dim)
        valid = jnp.zeros((batch, cache_length), bool)
        more: Any = () if delta is None else first_states(delta, nets, batch, self.dtype)
        return Cache(kept, kept, valid, jnp.int32(0), *more)


@dataclass(frozen=True, eq=False)
class Model:
    """A model with its parameters.

    Attributes:
      forward: how it is computed: `Forward` of a decoder, or an encoder's.
      params: nested dictionaries of arrays under Hugging Face's module names.
      tokenizer: what turns text into its tokens, or None.
      generation: its generation_config.json: end tokens, temperature, top-p; empty without one.
      checkpoint: the directory or .gguf file that it was loaded from, or None: a merge copies the
        rest of a vision-language model, and of a quantized one, from there.
      processor: what makes pixels of images, a `lora_jax.hf.images.ImageProcessor`, or None.
    """

    forward: Any
    params: dict[str, Any]
    tokenizer: Any = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    processor: Any = None

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params, is_leaf=is_quant)
        count, size = (sum(getattr(x, f) for x in leaves) for f in ("size", "nbytes"))
        return (
            f"<Model: `{self.config.model_type}`, {self.config.num_hidden_layers} layers, "
            f"{count:,} parameters in {size / 2**20:,.1f} MiB, computing in {self.forward.dtype}>"
        )

    @property
    def config(self) -> Any:
        """The architecture."""
        return self.forward.config

    @property
    def apply(self) -> Callable:
        """`Forward.apply`: a pure function of parameters and tokens, quantized ones included."""
        return self.forward.apply if _plain(self.params) else _decoding(self.forward, "apply")

    @property
    def head(self) -> Callable:
        """`Forward.head`: hidden states to logits."""
        return self.forward.head if _plain(self.params) else _decoding(self.forward, "head")

    @property
    def init_cache(self) -> Callable:
        """`Forward.init_cache`: an empty cache."""
        return self.forward.init_cache


def _plain(params: Any) -> bool:
    """Whether no parameter is quantized."""
    return not any(is_quant(x) for x in jax.tree.leaves(params, is_leaf=is_quant))


@lru_cache(maxsize=64)
def _decoding(forward: Any, method: Literal["apply", "head"]) -> Callable:
    """A method for parameters that may be quantized; one object, so that `jit` finds it again."""
    return lorafy(getattr(forward, method))


def check_options(dtype: str, param_dtype: str, remat: Remat, offload: bool = False) -> None:
    """Refuses a dtype that is not supported, and a rematerialization that does not exist."""
    for name, given in (("dtype", dtype), ("param_dtype", param_dtype)):
        if given not in DTYPES:
            raise ValueError(f"`{name}` must be one of {', '.join(DTYPES)}, got {given!r}")
    check_remat(remat, offload)


def check_inputs(tokens: Any, mask: Any, positions: Any = None, of: str = "") -> None:
    """Refuses tokens, masks and positions of another shape or dtype; `of` starts their names."""
    if not compat.is_array(tokens):
        raise TypeError(
            f"`{of}tokens` must be an array of integers, (batch, length), got {kind_of(tokens)}: "
            "pass `jnp.asarray(rows)` of rows that are equally long"
        )
    if jnp.ndim(tokens) != 2 or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
        raise ValueError(
            f"`{of}tokens` must be integers of shape (batch, length), got "
            f"{jnp.result_type(tokens)} of shape {jnp.shape(tokens)}"
        )
    if mask is not None and (
        jnp.shape(mask) != jnp.shape(tokens) or jnp.result_type(mask) != jnp.bool_
    ):
        raise ValueError(
            f"`{of}mask` must be bool, true at real tokens, of the tokens' shape "
            f"{jnp.shape(tokens)}, got {jnp.result_type(mask)} of shape {jnp.shape(mask)}"
        )
    if positions is not None and jnp.shape(positions)[-1:] != jnp.shape(tokens)[-1:]:
        raise ValueError(
            f"`positions` must number the tokens of shape {jnp.shape(tokens)}, got shape "
            f"{jnp.shape(positions)}"
        )


def check_segments(tokens: Any, segments: Any, *, mask: Any, cache: Any) -> None:
    """Refuses segments of another shape or dtype, or beside what they exclude."""
    if segments is None:
        return
    if jnp.shape(segments) != jnp.shape(tokens) or not jnp.issubdtype(
        jnp.result_type(segments), jnp.integer
    ):
        raise ValueError(
            f"`segments` must be integers of the tokens' shape {jnp.shape(tokens)}, got "
            f"{jnp.result_type(segments)} of shape {jnp.shape(segments)}"
        )
    for name, given in (("mask", mask), ("cache", cache)):
        if given is not None:
            raise ValueError(
                f"`segments` came with a `{name}`: mark padding by segment 0, and generate one "
                "text a row"
            )
