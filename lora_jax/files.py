"""Files and folders that are written whole or not at all, and locked folders.

Every file of this package is written through `replacing`, except logs, which grow record by record
(`lora_jax.train.metrics`), and the checkpoints of a run, which Orbax's manager writes the same way.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_AT_CWD, _SWAP = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
# Errors of renameat2 where the kernel or the file system lacks the exchange.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
# Seconds that a process may take between making a temporary folder and locking it.
_UNLOCKED = 60
LOCK = ".lock"  # in a folder that one process writes


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path for a new file or folder, which replaces `path` at the end.

    A reader, or a crash of the machine, finds the old content or the new one, never half of it.
    If the block raises, the old content stays. What a killed process left behind is removed by the
    next call for the same path.

    Args:
      path: the file or folder; missing folders above it are made. A symbolic link is followed.

    Raises:
      OSError: it cannot be written; the old content is intact.

    Example:
      with replacing("result.json") as new:
          new.write_text("{}")
    """
    path = Path(os.path.realpath(path))
    try:
        with temporary_beside(path) as folder:
            new = folder / path.name
            yield new
            sync(new)
            _put(new, path)
            sync(path.parent, deep=False)
    except OSError as error:
        # A user does not know the temporary name, and an error of the disk has no name at all.
        if error.errno is None or not _is_inside(error.filename, path.parent):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _is_inside(name: Any, folder: Path) -> bool:
    """Whether an error's file is in a temporary folder in `folder`, or has no name at all."""
    if not isinstance(name, str):
        return True
    first, _, _ = name.removeprefix(f"{folder}{os.sep}").partition(os.sep)
    return first.startswith(".") and first.endswith(".tmp")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text as a whole file."""
    with replacing(path) as new:
        new.write_text(text, "utf-8")


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yields an empty folder on the file system of `path`, which is removed at the end.

    A folder whose lock is free was left by a killed process, and the next call for `path` removes
    it. Process numbers would not show that: in containers every run may have the same one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    folder = path.parent / f"{_mark(path)}{uuid.uuid4().hex[:8]}.tmp"
    folder.mkdir()
    try:
        with open(folder / LOCK, "xb") as lock:
            _try_lock(lock.fileno())
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _mark(path: Path) -> str:
    # Names are cut because a file system allows 255 bytes.
    return f".{path.name[:50]}."


def leftovers(path: Path) -> list[Path]:
    """Temporary folders of running and of killed writers of `path`."""
    start = _mark(path)
    found = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(p for p in found if p.name.startswith(start) and p.suffix == ".tmp")


def sweep(path: Path) -> None:
    """Removes what killed writers of `path` left beside it.

    If one was killed between the two renames of a replacement, its old content is put back.
    """
    for folder in leftovers(path):
        if _in_use(folder):
            continue
        old = _aside(folder, path)
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: Path) -> bool:
    try:
        with open(folder / LOCK, "r+b") as lock:
            return not _try_lock(lock.fileno())
    except FileNotFoundError:
        # No lock yet: its owner has just made it, or is removing it, or was killed in between.
        with contextlib.suppress(FileNotFoundError):
            return time.time() - folder.stat().st_mtime < _UNLOCKED
        return True
    except OSError:  # the lock of another user, which cannot be opened
        return True


def _try_lock(handle: int) -> bool:
    """Whether this process now has the lock; false where the file system has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sync(path: Path, *, deep: bool = True) -> None:
    """Waits until a file, or a folder with its content, is on the disk.

    A rename may reach the disk before the data: after a crash of the machine a new name would then
    point to an empty file. A full disk, too, may show only here.
    """
    inside = path.rglob("*") if deep and path.is_dir() else ()
    for each in (*inside, path):
        handle = os.open(each, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put(new: Path, path: Path) -> None:
    if not (new.is_dir() and path.exists()):
        os.replace(new, path)
    elif not exchange(new, path):
        # Two renames leave a moment without the folder; `sweep` puts the old one back after a
        # crash in it.
        old = _aside(new.parent, path)
        os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(old, path)
            raise


def _aside(folder: Path, path: Path) -> Path:
    return folder / f"{path.name}.old"


def exchange(a: Path, b: Path) -> bool:
    """Exchanges two folders atomically.

    Returns:
      False if the system or the file system does not support it; nothing is changed then.

    Raises:
      OSError: the exchange failed.
    """
    # Python has no function for it; macOS has no `renameat2`.
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    places = (_AT_CWD, os.fsencode(a), _AT_CWD, os.fsencode(b))
    if renameat2(*places, _SWAP) == 0:
        return True
    if (number := ctypes.get_errno()) in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(b))


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other processes from writing in a folder, which is made if it is missing.

    Raises:
      BlockingIOError: another process writes there; it is named.
      OSError: the folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    with contextlib.ExitStack() as stack:
        # The file is written over, and a symbolic link may lead to any other.
        lock = stack.enter_context(
            open(path, "a+b", 0, opener=lambda p, how: os.open(p, how | os.O_NOFOLLOW, 0o666))
        )
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read(200).decode(errors="replace").strip() or "another process"
            raise BlockingIOError(
                f"{directory}: {owner} is writing there; wait until it ends, or choose another "
                "folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{directory}: its file system has no locks ({error.strerror}); start no second "
                "run there",
                stacklevel=3,
            )
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(lock.fileno())):
            # The last owner removed the file after it was opened here: lock the new one.
            stack.close()
            stack.enter_context(locked(directory))
        else:
            # Callbacks run last in, first out: the file is removed while it is still locked.
            stack.callback(path.unlink, missing_ok=True)
            lock.truncate(0)
            try:
                lock.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            except OSError as error:  # a full disk, whose error has no name
                raise OSError(error.errno, error.strerror, str(path)) from error
        yield


