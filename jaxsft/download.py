"""Data sets -> directories of rows: only the shards of the hub that hold the rows asked for.

    data/glaive/revision.json       the commit that "main" meant at first, and stays
    data/glaive/.source/            shards of the hub, each deleted once its parts are written
    data/glaive/train-0-180000/     part-00000.parquet, …, manifest.json (written last)
                                    unfinished.json in its place as long as parts are missing

Everything is planned from the shards' footers, before any row is read: which shards, which of
their rows make which part, and whether the converter accepts the columns. A part is a function of
the plan alone; an interrupted download goes on with the next one.
"""

import fcntl
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as arrow
import pyarrow.parquet as parquet

from jaxsft.hub import Snapshot, fetch, look_up, parquet_footer
from jaxsft.hub_retry import Hub
from jaxsft.json_file import read_json, write_json
from jaxsft.row_writer import (
    Counts,
    Part,
    check_columns,
    jsonl_batches,
    parquet_batches,
    schema_of_row,
    write_part,
)
from jaxsft.sources import MANIFEST, ROWS_KIND, converter_version, read_rows, row_files
from jaxsft.splits import Plan, Split, check_end, plan_split

UNFINISHED = "unfinished.json"
PIN = "revision.json"

_SOURCE = ".source"
_UNFINISHED_KIND = "jaxsft unfinished rows"
_ENOUGH_REJECTED = 1000  # rows without one accepted: the rest will not be better


class Request(NamedTuple):
    """A directory of rows to be made; `source` and `revision` are what its manifest says."""

    directory: Path
    source: dict[str, Any]
    split: Split
    rows_per_file: int


class Progress:
    """What a download reports as it goes; this one to nobody."""

    def plan(self, what: str, num_bytes: int, num_rows: int) -> None:
        """A directory is begun: bytes to download, rows to convert; 0 where nobody knows."""

    def received(self, num_bytes: int) -> None:
        """That many bytes more; fewer where they have to come again."""

    def converted(self, num_rows: int) -> None:
        """That many source rows more."""


def finished(request: Request) -> dict[str, Any] | None:
    """The manifest of a complete directory, found without reading a row; None if incomplete.

    Raises:
      ValueError: it is complete, but of another source or made by another converter, or damaged.
    """
    directory = request.directory
    if not (directory / MANIFEST).is_file():
        return None
    manifest = read_json(directory / MANIFEST)
    wanted = _head(request, manifest.get("revision"))
    _check_same(directory, manifest, wanted)
    row_files(directory)
    return manifest


