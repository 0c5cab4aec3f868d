"""google-tunix: an adapted model in the GRPO learner, where the reference policy is its base."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix_trainers import SIZE, TOKENS

import lora_jax as lora

CONFIG = lora.LoraConfig(rank=4, target_modules=("q_proj", "v_proj", "lm_head"))
MESH = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
ROLLOUT = RolloutConfig(max_tokens_to_generate=8, max_prompt_length=8, kv_cache_size=32)
INPUTS = dict(positions=jnp.tile(jnp.arange(8), (4, 1)), cache=None)
INPUTS |= dict(attention_mask=np.ones((4, 8, 1), bool) & np.tri(8, dtype=bool))
REWARDS = []


class Letters:
    encode = staticmethod(lambda text, **_: [ord(x) - 61 for x in text])
    decode = staticmethod(lambda ids, **_: "".join(chr(x + 61) for x in ids))
    pad_id, bos_id, eos_id = (staticmethod(lambda id=id: id) for id in range(3))


def reward(prompts, completions, **_):
    found = [sum(x < "Z" for x in text) / 8 for text in completions]
    REWARDS.append(float(np.mean(found)))
    ROLLOUT.seed = jax.random.PRNGKey(len(REWARDS))  # else tunix draws with one key in all steps
    return found


def main():
    base = Llama3(ModelConfig(**SIZE), rngs=nnx.Rngs(0))
    policy = lora.nnx.adapt(base, CONFIG, TOKENS, key=jax.random.key(0), **INPUTS)
    nnx.update(policy, jax.device_put(nnx.state(policy), NamedSharding(MESH, PartitionSpec())))
    before = base(TOKENS, **INPUTS)[0]
    run = RLTrainingConfig(actor_optimizer=optax.adam(3e-2), eval_every_n_steps=99, max_steps=20)
    meshes = dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), MESH)
    config = ClusterConfig(role_to_mesh=meshes, training_config=run, rollout_config=ROLLOUT)
    rl = RLCluster(actor=policy, reference=policy.base, tokenizer=Letters(), cluster_config=config)
    learner = GRPOLearner(rl, GRPOConfig(num_generations=8), reward)
    learner.train([{"prompts": np.array(["abc", "bcd", "cde", "def"])}] * 20)
    models = (policy, rl.inference_worker.get_model("reference"), rl.rollout.model())
    arrays = (jax.tree.leaves(nnx.state(x)) for x in models)
    ours, *others = ({x.unsafe_buffer_pointer() for x in found} for found in arrays)
    return {
        "rewards": (REWARDS[0], REWARDS[-1]),
        "arrays_beside_the_policy": len(set().union(*others) - ours),
        "base_difference": float(abs(models[1](TOKENS, **INPUTS)[0] - before).max()),
    }


if __name__ == "__main__":
    print(main())
