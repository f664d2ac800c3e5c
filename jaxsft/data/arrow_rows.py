"""Arrow arrays -> rows of Python objects, a bounded number of bytes at a time.

No metadata says how a value is decoded: an image is bytes and a path here, and neither is opened.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as arrow
import pyarrow.compute as compute
from pyarrow import types

from jaxsft.data.containers import MAX_ROW_BYTES, Container, columns_for, object_of
from jaxsft.data.fields import UNREAD, is_wanted

CHUNK_ROWS = 256  # converted to Python objects together, fewer if they are long
_VALUE_BYTES = 16  # at least, of a value among Python objects
_MOST_ROWS_PER_BYTE = 1000  # of a file


def holds_text(kind: arrow.DataType) -> bool:
    """Whether values of the type can hold text; a struct with bytes is an image or sound."""
    if isinstance(kind, arrow.BaseExtensionType):
        return holds_text(kind.storage_type)
    if types.is_struct(kind):
        children = [kind.field(i) for i in range(kind.num_fields)]
        media = any(
            child.name == "bytes" and (_is_binary(child.type) or types.is_null(child.type))
            for child in children
        )
        return not media and any(holds_text(child.type) for child in children)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return holds_text(kind.value_type)
    if types.is_nested(kind):
        return any(holds_text(kind.field(i).type) for i in range(kind.num_fields))
    return _is_string(kind)


def is_of_json(kind: arrow.DataType) -> bool:
    """Whether JSON has values of the type, or can write them: no bytes, no media."""
    if isinstance(kind, arrow.BaseExtensionType):
        return is_of_json(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return is_of_json(kind.value_type)
    if types.is_nested(kind):
        return all(is_of_json(kind.field(i).type) for i in range(kind.num_fields))
    return not _is_binary(kind)


def check_num_rows(container: Container, num_rows: int) -> None:
    """Raises ValueError for a number of rows that so small a file cannot hold."""
    if num_rows > _MOST_ROWS_PER_BYTE * container.packed_bytes:
        raise ValueError(f"{container.path}: claims {num_rows:,} rows; it is damaged")


class RowMaker:
    """Makes the rows of a file from batches of its wanted columns, and counts them."""

    def __init__(
        self,
        container: Container,
        schema: arrow.Schema,
        columns: Mapping[str, str] | None,
        whole: bool,
    ) -> None:
        """The schema is the file's, of all columns; `columns` and `whole` are as in `read_rows`."""
        self.where = f"{container.path}:row "
        self.number = 0  # of rows so far
        self.names = schema.names
        columns = columns_for(self.names, columns)
        self.wanted = [
            is_wanted(each.name, holds_text(each.type), columns)
            or (whole and is_of_json(each.type))
            for each in schema
        ]
        self._make = dict if len(set(self.names)) == len(self.names) else object_of
        self._is_plain = (
            self._make is dict and all(self.wanted) and all(map(_is_plain, schema.types))
        )

    def unread_rows(self, num_rows: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields ("file:row n", row) of so many rows of which no column is wanted."""
        row = self._make((name, UNREAD) for name in self.names)
        for number in range(self.number + 1, self.number + num_rows + 1):
            yield f"{self.where}{number}", row
        self.number += num_rows

    def rows(self, batch: arrow.RecordBatch) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields ("file:row n", row) of a batch of the wanted columns, in the order of the file.

        Columns that are not wanted get UNREAD. ValueError names a row that has over 64 MiB, or text
        that is not UTF-8.
        """
        for part in slices(batch, MAX_ROW_BYTES, self.where, self.number):
            try:
                rows = part.to_pylist() if self._is_plain else self._convert(part)
            except UnicodeDecodeError:
                raise ValueError(
                    f"{self._not_utf8(part)}: holds text that is not UTF-8; save the file again "
                    "with UTF-8 text"
                ) from None
            for row in rows:
                self.number += 1
                yield f"{self.where}{self.number}", row

    def _convert(self, batch: arrow.RecordBatch) -> list[dict[str, Any]]:
        columns, unread = iter(batch.columns), [UNREAD] * batch.num_rows
        values = [_to_python(next(columns)) if each else unread for each in self.wanted]
        return [self._make(zip(self.names, row, strict=True)) for row in zip(*values, strict=True)]

    def _not_utf8(self, batch: arrow.RecordBatch) -> str:
        for i in range(batch.num_rows):
            try:
                self._convert(batch.slice(i, 1))
            except UnicodeDecodeError:
                return f"{self.where}{self.number + i + 1}"
        return f"{self.where}{self.number + 1}"


def slices(
    batch: arrow.RecordBatch, most_bytes: int, where: str, number: int
) -> Iterator[arrow.RecordBatch]:
    """Yields the batch in parts of at most so many bytes; ValueError for a row over 64 MiB."""
    if sum(map(_size, batch.columns)) <= (most_bytes if batch.num_rows > 1 else MAX_ROW_BYTES):
        yield batch
    elif batch.num_rows == 1:
        raise ValueError(f"{where}{number + 1}: over 64 MiB, the most that a row may have")
    else:
        half = batch.num_rows // 2
        yield from slices(batch.slice(0, half), most_bytes, where, number)
        yield from slices(batch.slice(half), most_bytes, where, number + half)


def _is_string(kind: arrow.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_binary(kind: arrow.DataType) -> bool:
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _is_list(kind: arrow.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind)


def _elements(array: Any) -> tuple[npt.NDArray[Any], Any]:
    """The values of the lists of an array, and where each list begins in them, and the end."""
    if types.is_fixed_size_list(array.type):
        size = array.type.list_size
        starts = np.arange(len(array) + 1, dtype=np.int64) * size
        return starts, array.values.slice(array.offset * size, len(array) * size)
    starts = array.offsets.to_numpy()
    values = (
        array.values
        if not types.is_map(array.type)
        else arrow.StructArray.from_arrays([array.keys, array.items], names=["key", "value"])
    )
    return starts - starts[0], values.slice(starts[0], starts[-1] - starts[0])


@functools.lru_cache(maxsize=256)
def _is_plain(kind: arrow.DataType) -> bool:
    """Whether Arrow itself makes the right Python objects of values of the type."""
    if _is_string(kind) or types.is_null(kind):
        return True
    if types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        if len(set(names)) != len(names):
            return False
    elif not (types.is_list(kind) or types.is_large_list(kind)):
        return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return all(_is_plain(kind.field(i).type) for i in range(kind.num_fields))


def _size(array: Any) -> int:
    """About how many bytes the values take as Python objects."""
    kind, least = array.type, _VALUE_BYTES * len(array)
    if types.is_string(kind):
        return least + array.nbytes
    if isinstance(array, arrow.ExtensionArray):
        return _size(array.storage)
    if types.is_dictionary(kind):
        if not len(array.dictionary):
            return least
        sizes = _sizes(array.dictionary)
        codes = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return least + int(sizes[codes].sum())
    if types.is_run_end_encoded(kind):
        return least + int(_sizes(array.values)[_runs(array)].sum())
    if types.is_struct(kind):
        return least + sum(_size(array.field(i)) for i in range(kind.num_fields))
    if (
        types.is_fixed_size_list(kind)
        and len(array) * kind.list_size * _VALUE_BYTES > least * 2**22
    ):
        return len(array) * kind.list_size * _VALUE_BYTES
    if _is_list(kind) or types.is_fixed_size_list(kind):
        return least + _size(_elements(array)[1])
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return least + int(_sizes(array).sum())
    if types.is_nested(kind):  # unions, and lists of views: not converted
        return least
    return least + (array.nbytes if len(array) else 0)


def _sizes(array: Any) -> npt.NDArray[np.int64]:
    """About the bytes of each value as a Python object, int64 [N]."""
    if types.is_string_view(array.type) or types.is_binary_view(array.type):
        views = np.frombuffer(array.buffers()[1] or b"", np.int32).reshape(-1, 4)
        lengths = views[array.offset : array.offset + len(array), 0].astype(np.int64)
        return np.where(array.is_valid().to_numpy(zero_copy_only=False), lengths, 0)
    if _is_string(array.type) or _is_binary(array.type):
        lengths = compute.binary_length(array).fill_null(0)
        return lengths.to_numpy(zero_copy_only=False).astype(np.int64)
    return np.full(len(array), _size(array), np.int64)


def _to_python(array: Any) -> list[Any]:
    """As `to_pylist`, of any type; equal texts of a dictionary are one object."""
    kind = array.type
    if _is_plain(kind):
        return array.to_pylist()
    if isinstance(array, arrow.ExtensionArray):
        return _to_python(array.storage)
    if types.is_dictionary(kind):
        return _dictionary_to_python(array)
    if types.is_run_end_encoded(kind):
        return _to_python(array.values.take(arrow.array(_runs(array))))
    if types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        make: Callable[[Any], dict] = dict if len(set(names)) == len(names) else object_of
        columns = [_to_python(array.field(i)) for i in range(kind.num_fields)]
        rows = zip(*columns, strict=True) if columns else itertools.repeat((), len(array))
        return _with_nulls(array, [make(zip(names, row, strict=True)) for row in rows])
    if _is_list(kind) or types.is_fixed_size_list(kind):
        starts, values = _elements(array)
        flat, ends = _to_python(values), starts.tolist()
        return _with_nulls(array, [flat[a:b] for a, b in itertools.pairwise(ends)])
    if types.is_nested(kind):
        return [UNREAD] * len(array)
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        raise
    except (arrow.ArrowException, ValueError, OverflowError, ImportError):
        return [UNREAD] * len(array)  # times that Python has no type for


def _with_nulls(array: Any, values: list[Any]) -> list[Any]:
    if not array.null_count:
        return values
    valid = array.is_valid().to_pylist()
    return [value if is_valid else None for value, is_valid in zip(values, valid, strict=True)]


def _dictionary_to_python(array: Any) -> list[Any]:
    codes = array.indices.to_numpy(zero_copy_only=False)
    if array.indices.null_count:
        codes = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        if not len(array.dictionary):
            return [None] * len(array)
    used, inverse = np.unique(codes, return_inverse=True)
    values = _to_python(array.dictionary.take(arrow.array(used)))
    return _with_nulls(array.indices, [values[i] for i in inverse.tolist()])


def _runs(array: Any) -> npt.NDArray[np.int64]:
    """Of each value of a run-end encoded array, the number of its run, int64 [N]."""
    ends = array.run_ends.to_numpy()
    places = np.arange(array.offset, array.offset + len(array))
    return np.searchsorted(ends, places, side="right")
