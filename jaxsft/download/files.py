"""The Hugging Face hub: the files of a repository at one commit, and their bytes, checked.

Requests go through the hub's own client: its endpoint (HF_ENDPOINT), proxies, redirects and time
limit (HF_HUB_DOWNLOAD_TIMEOUT seconds without a byte). The token is the caller's and goes to the
hub alone: the client drops it when the hub redirects to another host, and no message holds what a
server answered. Every file is compared with the size and the digest that the hub lists for it; a
file that was cut off goes on where it stopped, in this process or in the next.

A name that the hub lists is refused if, as a path, it could leave the directory.
"""

import hashlib
import io
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from jaxsft.common.files import check_free_space, file_sha256
from jaxsft.download.retry import TRIED_AGAIN, BadBodyError, Hub, HubError, Tries, WrongPartError

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData

Kind = Literal["dataset", "model"]

_MAX_WRONG_DIGESTS = 2
_FOOTER_GUESS_BYTES = 1 << 16  # what pyarrow, too, reads of a file's end at first
_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


class HubFile(NamedTuple):
    """A file as the hub lists it; `sha256` for those in its large-file storage, else None."""

    path: str
    size: int
    git_oid: str
    sha256: str | None


class Snapshot(NamedTuple):
    """A repository at one commit; `configs` is the data set card's, [] without one."""

    kind: Kind
    repo: str
    revision: str
    files: tuple[HubFile, ...]
    configs: list[dict[str, Any]]


def look_up(hub: Hub, kind: Kind, repo: str, revision: str) -> Snapshot:
    """The files of `repo` at the commit that `revision` (branch, tag or commit) means now.

    Raises:
      ValueError: no such repository or revision, no access, or a file name that is no path.
      NoNetworkError: the hub was not reached, or HF_HUB_OFFLINE is set.
      HubError: it answers with errors only.
    """
    api = HfApi(token=hub.token or False)
    tries = Tries(hub, repo)
    while True:
        try:
            info: Any = api.repo_info(
                repo,
                repo_type=kind,
                revision=revision,
                files_metadata=True,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )
            files = [_listed(repo, entry) for entry in info.siblings]
            configs = info.card_data.get("configs") if info.card_data is not None else None
            break
        except (AttributeError, KeyError, TypeError):
            raise HubError(f"{repo}: the answer is none of a hub's; check HF_ENDPOINT") from None
        except HFValidationError:
            raise ValueError(f"{repo!r} is no repository; it must look like owner/name") from None
        except RevisionNotFoundError:
            raise ValueError(f"{repo} has no revision {revision!r}") from None
        except TRIED_AGAIN as error:
            tries.failed(error)
    hub.answered = True
    if not _SHA1.fullmatch(info.sha or ""):
        raise HubError(f"{repo}: the hub names no commit for {revision!r}")
    return Snapshot(kind, repo, info.sha, tuple(sorted(files)), configs or [])


