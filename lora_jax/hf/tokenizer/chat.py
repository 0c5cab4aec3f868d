"""Chat templates: Jinja, run as transformers runs it, with bounds on time and output.

A template comes with a downloaded model. It runs in Jinja's immutable sandbox, with blocks trimmed,
`raise_exception` and `strftime_now`. The sandbox guards Python, not the machine: nested loops run
for years and `'x' * 10**10` fills the memory. So every turn of a loop, every call and every
filter counts against a budget, and every size is checked before it is made.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any, NamedTuple, NoReturn

from lora_jax.compat import require

# Far above any real conversation: a template takes some hundred steps for a message.
_MOST_STEPS = 2_000_000
_MOST_SECONDS = 10.0
_MOST_CHARACTERS = 20_000_000
_MOST_ITEMS = 1_000_000
# Characters of a text times those of its replacement, or items times those of their separator.
_MOST_PRODUCT = 400_000_000
# Filters that make a text or list as large as a number they are given.
_WIDE_FILTERS = ("batch", "center", "format", "indent", "slice", "tojson", "wordwrap")
_WIDE = re.compile(r"\d{6}|\*")


class Rendered(NamedTuple):
    """A conversation as its template writes it.

    Attributes:
      text: the whole text.
      answers: spans (start, end) of the text between `{% generation %}` and `{% endgeneration %}`.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


class _Budget:
    """Steps, seconds and characters that one run of a template has left, and its marked answers."""

    def __init__(self) -> None:
        self.steps, self.ends = _MOST_STEPS, time.monotonic() + _MOST_SECONDS
        # Text that is made, and the part of it that is written: a block may be kept or dropped.
        self.made = self.written = 0
        self.answers: list[tuple[int, int]] = []

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0 or (self.steps % 16 == 0 and time.monotonic() > self.ends):
            _refuse(f"it does not end within {_MOST_SECONDS:.0f} s")

    def make(self, characters: int) -> None:
        self.made += characters
        if self.made > _MOST_CHARACTERS:
            _refuse(f"it writes more than {_MOST_CHARACTERS:,} characters")


