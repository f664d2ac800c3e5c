"""The directory of a run's checkpoints: which of its entries are steps, and how they are deleted.

Orbax writes `<step>.orbax-checkpoint-tmp` and renames it, so a directory whose name is a plain
number was whole once. On an object store (gs://), where a rename copies file after file, it writes
under the final name and adds `commit_success.txt` last: a directory without that file is no step
there. Tested with local files that are committed in this way, not on Google's servers.
"""

import re
from contextlib import suppress

from etils import epath

_COMMIT_FILE = "commit_success.txt"
_STEP = re.compile("0|[1-9][0-9]*")
_RETIRED = ".deleted"
_LEFTOVERS = (_RETIRED, ".orbax-checkpoint-tmp")


def is_object_store(path: epath.Path) -> bool:
    """Is this a place like gs://, without an atomic rename?"""
    return "://" in str(path)


def list_steps(directory: epath.Path) -> list[int]:
    """The steps that lie there, damaged or not, ascending."""
    return sorted(int(path.name) for path in _entries(directory) if _is_step(path))


def rename(step: epath.Path, suffix: str) -> epath.Path:
    """The step's directory with a free name that begins with its own and `suffix`.

    On an object store it copies: one that breaks off leaves parts in both places.
    """
    target, count = step.with_name(step.name + suffix), 1
    while target.exists():
        count += 1
        target = step.with_name(f"{step.name}{suffix}-{count}")
    return step.rename(target)


def retire(step: epath.Path) -> None:
    """Makes a step none in one atomic operation; `clear_leftovers` deletes the rest of it.

    One that can't be retired stays.
    """
    with suppress(Exception):  # each store has its own; the next save tries again
        if is_object_store(step):
            (step / _COMMIT_FILE).unlink()
        else:
            rename(step, _RETIRED)


def clear_leftovers(directory: epath.Path) -> None:
    """Deletes what is no step any more, or was never whole, as far as that is possible."""
    with suppress(Exception):  # each store has its own; the next save tries again
        for path in _entries(directory):
            is_half = _STEP.fullmatch(path.name) and path.is_dir() and not _is_step(path)
            if is_half or any(suffix in path.name for suffix in _LEFTOVERS):
                with suppress(Exception):
                    path.rmtree()


def _entries(directory: epath.Path) -> list[epath.Path]:
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_step(path: epath.Path) -> bool:
    if not _STEP.fullmatch(path.name):
        return False
    try:
        # Elsewhere a save ends with a rename: an empty directory or a file was a step, and is lost.
        return not is_object_store(path) or (path / _COMMIT_FILE).exists()
    except OSError:  # whoever reads it will say why
        return True
