"""Writes the rows that the converter accepts as Parquet parts, and the manifest of all parts.

A part is made from a fixed range of source rows, so an interrupted download gives the same bytes as
one without a break. It has the columns that `rows.convert_row` reads, unchanged.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as arrow
import pyarrow.parquet as parquet

from jaxsft.common.files import file_sha256, whole_file, write_json
from jaxsft.data.rows import ACCEPTED_SCHEMAS, Rejected, convert_row
from jaxsft.data.sources import ROWS_MANIFEST

# For rows of the hub, which the user cannot repair, that raise an error in `convert_row`.
INVALID_ROW = "invalid_row"

_ENOUGH_REJECTED = 1000  # rows without one accepted: give up
_CHUNK_ROWS = 1000  # in memory together, and in a row group of a part
_REASONING = "reasoning_content"
# The fields of each schema of rows.py, in its order. The first that is complete counts.
_SCHEMAS = (
    *(("messages",), ("conversations",), ("prompt", "response"), ("prompt", "completion")),
    *(("instruction", "response"), ("question", "answer"), ("text", "code", "test_list")),
)
_NESTED = frozenset({"messages", "conversations", "test_list"})


class Counts(NamedTuple):
    """Rows read, rows kept, and the numbers of the others by reason."""

    rows_read: int
    rows: int
    rejected: dict[str, int]


class Part(NamedTuple):
    """One file of a directory of rows, and the counts of its source rows."""

    counts: Counts
    name: str
    num_bytes: int
    sha256: str


def columns_read(names: Sequence[str], where: str) -> list[str]:
    """The columns of `names` that the converter reads; ValueError if they fit no schema."""
    for fields in _SCHEMAS:
        if set(fields) <= set(names):
            optional = [_REASONING] if "completion" in fields and _REASONING in names else []
            return [*fields, *optional]
    found = (", ".join(names[:8]) or "none") + (", …" if len(names) > 8 else "")
    raise ValueError(f"{where}: has the columns {found}; accepted are {ACCEPTED_SCHEMAS}")


def check_columns(schema: arrow.Schema, where: str) -> list[str]:
    """`columns_read`, and ValueError if a column is not text, or not a list where it must be."""
    columns = columns_read(schema.names, where)
    for name in columns:
        kind = schema.field(name).type
        value = kind.value_type if arrow.types.is_dictionary(kind) else kind
        is_list = arrow.types.is_list(kind) or arrow.types.is_large_list(kind)
        is_text = arrow.types.is_string(value) or arrow.types.is_large_string(value)
        if not (is_list if name in _NESTED else is_text or arrow.types.is_null(value)):
            wanted = "a list" if name in _NESTED else "text"
            raise ValueError(f'{where}: the column "{name}" is {kind}, not {wanted}')
    return columns


def parquet_batches(
    file: Path, columns: list[str], start: int, stop: int
) -> Iterator[arrow.RecordBatch]:
    """Rows [start, stop) of a Parquet file in chunks. Reads only the row groups that hold them.

    Raises:
      ValueError: it is not a complete Parquet file.
    """
    groups: list[int] = []
    first = offset = 0
    try:
        with parquet.ParquetFile(file) as source:
            for index in range(source.num_row_groups):
                num_rows = source.metadata.row_group(index).num_rows
                if first < stop and first + num_rows > start:
                    offset = offset if groups else first
                    groups.append(index)
                first += num_rows
            for batch in source.iter_batches(_CHUNK_ROWS, row_groups=groups, columns=columns):
                end = offset + batch.num_rows
                if end > start and offset < stop:
                    begin = max(start - offset, 0)
                    yield batch.slice(begin, min(end, stop) - offset - begin).select(columns)
                offset = end
    except arrow.ArrowException as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{file}: not a complete Parquet file ({why})") from None


def jsonl_batches(
    rows: Iterator[tuple[str, dict[str, Any]]], schema: arrow.Schema
) -> Iterator[arrow.RecordBatch]:
    """Rows of `read_rows` in chunks, each with the columns of `schema` (see `schema_of_row`).

    Raises:
      ValueError: with file:line, if `convert_row` raises an error for a row, or if a row would
        convert to something else with these columns.
    """
    while chunk := list(itertools.islice(rows, _CHUNK_ROWS)):
        kept = [{name: row.get(name) for name in schema.names} for _, row in chunk]
        for (where, row), values in zip(chunk, kept, strict=True):
            try:
                wanted = convert_row(row)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            try:
                batch = arrow.RecordBatch.from_pylist([values], schema=schema)
                same = convert_row(batch.to_pylist()[0]) == wanted
            except (arrow.ArrowException, ValueError):
                same = False
            if not same:
                raise ValueError(
                    f"{where}: has other fields than the first row ({', '.join(schema.names)}); "
                    "write each kind of row to a file of its own"
                )
        yield arrow.RecordBatch.from_pylist(kept, schema=schema)


def schema_of_row(where: str, row: dict[str, Any]) -> arrow.Schema:
    """The columns for rows like this one; ValueError if it fits no schema."""
    columns = columns_read(list(row), where)
    if columns == ["prompt", "completion"]:
        columns.append(_REASONING)  # may come with a later row
    text = arrow.string()
    kinds = {name: text for name in columns}
    for name in {"messages", "conversations"} & set(columns):
        first = row[name][0] if isinstance(row[name], list) and row[name] else None
        named = isinstance(first, dict) and "from" in first
        keys = ["from", "value"] if named else ["role", "content"]
        kinds[name] = arrow.list_(arrow.struct([(key, text) for key in [*keys, _REASONING]]))
    if "test_list" in columns:
        kinds["test_list"] = arrow.list_(text)
    return arrow.schema(list(kinds.items()))


def write_part(
    path: Path,
    batches: Iterator[arrow.RecordBatch],
    where: str | None = None,
    num_before: int = 0,
) -> Part:
    """Writes the accepted rows to `path`, as a whole or not at all.

    There must be at least one batch. If no row is accepted, no file is written and the name is "".
    If `convert_row` raises ValueError for a row, the row is counted as "invalid_row". With `where`
    the error is raised instead, with `where` and the number of the row before it; `num_before` rows
    come before this part.
    """
    with whole_file(path) as partial:
        counts = _write_accepted(partial, batches, where, num_before)
    if not counts.rows:  # readers refuse a file without rows
        path.unlink()
        return Part(counts, "", 0, "")
    return Part(counts, path.name, path.stat().st_size, file_sha256(path))


def _write_accepted(
    file: Path, batches: Iterator[arrow.RecordBatch], where: str | None, num_before: int
) -> Counts:
    first = next(batches)
    rejected: Counter[str] = Counter()
    num_read = num_kept = 0
    schema = first.schema.remove_metadata()
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in itertools.chain([first], batches):
            keep = []
            for row in _rows(batch):
                num_read += 1
                reason = _reject_reason(row, where and f"{where}{num_before + num_read}")
                keep.append(reason is None)
                rejected.update([reason] if reason else [])
            num_kept += sum(keep)
            if any(keep):
                writer.write_batch(batch.filter(arrow.array(keep)).replace_schema_metadata(None))
    return Counts(num_read, num_kept, dict(sorted(rejected.items())))


def _rows(batch: arrow.RecordBatch) -> list[dict[str, Any] | None]:
    """The rows of the batch; None for a row with text that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [_rows(batch.slice(index, 1))[0] for index in range(batch.num_rows)]


