"""Reads structs of Thrift's compact protocol, as far as the metadata of Parquet needs it."""

import mmap
from typing import Any

_MOST_DEPTH = 12
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = (
    *range(1, 11),
    12,
)


class ThriftError(ValueError):
    """The bytes are no such struct."""


def read_struct(data: mmap.mmap | bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """The fields of the struct at `at` by number, and where it ends.

    Integers are ints, structs dicts, lists and sets lists, booleans bools; others are None.
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


def get_int(fields: dict[int, Any], number: int, default: int | None = None) -> int:
    """The integer in a field; ThriftError if there is none and no default."""
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise ThriftError(f"field {number} is no integer")
    return value


def get_struct(fields: dict[int, Any], number: int) -> dict[int, Any]:
    """The struct in a field; ThriftError if there is none."""
    value = fields.get(number)
    if not isinstance(value, dict):
        raise ThriftError(f"field {number} is no struct")
    return value


def get_structs(fields: dict[int, Any], number: int) -> list[dict[int, Any]]:
    """The structs in the list in a field; ThriftError if it is none."""
    values = fields.get(number)
    if not isinstance(values, list) or not all(isinstance(each, dict) for each in values):
        raise ThriftError(f"field {number} is no list of structs")
    return values


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
    if kind in (_LIST, _SET):
        if depth > _MOST_DEPTH:
            raise ThriftError("nested too deeply")
        head, at = data[at], at + 1
        size = head >> 4
        if size == 15:
            size, at = _unsigned(data, at)
        values = []
        for _ in range(size):
            value, at = _value(data, at, head & 15, depth + 1)
            if head & 15 in (_TRUE, _FALSE):
                value, at = data[at] == _TRUE, at + 1
            values.append(value)
        return values, at
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
