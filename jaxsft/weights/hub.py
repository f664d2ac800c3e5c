"""Finds or downloads models and adapters of the Hugging Face hub: one commit, checked.

huggingface_hub downloads into the user's Hugging Face cache (HF_HOME, HF_HUB_CACHE), which other
programs use too. A file in the cache is not downloaded again. The token of HF_TOKEN or
`hf auth login` is sent to the hub and nowhere else.

This module adds five things. Only the files that jaxsft reads are downloaded. A name keeps its
first commit (common/pins.py). Digests are compared at each use; huggingface_hub compares sizes.
A busy hub is asked again. Every failure is one line without any text from a server.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxsft.common.files import cache_dir, check_free_space, file_sha256, read_json
from jaxsft.common.pins import COMMIT, read_pins, write_pin
from jaxsft.data.added_tokens import ADDED_NAME, ROLES_NAME, SETTINGS_NAME
from jaxsft.formats.safetensors import (
    INDEX_NAME,
    MODEL_NAME,
    SafetensorsDirectory,
    other_weights_hint,
)
from jaxsft.weights.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from jaxsft.weights.hf_config import from_hf_config
from jaxsft.weights.hub_files import (
    NotDeliveredError,
    ask_patiently,
    damage_error,
    damaged_files,
    fetch_files_of_commit,
    not_a_hub,
)

_TOKENIZERS = {"tokenizer.json", "tokenizer.model"}
_TOKENIZER_FILES = _TOKENIZERS | {SETTINGS_NAME, ADDED_NAME, ROLES_NAME}
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_GET_ACCESS = (
    "Gemma's models are gated: accept the terms on the model's page, then set HF_TOKEN or run "
    "'hf auth login'"
)


def fetch_model(
    repo: str, revision: str, say: Callable[[str], None], *, needs_tokenizer: bool
) -> tuple[Path, str]:
    """(directory, commit) of the model or adapter `repo`; downloads it if it is not here.

    Args:
      revision: branch, tag or commit. A branch or tag is looked up once; its commit is kept.
      say: gets a line when a download begins, and about retries and progress.
      needs_tokenizer: refuse a model without a tokenizer before the download.

    Raises:
      ValueError: unknown repository or revision, no access, a malformed token, neither a model nor
        an adapter in safetensors, an unsupported config, a damaged file in the cache, a disk
        without room.
      ConnectionError: the cache lacks files, and the hub fails or cannot be reached.
      OSError: the cache cannot be written, or the disk is full.
    """
    import httpx2  # slow to import, as huggingface_hub is

    home = cache_dir("models") / repo.replace("/", "--")
    known = read_pins(home, repo).get(revision, revision)
    if COMMIT.fullmatch(known) and (
        directory := _cached(repo, known, needs_tokenizer)
        or _earlier_copy(home / known, needs_tokenizer)
    ):
        return directory, known
    try:
        return _download(repo, revision, known, home, say, needs_tokenizer)
    except (NotDeliveredError, httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        failure, why = _failure(repo, revision, error)
    # The cache notes which commit a branch was when another program downloaded it. That program,
    # or an earlier version, may have left one of two tokenizer files.
    if isinstance(failure, ValueError | ConnectionError) and (
        directory := _cached(repo, known, needs_tokenizer, must_be_complete=False)
    ):
        say(f"{repo}: {why}; {directory.name}, which the cache holds, is taken")
        if revision not in read_pins(home, repo):
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

    Raises httpx2's errors and NotDeliveredError if the hub fails, OSError if the disk does.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    header = build_hf_headers().get("authorization", "")
    if header and not re.fullmatch("Bearer [!-~]+", header):
        raise ValueError(
            "the hub's token holds characters that no token has; set HF_TOKEN again, or run "
            "'hf auth login'"
        )
    commit, listed = _look_up(repo, known, say)
    try:
        names = _needed(listed, needs_tokenizer)
    except ValueError as error:
        raise ValueError(f"{repo}: {error}") from None
    # Before the files: an interrupted download continues with the same commit.
    _pin(home, repo, revision, commit)
    storage = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    directory = storage / "snapshots" / commit
    if "config.json" in names:
        fetch_files_of_commit(repo, directory, ["config.json"], say, {})
        from_hf_config(directory / "config.json")  # refuses it before gigabytes are downloaded
    sizes = {storage / "blobs" / digest: size for digest, size in (listed[n] for n in names)}
    sizes = {blob: size for blob, size in sizes.items() if not blob.exists()}
    num_bytes = sum(sizes.values())
    advice = "make room, or set HF_HOME to a place with more"
    check_free_space(storage, num_bytes, what=repo, advice=advice)
    say(f"{repo} at {commit}: {num_bytes / 1e9:.2f} GB to download, to {directory}")
    if (home / commit).is_dir():
        say(f"{home / commit}: an earlier version's copy, not complete; it can be deleted")
    fetch_files_of_commit(repo, directory, names, say, sizes)
    return directory, commit


def _look_up(
    repo: str, revision: str, say: Callable[[str], None]
) -> tuple[str, dict[str, tuple[str, int]]]:
    """(commit, name of a file -> its digest, which names it in the cache, and its size)."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError

    timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT

    def ask() -> Any:
        return HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout_s)

    try:
        info = ask_patiently(ask, repo, say)
        files = {f.rfilename: (f.lfs.sha256 if f.lfs else f.blob_id, f.size) for f in info.siblings}
        is_hub = COMMIT.fullmatch(info.sha) and all(
            isinstance(digest, str) and isinstance(size, int) for digest, size in files.values()
        )
    except HFValidationError:  # of the name
        raise
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        is_hub = None
    if not is_hub:
        raise not_a_hub()
    return info.sha, files


