"""TensorBoard event files, written without TensorBoard.

A file is a sequence of records, each `length (8 bytes) | crc(length) | data | crc(data)`, little
endian, where crc is CRC-32C, rotated right by 15 bits plus 0xa282ead8. The data is an `Event`
in protocol-buffer encoding. Scalars need only five of its fields, so the encoder is a few lines.
The packages that write event files import torch or TensorFlow if installed, and write in a thread
that dies silently on a full disk.

Source: TensorFlow's `record_writer.h`, `event.proto` and `summary.proto`.
"""

import errno
import os
import socket
import struct
import time
from collections.abc import Mapping
from functools import lru_cache
from io import RawIOBase
from pathlib import Path
from typing import Any

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protocol-buffer wire types


def open_events(directory: Path, *, purge: int) -> RawIOBase:
    """Opens a new event file.

    Args:
      directory: created if missing; all its files belong to one run.
      purge: TensorBoard drops the events of earlier files from this step on.

    Returns:
      An unbuffered binary file, for `write_scalars`.

    Raises:
      OSError: it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{purge}"
    file = open(directory / name, "xb", buffering=0)
    _write(file, _event(0, _field(3, _BYTES, b"brain.Event:2")))
    start = _field(1, _VARINT, 1)  # SessionLog.START
    _write(file, _event(purge, _field(7, _BYTES, start)))
    return file


def write_scalars(file: RawIOBase, step: int, scalars: Mapping[str, float]) -> None:
    """Writes one event with the scalars of a step."""
    values = b"".join(
        _field(1, _BYTES, _field(1, _BYTES, tag.encode()) + _field(2, _FIXED32, value))
        for tag, value in scalars.items()
    )
    _write(file, _event(step, _field(5, _BYTES, values)))


def _event(step: int, content: bytes) -> bytes:
    return _field(1, _FIXED64, time.time()) + _field(2, _VARINT, step) + content


def _field(number: int, kind: int, value: Any) -> bytes:
    head = _varint(number << 3 | kind)
    if kind == _VARINT:
        return head + _varint(value)
    if kind == _BYTES:
        return head + _varint(len(value)) + value
    return head + struct.pack("<d" if kind == _FIXED64 else "<f", value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def _write(file: RawIOBase, data: bytes) -> None:
    length = struct.pack("<Q", len(data))
    record = length + _masked_crc(length) + data + _masked_crc(data)
    if file.write(record) != len(record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _masked_crc(data: bytes) -> bytes:
    # Masked, as TensorFlow does, because the CRC of data that holds its own CRC is weak.
    crc = 0xFFFFFFFF
    table = _crc_table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@lru_cache(maxsize=1)
def _crc_table() -> tuple[int, ...]:
    """CRC-32C (Castagnoli), reflected polynomial 0x82f63b78, byte by byte."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)
