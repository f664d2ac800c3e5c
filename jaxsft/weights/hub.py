"""Models of the Hugging Face hub, kept on this machine: one commit of a repository, checked.

    google--gemma-2-2b-it/revision.json    the commit that "main" meant at first, and stays
    google--gemma-2-2b-it/COMMIT/          its files, and manifest.json, written last

Only what is read is fetched: config.json, tokenizer.model and the weights, a PEFT adapter, or both
where a repository has both. A whole copy needs no network; each time it is used its files are
compared with their digests.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxsft.common.files import cache_dir, read_json, write_json
from jaxsft.data.sources import MANIFEST
from jaxsft.download.files import HubFile, Snapshot, fetch_files, look_up
from jaxsft.download.pins import COMMIT, read_pins, write_pin
from jaxsft.download.retry import Hub, HubError, NoNetworkError
from jaxsft.formats.safetensors import INDEX_NAME, MODEL_NAME, pickle_hint
from jaxsft.gemma.architecture import from_hf_config
from jaxsft.weights.load import file_sha256
from jaxsft.weights.peft import CONFIG_NAME, WEIGHTS_NAME

_LINE_EVERY_S = 15.0


def fetch_model(
    repo: str, revision: str, say: Callable[[str], None], *, needs_tokenizer: bool
) -> tuple[Path, str]:
    """(directory, commit) of the model or adapter `repo`; downloaded unless a whole copy is there.

    Args:
      revision: branch, tag or commit. What a branch or tag means is looked up once and kept.
      say: hears of what is downloaded, and where to.
      needs_tokenizer: a model without tokenizer.model is refused before anything is fetched.

    Raises:
      ValueError: no such repository or revision, no access, none of the kinds of files above, a
        config of another model, no network and no copy, no room.
      ConnectionError: the hub did not deliver in spite of the retries.
    """
    hub = Hub(os.environ.get("HF_TOKEN", "").strip() or None, note=say)
    root = cache_dir("models")
    home = root / repo.replace("/", "--")
    if (kept := _whole_copy(home, repo, revision)) is not None:
        return kept
    with _locked(root, hub.note):
        if (kept := _whole_copy(home, repo, revision)) is not None:  # fetched by who held the lock
            return kept
        try:
            return _download(hub, home, repo, revision, needs_tokenizer)
        except NoNetworkError as error:
            raise ValueError(
                f"{repo}: no such directory here, no whole copy of the hub's in {home}, and the "
                f"hub cannot be reached ({error}): run this once with a network, or name another"
            ) from None
        except HubError as error:
            raise ConnectionError(
                f"{repo}: {error}; the same command goes on where it stopped"
            ) from None


def _download(
    hub: Hub, home: Path, repo: str, revision: str, needs_tokenizer: bool
) -> tuple[Path, str]:
    pins = read_pins(home, repo)
    try:
        found = look_up(hub, "model", repo, pins.get(revision, revision))
        files = _needed(found)
        if needs_tokenizer and not {"tokenizer.model", CONFIG_NAME} & {f.path for f in files}:
            raise ValueError("has no tokenizer.model; name one, or a .gguf file, with --tokenizer")
        directory = home / found.revision
        directory.mkdir(parents=True, exist_ok=True)
        # Before the files: an interrupted download goes on with the same commit.
        write_pin(home, repo, revision, found.revision)
        if config := tuple(file for file in files if file.path == "config.json"):
            fetch_files(hub, found._replace(files=config), ["*"], directory)
            from_hf_config(directory / "config.json")  # refused before gigabytes have come
        num_bytes = sum(file.size for file in files)
        hub.note(f"{repo} at {found.revision}: {num_bytes / 1e9:.2f} GB, to {directory}")
        report = _reporter(repo, num_bytes, hub.note)
        fetch_files(hub, found._replace(files=tuple(files)), ["*"], directory, report)
    except NoNetworkError:
        raise
    except ValueError as error:
        line = str(error).removeprefix(f"{repo}: ").removeprefix(f"{repo} ")
        if "HF_TOKEN" in line:  # without a token the hub doesn't always tell gated from missing
            line += "; Gemma's are gated: accept the terms on the model's page, then set HF_TOKEN"
        raise ValueError(f"{repo}: {line}") from None
    digests = {f.path: f.sha256 or file_sha256(directory / f.path) for f in files}  # as checked
    write_json(directory / MANIFEST, {"repo": repo, "revision": found.revision, "files": digests})
    return directory, found.revision


def _needed(found: Snapshot) -> list[HubFile]:
    """The files to fetch; ValueError where the repository is neither a model nor an adapter."""
    files = {file.path: file for file in found.files if "/" not in file.path}
    is_model = MODEL_NAME in files or INDEX_NAME in files
    names = []  # what is small comes first
    if CONFIG_NAME in files and (WEIGHTS_NAME in files or not is_model):
        names += [CONFIG_NAME, WEIGHTS_NAME]
    if is_model or not names:
        names += ["config.json", *({"tokenizer.model"} & files.keys())]
        if INDEX_NAME in files and MODEL_NAME not in files:
            shards = {name for name in files if name.endswith(".safetensors")} - {WEIGHTS_NAME}
            names += [INDEX_NAME, *sorted(shards)]
        else:
            names.append(MODEL_NAME)
    if missing := [name for name in names if name not in files]:
        raise ValueError(
            f"holds no {missing[0]}; it must be a Hugging Face model or a PEFT adapter, in "
            f"safetensors{pickle_hint(files)}"
        )
    return [files[name] for name in names]


def _whole_copy(home: Path, repo: str, revision: str) -> tuple[Path, str] | None:
    """(directory, commit) where every file is there as it came; None where one is not."""
    commit = read_pins(home, repo).get(revision, revision)
    directory = home / commit
    if not COMMIT.fullmatch(commit) or not (directory / MANIFEST).is_file():
        return None
    files = read_json(directory / MANIFEST).get("files")
    if not isinstance(files, dict):
        return None
    paths = {directory / Path(name).name: digest for name, digest in files.items()}
    if all(path.is_file() and file_sha256(path) == digest for path, digest in paths.items()):
        return directory, commit
    return None


def _reporter(what: str, num_bytes: int, note: Callable[[str], None]) -> Callable[[int], None]:
    """Counts bytes as they come, and says so now and then."""
    num_done, last_s = 0, time.monotonic()

    def received(more: int) -> None:
        nonlocal num_done, last_s
        num_done += more
        if time.monotonic() - last_s > _LINE_EVERY_S:
            last_s = time.monotonic()
            note(f"{what}: {num_done / 1e9:.2f} of {num_bytes / 1e9:.2f} GB")

    return received


@contextmanager
def _locked(root: Path, note: Callable[[str], None]) -> Iterator[None]:
    """One download at a time; the lock ends with the process."""
    root.mkdir(parents=True, exist_ok=True)
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"{root}: waits for another download to end")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
