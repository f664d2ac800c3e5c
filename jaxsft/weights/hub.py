"""Downloads models and adapters from the Hugging Face hub: one commit of a repository, checked.

huggingface_hub downloads into the user's Hugging Face cache (HF_HOME, HF_HUB_CACHE), which other
programs use too. A file in the cache is not downloaded again; an interrupted download continues
where it stopped. The token of HF_TOKEN or `hf auth login` is sent to the hub and nowhere else.

This module adds four things. Only the files that jaxsft reads are downloaded. A name keeps its
first commit (common/pins.py). Digests are compared at each use; huggingface_hub compares sizes.
Every failure is one line without any text from a server.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxsft.common.files import cache_dir, check_free_space, file_sha256
from jaxsft.common.pins import COMMIT, read_pins, write_pin
from jaxsft.formats.safetensors import INDEX_NAME, MODEL_NAME, SafetensorsDirectory, pickle_hint
from jaxsft.weights.hf_config import from_hf_config
from jaxsft.weights.peft import CONFIG_NAME, WEIGHTS_NAME

_TOKENIZER_NAME = "tokenizer.model"
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GET_ACCESS = (
    "Gemma's models are gated: accept the terms on the model's page, then set HF_TOKEN or run "
    "'hf auth login'"
)


def fetch_model(
    repo: str, revision: str, say: Callable[[str], None], *, needs_tokenizer: bool
) -> tuple[Path, str]:
    """(directory, commit) of the model or adapter `repo`; downloads it if the cache lacks it.

    Args:
      revision: branch, tag or commit. A branch or tag is looked up once; its commit is kept.
      say: gets a line when a download begins.
      needs_tokenizer: refuse a model without tokenizer.model before the download.

    Raises:
      ValueError: unknown repository or revision, no access, neither a model nor an adapter in
        safetensors, an unsupported config, a damaged file in the cache, a disk without room.
      ConnectionError: the cache lacks files, and the hub fails or cannot be reached.
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
    # The cache notes which commit a branch was when another program downloaded it.
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
    """As `fetch_model`; `known` is the pinned commit, or the revision if none is pinned.

    Raises httpx2's errors if the hub fails, OSError if the disk does."""
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
    # Before the files: an interrupted download continues with the same commit.
    _pin(home, repo, revision, commit)
    storage = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    directory = storage / "snapshots" / commit
    if "config.json" in names:
        snapshot_download(repo, revision=commit, allow_patterns="config.json")
        from_hf_config(directory / "config.json")  # refuses it before gigabytes are downloaded
    num_bytes = 0
    for file in (listed[name] for name in names):
        blob = storage / "blobs" / (file.lfs.sha256 if file.lfs else file.blob_id)
        partial = blob.with_name(f"{blob.name}.incomplete")
        if not blob.exists():
            num_bytes += file.size - (partial.stat().st_size if partial.exists() else 0)
    advice = "make room, or set HF_HOME to a place with more"
    check_free_space(storage, num_bytes, what=repo, advice=advice)
    say(f"{repo} at {commit}: {num_bytes / 1e9:.2f} GB to download, to {directory}")
    snapshot_download(repo, revision=commit, allow_patterns=names)
    _check_digests(directory, names)
    return directory, commit


def _cached(repo: str, revision: str, needs_tokenizer: bool) -> Path | None:
    """The directory in the user's cache, None if a needed file is missing.

    Raises ValueError if a file is damaged.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    try:  # without patterns it would ask for files that jaxsft does not read
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
            SafetensorsDirectory(directory)  # fails if a shard is missing
    except (LocalEntryNotFoundError, ValueError):
        return None
    _check_digests(directory, names)
    return directory


def _needed(listed: Iterable[str], needs_tokenizer: bool) -> list[str]:
    """The names of the files to download, from all names in a repository.

    Raises ValueError if it is neither a model nor an adapter, or lacks a tokenizer that it needs.
    """
    files = {name for name in listed if "/" not in name}
    is_model = MODEL_NAME in files or INDEX_NAME in files
    is_adapter = CONFIG_NAME in files and (WEIGHTS_NAME in files or not is_model)
    names = [CONFIG_NAME, WEIGHTS_NAME] if is_adapter else []
    if is_model or not is_adapter:
        names += ["config.json", *({_TOKENIZER_NAME} & files if needs_tokenizer else ())]
        if INDEX_NAME in files and MODEL_NAME not in files:
            # huggingface_hub takes names as patterns, so only plain names are allowed.
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
    """ValueError for a damaged file in the cache.

    The cache names each file by its SHA-256, a small one by its git digest, and links to it
    (https://huggingface.co/docs/huggingface_hub/guides/manage-cache). A file system without links
    has no digests; there huggingface_hub's comparison of sizes is the only check.
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
    """The error for the user; it repeats no server text and no address, which can hold a token."""
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
        error = error.__cause__  # the reason why only the cache was searched
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
