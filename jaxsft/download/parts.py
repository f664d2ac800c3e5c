"""Writes source rows as the parts of a directory of rows, and the manifest of all parts.

A part is made from a fixed range of source rows, so an interrupted download gives the same bytes as
one without a break. Parquet stays Parquet; rows of other files become JSON lines, which hold rows
of any kind.

Every row is kept, and every column that could hold text, with all its nested fields: only the
options of training decide what becomes of a row (its columns may be named, its form chosen). Left
out are columns of bytes, media and lists of numbers, and rows that are no UTF-8. `convert_row`
counts the rows that cannot be used, so that a useless data set is noticed after its first rows.
"""

import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as arrow
import pyarrow.parquet as parquet

from jaxsft.common.files import file_sha256, whole_file, write_json
from jaxsft.data.fields import UNREAD
from jaxsft.data.parquet_rows import bounded_batches
from jaxsft.data.rows import Rejected, RowOptions, convert_row
from jaxsft.data.sources import ROWS_MANIFEST

_NOT_UTF8 = "not_utf8"  # the only rows that are not kept
_MENDABLE = ("unused_text", "literal_tags")  # by data.columns, by data.answer_template

_ENOUGH_REJECTED = 1000  # rows without one that can be used: give up
_CHUNK_ROWS = 1000  # in memory together, and in a row group of a part

Columns = Mapping[str, str] | None  # `data.columns`


class Counts(NamedTuple):
    """Rows read, rows kept, and the numbers of those that cannot be used, by reason."""

    rows_read: int
    rows: int
    rejected: dict[str, int]


class Part(NamedTuple):
    """One file of a directory of rows, and the counts of its source rows."""

    counts: Counts
    name: str
    num_bytes: int
    sha256: str


def check_columns(schema: arrow.Schema, where: str, named: Columns = None) -> None:
    """ValueError if no row with these columns could be used, whatever is in it."""
    row = {field.name: _example(field.type) for field in schema}
    found = convert_row(row, _options(named))
    if isinstance(found, Rejected) and found.reason in ("unknown_fields", "wrong_field"):
        raise ValueError(f"{where}: {found.detail}")


def _options(named: Columns) -> RowOptions:
    return RowOptions(columns=named, without_thought="keep_plain")


def _example(kind: arrow.DataType) -> Any:
    """A value of this type, for `convert_row`."""
    if isinstance(kind, arrow.BaseExtensionType):
        return _example(kind.storage_type)
    if arrow.types.is_dictionary(kind) or _is_list(kind):
        value = _example(kind.value_type)
        return [value] if _is_list(kind) else value
    if arrow.types.is_struct(kind):
        return {field.name: _example(field.type) for field in kind}
    if arrow.types.is_null(kind):
        return None
    return "x" if _is_text(kind) else 0


def _is_list(kind: arrow.DataType) -> bool:
    types = arrow.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_text(kind: arrow.DataType) -> bool:
    types = arrow.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_kept(kind: arrow.DataType) -> bool:
    """Whether a column can hold text, or a plain number (the weight of a row)."""
    types = arrow.types
    if isinstance(kind, arrow.BaseExtensionType):
        return _is_kept(kind.storage_type)
    if types.is_dictionary(kind):
        return _is_kept(kind.value_type)
    is_number = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
    return is_number or _holds_text(kind)


def _holds_text(kind: arrow.DataType) -> bool:
    if arrow.types.is_map(kind):
        return _holds_text(kind.key_type) or _holds_text(kind.item_type)
    if arrow.types.is_dictionary(kind) or _is_list(kind):
        return _holds_text(kind.value_type)
    if arrow.types.is_struct(kind):  # media have bytes, and the path of a file
        kinds = [field.type for field in kind]
        return any(map(_holds_text, kinds)) and not any(map(_is_bytes, kinds))
    return _is_text(kind) or arrow.types.is_null(kind)


def _is_bytes(kind: arrow.DataType) -> bool:
    return arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)


def parquet_batches(file: Path, start: int, stop: int) -> Iterator[arrow.RecordBatch]:
    """Rows [start, stop) of a Parquet file in chunks, with the columns that are kept.

    Reads only the row groups that hold the rows.

    Raises:
      ValueError: it is not a complete Parquet file.
    """
    return bounded_batches(file, start, stop, keeps=_is_kept, most_rows=_CHUNK_ROWS)


