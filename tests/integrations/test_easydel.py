"""EasyDeL pins other versions of flax and transformers: an environment of its own."""

from tests.support.integrations import figures_of


def test_easydel_decoder():
    found = figures_of("easydel_decoder", "easydel", "flax", "transformers", "peft")
    # EasyDeL holds rotary frequencies in bfloat16: logits of up to ten differ in the second digit
    # behind the point, for base and adapter alike.
    assert max(found["base_difference"], found["difference"]) < 0.05 < 1 < found["moved"]
    # The same products in another order, in float32.
    assert found["merged_difference"] < 1e-4
    assert found["losses"][1] < 0.1 * found["losses"][0]
