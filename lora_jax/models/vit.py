"""ViT: an encoder of images, as patches.

    x   = [cls, W_patch patches] + positions
    x <- x + W_o Attention(LayerNorm(x))
    x <- x + W_2 act(W_1 LayerNorm(x) + b_1) + b_2
    logits = W_c LayerNorm(x)_cls

Modules and parameters are Flax NNX's, module names are those of Hugging Face's classes
(transformers 5); its files keep older names, see `lora_jax.hf.checkpoint.name_tables`.

B batch, C channels, H x W pixels, T tokens: the class token and the patches, D width.

Source: Dosovitskiy et al. 2020, arXiv:2010.11929.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lora_jax.dims import AnyArray
from lora_jax.models.bert import Features
from lora_jax.models.bert_kinds import FEATURES
from lora_jax.models.bert_parts import Attending, Build, Dense, attended
from lora_jax.models.layers import (
    ACTIVATIONS,
    Specs,
    automatic,
    kept,
    on_rows,
    run_blocks,
    stack_of,
)
from lora_jax.models.model import Dtype, check_options
from lora_jax.models.remat import Remat, rematerialized
from lora_jax.models.structure import module_with, stacked, structure
from lora_jax.models.vit_config import ViTConfig
from lora_jax.transform import eager

_ALL = Attending(mask=None, over=None)  # every token attends to every token


class Patches(nnx.Module):
    """A linear layer of the pixels of a patch, as a convolution without overlap."""

    def __init__(self, build: Build) -> None:
        config: Any = build.config
        size = config.patch_size
        self.projection = nnx.Conv(
            config.num_channels, config.hidden_size, size, strides=size, padding="VALID",
            dtype=build.dtype, param_dtype=build.param_dtype, rngs=build.rngs,
        )  # fmt: skip

    def __call__(self, pixels: Float[AnyArray, "b c h w"]) -> Float[Array, "b p d"]:
        x = self.projection(jnp.moveaxis(jnp.asarray(pixels), 1, -1))
        return x.reshape(x.shape[0], -1, x.shape[-1])


class Embeddings(nnx.Module):
    """The class token and the patches, with their positions."""

    def __init__(self, build: Build) -> None:
        config: Any = build.config
        width, dtype = config.hidden_size, build.param_dtype
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width), dtype))
        self.position_embeddings = nnx.Param(
            jnp.zeros((1, config.max_position_embeddings, width), dtype)
        )
        self.patch_embeddings = Patches(build)
        self.dtype = build.dtype

    def __call__(self, pixels: Float[AnyArray, "b c h w"]) -> Float[Array, "b t d"]:
        x = self.patch_embeddings(pixels)
        cls = self.cls_token.get_value().astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], *cls.shape[1:])), x], axis=1)
        return x + self.position_embeddings.get_value().astype(self.dtype)


class Attention(nnx.Module):
    """Every token attends to every token."""

    def __init__(self, build: Build) -> None:
        config: Any = build.config
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj = build.linear(width, width, bias=config.qkv_bias)
        self.k_proj = build.linear(width, width, bias=config.qkv_bias)
        self.v_proj = build.linear(width, width, bias=config.qkv_bias)
        self.o_proj = build.linear(width, width)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        mixed = attended(x, (self.q_proj, self.k_proj, self.v_proj), self.heads, by=_ALL)
        return kept(self.o_proj(mixed))


class MLP(nnx.Module):
    """`W_2 act(W_1 x + b_1) + b_2`."""

    def __init__(self, build: Build) -> None:
        config = build.config
        self.act = config.hidden_act
        self.fc1 = build.linear(config.hidden_size, config.intermediate_size)
        self.fc2 = build.linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return kept(self.fc2(ACTIVATIONS[self.act](kept(self.fc1(x)))))


class Layer(nnx.Module):
    """One block."""

    def __init__(self, build: Build) -> None:
        self.layernorm_before = build.norm()
        self.attention = Attention(build)
        self.layernorm_after = build.norm()
        self.mlp = MLP(build)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.mlp(self.layernorm_after(x))


class Encoder(nnx.Module):
    """Embeddings, blocks, the last norm and, where the config has one, the pooler."""

    def __init__(self, build: Build, *, scan: bool | tuple[int, ...]) -> None:
        config: Any = build.config
        self.embeddings = Embeddings(build)
        blocks = (False,) * config.num_hidden_layers  # none differs
        self.layers = stack_of(blocks, lambda _: Layer(build), scan=scan)
        self.layernorm = build.norm()
        if config.pooler:
            self.pooler = Dense(config.pooler_output_size or config.hidden_size, build)


class Classifier(nnx.Module):
    """The encoder, and a head that reads the class token."""

    def __init__(self, build: Build, *, scan: bool | tuple[int, ...]) -> None:
        config: Any = build.config
        self.vit = Encoder(build, scan=scan)
        self.classifier = build.linear(config.hidden_size, len(config.labels))


def make(
    config: Any,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    scan: bool | tuple[int, ...],
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Makes the module for a config's task."""
    build = Build(config, dtype, param_dtype, rngs)
    return (Encoder if config.task == FEATURES else Classifier)(build, scan=scan)


