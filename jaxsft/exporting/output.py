"""The directory of an export: it gets its name when it is complete, and replaces only its like."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxsft.json_file import read_json

MANIFEST = "manifest.json"
_SPARE_BYTES = 64 * 2**20  # tokenizer, card


def check_replaceable(path: Path, format: str, model: str) -> None:
    """ValueError unless `path` is free, or holds an earlier export of this and nothing else."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    known: dict[str, Any] = {}
    if (path / MANIFEST).is_file():
        known = read_json(path / MANIFEST)
    same = (known.get("format"), known.get("model")) == (format, model)
    files = {*known.get("files", ()), MANIFEST}
    if not same or any(file not in files for file in digests(path, contents=False)):
        raise ValueError(
            f"{path} exists and is not just an earlier {format} export of {model}; "
            "remove it or choose another --output"
        )


def check_space(output: Path, num_bytes: int) -> None:
    """ValueError unless there is room for an export of so many bytes."""
    needed = num_bytes + _SPARE_BYTES
    existing = next(path for path in output.absolute().parents if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"{output}: {free / 2**20:,.0f} MiB are free there and {needed / 2**20:,.0f} needed; "
            "free some space or choose another --output"
        )


@contextmanager
def scratch_beside(output: Path) -> Iterator[Path]:
    """A new directory in that of `output`; removed at the end where it is still there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    directory = output.with_name(f".{output.name}.partial-{os.getpid()}").absolute()
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def put_in_place(directory: Path, output: Path) -> None:
    """Gives the complete directory its name; an earlier one makes room."""
    earlier = output.with_name(f".{output.name}.earlier-{os.getpid()}")
    if output.exists():
        os.replace(output, earlier)
    os.replace(directory, output)
    shutil.rmtree(earlier, ignore_errors=True)


def digests(directory: Path, contents: bool = True) -> dict[str, str]:
    """File name, from `directory` on, -> SHA-256 in hex ("" without `contents`)."""
    files = sorted(path for path in directory.rglob("*") if not path.is_dir())
    return {
        path.relative_to(directory).as_posix(): sha256(path) if contents else "" for path in files
    }


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