@contextlib.contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """Names the file in errors about values of a type that their reader does not expect.

    The fields that matter are checked one by one; this is for the others.

    Raises:
      ValueError: in place of Python's own error.
    """
    try:
        yield
    except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path}: a value is of the wrong kind: {reason}") from error


# What is read from a model's or an adapter's directory, the folder of chat templates among it.
_READ = (".json", ".safetensors", ".jinja", ".txt", ".model", "additional_chat_templates")


def check_links(directory: Path) -> None:
    """Refuses links out of a downloaded directory, which may point to any file of this machine.

    The Hub's cache is made of links: `snapshots/REVISION` links to its own `blobs`.

    Raises:
      ValueError: a link points elsewhere; it is named.
    """
    home = directory.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    for path in sorted(p for p in directory.glob("*") if p.is_symlink()):
        try:
            real = path.resolve()
        except (OSError, RuntimeError):
            raise ValueError(f"{path}: a link that points to itself; remove it") from None
        inside = real.is_relative_to(home) or real.is_relative_to(blobs)
        if path.name.endswith(_READ) and not inside:
            raise ValueError(f"{path}: links to {real}, outside its directory; copy the file")


def parse_json(data: bytes) -> Any:
    """Parses JSON strictly: a name that occurs twice in an object is an error, not the last one.

    Raises:
      ValueError: it is not JSON, with the line: `:3: not JSON: ...`.
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f":{line}: not UTF-8 text: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f":{error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(":1: not JSON: nested too deeply") from None
    except ValueError as error:  # a name twice, or a number of thousands of digits
        raise ValueError(f": {error}") from None
    if half := half_character(value, data):
        line = text.lower()[: text.lower().find(half)].count("\n") + 1
        raise ValueError(f":{line}: `{half}` is half of a character; remove it")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"`{twice}` occurs twice in one object")
    return content


def half_character(value: Any, data: bytes) -> str:
    r"""The first half of a character in a JSON value, as `\ud83d`; empty if there is none.

    JSON can spell such halves (lone surrogates), but UTF-8 cannot, and tokenizers refuse them.

    Args:
      value: the parsed JSON.
      data: what it was parsed from; the value is searched only if this has an escape of a half.
    """
    if b"\\ud" in data.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return f"\\u{ord(str(error.object)[error.start]):04x}"
    return ""


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file; see `parse_json`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not JSON, with path and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}{error}") from None


def read_object(path: str | os.PathLike, *, optional: bool = False) -> dict[str, Any]:
    """Reads a JSON file that holds an object; see `read_json`.

    Args:
      path: the file.
      optional: an absent file is an empty object.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not JSON, or no object.
    """
    if optional and not Path(path).is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def check_new(path: str | os.PathLike) -> None:
    """Checks that a path is free, for a writer that replaces nothing.

    Raises:
      FileExistsError: a file or folder is there.
    """
    if Path(path).exists():
        raise FileExistsError(f"{path}: exists already; choose another directory")


def kept(path: str | os.PathLike, make: Callable[[], Any], *, indent: int | None = None) -> Any:
    """Reads the JSON at `path`, or computes it with `make` and writes it there first.

    Args:
      path: a JSON file, its name made of every setting that its values depend on. A missing
        folder is made.
      make: computes the values.
      indent: of the file, as in `json.dumps`.

    Raises:
      ValueError: the file is not JSON.
    """
    path = Path(path)
    if path.is_file():
        try:
            return json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON ({error}); remove the file, run again") from None
    text = json.dumps(make(), indent=indent)
    write_text(path, text)
    # Parsed again, so that this run gets what the next one reads: lists in place of tuples.
    return json.loads(text)
