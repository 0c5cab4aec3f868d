"""What the heads of tasks learn, as data: a loss, what its targets are, and what a run says of it.

    classes       -log softmax(z)[c]                                  one class of a text or a token
    several       mean over classes of log(1 + exp(z)) - y z          y is 1 for a text's classes
    values        mean over values of (z - y)^2
    answers       -(log softmax(z_1)[first] + log softmax(z_2)[last]) / 2    over a row's tokens

C classes or values, P places with a target.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lora_jax import compat
from lora_jax.dims import AnyArray
from lora_jax.models.heads import ANSWERS, CLASSIFICATION, TOKENS
from lora_jax.models.vit_config import IMAGES


def token_losses(logits: Float[Array, "p v"], targets: Int[AnyArray, " p"]) -> Float[Array, " p"]:
    """-log softmax(logits)[target] of each position, in float32."""
    # bfloat16 would round a loss near 10 to multiples of 1/16.
    logits = logits.astype(jnp.float32)
    if any(compat.spec_of(logits) or ()):
        # A look-up along an explicitly sharded dim has no rule in JAX; a sum has.
        chosen = jnp.arange(logits.shape[-1]) == targets[:, None]
        target = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    else:
        target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - target


def several_losses(
    logits: Float[Array, "p c"], targets: Float[AnyArray, "p c"]
) -> Float[Array, " p"]:
    """The mean over classes of their binary cross entropies."""
    logits = logits.astype(jnp.float32)
    return jnp.mean(jax.nn.softplus(logits) - targets * logits, axis=-1)


def value_losses(
    logits: Float[Array, "p c"], targets: Float[AnyArray, "p c"]
) -> Float[Array, " p"]:
    """The mean over values of the squared errors."""
    return jnp.mean(jnp.square(logits.astype(jnp.float32) - targets), axis=-1)


def answer_losses(
    logits: Float[Array, "b t 2"],
    mask: Bool[AnyArray, "b t"],
    rows: Int[AnyArray, " p"],
    targets: Int[AnyArray, "p 2"],
) -> Float[Array, " p"]:
    """The mean cross entropy of the first and the last token of answers; padding is no candidate.

    Args:
      logits: of all tokens.
      mask: true at real tokens.
      rows: the row of each place.
      targets: the first and the last token.
    """
    seen = jnp.where(mask[..., None], logits.astype(jnp.float32), -jnp.inf)
    shares = logits.astype(jnp.float32) - jax.nn.logsumexp(seen, axis=1, keepdims=True)
    found = shares[rows[:, None], targets, jnp.arange(2)]  # (p, 2)
    return -jnp.mean(found, axis=-1)


def accuracy(logits: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """The share whose most likely class is theirs."""
    del labels
    return {"accuracy": float(np.mean(logits.argmax(axis=-1) == targets))}


def token_scores(
    logits: np.ndarray, targets: np.ndarray, labels: Sequence[str]
) -> dict[str, float]:
    """Accuracy, and the F1 of all classes but `O` together."""
    found, outside = logits.argmax(axis=-1), labels.index("O") if "O" in labels else -1
    named = (found == targets) & (targets != outside)
    most = np.sum(found != outside) + np.sum(targets != outside)
    return {**accuracy(logits, targets, labels), "F1": _share(2 * np.sum(named), most)}


def several_scores(
    logits: np.ndarray, targets: np.ndarray, labels: Sequence[str]
) -> dict[str, float]:
    """The F1 of all classes together, of those that are likelier than not."""
    del labels
    found, wanted = logits > 0, targets > 0.5
    both = 2 * np.sum(found & wanted)
    return {"micro-F1": _share(both, np.sum(found) + np.sum(wanted))}


def value_scores(
    logits: np.ndarray, targets: np.ndarray, labels: Sequence[str]
) -> dict[str, float]:
    """Mean squared error, and Pearson's correlation of all values (NaN where one side is alike)."""
    del labels
    found, wanted = (np.asarray(x, np.float64).ravel() for x in (logits, targets))
    apart = [x - x.mean() for x in (found, wanted)]
    size = np.sqrt(np.prod([np.sum(x**2) for x in apart]))
    pearson = float(np.sum(apart[0] * apart[1]) / size) if size else float("nan")
    return {"MSE": float(np.mean((found - wanted) ** 2)), "Pearson": pearson}


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else 0.0


class Goal(NamedTuple):
    """What a head learns.

    Attributes:
      name: the problem of a classifier of texts or images, else the task.
      per: what has a target: a text or an image, a token, or a text's answer, two of its tokens.
      loss: (P, C) logits and targets -> (P,); of answers `answer_losses`.
      score: (n, C) logits, targets and the classes' names -> what a run says of evaluation data;
        None for answers, whose texts are compared.
      floats: a target is C floats, not a whole number.
    """

    name: str
    per: Literal["text", "token", "answer"]
    loss: Callable[..., Array]
    score: Callable[..., dict[str, float]] | None
    floats: bool = False

    def target(self, config: Any) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of one target."""
        if self.floats:
            return (len(config.labels),), "float32"
        return ((2,) if self.per == "answer" else ()), "int32"


GOALS: Mapping[str, Goal] = {
    goal.name: goal
    for goal in (
        Goal("single_label_classification", "text", token_losses, accuracy),
        Goal("multi_label_classification", "text", several_losses, several_scores, floats=True),
        Goal("regression", "text", value_losses, value_scores, floats=True),
        Goal(TOKENS, "token", token_losses, token_scores),
        Goal(ANSWERS, "answer", answer_losses, None),
    )
}


def goal_of(config: Any) -> Goal | None:
    """What a model's head learns; None without one, or for a head of words.

    Args:
      config: `model.config`, or None.

    Raises:
      ValueError: `problem_type` is none of transformers'.
    """
    task = getattr(config, "task", None)
    if task not in (CLASSIFICATION, IMAGES):
        return GOALS.get(task or "")
    one = "regression" if len(config.labels) == 1 else "single_label_classification"
    name = config.problem_type or one
    if name not in GOALS:
        known = ", ".join(goal.name for goal in GOALS.values() if goal.per == "text")
        raise ValueError(f"config: `problem_type` must be one of {known}, got {name!r}")
    return GOALS[name]
