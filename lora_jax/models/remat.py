"""Rematerialization: what is kept of a block for the backward pass, and where it lies.

    none           everything that the backward pass reads
    projections    the results of the projections, and what goes from block to block
    full           what goes from block to block

or any policy of `jax.checkpoint`. What is kept may lie in the host's memory meanwhile.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models.layers import PROJECTION, Specs, gather
from lora_jax.models.sharding import EXPERTS

# A policy, or its name; the bools are "none" and "full".
Remat = bool | str | Callable[..., Any]
NAMED = ("none", "projections", "full")
# JAX's policies that need no arguments.
_POLICIES = (
    "checkpoint_dots",
    "checkpoint_dots_with_no_batch_dims",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
    "nothing_saveable",
)
# Name of what goes from block to block, where it is offloaded.
_INPUT = "block_input"
_KEPT = {"full": (_INPUT,), "projections": (_INPUT, PROJECTION)}
_DOTS = ("dots_with_no_batch_dims_saveable", "checkpoint_dots_with_no_batch_dims")
# How weights and tokens of other devices come, and how a part of them is picked.
_BROUGHT = ("sharding_constraint", "all_gather", "dynamic_slice", "squeeze", "reshape")
_PLACES = {"offload_src": "device", "offload_dst": "pinned_host"}


def remat_name(remat: Remat) -> str:
    """The name of a rematerialization, for a text."""
    if callable(remat):
        return getattr(remat, "__qualname__", repr(remat)).partition(".")[0]
    return remat if isinstance(remat, str) else ("full" if remat else "none")


def check_remat(remat: Remat, offload: bool = False) -> None:
    """Refuses a rematerialization that does not exist.

    Raises:
      ValueError: it does not, or nothing of it can be offloaded.
    """
    name = remat_name(remat)
    if not callable(remat) and name not in (*NAMED, *_POLICIES):
        if name in dir(jax.checkpoint_policies):
            raise ValueError(
                f'`remat` "{name}" makes a policy from arguments: pass what '
                f"`jax.checkpoint_policies.{name}(...)` returns"
            )
        raise ValueError(
            f"`remat` must be one of {', '.join((*NAMED, *_POLICIES))}, or a policy of "
            f"`jax.checkpoint`, got {remat!r}"
        )
    if offload and (callable(remat) or name not in (*_KEPT, *_DOTS)):
        raise ValueError(
            f'`offload` is for `remat` {", ".join((*_KEPT, _DOTS[0]))}, got "{name}": choose one '
            "of them, or pass a policy that offloads, such as "
            "`jax.checkpoint_policies.offload_dot_with_no_batch_dims(...)`, without `offload`"
        )


def rematerialized(
    remat: Remat, gathered: Specs = (), *, offload: bool = False, tokens: str | None = None
) -> Callable[..., Callable]:
    """Wraps the function that runs one block, or one of `several` in turns; options: `Forward`."""
    name = remat_name(remat)
    if name == "none" and not gathered and tokens is None:
        return lambda run, several=False: run
    # What is gathered the backward pass gathers again: else every device would keep the weights of
    # all layers, and the keys of all tokens, until then.
    policy = _unless_gathered() if name == "none" else _policy(remat, offload)

    def wrap(run: Callable, several: bool = False) -> Callable:
        def block(state: Any, number: Any, carry: Any, *others: Any) -> Any:
            if offload:
                # JAX keeps an argument where it is, and what has a name where the policy puts it.
                carry = jax.tree.map(lambda x: checkpoint_name(x, _INPUT), carry)
            return run(gather(state, gathered) if gathered else state, number, carry, *others)

        # In a scan XLA cannot merge the two computations. Of several blocks in an iteration it
        # would compute all again before the backward pass of the last, and hold them together:
        # with the barrier each waits for the gradient of the block behind it.
        return jax.checkpoint(block, policy=policy, prevent_cse=several)

    return wrap


def _unless_gathered() -> Callable:
    """A policy of `jax.checkpoint` that keeps all but weights and tokens of other devices.

    Inside of a block, it takes the place of the policies of other checkpoints: the weights that
    each tile of a mixture picks must not be kept either, see `models.expert_rows`, nor what a
    device computes for the tokens of the axis `expert`, see `models.experts`. A kernel that runs
    under this axis is run again too; what `kept` names is not. Where a device computes its own rows
    it converts again: the adapters that a tile picks, and what experts make of a token.
    """
    outside = jax.sharding.get_abstract_mesh().manual_axes

    def policy(primitive: Any, *inputs: Any, **params: Any) -> bool:
        del inputs, params
        inside = set(jax.sharding.get_abstract_mesh().manual_axes).difference(outside)
        converts = bool(inside) and primitive.name == "convert_element_type"
        return EXPERTS not in inside and primitive.name not in _BROUGHT and not converts

    return policy


def _policy(remat: Remat, offload: bool) -> Callable | None:
    """The policy of a rematerialization that is not "none"."""
    policies = jax.checkpoint_policies
    if callable(remat):
        return remat
    name = remat_name(remat)
    if offload and name in _DOTS:
        return policies.offload_dot_with_no_batch_dims(*_PLACES.values())
    if offload:
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=list(_KEPT[name]), **_PLACES
        )
    if name == "projections":
        return policies.save_only_these_names(PROJECTION)
    return None if name == "full" else getattr(policies, name)
