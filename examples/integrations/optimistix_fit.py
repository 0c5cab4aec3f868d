"""optimistix: a layer defined by a fixed point and one by a root, adapted through its solvers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx

import lora_jax as lora

SOLVER = optx.FixedPointIteration(rtol=1e-6, atol=1e-6)
NEWTON = optx.Newton(rtol=1e-6, atol=1e-6)
IMPLICIT, CHECKPOINTS = optx.ImplicitAdjoint(), optx.RecursiveCheckpointAdjoint()
ADJOINTS = {"implicit": IMPLICIT, "checkpoints": CHECKPOINTS}


def step(y, args):
    params, x = args
    return jnp.tanh(y @ params["inner"] + x @ params["outer"])


def residual(y, args):
    return y - step(y, args)


def fixed_point(params, x, adjoint):
    start, args = jnp.zeros(x.shape[:1] + (8,)), (params, x)
    return optx.fixed_point(step, SOLVER, start, args, max_steps=64, adjoint=adjoint).value


def root(params, x, adjoint):
    start, args = jnp.zeros(8), (params, x[0])
    return optx.root_find(residual, NEWTON, start, args, max_steps=32, adjoint=adjoint).value


def main():
    keys = jax.random.split(jax.random.key(0), 4)
    x, found = jax.random.normal(keys[2], (5, 4)), {}
    params = {"inner": jax.random.normal(keys[0], (8, 8)) / 20}
    params["outer"] = jax.random.normal(keys[1], (4, 8))
    config = lora.LoraConfig(rank=2, alpha=1, target_modules=("inner", "outer"), init="random")
    for layer in (fixed_point, root):
        for name, adjoint in ADJOINTS.items():
            fn = eqx.Partial(layer, adjoint=adjoint)
            plan = lora.plan(config, fn, params, x)
            trained, frozen = lora.split(lora.init(keys[3], plan, params))

            def through(trained, frozen=frozen, fn=fn):
                return jnp.sum(lora.lorafy(fn)(lora.combine(trained, frozen), x) ** 2)

            def merged(trained, frozen=frozen, fn=fn):
                return jnp.sum(fn(lora.merge(lora.combine(trained, frozen)), x) ** 2)

            both = [jax.jit(jax.value_and_grad(f))(trained) for f in (through, merged)]
            apart = jax.tree.map(lambda a, b: float(abs(a - b).max()), *both)
            found[f"{layer.__name__}_{name}_difference"] = max(jax.tree.leaves(apart))
    return found


if __name__ == "__main__":
    print(main())
