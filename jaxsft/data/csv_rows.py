"""Reads rows of CSV and TSV: a header line, then a row for each record.

Quoted cells may hold the delimiter, quotes (doubled) and ends of lines. An empty cell is "". Cells
are texts; only in columns that are no part of the conversation a number, true or false is one.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxsft.data.containers import MAX_ROW_BYTES, Lines, columns_for, not_utf8, object_of
from jaxsft.data.fields import is_part

_DELIMITERS = "\t,;"
_QUOTED = re.compile(r'"(?:[^"]|"")*+"')
_NUMBER = re.compile(r"[+-]?\d{1,18}(\.\d{0,18})?([eE][+-]?\d{1,3})?", re.ASCII)
_NAME = re.compile(r"[^\W_][\w .:/()-]{0,63}|_\w{1,63}")


def read_csv(
    lines: Lines, header: bytes, columns: Mapping[str, str] | None
) -> Iterator[tuple[str, Any]]:
    """Yields ("file:line", row) of the records behind the header, the line that was read last.

    A record with more cells than the header is given as a list; one with fewer lacks the last.

    Raises:
      ValueError: there is no header, a line is not UTF-8, a quote is not closed, or a record has
        over 64 MiB.
    """
    csv.field_size_limit(MAX_ROW_BYTES)  # 128 KiB by default
    feed = _Feed(lines, header)
    outside = _QUOTED.sub("", feed.decode(header[:MAX_ROW_BYTES]))
    delimiter = next((each for each in _DELIMITERS if each in outside), ",")
    records = csv.reader(feed, delimiter=delimiter, strict=True)
    names = _names(feed, next(_checked(records, feed), []), columns)
    columns = columns_for(names, columns)
    others = [i for i, name in enumerate(names) if not is_part(name, columns)]
    feed.start_record()
    for cells in _checked(records, feed):
        if cells:
            if len(cells) > len(names):
                yield f"{lines.path}:{feed.first}", cells
            else:
                for i in others:
                    if i < len(cells):
                        cells[i] = _scalar(cells[i])
                yield f"{lines.path}:{feed.first}", object_of(zip(names, cells, strict=False))
        feed.start_record()


def _scalar(cell: str) -> Any:
    if cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    return float(cell) if _NUMBER.fullmatch(cell) else cell


class _Feed:
    """Gives the csv module one line after the other; knows where the record began."""

    def __init__(self, lines: Lines, pending: bytes) -> None:
        self.lines, self._pending = lines, pending
        self.first, self._size = lines.number, 0

    def start_record(self) -> None:
        self.first, self._size = self.lines.number + 1, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line, self._pending = self._pending or self.lines.read(), b""
        if not line:
            raise StopIteration
        self._size += len(line)
        if self._size > MAX_ROW_BYTES:
            raise ValueError(f"{self.lines.path}:{self.first}: over 64 MiB; is a quote not closed?")
        return self.decode(line)

    def decode(self, line: bytes) -> str:
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.lines.where}: {not_utf8(error.start, line[error.start])}"
            ) from None


def _checked(records: Any, feed: _Feed) -> Iterator[list[Any]]:
    try:
        yield from records
    except csv.Error as error:
        raise ValueError(
            f"{feed.lines.path}:{feed.first}: broken or cut off CSV ({error}); a cell with quotes, "
            "delimiters or ends of lines stands in quotes, and quotes in it are doubled"
        ) from None


def _names(feed: _Feed, cells: list[str], columns: Mapping[str, str] | None) -> list[str]:
    names = [cell.strip() or f"column {i}" for i, cell in enumerate(cells, 1)]
    columns = columns_for(names, columns)
    known = any(is_part(name, columns) for name in names)
    if not known and (len(names) < 2 or not all(map(_NAME.fullmatch, names))):
        shown = json.dumps(", ".join(names)[:60], ensure_ascii=False)
        raise ValueError(
            f"{feed.lines.path}:{feed.first}: is neither JSON, Parquet nor Arrow, and as CSV it "
            f"has no header line such as prompt,response (found: {shown})"
        )
    return names
