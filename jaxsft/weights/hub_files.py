"""Downloads files of one commit of the hub into the user's cache: retries, checks, progress."""

import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from jaxsft.common.files import file_sha256
from jaxsft.common.locks import has_locks, remove_old
from jaxsft.common.pins import COMMIT
from jaxsft.common.text import visible_line

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LINE_EVERY_S = 15.0
_BUSY = frozenset({408, 429, 500, 502, 503, 504})  # HTTP statuses that pass
_WAITS_S = (1, 2, 4, 8, 16)  # before the hub is asked again
_LONGEST_WAIT_S = 300  # the hub counts requests over 5 minutes


class NotDeliveredError(Exception):
    """(what went wrong, what to do), without any text from a server."""


def not_a_hub() -> NotDeliveredError:
    """The error for an answer that does not come from a hub."""
    from huggingface_hub import constants

    return NotDeliveredError(
        f"the answer from {visible_line(constants.ENDPOINT)} is not a hub's",
        "check HF_ENDPOINT, and whether a proxy asks for a login",
    )


def fetch_files_of_commit(
    repo: str,
    directory: Path,
    names: list[str],
    say: Callable[[str], None],
    sizes: dict[Path, int],
) -> None:
    """Downloads the files that the cache lacks. A file that arrives damaged is downloaded again.

    Args:
      directory: the directory of the commit in the cache.
      sizes: the missing files of the cache and their sizes in bytes; if empty, no progress lines.

    Raises ValueError if a file that was in the cache before is damaged, httpx2's errors and
    NotDeliveredError if the hub fails, OSError if the disk does.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import disable_progress_bars

    def download() -> None:
        try:
            snapshot_download(repo, revision=directory.name, allow_patterns=names)
        except HFValidationError:
            raise
        except RuntimeError:  # hf_xet has no class of its own for a download that is cut
            raise NotDeliveredError(
                "the hub's Xet storage cannot be reached or stopped sending",
                "run the same command again to go on",
            ) from None
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError):
            raise not_a_hub() from None
        if not all((directory / name).is_file() for name in names):  # it believed an empty list
            (directory.parents[1] / "trees" / f"{directory.name}.json").unlink(missing_ok=True)
            raise not_a_hub()

    if not sys.stderr.isatty():
        disable_progress_bars()
    cache, storage = directory.parents[2], directory.parents[1]
    blobs = storage / "blobs"
    old = set(os.listdir(blobs)) if blobs.is_dir() else set()
    for part in blobs.glob("*.*.incomplete"):  # huggingface_hub never goes on with one
        remove_old(part, cache / ".locks" / storage.name / f"{part.name.partition('.')[0]}.lock")
    for is_last in (False, True):
        with _reporting(repo, sizes, say), _hub_locks(cache):
            ask_patiently(download, repo, say)
        if not (damaged := damaged_files(directory, names)):
            return
        for path in damaged:
            if path.resolve().name in old:
                raise damage_error(path)
            path.resolve().unlink()
        if not is_last:
            say(f"{repo}: {damaged[0].name} came damaged; it is downloaded again")
    raise NotDeliveredError(
        f"the hub's {damaged[0].name} came damaged twice",
        "run the same command again, past any proxy",
    )


@contextmanager
def _hub_locks(cache: Path) -> Iterator[None]:
    """Takes huggingface_hub's locks away where the file system has none.

    They only save a second download; its file_download.py says that nothing else depends on them.
    """
    from huggingface_hub import file_download

    cache.mkdir(parents=True, exist_ok=True)
    lock = file_download.WeakFileLock
    if not has_locks(cache):
        setattr(file_download, "WeakFileLock", lambda *_, **__: nullcontext())  # noqa: B010
    try:
        yield
    finally:
        setattr(file_download, "WeakFileLock", lock)  # noqa: B010


def ask_patiently(ask: Callable[[], Any], repo: str, say: Callable[[str], None]) -> Any:
    """Returns what `ask` returns; if the hub is busy, waits and calls it again, a few times."""
    from huggingface_hub import logging
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import parse_ratelimit_headers

    logging.set_verbosity_error()  # warnings hold addresses, which can hold a token
    for wait_s in _WAITS_S:
        try:
            return ask()
        except OSError as error:
            cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
            response = getattr(cause, "response", None)
            if response is None or response.status_code not in _BUSY:
                raise
            limits = parse_ratelimit_headers(response.headers)
            asked = str(limits.reset_in_seconds if limits else response.headers.get("retry-after"))
            wait_s = int(asked) if re.fullmatch("[0-9]{1,9}", asked) else wait_s
            if wait_s > _LONGEST_WAIT_S:
                raise
            say(f"{repo}: the hub answered HTTP {response.status_code}; asked again in {wait_s} s")
        time.sleep(wait_s)
    return ask()


@contextmanager
def _reporting(repo: str, sizes: dict[Path, int], say: Callable[[str], None]) -> Iterator[None]:
    """Says every 15 s how much is downloaded; a terminal shows progress bars instead."""
    started_s, ended = time.time() - 1, threading.Event()

    def num_here(blob: Path) -> int:
        parts = [blob, *blob.parent.glob(f"{blob.name}.*incomplete")]
        stats = [part.stat() for part in parts if part.exists()]
        # Xet writes a file out of order, so its length is not enough. Killed runs leave old parts.
        now = [stat for stat in stats if stat.st_mtime >= started_s]
        return max((min(stat.st_size, stat.st_blocks * 512) for stat in now), default=0)

    def report() -> None:
        while not ended.wait(_LINE_EVERY_S):
            try:
                num_done = sum(map(num_here, sizes))
            except FileNotFoundError:  # it was renamed meanwhile
                continue
            say(f"{repo}: {num_done / 1e9:.2f} of {sum(sizes.values()) / 1e9:.2f} GB")

    if sys.stderr.isatty() or not sizes:
        yield
        return
    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def damaged_files(directory: Path, names: Iterable[str]) -> list[Path]:
    """The files in the cache that differ from their digests.

    The cache names each file by its SHA-256, a small one by its git digest, and links to it
    (https://huggingface.co/docs/huggingface_hub/guides/manage-cache). A file system without links
    has no digests; there huggingface_hub's comparison of sizes is the only check.
    """

    def is_damaged(path: Path) -> bool:
        expected = os.path.basename(os.readlink(path))
        if _SHA256.fullmatch(expected):
            return file_sha256(path) != expected
        if not COMMIT.fullmatch(expected):
            return False
        data = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
        return found.hexdigest() != expected

    paths = [directory / name for name in names]
    return [path for path in paths if path.is_symlink() and is_damaged(path)]


def damage_error(path: Path) -> ValueError:
    """The error for a damaged file in the cache."""
    return ValueError(
        f"{path}: is damaged: it is not the hub's file any more; delete {path.resolve()}, and the "
        "same command downloads it again"
    )
