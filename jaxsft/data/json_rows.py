"""Reads rows of JSON: one object a line, objects over several lines, an array, an object with rows.

Values that are no objects are given as they are: what uses rows rejects and counts them. NaN and
Infinity are floats, a key that stands twice has a `Repeated`. A value has at most 64 MiB.
"""

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from json.decoder import JSONDecodeError
from typing import Any

from jaxsft.data.containers import MAX_ROW_BYTES, Lines, columns_for, not_utf8, object_of
from jaxsft.data.fields import is_part

_SPACES = re.compile(r"[ \t\r\n]*")
_MARKS = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[\]{}]', re.DOTALL)
_CHUNK_CHARS = 2**20
_LOOK_AHEAD = 32  # characters behind an error that cannot come from the end of a chunk


class DeeplyNested:
    """In the place of a JSON value that is nested too deeply to be read."""


def _int(digits: str) -> int | float:
    return int(digits) if len(digits) < 4000 else float(digits)  # int() has a limit


_DECODER = json.JSONDecoder(object_pairs_hook=object_of)
_LONG_NUMBERS = json.JSONDecoder(object_pairs_hook=object_of, parse_int=_int)  # slower


def is_json(line: bytes) -> bool:
    """Whether the line is one JSON value."""
    try:
        _decode_line(line)
    except (ValueError, RecursionError):
        return False
    return True


def read_json_rows(
    lines: Lines, line: bytes, columns: Mapping[str, str] | None
) -> Iterator[tuple[str, Any]]:
    """Yields ("file:line", value) from `line`, which was read last, to the end of the file.

    Rows of an array and of an object with rows have ("file:row n", value).

    Raises:
      ValueError: a line is not UTF-8, not JSON or cut off, or a value has over 64 MiB.
    """
    rows = (_read_list if line.lstrip()[:1] == b"[" else _read_lines)(lines, line)
    first = next(rows, None)
    if first is None:
        return
    inner = _rows_in(first, columns)
    if inner is None:
        yield first
        yield from rows
        return
    try:
        second = next(rows, None)
    except ValueError:
        yield first
        raise
    if second is None:
        yield from ((f"{lines.path}:row {i}", row) for i, row in enumerate(inner, 1))
    else:
        yield first
        yield second
        yield from rows


def _rows_in(
    first: tuple[str, Any], columns: Mapping[str, str] | None
) -> list[dict[str, Any]] | None:
    """The rows of an object such as {"data": [rows]}; None for an object that is a row itself."""
    where, row = first

    def has_part(row: dict[str, Any]) -> bool:
        named = columns_for(row, columns)
        return any(is_part(name, named) for name in row)

    if not isinstance(row, dict) or has_part(row):
        return None
    lists = {
        name: value
        for name, value in row.items()
        if isinstance(value, list) and value and isinstance(value[0], dict) and has_part(value[0])
    }
    if len(lists) > 1:
        names = ", ".join(f'"{str(name)[:40]}"' for name in list(lists)[:8])
        raise ValueError(
            f"{where}: is one object with several lists of rows ({names}); save the one that you "
            "mean as a file of its own"
        )
    return next(iter(lists.values()), None)


def _read_list(lines: Lines, line: bytes) -> Iterator[tuple[str, Any]]:
    number, after = lines.number, b""
    if line.endswith(b"\n"):
        after = lines.read()
        while after and not after.strip():
            line, after = line + after, lines.read()
    # A list on a line of its own is a row among others, if others follow.
    if line.rstrip().endswith(b"]") and after and after.lstrip()[:1] not in (b",", b"]"):
        values = _Values(lines, line, number, ended=True)
        while values.skip_space():
            yield f"{lines.path}:{number}", values.read()
        yield from _read_lines(lines, after)
    else:
        yield from _read_array(_Values(lines, line + after, number))


def _read_lines(lines: Lines, line: bytes) -> Iterator[tuple[str, Any]]:
    while line:
        if len(line) > MAX_ROW_BYTES:
            raise ValueError(f"{lines.where}: {_TOO_LONG}")
        if line.strip():
            try:
                value = _decode_line(line)
            except (JSONDecodeError, UnicodeDecodeError, RecursionError):
                yield from _read_values(_Values(lines, line, lines.number))  # over several lines
                return
            yield lines.where, value
        line = lines.read()


def _read_values(values: "_Values") -> Iterator[tuple[str, Any]]:
    while values.skip_space():
        where = f"{values.lines.path}:{values.line}"
        yield where, values.read()


_TOO_LONG = (
    "over 64 MiB; is this JSONL, one object a line? If one object holds all rows, save its list as "
    "a JSON array"
)


def _decode_line(line: bytes) -> Any:
    text = line.decode("utf-8")
    try:
        return _DECODER.decode(text)
    except JSONDecodeError:
        raise
    except ValueError:  # of int()
        return _LONG_NUMBERS.decode(text)


def _read_array(values: "_Values") -> Iterator[tuple[str, Any]]:
    number = 0
    while values.skip_space():
        values.expect("[")
        if not values.peek("]"):
            while True:
                number += 1
                yield f"{values.lines.path}:row {number}", values.read()
                if not values.peek(","):
                    break
                values.expect(",")
        values.expect("]")


