"""Reads the structs of Thrift's compact protocol, as far as headers of Parquet pages need it."""

import mmap
from typing import Any

_MOST_DEPTH = 8
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 12


class ThriftError(ValueError):
    """The bytes are no such struct."""


def read_struct(data: mmap.mmap | bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """The fields of the struct at `at` by number, and where it ends.

    Integers are ints, structs dicts, booleans bools; of others only the number is there.
    """
    if depth > _MOST_DEPTH:
        raise ThriftError("nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    try:
        while head := data[at]:
            at += 1
            if head >> 4:
                number += head >> 4
            else:
                number, at = _integer(data, at)
            fields[number], at = _value(data, at, head & 15, depth)
    except IndexError:
        raise ThriftError("cut off") from None
    return fields, at + 1


def _value(data: mmap.mmap | bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, at
    if kind in (_I16, _I32, _I64):
        return _integer(data, at)
    if kind == _STRUCT:
        return read_struct(data, at, depth + 1)
    if kind == _BINARY:
        size, at = _unsigned(data, at)
        return None, at + size
    if kind in (_BYTE, _DOUBLE):
        return None, at + (1 if kind == _BYTE else 8)
    raise ThriftError(f"a field of kind {kind}")


def _unsigned(data: mmap.mmap | bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ThriftError("a number is too long")


def _integer(data: mmap.mmap | bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at
