"""The change of every matrix between two trees, and its singular values and directions.

Computed on the host in float64, one matrix at a time. The change of an adapter, `ΔW = s·A·B`, stays
in factors and is never formed: with `A = Qa·Ra` and `Bᵀ = Qb·Rb`, the matrix `s·Ra·Rbᵀ` has the
same singular values. Those of a dense change are the roots of the eigenvalues of `ΔW·ΔWᵀ` or
`ΔWᵀ·ΔW`, whichever is smaller: in float64 they are accurate down to about 1e-8·σ1, below the
resolution of float32 weights, at a tenth of the cost of a singular value decomposition.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from scipy.linalg import eigh

from lora_jax import paths
from lora_jax.array import LoraArray, check_whole, dense, is_leaf, is_lora
from lora_jax.config import matching
from lora_jax.config.lora import LoraConfig
from lora_jax.dims import sizes, to_matrix
from lora_jax.merge import merge

# Names of leaves that are vectors: stacked over layers they have two dims, but are no matrices.
_VECTORS = ("scale", "bias")
_EPSILON = float(np.finfo(np.float64).eps)


class Factors(NamedTuple):
    """A change `A @ B`; `a` includes the adapter's scale."""

    a: Float[np.ndarray, "n r"]
    b: Float[np.ndarray, "r m"]


class Change(NamedTuple):
    """How one matrix changed.

    Attributes:
      path: the leaf's path.
      index: position along its stack dims, () without any.
      before: the matrix before, `(in, out)`.
      delta: its change, dense or as factors.
    """

    path: str
    index: tuple[int, ...]
    before: Float[np.ndarray, "n m"]
    delta: "Float[np.ndarray, 'n m'] | Factors"

    @property
    def name(self) -> str:
        """The path with its stack indices, `layers.q_proj.kernel[3]`."""
        return self.path + "".join(f"[{i}]" for i in self.index)


class Directions(NamedTuple):
    """The leading part of a singular value decomposition, largest first.

    Attributes:
      inputs: left vectors of the `(in, out)` matrix.
      values: singular values.
      outputs: right vectors.
    """

    inputs: Float[np.ndarray, "n k"]
    values: Float[np.ndarray, " k"]
    outputs: Float[np.ndarray, "m k"]


def changes(
    before: Any, after: Any = None, where: tuple[str, ...] | str | None = None
) -> Iterator[Change]:
    """The change of every matrix; see `lora_jax.analysis.spectrum` for the arguments.

    Raises:
      ValueError: trees of different structure or shapes, values that are not finite, or no matrix.
    """
    for tree in (before,) if after is None else (before, after):
        check_whole(tree)
    nothing = True
    for path, x, y in _alone(before) if after is None else _pairs(before, after):
        if len(x.shape) > 1 and _wanted(where, path):
            nothing = False
            yield from _of_leaf(path, x, y)
    if nothing:
        raise ValueError(
            "no matrix to compare"
            + (f" matches `where` = {where!r}" if where is not None else "")
            + "; pass trees with weights of two or more dims, or a tree with LoRA leaves alone"
        )


def _wanted(where: tuple[str, ...] | str | None, path: str) -> bool:
    # A user who names modules means their vectors too.
    if where is None:
        return path.rpartition(".")[2] not in _VECTORS

    config = LoraConfig(target_modules=where)
    return any(matching.is_target(config, name) for name in (path, paths.module_of(path)))


def _alone(tree: Any) -> Iterator[tuple[str, Any, Any]]:
    for key_path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        if is_lora(x):
            yield paths.spell(key_path), x.w, x


