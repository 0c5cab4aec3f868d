"""The base weights a PEFT directory of another start expects."""

import dataclasses

from lora_jax.array import leaves_by_path
from lora_jax.plan.leaf import Plan
from lora_jax.quant.array import is_quant


def as_read(plan: Plan, params, *, source: str, checked: bool = False) -> Plan:
    """The plan of an adapter that is read from a file, over the base at hand.

    Over floats LoftQ is repeated, which gives the base the adapter was trained on. A base that is
    quantized already is taken for it; after more than one turn that is not the one that
    quantizing gives.

    Args:
      plan: of the adapter's config on `params`.
      params: the base.
      source: what messages call the adapter.
      checked: whether the base is compared with the adapter's otherwise.

    Raises:
      ValueError: the base cannot be the adapter's.
    """
    if plan.config.init != "loftq":
        return plan

    held = leaves_by_path(params)
    quantized = [leaf.path for leaf in plan.adapted if is_quant(held[leaf.path])]
    if not quantized:
        return plan
    if len(quantized) < len(plan.adapted):
        lost = next(leaf.path for leaf in plan.adapted if leaf.path not in quantized)
        raise ValueError(
            f"{source}: the adapter was started by LoftQ, but of the base `{quantized[0]}` is "
            f"quantized and `{lost}` is not: load it over the base in floats"
        )
    turns = plan.config.loftq_config["loftq_iter"]
    if turns > 1 and not checked:
        raise ValueError(
            f"{source}: the adapter was started by LoftQ in {turns} turns, whose base is not the "
            "weights quantized: load it over the base in floats, which is quantized so again"
        )
    config = dataclasses.replace(plan.config, init="default", loftq_config={})
    return dataclasses.replace(plan, config=config)
