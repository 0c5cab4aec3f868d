"""gemma and MaxText need Python 3.12: an environment of their own, `make integrations312`."""

from tests.support.integrations import figures_of

PEFT = ("flax", "peft", "transformers")


def test_gemma_linen():
    found = figures_of("gemma_linen", "gemma", *PEFT)
    check_trained(found)
    assert found["merged"] < 1e-4


def test_maxtext_decoder():
    check_trained(figures_of("maxtext_decoder", "maxtext", *PEFT))


def check_trained(found):
    # float32, of logits up to ten.
    assert max(found["base_difference"], found["difference"]) < 1e-4 < 1 < found["moved"]
    assert found["losses"][1] < 0.1 * found["losses"][0]


def test_maxtexts_own_adapters():
    found = figures_of("maxtext_lora", "maxtext", "flax")
    assert found == {"difference": 0.0, "merged": 4}


def test_maxtext_linen():
    found = figures_of("maxtext_linen", "maxtext", "flax")
    assert found["difference"] < 1e-5 < 1 < found["moved"] and found["adapted"] == 7
