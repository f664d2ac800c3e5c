"""The directory of an export: it gets its name when it is complete, and replaces only its like.

Its manifest says which system text the model was trained with.
"""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxsft.common.files import read_json
from jaxsft.weights.find import MANIFEST, RUN_ADAPTERS
from jaxsft.weights.load import file_sha256

_EARLIER = "earlier-"  # what is being replaced, in the scratch directory
_SPARE_BYTES = 64 * 2**20  # tokenizer, card


def default_output(model: str, format: str) -> Path:
    """exports/NAME-FORMAT; NAME is a run's (NAME-best and NAME-start for its other adapters), a
    model's, or the hub's without owner and revision."""
    if Path(model).exists():
        path = Path(os.path.abspath(model))  # what . means has a name
        name = path.name
        if name in RUN_ADAPTERS and path.parent.name:
            which = name.removeprefix("adapter").removeprefix("-")
            name = f"{path.parent.name}-{which}" if which else path.parent.name
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
def scratch_beside(output: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """A directory of this process beside `output`, removed at the end, for what becomes `output`.

    What killed exports to the same place left there is removed first, and `say` hears of it. They
    are known by the system's lock on the directory, which ends with the process that held it; where
    the file system has no locks, nothing is removed.

    Raises ValueError where nothing can be written there.
    """
    prefix = f".{output.name}.partial-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for path in output.parent.glob(f"{glob.escape(prefix)}*"):
            _remove_abandoned(path, output, say)
        scratch, handle = _make_scratch(output.parent, prefix)
    except OSError as error:
        raise ValueError(
            f"{output} cannot be written ({error.strerror}): choose another --output"
        ) from None
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(handle)  # last: what is removed is nobody else's


def _make_scratch(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new directory, and the handle that it is locked by."""
    while True:
        scratch = Path(tempfile.mkdtemp(dir=parent, prefix=prefix)).absolute()
        try:
            handle = os.open(scratch, os.O_RDONLY)
        except FileNotFoundError:  # another export took it for abandoned: it had no lock yet
            continue
        with contextlib.suppress(OSError):  # NFS without locks, say
            fcntl.flock(handle, fcntl.LOCK_EX)
        if scratch.exists():
            return scratch, handle
        os.close(handle)


def _remove_abandoned(scratch: Path, output: Path, say: Callable[[str], None]) -> None:
    """Removes the scratch directory of a process that is gone."""
    try:
        handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for place in (output, drifting(output)):
            earlier = scratch / f"{_EARLIER}{place.name}"
            if earlier.exists() and not place.exists():  # killed between the two renames
                os.replace(earlier, place)
                say(f"Put {place} back, which an export that was killed had moved aside.")
        shutil.rmtree(scratch)
        say(f"Removed {scratch}, which an export that was killed had left.")
    except OSError:
        pass  # its process is at work, or the file system has no locks
    finally:
        os.close(handle)


def drifting(output: Path) -> Path:
    """Where an export is kept that isn't the model that it was made from."""
    return output.with_name(f"{output.name}.drifting")


def put_in_place(directory: Path, output: Path) -> None:
    """Gives the complete directory, in a scratch one, its name; an earlier one makes room, or
    stays if that fails."""
    earlier = directory.with_name(f"{_EARLIER}{output.name}")
    is_replaced = output.exists()
    if is_replaced:
        os.replace(output, earlier)
    try:
        os.replace(directory, output)
    except OSError:
        if is_replaced:
            os.replace(earlier, output)
        raise


def digests(directory: Path) -> dict[str, str]:
    """File name, from `directory` on, -> SHA-256 in hex."""
    files = sorted(path for path in directory.rglob("*") if not path.is_dir())
    return {path.relative_to(directory).as_posix(): file_sha256(path) for path in files}
