"""Reads rows of Parquet. Memory does not depend on what the file claims.

A page says in its header how large it unpacks to; a dictionary's page says how often a text can
come again. Both are read before the reader allocates anything, for the wanted columns only: others
are not looked at.
"""

import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as arrow
import pyarrow.parquet as parquet
from pyarrow import types

from jaxsft.data.arrow_rows import CHUNK_ROWS, RowMaker, check_num_rows, slices
from jaxsft.data.containers import Container, check_expansion, open_container
from jaxsft.data.thrift import ThriftError, get_int, get_struct, get_structs, read_struct

_MOST_BATCH_BYTES = 256 * 2**20  # that a batch may have decoded
_MOST_PAGE_BYTES = 256 * 2**20  # of the pages of all wanted columns that are open together
_PROBE_ROWS = 4096  # of which only lengths are looked at
_LARGE_DICTIONARY = 2**20  # the size at which writers stop to fill one
_MOST_LIST_VALUES = 2**25  # in the lists of a row group
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_PLAIN_DICTIONARY, _DELTA_BYTE_ARRAY, _RLE_DICTIONARY = 2, 7, 8


class _Page(NamedTuple):
    num_values: int
    num_rows: int  # of lists, about
    num_bytes: int


class _Chunk(NamedTuple):
    """A column of a row group. `repeated_bytes` is the most that one value may expand to by
    reference to a dictionary or an earlier value; `repeated_values` is how many values may."""

    path: str
    is_list: bool
    pages: list[_Page]
    packed_bytes: int
    repeated_bytes: int
    repeated_values: int
    has_deltas: bool
    may_stay_packed: bool = True

    @property
    def stays_packed(self) -> bool:
        """Whether the reader gives it as a dictionary and indices, in which texts are not copied.

        It does so for any column, but collects all texts that are not in the dictionary's page.
        """
        num_values = sum(page.num_values for page in self.pages)
        is_packed = self.repeated_values == num_values and not self.has_deltas
        is_large = self.repeated_bytes > _LARGE_DICTIONARY
        return self.may_stay_packed and is_packed and is_large and not self.is_list


