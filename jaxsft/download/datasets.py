"""Makes directories of rows from data sets. Only shards with the rows asked for are downloaded.

    data/glaive/revision.json       the commit of "main" at the first download; it stays
    data/glaive/.source/            shards of the hub; each is deleted after its parts are written
    data/glaive/train-0-180000/     part-00000.parquet, …, manifest.json (written last)
                                    unfinished.json instead of it while parts are missing

The plan is made from the footers of the shards, before any row is read: which shards, which of
their rows go to which part, and whether the columns fit a schema. A part depends on the plan only,
so an interrupted download continues with the next part.
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
from jaxsft.data.sources import ROWS_KIND, ROWS_MANIFEST, row_files
from jaxsft.download.files import Hub, Snapshot, fetch, look_up, parquet_footer
from jaxsft.download.parts import (
    Counts,
    Part,
    check_some_accepted,
    parquet_batches,
    remove_parts,
    write_manifest,
    write_part,
)
from jaxsft.download.splits import Plan, Split, check_end, file_pieces, plan_split

UNFINISHED = "unfinished.json"

_SOURCE = ".source"
_UNFINISHED_KIND = "jaxsft unfinished rows"


class Request(NamedTuple):
    """A directory of rows to make; its manifest gets the same `source`."""

    directory: Path
    source: dict[str, Any]
    split: Split
    rows_per_file: int


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
      ValueError: there is no such repository, revision, subset or split; the columns fit no schema;
        no row is accepted; a directory was started with other options; the disk has no room.
      NoNetworkError, HubError: see files.py.
    """
    source, home = requests[0].source, requests[0].directory.parent
    shards = home / _SOURCE
    with DirectoryLock(home):
        repo, revision = source["repo"], source["revision"]
        commit = read_pins(home, repo).get(revision, revision)
        snapshot = look_up(hub, repo, commit)
        footer_of = cache(partial(parquet_footer, hub, snapshot))
        plans = [
            plan_split(snapshot, footer_of, source["subset"], request.split, request.rows_per_file)
            for request in requests
        ]
        write_pin(home, repo, revision, snapshot.revision)
        for number, (request, plan) in enumerate(zip(requests, plans, strict=True)):
            later = {piece.shard.git_oid for other in plans[number + 1 :] for piece in other.slices}
            manifest = _carry_out(hub, snapshot, request, plan, shards, later, progress)
            yield request.directory, manifest
        shards.rmdir()


def convert_file(file: Path, request: Request, progress: Progress) -> dict[str, Any]:
    """Makes the directory of rows from a local JSONL or Parquet file; returns its manifest.

    Raises:
      ValueError: with file:line or file:row, if the file or one of its rows is wrong.
    """
    directory, split, size = request.directory, request.split, request.rows_per_file
    parts: list[Part] = []
    with DirectoryLock(directory.parent):
        progress.plan(str(directory), 0, 0)
        try:
            for batches in file_pieces(file, split, size):
                start = split.start + len(parts) * size
                directory.mkdir(parents=True, exist_ok=True)
                path = directory / f"part-{len(parts):05d}.parquet"
                parts.append(write_part(path, batches, f"{file}:row ", start))
                progress.converted(parts[-1].counts.rows_read)
            num_rows = split.start + sum(part.counts.rows_read for part in parts)
            check_end(str(file), split, num_rows)
            return write_manifest(directory, _head(request, None), parts)
        except BaseException:
            if not (directory / ROWS_MANIFEST).is_file():
                remove_parts(directory)
                with suppress(OSError):  # it does not exist, or other files are in it
                    directory.rmdir()
            raise


def _carry_out(
    hub: Hub,
    snapshot: Snapshot,
    request: Request,
    plan: Plan,
    shards: Path,
    needed_later: set[str],
    progress: Progress,
) -> dict[str, Any]:
    """Writes the missing parts; deletes each shard when it is no longer needed."""
    slices = plan.slices
    request.directory.mkdir(parents=True, exist_ok=True)
    shards.mkdir(exist_ok=True)
    head = _head(request, snapshot.revision)
    state = head | {"kind": _UNFINISHED_KIND, "rows_per_file": request.rows_per_file}
    parts = _parts_so_far(request.directory, state, hub.note)
    todo = list(enumerate(slices))[len(parts) :]
    num_bytes = sum({piece.shard.path: piece.shard.size for _, piece in todo}.values())
    num_rows = sum(piece.stop - piece.start for _, piece in todo)
    progress.plan(str(request.directory), num_bytes, num_rows)
    for shard, pieces in itertools.groupby(todo, key=lambda item: item[1].shard):
        check_some_accepted(request.directory, parts)
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
    manifest = write_manifest(request.directory, head, parts)
    (request.directory / UNFINISHED).unlink(missing_ok=True)
    _keep_only(shards, needed_later)
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
    sums = part.counts.rows + sum(part.counts.rejected.values())
    if not isinstance(part.sha256, str) or sums != part.counts.rows_read:
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
