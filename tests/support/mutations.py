"""Mutations that know a file's format: JSON, safetensors, GGUF, JSON lines, TOML, any bytes."""

import copy
import json
import random
from collections.abc import Callable

# What no field holds, or few do.
VALUES = (
    None, True, False, 0, -1, 1, 2.5, 2**31, 2**64, 1e308, -0.0, float("nan"), float("inf"), "",
    "text", "0", "(.+)+$", "[", "(?P<", "*", "../../etc/passwd", "\ud83d", "\x00", "x" * 2000, [],
    [[]], [None], ["text", 1], {}, {"": None}, {"type": "text"}, {"text": {"text": []}},
)  # fmt: skip
NUMBERS = (0, 1, 7, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)

Mutation = Callable[[random.Random, bytes], bytes]


def _nodes(value: dict | list, found: list) -> list:
    """Every place in a JSON value, as its container and key."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in list(pairs):
        found.append((value, key))
        if isinstance(child, dict | list):
            _nodes(child, found)
    return found


def mutate_value(rng: random.Random, value: dict | list) -> str:
    """The text of a JSON value with one to three of its places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not (nodes := _nodes(value, [])):
            break
        container, key = rng.choice(nodes)
        how = rng.randrange(10)
        if how < 6:
            container[key] = copy.deepcopy(rng.choice(VALUES))
        elif how == 6:
            del container[key]
        elif how == 7 and isinstance(container, dict):
            container[rng.choice(("text", str(key).upper(), f"{key}s"))] = container[key]
        elif how == 8:
            container[key] = copy.deepcopy(rng.choice(nodes)[0])
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
    text = json.dumps(value)
    if rng.randrange(12) == 0 and isinstance(value, dict) and value:  # a name twice
        name = rng.choice(list(value))
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(rng.choice(VALUES))}}}"
    return text


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    if rng.randrange(5) == 0:
        return mutate_bytes(rng, content)
    return mutate_value(rng, json.loads(content)).encode()


def mutate_lines(rng: random.Random, content: bytes) -> bytes:
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(rng, lines[at])
    return b"\n".join(lines)


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    how = rng.randrange(8)
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if how == 2:
        return content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at:]
    if how == 3:
        return content[:at] + rng.choice((b"[", b'{"a":')) * 5000 + content[at:]
    if how == 4:
        return content[:at] + content[at + rng.randrange(1, 40) :]
    if how == 5:
        return rng.choice((b"", b"null", b"[]", b"{}", b"0", b'"a"', b"\xef\xbb\xbf" + content))
    if how == 6:
        return (
            content[:at] + rng.choice((b'"\\ud800"', b"\xff\xfe", b"\x00", b"1e999")) + content[at:]
        )
    return content + content[at:]


def mutate_safetensors(rng: random.Random, content: bytes) -> bytes:
    end = 8 + int.from_bytes(content[:8], "little")
    how = rng.randrange(4)
    if how < 2:
        header = mutate_value(rng, json.loads(content[8:end])).encode()
        return len(header).to_bytes(8, "little") + header + content[end:]
    if how == 2:
        return rng.choice(NUMBERS).to_bytes(8, "little") + content[8:]
    return mutate_bytes(rng, content)


def mutate_gguf(rng: random.Random, content: bytes) -> bytes:
    """Numbers of 4 or 8 bytes in the header, whose length is about that of all but the data."""
    if rng.randrange(4) == 0:
        return mutate_bytes(rng, content)
    width, at = rng.choice((4, 8)), rng.randrange(min(len(content), 4000))
    number = rng.choice(NUMBERS) % 256**width
    return content[:at] + number.to_bytes(width, "little") + content[at + width :]


def mutate_toml(rng: random.Random, content: bytes) -> bytes:
    lines = content.decode().splitlines()
    at, how = rng.randrange(len(lines)), rng.randrange(6)
    name = lines[at].partition(" = ")[0]
    new = ("1", "-1", "nan", "inf", '"text"', "[]", "[[1], 2]", "{}", "{a = 1}", "true", '""',
           "1979-05-27", "9" * 30, "[" * 3000, '"\\ud800"', "'")  # fmt: skip
    if how < 3:
        lines[at] = f"{name} = {rng.choice(new)}"
    elif how == 3:
        lines.insert(at, rng.choice((lines[at], "[train]", "[[lora]]", "[a.b]", "unknown = 1")))
    elif how == 4:
        lines[at] = f"{rng.choice(('text', name.upper()))} = {rng.choice(new)}"
    else:
        return mutate_bytes(rng, content)
    return "\n".join(lines).encode()
