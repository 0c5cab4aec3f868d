"""Reading the tokenizer of a Hugging Face directory: many files, some older than others.

directory/tokenizer.json                  the tokenizer, or BERT's vocab.txt where there is none
directory/tokenizer_config.json           special tokens, added tokens, the chat template
directory/special_tokens_map.json, added_tokens.json      the same in older directories
directory/chat_template.jinja, additional_chat_templates/*.jinja, chat_template.json
directory/config.json, generation_config.json             the ids that end a text

Which file wins is transformers' order.
"""

import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_jax.compat import require
from lora_jax.files import read_object
from lora_jax.hf.tokenizer import wordpiece
from lora_jax.hf.tokenizer.classes import Class
from lora_jax.hf.tokenizer.rebuild import class_of, rebuild, surround
from lora_jax.hf.tokenizer.tokenizer import Tokenizer

SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_OLD_TEMPLATE = "chat_template.json"
_MORE_TEMPLATES = "additional_chat_templates"
_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"
_KEPT = (SETTINGS, _MAP, _ADDED, TEMPLATE, _OLD_TEMPLATE)

_SPECIAL = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def from_directory(directory: str | Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory.

    Returns:
      The tokenizer, or None if the directory has no tokenizer at all.

    Raises:
      ValueError: a broken file, tokens whose declared ids the tokenizer does not have, or only
        files of a slow tokenizer.
    """
    directory = Path(directory)
    settings = read_object(directory / SETTINGS, optional=True)
    given = _with_map(directory, settings)
    named, its = _special_tokens(given), None
    if (directory / "tokenizer.json").is_file():
        backend = _saved(directory / "tokenizer.json")
        backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))
        config = read_object(directory / "config.json", optional=True)
        its = rebuild(backend, class_of(settings, config, backend), settings, named)
    elif (directory / "vocab.txt").is_file():
        named = {**wordpiece.SPECIAL, **named}
        known = {name: named[name] for name in wordpiece.SPECIAL}
        backend = wordpiece.build(directory / "vocab.txt", settings, known)
    else:
        _refuse_slow(directory)
        return None
    _add_declared(backend, directory, settings, {*named.values(), *map(_text, _extra(given))})
    special = _add_named(backend, directory, given, named)
    templates = _templates(directory, settings)
    ends = _ends(directory, backend)
    special = _with_eos(special, ends, backend)
    if its is not None:
        empty = {name: None for name in its.special if name in given and given[name] is None}
        special = _add_defaults(backend, directory, its, {**empty, **special})
        surround(backend, its, special)
    return Tokenizer(
        backend=backend,
        special=special,
        chat_template=templates.pop("default", None),
        templates=templates,
        ends=ends,
        files=_files(directory),
    )


def template_of(files: Mapping[str, str]) -> str | None:
    """The default chat template in the text of settings files, as `Tokenizer.files` has it."""
    if TEMPLATE in files:
        return files[TEMPLATE]
    settings = json.loads(files.get(SETTINGS, "{}"))
    return _named_templates(settings.get("chat_template")).get("default")


def _files(directory: Path) -> dict[str, str]:
    more = directory / _MORE_TEMPLATES
    templates = sorted(more.glob("*.jinja")) if more.is_dir() else ()
    paths = [*(directory / name for name in _KEPT if (directory / name).is_file()), *templates]
    return {str(path.relative_to(directory)): _read(path) for path in paths}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None


def _with_map(directory: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with what special_tokens_map.json says of the special tokens."""
    # A directory that lists its added tokens has everything in tokenizer_config.json; in others
    # special_tokens_map.json is the newer of the two.
    listed = "added_tokens_decoder" in settings
    newer = {} if listed else read_object(directory / _MAP, optional=True)
    # But its tokens without a name count only where the other file has no list.
    newer = {n: x for n, x in newer.items() if n not in _LISTS or n not in settings}
    return {**settings, **newer}


def _special_tokens(given: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text of the special tokens, the model's own (`image_token`) among them."""
    own = given.get("extra_special_tokens")
    given = {**given, **(own if isinstance(own, dict) else {})}
    names = (*_SPECIAL, *(n for n in given if n.endswith("_token") and not n.startswith("add_")))
    return {name: text for name in names if (text := _text(given.get(name))) is not None}


def _text(token: Any) -> str | None:
    """A token's text: a string, or an object that has it as `content`."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) and text else None


def _saved(path: Path) -> Any:
    tokenizers = require("tokenizers")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exceptions, and panics that are none
        raise ValueError(f"{path}: not a tokenizer: {error}") from None
    # A saved tokenizer may carry the padding and truncation of the run that saved it.
    backend.no_padding()
    backend.no_truncation()
    return backend


def _add_declared(
    backend: Any, directory: Path, settings: Mapping[str, Any], special: Collection[str | None]
) -> None:
    """Adds the tokens that tokenizer_config.json or added_tokens.json declare with their ids."""
    path, declared = directory / SETTINGS, settings.get("added_tokens_decoder")
    if declared is None:
        path = directory / _ADDED
        declared = {
            # As text, which `int` reads below: a wrong file may have any value here.
            str(number): {"content": x, "special": x in special, "normalized": x not in special}
            for x, number in read_object(path, optional=True).items()
        }
    try:
        tokens = {int(number): _added(token, {}) for number, token in declared.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the added tokens are not ids with texts: {error!r}") from None
    there = backend.get_added_tokens_decoder()
    # In the order of their ids, because the library numbers new tokens one after the other.
    for number, token in sorted(tokens.items()):
        if repr(there.get(number)) != repr(token):
            backend.add_tokens([token])
        if (got := backend.token_to_id(token.content)) != number:
            raise ValueError(
                f"{path}: declares `{token.content}` as token {number}, but the tokenizer makes it "
                f"token {got}; the files are of two tokenizers: download them again"
            )


def _add_named(
    backend: Any, directory: Path, given: Mapping[str, Any], named: Mapping[str, str]
) -> dict[str, str]:
    """Adds special tokens that have a name and no id; returns those that can be used.

    A text that is no token of the vocabulary gets the next id. A model whose embedding has no row
    for that id cannot use it.
    """
    rows = _rows(directory)
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    special = dict(named)
    plain = {"normalized": False, "special": True}
    # The files may give a named token as an object with flags.
    tokens = [(name, given.get(name, text)) for name, text in named.items()]
    for name, token in [*tokens, *((None, token) for token in _extra(given))]:
        text = _text(token) or ""
        number = backend.token_to_id(text)
        fresh = backend.get_vocab_size(with_added_tokens=True)
        if number is None and fresh >= rows:
            what = "an extra special token" if name is None else f"`{name}`"
            warnings.warn(
                f"{directory}: {what} is {text!r}, which is not in the vocabulary of {rows} tokens "
                "and is left out",
                stacklevel=4,
            )
            special.pop(name or "", None)
        elif text not in added or (name and not added[text].special):
            # A token that is there keeps its flags, but text leaves special tokens out.
            added[text] = _added(token, plain) if text not in added else added[text]
            added[text].special = True
            backend.add_tokens([added[text]])
    return special


def _rows(directory: Path) -> float:
    """Rows of the model's embedding; no limit where config.json does not state them."""
    config = read_object(directory / "config.json", optional=True)
    text_config = config.get("text_config")
    rows = {**config, **(text_config if isinstance(text_config, dict) else {})}.get("vocab_size")
    return rows if isinstance(rows, int) else float("inf")


def _add_defaults(
    backend: Any, directory: Path, its: Class, special: Mapping[str, str | None]
) -> dict[str, str]:
    """The special tokens with those of the class; those the model has no row for are left out.

    Args:
      backend: gets the tokens it lacks.
      directory: has the model's config.json.
      its: the class.
      special: name -> text of the special tokens; None for one that the files leave empty, which
        the class does not fill.
    """
    rows, found = _rows(directory), {name: text for name, text in special.items() if text}
    missing = {name: text for name, text in its.special.items() if name not in special}
    for name, text in [*missing.items(), *(("", text) for text in its.extra)]:
        if backend.token_to_id(text) is None:
            if backend.get_vocab_size(with_added_tokens=True) >= rows:
                continue
        backend.add_tokens([_added(text, {"normalized": False, "special": True})])
        found |= {name: text} if name else {}
    return found


def _extra(settings: Mapping[str, Any]) -> list[Any]:
    """The special tokens without a name: texts, or objects with flags."""
    found: Any = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    return [x for x in found if _text(x)] if isinstance(found, list) else []


def _added(token: Any, flags: Mapping[str, bool]) -> Any:
    """An added token of the library, from a text or an object with flags."""
    given = token if isinstance(token, Mapping) else {"content": token, **flags}
    known = {flag: given[flag] for flag in _FLAGS if flag in given}
    return require("tokenizers").AddedToken(given["content"], **known)


def _ends(directory: Path, backend: Any) -> tuple[int, ...]:
    """The ids in the model's files that end a text."""
    found: list[int] = []
    for name in ("config.json", "generation_config.json"):
        given = read_object(directory / name, optional=True).get("eos_token_id")
        ids = given if isinstance(given, list) else [given]
        # Some configs name ids that their tokenizer does not have.
        found += [i for i in ids if type(i) is int and 0 <= i < 2**32 and backend.id_to_token(i)]
    return tuple(dict.fromkeys(found))


def _with_eos(special: dict[str, str], ends: tuple[int, ...], backend: Any) -> dict[str, str]:
    """The special tokens with the model's end token, where the tokenizer's files name none."""
    if "eos_token" in special or not ends:
        return special
    return {**special, "eos_token": backend.id_to_token(ends[0])}


def _templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; files win over tokenizer_config.json."""
    found = {"default": directory / TEMPLATE}
    more = directory / _MORE_TEMPLATES
    found |= {path.stem: path for path in (more.glob("*.jinja") if more.is_dir() else ())}
    texts = {name: _read(path) for name, path in found.items() if path.is_file()}
    if not texts:
        texts = _named_templates(settings.get("chat_template"))
    if not texts:  # a processor's file
        texts = _named_templates(
            read_object(directory / _OLD_TEMPLATE, optional=True).get("chat_template")
        )
    return texts


def _named_templates(raw: Any) -> dict[str, str]:
    if isinstance(raw, str):
        return {"default": raw}
    if isinstance(raw, list):
        raw = {e.get("name"): e.get("template") for e in raw if isinstance(e, Mapping)}
    pairs = raw.items() if isinstance(raw, Mapping) else ()
    return {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, str)}


def _refuse_slow(directory: Path) -> None:
    for name in ("tokenizer.model", "vocab.json", "spiece.model"):
        if (directory / name).is_file():
            raise ValueError(
                f"{directory / name}: only tokenizer.json can be read; write one by transformers' "
                "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
            )