def read_parquet(
    container: Container, columns: Mapping[str, str] | None, whole: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:row n", row).

    Raises:
      ValueError: it is no complete Parquet file, a row has over 64 MiB, or it expands too much.
    """
    maker = None
    try:
        data = mmap.mmap(container.file.fileno(), 0, access=mmap.ACCESS_READ)
        with _open(data) as file:
            schema = file.schema_arrow
            maker = RowMaker(container, schema, columns, whole)
            names = [name for name, each in zip(schema.names, maker.wanted, strict=True) if each]
            check_num_rows(container, file.metadata.num_rows)
            if not names:
                yield from maker.unread_rows(file.metadata.num_rows)
                return
            for group, about in enumerate(_row_groups(data)):
                if not about.num_rows:
                    continue  # it may have no pages
                chunks = _chunks(data, file, about, maker.wanted)
                size = _batch_rows(container.path, data, group, chunks, CHUNK_ROWS)
                packed = [chunk.path for chunk in chunks if chunk.stays_packed]
                reader = _open(data, packed) if packed else file
                for batch in reader.iter_batches(size, row_groups=[group], columns=names):
                    yield from maker.rows(batch)
    except (arrow.ArrowException, ThriftError, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{container.path}: not a complete Parquet file after row "
            f"{maker.number if maker else 0} ({reason}); make it again"
        ) from None


def num_parquet_rows(container: Container) -> int:
    """Number of rows that the file says it has; ArrowException if it is damaged."""
    data = mmap.mmap(container.file.fileno(), 0, access=mmap.ACCESS_READ)
    return parquet.read_metadata(arrow.BufferReader(arrow.py_buffer(data))).num_rows


def _open(data: mmap.mmap, dictionaries: list[str] | None = None) -> parquet.ParquetFile:
    source = arrow.BufferReader(arrow.py_buffer(data))
    return parquet.ParquetFile(
        source, read_dictionary=dictionaries, pre_buffer=False, arrow_extensions_enabled=False
    )


def bounded_batches(
    path: Path, start: int, stop: int, *, keeps: Callable[[arrow.DataType], bool], most_rows: int
) -> Iterator[arrow.RecordBatch]:
    """Rows [start, stop) of a Parquet file as batches, for what copies columns.

    Args:
      path: of the file.
      start: number of the first row, from 0.
      stop: number of the first row not to read.
      keeps: whether columns of a type are read.
      most_rows: in a batch.

    Raises:
      ValueError: it is no complete Parquet file, or it expands too much.
      OSError: it cannot be read.
    """
    offset = 0
    try:
        with open_container(path) as container:
            if container.kind != "parquet":
                raise arrow.ArrowInvalid("it begins otherwise")
            data = mmap.mmap(container.file.fileno(), 0, access=mmap.ACCESS_READ)
            file = _open(data)
            wanted = [keeps(field.type) for field in file.schema_arrow]
            names = [field.name for field in file.schema_arrow if keeps(field.type)]
            for group, about in enumerate(_row_groups(data)):
                if offset + about.num_rows <= start or offset >= stop or not about.num_rows:
                    offset += about.num_rows
                    continue
                chunks = [
                    chunk._replace(may_stay_packed=False)
                    for chunk in _chunks(data, file, about, wanted)
                ]
                size = _batch_rows(path, data, group, chunks, most_rows)
                for batch in file.iter_batches(size, row_groups=[group], columns=names):
                    begin = max(start - offset, 0)
                    if part := batch.slice(begin, max(stop - offset - begin, 0)):
                        yield part
                    offset += batch.num_rows
    except (arrow.ArrowException, ThriftError) as error:
        why = str(error).splitlines()[0][:200]
        raise ValueError(f"{path}: not a complete Parquet file ({why})") from None


def _batch_rows(
    path: Path, data: mmap.mmap, group: int, chunks: list[_Chunk], most_rows: int
) -> int:
    """Rows of the row group that may be decoded together; ValueError if its pages are too large."""
    where = f"{path}: row group {group}"
    unpacked_bytes = sum(c.repeated_bytes + sum(p.num_bytes for p in c.pages) for c in chunks)
    check_expansion(where, unpacked_bytes, sum(chunk.packed_bytes for chunk in chunks))
    open_bytes = sum(_two_largest(chunk) for chunk in chunks)
    num_values = sum(page.num_values for c in chunks if c.is_list for page in c.pages)
    if open_bytes > _MOST_PAGE_BYTES or num_values > _MOST_LIST_VALUES:
        raise ValueError(
            f"{where} is too large to be read ({open_bytes / 2**20:,.0f} MiB in pages that are "
            f"open together, {num_values:,} values in lists); write it again with smaller row "
            "groups and pages, or save it as JSONL"
        )
    rows = most_rows
    repeated = sum(c.repeated_bytes for c in chunks if not c.is_list and not c.stays_packed)
    if repeated:
        rows = max(1, min(rows, _MOST_BATCH_BYTES // repeated))
    for chunk in chunks:
        if chunk.is_list and chunk.repeated_bytes * chunk.repeated_values > _MOST_BATCH_BYTES:
            rows = min(rows, _rows_of_lists(where, data, group, chunk))
    while rows > 1 and sum(_most_bytes(c.pages, rows) for c in chunks) > 2 * _MOST_BATCH_BYTES:
        rows //= 2
    return rows


def _two_largest(chunk: _Chunk) -> int:
    return chunk.repeated_bytes + max((page.num_bytes for page in chunk.pages), default=0)


def _most_bytes(pages: list[_Page], num_rows: int) -> int:
    """The most bytes of pages that hold so many rows."""
    most = start = size = held = 0
    for page in pages:
        size += page.num_bytes
        held += page.num_rows
        most = max(most, size)
        # Rows may begin anywhere in the first page.
        while start < len(pages) and held - pages[start].num_rows >= num_rows:
            held -= pages[start].num_rows
            size -= pages[start].num_bytes
            start += 1
    return most


def _rows_of_lists(where: str, data: mmap.mmap, group: int, chunk: _Chunk) -> int:
    """Rows whose lists of texts may be decoded together, from the lengths in the dictionary."""
    if chunk.has_deltas:
        raise ValueError(
            f'{where}: the texts of "{chunk.path}" are written as differences; write it again with '
            "another encoding, or save it as JSONL"
        )
    rows, seen, number = CHUNK_ROWS, 0, 0
    share = chunk.repeated_values / max(sum(page.num_values for page in chunk.pages), 1)
    all_rows = sum(page.num_rows for page in chunk.pages)
    size = min(int(share * all_rows) + CHUNK_ROWS // 4, _PROBE_ROWS)
    with _open(data, [chunk.path]) as file:
        for batch in file.iter_batches(size, row_groups=[group], columns=[chunk.path]):
            for part in slices(batch, _MOST_BATCH_BYTES, f"{where}, row ", number):
                number += part.num_rows
                if part.num_rows < batch.num_rows:
                    rows = min(rows, part.num_rows)
            seen += _num_leaves(batch.column(0))
            if seen >= chunk.repeated_values:
                break
    return rows


def _num_leaves(array: Any) -> int:
    while types.is_nested(array.type):
        if types.is_struct(array.type):
            array = array.field(0)
        elif types.is_map(array.type):
            return len(array.keys)
        else:
            array = array.values
    return len(array)


class _RowGroup(NamedTuple):
    num_rows: int
    columns: list[dict[int, Any]]  # of each leaf, its ColumnMetaData


def _row_groups(data: mmap.mmap) -> list[_RowGroup]:
    """Of each row group what the footer says (parquet.thrift of Apache Parquet).

    pyarrow's own objects for this end the process where statistics are wrong.
    """
    size = int.from_bytes(data[-8:-4], "little")
    footer, _ = read_struct(data, max(len(data) - 8 - size, 0))
    return [
        _RowGroup(get_int(group, 3), [get_struct(column, 3) for column in get_structs(group, 1)])
        for group in get_structs(footer, 4)
    ]


def _chunks(
    data: mmap.mmap, file: parquet.ParquetFile, group: _RowGroup, wanted: list[bool]
) -> list[_Chunk]:
    chunks, index = [], 0
    for field, is_wanted in zip(file.schema_arrow, wanted, strict=True):
        for _ in range(_count_leaves(field.type)):
            if is_wanted:
                if index >= len(group.columns):
                    raise ThriftError("a row group lacks a column")
                meta, column = group.columns[index], file.schema.column(index)
                first = get_int(meta, 9)
                if 0 < get_int(meta, 11, 0) < first:  # with a dictionary
                    first = get_int(meta, 11)
                chunk = _chunk(data, first, first + get_int(meta, 7), column.path)
                if column.max_repetition_level > 0:
                    chunk = _of_lists(chunk, group.num_rows)
                chunks.append(chunk)
            index += 1
    return chunks


def _count_leaves(kind: arrow.DataType) -> int:
    if isinstance(kind, arrow.BaseExtensionType):
        return _count_leaves(kind.storage_type)
    if not types.is_nested(kind):
        return 1
    return sum(_count_leaves(kind.field(i).type) for i in range(kind.num_fields))


def _of_lists(chunk: _Chunk, num_rows: int) -> _Chunk:
    num_values = max(sum(page.num_values for page in chunk.pages), 1)
    pages = [p._replace(num_rows=p.num_values * num_rows // num_values) for p in chunk.pages]
    return chunk._replace(is_list=True, pages=pages)


def _chunk(data: mmap.mmap, at: int, end: int, path: str) -> _Chunk:
    """Reads the headers of the pages in data[at:end] (parquet.thrift of Apache Parquet)."""
    pages: list[_Page] = []
    packed_bytes = dictionary_bytes = delta_bytes = repeated_values = delta_values = 0
    while at < min(end, len(data)):
        header, size = read_struct(data, at)
        page_type, unpacked, packed = (get_int(header, i) for i in (1, 2, 3))
        if unpacked < 0 or packed < 0:
            raise ThriftError("a page has no size")
        at = size + packed
        packed_bytes += packed
        if page_type == _DICTIONARY_PAGE:
            dictionary_bytes = max(dictionary_bytes, unpacked)
        if page_type not in (_DATA_PAGE, _DATA_PAGE_V2):
            continue
        is_v2 = page_type == _DATA_PAGE_V2
        about = get_struct(header, 8 if is_v2 else 5)
        num_values, encoding = get_int(about, 1), get_int(about, 4 if is_v2 else 2)
        if encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY):
            repeated_values += num_values
        if encoding == _DELTA_BYTE_ARRAY:
            delta_bytes, delta_values = max(delta_bytes, unpacked), delta_values + num_values
        pages.append(_Page(num_values, num_values, unpacked))
    return _Chunk(
        path,
        is_list=False,
        pages=pages,
        packed_bytes=packed_bytes,
        repeated_bytes=max(dictionary_bytes, 4 * delta_bytes),  # copied while it grows
        repeated_values=max(repeated_values, delta_values),
        has_deltas=delta_bytes * delta_values > _MOST_BATCH_BYTES,
    )
