"""The starts of A and B: one row each, with the facts that other rooms need.

A new start is a row of `STARTS` and a function of the same name in `lora_jax.methods.starts`.
"""

import re
from typing import Any, Literal, NamedTuple

BaseChange = Literal["none", "repeatable", "unrepeatable"]


class StartRow(NamedTuple):
    """One way to start an adapter.

    Attributes:
      name: the value of `LoraConfig.init`, where `N` stands for a number.
      base_change: how the start changes the base weight. "none": not at all. "repeatable": in the
        same way each time, so a reader of the adapter can repeat it. "unrepeatable": by random
        numbers or data that the adapter's files do not hold.
      peft: PEFT's `init_lora_weights`, where it is not the name.
      known: whether `LoraConfig` accepts it; False for a start that occurs in PEFT's files only.
      allows_bias: whether PEFT combines it with `lora_bias`.
      allows_experts: whether PEFT has it for parameters of no linear layer.
    """

    name: str
    base_change: BaseChange = "none"
    peft: bool | None = None
    known: bool = True
    allows_bias: bool = False
    allows_experts: bool = False


STARTS = (
    StartRow("default", peft=True, allows_bias=True, allows_experts=True),
    StartRow("random", peft=False, allows_bias=True, allows_experts=True),
    StartRow("gaussian", allows_experts=True),
    StartRow("orthogonal"),
    StartRow("pissa", "repeatable"),
    StartRow("olora", "repeatable"),
    StartRow("loftq", "repeatable"),
    StartRow("eva", allows_experts=True),
    StartRow("mica"),
    # A randomized SVD: its result depends on PEFT's random numbers.
    StartRow("pissa_niter_N", "unrepeatable"),
    # Both read training data, which the adapter does not hold.
    StartRow("corda", "unrepeatable", known=False),
    StartRow("lora_ga", "unrepeatable", known=False),
)


def find_start(init: str) -> StartRow | None:
    """The row of a value of `LoraConfig.init`, or None."""
    for start in STARTS:
        if re.fullmatch(start.name.replace("N", r"[1-9]\d*"), init):
            return start
    return None


def base_change(init: str) -> BaseChange:
    """How a known start changes the base weight, see `StartRow`."""
    start = find_start(init)
    assert start is not None, init  # checked by LoraConfig
    return start.base_change


def lacking_for_experts(config: Any, *, experts: bool = True) -> str:
    """The setting of a `LoraConfig` that PEFT does not have for `target_parameters`, or "".

    Args:
      config: the config.
      experts: some are no linear layer's weight, which the starts of other rows begin with.
    """
    start = find_start(config.init)
    if experts and not (start and start.allows_experts):
        return f'init="{config.init}"'
    found = (name for name in ("use_dora", "lora_bias", "dropout") if getattr(config, name))
    return next((f"{name}={getattr(config, name)!r}" for name in found), "")
