"""Reads raw rows, one at a time, from files, directories and patterns; containers.py has the kinds.

Errors name file:line. Only a chunk of rows is in memory.
"""

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.common.files import file_sha256, read_json
from jaxsft.data.containers import Container, Lines, open_container
from jaxsft.data.csv_rows import read_csv
from jaxsft.data.json_rows import is_json, read_json_rows

ROWS_MANIFEST = "manifest.json"
ROWS_KIND = "jaxsft rows"  # `kind` in the manifest of a directory of rows
_SAVED = "state.json"  # written by Dataset.save_to_disk; lists the Arrow files
_SAVED_SPLITS = "dataset_dict.json"  # written by DatasetDict.save_to_disk
UNFINISHED = "unfinished.json"  # in a directory whose download is not finished

# Files beside rows that are none, and are passed over in directories and patterns.
_NO_ROWS = re.compile(
    r"[._].*|(readme|licen[cs]e|notice|citation|changelog)(\..*)?|.*\.(md|lock|crc|sha256|md5)"
    r"|dataset_infos?\.json",
    re.IGNORECASE,
)
_SPLIT_NAME = re.compile(
    r"(?:^|[/._-])(train|test|validation|valid|val|dev|eval|heldout)(?=[/._-]|$)"
)
_LIST_FIRST_LINE = 2**20  # a longer line that begins with a bracket is a whole array


class RowFile(NamedTuple):
    """A file of rows; if it was downloaded, also the SHA-256 (hex) that it had then."""

    path: Path
    sha256: str | None = None


def row_files(path: str | Path) -> list[RowFile]:
    """The files of rows at `path`: itself, those in a directory, or those that a pattern matches.

    The manifest of a download, or what `datasets` saved, says which files a directory has, and in
    which order. Otherwise it has all files at any depth, in natural order of their names (2 before
    10); hidden files, licences and READMEs are passed over.

    Raises:
      ValueError: there are no such files, or those of several data sets or splits; or a file of a
        manifest is missing or does not have the size in it.
    """
    path = Path(path)
    if path.is_dir():
        return _files_in(path)
    if glob.has_magic(str(path)) and not path.exists():
        found = [Path(each) for each in glob.iglob(str(path), recursive=True)]
        files = {file for file in found if file.is_file() and not _NO_ROWS.fullmatch(file.name)}
        if not files:  # the pattern of directories
            return [file for each in sorted(found, key=_natural) for file in _files_in(each)] or (
                _refuse(path, "matches no file of rows; check the pattern")
            )
        return _in_order(path, files)
    _check_ordinary(path)
    return [RowFile(path)]


def _check_ordinary(path: Path) -> None:
    if path.exists() and not path.is_file():  # it would be read twice, and may never end
        raise ValueError(f"{path}: is a pipe or a device; write its rows to a file, and name that")


def _refuse(path: Path, why: str) -> Any:
    raise ValueError(f"{path}: {why}")


def _files_in(path: Path) -> list[RowFile]:
    if (path / _SAVED).is_file():
        return _saved_files(path)
    if (path / _SAVED_SPLITS).is_file():
        splits = ", ".join(sorted(each.parent.name for each in path.glob(f"*/{_SAVED}")))
        raise ValueError(f"{path}: holds several splits; name one of them: {splits}")
    if (path / ROWS_MANIFEST).is_file():
        return _downloaded_files(path)
    if (path / UNFINISHED).is_file():
        raise ValueError(
            f"{path}: its download is not finished; let data/download_sft_datasets.py finish it"
        )

    def refuse_unreadable(error: OSError) -> None:
        raise _unreadable(Path(error.filename), error)

    files: set[Path] = set()
    sets = []
    walked: set[str] = set()  # real paths: a link may lead back
    for folder, folders, names in os.walk(path, onerror=refuse_unreadable, followlinks=True):
        if os.path.realpath(folder) in walked:
            folders.clear()
            continue
        walked.add(os.path.realpath(folder))
        folders[:] = [each for each in folders if not each.startswith(".")]
        if not {ROWS_MANIFEST, _SAVED, _SAVED_SPLITS, UNFINISHED}.isdisjoint(names):
            sets.append(folder)
        files.update(Path(folder, name) for name in names if not _NO_ROWS.fullmatch(name))
    for file in files:
        _check_ordinary(file)
    if sets:
        raise ValueError(
            f"{path}: holds sets of rows of their own; name one of them: {_some(sorted(sets))}"
        )
    if not files:
        raise ValueError(
            f"{path}: is a directory without rows; name a file or directory of rows, or let "
            "data/download_sft_datasets.py make it"
        )
    return _in_order(path, files)


