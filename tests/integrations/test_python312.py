"""gemma needs Python 3.12: an environment of its own, `make integrations312`."""

from tests.support.integrations import figures_of


def test_gemma_linen():
    found = figures_of("gemma_linen", "gemma", "flax", "peft", "transformers")
    # float32, of logits up to ten.
    assert max(found["base_difference"], found["difference"]) < 1e-4 < 1 < found["moved"]
    assert found["losses"][1] < 0.1 * found["losses"][0]
