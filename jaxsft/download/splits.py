"""Parses splits such as `train[180000:280000]`, and finds the files that hold their rows."""

import difflib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as arrow
import pyarrow.parquet as parquet
from fsspec.utils import glob_translate

from jaxsft.data.sources import read_rows
from jaxsft.download.files import HubFile, Snapshot
from jaxsft.download.parts import check_columns, jsonl_batches, parquet_batches, schema_of_row

_SPLIT = re.compile(r"(\w+(?:[.-]\w+)*)(?:\[(\d*):(\d*)\])?")
# Usual names of splits, for repositories with no list of splits on their card.
_USUAL = re.compile(r"(?:^|[/._-])(train|test|validation|valid|val|dev|eval|prompt)(?=[/._-])")


class Known(NamedTuple):
    """A data set that has a short name: its repository, and the splits to take by default."""

    repo: str
    subset: str | None
    splits: tuple[str, ...]


# Training rows are compared with the test splits.
KNOWN = {
    "glaive": Known("glaiveai/reasoning-v1-20m", None, ("train[:180000]", "train[180000:280000]")),
    "gsm8k": Known("openai/gsm8k", "main", ("train", "test")),
    "mbpp": Known("google-research-datasets/mbpp", "full", ("train", "test")),
}


class Slice(NamedTuple):
    """Rows [start, stop) of a shard. They become one part."""

    shard: HubFile
    start: int
    stop: int


class Plan(NamedTuple):
    """How a split is made: the columns that the converter reads, and a slice for each part."""

    columns: list[str]
    slices: list[Slice]


class Split(NamedTuple):
    """Rows [start, stop) of a split; with stop None, to its end."""

    name: str
    start: int = 0
    stop: int | None = None

    @property
    def text(self) -> str:
        """The text that `parse_split` reads."""
        if not self.start and self.stop is None:
            return self.name
        return f"{self.name}[{self.start or ''}:{'' if self.stop is None else self.stop}]"

    @property
    def directory_name(self) -> str:
        """Such as train, train-0-180000 or train-180000-end."""
        if not self.start and self.stop is None:
            return self.name
        return f"{self.name}-{self.start}-{'end' if self.stop is None else self.stop}"


def parse_split(text: str) -> Split:
    """Parses `train`, `train[:180000]`, `train[180000:280000]`; ValueError for other text."""
    match = _SPLIT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"split {text!r}: write it as train or train[180000:280000]")
    start, stop = int(match[2] or 0), int(match[3]) if match[3] else None
    if stop is not None and stop <= start:
        raise ValueError(f"split {text!r}: holds no rows; its end must lie behind its start")
    return Split(match[1], start, stop)


def check_end(where: str, split: Split, num_rows: int) -> int:
    """The index after the last row of the split; ValueError if the data has fewer rows."""
    if split.start < num_rows and (split.stop or 0) <= num_rows:
        return num_rows if split.stop is None else split.stop
    raise ValueError(
        f"{where}: {split.text} goes beyond its {num_rows:,} rows; ask for {split.name}"
        + (f" or {split.name}[:{num_rows}]" if num_rows else "")
    )


def plan_split(
    snapshot: Snapshot,
    footer_of: Callable[[HubFile], parquet.FileMetaData],
    subset: str | None,
    split: Split,
    rows_per_part: int,
) -> Plan:
    """Makes the plan from the footers of the shards, up to the last one with rows asked for.

    Raises:
      ValueError: there is no such subset, split or row, or the columns fit no schema.
    """
    columns: list[str] = []
    slices: list[Slice] = []
    first = 0
    for shard in split_files(snapshot, subset, split.name):
        if split.stop is not None and first >= split.stop:
            break
        where = f"{snapshot.repo}: {shard.path}"
        footer = footer_of(shard)
        found = check_columns(footer.schema.to_arrow_schema(), where)
        if columns and found != columns:
            raise ValueError(f"{where}: has the columns {found}, the shards before it {columns}")
        columns, num_rows = found, footer.num_rows
        end = num_rows if split.stop is None else min(split.stop - first, num_rows)
        for start in range(max(split.start - first, 0), end, rows_per_part):
            slices.append(Slice(shard, start, min(start + rows_per_part, end)))
        first += num_rows
    check_end(snapshot.repo, split, first)
    return Plan(columns, slices)


