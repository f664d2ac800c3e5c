"""The directory of an export: it gets its name when it is complete, and replaces only its like."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxsft.json_file import read_json
from jaxsft.weights import file_sha256

MANIFEST = "manifest.json"
_SPARE_BYTES = 64 * 2**20  # tokenizer, card


def default_output(model: str, format: str) -> Path:
    """exports/NAME-FORMAT; NAME is a run's, a model's, or the hub's without owner and revision."""
    if Path(model).exists():
        path = Path(os.path.abspath(model))  # what . means has a name
        name = path.parent.name if path.name == "adapter" and path.parent.name else path.name
    else:
        name = Path(model.partition("@")[0]).name
    return Path("exports", f"{name}-{format}")


def check_replaceable(path: Path, identity: Mapping[str, Any]) -> None:
    """ValueError, saying what is in the way, unless `path` is free or an earlier, untouched export.

    Such a one has these values in its manifest, files as its digests say, and no others.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    advice = "remove it or choose another --output"
    known = read_json(path / MANIFEST) if (path / MANIFEST).is_file() else {}
    files = known.get("files")
    if not isinstance(files, dict) or any(known.get(k) != v for k, v in identity.items()):
        raise ValueError(
            f"{path} exists and is not an earlier {identity['format']} export of the same weights; "
            f"{advice}"
        )
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if name == MANIFEST or (file.is_dir() and not file.is_symlink()):
            continue
        if name not in files:
            raise ValueError(f"{file} is not from the export that would be replaced; {advice}")
        if not file.is_file() or file_sha256(file) != files[name]:
            raise ValueError(f"{file} was changed after it was exported; {advice}")


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
    """Gives the complete directory its name; an earlier one makes room, or stays if that fails."""
    earlier = output.with_name(f".{output.name}.earlier-{os.getpid()}")
    is_replaced = output.exists()
    if is_replaced:
        os.replace(output, earlier)
    try:
        os.replace(directory, output)
    except OSError:
        if is_replaced:
            os.replace(earlier, output)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def digests(directory: Path) -> dict[str, str]:
    """File name, from `directory` on, -> SHA-256 in hex."""
    files = sorted(path for path in directory.rglob("*") if not path.is_dir())
    return {path.relative_to(directory).as_posix(): file_sha256(path) for path in files}
