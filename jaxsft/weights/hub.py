"""Models and adapters of the Hugging Face hub: one commit of a repository, checked.

huggingface_hub downloads them into the user's Hugging Face cache (HF_HOME, HF_HUB_CACHE), where
other programs find them too. What the cache holds is not downloaded again; an interrupted file goes
on where it stopped. The token of HF_TOKEN or `hf auth login` goes to the hub and nowhere else.

This module adds four things: only files that are read are downloaded; a name means one commit for
good (common/pins.py); at each use the files are compared with their digests, where huggingface_hub
compares sizes; every failure is one line, and no line holds what a server answered.
"""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxsft.common.files import cache_dir, file_sha256
from jaxsft.common.pins import COMMIT, read_pins, write_pin
from jaxsft.formats.safetensors import INDEX_NAME, MODEL_NAME, SafetensorsDirectory, pickle_hint
from jaxsft.weights.hf_config import from_hf_config
from jaxsft.weights.peft import CONFIG_NAME, WEIGHTS_NAME

_TOKENIZER_NAME = "tokenizer.model"
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SPARE_BYTES = 64 << 20  # left free on the disk
_GET_ACCESS = (
    "Gemma's models are gated: accept the terms on the model's page, then set HF_TOKEN or run "
    "'hf auth login'"
)


def fetch_model(
    repo: str, revision: str, say: Callable[[str], None], *, needs_tokenizer: bool
) -> tuple[Path, str]:
    """(directory, commit) of the model or adapter `repo`; downloaded unless the cache holds it.

    Args:
      revision: branch, tag or commit. What a branch or tag means is looked up once and kept.
      say: hears of a download.
      needs_tokenizer: a model without tokenizer.model is refused before it is downloaded.

    Raises:
      ValueError: no such repository or revision, no access, none of the kinds of files above, a
        config of another model, a damaged file in the cache, not enough room on the disk.
      ConnectionError: the cache lacks files, and the hub cannot be reached or fails.
      OSError: the cache cannot be written, or the disk is full.
    """
    import httpx2  # slow to import, as huggingface_hub is

    home = cache_dir("models") / repo.replace("/", "--")
    known = read_pins(home, repo).get(revision, revision)
    if COMMIT.fullmatch(known) and (directory := _cached(repo, known, needs_tokenizer)):
        return directory, known
    try:
        return _download(repo, revision, known, home, say, needs_tokenizer)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        failure = _failure(repo, revision, error)
    # The cache's own notes tell what a branch meant when another program asked.
    is_unasked = isinstance(failure, ConnectionError) and known == revision
    if is_unasked and (directory := _cached(repo, revision, needs_tokenizer)):
        say(f"{failure}; {directory.name}, which the cache holds, is taken")
        _pin(home, repo, revision, directory.name)
        return directory, directory.name
    raise failure


def _download(
    repo: str,
    revision: str,
    known: str,
    home: Path,
    say: Callable[[str], None],
    needs_tokenizer: bool,
) -> tuple[Path, str]:
    """As `fetch_model`; `known` is the revision's commit if it is pinned. Raises httpx2's errors
    and OSError where the hub or the disk fails."""
    from huggingface_hub import HfApi, constants, logging, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    logging.set_verbosity_error()  # warnings hold addresses, which can hold a token
    if not sys.stderr.isatty():
        disable_progress_bars()
    timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
    info: Any = HfApi().model_info(repo, revision=known, files_metadata=True, timeout=timeout_s)
    commit = info.sha
    if not COMMIT.fullmatch(commit or ""):
        raise ConnectionError("its answer is not a hub's; check HF_ENDPOINT")
    listed = {file.rfilename: file for file in info.siblings}
    try:
        names = _needed(listed, needs_tokenizer)
    except ValueError as error:
        raise ValueError(f"{repo}: {error}") from None
    # Before the files: an interrupted download goes on with the same commit.
    _pin(home, repo, revision, commit)
    storage = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    directory = storage / "snapshots" / commit
    if "config.json" in names:
        snapshot_download(repo, revision=commit, allow_patterns="config.json")
        from_hf_config(directory / "config.json")  # refused before gigabytes have come
    num_bytes = 0
    for file in (listed[name] for name in names):
        blob = storage / "blobs" / (file.lfs.sha256 if file.lfs else file.blob_id)
        partial = blob.with_name(f"{blob.name}.incomplete")
        if not blob.exists():
            num_bytes += file.size - (partial.stat().st_size if partial.exists() else 0)
    storage.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(storage).free
    if free < num_bytes + _SPARE_BYTES:
        raise ValueError(
            f"{storage}: {free / 1e9:.2f} GB free, {repo} needs {num_bytes / 1e9:.2f} GB more; "
            "make room, or set HF_HOME to a place with more"
        )
    say(f"{repo} at {commit}: {num_bytes / 1e9:.2f} GB to download, to {directory}")
    snapshot_download(repo, revision=commit, allow_patterns=names)
    _check_digests(directory, names)
    return directory, commit


