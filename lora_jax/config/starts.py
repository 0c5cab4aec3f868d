"""How A and B may start: one row a start, with the facts that other rooms need.

A new start is a row of `STARTS` and a function of the same name in `lora_jax.methods.starts`.
"""

import re
from typing import Literal, NamedTuple

BaseChange = Literal["none", "repeatable", "unrepeatable"]


class StartRow(NamedTuple):
    """One way to start an adapter.

    Attributes:
      name: the value of `LoraConfig.init`, where `N` stands for a number.
      base_change: what the start does to the base weight. "none": A and B are the whole adapter.
        "repeatable": the same each time, so a reader of the adapter can do it again.
        "unrepeatable": it depends on random numbers or data that the adapter does not hold.
      peft: PEFT's `init_lora_weights`, where it is not the name.
      known: whether `LoraConfig` accepts it; False for a start that only PEFT's files name.
      allows_bias: whether PEFT combines it with `lora_bias`.
    """

    name: str
    base_change: BaseChange = "none"
    peft: bool | None = None
    known: bool = True
    allows_bias: bool = False


STARTS = (
    StartRow("default", peft=True, allows_bias=True),
    StartRow("random", peft=False, allows_bias=True),
    StartRow("gaussian"),
    StartRow("orthogonal"),
    StartRow("pissa", "repeatable"),
    StartRow("olora", "repeatable"),
    StartRow("loftq", "repeatable"),
    StartRow("eva"),
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
    """What a known start does to the base weight, see `StartRow`."""
    start = find_start(init)
    assert start is not None, init  # LoraConfig checks its `init`
    return start.base_change
