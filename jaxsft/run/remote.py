"""The files of a run, whose output_dir is a local directory or gs://BUCKET/… on Google Cloud.

An object store cannot append to a file, so only checkpoints are written to it directly. The run's
other files are in a scratch directory on this machine. They are copied from the store at the start,
and back to it, where they changed, before each checkpoint. A resumed run drops the lines that are
later than its checkpoint. Because of this order, the copies always reach at least to the newest
checkpoint.

No clock decides which side is newer. `.owner` holds a random token, in the store and in the scratch
directory of the machine that began or continued the run last. Where the tokens agree, the scratch
directory is kept, with anything that a failed copy left in it. Elsewhere it is replaced by what is
in the store and gets a new token. A process that finds a foreign token in the store has to stop.

gcsfs does the copying, for Orbax too; TensorStore's own driver writes arrays. Both are tested only
against tests/support/fake_gcs.py, not with hierarchical namespaces, zonal or requester-pays
buckets, retention policies, real credentials or throttling.
"""

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import uuid
from pathlib import Path

import fsspec
from etils import epath

from jaxsft.run.run_dir import ReplacedError, RunDir

_OWNER = ".owner"
_LAST = "result.json"  # says that the run is finished, so all else must be there
# Of names in the run's directory: checkpoints, hidden files, and objects that stand for a folder.
_NOT_COPIED = re.compile(r"checkpoints/|\.|(.*/)?$")


def is_remote(path: str) -> bool:
    """Is it a URL, or meant as one, rather than a path on this machine?"""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path) is not None


class RunFiles(RunDir):
    """The files of one run, here or on gs://. For a local output_dir nothing is ever copied.

    While it is entered, the local directory is held against other processes, as in `RunDir`.

    Args:
        output_dir: TrainConfig.output_dir.
        name: TrainConfig.name.
        scratch: holds the scratch directories of all remote runs on this machine.
        process_index: which of several processes of the run this is; 0 alone writes there.

    Attributes:
        shown: the run's directory as its user names it.
        path: the local directory for all files but checkpoints; made when it is entered.
        checkpoint_dir: for `Checkpoints`.

    Raises:
        ValueError: a URL other than gs://BUCKET/…, or gcsfs is not installed.
    """

    shown: Path | epath.Path
    checkpoint_dir: Path | epath.Path

    def __init__(self, output_dir: str, name: str, scratch: Path, process_index: int = 0) -> None:
        self._is_remote = is_remote(output_dir)
        self._is_writer = process_index == 0
        self._token: str | None = None
        self._copied: dict[str, tuple[int, int]] = {}  # by name: size and time of the last change
        if self._is_remote:
            self.shown = _gcs_directory(output_dir) / name
            digest = hashlib.sha256(str(self.shown).encode()).hexdigest()[:16]
            unique = digest if self._is_writer else f"{digest}-{process_index}"
            path = scratch / unique / name
            self._files = _connect()
        else:
            self.shown = path = Path(output_dir) / name
        super().__init__(path)
        self.checkpoint_dir = self.shown / "checkpoints"

    def pull(self) -> None:
        """Copies here what was last known of the run, and checks that it can be written there.

        Call it once, before anything is read from `path`, while `path` is held. Files whose names
        begin with a dot are not touched.

        Raises:
            OSError: it can't be read or written there; ConnectionError where that may pass.
        """
        if not self._is_remote:
            return
        own = self.path / _OWNER
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            owner = self._read_owner()
            is_ours = owner is not None and own.exists() and own.read_text() == owner
            if not (is_ours and self._is_writer):
                self._replace_all()
            if self._is_writer:
                self._token = owner if is_ours else uuid.uuid4().hex
                self._write_owner()
                own.write_text(str(self._token))
        except Exception as error:  # gcsfs, aiohttp and google.auth have their own types
            is_refused = isinstance(error, FileNotFoundError | PermissionError)
            raise (OSError if is_refused else ConnectionError)(
                f"{self.shown}: can't be read and written ({_first_line(error)}); check the "
                "bucket's name, your permissions and `gcloud auth application-default login`"
            ) from error

    def push(self) -> str | None:
        """Copies there what changed here; what was deleted here stays there.

        Call it before every checkpoint, and at the end after all files are closed. Takes some
        100 ms for each changed file, and half a minute when the bucket doesn't answer.

        Returns:
            What went wrong, as one line; the next push tries again. None when all is there.

        Raises:
            ReplacedError: a process on another machine has continued the run; this one must stop.
        """
        if not (self._is_remote and self._is_writer):
            return None
        assert self._token, "pull comes first"
        try:
            owner = self._read_owner()
            if owner is None:  # somebody has removed the directory
                self._copied.clear()
                self._write_owner()
            if owner in (None, self._token):
                self._copy_changed()
        except Exception as error:  # gcsfs, aiohttp and google.auth have their own types
            return (
                f"{self.shown}: metrics and results couldn't be copied there "
                f"({_first_line(error)}); they are in {self.path}, and the next checkpoint or "
                "the same command tries again"
            )
        if owner not in (None, self._token):
            raise ReplacedError(
                f"{self.shown}: another machine has continued this run; this process stops"
            )
        return None

    def _read_owner(self) -> str | None:
        try:
            return str(self._files.cat_file(f"{self.shown}/{_OWNER}").decode())
        except FileNotFoundError:
            return None

    def _write_owner(self) -> None:
        self._files.pipe_file(f"{self.shown}/{_OWNER}", str(self._token).encode())

    def _replace_all(self) -> None:
        for path in self.path.iterdir():
            if path.name.startswith("."):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        prefix = f"{self.shown}/".removeprefix("gs://")
        for source in self._files.find(str(self.shown)):
            name = source.removeprefix(prefix)
            if _NOT_COPIED.match(name):
                continue
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self._files.cat_file(source))
            self._copied[name] = _state(target)

    def _copy_changed(self) -> None:
        paths = {
            path.relative_to(self.path).as_posix(): path
            for path in self.path.rglob("*")
            if path.is_file()
        }
        for name in sorted(paths, key=lambda name: (name == _LAST, name)):
            state = _state(paths[name])  # before it is read: it may grow meanwhile
            if self._copied.get(name) != state and not _NOT_COPIED.match(name):
                self._files.pipe_file(f"{self.shown}/{name}", paths[name].read_bytes())
                self._copied[name] = state


def _gcs_directory(output_dir: str) -> epath.Path:
    """The directory of all runs; ValueError for another kind of URL, or without gcsfs."""
    if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+(/.*)?", output_dir):
        raise ValueError(
            f"output_dir {output_dir}: must be a local directory or gs://BUCKET/DIRECTORY"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(
            f"output_dir {output_dir}: needs the package gcsfs, pip install 'jaxsft[gcs]'"
        )
    return epath.Path(output_dir)


def _connect() -> fsspec.AbstractFileSystem:
    """gcsfs as this process uses it, here and in etils."""
    # Where TensorFlow is installed, etils would load it, which may take the TPU.
    os.environ["EPATH_USE_TF"] = "false"
    # Else gcsfs asks for the kind of bucket over gRPC, for minutes where that doesn't get through.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # gcsfs doesn't see what TensorStore and other machines write while it keeps listings.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    for name in ("gcsfs", "fsspec"):  # they log stack traces of what they raise
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return fsspec.filesystem("gcs")


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
