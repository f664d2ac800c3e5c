"""Makes directories of rows from data sets. Only files with the rows asked for are downloaded.

    data/glaive/revision.json       the commit of "main" at the first download; it stays
    data/glaive/.source/            files of the hub; each is deleted after its parts are written
    data/glaive/train-0-180000/     part-00000.parquet, …, manifest.json (written last)
                                    unfinished.json instead of it while parts are missing

Of Parquet the plan is made from the footers of the shards, before any row is read: which shards,
which of their rows go to which part, and whether the columns can be used. A part depends on the
plan only, so an interrupted download continues with the next part.

Other files (JSON, CSV, …, and the user's own) are read by `read_rows`, which reads them as training
does, until the rows asked for are there. An interrupted download keeps the files that it has, and
writes the parts anew.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.common.files import read_json, write_json
from jaxsft.common.locks import DirectoryLock, LockedError
from jaxsft.common.pins import read_pins, write_pin
from jaxsft.data.rows import ROWS_VERSION
from jaxsft.data.sources import ROWS_KIND, ROWS_MANIFEST, UNFINISHED, read_rows, row_files
from jaxsft.download.files import Hub, HubFile, Snapshot, fetch, look_up, parquet_footer
from jaxsft.download.parts import (
    Columns,
    Counts,
    Part,
    check_some_accepted,
    parquet_batches,
    remove_parts,
    write_json_part,
    write_manifest,
    write_parquet_part,
)
from jaxsft.download.splits import Slice, Split, check_end, is_parquet, plan_split, split_files

_SOURCE = ".source"
_UNFINISHED_KIND = "jaxsft unfinished rows"


class Request(NamedTuple):
    """A directory of rows to make; its manifest gets the same `source`.

    `columns` are those that will be used, as `data.columns`. They decide whether the rows can be
    used, and not what the directory holds.
    """

    directory: Path
    source: dict[str, Any]
    split: Split
    rows_per_file: int
    columns: Columns = None


class Progress:
    """Gets the progress of a download; this base class ignores it."""

    def plan(self, what: str, num_bytes: int, num_rows: int) -> None:
        """A directory is started: bytes to download, rows to convert; 0 if not known."""

    def received(self, num_bytes: int) -> None:
        """More bytes have come; negative if bytes must come again."""

    def converted(self, num_rows: int) -> None:
        """More source rows are converted."""


def finished(request: Request) -> dict[str, Any] | None:
    """The manifest of a complete directory; None if it is not complete. Reads no row.

    Another version of the converter may have made it. The parts hold the original rows, which are
    converted and checked again when they are used.

    Raises:
      ValueError: the directory is complete but was made from another source, or is damaged.
    """
    directory = request.directory
    if not (directory / ROWS_MANIFEST).is_file():
        return None
    manifest = read_json(directory / ROWS_MANIFEST)
    wanted = _head(request, manifest.get("revision"))
    _check_same(directory, manifest, wanted | {"converter": manifest.get("converter")})
    row_files(directory)
    return manifest


def tidy_up(requests: Sequence[Request]) -> None:
    """Removes the files that a download left when it was killed just before its end."""
    home = requests[0].directory.parent
    left_over = [request.directory / UNFINISHED for request in requests]
    if not (home / _SOURCE).is_dir() and not any(file.is_file() for file in left_over):
        return
    with suppress(OSError, LockedError), DirectoryLock(home):
        for file in left_over:
            file.unlink(missing_ok=True)
        if not any(home.glob(f"*/{UNFINISHED}")):  # it would need the shards
            _keep_only(home / _SOURCE, set())
            (home / _SOURCE).rmdir()


def download_splits(
    hub: Hub, requests: Sequence[Request], progress: Progress
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Makes directories of rows of one hub data set, in order; yields each with its manifest.

    All requests have the same repository, revision and parent directory.

    Raises:
      ValueError: there is no such repository, revision, subset, split or row; no row can be used; a
        directory was started with other options; the disk has no room.
      NoNetworkError, HubError: see files.py.
    """
    source, home = requests[0].source, requests[0].directory.parent
    with DirectoryLock(home):
        repo, revision = source["repo"], source["revision"]
        commit = read_pins(home, repo).get(revision, revision)
        snapshot = look_up(hub, repo, commit)
        footer_of = cache(partial(parquet_footer, hub, snapshot))
        jobs = []
        for request in requests:
            files = split_files(snapshot, source["subset"], request.split.name)
            _, _, split, size, columns = request
            if all(map(is_parquet, files)):
                plan = plan_split(snapshot, files, footer_of, split, size, columns)
                files = list(dict.fromkeys(piece.shard for piece in plan))
            else:
                plan = None
            jobs.append((request, files, plan))
        write_pin(home, repo, revision, snapshot.revision)
        store = _Store(hub, snapshot, home / _SOURCE, progress)
        for number, (request, files, plan) in enumerate(jobs):
            later = {file.git_oid for _, others, _ in jobs[number + 1 :] for file in others}
            make = (
                partial(_make_from_rows, files=files)
                if plan is None
                else partial(_make_from_parquet, slices=plan)
            )
            yield request.directory, make(store, request, needed_later=later)
        store.directory.rmdir()


def convert_file(file: Path, request: Request, progress: Progress) -> dict[str, Any]:
    """Makes the directory of rows from a local file; returns its manifest.

    Raises:
      ValueError: the file is broken, has too few rows, or none that can be used.
    """
    with DirectoryLock(request.directory.parent):
        progress.plan(str(request.directory), 0, 0)
        rows = (row for _, row in read_rows(file, request.columns))
        return _write_rows(rows, str(file), request, None, progress)


