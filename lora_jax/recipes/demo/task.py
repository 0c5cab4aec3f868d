"""The task of the demo: turn a sentence that books a table into strict JSON.

    "Could we get a table for four on Friday at 7:30 pm? It's for Iris."
    {"name":"Iris","guests":4,"day":"friday","time":"19:30"}

Numbers are digits or words, times have three spellings, the fields come in any order, and no name
of the test set is in the training set, so that a model cannot answer without reading the sentence.
An answer is right if it is one JSON object with exactly these four values and nothing around it.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

INSTRUCTION = "Write the booking as JSON with name, guests, day and time (HH:MM)."

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# The names of the two sets are disjoint. There are many training names, because with few the model
# memorizes them instead of learning to copy.
TRAIN_NAMES = tuple(
    "Aaron Abigail Adam Adele Ahmed Aisha Alan Albert Alice Alma Amara Amy Andrea Angela Anna "
    "Anton April Astrid Barbara Ben Bella Bernard Bianca Boris Brian Camille Carl Carla Carmen "
    "Catherine Charles Chen Chloe Clara Claudia Colin Dana Daniel Daphne Denis Diana Dieter Dora "
    "Edward Elena Elias Ella Elsa Emil Emma Eric Esther Eva Evelyn Fabian Farid Fatima Felix "
    "Flora Francis Frida Gabriel Gavin Gerda Gloria Gordon Greta Hannah Harold Harry Heidi Henry "
    "Hugo Ida Igor Ines Ingrid Irene Ivan Jack Jacob Jamal Jane Jasmine Jean Jonas Joseph Judith "
    "Julia Karen Karim Katya Keith Lars Leah Leo Leonard Linda Louis Lucia Lukas Lydia Magnus "
    "Manuel Maria Marie Martha Martin Matteo Maya Mei Michael Milan Miriam Mohammed Monica Nadia "
    "Nathan Nick Nina Nora Oliver Olga Oscar Otto Patricia Paula Peter Petra Philip Priya Rachel "
    "Ralph Ravi Rebecca Robert Roland Rosa Ruth Samuel Sandra Sara Sasha Sean Selma Simon Sofia "
    "Sonia Stefan Susan Sven Tanya Tara Theo Thomas Tina Tom Ursula Vera Victor Viola Wanda Wendy "
    "William Xavier Yara Yusuf Yvonne".split()
)
TEST_NAMES = tuple(
    "Agnes Arthur Bruno Cecilia David Edith Frank Grace Helen Iris James Kenji Laura Lena Marco "
    "Mona Noah Omar Pedro Rita Stella Teresa Walter Zoe".split()
)
NUMBERS = tuple("zero one two three four five six seven eight nine ten eleven twelve".split())
TEMPLATES = (
    "Could we get a table for {guests} on {day} at {time}? It's for {name}.",
    "Hi, {name} here. We'd like to come {day} at {time}, {guests} people.",
    "Please reserve for {guests} under the name {name}, {day}, {time}.",
    "I want to book for {day} at {time}. My name is {name} and we are {guests}.",
    "{name} would like to have dinner on {day} with a party of {guests}, arriving at {time}.",
    "Is there room for {guests} at {time} this {day}? Name: {name}.",
    "On {day} we are {guests} and would be there around {time}. Put it under {name}, thanks!",
    "This is {name}. Can you fit {guests} of us in at {time} on {day}?",
    "A table at {time} on {day} for {name}, there will be {guests} of us.",
    "Booking for {name}: {guests} guests, {time}, {day}.",
)


@dataclass(frozen=True)
class Booking:
    """The content of a sentence: the four values of the answer."""

    name: str
    guests: int
    day: str
    time: str


@dataclass(frozen=True)
class Sentence:
    """A sentence and the booking it states."""

    text: str
    booking: Booking


def canonical(booking: Booking) -> str:
    """The one spelling of a booking: its JSON on one line, without spaces."""
    return json.dumps(asdict(booking), separators=(",", ":"), ensure_ascii=False)


def _spell_number(rng: random.Random, number: int) -> str:
    return rng.choice((str(number), NUMBERS[number]))


def _spell_time(rng: random.Random, hour: int, minute: int) -> str:
    # `_draw` gives times from 17 to 21 o'clock.
    evening = f"{hour - 12}:{minute:02d} pm" if minute else f"{hour - 12} pm"
    return rng.choice((f"{hour}:{minute:02d}", f"{hour}h{minute:02d}", evening))


def _draw(rng: random.Random, names: Sequence[str]) -> Sentence:
    hour, minute = rng.randint(17, 21), rng.choice((0, 15, 30, 45))
    day, time = rng.choice(DAYS), f"{hour:02d}:{minute:02d}"
    booking = Booking(rng.choice(names), rng.randint(2, 12), day.lower(), time)
    text = rng.choice(TEMPLATES).format(
        name=booking.name,
        guests=_spell_number(rng, booking.guests),
        day=day,
        time=_spell_time(rng, hour, minute),
    )
    return Sentence(text, booking)


def _draw_distinct(rng: random.Random, count: int, names: Sequence[str]) -> list[Sentence]:
    """Draws `count` examples no two of which have the same sentence."""
    drawn: dict[str, Sentence] = {}
    while len(drawn) < count:
        example = _draw(rng, names)
        drawn.setdefault(example.text, example)
    return list(drawn.values())


def make_examples(
    seed: int, *, train: int = 640, test: int = 48
) -> tuple[list[Sentence], list[Sentence]]:
    """Makes the training and the test set; the same seed makes the same sets.

    Args:
      seed: seed of the generator.
      train: number of training examples.
      test: number of test examples; no name in them occurs in the training set.

    Returns:
      The two lists, no sentence twice.
    """
    limit = 10_000  # far below the number of possible sentences, so that drawing distinct ones ends
    if not (0 < train <= limit and 0 < test <= limit):
        raise ValueError(f"train and test must be between 1 and {limit}, got {train} and {test}")
    rng = random.Random(seed)
    return _draw_distinct(rng, train, TRAIN_NAMES), _draw_distinct(rng, test, TEST_NAMES)


def question(example: Sentence) -> list[dict[str, str]]:
    """The chat messages that put the task to a model: instruction and sentence."""
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": example.text},
    ]


def conversation(example: Sentence) -> list[dict[str, str]]:
    """The messages of a training example: the question and the right answer."""
    return [*question(example), {"role": "assistant", "content": canonical(example.booking)}]


def read_answer(answer: str) -> str | None:
    """The answer in canonical spelling, or None if it is not such a JSON object.

    Spaces and the order of the fields do not matter; a missing or additional field, a number
    written as a string, or anything around the object does.
    """
    try:
        value = json.loads(answer)
    except ValueError:
        return None
    if not isinstance(value, dict) or set(value) != set(Booking.__dataclass_fields__):
        return None
    # 4.0 and true would be equal to 4 and 1 in Python.
    if any(isinstance(v, (dict, list, float, bool)) or v is None for v in value.values()):
        return None
    return canonical(Booking(**value))


def score(answers: Sequence[str], examples: Sequence[Sentence]) -> float:
    """Share of answers, 0 to 1, that match exactly.

    Raises:
      ValueError: there is not one answer for each example.
    """
    if len(answers) != len(examples) or not examples:
        raise ValueError(f"got {len(answers)} answers for {len(examples)} examples")
    pairs = zip(answers, examples, strict=True)
    return sum(read_answer(a) == canonical(e.booking) for a, e in pairs) / len(examples)
