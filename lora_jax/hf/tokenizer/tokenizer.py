"""Text to tokens and back: from a Hugging Face directory's files or a GGUF's metadata.

A directory's tokenizer is tokenizer.json, or BERT's vocab.txt where there is none.

Chat templates are Jinja, run as transformers runs them: in an immutable sandbox, blocks trimmed,
with `raise_exception` and `strftime_now`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import Bool, Int

from lora_jax.compat import require
from lora_jax.hf.checkpoint.safetensors import read_json
from lora_jax.hf.tokenizer import wordpiece
from lora_jax.hf.tokenizer.backends import build, special_token

Message = Mapping[str, Any]

# The special tokens, and the keys that number them in a GGUF file.
_GGUF_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_SPECIAL = (*_GGUF_SPECIAL, "cls_token", "sep_token", "mask_token")


class TokenBatch(NamedTuple):
    """Texts of a batch, padded on the right to the longest.

    Attributes:
      tokens: token ids, `pad_id` at padding.
      mask: true at real tokens.
      token_type_ids: which of two texts a token belongs to.
    """

    tokens: Int[np.ndarray, "b t"]  # noqa: F722
    mask: Bool[np.ndarray, "b t"]  # noqa: F722
    token_type_ids: Int[np.ndarray, "b t"]  # noqa: F722


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      special: text of the special tokens that are set: bos_token, eos_token, unk_token,
        pad_token, and an encoder's cls_token, sep_token, mask_token.
      chat_template: Jinja source, or None.
    """

    backend: Any
    special: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None

    @property
    def bos_id(self) -> int | None:
        """The token that starts a text, or None."""
        return self._id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, or None."""
        return self._id("eos_token")

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
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text, with those the tokenizer puts around a text (a leading BOS)."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> TokenBatch:
        """Tokens of several texts, or pairs of texts, as an encoder takes them.

        Args:
          texts: the texts.
          pairs: as many second texts, or None.

        Raises:
          ValueError: no text, or another number of second texts.
        """
        if not texts or (pairs is not None and len(pairs) != len(texts)):
            raise ValueError(
                f"`texts` must be at least one and `pairs` as many, got {len(texts)} and "
                f"{None if pairs is None else len(pairs)}"
            )
        given = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        rows = self.backend.encode_batch(given)
        width = max(len(row.ids) for row in rows)
        tokens = np.full((len(rows), width), self.pad_id, np.int32)
        types = np.zeros(tokens.shape, np.int32)
        for number, row in enumerate(rows):
            tokens[number, : len(row.ids)] = row.ids
            types[number, : len(row.ids)] = row.type_ids
        mask = np.arange(width) < np.array([[len(row.ids)] for row in rows])
        return TokenBatch(tokens, mask, types)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of tokens; special tokens are left out by default."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> list[int]:
        """Tokens of a conversation in the model's own format.

        Args:
          messages: objects with `role` and `content`.
          add_generation_prompt: end with what starts the assistant's answer.

        Raises:
          ValueError: no template, or one that does not accept the messages.
        """
        text = self.render_chat(messages, add_generation_prompt)
        # The template writes the special tokens itself.
        return self.encode(text, add_special_tokens=False)

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the template writes it; see `apply_chat_template`."""
        jinja2 = require("jinja2")
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template; give the text itself")
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f"message {number} is not an object with a `role`: {message!r}")
        try:
            return _compiled(self.chat_template).render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.special,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None

    def _id(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self.backend.token_to_id(token)


def from_directory(directory: str | Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory.

    Returns:
      The tokenizer, or None if the directory has no tokenizer at all.

    Raises:
      ValueError: a broken tokenizer.json or vocab.txt, or only files of a slow tokenizer.
    """
    directory = Path(directory)
    config, tokens = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    settings = read_json(config) if config.is_file() else {}
    # tokenizer_config.json wins, as in transformers.
    named = {**(read_json(tokens) if tokens.is_file() else {}), **settings}
    special = {name: text for name in _SPECIAL if (text := _text(named.get(name))) is not None}
    if (directory / "tokenizer.json").is_file():
        backend = _saved(directory / "tokenizer.json")
    elif (directory / "vocab.txt").is_file():
        special = {**wordpiece.SPECIAL, **special}
        known = {name: special[name] for name in wordpiece.SPECIAL}
        backend = wordpiece.build(directory / "vocab.txt", settings, known)
    else:
        _refuse_slow(directory)
        return None
    return Tokenizer(backend=backend, special=special, chat_template=_template(directory, settings))


def _saved(path: Path) -> Any:
    tokenizers = require("tokenizers")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{path}: not a tokenizer: {error}") from None
    # A saved tokenizer may carry the padding and truncation of the run that saved it.
    backend.no_padding()
    backend.no_truncation()
    return backend


def from_gguf(metadata: Mapping[str, Any], *, path: Path) -> Tokenizer | None:
    """The tokenizer that a GGUF file's metadata describes, or None if it describes none.

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
    )


def _refuse_slow(directory: Path) -> None:
    for name in ("tokenizer.model", "vocab.json", "spiece.model"):
        if (directory / name).is_file():
            raise ValueError(
                f"{directory / name}: only tokenizer.json can be read; write one by transformers' "
                "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
            )


def _text(token: Any) -> str | None:
    """A special token's text: a string, or an object that has it as `content`."""
    return token.get("content") if isinstance(token, Mapping) else token


def _template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    raw = settings.get("chat_template")
    if isinstance(raw, list):  # several by name
        raw = {entry["name"]: entry["template"] for entry in raw}.get("default")
    return raw


# Compiled once a template, not once a conversation.
@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    jinja2 = require("jinja2")
    Extension = require("jinja2.ext").Extension
    Environment = require("jinja2.sandbox").ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words; here it only lets them through."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    # Jinja's own filter escapes HTML; this is transformers'.
    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from None