class _Values:
    """JSON values one after the other, wherever lines end; holds one value and a chunk of text."""

    def __init__(self, lines: Lines, pending: bytes, line: int, *, ended: bool = False) -> None:
        """Reads on after the bytes `pending`, which begin in this line."""
        self.lines = lines
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._line, self._counted = line, 0
        self._before = 0, 0  # characters and bytes of the line that are not in the text any more
        self._fault: str | None = None  # of the byte behind the text
        self._ended = False
        self._add(pending)
        self._ended = self._ended or ended

    @property
    def line(self) -> int:
        """The number of the line that is read next."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def skip_space(self) -> bool:
        """Whether there is more than white space."""
        while True:
            match = _SPACES.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return True
            if not self._fill():
                if self._fault:
                    raise self._error(self._text.count("\n"), self._fault)
                return False

    def peek(self, mark: str) -> bool:
        """Whether the next character, white space aside, is this one."""
        return self.skip_space() and self._text[self._at] == mark

    def expect(self, mark: str) -> None:
        """Goes behind the next character, which must be this one."""
        if not self.peek(mark):
            raise self._broken(JSONDecodeError(f"Expecting {mark!r}", self._text, self._at))
        self._at += 1

    def read(self) -> Any:
        """The next value."""
        if not self.skip_space():
            raise self._broken(JSONDecodeError("Expecting value", self._text, self._at))
        while True:
            error = None
            try:
                value, end = self._decode()
            except JSONDecodeError as caught:
                error, end = caught, len(self._text)
            if end < len(self._text) or (error is None and self._ended):
                self._at = end
                return value
            if error is not None and self._is_certain(error):
                raise self._broken(error)
            if len(self._text) - self._at > MAX_ROW_BYTES:
                raise ValueError(f"{self.lines.path}:{self.line}: {_TOO_LONG}")
            if not self._fill() and error is not None:
                raise self._broken(error)

    def _is_certain(self, error: JSONDecodeError) -> bool:
        """Whether it comes from the text that is there, not from its end."""
        is_open = error.msg.startswith("Unterminated")
        return not is_open and error.pos + _LOOK_AHEAD < len(self._text)

    def _decode(self) -> tuple[Any, int]:
        try:
            return _DECODER.raw_decode(self._text, self._at)
        except JSONDecodeError:
            raise
        except ValueError:  # of int()
            return _LONG_NUMBERS.raw_decode(self._text, self._at)
        except RecursionError:
            return DeeplyNested(), self._end_of_nested()

    def _end_of_nested(self) -> int:
        depth = 0
        for mark in _MARKS.finditer(self._text, self._at):
            depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(mark[0], 0)
            if depth == 0:
                return mark.end()
        raise JSONDecodeError("Unterminated nesting", self._text, self._at)

    def _fill(self) -> bool:
        """Reads as much text again as there is; False at the end."""
        if self._ended:
            return False
        self._line, self._counted = self.line, 0
        dropped = self._text[: self._at]
        start = dropped.rfind("\n") + 1
        part = dropped[start:]
        self._before = (0, 0) if start else self._before
        self._before = self._before[0] + len(part), self._before[1] + len(part.encode())
        self._text, self._at = self._text[self._at :], 0
        with self.lines.broken_at(self._line + self._text.count("\n")):
            size = min(max(_CHUNK_CHARS, len(self._text)), MAX_ROW_BYTES + 1)
            self._add(self.lines.file.read(size))
        return True

    def _add(self, data: bytes) -> None:
        try:
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self._ended = True
            self._text += error.object[: error.start].decode("utf-8")
            start = self._text.rfind("\n") + 1
            num_before = len(self._text[start:].encode()) + (0 if start else self._before[1])
            self._fault = not_utf8(num_before, error.object[error.start])
        self._ended = self._ended or not data

    def _broken(self, error: JSONDecodeError) -> ValueError:
        if self._text[error.pos : error.pos + 1] in ("\r", "\n"):  # in a text, which no line ends
            try:
                _DECODER.raw_decode(self._text[: error.pos], self._at)
            except JSONDecodeError as caught:
                error = caught
        if self._fault and not self._is_certain(error):
            return self._error(self._text.count("\n"), self._fault)
        first = self.line
        at = len(self._text[: error.pos].rstrip(" \t\r\n"))  # what is missing is missing there
        at = error.pos if self._text.find("\n", at, error.pos) < 0 else max(at, self._at)
        line = first + self._text.count("\n", self._at, at)
        start = self._text.rfind("\n", 0, at) + 1
        column = at - start + 1 + (0 if start else self._before[0])
        place = f"column {column}" if line == first else f"line {line}, column {column}"
        return ValueError(
            f"{self.lines.path}:{first}: broken or cut off at {place} ({error.msg}); every line "
            "must be one complete JSON object, or the file one JSON array"
        )

    def _error(self, more_lines: int, message: str) -> ValueError:
        counted = self._line - self._text.count("\n", 0, self._counted)
        return ValueError(f"{self.lines.path}:{counted + more_lines}: {message}")
