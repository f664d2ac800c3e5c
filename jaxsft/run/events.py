"""TensorBoard's event files, as bytes: what tensorboardX and torch write, without importing torch.

An event is a protocol buffer (field numbers: event.proto, summary.proto and tensor.proto of
TensorFlow), and a file is a row of TFRecords: length, its checksum, the event, its checksum.
"""

import ctypes
import functools
import struct
from collections.abc import Mapping

START = 1  # SessionLog.SessionStatus
STRING = 7  # DataType


def file_start(time_s: float) -> bytes:
    """The first record of a file. `time_s` is in seconds since 1970, here and below."""
    return _record(time_s, 0, _field(3, "brain.Event:2"))


def session_start(time_s: float, step: int) -> bytes:
    """TensorBoard hides the points of earlier files at this step or a later one."""
    return _record(time_s, step, _field(7, _field(1, START)))


def scalars(time_s: float, step: int, values: Mapping[str, float]) -> bytes:
    """A point of a curve for each name."""
    points = [_field(1, name) + _key(2, 5) + _float32(x) for name, x in values.items()]
    return _record(time_s, step, _field(5, b"".join(_field(1, point) for point in points)))


def markdown(time_s: float, step: int, name: str, text: str) -> bytes:
    """A text, which TensorBoard shows as Markdown."""
    plugin = _field(1, _field(1, "text"))
    one_string = _field(1, STRING) + _field(2, _field(2, _field(1, 1))) + _field(8, text)
    value = _field(1, f"{name}/text_summary") + _field(9, plugin) + _field(8, one_string)
    return _record(time_s, step, _field(5, _field(1, value)))


def _float32(value: float) -> bytes:
    # What is too large becomes infinite; struct alone would raise.
    return struct.pack("<f", ctypes.c_float(value).value)


def _record(time_s: float, step: int, what: bytes) -> bytes:
    event = _key(1, 1) + struct.pack("<d", time_s) + _field(2, step) + what
    length = struct.pack("<Q", len(event))
    return length + _checksum(length) + event + _checksum(event)


def _field(number: int, value: int | str | bytes) -> bytes:
    """A whole number from 0, or a text or message with its length in front."""
    if isinstance(value, int):
        return _key(number, 0) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _key(number, 2) + _varint(len(data)) + data


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _checksum(data: bytes) -> bytes:
    """CRC-32C (RFC 3720), masked as TFRecords have it."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@functools.cache
def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in table]
    return table
