"""Chat templates: spans of answers against transformers, and bounds on time and output."""

import time
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from lora_jax.hf.tokenizer import Tokenizer, chat

from tests.support.oracle import oracle

pytestmark = [pytest.mark.once, pytest.mark.oracle]

MARKED = (
    "{% for m in messages %}[{{ m.role }}] {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }} end{% endgeneration %}\n{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "a a"},
]


@pytest.fixture(scope="module")
def backend():
    words = {w: i for i, w in enumerate(["<unk>", *"a b c d end user assistant [ ]".split()])}
    made = Backend(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


MARKS = {
    "loop": MARKED,
    "whitespace": MARKED.replace("{% generation %}", "{%- generation -%}"),
    "macro": "{% macro turn(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    "{{ turn(messages[1]) }}",
}


def test_a_token_belongs_to_an_answer_if_one_of_its_characters_does(backend):
    """transformers takes the tokens of an answer's first and last character, and all between."""
    template = (
        "{% for m in messages %}{{ m.role }} {% generation %}{{ m.content }}{% endgeneration %}d a"
        "{% endfor %}"
    )
    tokenizer = Tokenizer(backend=backend, chat_template=template)
    # "a c bd a": the answer ends inside a word.
    marked = tokenizer.marked_chat([{"role": "a", "content": "c b"}])
    assert marked is not None and marked[1] == [False, True, True, False]


@pytest.mark.parametrize("case", MARKS)
def test_marked_answers_are_transformers(backend, case):
    template = MARKS[case]

    def ask():
        from transformers import PreTrainedTokenizerFast

        theirs: Any = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
        return dict(
            theirs.apply_chat_template(
                CHAT,
                return_dict=True,
                return_assistant_tokens_mask=True,
                add_generation_prompt=False,
            )
        )

    want = oracle(f"hf/tokenizer/marked.{case}", ask)
    found = Tokenizer(backend=backend, chat_template=template).marked_chat(CHAT)
    assert found is not None
    assert found[0] == want["input_ids"]
    assert [int(m) for m in found[1]] == want["assistant_masks"]


def test_a_template_without_marks(backend):
    ours = Tokenizer(backend=backend, chat_template="{{ messages[0].content }}")
    assert ours.marked_chat(CHAT) is None


def test_reasoning_has_all_its_names():
    ours = Tokenizer(backend=None, chat_template="{{ messages[0].reasoning_content }}")
    for name in ("reasoning_content", "reasoning", "thinking"):
        assert ours.render_chat([{"role": "assistant", "content": "", name: "why"}]) == "why"


DOUBLING = (
    "{{% set ns = namespace(x={}) %}}{{% for i in range(60) %}}{}{{% endfor %}}{{{{ ns.x }}}}"
)
LOOPS = "{{% for i in range(99999) %}}{{% for j in range({}) %}}{}{{% endfor %}}{{% endfor %}}"
UNBOUNDED = {
    "loops": LOOPS.format("99999", ""),
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "literals": LOOPS.format("9999", 500 * "x"),
    "repeat": "{{ 'x' * 10**10 }}",
    "repeated list": "{{ ([1] * 10**10) | length }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "products": DOUBLING.format("9", "{% set ns.x = ns.x * ns.x %}"),
    "joined": DOUBLING.format("'ab'", "{% set ns.x = ns.x ~ ns.x %}"),
    "added lists": DOUBLING.format("[1]", "{% set ns.x = ns.x + ns.x %}"),
    "nested lists": DOUBLING.format("[1]", "{% set ns.x = [ns.x, ns.x] %}"),
    "captured": DOUBLING.format(
        "'ab'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"
    ),
    "filter": "{{ 'x' | center(10**9) }}",
    "mapped filter": "{{ ['x'] | map('center', 10**9) | list }}",
    "method": "{{ 'x'.zfill(10**10) }}",
    "format": "{{ '%0999999999d' % 1 }}",
    "computed width": "{{ '%*d' % (10**9, 1) }}",
    "format method": "{{ '{:>1000000000}'.format(1) }}",
    "format method's argument": "{{ '{:>{w}}'.format(1, w=10**9) }}",
    "replace": "{% set a = 'x' * 10**6 %}{{ a.replace('x', a) }}",
    "join": "{% set a = 'x' * 10**6 %}{{ ([a] * 10**5) | join | length }}",
    "slices": "{{ [1] | slice(10**9) | list }}",
    "JSON": "{{ [1] | tojson(indent=10**9) }}",
}  # fmt: skip


@pytest.mark.parametrize("case", UNBOUNDED)
def test_a_template_without_bounds_is_refused(case, monkeypatch):
    monkeypatch.setattr(chat, "_MOST_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(ValueError, match="the chat template refuses these messages: "):
        chat.render(UNBOUNDED[case], messages=CHAT)
    assert time.monotonic() - start < 5


def test_the_text_of_a_template_is_bounded(monkeypatch):
    monkeypatch.setattr(chat, "_MOST_CHARACTERS", 1000)
    rounds = "{% for i in range(count) %}" + 60 * "x" + "{% endfor %}"
    assert chat.render(rounds, count=10).text == 600 * "x"
    with pytest.raises(ValueError, match="it writes more than 1,000 characters"):
        chat.render(rounds, count=20)


@pytest.mark.parametrize("source", ["{% for a in b %}" * 30 + "{% endfor %}" * 30,
                                    "{{ " + "(" * 5000 + ")" * 5000 + " }}"])  # fmt: skip
def test_a_template_that_does_not_compile(source):
    with pytest.raises(ValueError, match="the chat template is not valid Jinja: "):
        chat.render(source, messages=CHAT)


def test_a_long_conversation_is_within_the_bounds():
    long = [{"role": "user", "content": "word " * 20_000}] * 50
    source = "{% for m in messages %}{{ m.content | trim }}{{ loop.length }}{% endfor %}"
    assert len(chat.render(source, messages=long).text) > 4_000_000
