"""Text in, text out: the same answers in any batch, from messages or from text as it stands."""

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from lora_jax import models
from lora_jax.config.arguments import SettingsError
from lora_jax.recipes.generate import (
    _as_text,
    answer_prompts,
    as_messages,
    as_trained,
    generate_texts,
    sampling_of,
)
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


def test_equal_prompts_of_different_batches_are_sampled_differently(model):
    config = GenerateConfig(max_new_tokens=16, temperature=1.0, batch_size=1)
    one, other = generate_texts(model, model.params, ["Hi", "Hi"], config)
    assert one != other
    # Neither the batches nor the calls change what a question's number and the seed decide.
    for size in (1, 2):
        again = dataclasses.replace(config, batch_size=size)
        assert [one, other] == generate_texts(model, model.params, ["Hi", "Hi"], again)
    assert [other] == generate_texts(model, model.params, ["Hi"], config, first=1)


class Script(NamedTuple):
    """A stand-in for a model's tokenizer: token `n` is the `n`-th of some pieces of bytes."""

    pieces: Sequence[bytes]
    clean: bool = False

    def decode(self, ids):
        text = b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")
        return text.replace(" '", "'") if self.clean else text


CJK = "日本é😀".encode()


@pytest.mark.parametrize(
    "pieces",
    [
        [b"a ", b"b", "é".encode()],
        [bytes([byte]) for byte in CJK],  # a token a byte: no part of a character is written
        [CJK[:4], CJK[4:5], CJK[5:], b"!"],
        [b"a", "\ufffd".encode(), b"b"],  # a character that stands for broken bytes elsewhere
        [b"a", b"\xe6", b"b", b"\xff"],  # bytes that are no text
    ],
)
@pytest.mark.parametrize("size", [1, 3])
def test_texts_grow_by_whole_characters(pieces, size):
    tokenizer, parts = Script(pieces), {5: [], 6: []}
    take = _as_text(tokenizer, 5, lambda number, text: parts[number].append(text))
    ids = list(range(len(pieces)))
    for start in range(0, len(ids), size):
        take([ids[start : start + size], ids[::-1][start : start + size]])
    for number, row in ((5, ids), (6, ids[::-1])):
        assert all(parts[number])
        # What may still change is left to the end.
        assert "".join(parts[number]) == tokenizer.decode(row).rstrip("\ufffd")


def test_answers_come_live_or_whole(model):
    config = GenerateConfig(max_new_tokens=9, temperature=1.0, batch_size=2)
    whole = generate_texts(model, model.params, TEXTS, config)

    def answer(live, labels, prompts=TEXTS):
        parts = []
        answer_prompts(
            model, model.params, iter(prompts), config,
            question=str, write=parts.append, live=live, labels=labels,
        )  # fmt: skip
        return parts

    for live in (False, True):
        assert "".join(answer(live, False)) == "".join(f"{text}\n" for text in whole)
        labelled = [f"> {p}\n{text}\n\n" for p, text in zip(TEXTS, whole, strict=True)]
        assert "".join(answer(live, True)) == "".join(labelled)
    assert len(answer(False, True)) == 3 and len(answer(True, True)) > 9


def test_prompts_are_read_as_answers_need_them(model):
    config, asked = dataclasses.replace(CONFIG, batch_size=1), []

    def prompts():
        for text in TEXTS:
            yield text
            # The answer to a prompt is out before the next prompt is waited for.
            assert len(asked) == 1 + TEXTS.index(text)

    answer_prompts(
        model, model.params, prompts(), config,
        question=str, write=asked.append, live=False, labels=False,
    )  # fmt: skip
    assert len(asked) == 3


def test_what_a_tokenizer_changes_afterwards_is_written_again(model, monkeypatch):
    script = Script([b"it ", b"'s", b"."], clean=True)

    def told(*args, stream, **options):
        for token in (0, 1, 2):
            stream([[token]])
        return [[0, 1, 2]]

    tokenizer = SimpleNamespace(decode=script.decode, encode_prompt=lambda _: [1], stop_ids=())
    fake = SimpleNamespace(tokenizer=tokenizer, config=model.config, generation={})
    monkeypatch.setattr(models, "generate", told)
    parts = []
    answer_prompts(
        fake, None, ["Hi"], CONFIG, question=str, write=parts.append, live=True, labels=False
    )
    assert "".join(parts) == "it \nit's.\n"


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
    with pytest.raises(ValueError, match="has no tokenizer, so it cannot read text"):
        generate_texts(bare, bare.params, ["Hi"], CONFIG)


def test_more_tokens_than_the_context_are_a_wrong_setting(model):
    config = dataclasses.replace(CONFIG, max_new_tokens=model.config.context)
    with pytest.raises(SettingsError, match="`max_new_tokens` is 256, but .* context, with the pr"):
        generate_texts(model, model.params, ["Hi"], config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("batch_size", 0),
        ("seed", -1),
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("temperature", "warm"),
        ("temperature", float("nan")),
    ],
)
def test_options_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be "):
        GenerateConfig(**{field: value})


# The form of the training, and the model's own generation_config.json.


