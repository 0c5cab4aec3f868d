"""Several adapters of one base as one: weighted sums, exact or with some changes dropped.

    ΔW = Σ_i w_i · s_i · A_i · B_i

is the sum, for adapters of any ranks and scalings (`α/r` or `α/√r`). `cat` is exact, and `svd` is
the best approximation of a rank. The others change the sum on purpose, so that adapters disturb
each other less: `ties` keeps the largest numbers of each adapter and, for each number, only those
of the winning sign; `dare` drops numbers at random and scales up the rest; `magnitude_prune` keeps
the largest. `ties_svd` and the like work on the `ΔW_i` and then reduce the rank. `linear`, `ties`
and the like work on `A` and `B` separately, and their product has terms `A_i·B_j` that belong to no
adapter. Names and numbers are PEFT's, but for rsLoRA, which PEFT scales by `√r` too much.

Sources: TIES: Yadav et al. 2023, algorithm 1. DARE: Yu et al. 2024, eq. 2-4. The best approximation
of a rank: Eckart and Young 1936.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from lora_jax.array import LoraArray, RowsArray, SavedArray, is_stack
from lora_jax.config.arguments import plain
from lora_jax.dims import factor_shapes, sizes
from lora_jax.multi.stack import check_list, columns_of

# The names in `_JOINS`, for annotations.
Method = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
MajoritySign = Literal["total", "frequency"]

_HIGHEST = jax.lax.Precision.HIGHEST


def add_weighted_adapter(
    adapters: Sequence,
    weights: Sequence[float],
    *,
    method: Method = "cat",
    rank: int | None = None,
    density: float = 1.0,
    majority_sign: MajoritySign = "total",
    key: PRNGKeyArray | None = None,
) -> PyTree:
    """The weighted sum of adapters of one base, as one adapter.

    Args:
      adapters: trees with LoRA leaves over the same base.
      weights: one number for each adapter, of either sign.
      method: "cat" (exact, its rank the sum of the ranks), "svd" (the best approximation of a
        rank), "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd" (of what is
        kept of the weights' changes), or "linear", "ties", "dare_linear", "dare_ties",
        "magnitude_prune" (of the factors, a rough approximation, for equal ranks only).
      rank: of the result; by default the sum of the ranks for "cat", and the largest rank for
        the others. "cat" with a rank is "svd".
      density: the share of each adapter's numbers that TIES, DARE and pruning keep, in (0, 1].
      majority_sign: "total" (the sign of the sum) or "frequency" (of most adapters), for TIES.
      key: PRNG key, for DARE.

    Returns:
      A tree with LoRA leaves of scale 1: save it with a config whose rank and alpha are
      `common_rank(tree)`, without patterns and rsLoRA. A leaf that only one adapter trains whole
      (`modules_to_save`) is that adapter's.

    Raises:
      ValueError: there is no adapter, or not one weight for each; an option is out of range; the
        bases differ; an adapter uses DoRA or a bias (the sum of such adapters is not an adapter:
        merge them instead); or two adapters train one leaf whole.

    Example:
      both = lora.multi.add_weighted_adapter([polite, french], [0.7, 0.3], method="svd", rank=16)
    """
    _check(
        adapters,
        weights,
        method=method,
        rank=rank,
        density=density,
        majority_sign=majority_sign,
        key=key,
    )
    columns, tree, names = columns_of(adapters)
    join = _JOINS[method]
    out = []
    for number, (name, column) in enumerate(zip(names, columns, strict=True)):
        parts = [(float(w), x) for w, x in zip(weights, column, strict=True) if _adapts(name, x)]
        saved = [x for x in column if isinstance(x, SavedArray)]
        if saved:
            out.append(_single_saved(name, saved, parts))
        elif not parts:
            out.append(column[0])
        else:
            # A key for each leaf: DARE must not drop the same places everywhere.
            own = None if key is None else jax.random.fold_in(key, number)
            options = _Options(method, rank, density, majority_sign, own)
            out.append(join(name, [(w, _wide(x)) for w, x in parts], options))
    return jax.tree.unflatten(tree, _one_rank(out))


@dataclasses.dataclass(frozen=True)
class _Options:
    method: str
    rank: int | None
    density: float
    majority_sign: MajoritySign
    key: jax.Array | None

    def within(self, index: int) -> "_Options":
        """With a key of its own for a matrix of the stack."""
        key = None if self.key is None else jax.random.fold_in(self.key, index)
        return dataclasses.replace(self, key=key)


def common_rank(lora_params: PyTree) -> int:
    """The rank of an adapter that has the same at every leaf.

    Raises:
      ValueError: the tree has no adapter, or leaves of different ranks.
    """
    leaves = jax.tree.leaves(lora_params, is_leaf=lambda x: isinstance(x, LoraArray))
    ranks = {x.rank for x in leaves if isinstance(x, LoraArray)}
    if len(ranks) != 1:
        raise ValueError(
            f"the leaves of `lora_params` have ranks {sorted(ranks)}, expected one: pass the "
            "result of `add_weighted_adapter`"
        )
    return ranks.pop()


def _check(
    adapters: Sequence,
    weights: Sequence[float],
    *,
    method: str,
    rank: int | None,
    density: float,
    majority_sign: str,
    key: PRNGKeyArray | None,
) -> None:
    check_list(adapters)
    numbers = plain(weights)
    if not isinstance(numbers, list | tuple) or not all(
        isinstance(plain(x), int | float) for x in numbers
    ):
        raise TypeError(f"`weights` must be a list of numbers, got {weights!r}")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"got {len(adapters)} `adapters` and {len(weights)} `weights`: give at least one "
            "adapter, and one weight for each"
        )
    if method not in _JOINS:
        raise ValueError(f"`method` must be one of {', '.join(_JOINS)}, got {method!r}")
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}")
    if not 0 < density <= 1:
        raise ValueError(f"`density` must be in (0, 1], got {density}")
    if majority_sign not in get_args(MajoritySign):
        raise ValueError(f'`majority_sign` must be "total" or "frequency", got {majority_sign!r}')
    if method.startswith("dare") and key is None:
        raise ValueError(f'`key` is needed for method="{method}": pass jax.random.key(seed)')


def _adapts(name: str, x: Any) -> bool:
    """Whether a leaf has factors to add; raises for leaves whose sum is not an adapter."""
    if is_stack(x) or isinstance(x, RowsArray):
        raise ValueError(
            f"`{name}` is a stack of adapters, or has trained rows: pass single adapters with "
            "factors, such as `lora.multi.adapter(stacked, index)`"
        )
    if isinstance(x, LoraArray) and (x.m is not None or x.bias is not None):
        what = "DoRA's magnitude" if x.m is not None else "an adapter's bias"
        raise ValueError(
            f"`{name}` has {what}, and the weighted sum of such adapters is not an adapter: merge "
            "them into the weights (`lora.merge`) and add those up"
        )
    return isinstance(x, LoraArray)


def _single_saved(name: str, saved: list, parts: list) -> SavedArray:
    """The one value of a leaf that trains whole: two cannot be weighted."""
    if len(saved) > 1 or parts:
        raise ValueError(
            f"`{name}` trains whole in {len(saved)} of the adapters and has factors in "
            f"{len(parts)}, expected one that trains it: merge the adapters instead"
        )
    return saved[0]


def _wide(x: LoraArray) -> LoraArray:
    """A leaf with factors in float32, in which sums and decompositions are computed."""
    return dataclasses.replace(x, a=x.a.astype(jnp.float32), b=x.b.astype(jnp.float32))


def _flat(x: LoraArray) -> tuple[Array, Array]:
    """The factors as `(stack..., in, r)` and `(stack..., r, out)`, the scale in `b`."""
    stack, fan_in, fan_out = sizes(x.shape, x.roles)
    a = x.a.reshape(*stack, fan_in, x.rank)
    # Scales differ between adapters; with theirs in B all can have scale 1.
    return a, x.b.reshape(*stack, x.rank, fan_out) * x.scale[..., None, None]


def _leaf(like: LoraArray, a: Array, b: Array) -> LoraArray:
    """A leaf of scale 1 from factors `(stack..., in, r)` and `(stack..., r, out)`."""
    a_shape, b_shape = factor_shapes(like.shape, like.roles, a.shape[-1])
    return dataclasses.replace(
        like, a=a.reshape(a_shape), b=b.reshape(b_shape), scale=jnp.ones_like(like.scale)
    )


def _cat(name: str, parts: list, options: _Options) -> LoraArray:
    if options.rank is not None:
        return _svd(name, parts, options)
    return _leaf(parts[0][1], *_beside(parts))


def _beside(parts: list) -> tuple[Array, Array]:
    """The factors of all adapters side by side, the weights in `B`."""
    flat = [(w, *_flat(x)) for w, x in parts]
    # [A_1 A_2]·[w_1 B_1; w_2 B_2] is the sum of the products.
    a = jnp.concatenate([a for _, a, _ in flat], axis=-1)
    return a, jnp.concatenate([w * b for w, _, b in flat], axis=-2)


def _svd(name: str, parts: list, options: _Options) -> LoraArray:
    """The SVD of the sum without forming it, through `Ra·Rbᵀ`, which has the size of the ranks."""
    del name  # all joins have the same arguments
    a, b = _beside(parts)
    # A·B = Qa·(Ra·Rbᵀ)·Qbᵀ with orthonormal Qs: the small matrix has the sum's singular values.
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    u, s, vt = jnp.linalg.svd(
        jnp.matmul(ra, jnp.swapaxes(rb, -1, -2), precision=_HIGHEST), full_matrices=False
    )
    first = jnp.matmul(qa, u, precision=_HIGHEST)
    second = jnp.matmul(vt, jnp.swapaxes(qb, -1, -2), precision=_HIGHEST)
    return _leaf(parts[0][1], *truncated(first, s, second, _rank(parts, options)))


def truncated(u: Array, s: Array, vt: Array, rank: int) -> tuple[Array, Array]:
    """The factors of the largest `rank` singular values; zeros where there are fewer."""
    # Each factor gets the root of a singular value, so that neither is much larger than the other.
    root = jnp.sqrt(s[..., :rank])
    return _padded(u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :], rank)


def _padded(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """The factors with zeros up to the rank."""
    none, more = [(0, 0)] * (a.ndim - 2), (0, rank - a.shape[-1])
    return jnp.pad(a, [*none, (0, 0), more]), jnp.pad(b, [*none, more, (0, 0)])


def _rank(parts: list, options: _Options) -> int:
    return options.rank or max(x.rank for _, x in parts)


def _of_factors(merge: Callable) -> Callable:
    """A join that acts on `A` and `B`, weighted by `√|w·s|` with the sign on `A`."""

    def join(name: str, parts: list, options: _Options) -> LoraArray:
        ranks = sorted({x.rank for _, x in parts})
        if len(ranks) > 1 or options.rank not in (None, ranks[0]):
            raise ValueError(
                f'`{name}`: method="{options.method}" needs adapters of one rank, got {ranks}: use '
                '"cat" or "svd", which approximate the sum itself'
            )
        like = parts[0][1]
        stack, fan_in, fan_out = sizes(like.shape, like.roles)
        # The root in both factors, so that their product has w·s.
        weights = jnp.stack([(w * x.scale).reshape(-1) for w, x in parts])  # (adapters, stack)
        roots = jnp.sqrt(jnp.abs(weights))
        signed = jnp.where(weights >= 0, roots, -roots)
        a = jnp.stack([x.a.reshape(-1, fan_in, x.rank) for _, x in parts])
        b = jnp.stack([x.b.reshape(-1, x.rank, fan_out) for _, x in parts])

        def joined(x: Array, shares: Array, part: int) -> Array:
            every = range(x.shape[1])
            own = [merge(x[:, i], shares[:, i], options.within(2 * i + part)) for i in every]
            return jnp.stack(own)

        a, b, rank = joined(a, signed, 0), joined(b, roots, 1), ranks[0]
        return _leaf(like, a.reshape(*stack, fan_in, rank), b.reshape(*stack, rank, fan_out))

    return join


def _thinned(merge: Callable) -> Callable:
    """A join that acts on the changes of the weights, one matrix of a stack at a time."""

    def join(name: str, parts: list, options: _Options) -> LoraArray:
        del name
        like = parts[0][1]
        stack, fan_in, fan_out = sizes(like.shape, like.roles)
        flat = [_flat(x) for _, x in parts]
        weights = jnp.array([w for w, _ in parts])
        each = [
            (a.reshape(-1, fan_in, a.shape[-1]), b.reshape(-1, b.shape[-2], fan_out))
            for a, b in flat
        ]
        rank = _rank(parts, options)
        matrices = []
        # One matrix of the stack at a time, because whole changes are formed here.
        for index in range(each[0][0].shape[0]):
            changes = jnp.stack(  # (adapters, in, out)
                [jnp.matmul(a[index], b[index], precision=_HIGHEST) for a, b in each]
            )
            whole = merge(changes, weights, options.within(index))
            u, s, vt = jnp.linalg.svd(whole, full_matrices=False)
            matrices.append(truncated(u, s, vt, rank))
        a, b = (jnp.stack([m[i] for m in matrices]) for i in (0, 1))
        return _leaf(like, a.reshape(*stack, fan_in, rank), b.reshape(*stack, rank, fan_out))

    return join


def _largest(changes: Float[Array, "n i o"], options: _Options) -> Float[Array, "n i o"]:
    """The changes with only the largest `density · size` numbers of each adapter."""
    count = int(options.density * changes[0].size)
    if count == changes[0].size:
        return changes

    def keep(x: Array) -> Array:
        flat = x.reshape(-1)
        # By index and not by threshold, which would keep too many of equal magnitudes.
        kept = jnp.zeros(flat.shape, bool).at[jax.lax.top_k(jnp.abs(flat), count)[1]].set(True)
        return jnp.where(kept, flat, 0).reshape(x.shape)

    return jax.vmap(keep)(changes)


def _dropped(changes: Float[Array, "n i o"], options: _Options) -> Float[Array, "n i o"]:
    """The changes, kept with probability `density` and divided by it."""
    assert options.key is not None  # checked by `_check`
    kept = jax.random.bernoulli(options.key, options.density, changes.shape)
    return jnp.where(kept, changes / options.density, 0)


def _sum(
    changes: Float[Array, "n i o"], weights: Float[Array, " n"], options: _Options
) -> Float[Array, "i o"]:
    del options
    return jnp.tensordot(weights, changes, 1, precision=_HIGHEST)


def _elected(
    changes: Float[Array, "n i o"], weights: Float[Array, " n"], options: _Options
) -> Float[Array, "i o"]:
    """For each number the mean over the adapters whose sign wins."""
    votes = changes if options.majority_sign == "total" else jnp.sign(changes)
    # A tie is positive, as in PEFT.
    winner = jnp.where(votes.sum(0) >= 0, 1, -1)
    agree = jnp.sign(changes) == winner
    total = jnp.sum(jnp.where(agree, changes * weights[:, None, None], 0), axis=0)
    # Where no adapter has a change, both count and sum are 0.
    return total / jnp.maximum(agree.sum(0), 1)


def _after(thin: Callable, merge: Callable) -> Callable:
    return lambda changes, weights, options: merge(thin(changes, options), weights, options)


_KEPT: dict[str, Callable] = {
    "ties": _after(_largest, _elected),
    "dare_linear": _after(_dropped, _sum),
    "dare_ties": _after(_dropped, _elected),
    "magnitude_prune": _after(_largest, _sum),
}
_JOINS: dict[str, Callable] = {
    "cat": _cat,
    "svd": _svd,
    "linear": _of_factors(_sum),
    **{name: _of_factors(merge) for name, merge in _KEPT.items()},
    **{f"{name}_svd": _thinned(merge) for name, merge in _KEPT.items()},
}


def _one_rank(leaves: list) -> list:
    """Pads all ranks to the largest, so that one config describes every leaf."""
    rank = max(x.rank for x in leaves if isinstance(x, LoraArray))

    def fill(x: Any) -> Any:
        if not isinstance(x, LoraArray) or x.rank == rank:
            return x
        return _leaf(x, *_padded(*_flat(x), rank))

    return [fill(x) for x in leaves]
