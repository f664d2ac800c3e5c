"""Files written whole or not at all, their digests, and room for them."""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxsft.common.locks import remove_leftovers, scratch_file

_SPARE_BYTES = 64 * 2**20  # left free for small files
_FRESH_NS = 10**9  # clocks of file systems tick in up to 10 ms


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path`; the file written there is named `path` at the end, in one step.

    It is on disk by then. Where the block fails, it is removed and `path` stays as it was. What
    killed processes left of the same file is removed first.
    """
    remove_leftovers(path.parent, path.name)
    partial = scratch_file(path)  # a name of its own: another process may be writing the same file
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes whole or not at all; NaN and infinity, which JSON lacks, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_text(path, json.dumps(finite(values), ensure_ascii=False, indent=1, allow_nan=False))


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; ValueError where it cannot be read or holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); make it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: is not a JSON object; make it again")
    return values


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex. A file is read once per process, until it changes."""
    stat = path.stat()
    # Two changes within one tick of the clock leave the same times.
    is_fresh = time.time_ns() - stat.st_ctime_ns < _FRESH_NS
    read = _sha256.__wrapped__ if is_fresh else _sha256
    return read(path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_ctime_ns)


@functools.cache
def _sha256(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def array_sha256(array: np.ndarray) -> bytes:
    """SHA-256 of the bytes of an array's elements, in C order; its dtype and shape do not count."""
    # As bytes first: bfloat16 has no buffer protocol.
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).digest()


def check_free_space(directory: Path, num_bytes: int, what: str, advice: str) -> None:
    """ValueError unless `num_bytes` for `what`, and 64 MiB more, are free where `directory` is.

    The directory need not exist yet.
    """
    needed = num_bytes + _SPARE_BYTES
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"{directory}: {free / 2**20:,.0f} MiB free, but {needed / 2**20:,.0f} MiB are needed "
            f"for {what}; {advice}"
        )


def cache_dir(name: str) -> Path:
    """Where what can be made again is kept: "plan" for estimates, "prepared" for rows."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jaxsft" / name
