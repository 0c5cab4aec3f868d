"""Text in, text out: the same answers in any batch, from messages or from text as it stands."""

import dataclasses

import pytest

from lora_jax import models
from lora_jax.recipes.generate import as_messages, generate_texts
from lora_jax.recipes.settings import GenerateConfig

from tests.support import tiny

TEXTS = ("Booking for Iris: 4 guests, 19:30, Friday.", "Hi", "On Friday we are two.")
CONFIG = GenerateConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


def test_batches_do_not_change_the_answers(model):
    questions = [as_messages(text) for text in TEXTS]
    together = generate_texts(model, model.params, questions, CONFIG)
    small = dataclasses.replace(CONFIG, batch_size=2)
    assert generate_texts(model, model.params, questions, small) == together
    assert len(together) == 3


def test_text_is_continued_as_it_stands(model):
    (tokens,) = models.generate(
        model, model.params, [model.tokenizer.encode(TEXTS[0])], max_new_tokens=6,
        stop_tokens=[model.tokenizer.eos_id],
    )  # fmt: skip
    assert generate_texts(model, model.params, [TEXTS[0]], CONFIG) == [
        model.tokenizer.decode(tokens)
    ]


def test_a_system_message_comes_first():
    assert as_messages("Hi") == [{"role": "user", "content": "Hi"}]
    assert [m["role"] for m in as_messages("Hi", system="Be brief.")] == ["system", "user"]


def test_a_model_without_tokenizer(model):
    bare = models.Model(model.forward, model.params, None)
    with pytest.raises(ValueError, match="came without a tokenizer, so it cannot read text"):
        generate_texts(bare, bare.params, ["Hi"], CONFIG)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", 0), ("batch_size", 0), ("temperature", -1), ("top_p", 0), ("top_p", 1.1)],
)
def test_options_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field} must be "):
        GenerateConfig(**{field: value})
