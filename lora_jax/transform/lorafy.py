"""`lorafy`: traces a model once, abstract in its adapted weights, and interprets the jaxpr."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_jax import compat, paths
from lora_jax.array import (
    Gain,
    LoraArray,
    LoraStack,
    RowsArray,
    SavedArray,
    check_whole,
    effective,
    is_leaf,
    is_lora,
    is_stack,
    rows_as_lora,
    widened,
)
from lora_jax.config.arguments import check_alone, check_function, check_key
from lora_jax.dims import stack_dims
from lora_jax.quant.array import QuantArray
from lora_jax.transform import base_weight, dora, eager, origins
from lora_jax.transform.dora import gains
from lora_jax.transform.implicit import Implicit, Note, is_implicit, materialize
from lora_jax.transform.interpret import Context, evaluate
from lora_jax.transform.many import run
from lora_jax.transform.many.grouped import Strategy
from lora_jax.transform.many.rules import RowAdapters
from lora_jax.transform.many.token_axis import follow
from lora_jax.transform.primitives import PRIMITIVES

_CALL = "lorafy(fn)(lora_params, ...)"


def lorafy(
    fn: Callable,
    *misplaced: Never,
    strict: bool = False,
    reverse_only: bool = False,
    row_axes: Any = 0,
    out_axes: Any = 0,
    token_axes: Any = 1,
    adapter_strategy: Strategy | None = None,
) -> Callable:
    """Makes a function of parameters accept LoRA parameters.

        y = x @ W + s · (x @ A) @ B

    in place of every `x @ W` whose `W` is a `LoraArray`; nothing else changes. The result
    composes with jit, grad, vmap, scan, remat and shard_map, inside and outside. With no
    `LoraArray` in its first argument it is `fn` itself.

    `fn` must be pure. An un-jitted call traces `fn` again and compiles what it has not compiled
    before; un-jitted gradients and calls with many adapters compile every time. jit the result.

    Args:
      fn: `fn(params, *args, **kwargs)`, a pure function of a parameter tree.
      strict: make it an error when a weight must be materialized because an operation on it has
        no low-rank form; otherwise that is a `MaterializedWarning` and the result stays exact.
      reverse_only: give the thin products a backward of their own, which saves a fifth of a
        training step on a CPU; JAX then refuses forward-mode differentiation (`jvp`, `hessian`).
        For training with `jax.grad`.
      row_axes: with many adapters (`lora.stack`): where the arguments number the rows, a prefix
        of `(args, kwargs)` with None for what all rows share; by default every array's first axis.
      out_axes: likewise for the output, whose axis there has size 1 for a batch of one row.
      token_axes: with an adapter for each token: where the arguments number the tokens, a prefix
        of `(args, kwargs)` with None where they do not; by default the second axis of every array
        that has as many entries there as there are tokens.
      adapter_strategy: how products with the rows' adapters are computed: "gathered" copies each
        row's factors, "grouped" sorts the rows (or tokens) by adapter, "ragged" is "grouped" with
        `jax.lax.ragged_dot` also where that is slow; by default the shapes decide, see
        `lora_jax.transform.many.grouped.choose_strategy`, and over explicit mesh axes it is
        "gathered". The results differ by rounding only.

    Returns:
      `fn'(lora_params, *args, lora_key=None, adapter_ids=None, **kwargs)`. A `lora_key` (a PRNG
      key) turns the adapters' dropout on for that call. `adapter_ids` int (rows,) gives each row
      its own adapter of a stack, -1 the plain base: row k of the result is what `fn` gives for a
      batch of row k alone with adapter `adapter_ids[k]`. `adapter_ids` int (rows, tokens) gives
      each token its own: every product of a token's activation with a weight takes that token's
      adapter, while what mixes tokens (attention) mixes them as ever.

    Raises:
      ValueError: under `strict`, naming leaf, primitive and source line; ids without a stack, a
        stack without ids, an id out of range (traced ids: NaN in its row, and an error under
        `jax.experimental.checkify.checkify`), an argument with another number of rows; an adapter
        for each token where the tokens' axis of the model cannot be followed, such as behind a
        convolution over them, or on a leaf that trains whole.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> def fn(params, x):
      ...     return x @ params["w"]
      >>> x = jnp.ones((2, 4))
      >>> plan = lora.plan(lora.LoraConfig(rank=2, target_modules=("w",)), fn, params, x)
      >>> lora_params = lora.init(jax.random.key(0), plan, params)
      >>> jax.jit(lora.lorafy(fn))(lora_params, x).shape
      (2, 3)

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3.
    """

    check_function(_CALL, fn)
    check_alone(_CALL, misplaced)

    def one(
        tree: Any, *, args: tuple, kwargs: dict, key: Any, adapters: RowAdapters | None = None
    ) -> Any:
        context = Context(
            PRIMITIVES, strict=strict, reverse_only=reverse_only, row_adapters=adapters
        )
        return _run(context, fn, tree, args=args, kwargs=kwargs, lora_key=key)

    @functools.wraps(fn)
    def adapted(*args, lora_key: Any = None, adapter_ids: Any = None, **kwargs) -> Any:
        lora_params, args = _parameters(fn, args, kwargs)
        stacks = [x for x in jax.tree.leaves(lora_params, is_leaf=is_lora) if is_stack(x)]
        if adapter_ids is None and not stacks:
            return one(lora_params, args=args, kwargs=kwargs, key=lora_key)

        call = run.Call(args, kwargs, key=lora_key, row_axes=row_axes, out_axes=out_axes)
        if adapter_ids is not None:
            if stacks and stacks[0].chosen:
                raise ValueError(
                    "`lora_params` has the rows' adapters already, from `lora.select`: leave "
                    "`adapter_ids` out, or pass the stack itself"
                )
            options = {"token_axes": token_axes, "strategy": adapter_strategy}
            return run.run(one, lora_params, adapter_ids, call, **options)
        if not stacks[0].chosen:
            raise ValueError(
                "`lora_params` holds a stack of adapters: pass `adapter_ids`, one for each row"
            )
        return run.gathered(one, lora_params, call)

    return adapted


def _parameters(fn: Callable, args: tuple, kwargs: dict) -> tuple[Any, tuple]:
    """The parameters, also where they are given by keyword, and the other positional arguments."""
    if args:
        return args[0], args[1:]
    # By the base function's own name too, by which its callers may give them.
    first = next(iter(inspect.signature(fn).parameters), "")
    for name in ("lora_params", first):
        if name in kwargs:
            return kwargs.pop(name), ()
    raise TypeError(f"`lora_params` is missing: call `lora.{_CALL}`")


def _run(
    context: Context,
    fn: Callable,
    lora_params: Any,
    args: tuple,
    kwargs: dict,
    lora_key: Any = None,
) -> Any:
    check_whole(lora_params)
    if lora_key is not None:
        check_key("lora_key", lora_key)
    flat, tree = jax.tree_util.tree_flatten_with_path(lora_params, is_leaf=is_leaf)
    leaves = [effective(x) if isinstance(x, SavedArray) else x for _, x in flat]
    entered = LoraArray | RowsArray | QuantArray | LoraStack
    where = [i for i, x in enumerate(leaves) if isinstance(x, entered)]
    if not where:
        # No leaf to interpret: nothing is traced.
        return fn(jax.tree.unflatten(tree, leaves), *args, **kwargs)
    # These leaves become inputs of the traced function; all others it closes over.
    originals = [leaves[i] for i in where]
    # Arguments that number tokens are inputs too: their axis is followed through the jaxpr.
    tokens = _Tokens(context, args, kwargs)
    staged, finish = _stage(fn, tree, leaves, where=where, tokens=tokens)
    # The base function sees a leaf's plain weight; the interpreter puts the leaf in its place.
    inputs = [_abstract(getattr(x, "w", x)) for x in originals]
    jaxpr = jax.make_jaxpr(staged)(*inputs, *tokens.arrays)
    jaxpr, consts = compat.open_jaxpr(jaxpr)
    context = tokens.followed(context, jaxpr, len(inputs))
    _note_origins(context, jaxpr, consts, leaves=leaves, tokens=tokens)
    names = [paths.spell(flat[i][0]) for i in where]
    # For each output the number of the leaf that it is, or None: a model that returns its weight
    # (a cache, a state) gets the leaf itself back, adapter and all.
    unchanged: list = []

    def compute(entered: Sequence, consts: Sequence, arrays: Sequence, lora_key: Any) -> list:
        values = [
            _enter(context, x, name, lora_key) for x, name in zip(entered, names, strict=True)
        ]
        outs = evaluate(context, jaxpr, consts, [*values, *arrays])
        unchanged[:] = [_position(x, values) for x in outs]
        outs = [x for x, same in zip(outs, unchanged, strict=True) if same is None]
        return [materialize(x) if is_implicit(x) else x for x in outs]

    # A jaxpr without inner jaxprs compiles nothing large, and runs operation by operation.
    arrays = (originals, consts, tokens.arrays, lora_key)
    once = _has_inner_jaxpr(context, jaxpr)
    computed = iter(eager.call(compute, *arrays) if once else compute(*arrays))
    return finish([next(computed) if i is None else originals[i] for i in unchanged])


def _note_origins(
    context: Context, jaxpr: Any, consts: Sequence, leaves: Sequence, tokens: "_Tokens"
) -> None:
    """Finds what depends on the arguments. Arrays are recognized by identity, as JAX keeps them."""
    arguments = {id(x) for x in tokens.flat if compat.is_array(x)}
    parameters = {id(x) for x in leaves} - arguments
    # Where no argument is an array, what the function closes over counts as its data.
    closed = origins.CLOSED if arguments else origins.DATA
    for v, x in zip(jaxpr.constvars, consts, strict=True):
        known = id(x) in parameters
        context.origins[v] = (
            origins.DATA if id(x) in arguments else origins.CONSTANT if known else closed
        )
    weights = len(jaxpr.invars) - len(tokens.arrays)
    given = [origins.CONSTANT] * weights + [origins.DATA] * len(tokens.arrays)
    origins.follow(context.origins, jaxpr, given, closed=closed, primitives=context.primitives)


def _has_inner_jaxpr(context: Context, jaxpr: Any) -> bool:
    """Whether an operation at the top holds a jaxpr."""
    rows = (context.primitives.get(compat.name_of(eqn)) for eqn in jaxpr.eqns)
    return any(row is not None and row.body for row in rows)


def materializations(fn: Callable, lora_params: Any, args: Sequence, kwargs: dict) -> dict:
    """What a call would materialize, found without computing or allocating anything.

    Args:
      fn: the base function.
      lora_params: with `LoraArray`s of arrays or `ShapeDtypeStruct`s.
      args, kwargs: of the call; arrays may be `ShapeDtypeStruct`s.

    Returns:
      `(path, primitive, source line)` to the reason.
    """
    context = Context(PRIMITIVES, strict=False, quiet=True)
    leaves, tree = jax.tree.flatten((lora_params, tuple(args), dict(kwargs)))
    # Integers and bools of the parameters stay concrete: they may decide a Python branch. Arguments
    # are abstract.
    own = len(jax.tree.leaves(lora_params))
    loose = [
        i
        for i, x in enumerate(leaves)
        if hasattr(x, "dtype") and hasattr(x, "shape")
        and (i >= own or isinstance(x, jax.ShapeDtypeStruct)
             or jnp.issubdtype(x.dtype, jnp.inexact))
    ]  # fmt: skip

    def call(given: Sequence) -> Any:
        full = list(leaves)
        for i, x in zip(loose, given, strict=True):
            full[i] = x
        lora_params, args, kwargs = jax.tree.unflatten(tree, full)
        out = _run(context, fn, lora_params, args=args, kwargs=kwargs)
        return [x for x in jax.tree.leaves(out) if compat.is_array(x)]

    jax.eval_shape(call, [leaves[i] for i in loose])
    return context.warned


class _Tokens:
    """The arguments of a call that number tokens which have an adapter each; else none."""

    def __init__(self, context: Context, args: tuple, kwargs: dict) -> None:
        self.plain = args, kwargs
        adapters = context.row_adapters
        axes = () if adapters is None else adapters.token_axes or ()
        self.flat, self.tree = jax.tree.flatten((args, kwargs), is_leaf=lambda x: x is None)
        self.axes = {i: axis for i, axis in enumerate(axes) if axis is not None}
        self.arrays = [self.flat[i] for i in self.axes]

    def call(self, arrays: Sequence) -> tuple[tuple, dict]:
        """The arguments with other arrays in these places."""
        if not self.axes:
            return self.plain
        full = list(self.flat)
        for i, x in zip(self.axes, arrays, strict=True):
            full[i] = x
        return jax.tree.unflatten(self.tree, full)

    def followed(self, context: Context, jaxpr: Any, weights: int) -> Context:
        """The context with the places of the tokens in a jaxpr of the weights and these arrays."""
        if context.row_adapters is None or not self.axes:
            return context
        axes = [frozenset()] * weights + [frozenset({axis}) for axis in self.axes.values()]
        positions = follow(jaxpr, axes, context.primitives)
        adapters = dataclasses.replace(context.row_adapters, positions=positions)
        return dataclasses.replace(context, row_adapters=adapters)


def _stage(
    fn: Callable, tree: Any, leaves: Sequence, where: Sequence[int], tokens: _Tokens
) -> tuple[Callable, Callable]:
    """`fn` on the adapted weights (and what numbers tokens), and what rebuilds its output.

    Everything else is closed over, so that bools, strings and module definitions stay Python's
    and outer tracers become constants of the jaxpr.
    """
    seen: dict = {}

    def staged(*given) -> Any:
        full = list(leaves)
        for i, w in zip(where, given, strict=False):
            full[i] = w
        args, kwargs = tokens.call(given[len(where) :])
        out, seen["tree"] = jax.tree.flatten(fn(jax.tree.unflatten(tree, full), *args, **kwargs))
        # Outputs that are no arrays (strings, None) do not pass through the jaxpr.
        seen["static"] = [None if compat.is_traceable(x) else (x,) for x in out]
        return [x for x in out if compat.is_traceable(x)]

    def finish(arrays: Sequence) -> Any:
        rest = iter(arrays)
        return jax.tree.unflatten(
            seen["tree"], [next(rest) if s is None else s[0] for s in seen["static"]]
        )

    return staged, finish


@jax.custom_jvp
def _without_dropout(a: Float[Array, "..."]) -> Float[Array, "..."]:
    """`a` of a call that has no key for its dropout: differentiating by it is a warning."""
    return a


@_without_dropout.defjvp
def _warned(primals: Sequence, tangents: Sequence) -> tuple:
    # JAX calls this in training only: generation and evaluation need no dropout.
    warnings.warn(
        "the adapters have `dropout` above 0 and train without it: pass a new "
        "`lora_key=jax.random.key(...)` to each training call, or set dropout=0",
        stacklevel=2,
    )
    return primals[0], tangents[0]


def _abstract(w: Any) -> Any:
    """What the model is traced with: the array itself (its sharding counts), or its aval."""
    return w if compat.is_array(w) else jax.ShapeDtypeStruct(w.shape, w.dtype)


def _enter(
    context: Context, x: LoraArray | RowsArray | QuantArray | LoraStack, path: str, lora_key: Any
) -> Implicit:
    if isinstance(x, QuantArray):
        return base_weight.without_adapter(x, Note(path))
    x = rows_as_lora(x) if isinstance(x, RowsArray) else x
    gain = None
    if isinstance(x, LoraStack):
        gain = gains(x)
    elif isinstance(x.m, Gain):
        gain = x.m.value
    elif x.m is not None:
        gain = dora.gain(x)
    key = None
    if lora_key is not None and x.dropout > 0:
        if not jnp.issubdtype(lora_key.dtype, jax.dtypes.prng_key):
            lora_key = jax.random.wrap_key_data(lora_key)  # an old-style uint32 key
        # From the path, not from a counter: a leaf's masks do not depend on other leaves.
        key = paths.fold_path(lora_key, path)
        stack = tuple(x.shape[d] for d in stack_dims(x.roles))
        key = jax.random.split(key, stack) if stack else key
    off = x.dropout > 0 and key is None
    return Implicit(
        w=x.w,
        a=_without_dropout(x.a) if off else x.a,
        b=x.b,
        # Its gradient is not stopped: an optimizer on the whole tree, which moves the base, moves
        # the scale too, and that is how `save_peft` notices it. A model in float64 may scale it.
        scale=x.scale.astype(widened(x.w.dtype)),
        gain=gain,
        key=key,
        roles=x.roles,
        dropout=x.dropout,
        path=Note(path),
        reverse_only=context.reverse_only,
        bias=x.bias,
        adapter_count=x.count if isinstance(x, LoraStack) else 0,
    )


def _position(x: Any, values: Sequence) -> int | None:
    """Which of the values an output is, if the model returned a weight as it was."""
    return next((i for i, value in enumerate(values) if is_implicit(x) and value is x), None)