def download_splits(
    hub: Hub, requests: Sequence[Request], progress: Progress
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Makes directories of rows of one hub data set, in order; yields each and its manifest.

    The requests share repository, revision and the directory above theirs.

    Raises:
      ValueError: no such repository, revision, subset or split; columns or every row that the
        converter does not accept; a directory begun with other options; no room.
      NoNetworkError, HubError: see hub.py.
    """
    source, home = requests[0].source, requests[0].directory.parent
    shards = home / _SOURCE
    with _locked(home):
        pins = _pins(home, source["repo"])
        revision = pins["commits"].get(source["revision"], source["revision"])
        snapshot = look_up(hub, "dataset", source["repo"], revision)
        footer_of = cache(partial(parquet_footer, hub, snapshot))
        plans = [
            plan_split(snapshot, footer_of, source["subset"], request.split, request.rows_per_file)
            for request in requests
        ]
        pins["commits"][source["revision"]] = snapshot.revision
        write_json(home / PIN, pins)
        for number, (request, plan) in enumerate(zip(requests, plans, strict=True)):
            later = {piece.shard.git_oid for other in plans[number + 1 :] for piece in other.slices}
            manifest = _carry_out(hub, snapshot, request, plan, shards, later, progress)
            yield request.directory, manifest
        shards.rmdir()


def convert_file(file: Path, request: Request, progress: Progress) -> dict[str, Any]:
    """Makes the directory of rows of a local JSONL or Parquet file; returns its manifest.

    Raises:
      ValueError: with file:line or file:row, where the file or a row of it is wrong.
    """
    split, size = request.split, request.rows_per_file
    pieces = _parquet_pieces if file.suffix == ".parquet" else _jsonl_pieces
    progress.plan(str(request.directory), 0, 0)
    parts: list[Part] = []
    for batches in pieces(file, split, size):
        start = split.start + len(parts) * size
        request.directory.mkdir(parents=True, exist_ok=True)
        path = request.directory / f"part-{len(parts):05d}.parquet"
        part = write_part(path, batches, f"{file}:row ", start)
        parts.append(part)
        progress.converted(part.counts.rows_read)
    num_rows = split.start + sum(part.counts.rows_read for part in parts)
    check_end(str(file), split, num_rows)
    return _finish(request, _head(request, None), parts)


def _parquet_pieces(file: Path, split: Split, size: int) -> Iterator[Iterator[arrow.RecordBatch]]:
    try:
        footer = parquet.read_metadata(file)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{file}: cannot be read as Parquet ({why})") from None
    columns = check_columns(footer.schema.to_arrow_schema(), str(file))
    end = check_end(str(file), split, footer.num_rows)
    for start in range(split.start, end, size):
        yield parquet_batches(file, columns, start, min(start + size, end))


def _jsonl_pieces(file: Path, split: Split, size: int) -> Iterator[Iterator[arrow.RecordBatch]]:
    rows = itertools.islice(read_rows(file), split.start, split.stop)
    schema = None
    while first := next(rows, None):
        schema = schema or schema_of_row(*first)
        yield jsonl_batches(itertools.chain([first], itertools.islice(rows, size - 1)), schema)


def _pins(home: Path, repo: str) -> dict[str, Any]:
    """The commits that revisions meant when they were first asked for."""
    pins: dict[str, Any] = {"repo": repo, "commits": {}}
    if (home / PIN).is_file():
        pins = read_json(home / PIN)
    _check_same(home / PIN, pins, {"repo": repo})
    return pins


def _carry_out(
    hub: Hub,
    snapshot: Snapshot,
    request: Request,
    plan: Plan,
    shards: Path,
    needed_later: set[str],
    progress: Progress,
) -> dict[str, Any]:
    """Writes the parts that are missing; keeps no shard for longer than it is needed."""
    slices = plan.slices
    request.directory.mkdir(parents=True, exist_ok=True)
    shards.mkdir(exist_ok=True)
    head = _head(request, snapshot.revision)
    state = head | {"kind": _UNFINISHED_KIND, "rows_per_file": request.rows_per_file}
    parts = _parts_so_far(request.directory, state)
    todo = list(enumerate(slices))[len(parts) :]
    num_bytes = sum({piece.shard.path: piece.shard.size for _, piece in todo}.values())
    num_rows = sum(piece.stop - piece.start for _, piece in todo)
    progress.plan(str(request.directory), num_bytes, num_rows)
    for shard, pieces in itertools.groupby(todo, key=lambda item: item[1].shard):
        _check_some_accepted(request, parts)
        needed = needed_later | {piece.shard.git_oid for piece in slices[len(parts) :]}
        _keep_only(shards, needed)
        source = shards / f"{shard.git_oid}.parquet"
        fetch(hub, snapshot, shard, source, progress.received)
        for index, (_, start, stop) in pieces:
            path = request.directory / f"part-{index:05d}.parquet"
            part = write_part(path, parquet_batches(source, plan.columns, start, stop))
            assert part.counts.rows_read == stop - start
            parts.append(part)
            written = [[list(counts), *rest] for counts, *rest in parts]
            write_json(request.directory / UNFINISHED, state | {"parts": written})
            progress.converted(stop - start)
    manifest = _finish(request, head, parts)
    _keep_only(shards, needed_later)
    return manifest


def _head(request: Request, revision: str | None) -> dict[str, Any]:
    return {
        "kind": ROWS_KIND,
        "source": request.source,
        "revision": revision,
        "split": request.split.text,
        "converter": converter_version(),
    }


def _parts_so_far(directory: Path, state: dict[str, Any]) -> list[Part]:
    """The parts that an interrupted download has written, as far as they are there."""
    path = directory / UNFINISHED
    if not path.is_file():
        write_json(path, state | {"parts": []})
        return []
    before = read_json(path)
    _check_same(directory, before, state)
    parts = [Part(Counts(*counts), *rest) for counts, *rest in before["parts"]]

    def is_there(part: Part) -> bool:
        file = directory / Path(part.name).name
        return not part.name or (file.is_file() and file.stat().st_size == part.num_bytes)

    return list(itertools.takewhile(is_there, parts))


def _finish(request: Request, head: dict[str, Any], parts: list[Part]) -> dict[str, Any]:
    """Writes the manifest; ValueError where no row was accepted."""
    _check_some_accepted(request, parts, enough=1)
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
    names = {part.name for part in parts}
    for left_over in request.directory.glob("part-*"):
        if left_over.name not in names:
            left_over.unlink()
    write_json(request.directory / MANIFEST, manifest)
    (request.directory / UNFINISHED).unlink(missing_ok=True)
    return manifest


def _check_some_accepted(
    request: Request, parts: list[Part], enough: int = _ENOUGH_REJECTED
) -> None:
    rejected = sum((Counter(part.counts.rejected) for part in parts), Counter())
    if rejected.total() >= enough and not any(part.counts.rows for part in parts):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in rejected.most_common())
        raise ValueError(
            f"{request.directory}: none of the first {rejected.total():,} rows can be used "
            f"({reasons}); is this the data set that you mean?"
        )


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


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Keeps a second download out of the directory; removes it where nothing was put in it."""
    home.mkdir(parents=True, exist_ok=True)
    handle = os.open(home, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"{home}: another download is writing to it") from None
    finally:
        os.close(handle)
        if not any(home.iterdir()):
            home.rmdir()
