"""Opens a file of rows and says what it is, by what is in it: the name of the file decides nothing.

JSON, CSV, TSV, Parquet and Arrow are read, each also in gzip, bzip2 or zstd. Other kinds are
refused by name. No more than a buffer is decompressed at a time.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import re
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from jaxsft.data.fields import Repeated

MAX_ROW_BYTES = 64 * 2**20  # of text in a row; the longest published traces are under 1 MiB
# What bytes of a file may become in memory: so much in any case, or so many times their number.
# Texts compress 3- to 20-fold.
_ALWAYS_ALLOWED = 128 * 2**20
_MOST_EXPANSION = 200

_HEAD_BYTES = 2**16
_UTF8_BOM = codecs.BOM_UTF8
_GZIP, _BZIP2, _ZSTD = b"\x1f\x8b", b"BZh", b"\x28\xb5\x2f\xfd"
_UNPACK = "unpack it and name the files in it"
_AS_ROWS = "save the rows as JSONL, CSV or Parquet"
# What a file begins with -> what it is, and what to do.
_REFUSED = {
    b"PK\x03\x04": ("a ZIP archive", _UNPACK),
    b"PK\x05\x06": ("a ZIP archive", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"Rar!": ("a RAR archive", _UNPACK),
    b"\xfd7zXZ\0": ("compressed with xz", "unpack it (xz -d), or compress it with gzip or zstd"),
    b"\x04\x22\x4d\x18": ("compressed with lz4", "unpack it, or compress it with gzip or zstd"),
    b"\xd0\xcf\x11\xe0": ("an Excel workbook or Office document", "save its sheet as CSV"),
    b"FEA1": ("Feather of version 1", "save it as Parquet"),
    b"PARE": ("encrypted Parquet", "save it without encryption"),
    b"ORC": ("an ORC file", _AS_ROWS),
    b"Obj\x01": ("an Avro file", _AS_ROWS),
    b"SQLite format 3\0": ("an SQLite database", _AS_ROWS),
    b"\x89HDF": ("an HDF5 file", _AS_ROWS),
    b"\x93NUMPY": ("a NumPy array", _AS_ROWS),
    b"%PDF": ("a PDF document", _AS_ROWS),
    b"GGUF": ("a GGUF model", "name a file of rows"),
    b"\x89PNG": ("a picture", "name a file of rows"),
    b"\xff\xd8\xff": ("a picture", "name a file of rows"),
    b"version https://git-lfs": (
        "a Git LFS pointer, not the file itself",
        "get the file with git lfs pull, or download it again",
    ),
}
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_MARKUP = re.compile(rb"<(!doctype|html|\?xml|head|body|!--)", re.IGNORECASE)

Kind = Literal["parquet", "arrow", "text"]


class Container(NamedTuple):
    """An open file of rows; a binary one can be sought in. `packed_bytes` is its size on disk."""

    kind: Kind
    path: Path
    file: Any
    packed_bytes: int


class BrokenStreamError(ValueError):
    """Compressed data is broken or cut off."""


def object_of(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of the pairs; values of a name that stands more than once become `Repeated`."""
    pairs = list(pairs)
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    values: dict[str, list[Any]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    return {name: each[0] if len(each) == 1 else Repeated(each) for name, each in values.items()}


def columns_for(
    names: Collection[Any], columns: Mapping[str, str] | None
) -> Mapping[str, str] | None:
    """`data.columns` for a file or row that has one of them; None for others, as in rows.py."""
    return columns if columns and not set(columns.values()).isdisjoint(names) else None


def check_expansion(where: str, size: int, packed_bytes: int) -> None:
    """Raises ValueError if so many bytes in memory are too many for the bytes in the file."""
    if size > max(_ALWAYS_ALLOWED, _MOST_EXPANSION * packed_bytes):
        raise ValueError(
            f"{where}: {packed_bytes:,} bytes would become {size / 2**20:,.0f} MiB in memory; "
            "rows do not compress like that. Make the file again, or save it as JSONL"
        )


@contextlib.contextmanager
def open_container(path: Path) -> Iterator[Container]:
    """Opens a file of rows.

    Raises:
      ValueError: it is of a kind that is not read, or compressed data is broken. OSError: it cannot
        be read.
    """
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb", buffering=_HEAD_BYTES))
        size = path.stat().st_size
        name, unpack = _decompressor(_peek(file))
        if unpack is not None:
            raw = _Unpacked(stack.enter_context(unpack(file)), name)
            file = stack.enter_context(io.BufferedReader(raw, _HEAD_BYTES))
        try:
            head = _peek(file)
        except BrokenStreamError as error:
            raise ValueError(f"{path}:1: {error}") from None
        if unpack is not None and _decompressor(head)[1] is not None:
            raise ValueError(f"{path}: is compressed twice; unpack it once")
        kind = _kind(path, head)
        if unpack is not None and kind != "text":
            file = stack.enter_context(_on_disk(path, file, size))
        yield Container(kind, path, file, size)


def _peek(file: Any) -> bytes:
    return file.peek(_HEAD_BYTES)[:_HEAD_BYTES]


def _decompressor(head: bytes) -> tuple[str, Callable[[IO[bytes]], Any] | None]:
    if head.startswith(_GZIP):
        return "gzip", lambda file: gzip.GzipFile(fileobj=file)
    if head.startswith(_BZIP2) and head[4:10] == b"1AY&SY":
        return "bzip2", bz2.BZ2File
    return "zstd", _zstd if head.startswith(_ZSTD) else None


def _zstd(file: IO[bytes]) -> Any:
    import pyarrow as arrow  # slow to import

    return arrow.CompressedInputStream(arrow.PythonFile(file, mode="r"), "zstd")


class _Unpacked(io.RawIOBase):
    """Unpacked bytes; its errors are BrokenStreamError."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = (str(error).splitlines() or ["cut off"])[0][:120]
            raise BrokenStreamError(
                f"the {self._name} data is broken or cut off ({reason}); make the file again"
            ) from None
        buffer[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def _on_disk(path: Path, file: IO[bytes], packed_bytes: int) -> Iterator[IO[bytes]]:
    """The bytes that are left, in a temporary file that can be sought in."""
    with tempfile.TemporaryFile() as unpacked:
        try:
            while data := file.read(2**20):
                unpacked.write(data)
                check_expansion(str(path), unpacked.tell(), packed_bytes)
        except BrokenStreamError as error:
            raise ValueError(f"{path}: {error}") from None
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be unpacked into {tempfile.gettempdir()} ({error.strerror}); "
                "make room there, name another place with TMPDIR, or unpack the file yourself"
            ) from None
        unpacked.seek(0)
        yield unpacked


def _kind(path: Path, head: bytes) -> Kind:
    """What the file is; ValueError if it is not read."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    for magic, (what, remedy) in _REFUSED.items():
        if head.startswith(magic):
            if what == "a ZIP archive" and (b"[Content_Types].xml" in head or b"xl/" in head):
                what, remedy = "an Excel workbook or Office document", "save its sheet as CSV"
            raise ValueError(f"{path}: is {what}; {remedy}")
    text = head.removeprefix(_UTF8_BOM).lstrip()
    if head[257:262] == b"ustar":
        raise ValueError(f"{path}: is a tar archive; {_UNPACK}")
    if _PICKLE.match(head):
        raise ValueError(f"{path}: is a pickle, which can run code; {_AS_ROWS}")
    if _MARKUP.match(text):
        raise ValueError(
            f"{path}: is a web page or XML, not rows; download the file itself, or {_AS_ROWS}"
        )
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(
            f"{path}:1: byte 1 of the line (0x{head[0]:02x}) is not UTF-8 but the beginning of "
            "UTF-16; save the file as UTF-8"
        )
    if text[:1] not in (b"{", b"[") and b"\0" in head[:4096]:
        raise ValueError(f"{path}: is no file of rows, but binary; {_AS_ROWS}")
    return "text"


class Lines:
    """The lines of a text, as bytes with their ends; `number` is that of the last line, from 1."""

    def __init__(self, container: Container) -> None:
        """Reads from the container's file; a byte order mark is left out."""
        self.path, self.file = container.path, container.file
        self.number = 0

    @property
    def where(self) -> str:
        """The place of the last line, as "file:line"."""
        return f"{self.path}:{self.number}"

    def read(self, limit: int = MAX_ROW_BYTES + 1) -> bytes:
        """The next line, or its first bytes if it is longer; b"" at the end."""
        self.number += 1
        with self.broken_at(self.number):
            line = self.file.readline(limit)
        return line.removeprefix(_UTF8_BOM) if self.number == 1 else line

    @contextlib.contextmanager
    def broken_at(self, number: int) -> Iterator[None]:
        """Adds file and line to the error of a compressed stream."""
        try:
            yield
        except BrokenStreamError as error:
            raise ValueError(f"{self.path}:{number}: {error}") from None


def not_utf8(num_before: int, byte: int) -> str:
    """What to say of a line that has a byte which is not UTF-8, and so many bytes before it."""
    return f"byte {num_before + 1} of the line (0x{byte:02x}) is not UTF-8; save the file as UTF-8"