def _cached(
    repo: str, revision: str, needs_tokenizer: bool, *, must_be_complete: bool = True
) -> Path | None:
    """The directory in the user's cache, None if a needed file is missing.

    If it need not be complete, one of two tokenizer files is enough.

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
        if not must_be_complete:
            here = {name for name in _TOKENIZER_FILES if (directory / name).is_file()}
            listed = (listed - _TOKENIZER_FILES) | here
        names = _needed(listed, needs_tokenizer)
        if not all((directory / name).is_file() for name in names):
            return None
        if INDEX_NAME in names:
            SafetensorsDirectory(directory)  # fails if a shard is missing
    except (LocalEntryNotFoundError, ValueError):
        return None
    if damaged := damaged_files(directory, names):
        raise damage_error(damaged[0])
    return directory


def _earlier_copy(directory: Path, needs_tokenizer: bool) -> Path | None:
    """The directory of a commit that an earlier version kept; None if it is not complete."""
    try:
        files = read_json(directory / "manifest.json")["files"]
        _needed(files, needs_tokenizer)
        digests = {directory / Path(name).name: digest for name, digest in files.items()}
        is_whole = all(file_sha256(path) == digest for path, digest in digests.items())
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        return None
    return directory if is_whole else None


def _needed(listed: Iterable[str], needs_tokenizer: bool) -> list[str]:
    """The names of the files to download, from all names in a repository.

    Raises ValueError if it is neither a model nor an adapter, or lacks a tokenizer that it needs.
    """
    files = {name for name in listed if "/" not in name}
    is_model = MODEL_NAME in files or INDEX_NAME in files
    is_adapter = CONFIG_NAME in files and (WEIGHTS_NAME in files or not is_model)
    names = [CONFIG_NAME, WEIGHTS_NAME] if is_adapter else []
    if is_model or not is_adapter:
        names += ["config.json", *(sorted(_TOKENIZER_FILES & files) if needs_tokenizer else ())]
        if INDEX_NAME in files and MODEL_NAME not in files:
            # huggingface_hub takes names as patterns, so only plain names are allowed.
            shards = {name for name in files if _SHARD_NAME.fullmatch(name)} - {WEIGHTS_NAME}
            names += [INDEX_NAME, *sorted(shards)]
        else:
            names.append(MODEL_NAME)
    if missing := [name for name in names if name not in files]:
        raise ValueError(
            f"holds no {missing[0]}; it must be a Hugging Face model or a PEFT adapter, in "
            f"safetensors{other_weights_hint(files)}"
        )
    if needs_tokenizer and not is_adapter and not _TOKENIZERS & files:
        raise ValueError(
            "has no tokenizer.json and no tokenizer.model; name one, or a .gguf file, with "
            "--tokenizer"
        )
    return names


def _pin(home: Path, repo: str, revision: str, commit: str) -> None:
    home.mkdir(parents=True, exist_ok=True)
    write_pin(home, repo, revision, commit)


def _failure(repo: str, revision: str, error: Exception) -> tuple[Exception, str]:
    """(error for the user, its reason); neither repeats server text, which can hold a token."""
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
        return ValueError(f"{repo}: has no revision {revision!r}"), f"has no revision {revision!r}"
    advice = "run the same command again to go on"
    if isinstance(error, NotDeliveredError):
        why, advice = error.args
    elif isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        why = f"the hub answered HTTP {status}"
        is_unknown = isinstance(error, RepositoryNotFoundError)
        if is_unknown and not isinstance(error, GatedRepoError):
            why = "is not on the hub, or not open to you"
        elif status in (401, 403):
            why, is_unknown = f"the hub refuses access (HTTP {status})", True
        if is_unknown:
            return ValueError(f"{repo}: {why}; {_GET_ACCESS}"), why
    elif isinstance(error, OSError) and error.errno is not None:
        filename = error.filename or constants.HF_HUB_CACHE
        return OSError(error.errno, error.strerror, filename), str(error.strerror)
    elif isinstance(error, OfflineModeIsEnabled):
        why = "the cache lacks files of it, and HF_HUB_OFFLINE is set"
        advice = "unset it, or name a directory"
    else:
        why = f"the hub cannot be reached or stopped sending ({type(error).__name__})"
        advice = "with a network, run the same command again to go on"
    place = "a model of the hub (there is no such directory here)"
    return ConnectionError(f"{repo}, {place}: {why}; {advice}"), why
