"""Cases of Flax NNX modules, split into a graph definition and a state."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from tests.laws.case import Case, features, filled


def module(make: Callable[[nnx.Rngs], nnx.Module], *args, call=None):
    """An NNX module as a case: its state is the parameter tree."""

    def build():
        graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

        def fn(state, *xs):
            made = nnx.merge(graph, state)
            return call(made, *xs) if call else made(*xs)

        return fn, filled(state), args or (features(),)

    return build


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 6, rngs=rngs)
        self.down = nnx.LinearGeneral((6,), (2, 3), rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + nnx.gelu(self.linear(x))


class Remat(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    @nnx.remat
    def __call__(self, x):
        return x + nnx.gelu(self.linear(x))


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Stateful(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.linear(x)))


class Scanned(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Block(rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        return run(x, self.layers)


class Experts(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 6, rngs=rngs)

        self.experts = make(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda m, x: m(x), in_axes=(0, 0))(self.experts, x)


def _stateful(made, x):
    return made(x), nnx.state(made, nnx.BatchStat)


def _returning_all(made, x):
    return made(x), nnx.state(made)


def _attention(rngs):
    return nnx.MultiHeadAttention(2, 8, 12, decode=False, rngs=rngs)


def _tied(made, ids):
    return made.attend(jnp.tanh(made(ids)))


_MHA = {"query.kernel": "ioo", "key.kernel": "ioo", "value.kernel": "ioo", "out.kernel": "iio"}
_IDS = jnp.arange(10).reshape(2, 5)

CASES = (
    Case("nnx_linear", module(Mlp), {"up.kernel": "io", "down.kernel": "ioo"}),
    Case("nnx_einsum", module(lambda r: nnx.Einsum("btd,dhk->bthk", (8, 2, 6), rngs=r)),
         {"kernel": "ioo"}),
    Case("nnx_embed_tied", module(lambda r: nnx.Embed(11, 8, rngs=r), _IDS, call=_tied),
         {"embedding": "io"}, linear=(), numerical=False),
    Case("nnx_attention", module(_attention), _MHA),
    Case("nnx_conv", module(lambda r: nnx.Conv(3, 6, (3, 3), rngs=r), features(2, 5, 5, 3)),
         {"kernel": "iiio"}),
    Case("nnx_conv_transpose",
         module(lambda r: nnx.ConvTranspose(8, 6, (3,), strides=2, rngs=r)), {"kernel": "iio"}),
    Case("nnx_scan", module(Scanned), {"layers.linear.kernel": "sio"}),
    Case("nnx_list", module(Layers),
         {"layers.0.linear.kernel": "io", "layers.1.linear.kernel": "io"}),
    Case("nnx_remat", module(Remat), {"linear.kernel": "io"}),
    Case("nnx_experts", module(Experts), {"experts.kernel": "sio"}, mapped=False),
    Case("nnx_batch_norm_dropout", module(Stateful, call=_stateful), {"linear.kernel": "io"},
         numerical=False),
    Case("nnx_state_returned", module(Stateful, call=_returning_all), {"linear.kernel": "io"},
         numerical=False),
    Case("nnx_gru", module(lambda r: nnx.RNN(nnx.GRUCell(8, 6, rngs=r))),
         {"cell.dense_i.kernel": "io", "cell.dense_h.kernel": "io"}, numerical=False),
)  # fmt: skip
