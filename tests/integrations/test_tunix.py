"""google-tunix pins versions that the test environment has not: an environment of its own."""

from tests.support.integrations import figures_of

# q and v of two layers, rank 4: inputs of 32, outputs of 32 and 16.
TRAINED = 2 * 4 * (32 + 32 + 32 + 16)


def test_tunix_trainers():
    found = figures_of("tunix_trainers", "google-tunix", "flax", "optax")
    # Adam's two moments, and two counters of steps.
    assert found["optimizer_numbers"] == 2 * TRAINED + 2
    assert min(found["moved"], found["policy_moved"]) > 0.1
    assert found["checkpoint_difference"] == found["base_difference"] == 0


def test_tunix_grpo():
    found = figures_of("tunix_grpo", "google-tunix", "flax", "optax")
    assert found["rewards"][0] < 0.5 and found["rewards"][1] > 0.9
    # The reference policy and the one that samples hold no array that the trained one has not.
    assert found["arrays_beside_the_policy"] == found["base_difference"] == 0
