"""Parses splits such as `train[180000:280000]`, and finds the files that hold their rows."""

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow.parquet as parquet
from fsspec.utils import glob_translate

from jaxsft.download.files import HubFile, Snapshot
from jaxsft.download.parts import Columns, check_columns

_SPLIT = re.compile(r"(\w+(?:[.-]\w+)*)(?:\[(\d*):(\d*)\])?")
_KINDS = ("parquet", "jsonl", "ndjson", "json", "csv", "tsv", "arrow")  # the first that is there
# The end of the name of a file of rows.
ROW_FILE = re.compile(rf"\.({'|'.join(_KINDS)})(?:\.(?:gz|bz2|zst|zstd))?$")
_ABOUT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
_NOT_READ = "not Parquet, JSON, CSV or Arrow"
_COPY = (
    "many data sets have a copy in Parquet: {0}@refs/convert/parquet, or --revision "
    "refs/convert/parquet"
)
# Usual names of splits, for repositories with no list of splits on their card.
_USUAL = re.compile(r"(?:^|[/._-])(train|test|validation|valid|val|dev|eval|prompt)(?=[/._-])")


class Known(NamedTuple):
    """A data set that has a short name: its repository, and the splits to take by default."""

    repo: str
    subset: str | None
    splits: tuple[str, ...]


# Training rows are compared with the test splits.
KNOWN = {
    "glaive": Known(
        "glaiveai/reasoning-v1-20m",
        None,
        ("train[:180000]", "train[180000:280000]", "train[280000:280512]"),  # the last: held out
    ),
    "gsm8k": Known("openai/gsm8k", "main", ("train", "test")),
    "mbpp": Known("google-research-datasets/mbpp", "full", ("train", "test")),
}


class Slice(NamedTuple):
    """Rows [start, stop) of a shard. They become one part."""

    shard: HubFile
    start: int
    stop: int


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
    shards: Sequence[HubFile],
    footer_of: Callable[[HubFile], parquet.FileMetaData],
    split: Split,
    rows_per_part: int,
    named: Columns = None,
) -> list[Slice]:
    """The slices of a split in Parquet, from the footers up to the last shard with rows asked for.

    Raises:
      ValueError: there are no such rows, or no row with these columns could be used.
    """
    slices: list[Slice] = []
    first = 0
    for shard in shards:
        if split.stop is not None and first >= split.stop:
            break
        footer = footer_of(shard)
        check_columns(footer.schema.to_arrow_schema(), f"{snapshot.repo}: {shard.path}", named)
        num_rows = footer.num_rows
        end = num_rows if split.stop is None else min(split.stop - first, num_rows)
        for start in range(max(split.start - first, 0), end, rows_per_part):
            slices.append(Slice(shard, start, min(start + rows_per_part, end)))
        first += num_rows
    check_end(snapshot.repo, split, first)
    return slices


def split_files(snapshot: Snapshot, subset: str | None, split: str) -> list[HubFile]:
    """The files of one split, in the order of its rows: all in Parquet, or others.

    The card of the data set lists them (`configs`). Without a list the name or folder of a file
    tells its split, and a file whose name does not tell belongs to train.

    Raises:
      ValueError: there is no such subset or split, or its files are of a kind that is not read.
    """
    listed = _listed_on_card if snapshot.configs else _named_after
    files = listed(snapshot, subset, split)
    if others := [file.path for file in files if _kind(file) is None]:
        raise ValueError(
            f"{snapshot.repo}: {others[0]} is {_NOT_READ}; {_COPY.format(snapshot.repo)}"
        )
    return files


def _kind(file: HubFile) -> str | None:
    """Such as "parquet" or "jsonl"; None if it is no file of rows."""
    match = ROW_FILE.search(file.path)
    name = PurePosixPath(file.path).name
    return match[1] if match and name not in _ABOUT_DATA and not name.startswith(".") else None


def is_parquet(file: HubFile) -> bool:
    """Whether the name says that it is Parquet."""
    return _kind(file) == "parquet"


def _listed_on_card(snapshot: Snapshot, subset: str | None, split: str) -> list[HubFile]:
    configs = {str(config.get("config_name")): config for config in snapshot.configs}
    usual = [name for name, config in configs.items() if config.get("default")]
    usual += [name for name in configs if name == "default" or len(configs) == 1]
    name = subset or (usual[0] if usual else None)
    if name not in configs:
        raise ValueError(_no_such(snapshot, "subset", subset, list(configs)))
    if not configs[name].get("data_files"):
        folder = str(configs[name].get("data_dir") or "").strip("./")
        inside = [f for f in snapshot.files if not folder or f.path.startswith(f"{folder}/")]
        return _named_after(snapshot._replace(files=tuple(inside)), None, split)
    patterns = _patterns(configs[name]["data_files"])
    if split not in patterns:
        raise ValueError(_no_such(snapshot, "split", split, list(patterns)))
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
    by_kind = {kind: [f for f in snapshot.files if _kind(f) == kind] for kind in _KINDS}
    files = by_kind["parquet"] or max(by_kind.values(), key=len)
    if not files:
        raise ValueError(
            f"{snapshot.repo}: holds no file of Parquet, JSON, CSV or Arrow; "
            + _COPY.format(snapshot.repo)
        )
    if subset is not None:
        folders = sorted({folder for f in files for folder in PurePosixPath(f.path).parts[:-1]})
        files = [f for f in files if subset in PurePosixPath(f.path).parts[:-1]]
        if not files:
            raise ValueError(_no_such(snapshot, "subset", subset, folders))
    by_split: dict[str, list[HubFile]] = {}
    for file in files:
        names = _USUAL.findall(file.path)
        by_split.setdefault(names[-1] if names else "train", []).append(file)
    if split not in by_split:
        raise ValueError(_no_such(snapshot, "split", split, list(by_split)))
    return by_split[split]


def _no_such(snapshot: Snapshot, kind: str, name: str | None, names: list[str]) -> str:
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    if name is None:
        return (
            f"{snapshot.repo}: has several {kind}s ({listed}); choose one, as in "
            f"{snapshot.repo}:{names[0]} or with --subset {names[0]}"
        )
    near = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{snapshot.repo}: has no {kind} {name!r} (it has {listed or 'none'}){hint}"