def _in_order(path: Path, files: set[Path]) -> list[RowFile]:
    ordered = sorted(files, key=_natural)
    common = os.path.commonpath([file.parent for file in ordered])
    splits: dict[str, Path] = {}
    for file in ordered:
        for name in _SPLIT_NAME.findall(str(file).removeprefix(common))[-1:]:
            splits.setdefault(name, file)
    if "train" in splits and len(splits) > 1:
        raise ValueError(
            f"{path}: holds files of several splits ({_some(sorted(map(str, splits.values())))}); "
            "name those of one, or give each a pattern of its own"
        )
    return [RowFile(file) for file in ordered]


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by value."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"(\d+)", str(path))
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", … ({len(names)} in all)" if len(names) > 4 else "")


def _downloaded_files(path: Path) -> list[RowFile]:
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
    """Number of rows if all files are Parquet, which says so; else None."""
    total = 0
    for file, _ in row_files(path):
        try:
            with open_container(file) as container:
                if container.kind != "parquet":
                    return None
                from jaxsft.data.parquet_rows import num_parquet_rows

                total += num_parquet_rows(container)
        except (OSError, ValueError):  # ArrowInvalid is one; `read_rows` will report it
            return None
    return total


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


def read_rows(
    path: str | Path, columns: Mapping[str, str] | None = None, *, whole: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yields ("file:line", row) or ("file:row n", row) of all `row_files`.

    A row is a dict unless the file has something else in its place. A value may be `Repeated`,
    UNREAD, NaN or infinite, and text may have lone surrogates. Nothing that a file holds is opened
    or asked for.

    Args:
      path: a file, a directory or a pattern.
      columns: `data.columns`, the columns that the user named for each part.
      whole: whether columns without text, and those that no conversation needs, are read too; those
        with bytes are not.

    Raises:
      ValueError: there is no such file, there are no rows, or a file is of another kind, broken, or
        has a row over 64 MiB.
    """
    found = False
    for file, _ in row_files(path):
        for row in _read_file(file, columns, whole):
            found = True
            yield row
    if not found:
        raise ValueError(f"{path}: is empty; it must hold rows, such as one JSON object per line")


def _read_file(
    path: Path, columns: Mapping[str, str] | None, whole: bool
) -> Iterator[tuple[str, Any]]:
    try:
        with open_container(path) as container:
            if container.kind == "parquet":
                from jaxsft.data.parquet_rows import read_parquet  # pyarrow is slow to import

                yield from read_parquet(container, columns, whole)
            elif container.kind == "arrow":
                from jaxsft.data.ipc_rows import read_ipc

                yield from read_ipc(container, columns, whole)
            else:
                yield from _read_text(container, columns)
    except OSError as error:
        raise _unreadable(path, error) from None


def _read_text(
    container: Container, columns: Mapping[str, str] | None
) -> Iterator[tuple[str, Any]]:
    lines = Lines(container)
    begins_list = container.file.peek(64).lstrip()[:1] == b"["
    line = lines.read(_LIST_FIRST_LINE) if begins_list else lines.read()
    while line and not line.strip():
        line = lines.read()
    first = line.lstrip()[:1]
    if not first:
        raise ValueError(f"{container.path}: is empty; it must hold one JSON object per line")
    # Another value on a line of its own is a row among others, if others follow.
    follows = container.file.peek(64).lstrip()[:1]
    if first in (b"{", b"[") or (follows == b"{" and is_json(line)):
        yield from read_json_rows(lines, line, columns)
    else:
        yield from read_csv(lines, line, columns)