def write_parquet_part(
    path: Path, batches: Iterator[arrow.RecordBatch], named: Columns = None
) -> Part:
    """Writes a part, as a whole or not at all; its rows with the columns `named` are counted.

    There must be at least one batch. If no row is kept, no file is written and the name is "".
    """
    counter = _Counter(named)
    first = next(batches)
    with (
        whole_file(path) as partial,
        parquet.ParquetWriter(
            partial, first.schema.remove_metadata(), compression="zstd"
        ) as writer,
    ):
        for batch in itertools.chain([first], batches):
            is_kept = [counter.keeps(row) for row in _rows(batch)]
            if not all(is_kept):
                batch = batch.filter(arrow.array(is_kept))
            if batch.num_rows:
                writer.write_batch(batch.replace_schema_metadata(None))
    return counter.part(path)


def write_json_part(path: Path, rows: Iterable[Any], named: Columns = None) -> Part:
    """As `write_parquet_part`, of rows of `read_rows`, one JSON value a line.

    Values that JSON lacks become null; columns that were not read are left out.
    """
    counter = _Counter(named)
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as out:
        for row in rows:
            if counter.keeps(row):
                if isinstance(row, Mapping):
                    row = {name: value for name, value in row.items() if value is not UNREAD}
                # ASCII: a lone surrogate, which makes the row unusable, can be written too.
                out.write(json.dumps(row, default=lambda value: None) + "\n")
    return counter.part(path)


class _Counter:
    def __init__(self, named: Columns):
        self._options = _options(named)
        self._num_read = self._num_kept = 0
        self._rejected: Counter[str] = Counter()

    def keeps(self, row: Any) -> bool:
        """Counts a row; whether it is kept."""
        self._num_read += 1
        if row is _NOT_UTF8:
            self._rejected[_NOT_UTF8] += 1
            return False
        self._num_kept += 1
        found = convert_row(row, self._options)
        if isinstance(found, Rejected):
            self._rejected[found.reason] += 1
        return True

    def part(self, path: Path) -> Part:
        """The part at `path`, which is removed if no row was kept: readers refuse such a file."""
        counts = Counts(self._num_read, self._num_kept, dict(sorted(self._rejected.items())))
        if not self._num_kept:
            path.unlink()
            return Part(counts, "", 0, "")
        return Part(counts, path.name, path.stat().st_size, file_sha256(path))


def _rows(batch: arrow.RecordBatch) -> list[Any]:
    """The rows of the batch; `_NOT_UTF8` for a row with text that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [_NOT_UTF8]
        return [_rows(batch.slice(index, 1))[0] for index in range(batch.num_rows)]


def write_manifest(directory: Path, head: dict[str, Any], parts: list[Part]) -> dict[str, Any]:
    """Completes the directory with `head`, counts and files; ValueError if no row can be used."""
    check_some_accepted(directory, parts, enough=1)
    manifest = head | {
        "rows_read": sum(part.counts.rows_read for part in parts),
        "rows": sum(part.counts.rows for part in parts),
        "rejected": dict(sorted(_rejected(parts).items())),
        "files": [
            {"name": p.name, "rows": p.counts.rows, "bytes": p.num_bytes, "sha256": p.sha256}
            for p in parts
            if p.name
        ],
    }
    remove_parts(directory, {part.name for part in parts})
    write_json(directory / ROWS_MANIFEST, manifest)
    return manifest


def remove_parts(directory: Path, kept: Collection[str] = ()) -> None:
    """Removes complete and partial parts from the directory, except those named in `kept`."""
    for file in directory.glob("part-*"):
        if file.name not in kept:
            file.unlink()


def check_some_accepted(directory: Path, parts: list[Part], enough: int = _ENOUGH_REJECTED) -> None:
    """ValueError if at least `enough` rows were read and none of them can be used."""
    rejected = _rejected(parts)
    num_unusable = rejected.total() - sum(rejected[reason] for reason in _MENDABLE)
    if num_unusable >= enough and num_unusable == sum(part.counts.rows_read for part in parts):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in rejected.most_common())
        raise ValueError(
            f"{directory}: none of the first {rejected.total():,} rows can be used "
            f"({reasons}); is this the data set that you mean?"
        )


def _rejected(parts: list[Part]) -> Counter[str]:
    return sum((Counter(part.counts.rejected) for part in parts), Counter())