def file_pieces(file: Path, split: Split, size: int) -> Iterator[Iterator[arrow.RecordBatch]]:
    """The split's rows of a local Parquet or JSONL file, in pieces of `size`; none is empty.

    If a JSONL file has too few rows, no error is raised here; see `check_end`.
    """
    return (_parquet_pieces if file.suffix == ".parquet" else _jsonl_pieces)(file, split, size)


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


def split_files(snapshot: Snapshot, subset: str | None, split: str) -> list[HubFile]:
    """The Parquet files of one split, in the order of its rows.

    The card of the data set lists them (`configs`). Without a list the name or folder of a file
    tells its split, and a file whose name does not tell belongs to train.

    Raises:
      ValueError: there is no such subset or split, or it is not stored as Parquet.
    """
    if snapshot.configs:
        files = _listed_on_card(snapshot, subset, split)
    else:
        files = _named_after(snapshot, subset, split)
    others = [file.path for file in files if not file.path.endswith(".parquet")]
    if others:
        raise ValueError(
            f"{snapshot.repo}: {others[0]} is not Parquet; most data sets have a Parquet copy "
            "at --revision refs/convert/parquet"
        )
    return files


def _listed_on_card(snapshot: Snapshot, subset: str | None, split: str) -> list[HubFile]:
    configs = {str(config.get("config_name")): config for config in snapshot.configs}
    usual = [name for name, config in configs.items() if config.get("default")]
    usual += [name for name in configs if name == "default" or len(configs) == 1]
    name = subset or (usual[0] if usual else None)
    if name not in configs:
        raise ValueError(_no_such(snapshot, "subset", subset, list(configs), "--subset"))
    patterns = _patterns(configs[name].get("data_files"))
    if split not in patterns:
        raise ValueError(_no_such(snapshot, "split", split, list(patterns), "--split"))
    files = []
    for pattern in patterns[split]:
        matches = re.compile(glob_translate(pattern)).fullmatch
        files += [file for file in snapshot.files if matches(file.path) and file not in files]
    if not files:
        raise ValueError(f"{snapshot.repo}: has no file {' or '.join(patterns[split])}")
    return files


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Path patterns by split. `data_files` is a path, or a list of paths or {split, path}."""
    entries = data_files if isinstance(data_files, list) else [data_files or []]
    found: dict[str, list[str]] = {}
    for entry in entries:
        split, paths = "train", entry
        if isinstance(entry, dict):
            split, paths = str(entry.get("split")), entry.get("path")
        paths = paths if isinstance(paths, list) else [paths]
        found.setdefault(split, []).extend(path for path in paths if isinstance(path, str))
    return found


def _named_after(snapshot: Snapshot, subset: str | None, split: str) -> list[HubFile]:
    files = [file for file in snapshot.files if file.path.endswith(".parquet")]
    if not files:
        raise ValueError(
            f"{snapshot.repo}: holds no Parquet files; most data sets have a Parquet copy at "
            "--revision refs/convert/parquet"
        )
    if subset is not None:
        folders = sorted({folder for f in files for folder in PurePosixPath(f.path).parts[:-1]})
        files = [f for f in files if subset in PurePosixPath(f.path).parts[:-1]]
        if not files:
            raise ValueError(_no_such(snapshot, "subset", subset, folders, "--subset"))
    by_split: dict[str, list[HubFile]] = {}
    for file in files:
        names = _USUAL.findall(file.path)
        by_split.setdefault(names[-1] if names else "train", []).append(file)
    if split not in by_split:
        raise ValueError(_no_such(snapshot, "split", split, list(by_split), "--split"))
    return by_split[split]


def _no_such(snapshot: Snapshot, kind: str, name: str | None, names: list[str], option: str) -> str:
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    if name is None:
        return f"{snapshot.repo}: has several {kind}s ({listed}); choose one with {option}"
    near = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{snapshot.repo}: has no {kind} {name!r} (it has {listed or 'none'}){hint}"