def _cached(repo: str, revision: str, needs_tokenizer: bool) -> Path | None:
    """The directory in the user's cache where every needed file is there; None where one lacks.

    Raises ValueError where one is damaged.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    try:  # without patterns, files that nobody reads would have to be there
        found = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[])
        directory = Path(found)
        try:
            listed = {file.path for file in get_cached_repo_tree(repo, revision=directory.name)}
        except CachedRepoTreeNotFoundError:  # file by file, as transformers downloads
            listed = {path.name for path in directory.iterdir()}
        names = _needed(listed, needs_tokenizer)
        if not all((directory / name).is_file() for name in names):
            return None
        if INDEX_NAME in names:
            SafetensorsDirectory(directory)  # are all its shards there?
    except (LocalEntryNotFoundError, ValueError):
        return None
    _check_digests(directory, names)
    return directory


def _needed(listed: Iterable[str], needs_tokenizer: bool) -> list[str]:
    """The files to read, of those in a repository; ValueError if it is neither model nor adapter,
    or has no tokenizer.model and needs one."""
    files = {name for name in listed if "/" not in name}
    is_model = MODEL_NAME in files or INDEX_NAME in files
    is_adapter = CONFIG_NAME in files and (WEIGHTS_NAME in files or not is_model)
    names = [CONFIG_NAME, WEIGHTS_NAME] if is_adapter else []
    if is_model or not is_adapter:
        names += ["config.json", *({_TOKENIZER_NAME} & files if needs_tokenizer else ())]
        if INDEX_NAME in files and MODEL_NAME not in files:
            # Plain names alone: they are patterns to huggingface_hub.
            shards = {name for name in files if _SHARD_NAME.fullmatch(name)} - {WEIGHTS_NAME}
            names += [INDEX_NAME, *sorted(shards)]
        else:
            names.append(MODEL_NAME)
    if missing := [name for name in names if name not in files]:
        raise ValueError(
            f"holds no {missing[0]}; it must be a Hugging Face model or a PEFT adapter, in "
            f"safetensors{pickle_hint(files)}"
        )
    if needs_tokenizer and not is_adapter and _TOKENIZER_NAME not in files:
        raise ValueError("has no tokenizer.model; name one, or a .gguf file, with --tokenizer")
    return names


def _check_digests(directory: Path, names: Iterable[str]) -> None:
    """ValueError for a file of the cache that is damaged.

    The cache keeps each file under its SHA-256, or under its git digest if it is small, and links
    to it (https://huggingface.co/docs/huggingface_hub/guides/manage-cache). Where the file system
    has no links, sizes must do.
    """
    for path in (directory / name for name in names if (directory / name).is_symlink()):
        expected = found = os.path.basename(os.readlink(path))
        if _SHA256.fullmatch(expected):
            found = file_sha256(path)
        elif COMMIT.fullmatch(expected):
            data = path.read_bytes()
            found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if found != expected:
            raise ValueError(
                f"{path}: is damaged: it is not the hub's file any more; delete {path.resolve()} "
                "and run the same command again"
            )


def _pin(home: Path, repo: str, revision: str, commit: str) -> None:
    home.mkdir(parents=True, exist_ok=True)
    write_pin(home, repo, revision, commit)


def _failure(repo: str, revision: str, error: Exception) -> Exception:
    """What a user is told, without a word of the server's or an address: both can hold a token."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why the cache was looked at
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{repo}: has no revision {revision!r}")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            return ValueError(f"{repo}: is not on the hub, or not open to you; {_GET_ACCESS}")
        if status in (401, 403):
            return ValueError(f"{repo}: the hub refuses access (HTTP {status}); {_GET_ACCESS}")
        why = f"the hub answered HTTP {status}"
    elif isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename or constants.HF_HUB_CACHE)
    elif isinstance(error, OfflineModeIsEnabled):
        why = "the cache lacks files of it, and HF_HUB_OFFLINE is set"
    else:
        why = f"the hub cannot be reached or stopped sending ({type(error).__name__})"
    return ConnectionError(
        f"{repo}, a model of the hub (there is no such directory here): {why}; run the same "
        "command again to go on"
    )