@dataclass(frozen=True, kw_only=True)
class ImageForward:
    """An encoder of images without its parameters: architecture, task and options.

    Attributes:
      config: the architecture and the task.
      dtype: dtype of the computation; norms, softmax and logits stay float32.
      param_dtype: dtype of the parameters.
      scan: stack the blocks on a leading axis and scan over them, or keep them apart by number.
      remat: recompute each block in the backward pass; see `Forward`.
      rows: axes of the mesh that shard the batch; see `Forward`.
      gathered: what a block gathers of its weights; see `Forward`.
    """

    config: ViTConfig
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    scan: bool | tuple[int, ...] = True
    remat: Remat = False
    rows: tuple[str, ...] = ()
    gathered: Specs = ()

    def __post_init__(self) -> None:
        check_options(self.dtype, self.param_dtype, self.remat)

    @property
    def module(self) -> Callable[..., nnx.Module]:
        """Makes the NNX module."""
        return make

    def apply(
        self, params: Any, pixels: Float[AnyArray, "b c h w"], *, return_hidden: bool = False
    ) -> Features | Array:
        """Runs the encoder and the head of its task.

        Args:
          params: nested dictionaries of arrays, as in `Model.params`.
          pixels: images as transformers' image processor gives them (`pixel_values`), normalized.
          return_hidden: return the last hidden states, whatever the task.

        Returns:
          "image-classification": float32 logits (b, classes); "features": `Features`, pooled or
          not; with `return_hidden`: hidden states (b, t, d) in the compute dtype.

        Raises:
          ValueError: images of another shape or dtype, or parameters of another model.
        """
        config = self.config
        want = (config.num_channels, *config.image_size)
        if jnp.shape(pixels)[1:] != want or not jnp.issubdtype(
            jnp.result_type(pixels), jnp.floating
        ):
            raise ValueError(
                f"`pixels` must be floats of shape (batch, {', '.join(map(str, want))}), got "
                f"{jnp.result_type(pixels)} of shape {jnp.shape(pixels)}: transformers' "
                "AutoImageProcessor resizes and normalizes images"
            )
        return automatic(partial(self._apply, return_hidden=return_hidden), params, pixels)

    @eager.compiled("self", "return_hidden")
    def _apply(
        self, params: Any, pixels: Float[AnyArray, "b c h w"], *, return_hidden: bool
    ) -> Features | Array:
        module = module_with(self, params)
        encoder = module if self.config.task == FEATURES else module.vit
        x = run_blocks(
            encoder.layers,
            on_rows(encoder.embeddings(pixels), self.rows),
            lambda block, x, number, each: on_rows(block(on_rows(x, self.rows)), self.rows),
            wrap=rematerialized(self.remat, self.gathered),
            each=(False,) * self.config.num_hidden_layers,
        )
        hidden = encoder.layernorm(x)
        if return_hidden:
            return hidden
        if self.config.task != FEATURES:
            return module.classifier(hidden[:, 0]).astype(jnp.float32)
        if not self.config.pooler:
            return Features(hidden, None)
        act = jnp.tanh if self.config.pooler_act == "tanh" else ACTIVATIONS[self.config.pooler_act]
        return Features(hidden, act(encoder.pooler.dense(hidden[:, 0])))

    def shapes(self) -> dict[str, Any]:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""
        shapes = structure(self)[1]
        inside = () if self.config.task == FEATURES else ("vit",)
        count = self.config.num_hidden_layers
        return stacked(shapes, (*inside, "layers"), count) if self.scan else shapes