def _pairs(before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    first, tree = jax.tree_util.tree_flatten_with_path(before, is_leaf=is_leaf)
    second, other = jax.tree_util.tree_flatten_with_path(after, is_leaf=is_leaf)
    # Compared with adapters as leaves, so that a plain tree and an adapted one match.
    if tree != other:
        raise ValueError(
            f"`before` and `after` are trees of different structure{_apart(first, second)}; pass "
            "the same model's parameters before and after training"
        )
    for (key_path, x), (_, y) in zip(first, second, strict=True):
        path = paths.spell(key_path)
        if tuple(x.shape) != tuple(y.shape):
            raise ValueError(
                f"`{path}` has shape {tuple(x.shape)} before and {tuple(y.shape)} after; pass the "
                "same model's parameters before and after training"
            )
        yield path, x, y


def _apart(first: list, second: list) -> str:
    """A phrase that names the first leaf that only one of two trees has."""
    names = [[paths.spell(key_path) for key_path, _ in flat] for flat in (first, second)]
    for mine, other, which in ((*names, "before"), (*names[::-1], "after")):
        if extra := [name for name in mine if name not in other]:
            return f": only `{which}` has `{extra[0]}`"
    return ""


def _of_leaf(path: str, x: Any, y: Any) -> Iterator[Change]:
    """The change of each matrix of a leaf."""
    roles = next((leaf.roles for leaf in (x, y) if isinstance(leaf, LoraArray)), None)
    base = _matrices(x, roles)
    _check_finite(path, base)
    # With a magnitude `m` (DoRA), or over another base, the change is not A @ B: then the merged
    # weight is compared.
    if isinstance(y, LoraArray) and y.m is None and _same(x, y.w):
        deltas = _factors(y)
        _check_finite(path, *deltas)
        parts = (Factors(deltas.a[i], deltas.b[i]) for i in np.ndindex(*base.shape[:-2]))
    else:
        new = _matrices(y, roles)
        _check_finite(path, new)
        parts = (new[i].astype(np.float64) - base[i] for i in np.ndindex(*base.shape[:-2]))
    for index, delta in zip(np.ndindex(*base.shape[:-2]), parts, strict=True):
        yield Change(path, index, base[index].astype(np.float64), delta)


def _check_finite(path: str, *arrays: np.ndarray) -> None:
    if not all(np.isfinite(x).all() for x in arrays):
        raise ValueError(f"`{path}`: the change is not finite (NaN or infinity)")


def _same(x: Any, y: Any) -> bool:
    """Whether an adapter's base equals the weight before."""
    if x is y:
        return True
    plain = not is_leaf(x) and not is_leaf(y)
    return plain and x.dtype == y.dtype and bool(np.array_equal(x, y))


def _matrices(x: Any, roles: str | None) -> np.ndarray:
    """A leaf's weight with its adapter merged, as `(*stack, in, out)`."""
    w = dense(merge(x))
    return np.asarray(w if roles is None else to_matrix(w, roles)).astype(np.float32)


def _factors(x: LoraArray) -> Factors:
    """The factors `(*stack, in, r)`, with the scale, and `(*stack, r, out)`."""
    # `a` has all input dims of the weight, and `b` all output dims: as matrices they have one each.
    stack, fan_in, fan_out = sizes(x.shape, x.roles)
    a, b = (np.asarray(f).astype(np.float64) for f in (x.a, x.b))
    scale = np.asarray(x.scale, np.float64)[..., None, None]
    return Factors(a.reshape(*stack, fan_in, x.rank) * scale, b.reshape(*stack, x.rank, fan_out))


def singular_values(delta: np.ndarray | Factors) -> Float[np.ndarray, " k"]:
    """All singular values, largest first: min(in, out) of them, or the rank of the factors."""
    if isinstance(delta, Factors):
        return np.linalg.svd(_small(delta)[1], compute_uv=False)
    return _roots(np.linalg.eigvalsh(_gram(delta)))


def directions(delta: np.ndarray | Factors, top: int | None = None) -> Directions:
    """The `top` largest singular values with their vectors; all by default.

    Values that rounding alone may explain are left out: below `n·ε·σ1` for factors and below
    `√(n·ε)·σ1` for a dense change, whose squares are computed.
    """
    if isinstance(delta, Factors):
        (first, second), small = _small(delta)
        u, values, vt = np.linalg.svd(small)
        return _cut(Directions(first @ u, values, second @ vt.T), top, len(small) * _EPSILON)
    gram = _gram(delta)
    size = len(gram)  # the smaller side
    if top is None or top >= size:
        squares, vectors = eigh(gram, driver="evd")  # the fastest for all of them
    else:
        squares, vectors = eigh(gram, subset_by_index=[size - top, size - 1])
    values, vectors = _roots(squares), vectors[:, ::-1]  # eigh's are rising
    # The vectors of the other side follow from ΔW·v = σ·u; 1e-300 avoids 0/0, and `_cut` drops
    # those vectors.
    wide = delta.shape[0] <= delta.shape[1]
    other = (delta.T if wide else delta) @ vectors / np.maximum(values, 1e-300)
    found = (vectors, values, other) if wide else (other, values, vectors)
    return _cut(Directions(*found), top, np.sqrt(size * _EPSILON))


def _cut(found: Directions, top: int | None, noise: float) -> Directions:
    real = int(np.sum(found.values > noise * found.values[0]))
    keep = real if top is None else min(top, real)
    return Directions(found.inputs[:, :keep], found.values[:keep], found.outputs[:, :keep])


def _small(delta: Factors) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Bases of both sides, and the `(r, r)` matrix between them."""
    first, upper = np.linalg.qr(delta.a)
    second, lower = np.linalg.qr(delta.b.T)
    return (first, second), upper @ lower.T


def _gram(delta: np.ndarray) -> np.ndarray:
    return delta @ delta.T if delta.shape[0] <= delta.shape[1] else delta.T @ delta


def _roots(rising: np.ndarray) -> np.ndarray:
    # Rounding makes small eigenvalues negative.
    return np.sqrt(np.maximum(rising[::-1], 0.0))