def _reject_reason(row: dict[str, Any] | None, where: str | None) -> str | None:
    try:
        if row is None:
            raise ValueError("holds text that is not UTF-8")
        result = convert_row(row)
    except ValueError as error:
        if where is None:
            return INVALID_ROW
        raise ValueError(f"{where}: {error}") from None
    return result.reason if isinstance(result, Rejected) else None


def write_manifest(directory: Path, head: dict[str, Any], parts: list[Part]) -> dict[str, Any]:
    """Completes the directory with `head`, counts and files; ValueError if no row was accepted."""
    check_some_accepted(directory, parts, enough=1)
    rejected = sum((Counter(part.counts.rejected) for part in parts), Counter())
    manifest = head | {
        "rows_read": sum(part.counts.rows_read for part in parts),
        "rows": sum(part.counts.rows for part in parts),
        "rejected": dict(sorted(rejected.items())),
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
    """ValueError if at least `enough` rows were read and none of them was accepted."""
    rejected = sum((Counter(part.counts.rejected) for part in parts), Counter())
    if rejected.total() >= enough and not any(part.counts.rows for part in parts):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in rejected.most_common())
        raise ValueError(
            f"{directory}: none of the first {rejected.total():,} rows can be used "
            f"({reasons}); is this the data set that you mean?"
        )
