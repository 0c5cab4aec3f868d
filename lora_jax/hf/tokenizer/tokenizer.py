"""Text to tokens and back, and conversations to tokens.

`directory` reads a tokenizer from a Hugging Face directory, `from_gguf` from a GGUF's metadata.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from lora_jax.hf.tokenizer import chat
from lora_jax.hf.tokenizer.backends import build, reads_spaces, special_token
from lora_jax.hf.tokenizer.panics import check_texts, checked_ids, without_panics

Message = Mapping[str, Any]

# The special tokens, and the keys that number them in a GGUF file.
_GGUF_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "sep_token": "seperator_token_id",
    "mask_token": "mask_token_id",
}


class TokenBatch(NamedTuple):
    """Texts of a batch, padded on the right to the longest.

    Attributes:
      tokens: token ids, `pad_id` at padding.
      mask: true at real tokens.
      token_type_ids: which of two texts a token belongs to.
    """

    tokens: Int[np.ndarray, "b t"]
    mask: Bool[np.ndarray, "b t"]
    token_type_ids: Int[np.ndarray, "b t"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      special: text of the special tokens that are set: bos_token, eos_token, unk_token,
        pad_token, an encoder's cls_token, sep_token, mask_token, and a model's own.
      chat_template: Jinja source, or None.
      templates: further templates by name; `tool_use` is taken for a conversation with tools.
      ends: ids that end an answer beside `eos_id`: those of config.json and
        generation_config.json.
      clean_up: take spaces before punctuation out of decoded text, as transformers does where
        `clean_up_tokenization_spaces` is set.
      files: text of the settings files it was read from, which a saved model gets back.
      paths: for messages, where the tokenizer ("") and each chat template by its name are from.
      rows: rows of the model's embedding, which a text's tokens must have; None does not check.
    """

    backend: Any
    special: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    clean_up: bool = False
    files: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, Path] = field(default_factory=dict)
    rows: int | None = None

    @property
    def bos_id(self) -> int | None:
        """The token that starts a text, or None."""
        return self._id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, or None."""
        return self._id("eos_token")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer, `eos_id` first."""
        eos = () if self.eos_id is None else (self.eos_id,)
        return tuple(dict.fromkeys((*eos, *self.ends)))

    @property
    def pad_id(self) -> int:
        """The token that fills short rows: the padding token, else the end token, else 0."""
        # Decoders often have no padding token; masked positions may hold any.
        for name in ("pad_token", "eos_token"):
            if (token := self._id(name)) is not None:
                return token
        return 0

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        # Not the number of tokens: the ids of some tokenizers have gaps.
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def has_template(self) -> bool:
        """Whether conversations can be written."""
        return self.chat_template is not None or bool(self.templates)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text, with those the tokenizer puts around a text (BOS, EOS).

        Raises:
          ValueError: the tokenizer cannot read it, or the model has no row for one of its tokens.
        """
        return self._encoded(text, add_special_tokens=add_special_tokens).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of a text that is continued: with what opens a text, without what closes one.

        A text that begins with the opening (`<s>`) itself does not get it twice.
        """
        tokens, opening = self.encode(text, add_special_tokens=False), self._opening
        return tokens if tokens[: len(opening)] == opening else [*opening, *tokens]

    @cached_property
    def _opening(self) -> list[int]:
        """What the tokenizer puts before every text."""
        row = self._encoded("a")
        # The mask has 1 at what was put around the text, which has a token at least.
        mask = row.special_tokens_mask
        return row.ids[: mask.index(0)] if 0 in mask else []

    @cached_property
    def closing(self) -> int:
        """How many tokens the tokenizer puts after every text."""
        mask = self._encoded("a").special_tokens_mask
        return mask[::-1].index(0) if 0 in mask else 0

    def encode_batch(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> TokenBatch:
        """Tokens of several texts, or pairs of texts, as an encoder takes them.

        Args:
          texts: the texts.
          pairs: as many second texts, or None.

        Raises:
          TypeError: one text.
          ValueError: no text, or another number of second texts.
        """
        check_texts(texts)
        check_texts(pairs or ())
        if not texts or (pairs is not None and len(pairs) != len(texts)):
            raise ValueError(
                f"`texts` must be at least one and `pairs` as many, got {len(texts)} and "
                f"{None if pairs is None else len(pairs)}"
            )
        given = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        with self._reading():
            rows = self.backend.encode_batch(given)
        self._check(*rows)
        width = max(len(row.ids) for row in rows)
        tokens = np.full((len(rows), width), self.pad_id, np.int32)
        types = np.zeros(tokens.shape, np.int32)
        for number, row in enumerate(rows):
            tokens[number, : len(row.ids)] = row.ids
            types[number, : len(row.ids)] = row.type_ids
        mask = np.arange(width) < np.array([[len(row.ids)] for row in rows])
        return TokenBatch(tokens, mask, types)

    def encoded(
        self, text: str, pair: str | None = None, *, window: int | None = None, stride: int = 0
    ) -> Any:
        """The `tokenizers.Encoding` of a text or a pair of texts: ids, types and offsets.

        Args:
          text, pair: the texts.
          window: most tokens of a row; the second text's others are in further (`overflowing`).
          stride: tokens that two of those have in common, half of the second text's at most.

        Raises:
          ValueError: as `encode`, or the first text, a question, fills a window.
        """
        row = self._encoded(text, pair)
        if window is None or len(row.ids) <= window:
            return row
        first = row.sequence_ids.count(0)
        around = len(row.ids) - first - row.sequence_ids.count(1)
        if (room := window - first - around) < 1:
            raise ValueError(
                f"the question has {first} tokens, with {around} special ones no room is left for "
                f"the context in windows of {window}: shorten it, leave it out, or take longer ones"
            )
        # The library panics where no token is new.
        stride = min(stride, room // 2)
        with self._reading():
            self._cutting.enable_truncation(window, stride=stride, strategy="only_second")
            return self._cutting.encode(text, pair)

    @cached_property
    def _cutting(self) -> Any:
        # A copy, as the backend is told how to cut before it reads a text.
        return copy.deepcopy(self.backend)

    def encoded_words(self, words: Sequence[str]) -> Any:
        """The `tokenizers.Encoding` of words, each tokenized alone as behind a space.

        So they are in a text with spaces between, which a served model reads; only the first word,
        before which no space is, may have others there. transformers' `is_split_into_words` leaves
        the spaces out unless a tokenizer puts one before each text itself (`add_prefix_space`).
        """
        check_texts(words)
        spaced = [f" {word}" if word and self._reads_spaces else word for word in words]
        with self._reading():
            row = self.backend.encode(spaced, is_pretokenized=True)
        self._check(row)
        return row

    @cached_property
    def _reads_spaces(self) -> bool:
        return reads_spaces(self.backend)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of tokens; special tokens are left out by default.

        Raises:
          TypeError, ValueError: no token ids, or rows of them.
        """
        text = self.backend.decode(checked_ids(ids), skip_special_tokens=skip_special_tokens)
        return _cleaned(text) if self.clean_up else text

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, **options: Any
    ) -> list[int]:
        """Tokens of a conversation in the model's own format.

        Args:
          messages: objects with `role` and `content`.
          add_generation_prompt: end with what starts the assistant's answer.
          options: further variables of the template, such as `tools`.

        Raises:
          ValueError: no template, or one that does not accept the messages.
        """
        text = self.render_chat(messages, add_generation_prompt, **options)
        # The template writes the special tokens itself.
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, **options: Any
    ) -> str:
        """The conversation as the template writes it; see `apply_chat_template`."""
        return self._render(messages, add_generation_prompt, options).text

    def marked_chat(
        self, messages: Sequence[Message], **options: Any
    ) -> tuple[list[int], list[bool]] | None:
        """Tokens of a conversation, and which of them the template marks as the assistant's.

        Returns:
          The tokens and marks, or None if the template has no `{% generation %}`.

        Raises:
          ValueError: as `apply_chat_template`.
        """
        if not chat.marks_answers(self._template(options)[1]):
            return None
        rendered = self._render(messages, False, options)
        row = self._encoded(rendered.text, add_special_tokens=False)
        answers = rendered.answers
        # One of its characters is enough; transformers drops bytes of an answer's last character.
        marks = [any(start < b and a < end for a, b in answers) for start, end in row.offsets]
        return row.ids, marks

    def _template(self, options: Mapping[str, Any]) -> tuple[str, str]:
        """The name and the text of the template for a conversation."""
        tools = self.templates.get("tool_use") if options.get("tools") else None
        if tools:
            return "tool_use", tools
        if self.chat_template is not None:
            return "default", self.chat_template
        where = _named(self.paths.get(""))
        if self.templates:
            raise ValueError(
                f"{where}this tokenizer has no chat template named `default`, only "
                f"{', '.join(f'`{name}`' for name in self.templates)}; give the text itself"
            )
        raise ValueError(f"{where}this tokenizer has no chat template; give the text itself")

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, options: Mapping[str, Any]
    ) -> chat.Rendered:
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f"message {number} is not an object with a `role`: {message!r}")
        name, template = self._template(options)
        # Templates test `tools is none`: an undefined variable would not be.
        context = {"tools": None, "documents": None, **self.special, **options}
        try:
            return chat.render(
                template,
                messages=[_with_reasoning(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **context,
            )
        except ValueError as error:
            raise ValueError(f"{_named(self.paths.get(name))}{error}") from None

    def _encoded(self, text: str, pair: str | None = None, **options: Any) -> Any:
        check_texts([text] if pair is None else [text, pair])
        with self._reading():
            row = self.backend.encode(text, pair, **options)
        self._check(row)
        return row

    def _reading(self) -> AbstractContextManager[None]:
        return without_panics(
            lambda why: (
                f"{_named(self.paths.get(''))}the tokenizer cannot read a text ({why}); if that is "
                "about a regular expression, it is one in tokenizer.json that takes too long"
            )
        )

    def _check(self, *rows: Any) -> None:
        """Refuses tokens without a row in the embedding."""
        most = 0 if self.rows is None else max((max(row.ids, default=0) for row in rows), default=0)
        if self.rows is not None and most >= self.rows:
            raise ValueError(
                f"{_named(self.paths.get(''))}a text has `{self.backend.id_to_token(most)}`, token "
                f"{most}, but the model's embedding has {self.rows} rows: take it out of the text, "
                "or resize the embedding (transformers' `resize_token_embeddings`)"
            )

    def _id(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self.backend.token_to_id(token)


def _cleaned(text: str) -> str:
    """The text as `clean_up_tokenization` of transformers has it: in this order."""
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for end in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {end}", end)
    return text


def _named(path: Path | None) -> str:
    """What a message about a file begins with."""
    return "" if path is None else f"{path}: "


def _with_reasoning(message: Message) -> dict[str, Any]:
    """A message whose reasoning has all the names that templates read, as in transformers."""
    names = ("reasoning_content", "thinking", "reasoning")
    text = next((message[name] for name in names if message.get(name) is not None), None)
    if text is None:
        return dict(message)
    return {"thinking": text, **message, "reasoning_content": text}


def from_gguf(
    metadata: Mapping[str, Any], *, path: Path, rows: int | None = None
) -> Tokenizer | None:
    """The tokenizer that a GGUF file's metadata describes, or None if it describes none.

    Args:
      metadata: the file's keys.
      path: the file, for messages.
      rows: as in `Tokenizer`.

    Raises:
      ValueError: a kind of tokenizer, or a way of splitting text, that is not known.
    """
    if "tokenizer.ggml.model" not in metadata:
        return None
    backend = build(metadata, path=path)
    tokens = metadata["tokenizer.ggml.tokens"]
    found = {name: special_token(metadata, tokens, key) for name, key in _GGUF_SPECIAL.items()}
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"{path}: `tokenizer.chat_template` is not text")
    return Tokenizer(
        backend=backend,
        special={name: token for name, token in found.items() if token is not None},
        chat_template=template,
        ends=tuple(backend.token_to_id(token) for token in _ends(metadata, tokens)),
        paths={"": path, "default": path},
        rows=rows,
    )


def _ends(metadata: Mapping[str, Any], tokens: list[str]) -> list[str]:
    """The tokens that end a turn or a message, as llama.cpp has them beside EOS."""
    found = (special_token(metadata, tokens, key) for key in ("eot_token_id", "eom_token_id"))
    return [token for token in found if token is not None]