@pytest.mark.parametrize(
    ("form", "chat", "raw", "is_raw"),
    [
        ("prompt", True, None, True),
        ("text", True, None, True),
        ("messages", True, None, False),
        ("mixed", True, None, False),
        (None, True, None, False),
        (None, False, None, True),
        (None, True, True, True),
        ("prompt", True, True, True),
        ("messages", True, False, False),
    ],
)
def test_a_prompt_has_the_form_of_the_training(form, chat, raw, is_raw):
    (question,) = as_trained(["Hi"], chat=chat, form=form, raw=raw)
    assert question == ("Hi" if is_raw else as_messages("Hi"))


@pytest.mark.parametrize(
    ("form", "raw", "text"),
    [
        ("prompt", False, "trained on prompts and completions, .* through the chat .*raw=False"),
        ("text", False, "trained on texts, .* leave out raw=False"),
        ("messages", True, "trained on messages .* continued as they are: leave out raw=True"),
    ],
)
def test_another_form_than_the_trainings_is_warned_of(form, raw, text):
    with pytest.warns(UserWarning, match=text):
        as_trained(["Hi"], chat=True, form=form, raw=raw)


def test_a_form_that_is_not_known_is_said_where_it_matters():
    def ask(**options):
        given = dict(chat=True, form=None, adapter=True)
        return as_trained(["Hi"], **{**given, **options})

    with pytest.warns(UserWarning, match=r"no training_form.json, .* raw=True if .* raw=False if"):
        assert ask() == [as_messages("Hi")]
    # Warnings are errors in tests: one form only, no adapter, or a choice.
    assert ask(chat=False) == ask(raw=True) == ["Hi"]
    assert ask(adapter=False) == ask(raw=False) == ask(form="mixed") == [as_messages("Hi")]
    assert ask(system="Be brief.") == [as_messages("Hi", system="Be brief.")]


def test_the_variables_of_the_training_reach_the_template(model):
    template = tiny.TEMPLATE + "{% if add_generation_prompt %}{{ mood }}{% endif %}"
    tokenizer = dataclasses.replace(model.tokenizer, chat_template=template)
    moody = dataclasses.replace(model, tokenizer=tokenizer)
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for mood in "", "Friday we ":
        got = generate_texts(
            moody, model.params, [as_messages("Hi")], CONFIG, template={"mood": mood}
        )
        assert got == generate_texts(model, model.params, [asked + mood], CONFIG)


def test_the_system_message_is_that_of_the_training():
    def ask(form: Any = "messages", **options):
        return as_trained(["Hi"], chat=True, form=form, trained_system="Be brief.", **options)

    assert ask() == ask("mixed") == [as_messages("Hi", system="Be brief.")]
    assert ask(system="Rhyme.") == [as_messages("Hi", system="Rhyme.")]
    assert ask("mixed", raw=True) == ask("prompt") == ["Hi"]


def test_a_system_message_needs_a_chat():
    with pytest.raises(ValueError, match="`system` is for chat messages"):
        as_trained(["Hi"], chat=True, form="prompt", system="Be brief.")


OWN = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [
        ({}, {}, (0.0, 1.0)),
        ({}, OWN, (0.6, 0.9)),
        ({}, {**OWN, "do_sample": False}, (0.0, 1.0)),
        ({}, {"do_sample": True}, (1.0, 1.0)),
        ({"temperature": 0.0}, OWN, (0.0, 0.9)),
        ({"temperature": 1.5, "top_p": 0.5}, OWN, (1.5, 0.5)),
    ],
)
def test_sampling_is_the_models_own_unless_given(config, generation, want):
    assert sampling_of(GenerateConfig(**config), generation) == want


def test_the_sampling_of_a_model_that_does_not_sample_is_no_warning():
    generation = {"do_sample": False, "top_k": 50, "temperature": 0.7}
    assert sampling_of(GenerateConfig(), generation) == (0.0, 1.0)


def test_sampling_that_is_not_applied_is_warned_of():
    with pytest.warns(UserWarning, match="`top_k` = 20, `repetition_penalty` = 1.1 is not applied"):
        sampling_of(GenerateConfig(), {**OWN, "top_k": 20, "repetition_penalty": 1.1})
    # What changes the most likely tokens counts without sampling too.
    for name, value in {"repetition_penalty": 1.1, "num_beams": 4, "suppress_tokens": [3]}.items():
        with pytest.warns(UserWarning, match=f"`{name}` = .* is not applied"):
            sampling_of(GenerateConfig(), {name: value, "top_k": 20})
    assert sampling_of(GenerateConfig(temperature=0.0), {"num_beams": 4}) == (0.0, 1.0)
    assert sampling_of(GenerateConfig(), {"num_beams": 1, "suppress_tokens": []}) == (0.0, 1.0)
    with pytest.raises(ValueError, match="`temperature` must be at least 0, got 'hot'"):
        sampling_of(GenerateConfig(), {**OWN, "temperature": "hot"})


def test_an_answer_ends_at_any_end_token_of_the_model(model):
    (tokens,) = models.generate(
        model, model.params, [model.tokenizer.encode("Hi")], max_new_tokens=6
    )
    ends = dataclasses.replace(model.tokenizer, ends=(tokens[2],))
    cut = tokens[: tokens.index(tokens[2])]
    answer = generate_texts(
        dataclasses.replace(model, tokenizer=ends), model.params, ["Hi"], CONFIG
    )
    assert answer == [model.tokenizer.decode(cut)]
