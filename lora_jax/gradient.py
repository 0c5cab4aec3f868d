"""Gradients with respect to what trains, taken through the whole tree."""

from collections.abc import Callable

import jax

from lora_jax.tree import check_trainable, combine, split


def value_and_grad(fn: Callable, *, has_aux: bool = False) -> Callable:
    """`jax.value_and_grad` of a function of LoRA parameters, with respect to what trains.

    `jax.grad` itself would compute the base's gradients too, and refuses a quantized base, whose
    codes are integers. Here the base is a constant: no gradient of it is computed or stored.

    Args:
      fn: `fn(lora_params, *args, **kwargs) -> scalar`, or `(scalar, aux)`.
      has_aux: whether `fn` returns something besides the scalar.

    Returns:
      `f(lora_params, *args, **kwargs) -> (value, gradients)`, value `(scalar, aux)` with
      `has_aux`. The gradients have the structure of `split(lora_params)[0]`: `None` in the base's
      places; `lora.masked(tx)` takes them with the whole tree.

    Raises:
      ValueError: nothing in `lora_params` trains.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": lora.quantize({"w": jnp.ones((64, 8))}, ["w"])["w"]}
      >>> fn = lora.lorafy(lambda p, x: jnp.sum(x @ p["w"]))
      >>> x = jnp.ones((2, 64))
      >>> plan = lora.plan(lora.LoraConfig(rank=2, target_modules=("w",)), fn, base, x)
      >>> params = lora.init(jax.random.key(0), plan, base)
      >>> value, grads = jax.jit(lora.value_and_grad(fn))(params, x)
      >>> grads["w"].b.shape, grads["w"].w
      ((2, 8), None)
    """

    def run(lora_params, *args, **kwargs):
        trainable, frozen = split(lora_params)
        check_trainable(trainable, "lora_params")

        def of_trainable(trainable, *args, **kwargs):
            return fn(combine(trainable, frozen), *args, **kwargs)

        return jax.value_and_grad(of_trainable, has_aux=has_aux)(trainable, *args, **kwargs)

    return run


def grad(fn: Callable, *, has_aux: bool = False) -> Callable:
    """`value_and_grad` without the value: `f(...) -> gradients`, or `(gradients, aux)`."""
    both = value_and_grad(fn, has_aux=has_aux)

    def run(lora_params, *args, **kwargs):
        value, grads = both(lora_params, *args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return run