def render(source: str, **context: Any) -> Rendered:
    """Runs a template.

    Args:
      source: the template.
      context: `messages`, `add_generation_prompt`, the special tokens, and what else it reads.

    Raises:
      ValueError: not a template, one that refuses the messages, or one that exceeds the bounds.
    """
    jinja2 = require("jinja2")
    template, budget = _compiled(source), _Budget()
    parts = []
    try:
        # The budget is a variable of the run: one compiled template serves several threads.
        for part in template.generate(**context, _budget=budget):
            budget.written += len(part)
            parts.append(part)
    except (jinja2.TemplateError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        why = str(error) or type(error).__name__
        raise ValueError(f"the chat template refuses these messages: {why}") from None
    return Rendered("".join(parts), tuple(budget.answers))


def marks_answers(source: str) -> bool:
    """Whether a template marks the assistant's words by `{% generation %}`."""
    return re.search(r"\{%[-+]?\s*generation\b", source) is not None


def _refuse(why: str) -> NoReturn:
    raise require("jinja2").TemplateError(why)


# A data set renders one template for thousands of conversations.
@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    jinja2 = require("jinja2")
    try:
        return _environment().from_string(source)
    except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
        why = str(error) or type(error).__name__
        raise ValueError(f"the chat template is not valid Jinja: {why}") from None


@lru_cache(maxsize=1)
def _environment() -> Any:
    """The sandbox whose loops, calls, filters and operators count against the run's budget."""
    nodes, pass_context = require("jinja2.nodes"), require("jinja2").pass_context
    Sandbox = require("jinja2.sandbox").ImmutableSandboxedEnvironment
    counting = _counting(nodes)

    class Bounded(Sandbox):
        # Jinja does not compute these while it compiles, either.
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def _parse(self, source: str, name: Any, filename: Any) -> Any:
            return counting.visit(Sandbox._parse(self, source, name, filename))

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            context["_budget"].step()
            text = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
            if isinstance(text, str):  # a method of a text, such as `center` or `replace`
                _check_arguments(text, *args, *kwargs.values(), wide=True)
            return _checked(Sandbox.call(self, context, obj, *args, **kwargs))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            context["_budget"].step()
            _check_operands(operator, left, right)
            return _checked(Sandbox.call_binop(self, context, operator, left, right))

    @pass_context
    def counted(context: Any, items: Iterable) -> Iterator:
        for item in items:
            context["_budget"].step()
            yield item

    @pass_context
    def made(context: Any, value: Any) -> str:
        # Weighed first: the text of lists in lists grows as a power of their depth.
        text = value if isinstance(value, str) else str(value) if _weight(value) else ""
        context["_budget"].make(len(text))
        return text

    environment = Bounded(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation(nodes), "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    environment.filters |= {name: _bounded(name, f) for name, f in environment.filters.items()}
    environment.filters |= {"_counted": counted, "_made": made}
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    del environment.globals["lipsum"]  # writes any amount of text
    return environment


def _counting(nodes: Any) -> Any:
    """Puts a filter that counts around what loops run over, what is joined and what is written."""

    def through(name: str, node: Any) -> Any:
        # Jinja's nodes take their fields by position only.
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    class Counting(require("jinja2.visitor").NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            node = self.generic_visit(node)
            node.iter = through("_counted", node.iter)
            return node

        def visit_Concat(self, node: Any) -> Any:
            node = self.generic_visit(node)
            return nodes.Concat([through("_made", part) for part in node.nodes])

        def visit_Output(self, node: Any) -> Any:
            node = self.generic_visit(node)
            data = nodes.TemplateData
            parts = [nodes.Const(n.data, lineno=n.lineno) if type(n) is data else n
                     for n in node.nodes]  # fmt: skip
            node.nodes = [through("_made", part) for part in parts]
            return node

    return Counting()


def _generation(nodes: Any) -> type:
    class Generation(require("jinja2.ext").Extension):
        """Notes which part of the text `{% generation %}` encloses."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark", [nodes.ContextReference()])
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, context: Any, caller: Callable[[], str]) -> str:
            budget, text = context["_budget"], caller()
            # `generate` has handed out all text before the block.
            budget.answers.append((budget.written, budget.written + len(text)))
            return text

    return Generation


def _bounded(name: str, function: Callable) -> Callable:
    @wraps(function)  # keeps the mark of filters that take the context first
    def run(*args: Any, **kwargs: Any) -> Any:
        if name == "sum" and not isinstance(kwargs.get("start", 0), int | float):
            _refuse("it sums up lists")
        _check_arguments(*args, *kwargs.values(), wide=name in _WIDE_FILTERS)
        return _checked(function(*args, **kwargs))

    return run


def _check_arguments(*values: Any, wide: bool) -> None:
    """Refuses a call that makes a huge text out of small ones, before it runs."""
    numbers = [abs(x) for x in values[1:] if isinstance(x, int)]
    if wide and max(numbers, default=0) > _MOST_ITEMS:
        _refuse(f"it makes a text or list of size {max(numbers):,}")
    if wide and any(isinstance(x, str) and _WIDE.search(x) for x in _formats(values)):
        _refuse("it formats with a large or computed width")
    sizes = sorted(_weight(x) for x in values if isinstance(x, str | list | tuple | dict))
    if len(sizes) > 1 and sizes[-1] * sizes[-2] > _MOST_PRODUCT:
        _refuse(f"it makes more than {_MOST_PRODUCT:,} characters")


def _weight(value: Any) -> int:
    """Characters and items of a value when it is written: a list may hold another many times."""
    items, characters, left = 0, 0, [value]
    while left:
        x = left.pop()
        items += 1
        characters += len(x) if isinstance(x, str) else 1
        if items > _MOST_ITEMS or characters > _MOST_CHARACTERS:
            _refuse(f"it makes more than {_MOST_CHARACTERS:,} characters or {_MOST_ITEMS:,} items")
        left.extend(x if isinstance(x, list | tuple) else x.values() if isinstance(x, dict) else ())
    return characters


def _formats(values: tuple) -> list[str]:
    """The directives of a text that formats: `%8d` and `{:>8}`."""
    text = next((x for x in values if isinstance(x, str)), "")
    return re.findall(r"%[^%a-zA-Z]{1,20}[a-zA-Z]|\{[^{}]{0,40}\}", text)


def _check_operands(operator: str, left: Any, right: Any) -> None:
    sized = [len(x) for x in (left, right) if isinstance(x, str | list | tuple)]
    numbers = [abs(x) for x in (left, right) if isinstance(x, int | float)]
    if operator == "%" and isinstance(left, str):
        _check_arguments(left, right, wide=True)
    elif operator == "+" and sized:
        _check_size(left, sum(sized))
    elif operator == "*" and sized and numbers:
        _check_size(left if isinstance(left, list | tuple) else right, sized[0] * numbers[0])
    elif operator in ("*", "**") and max(numbers, default=0) > 2**64:
        _refuse("it computes with huge numbers")
    elif operator == "**" and len(numbers) == 2 and numbers[1] > 64:
        _refuse("it raises a number to a large power")


def _checked(value: Any) -> Any:
    """The value, if it is not too large to go on with."""
    if isinstance(value, str | list | tuple):
        _check_size(value, len(value))
    return value


def _check_size(like: Any, size: float) -> None:
    most = _MOST_ITEMS if isinstance(like, list | tuple) else _MOST_CHARACTERS
    if size > most:
        _refuse(f"it makes more than {most:,} characters or items")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter; Jinja's own escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