def fetch(
    hub: Hub,
    snapshot: Snapshot,
    file: HubFile,
    path: Path,
    received: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Downloads one file to `path`, which is there whole and checked, or not at all.

    Raises:
      ValueError: no access, or no room on the disk.
      HubError: after the retries the file still does not come, or comes with another digest.
    """
    partial = path.with_name(path.name + ".partial")
    if path.is_file():
        path.replace(partial)  # checked below as if it had just come
    have = partial.stat().st_size if partial.is_file() else 0
    check_free_space(
        path.parent,
        file.size - have,
        what=file.path,
        advice="make room or name another directory",
    )
    tries, num_wrong = Tries(hub, file.path), 0
    received(min(have, file.size))
    while True:
        try:
            with partial.open("ab") as out:
                for chunk in _read_range(hub, snapshot, file, min(have, file.size), file.size):
                    out.write(chunk)
                    tries.count = 0
                    received(len(chunk))
            if _is_listed(partial, file):
                partial.replace(path)
                return
            partial.unlink()
            received(-file.size)
            num_wrong += 1
            if num_wrong == _MAX_WRONG_DIGESTS:
                raise HubError(f"{file.path}: the bytes are not those listed, {num_wrong} times")
            raise BadBodyError("not the bytes that the hub lists")
        except TRIED_AGAIN as error:
            if isinstance(error, WrongPartError):
                received(-min(have, file.size))
                partial.unlink()
            tries.failed(error)
        have = partial.stat().st_size if partial.is_file() else 0


def parquet_footer(hub: Hub, snapshot: Snapshot, file: HubFile) -> "FileMetaData":
    """Row count and schema of a Parquet file, from its last bytes alone; errors as `fetch`."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    tries = Tries(hub, f"{file.path} (footer)")
    num_bytes = min(_FOOTER_GUESS_BYTES, file.size)
    while True:
        try:
            tail = b"".join(_read_range(hub, snapshot, file, file.size - num_bytes, file.size))
            if tail[-4:] != b"PAR1" or len(tail) < 12:
                raise BadBodyError("no Parquet footer")
            # The footer, its length as 4 bytes, and the magic, at the end of the file
            # (https://parquet.apache.org/docs/file-format/).
            needed = struct.unpack("<I", tail[-8:-4])[0] + 8
            if needed > file.size:
                raise BadBodyError("no Parquet footer")
            if needed <= len(tail):
                return parquet.read_metadata(io.BytesIO(tail))
            num_bytes = needed
        except arrow.ArrowException:
            tries.failed(BadBodyError("a broken Parquet footer"))
        except TRIED_AGAIN as error:
            tries.failed(error)


def _read_range(
    hub: Hub, snapshot: Snapshot, file: HubFile, start: int, stop: int
) -> Iterator[bytes]:
    """Bytes [start, stop) of the file as they come; raises one of `TRIED_AGAIN` if some lack."""
    if start == stop:
        return
    url = hf_hub_url(snapshot.repo, file.path, repo_type=snapshot.kind, revision=snapshot.revision)
    headers = build_hf_headers(token=hub.token or False) | {
        "range": f"bytes={start}-{stop - 1}",
        "accept-encoding": "identity",  # ranges count the file's own bytes
    }
    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=seconds
    ) as response:
        hf_raise_for_status(response)
        sent = response.headers.get("content-range", f"bytes 0-{file.size - 1}/{file.size}")
        if sent != f"bytes {start}-{stop - 1}/{file.size}":
            raise WrongPartError("another part or length than asked for")
        left = stop - start
        for chunk in response.iter_bytes():
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                break
    if left > 0:
        raise BadBodyError(f"{left:,} bytes too few")
    if left < 0:
        raise BadBodyError("more bytes than the file has")


def _listed(repo: str, entry: Any) -> HubFile:
    _check_path(repo, entry.rfilename)
    sha256 = entry.lfs.sha256 if entry.lfs else None
    if not _SHA1.fullmatch(entry.blob_id) or not _SHA256.fullmatch(sha256 or "0" * 64):
        raise TypeError("digests that are none")
    return HubFile(entry.rfilename, int(entry.size), entry.blob_id, sha256)


def _check_path(repo: str, name: str) -> None:
    """ValueError unless the name stays below the directory that it is joined to, on any system."""
    parts = name.split("/")
    if not set(parts) & {"", ".", ".."} and not re.search(r'[\\:*?"<>|\x00-\x1f]', name):
        return
    raise ValueError(
        f"{repo}: lists a file named {name!r}, which is no path inside of it; nothing is taken"
    )


def _is_listed(path: Path, file: HubFile) -> bool:
    """Whether the file on disk is the one that the hub lists: its SHA-256, or else its git id."""
    if path.stat().st_size != file.size:
        return False
    if file.sha256:
        return file_sha256(path) == file.sha256
    digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as data:
        while chunk := data.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == file.git_oid
