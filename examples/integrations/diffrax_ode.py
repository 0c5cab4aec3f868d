"""diffrax: a neural ODE adapted through its solver; gradients by three adjoints."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

import lora_jax as lora

ADJOINTS = {
    "checkpoints": diffrax.RecursiveCheckpointAdjoint(),
    "direct": diffrax.DirectAdjoint(),
    "backsolve": diffrax.BacksolveAdjoint(),
}
TIMES = jnp.linspace(0.0, 1.0, 5)


def solve(field, start, adjoint):
    """The states at TIMES of dy/dt = field(y)."""
    term, times = diffrax.ODETerm(lambda t, y, field: field(y)), diffrax.SaveAt(ts=TIMES)
    steps = diffrax.PIDController(rtol=1e-5, atol=1e-5)
    options = dict(saveat=times, stepsize_controller=steps, adjoint=adjoint)
    return diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, 0.1, start, field, **options).ys


def main():
    field = eqx.nn.MLP(3, 3, 32, 2, activation=jnp.tanh, key=jax.random.key(0))
    start = jnp.array([1.0, -0.5, 0.3])
    config = lora.LoraConfig(rank=2, target_modules="all-linear", init="random")
    found = {}
    for name, adjoint in ADJOINTS.items():

        def run(field, start, adjoint=adjoint):
            return solve(field, start, adjoint)

        adapted = lora.init(jax.random.key(1), lora.plan(config, run, field, start), field)
        trained, frozen = lora.split(adapted)

        def loss(trained, frozen=frozen, run=run, through=lora.lorafy):
            return jnp.sum(through(run)(lora.combine(trained, frozen), start) ** 2)

        def merged(trained, frozen=frozen, run=run):
            return jnp.sum(run(lora.merge(lora.combine(trained, frozen)), start) ** 2)

        value, grads = eqx.filter_jit(jax.value_and_grad(loss))(trained)
        other, expected = eqx.filter_jit(jax.value_and_grad(merged))(trained)
        apart = jax.tree.map(lambda a, b: float(abs(a - b).max() / abs(b).max()), grads, expected)
        found[f"{name}_difference"] = float(abs(value - other) / other)
        found[f"{name}_gradient_difference"] = max(jax.tree.leaves(apart))
    return found


if __name__ == "__main__":
    print(main())
