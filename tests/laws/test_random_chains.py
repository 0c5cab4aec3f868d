"""Law: no random chain of operations on a weight gives anything but the merged weight's result.

Hypothesis draws the shape and the roles of two weights, a chain of operations on them, the way
the chain is wrapped, and how the outcome is consumed. Whether a rule or a fallback serves it does
not matter here: values and gradients must be those of `W + s·A·B`.
"""

import dataclasses
import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from jax import lax

import lora_jax as lora
from lora_jax.dims import factor_shapes

from tests.laws.case import normal
from tests.laws.cases import QUICK, assert_near

pytestmark = pytest.mark.once

RANK = 2


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation: its name and the numbers that fix it."""

    name: str
    numbers: tuple = ()


def leaf(seed: int, shape: tuple[int, ...], roles: str) -> lora.LoraArray:
    a, b = factor_shapes(shape, roles, RANK)
    stack = tuple(n for n, role in zip(shape, roles, strict=True) if role == "s")
    scale = 1 + jnp.abs(normal(seed + 3, *stack)) if stack else jnp.float32(1.5)
    return lora.LoraArray(
        normal(seed, *shape), normal(seed + 1, *a), normal(seed + 2, *b), scale, roles=roles
    )


def apply(step: Step, w, other):
    """The operation; `other` is the second weight after the same steps, of the same shape."""
    n = step.numbers
    match step.name:
        case "transpose":
            return jnp.transpose(w, n)
        case "reshape":
            return jnp.reshape(w, n)
        case "reverse":
            return jnp.flip(w, n)
        case "slice":
            axis, start, stop, stride = n
            return lax.slice_in_dim(w, start, stop, stride, axis)
        case "index":
            return lax.dynamic_index_in_dim(w, jnp.int32(n[1]), n[0], keepdims=False)
        case "take":
            return jnp.take(w, jnp.array(n[1:]), axis=n[0])
        case "scale":
            return w * n[0] if n[0] > 0 else -w / 2
        case "gain":
            return w * (1 + jnp.arange(w.shape[n[0]])).reshape([-1] + [1] * (w.ndim - 1 - n[0]))
        case "concatenate":
            return jnp.concatenate([w, other], n[0])
        case "stack":
            return jnp.stack([w, other], n[0])
        case "split":
            return sum(jnp.split(w, 2, n[0])) if n[1] else jnp.split(w, 2, n[0])[1]
        case "broadcast":
            return jnp.broadcast_to(w, (2, *w.shape))
        case "barrier":
            return lax.optimization_barrier((w, other))[0]
        case "jit":
            return jax.jit(lambda w: jnp.swapaxes(w, 0, -1))(w)
        case "cond":
            return lax.cond(jnp.max(w) > 0, lambda w: w, lambda w: 2 * w, w)
        case "absolute":
            return jnp.abs(w)
        case "pad":
            return jnp.pad(w, [(1, 0)] + [(0, 0)] * (w.ndim - 1))
        case "round_trip":
            return lax.scan(lambda c, x: (c, 2 * x), 0, w)[1]
    raise AssertionError(step.name)


def after(step: Step, shape: tuple[int, ...]) -> tuple[int, ...]:
    spec = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(functools.partial(apply, step), spec, spec).shape


@st.composite
def steps(draw, shape: tuple[int, ...]) -> Step:
    """One operation that fits the shape."""
    axis = draw(st.integers(0, len(shape) - 1))
    size = shape[axis]
    choices = ["transpose", "reshape", "reverse", "scale", "gain", "barrier", "slice", "jit"]
    choices += ["cond", "absolute", "pad", "round_trip"]
    if math.prod(shape) <= 200:
        choices += ["concatenate", "stack"]
        choices += ["broadcast"] if len(shape) < 5 else []
    choices += ["index", "take"] if len(shape) > 2 else ["take"]
    choices += ["split"] if size % 2 == 0 else []
    name = draw(st.sampled_from(choices))
    if name == "transpose":
        return Step(name, tuple(draw(st.permutations(range(len(shape))))))
    if name == "reshape":
        return Step(name, draw(_reshapes(shape)))
    if name == "slice":
        start = draw(st.integers(0, size - 1))
        stop, stride = draw(st.integers(start + 1, size)), draw(st.integers(1, 2))
        return Step(name, (axis, start, stop, stride))
    if name == "index":
        return Step(name, (axis, draw(st.integers(0, size - 1))))
    if name == "take":
        return Step(name, (axis, *draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3))))
    if name == "scale":
        return Step(name, (draw(st.sampled_from([0.5, -1.0])),))
    if name == "reverse":
        return Step(name, (axis,))
    if name == "split":
        return Step(name, (axis, draw(st.booleans())))
    return Step(name, (axis,))


@st.composite
def _reshapes(draw, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Splits a dim, joins two, or adds a unit dim."""
    axis = draw(st.integers(0, len(shape) - 1))
    kind = draw(st.sampled_from(["split", "join", "unit"]))
    divisors = [d for d in (2, 3) if shape[axis] % d == 0 and shape[axis] > d]
    if kind == "split" and divisors and len(shape) < 5:
        d = draw(st.sampled_from(divisors))
        return (*shape[:axis], d, shape[axis] // d, *shape[axis + 1 :])
    if kind == "join" and axis + 1 < len(shape) and len(shape) > 2:
        return (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
    return (*shape[:axis], 1, *shape[axis:]) if len(shape) < 5 else shape


@st.composite
def chains(draw):
    """A shape, the roles of two weights, steps, a wrapper and a consumption."""
    shape = tuple(draw(st.lists(st.sampled_from([2, 3, 4, 6]), min_size=2, max_size=3)))
    roles = st.permutations("io" + draw(st.sampled_from("sio"))[: len(shape) - 2]).map("".join)
    first, second = draw(roles), draw(roles)
    made: list[Step] = []
    now = shape
    for _ in range(draw(st.integers(0, 4))):
        step = draw(steps(now))
        made.append(step)
        now = after(step, now)
    dims = draw(st.permutations(range(len(now))))
    contracted = draw(st.integers(1, len(now)))
    batched = draw(st.integers(0, min(1, len(now) - contracted)))
    wrapper = draw(st.sampled_from(["plain", "jit", "checkpoint", "scan", "switch", "vmap"]))
    both = draw(st.booleans())
    return (shape, first, second, tuple(made), tuple(dims[:contracted]),
            tuple(dims[contracted : contracted + batched]), wrapper, both)  # fmt: skip


def consume(w, contracted, batched):
    """A dot_general with numbers in place of an activation, two rows of them."""
    sizes = [w.shape[d] for d in (*batched, *contracted)]
    x = jnp.sin(1 + jnp.arange(2.0 * math.prod(sizes))).reshape(*sizes, 2)
    k = len(batched)
    here = tuple(range(k, k + len(contracted)))
    return lax.dot_general(w, x, ((contracted, here), (batched, tuple(range(k)))))


def wrapped(f, wrapper: str):
    if wrapper == "jit":
        return jax.jit(f)
    if wrapper == "checkpoint":
        return jax.checkpoint(f)
    if wrapper == "scan":
        return lambda w, v: lax.scan(
            lambda c, _: (c + jnp.sin(f(w, v)), None),
            jnp.zeros(jax.eval_shape(f, w, v).shape),
            None,
            2,
        )[0]
    if wrapper == "switch":
        return lambda w, v: lax.cond(jnp.array(1) > 0, f, lambda w, v: 2 * f(w, v), w, v)
    if wrapper == "vmap":
        return lambda w, v: jax.vmap(lambda s: s * f(w, v))(jnp.arange(2.0))
    return f


EVERY_CHECK: Any = HealthCheck  # an enum, which its metaclass hides


@settings(max_examples=25, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(EVERY_CHECK))  # fmt: skip
@given(chains())
def test_random_chain(chain):
    shape, first, second, made, contracted, batched, wrapper, both = chain

    def run(w, v):
        for step in made:
            w, v = apply(step, w, v), apply(step, v, w)
        return consume(w, contracted, batched)

    def fn(p):
        return wrapped(run, wrapper)(p["w"], p["v"])

    params = {"w": leaf(1, shape, first), "v": leaf(11, shape, second)}
    if not both:
        params["v"] = params["v"].w
    trainable, frozen = lora.split(params)

    def value(f):
        def total(t):
            out = f(lora.combine(t, frozen))
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(total, has_aux=True)

    def everything(t):
        return value(lora.lorafy(fn))(t), value(lambda p: fn(lora.merge(p)))(t)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", lora.MaterializedWarning)
        mine, merged = jax.jit(everything, compiler_options=QUICK)(trainable)
    event("materialized" if caught else "low rank throughout")
    # Chains multiply by up to 6 four times over: cancellation costs float32 another digit.
    assert_near(mine, merged, 2e-4, str(chain))