class _Store(NamedTuple):
    """Files of one commit, downloaded into a directory."""

    hub: Hub
    snapshot: Snapshot
    directory: Path
    progress: Progress

    def get(self, file: HubFile) -> Path:
        path = self.directory / f"{file.git_oid}{''.join(Path(file.path).suffixes[-2:])}"
        fetch(self.hub, self.snapshot, file, path, self.progress.received)
        return path

    def keep_only(self, git_oids: set[str]) -> None:
        _keep_only(self.directory, git_oids)


def _make_from_rows(
    store: _Store, request: Request, *, files: Sequence[HubFile], needed_later: set[str]
) -> dict[str, Any]:
    """Reads the files one after the other, as far as they are needed."""
    store.directory.mkdir(parents=True, exist_ok=True)
    store.keep_only(needed_later | {file.git_oid for file in files})
    num_bytes = sum(file.size for file in files)
    store.progress.plan(str(request.directory), num_bytes, 0)
    rows = (row for file in files for _, row in read_rows(store.get(file), request.columns))
    repo, commit, *_ = store.snapshot
    manifest = _write_rows(rows, repo, request, commit, store.progress)
    store.keep_only(needed_later)
    return manifest


def _write_rows(
    rows: Iterator[Any], where: str, request: Request, commit: str | None, progress: Progress
) -> dict[str, Any]:
    """Writes the split's rows as parts of JSON lines; no directory is left if that fails."""
    directory, _, split, size, columns = request
    parts: list[Part] = []
    count = itertools.count()
    counted = (row for row, _ in zip(rows, count, strict=False))
    rows = itertools.islice(counted, split.start, split.stop)
    try:
        for first in rows:
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / f"part-{len(parts):05d}.jsonl"
            piece = itertools.chain([first], itertools.islice(rows, size - 1))
            parts.append(write_json_part(path, piece, columns))
            check_some_accepted(directory, parts)
            progress.converted(parts[-1].counts.rows_read)
        check_end(where, split, next(count))
        return write_manifest(directory, _head(request, commit), parts)
    except BaseException:
        if not (directory / ROWS_MANIFEST).is_file():
            remove_parts(directory)
            with suppress(OSError):  # it does not exist, or other files are in it
                directory.rmdir()
        raise


def _make_from_parquet(
    store: _Store, request: Request, *, slices: Sequence[Slice], needed_later: set[str]
) -> dict[str, Any]:
    """Writes the missing parts; deletes each shard when it is no longer needed."""
    request.directory.mkdir(parents=True, exist_ok=True)
    store.directory.mkdir(exist_ok=True)
    head = _head(request, store.snapshot.revision)
    state = head | {"kind": _UNFINISHED_KIND, "rows_per_file": request.rows_per_file}
    parts = _parts_so_far(request.directory, state, store.hub.note)
    todo = list(enumerate(slices))[len(parts) :]
    num_bytes = sum({piece.shard.path: piece.shard.size for _, piece in todo}.values())
    num_rows = sum(piece.stop - piece.start for _, piece in todo)
    store.progress.plan(str(request.directory), num_bytes, num_rows)
    for shard, pieces in itertools.groupby(todo, key=lambda item: item[1].shard):
        check_some_accepted(request.directory, parts)
        store.keep_only(needed_later | {piece.shard.git_oid for piece in slices[len(parts) :]})
        source = store.get(shard)
        for index, (_, start, stop) in pieces:
            path = request.directory / f"part-{index:05d}.parquet"
            part = write_parquet_part(path, parquet_batches(source, start, stop), request.columns)
            assert part.counts.rows_read == stop - start
            parts.append(part)
            written = [[list(counts), *rest] for counts, *rest in parts]
            write_json(request.directory / UNFINISHED, state | {"parts": written})
            store.progress.converted(stop - start)
    manifest = write_manifest(request.directory, head, parts)
    (request.directory / UNFINISHED).unlink(missing_ok=True)
    store.keep_only(needed_later)
    return manifest


def _head(request: Request, revision: str | None) -> dict[str, Any]:
    return {
        "kind": ROWS_KIND,
        "source": request.source,
        "revision": revision,
        "split": request.split.text,
        "converter": ROWS_VERSION,
    }


def _parts_so_far(
    directory: Path, state: dict[str, Any], note: Callable[[str], None]
) -> list[Part]:
    """The parts that an interrupted download has written, up to the first that is missing."""
    path = directory / UNFINISHED
    parts: list[Part] = []
    if path.is_file():
        before = read_json(path)
        _check_same(directory, before, state | {"converter": before.get("converter")})
        if before.get("converter") != state["converter"]:
            note(f"{directory}: begun by another version of the converter; starts over")
        else:
            try:
                parts = [Part(Counts(*counts), *rest) for counts, *rest in before["parts"]]
                return list(itertools.takewhile(partial(_is_there, directory), parts))
            except (AttributeError, KeyError, TypeError, ValueError):
                note(f"{path}: lists no parts; starts over")
    write_json(path, state | {"parts": []})
    return []


def _is_there(directory: Path, part: Part) -> bool:
    file = directory / Path(part.name).name
    counts = [part.counts.rows, sum(part.counts.rejected.values())]
    if not isinstance(part.sha256, str) or max(counts) > part.counts.rows_read:
        raise TypeError("is no part")
    return not part.name or (file.is_file() and file.stat().st_size == part.num_bytes)


def _check_same(where: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{where}: was made with {name} {found.get(name)!r}, not {value!r}; "
                "delete it, or name another --output_dir"
            )


def _keep_only(shards: Path, git_oids: set[str]) -> None:
    for file in shards.iterdir():
        if file.name.split(".")[0] not in git_oids:
            file.unlink()
