"""Turns an exception into one line of text, and defines the exit statuses."""

import errno
import re
import traceback
from collections.abc import Collection
from pathlib import Path

USAGE = 2  # a wrong command line, as in argparse
FAILURE = 1
INTERRUPTED = 130  # 128 + SIGINT, as in shells

# Errors in the arguments or the files; their texts are written for users. Any other exception is
# a bug in this program.
_EXPECTED = (ValueError, TypeError, OSError, ImportError, NotImplementedError, FloatingPointError)

_DISK = {
    errno.ENOSPC: "the disk is full: free some space, or write to another place",
    errno.EDQUOT: "your disk quota is used up: free some space, or write to another place",
    errno.EACCES: "permission denied: write to a folder that is yours",
    errno.EPERM: "permission denied: write to a folder that is yours",
    errno.EROFS: "the file system is read-only: write to another place",
    errno.ENOTDIR: "a part of the path is a file, not a folder: give another path",
    errno.EISDIR: "it is a folder, and a file was expected: give the path of a file",
    errno.EEXIST: "there is a file of that name already: give another path",
    errno.ENOENT: "there is no such file or folder: check the path",
}


# Names that libraries use in messages for what a flag of another name sets.
_OTHER_NAMES = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "init_lora_weights": "init",
    "format": "quantize", "block_size": "quantize_block",
}  # fmt: skip


def explain(error: BaseException, flags: Collection[str] = ()) -> str:
    """One line about an error: what went wrong and what to do.

    Args:
      error: the exception.
      flags: those of the command, `--max-length`: settings in the text are spelled as these.

    Returns:
      A text without line breaks.
    """
    if isinstance(error, OSError) and error.errno in _DISK and error.filename is not None:
        return _line(f"{error.filename}: {_DISK[error.errno]}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return _DISK[errno.ENOSPC]
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        return (
            "out of memory: take a smaller --batch-size (with more --accumulation), shorter "
            "examples, or --remat"
        )
    if _expected(error):
        return _with_flags(_line(str(error) or type(error).__name__), flags)
    return _line(
        f"internal error: {type(error).__name__}: {error} ({_place(error)}); "
        "please report it with what --debug prints"
    )


def _with_flags(text: str, flags: Collection[str]) -> str:
    """Python's `too_long="truncate"` as `--too-long truncate`, where there is such a flag."""

    def spelled(found: re.Match) -> str:
        name = str(found["name"])
        flag = "--" + _OTHER_NAMES.get(name, name).replace("_", "-")
        if flag not in flags or found["value"] == "...":
            return found[0]
        value = str(found["value"] or "").strip("\"'")
        shown = {"True": flag, "False": f"--no-{flag[2:]}", "": flag}.get(value, f"{flag} {value}")
        return f"`{shown}`" if found["tick"] else shown

    # `name=value`, or a name in backticks before a verb: other names in backticks are leaves.
    value = r"\"[^\"]*\"|'[^']*'|[\w.]+"
    text = re.sub(rf"(?P<tick>`?)\b(?P<name>[a-z_]+)=(?P<value>{value})(?P=tick)", spelled, text)
    return re.sub(
        r"(?P<tick>`)(?P<name>[a-z_]+)(?P<value>)`(?= (?:was|is|must|has|expects|needs)\b)",
        spelled,
        text,
    )


def _expected(error: BaseException) -> bool:
    # UnicodeError is a ValueError too, but its text is about bytes, not about what to do.
    return isinstance(error, _EXPECTED) and not isinstance(error, UnicodeError)


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"


def _line(text: str) -> str:
    return "; ".join(part for line in text.splitlines() if (part := line.strip()))
