"""gemma and MaxText need Python 3.12: an environment of their own, `make integrations312`."""

import pytest

from tests.support.integrations import figures_of


@pytest.mark.parametrize(
    "program, package", {"gemma_linen": "gemma", "maxtext_decoder": "maxtext"}.items()
)
def test_a_decoder_trained_here_and_loaded_by_peft(program, package):
    found = figures_of(program, package, "flax", "peft", "transformers")
    # float32, of logits up to ten.
    assert max(found["base_difference"], found["difference"]) < 1e-4 < 1 < found["moved"]
    assert found["losses"][1] < 0.1 * found["losses"][0]


def test_maxtexts_own_adapters():
    found = figures_of("maxtext_lora", "maxtext", "flax")
    assert found == {"difference": 0.0, "merged": 4}
