"""Whether a tree is an adapter that its config describes, before it is written.

A config is what `restore` makes the tree from and what readers compute scales with. Names are not
compared: a config from PEFT names modules as Hugging Face does.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lora_jax.array import LoraArray, check_whole, is_lora, leaves_by_path
from lora_jax.compat import is_finite
from lora_jax.config.lora import LoraConfig
from lora_jax.config.matching import scale_of
from lora_jax.multi.single import check_single


def check_adapter(lora_params: Any, config: LoraConfig) -> None:
    """Checks that a tree is one whole adapter that `config` describes.

    Raises:
      ValueError: it is half a tree, a stack, has no adapter, or differs from the config in rank,
        scale, dropout, DoRA or bias; the message names the leaf.
    """
    check_whole(lora_params)
    check_single(lora_params)
    leaves = {path: x for path, x in leaves_by_path(lora_params).items() if is_lora(x)}
    if not leaves:
        raise ValueError(
            "`lora_params` has no leaf that trains: pass the tree that `lora.init` made"
        )
    for path, leaf in leaves.items():
        for name, has, allowed in _fields(leaf, config) if isinstance(leaf, LoraArray) else ():
            if not any(math.isclose(has, value, rel_tol=_ROUNDING) for value in allowed):
                expected = " or ".join(map(_spelled, sorted(allowed)))
                raise ValueError(
                    f"`{path}` has {name} {_spelled(has)}, and `config` gives it {expected}: pass "
                    f"the config that the adapter was made with{_MOVED * (name == 'scale')}"
                )


def _spelled(value: float) -> str:
    return str(value) if isinstance(value, bool) else f"{value:.6g}"


# No user changes a scale by hand.
_MOVED = (
    ". If an optimizer ran on the whole tree, the base has moved too: train "
    "`lora.split(lora_params)[0]`, or wrap the optimizer in `lora.masked`"
)
_ROUNDING = 1e-6  # a leaf's scale is float32, the config's float64


def _fields(leaf: LoraArray, config: LoraConfig) -> Iterator[tuple[str, float, set]]:
    """What a leaf has of its config, as numbers: name, the leaf's value, the config's values."""
    ranks = {config.rank, *config.rank_pattern.values()}
    alphas = {config.alpha, *config.alpha_pattern.values()}
    yield "`use_dora`", leaf.m is not None, {config.use_dora}
    yield "`lora_bias`", leaf.bias is not None, {config.lora_bias}
    yield "dropout", leaf.dropout, {config.dropout}
    yield "rank", _rank(leaf, max(ranks)), ranks
    # A layer that a config leaves out has scale 0.
    scales = {0.0, *(scale_of(config, rank, alpha) for rank in ranks for alpha in alphas)}
    for scale in np.unique(np.concatenate([np.ravel(part) for part in _own(leaf.scale)])):
        yield "scale", float(scale), scales


def _own(x: Any) -> list[np.ndarray]:
    """The parts of an array that this process has; all of it, where it is no array of JAX."""
    return [np.asarray(part.data) for part in getattr(x, "addressable_shards", ())] or [
        np.asarray(x)
    ]


def _rank(leaf: LoraArray, most: int) -> int:
    """The rank of a leaf, without the zeros that an adapter out of a stack is padded with."""
    if leaf.rank <= most:
        return leaf.rank
    outs = (slice(None),) * leaf.roles.count("o")
    # A row of b without its column of a has no effect, and the reverse.
    beyond = (leaf.a[..., most:], leaf.b[(..., slice(most, None), *outs)])
    return leaf.rank if all(any(map(np.any, _own(x))) for x in beyond) else most


def check_finite(arrays: Mapping[str, Any]) -> None:
    """Checks that the trained arrays of an adapter are numbers.

    Raises:
      ValueError: one holds NaN or infinity.
    """
    for name, x in arrays.items():
        if not is_finite(x):
            raise ValueError(
                f"`lora_params` holds NaN or infinity in `{name}`: save an earlier state, and "
                "lower the learning rate or clip gradients"
            )
