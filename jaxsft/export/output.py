"""The directory of an export: named when complete, replaces only an earlier export."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxsft.common.files import file_sha256, read_json
from jaxsft.common.locks import remove_leftovers, scratch_beside
from jaxsft.weights.find import EXPORT_MANIFEST, RUN_ADAPTERS

_EARLIER = "earlier-"  # what is being replaced, in the scratch directory


def default_output(model: str, format: str) -> Path:
    """exports/NAME-FORMAT. NAME is the name of the run (with -best or -start for its other
    adapters), of the model, or of the model on the hub without owner and revision."""
    if Path(model).exists():
        path = Path(os.path.abspath(model))  # the name of .
        name = path.name
        if name in RUN_ADAPTERS and path.parent.name:
            which = name.removeprefix("adapter").removeprefix("-")
            name = f"{path.parent.name}-{which}" if which else path.parent.name
    else:
        name = Path(model.partition("@")[0]).name
    return Path("exports", f"{name}-{format}")


def check_replaceable(path: Path, identity: Mapping[str, Any]) -> None:
    """ValueError, naming the obstacle, unless `path` is free or an earlier, unchanged export.

    The manifest of an earlier export has the values of `identity`; its files have the digests in
    the manifest, and there are no other files.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    advice = "remove it or choose another --output"
    known = read_json(path / EXPORT_MANIFEST) if (path / EXPORT_MANIFEST).is_file() else {}
    files = known.get("files")
    if not isinstance(files, dict) or any(known.get(k) != v for k, v in identity.items()):
        raise ValueError(
            f"{path} exists and is not an earlier {identity['format']} export of the same weights; "
            f"{advice}"
        )
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if name == EXPORT_MANIFEST or (file.is_dir() and not file.is_symlink()):
            continue
        if name not in files:
            raise ValueError(f"{file} is not from the export that would be replaced; {advice}")
        if not file.is_file() or file_sha256(file) != files[name]:
            raise ValueError(f"{file} was changed after it was exported; {advice}")


@contextmanager
def export_scratch(output: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Yields a new directory beside `output` in which the export is made; removes it at the end.

    First it removes the directories of killed exports to `output`, and puts an earlier export back
    that a killed one had moved aside. `say` gets a line for each.

    Raises ValueError if nothing can be written there.
    """

    def put_back(scratch: Path) -> None:
        for place in (output, drifting(output)):
            earlier = scratch / f"{_EARLIER}{place.name}"
            if earlier.exists() and not place.exists():  # killed between the two renames
                earlier.rename(place)
                say(f"Put {place} back, which a killed export had moved aside.")

    with contextlib.ExitStack() as stack:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            for scratch in remove_leftovers(output.parent, output.name, put_back):
                say(f"Removed {scratch}, which a killed export had left.")
            scratch = stack.enter_context(scratch_beside(output))
        except OSError as error:
            raise ValueError(
                f"{output} cannot be written ({error.strerror}): choose another --output"
            ) from None
        yield scratch


def drifting(output: Path) -> Path:
    """The place of an export that is not the model that it was made from."""
    return output.with_name(f"{output.name}.drifting")


def put_in_place(directory: Path, output: Path) -> None:
    """Renames the complete directory, which lies in a scratch directory, to `output`.

    An earlier export moves into the scratch directory, and back if the rename fails."""
    earlier = directory.with_name(f"{_EARLIER}{output.name}")
    is_replaced = output.exists()
    if is_replaced:
        output.rename(earlier)
    try:
        directory.rename(output)
    except OSError:
        if is_replaced:
            earlier.rename(output)
        raise


def digests(directory: Path) -> dict[str, str]:
    """File name, relative to `directory`, -> SHA-256 in hex."""
    files = sorted(path for path in directory.rglob("*") if not path.is_dir())
    return {path.relative_to(directory).as_posix(): file_sha256(path) for path in files}
