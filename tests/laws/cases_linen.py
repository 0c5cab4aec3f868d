"""Cases of Flax linen modules."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.laws.case import BFLOAT16, Case, features, filled


def module(make: Callable[[], nn.Module], *args, apply=None):
    """A linen module as a case: `module.apply(variables, *args)` on made-up numbers."""

    def build():
        made = make()
        given = args or (features(),)
        variables = filled(jax.eval_shape(made.init, jax.random.key(0), *given))
        return apply(made) if apply else made.apply, variables, given

    return build


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(6)(x)))


class General(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral(8, axis=(-2, -1))(jnp.tanh(nn.DenseGeneral((2, 6))(x)))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 8)
        return embed.attend(jnp.tanh(embed(ids)))


class Block(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm(dtype=self.dtype)(x)
        h = nn.gelu(nn.Dense(6, dtype=self.dtype)(h))
        return x + nn.Dense(8, dtype=self.dtype)(h), None


class Shared(nn.Module):
    """One block applied three times."""

    def setup(self):
        self.block = nn.Dense(8)

    def __call__(self, x):
        for _ in range(3):
            x = jnp.tanh(self.block(x))
        return x


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        block = nn.remat(Block, policy=policy)
        return block()(block()(x)[0])[0]


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(4)(x))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(4)(x)
        self.sow("intermediates", "y", y)
        return y


class SelfAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0])
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=12, out_features=8)(
            x, mask=mask
        )


def _scanned(block=Block, axis: int = 0):
    scan = nn.scan(block, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)
    return lambda: scan()


def _boxed(make_init):
    return lambda: nn.Dense(6, kernel_init=make_init(nn.initializers.lecun_normal()))


_FIRST = lambda made: lambda p, *xs: made.apply(p, *xs)[0]  # noqa: E731
_SCAN_ROLES = {"params.Dense_0.kernel": "sio", "params.Dense_1.kernel": "sio"}
_SCAN_AXIS = {"params.Dense_0.kernel": "iso", "params.Dense_1.kernel": "iso"}
_QKVO = {
    "params.MultiHeadDotProductAttention_0.query.kernel": "ioo",
    "params.MultiHeadDotProductAttention_0.key.kernel": "ioo",
    "params.MultiHeadDotProductAttention_0.value.kernel": "ioo",
    "params.MultiHeadDotProductAttention_0.out.kernel": "iio",
}
_TWO = {"params.Dense_0.kernel": "io", "params.Dense_1.kernel": "io"}
_ONE = {"params.kernel": "io"}
_DENSE = {"params.Dense_0.kernel": "io"}
_LSTM = {f"params.cell.{side}{gate}.kernel": "io" for side in "ih" for gate in "ifgo"}


def _mutable(made):
    return lambda p, x: made.apply(p, x, mutable=["batch_stats"])


def _dropping(made):
    return lambda p, x: made.apply(p, x, True, rngs={"dropout": jax.random.key(7)})


def _captured(made):
    def run(p, x):
        return made.apply({"params": p["params"]}, x, mutable=["intermediates"],
                          capture_intermediates=True)  # fmt: skip

    return run


def _init_sowing():
    made = Dropping()
    shapes = jax.eval_shape(lambda k, x: made.init(k, x, False), jax.random.key(0), features())
    return _dropping(made), filled(shapes), (features(),)


CASES = (
    Case("linen_dense", module(Mlp), _TWO),
    Case("linen_dense_general", module(General),
         {"params.DenseGeneral_1.kernel": "ioo", "params.DenseGeneral_0.kernel": "iio"}),
    Case("linen_dense_general_batched",
         module(lambda: nn.DenseGeneral(6, axis=-1, batch_dims=(0,))), {"params.kernel": "sio"},
         mapped=False),
    Case("linen_einsum", module(lambda: nn.Einsum((8, 2, 6), "abc,cde->abde")),
         {"params.kernel": "ioo"}),
    Case("linen_embed_tied", module(Tied, jnp.arange(10).reshape(2, 5)),
         {"params.Embed_0.embedding": "io"}, linear=()),
    Case("linen_conv", module(lambda: nn.Conv(6, (3, 2), strides=(2, 1)), features(2, 6, 5, 3)),
         {"params.kernel": "iiio"}),
    Case("linen_conv_transpose", module(lambda: nn.ConvTranspose(6, (3,), strides=(2,))),
         {"params.kernel": "iio"}),
    Case("linen_conv_grouped", module(lambda: nn.Conv(6, (3,), feature_group_count=2)),
         {"params.kernel": "iio"}),
    Case("linen_conv_local", module(lambda: nn.ConvLocal(4, (3,))), {"params.kernel": "sio"}),
    Case("linen_attention", module(SelfAttention), _QKVO),
    Case("linen_scan", module(_scanned(), apply=_FIRST), _SCAN_ROLES),
    Case("linen_scan_axis_1", module(_scanned(axis=1), apply=_FIRST), _SCAN_AXIS),
    Case("linen_scan_remat", module(_scanned(nn.remat(Block, prevent_cse=False)), apply=_FIRST),
         _SCAN_ROLES),
    Case("linen_remat_policy", module(Remat),
         {f"params.CheckpointBlock_{i}.Dense_{j}.kernel": "io" for i in (0, 1) for j in (0, 1)}),
    Case("linen_vmap_experts",
         module(lambda: nn.vmap(nn.Dense, variable_axes={"params": 0},
                                split_rngs={"params": True}, in_axes=0)(6)),
         {"params.kernel": "sio"}, mapped=False),
    Case("linen_shared_block", module(Shared), {"params.block.kernel": "io"}),
    Case("linen_bfloat16", module(lambda: Block(dtype=jnp.bfloat16), apply=_FIRST), _TWO,
         tolerance=BFLOAT16, numerical=False),
    Case("linen_batch_norm", module(Normed, apply=_mutable), _DENSE),
    Case("linen_captured", module(Sowing, apply=_captured), _DENSE),
    Case("linen_dropout_rngs", _init_sowing, _DENSE),
    Case("linen_lstm", module(lambda: nn.RNN(nn.LSTMCell(6))), _LSTM, numerical=False),
    Case("linen_weight_norm", module(lambda: nn.WeightNorm(nn.Dense(6))),
         {"params.layer_instance.kernel": "io"}),
    Case("linen_partitioned_boxes",
         module(_boxed(lambda init: nn.with_partitioning(init, ("data", "model")))), _ONE),
    Case("linen_logical_boxes",
         module(_boxed(lambda init: nn.with_logical_partitioning(init, ("embed", "mlp")))), _ONE),
)  # fmt: skip
