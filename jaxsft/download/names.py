"""Data sets of the hub by name, wherever a file of rows may be named.

    owner/name[@revision][:config][/split][slice]

    openai/gsm8k:main/test
    glaiveai/reasoning-v1-20m/train[:180000]
    owner/name                 the split train

In a list in YAML a name with a slice needs quotes: ['owner/name/train[:5000]', other.jsonl].

A path that exists is never a name of the hub. Nor is one in data/ or another directory that exists
here: there its file is missing. With @main the hub is meant all the same, as in names of models.

The rows lie in the cache, as data/download_sft_datasets.py would make them, and are downloaded by
the same code: there is one way, with one check of digests, one pin and one format. `datasets` keeps
no pin, loses rows that do not fit the first one's types, and can decode media, which asks servers.
"""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxsft.common.files import cache_dir

_NAME = r"\w[\w.-]*"
_REVISION = rf"refs/convert/parquet|refs/pr/\d+|{_NAME}"
_HUB_NAME = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>{_REVISION}))?(?::(?P<config>[\w.+-]+))?"
    rf"(?:/(?P<split>\w+(?:[.-]\w+)*))?(?P<slice>\[[^\[\]]*[:%][^\[\]]*\])?",
    re.ASCII,
)
_FILE = re.compile(
    r"\.(jsonl?|ndjson|parquet|arrow|feather|[ct]sv|txt|gz|bz2|zst|zstd|xz|zip|tar|xlsx?)$",
    re.IGNORECASE,
)
_OURS = Path("data")  # where data/download_sft_datasets.py puts what the recipes name
_ROWS_PER_FILE = 20_000
_LINE_EVERY_S = 15.0
_LOOK_AGAIN_S = 1.0


class HubRows(NamedTuple):
    """What a name means; `split` as `splits.parse_split` reads it."""

    repo: str
    revision: str | None
    config: str | None
    split: str


def parse_hub_name(name: str) -> HubRows | None:
    """What the name means on the hub; None for a path that exists, and for no name of the hub."""
    match = _HUB_NAME.fullmatch(name)
    if match is None or Path(name).exists():
        return None
    repo, revision, config, split, part = match.groups()
    owner = Path(repo).parent
    if _FILE.search(name) or (revision is None and (owner.is_dir() or owner == _OURS)):
        return None
    return HubRows(repo, revision, config, (split or "train") + (part or ""))


def find_row_files(
    names: Sequence[Path],
    say: Callable[[str], None],
    *,
    columns: dict[str, str] | None = None,
    on_progress: Callable[[], None] = lambda: None,
    may_download: bool = True,
) -> list[Path]:
    """The paths, with directories of rows in the cache for names of the hub.

    Args:
      names: paths or names; a path stays as it is, whether it exists or not.
      say: gets a line about each name of the hub, and while it is downloaded.
      columns: `data.columns`; rows that it makes usable are not refused.
      on_progress: called now and then.
      may_download: otherwise what is not in the cache is an error.

    Raises:
      ValueError: there is no such data set, config, split or row, no access, no network, or no row
        can be used. ConnectionError: the hub fails. OSError: the cache cannot be written.
    """
    found = []
    for name in names:
        rows = parse_hub_name(str(name))
        if rows is None:
            if str(name).startswith("[") and str(name).endswith("]") and not name.exists():
                raise ValueError(
                    f"{name}: is no list in YAML, where a name with brackets needs quotes: "
                    "['owner/name/train[:5000]', other.jsonl]"
                )
            if _HUB_NAME.fullmatch(str(name)) and not (name.exists() or name.suffix):
                raise ValueError(
                    f"{name}: no such file or directory; check the path, or let "
                    "data/download_sft_datasets.py make it; a data set of the hub can be named as "
                    "owner/name@main"
                )
            found.append(name)
            continue
        try:
            found.append(_find(str(name), rows, columns, say, on_progress, may_download))
        except ValueError as error:
            raise ValueError(f"{name} (no such file here, so a name of the hub): {error}") from None
    return found


def _find(
    name: str,
    rows: HubRows,
    columns: dict[str, str] | None,
    say: Callable[[str], None],
    on_progress: Callable[[], None],
    may_download: bool,
) -> Path:
    # They import huggingface_hub and pyarrow.
    from jaxsft.common.locks import LockedError
    from jaxsft.download.datasets import Progress, Request, download_splits, finished, tidy_up
    from jaxsft.download.files import Hub, HubError, NoNetworkError, user_token
    from jaxsft.download.splits import parse_split

    class Lines(Progress):
        """Says now and then how far a download is."""

        def __init__(self) -> None:
            self.num_bytes = self.all_bytes = 0
            self.last_s = time.monotonic()

        def plan(self, what: str, num_bytes: int, num_rows: int) -> None:
            self.all_bytes = num_bytes
            say(f"{name}: {num_bytes / 1e6:,.1f} MB to download, to {what}")

        def received(self, num_bytes: int) -> None:
            self.num_bytes += num_bytes
            on_progress()
            if time.monotonic() - self.last_s > _LINE_EVERY_S:
                self.last_s = time.monotonic()
                say(f"{name}: {self.num_bytes / 1e6:,.1f} of {self.all_bytes / 1e6:,.1f} MB")

        def converted(self, num_rows: int) -> None:
            on_progress()

    def note(line: str) -> None:
        on_progress()
        say(line)

    split = parse_split(rows.split)
    folder = f"{rows.config}:{split.directory_name}" if rows.config else split.directory_name
    folder += f"@{rows.revision}".replace("/", "-") if rows.revision else ""
    directory = cache_dir("rows") / rows.repo / folder
    source = {"repo": rows.repo, "subset": rows.config, "revision": rows.revision or "main"}
    request = Request(directory, source, split, _ROWS_PER_FILE, columns)
    is_waiting = False
    while (manifest := finished(request)) is None:
        if not may_download:
            raise ValueError(f"is not in the cache; {_HOW_TO_GET}")
        try:
            list(download_splits(Hub(user_token(), note=note), [request], Lines()))
        except LockedError as error:
            if not is_waiting:
                note(f"{name}: waits for another process{error.holder}, which downloads it")
            is_waiting = True
            on_progress()
            time.sleep(_LOOK_AGAIN_S)
        except NoNetworkError as error:
            raise ValueError(
                f"is not in the cache, and the hub cannot be reached ({error}); {_HOW_TO_GET}"
            ) from None
        except HubError as error:
            raise ConnectionError(f"{error}; the same command goes on where it stopped") from None
    tidy_up([request])
    say(f"{name}: {manifest['rows']:,} rows of commit {manifest['revision']}, in {directory}")
    return directory


_HOW_TO_GET = (
    "where there is a network, `python -m jaxsft.prepare` with these options, or "
    "data/download_sft_datasets.py, gets it: copy the cache, or name the directory that was made"
)
