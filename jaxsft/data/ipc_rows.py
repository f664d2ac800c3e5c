"""Reads rows of Arrow's IPC formats: the stream that `save_to_disk` writes, and Feather files.

Only the wanted columns are unpacked. What buffers claim to become is compared with what they are
before anything is allocated.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as arrow
import pyarrow.ipc as ipc
from pyarrow import types

from jaxsft.data.arrow_rows import CHUNK_ROWS, RowMaker, check_num_rows
from jaxsft.data.containers import Container, check_expansion

_FILE_MAGIC = b"ARROW1"  # at the beginning and the end of the file format; between them is a stream


def read_ipc(
    container: Container, columns: Mapping[str, str] | None, whole: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:row n", row).

    Raises:
      ValueError: it is no complete Arrow file, a row has over 64 MiB, or it expands too much.
    """
    maker = None
    try:
        stream = _stream(container)
        schema = ipc.open_stream(stream).schema
        maker = RowMaker(container, schema, columns, whole)
        _check_buffers(container, stream, schema, maker.wanted)
        included = [i for i, each in enumerate(maker.wanted) if each]
        # No field included would mean all of them.
        options = ipc.IpcReadOptions(included_fields=included or [0])
        for batch in ipc.open_stream(stream, options=options):
            check_num_rows(container, maker.number + batch.num_rows)
            if not included:
                yield from maker.unread_rows(batch.num_rows)
                continue
            batch.validate(full=True)
            for start in range(0, batch.num_rows, CHUNK_ROWS):
                yield from maker.rows(batch.slice(start, CHUNK_ROWS))
    except (arrow.ArrowException, OSError, UnicodeDecodeError, struct.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{container.path}: not a complete Arrow file after row "
            f"{maker.number if maker else 0} ({reason}); save it again"
        ) from None


def _stream(container: Container) -> arrow.Buffer:
    mapped = mmap.mmap(container.file.fileno(), 0, access=mmap.ACCESS_READ)
    data = arrow.py_buffer(mapped)
    if mapped[:6] != _FILE_MAGIC:
        return data
    if mapped[-6:] != _FILE_MAGIC:
        raise arrow.ArrowInvalid("its end is missing")
    return data.slice(8)


def _check_buffers(
    container: Container, stream: arrow.Buffer, schema: arrow.Schema, wanted: list[bool]
) -> None:
    """Raises ValueError if the wanted buffers of a message expand too much."""
    counts = [_num_buffers(field.type) for field in schema]
    is_read = [each for each, n in zip(wanted, counts, strict=True) for _ in range(n or 0)]
    for message in ipc.MessageReader.open_stream(stream):
        if message.type not in ("record batch", "dictionary"):
            continue
        buffers = _buffers(message)
        if message.type == "dictionary" or None in counts or len(buffers) != len(is_read):
            read = buffers  # all, where it is not known which
        else:
            read = [buffer for buffer, each in zip(buffers, is_read, strict=True) if each]
        sizes = [_unpacked_size(message.body, *buffer) for buffer in read]
        packed = sum(length for _, length in read)
        check_expansion(str(container.path), sum(sizes), packed)


def _num_buffers(kind: arrow.DataType) -> int | None:
    """Of a field of the type; None for kinds where it is not fixed."""
    if isinstance(kind, arrow.BaseExtensionType):
        return _num_buffers(kind.storage_type)
    if types.is_dictionary(kind):
        return 2
    if types.is_null(kind) or types.is_run_end_encoded(kind):
        own = 0
    elif types.is_struct(kind) or types.is_fixed_size_list(kind):
        own = 1
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        own = 2
    elif types.is_nested(kind) or types.is_string_view(kind) or types.is_binary_view(kind):
        return None
    elif (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
    ):
        own = 3
    else:
        own = 2
    children = [_num_buffers(kind.field(i).type) for i in range(kind.num_fields)]
    return None if None in children else own + sum(filter(None, children))


def _buffers(message: ipc.Message) -> list[tuple[int, int]]:
    """Offset and length of each buffer of a message that is compressed; none of any other.

    The message is a FlatBuffers table, see Message.fbs of Apache Arrow.
    """
    data = memoryview(message.metadata)
    batch = _follow(data, _slot(data, _follow(data, 0), 2))
    if message.type == "dictionary":
        batch = _follow(data, _slot(data, batch, 1))
    if not _slot(data, batch, 3):  # no compression
        return []
    start = _follow(data, _slot(data, batch, 2))
    (count,) = struct.unpack_from("<I", data, start)
    end = start + 4 + 16 * count
    return list(struct.iter_unpack("<qq", data[start + 4 : end]))


def _slot(data: memoryview, table: int, number: int) -> int:
    """Where the field of a table lies; 0 if it has none."""
    (back,) = struct.unpack_from("<i", data, table)
    (size,) = struct.unpack_from("<H", data, table - back)
    at = 4 + 2 * number
    (offset,) = struct.unpack_from("<H", data, table - back + at) if at < size else (0,)
    return table + offset if offset else 0


def _follow(data: memoryview, at: int) -> int:
    return at + struct.unpack_from("<I", data, at)[0]


def _unpacked_size(body: arrow.Buffer, offset: int, length: int) -> int:
    """The size that a compressed buffer says it unpacks to; -1 means that it is not packed."""
    if length < 8:
        return 0
    (size,) = struct.unpack_from("<q", memoryview(body), offset)
    return length if size < 0 else size
