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
from lora_jax.hf.tokenizer.panics import without_panics
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
_LISTS = ("extra_special_tokens", "additional_special_tokens")
_NO_TOKENS = ("add_bos_token", "add_eos_token")  # flags
_MOST = 1_000_000  # tokens
# Of T5, DeBERTa and XLM-R.
_SENTENCEPIECE = ("spiece.model", "spm.model", "sentencepiece.bpe.model")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def from_directory(directory: str | Path, *, rows: int | None = None) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory.

    Args:
      directory: the directory.
      rows: rows of the model's embedding; None takes config.json's `vocab_size`, if it is there.

    Returns:
      The tokenizer, or None if the directory has no tokenizer at all.

    Raises:
      ValueError: a broken file, tokens whose declared ids the tokenizer does not have, or only
        files of a slow tokenizer.

    Warns:
      UserWarning: special tokens for which the embedding has no row, and which are left out.
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    rows = _rows(directory) if rows is None else rows
    settings = read_object(directory / SETTINGS, optional=True)
    _check_numbers(directory, settings)
    given = _with_map(directory, settings)
    found, extra, its = _special_tokens(given), _extra(given), None
    named = found
    if path.is_file():
        backend, fills = _saved(path)
        config = read_object(directory / "config.json", optional=True)
        name = class_of(settings, config, backend)
        its, backend = rebuild(backend, name, settings, _texts(named))
        backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))
        named = _completed(named, its, fills, _empty(given))
    elif (path := directory / "vocab.txt").is_file():
        named = {**wordpiece.SPECIAL, **named}
        known = {name: _texts(named)[name] for name in wordpiece.SPECIAL}
        backend = wordpiece.build(path, settings, known)
    else:
        _refuse_slow(directory)
        return None
    _add_declared(backend, directory, settings, _texts(named), extra or ())
    # A class has its own extra tokens where the files list none.
    of_class = its.extra(settings) if its is not None and extra is None else ()
    special = _add_undeclared(backend, directory, named, extra or of_class, found, rows)
    if its is not None and its.again:
        _add_again(backend, special.values(), extra or (), plain=its.again == "plain")
    templates = _templates(directory, settings)
    texts = {name: text for name, (text, _) in templates.items()}
    ends = _ends(directory, backend, rows)
    if its is not None:
        surround(backend, its, {**its.special, **_texts(named)}, settings, directory)
    if ends and not ("eos_token" in found and "eos_token" in special):
        # The model's end token, where the tokenizer's files name none that it has.
        special["eos_token"] = backend.id_to_token(ends[0])
    return Tokenizer(
        backend=backend,
        special=special,
        chat_template=texts.pop("default", None),
        templates=texts,
        ends=ends,
        clean_up=_cleans_up(settings, backend),
        files=_files(directory),
        paths={"": path, **{name: file for name, (_, file) in templates.items()}},
        rows=rows,
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


def _check_numbers(directory: Path, settings: Mapping[str, Any]) -> None:
    """Refuses counts and ids that no tokenizer has, which the classes read."""
    for name in ("extra_ids", "unk_id"):
        value = settings.get(name, 0)
        if type(value) is not int or not 0 <= value < _MOST:
            raise ValueError(
                f"{directory / SETTINGS}: `{name}` must be a number from 0 to {_MOST - 1}, got "
                f"{value!r}"
            )


def _special_tokens(given: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> text or object of the special tokens, the model's own (`image_token`) last."""
    own = {n: given[n] for n in given if n.endswith("_token") and n not in (*_SPECIAL, *_NO_TOKENS)}
    # In transformers' order, in which new tokens are numbered: objects first.
    own = {n: own[n] for n in sorted(own, key=lambda n: isinstance(own[n], str))}
    listed = given.get("extra_special_tokens")
    texts = any(isinstance(token, str) for token in own.values()) or isinstance(listed, dict)
    more = listed if texts else given.get("model_specific_special_tokens")
    own |= more if isinstance(more, dict) else {}
    named = {name: given.get(name) for name in _SPECIAL} | own
    return {name: token for name, token in named.items() if _text(token) is not None}


def _empty(given: Mapping[str, Any]) -> set[str]:
    """The special tokens that the files leave empty."""
    return {name for name, token in given.items() if token is None}


def _completed(
    named: Mapping[str, Any], its: Class | None, fills: str | None, empty: Collection[str]
) -> dict[str, Any]:
    """The special tokens with those that a class has by default, in the order of transformers.

    Args:
      named: those of the files.
      its: the class, or None.
      fills: the padding token in tokenizer.json.
      empty: names that the files leave empty, which nothing fills.
    """
    defaults = {} if its is None else dict(its.special)
    if fills is not None:
        defaults.setdefault("pad_token", fills)
    found = {name: text for name, text in defaults.items() if name not in empty} | dict(named)
    return {name: found[name] for name in (*_SPECIAL, *defaults, *named) if name in found}


def _texts(named: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text of special tokens."""
    return {name: text for name, token in named.items() if (text := _text(token)) is not None}


def _text(token: Any) -> str | None:
    """A token's text: a string, or an object that has it as `content`."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) and text else None


def _saved(path: Path) -> tuple[Any, str | None]:
    """The backend of tokenizer.json, and the padding token that the file has."""
    tokenizers = require("tokenizers")
    with without_panics(lambda why: f"{path}: not a tokenizer: {why}"):
        backend = tokenizers.Tokenizer.from_file(str(path))
    # A saved tokenizer may carry the padding and truncation of the run that saved it.
    fills = None if backend.padding is None else backend.padding["pad_token"]
    backend.no_padding()
    backend.no_truncation()
    return backend, fills


def _add_declared(
    backend: Any,
    directory: Path,
    settings: Mapping[str, Any],
    named: Mapping[str, str],
    extra: Collection[Any],
) -> None:
    """Adds the tokens that tokenizer_config.json or added_tokens.json declare with their ids.

    Without a list in tokenizer_config.json those of tokenizer.json are declared too. A declared
    token that has a name is special.
    """
    path, declared = directory / SETTINGS, settings.get("added_tokens_decoder")
    tokens = backend.get_added_tokens_decoder()
    there = {number: repr(token) for number, token in tokens.items()}
    tokens = {} if declared is not None else tokens
    if declared is None:
        path = directory / _ADDED
        special = {*(named[n] for n in _SPECIAL if n in named), *map(_text, extra)}
        declared = {
            # As text, which `int` reads below: a wrong file may have any value here.
            str(number): {"content": x, "special": x in special, "normalized": x not in special}
            for x, number in read_object(path, optional=True).items()
        }
    try:
        tokens = {int(number): _added(token, {}) for number, token in declared.items()} | tokens
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the added tokens are not ids with texts: {error!r}") from None
    # In the order of their ids, because the library numbers new tokens one after the other.
    for number, token in sorted(tokens.items()):
        if token.content in named.values():
            token.special = True
        if there.get(number) != repr(token):
            backend.add_tokens([token])
        if (got := backend.token_to_id(token.content)) != number:
            raise ValueError(
                f"{path}: declares `{token.content}` as token {number}, but the tokenizer makes it "
                f"token {got}; the files are of two tokenizers: download them again"
            )


def _add_undeclared(
    backend: Any,
    directory: Path,
    named: Mapping[str, Any],
    extra: Collection[Any],
    from_files: Collection[str],
    rows: int | None,
) -> dict[str, str]:
    """Adds special tokens that have a name and no id; returns those that the model has a row for.

    A text that is no token of the vocabulary gets the next id, as in transformers.
    """
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    seen: set[str] = set()
    special, lost = _texts(named), []
    for name, token in [*named.items(), *((None, token) for token in extra)]:
        text = _text(token) or ""
        # Of two spellings of one token, as text or with flags, the last counts in transformers.
        if text not in added and repr(token) not in seen:
            seen.add(repr(token))
            made = _added(token, {"normalized": False, "special": True})
            made.special |= name is not None
            backend.add_tokens([made])
        if name and rows is not None and backend.token_to_id(text) >= rows:
            del special[name]
            # A class has further ones, as CodeLlama's to fill gaps, that a model does without.
            if name in (*from_files, *_SPECIAL):
                lost.append(f"`{name}` {text!r}")
    if lost:
        warnings.warn(
            f"{directory}: the model's embedding has {rows} rows, none of them for the special "
            f"tokens {', '.join(lost)}, which are left out: name its own in {SETTINGS}, or resize "
            "the embedding (transformers' `resize_token_embeddings`)",
            stacklevel=4,
        )
    return special


def _add_again(
    backend: Any, named: Collection[str], extra: Collection[Any], *, plain: bool
) -> None:
    """Makes all special tokens special; `plain` ignores `lstrip`, `single_word` and the others."""
    tokens = [*named, *map(_text, extra)] if plain else extra
    for token in tokens:
        if backend.token_to_id(_text(token) or "") is not None:
            made = _added(token, {"special": True})
            made.special = True
            backend.add_tokens([made])


def _rows(directory: Path) -> int | None:
    """Rows of the model's embedding, if config.json states them."""
    config = read_object(directory / "config.json", optional=True)
    text_config = config.get("text_config")
    rows = {**config, **(text_config if isinstance(text_config, dict) else {})}.get("vocab_size")
    return rows if isinstance(rows, int) else None


def _extra(given: Mapping[str, Any]) -> list[Any] | None:
    """The special tokens without a name: texts, or objects with flags; None without a list."""
    lists = [given[name] for name in _LISTS if isinstance(given.get(name), list)]
    if not lists:
        return None
    return [token for token in next(filter(None, lists), []) if _text(token)]


def _added(token: Any, flags: Mapping[str, bool]) -> Any:
    """An added token of the library, from a text or an object with flags."""
    given = token if isinstance(token, Mapping) else {"content": token, **flags}
    known = {flag: given[flag] for flag in _FLAGS if flag in given}
    return require("tokenizers").AddedToken(given["content"], **known)


def _ends(directory: Path, backend: Any, rows: int | None) -> tuple[int, ...]:
    """The ids in the model's files that end a text."""
    most = 2**32 if rows is None else rows
    found: list[int] = []
    for name in ("config.json", "generation_config.json"):
        given = read_object(directory / name, optional=True).get("eos_token_id")
        ids = given if isinstance(given, list) else [given]
        # Some configs name ids that their tokenizer does not have.
        found += [i for i in ids if type(i) is int and 0 <= i < most and backend.id_to_token(i)]
    return tuple(dict.fromkeys(found))


def _cleans_up(settings: Mapping[str, Any], backend: Any) -> bool:
    """Whether spaces before punctuation are taken out of decoded text."""
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    plain = type(backend.model).__name__ != "BPE" or bool(settings.get(forced))
    return plain and bool(settings.get("clean_up_tokenization_spaces"))


def _templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, tuple[str, Path]]:
    """Chat templates by name, with their files; files win over tokenizer_config.json."""
    found = {"default": directory / TEMPLATE}
    more = directory / _MORE_TEMPLATES
    found |= {path.stem: path for path in (more.glob("*.jinja") if more.is_dir() else ())}
    texts = {name: (_read(path), path) for name, path in found.items() if path.is_file()}
    for name in (SETTINGS, _OLD_TEMPLATE):  # the second is a processor's file
        if texts:
            break
        path = directory / name
        given = settings if name == SETTINGS else read_object(path, optional=True)
        named = _named_templates(given.get("chat_template"))
        texts = {key: (text, path) for key, text in named.items()}
    return texts


def _named_templates(raw: Any) -> dict[str, str]:
    if isinstance(raw, str):
        return {"default": raw}
    if isinstance(raw, list):
        raw = {e.get("name"): e.get("template") for e in raw if isinstance(e, Mapping)}
    pairs = raw.items() if isinstance(raw, Mapping) else ()
    return {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, str)}


def _refuse_slow(directory: Path) -> None:
    for name in ("tokenizer.model", "vocab.json", *_SENTENCEPIECE):
        if (directory / name).is_file():
            raise ValueError(
                f"{directory / name}: only tokenizer.json can be read; write one by transformers' "
                "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
            )
