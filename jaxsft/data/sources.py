"""Reads raw rows, one at a time, from JSONL, Parquet, and directories of rows.

A directory was made by the download, or by `Dataset.save_to_disk` of Hugging Face. Errors name
file:line. Only a chunk of rows is in memory.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.common.files import file_sha256, read_json

ROWS_MANIFEST = "manifest.json"
ROWS_KIND = "jaxsft rows"  # `kind` in the manifest of a directory of rows
_SAVED = "state.json"  # written by Dataset.save_to_disk; lists the Arrow files
_SAVED_SPLITS = "dataset_dict.json"  # written by DatasetDict.save_to_disk

_CHUNK_ROWS = 256  # of Parquet, converted to Python objects together
_UTF8_BOM = b"\xef\xbb\xbf"
_MAX_LINE_BYTES = 64 * 2**20  # of JSONL; the longest published traces are under 1 MiB


class RowFile(NamedTuple):
    """A file of rows; if it was downloaded, also the SHA-256 (hex) that it had then."""

    path: Path
    sha256: str | None = None


def row_files(path: str | Path) -> list[RowFile]:
    """The files of rows at `path`: `path` itself, or the files listed in a directory's manifest.

    Raises:
      ValueError: the directory was neither downloaded nor saved by `datasets`, or one of its files
        is missing or does not have the size in the manifest.
    """
    path = Path(path)
    if not path.is_dir():
        return [RowFile(path)]
    if (path / _SAVED).is_file():
        return _saved_files(path)
    if (path / _SAVED_SPLITS).is_file():
        splits = ", ".join(sorted(each.parent.name for each in path.glob(f"*/{_SAVED}")))
        raise ValueError(f"{path}: holds several splits; name one of them: {splits}")
    if not (path / ROWS_MANIFEST).is_file():
        raise ValueError(
            f"{path}: is a directory without {ROWS_MANIFEST} or {_SAVED}; name a .jsonl or "
            ".parquet file in it, or let data/download_sft_datasets.py finish it"
        )
    manifest = read_json(path / ROWS_MANIFEST)
    if manifest.get("kind") != ROWS_KIND:
        raise ValueError(f"{path / ROWS_MANIFEST}: is not of downloaded rows; name a file of rows")
    files = []
    try:
        for entry in manifest["files"]:
            file = path / Path(entry["name"]).name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise _not_as_downloaded(file)
            files.append(RowFile(file, entry["sha256"]))
    except (LookupError, TypeError):
        raise ValueError(
            f"{path / ROWS_MANIFEST}: damaged; delete {path}, download again"
        ) from None
    return files


def _saved_files(path: Path) -> list[RowFile]:
    try:
        names = [Path(entry["filename"]).name for entry in read_json(path / _SAVED)["_data_files"]]
    except (LookupError, TypeError):
        raise ValueError(f"{path / _SAVED}: damaged; save the data set again") from None
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path / missing[0]}: is missing; save the data set again")
    return [RowFile(path / name) for name in names]


def _not_as_downloaded(file: Path) -> ValueError:
    return ValueError(f"{file}: missing or not as downloaded; delete {file.parent}, download again")


def count_rows(path: str | Path) -> int | None:
    """Number of rows in a Parquet file or a directory of them; None for JSONL."""
    files = [file for file, _ in row_files(path)]
    if any(file.suffix != ".parquet" for file in files):
        return None
    import pyarrow.parquet as parquet

    try:
        return sum(parquet.read_metadata(file).num_rows for file in files)
    except (OSError, ValueError):  # ArrowInvalid is one; `read_rows` will report it
        return None


def file_digest(file: RowFile, known: dict[str, Any]) -> str:
    """SHA-256 (hex) of a file, cached in `known` until its `stamp` changes.

    Raises ValueError if the file cannot be read, or is not as it was downloaded.
    """
    key, now = str(file.path.absolute()), stamp(file.path)
    if known.get(key, [])[:-1] != now:
        known[key] = [*now, file_sha256(file.path)]
    digest = str(known[key][-1])
    if file.sha256 not in (None, digest):
        raise _not_as_downloaded(file.path)
    return digest


def stamp(file: Path) -> list[int]:
    """Size, modification time, status change time and inode: they change with the file."""
    try:
        status = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _unreadable(path: Path, error: OSError) -> ValueError:
    made = "" if path.suffix else " or let data/download_sft_datasets.py make it"
    return ValueError(f"{path}: cannot be read ({error.strerror or error}); check the path{made}")


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", row) from JSONL and ("file:row n", row) from others, of all `row_files`.

    JSONL is read line by line: UTF-8, with or without a byte order mark, LF or CRLF; blank lines
    are skipped.

    Raises:
      ValueError: there is no such file, a directory has no rows, or a file is empty; a line is over
        64 MiB, not UTF-8, not one JSON object, or nested too deeply; a key is repeated; a number is
        NaN or Infinity.
    """
    for file, _ in row_files(path):
        yield from _read_file(file)


def _read_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    readers = {".parquet": _read_parquet, ".arrow": _read_arrow}
    rows = readers.get(path.suffix, _read_jsonl)(path)
    empty = True
    try:
        for row in rows:
            empty = False
            yield row
    except OSError as error:
        raise _unreadable(path, error) from None
    if empty:
        raise ValueError(f"{path}: is empty; it must hold one JSON object per line")


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > _MAX_LINE_BYTES:
                raise ValueError(f"{where}: over 64 MiB; is this JSONL, one object a line?")
            if number == 1:
                line = line.removeprefix(_UTF8_BOM)
            if line.strip():
                try:
                    yield where, _parse_line(line.rstrip(b"\r\n"))
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = line[error.start]
        raise ValueError(
            f"byte {error.start + 1} of the line (0x{bad:02x}) is not UTF-8; save the file as UTF-8"
        ) from None
    try:
        row = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"broken or cut off at column {error.colno} ({error.msg}); "
            "every line must be one complete JSON object"
        ) from None
    except RecursionError:
        raise ValueError("nested too deeply; a row is a flat JSON object") from None
    if not isinstance(row, dict):
        raise ValueError(f"is a JSON {type(row).__name__}; every line must be one JSON object")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        name = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f'the key "{name}" is there more than once; keep one')
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write a number or null")


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as arrow  # slow to import; only Parquet needs it
    import pyarrow.parquet as parquet

    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for records in file.iter_batches(batch_size=_CHUNK_ROWS):
                for row in records.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", row
    except (arrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not a complete Parquet file after row {number} ({str(error).splitlines()[0]})"
        ) from None


def _read_arrow(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets  # slow to import; only Arrow files need it

    with path.open("rb") as file:
        if file.read(6) == b"ARROW1":
            raise ValueError(f"{path}: is in Arrow's file format (Feather); save it as Parquet")
    number = 0
    try:
        for row in datasets.Dataset.from_file(str(path)):
            number += 1
            yield f"{path}:row {number}", row
    except (ValueError, OSError, KeyError, TypeError) as error:  # of Arrow or metadata
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: not a complete Arrow file after row {number} ({reason}); save it again"
        ) from None
