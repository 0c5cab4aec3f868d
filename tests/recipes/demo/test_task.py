"""The demo's task: seeded, no overlap, and an answer counts only when it is exactly right."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.recipes.demo import task

pytestmark = pytest.mark.once


def test_the_same_seed_makes_the_same_sets_and_another_seed_others():
    assert task.make_examples(3, train=50, test=10) == task.make_examples(3, train=50, test=10)
    assert task.make_examples(3, train=50, test=10) != task.make_examples(4, train=50, test=10)


def test_no_sentence_and_no_name_of_the_test_set_is_in_the_training_set():
    train, test = task.make_examples(0, train=2000, test=500)
    assert len({e.text for e in train} | {e.text for e in test}) == 2500
    assert not {e.booking.name for e in train} & {e.booking.name for e in test}
    assert not set(task.TRAIN_NAMES) & set(task.TEST_NAMES)


def test_every_spelling_of_a_time_says_the_time():
    """Reads each sentence's time back with an independent reader."""
    for example in task.make_examples(1, train=3000, test=1)[0]:
        assert _read_time(example.text) == example.booking.time, example


def _read_time(text: str) -> str:
    if found := re.search(r"(\d+)(?::(\d\d))? (am|pm)", text):
        hour = int(found[1]) % 12 + 12 * (found[3] == "pm")
        return f"{hour:02d}:{int(found[2] or 0):02d}"
    if found := re.search(r"(\d+):(\d\d)", text):
        return f"{int(found[1]):02d}:{found[2]}"
    found = re.search(r"(\d+)h(\d\d)", text)
    return f"{found[1]}:{found[2]}"


@pytest.mark.parametrize(
    "answer",
    [
        '{"name":"Iris","guests":4,"day":"friday","time":"19:30"}',
        ' {"guests": 4, "name": "Iris",\n "time": "19:30", "day": "friday"}\n',
    ],
)
def test_spaces_and_order_do_not_matter(answer):
    booking = task.Booking("Iris", 4, "friday", "19:30")
    assert task.score([answer], [task.Sentence("", booking)]) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "null",
        "[]",
        '"Iris"',
        '{"name":"Iris","guests":4,"day":"friday","time":"19:3',
        '{"name":"Iris","guests":4,"day":"friday","time":"19:30"} I hope this helps!',
        'Sure: {"name":"Iris","guests":4,"day":"friday","time":"19:30"}',
        '```json\n{"name":"Iris","guests":4,"day":"friday","time":"19:30"}\n```',
        '{"name":"Iris","guests":"4","day":"friday","time":"19:30"}',
        '{"name":"Iris","guests":4.0,"day":"friday","time":"19:30"}',
        '{"name":"Iris","guests":4,"day":"friday","time":"19:30","note":""}',
        '{"name":"Iris","guests":4,"day":"friday"}',
        '{"name":"Iris","guests":4,"day":"friday","time":["19:30"]}',
        '{"name":"Iris","guests":4,"day":"Friday","time":"19:30"}',
        '{"name":"iris","guests":4,"day":"friday","time":"19:30"}',
        '{"name":"Iris","guests":5,"day":"friday","time":"19:30"}',
    ],
)
def test_anything_else_is_wrong(answer):
    booking = task.Booking("Iris", 4, "friday", "19:30")
    assert task.score([answer], [task.Sentence("", booking)]) == 0.0


@given(st.text())
def test_no_text_breaks_the_reader(text):
    result = task.read_answer(text)
    assert result is None or result.startswith("{")


def test_the_score_is_the_share_of_right_answers():
    _, test = task.make_examples(0, train=1, test=4)
    right = [task.canonical(e.booking) for e in test]
    assert task.score(right, test) == 1.0
    assert task.score([right[0], "", right[2], "{}"], test) == 0.5
    with pytest.raises(ValueError, match="got 3 answers for 4 examples"):
        task.score(right[:3], test)


def test_a_conversation_ends_with_the_canonical_answer():
    (example,), _ = task.make_examples(0, train=1, test=1)
    messages = task.conversation(example)
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert task.read_answer(messages[-1]["content"]) == task.canonical(example.booking)


@pytest.mark.parametrize("counts", [{"train": 0}, {"test": 0}, {"train": 10**6}])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="must be between 1 and 10000"):
        task.make_examples(0, **counts)
