"""Downloads files of one commit of a Hugging Face repository, and checks their bytes.

Requests use the hub's own client: its endpoint (HF_ENDPOINT), proxies, redirects and time limit
(HF_HUB_DOWNLOAD_TIMEOUT seconds without a byte). The token goes to the hub only: the client drops
it when the hub redirects to another host. No message contains an address or a server's answer,
because both may contain a token.

Every file must have the size and digest that the hub lists. An interrupted file continues where it
stopped, also in a later process. A file name that could lead out of the directory is refused. A
failed request is tried again, after the time that the hub asks for, or gives an error of one line.
"""

import hashlib
import io
import json
import re
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx2
from huggingface_hub import HfApi, constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    hf_raise_for_status,
    parse_ratelimit_headers,
)

from jaxsft.common.files import check_free_space, file_sha256

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData

_MAX_WRONG_DIGESTS = 2
_FOOTER_GUESS_BYTES = 1 << 16  # of a file's end; pyarrow reads as much at first
_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT_S = 60.0  # when waits double
_LONGEST_ASKED_WAIT_S = 900.0  # the hub's rate limits count over 5 minutes
_NO_NETWORK_TRIES = 2  # before the first answer; all retries would take two minutes


class HubError(Exception):
    """All retries failed. A later call continues where this one stopped."""


class NoNetworkError(ValueError):
    """The hub could not be reached at all."""


class BadBodyError(Exception):
    """An answer with bytes that cannot be right."""


class WrongPartError(BadBodyError):
    """An answer with the wrong part of the file, which cannot be appended."""


TRIED_AGAIN = (
    *(httpx2.HTTPError, httpx2.InvalidURL, OfflineModeIsEnabled),
    *(json.JSONDecodeError, BadBodyError),
)


@dataclass
class Hub:
    """How to reach the hub.

    `retries` is the number of retries in a row that may bring no byte. The wait before a retry
    starts at `retry_wait_s` and doubles, unless the answer has a Retry-After. `note` gets a line
    for each retry.
    """

    token: str | None = field(default=None, repr=False)  # not shown if the object is printed
    retries: int = 6
    retry_wait_s: float = 1.0
    note: Callable[[str], None] = lambda line: None
    answered: bool = False  # whether the hub has answered at least once

    def __post_init__(self) -> None:
        if self.token is not None and not re.fullmatch("[!-~]+", self.token):
            raise ValueError(
                "HF_TOKEN holds characters that no token has; set it again, or unset it (or run "
                "'hf auth login' again)"
            )


def user_token() -> str | None:
    """The token of HF_TOKEN or, without it, the one that `hf auth login` keeps."""
    return get_token()


class HubFile(NamedTuple):
    """A file as the hub lists it. `sha256` is None unless the file is in large-file storage."""

    path: str
    size: int
    git_oid: str
    sha256: str | None


class Snapshot(NamedTuple):
    """A repository at one commit; `configs` is from the data set's card, [] if it has none."""

    repo: str
    revision: str
    files: tuple[HubFile, ...]
    configs: list[dict[str, Any]]


def look_up(hub: Hub, repo: str, revision: str) -> Snapshot:
    """The files of `repo` at the current commit of `revision` (branch, tag or commit).

    Raises:
      ValueError: there is no such repository or revision, no access, or a file name is not safe.
      NoNetworkError: the hub cannot be reached, or HF_HUB_OFFLINE is set.
      HubError: all retries failed, or the answer is not one of a hub.
    """
    api = HfApi(token=hub.token or False)
    tries = Tries(hub, repo)
    while True:
        try:
            info: Any = api.repo_info(
                repo,
                repo_type="dataset",
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
    return Snapshot(repo, info.sha, tuple(sorted(files)), configs or [])


def fetch(
    hub: Hub,
    snapshot: Snapshot,
    file: HubFile,
    path: Path,
    received: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Downloads one file to `path`. The file is there only when it is complete and checked.

    Raises:
      ValueError: there is no access, or no room on the disk.
      HubError: all retries failed, or the file has another digest than the hub lists.
    """
    partial = path.with_name(path.name + ".partial")
    if path.is_file():
        path.replace(partial)  # to be checked below
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
    """Row count and schema of a Parquet file, from its last bytes; raises as `fetch`."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    tries = Tries(hub, f"{file.path} (footer)")
    num_bytes = min(_FOOTER_GUESS_BYTES, file.size)
    while True:
        try:
            tail = b"".join(_read_range(hub, snapshot, file, file.size - num_bytes, file.size))
            if tail[-4:] != b"PAR1" or len(tail) < 12:
                raise BadBodyError("no Parquet footer")
            # A file ends with the footer, its length in 4 bytes, and the magic
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
    """Yields bytes [start, stop) of the file; raises one of `TRIED_AGAIN` if some are missing."""
    if start == stop:
        return
    url = hf_hub_url(snapshot.repo, file.path, repo_type="dataset", revision=snapshot.revision)
    headers = build_hf_headers(token=hub.token or False) | {
        "range": f"bytes={start}-{stop - 1}",
        "accept-encoding": "identity",  # ranges are for the bytes of the file itself
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
    """ValueError unless the name, joined to a directory, is inside of it on every system."""
    parts = name.split("/")
    if not set(parts) & {"", ".", ".."} and not re.search(r'[\\:*?"<>|\x00-\x1f]', name):
        return
    raise ValueError(
        f"{repo}: lists a file named {name!r}, which is no path inside of it; nothing is taken"
    )


def _is_listed(path: Path, file: HubFile) -> bool:
    """Whether the file on disk has the size and SHA-256, or git id, that the hub lists."""
    if path.stat().st_size != file.size:
        return False
    if file.sha256:
        return file_sha256(path) == file.sha256
    digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as data:
        while chunk := data.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == file.git_oid


class Tries:
    """Counts failed tries of one download, and waits between them."""

    def __init__(self, hub: Hub, what: str):
        self.hub = hub
        self.what = what
        self.count = 0

    def failed(self, error: Exception) -> None:
        """Sleeps before the next try; raises if there is none, or if it could not help."""
        why, asked_s = _judge(self.hub, self.what, error, self.count)
        self.count += 1
        if self.count > self.hub.retries:
            raise HubError(
                f"{self.what}: {why}; gave up after {self.hub.retries} retries"
            ) from None
        if asked_s is not None and asked_s > _LONGEST_ASKED_WAIT_S:
            raise HubError(f"{self.what}: {why}; the hub asks to wait {asked_s:.0f} s") from None
        doubled = self.hub.retry_wait_s * 2 ** (self.count - 1)
        wait_s = min(doubled, _LONGEST_WAIT_S) if asked_s is None else asked_s
        self.hub.note(
            f"{self.what}: {why}; retry {self.count} of {self.hub.retries} in {wait_s:g} s"
        )
        time.sleep(wait_s)


def _judge(hub: Hub, what: str, error: Exception, count: int) -> tuple[str, float | None]:
    """(the reason, without text of the answer; seconds that the hub asks to wait, or None)."""
    if isinstance(error, OfflineModeIsEnabled):
        raise NoNetworkError("HF_HUB_OFFLINE is set") from None
    if isinstance(error, GatedRepoError):
        raise ValueError(
            f"{what}: is gated; accept its terms on the hub's page, then set HF_TOKEN or run "
            "'hf auth login'"
        ) from None
    if isinstance(error, RepositoryNotFoundError | RemoteEntryNotFoundError):
        raise ValueError(
            f"{what}: is not on the hub, or is private: check the name, or set HF_TOKEN "
            "or run 'hf auth login'"
        ) from None
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            raise ValueError(
                f"{what}: the hub refuses access (HTTP {status}); check HF_TOKEN"
            ) from None
        if status not in _RETRIED_STATUS:
            raise HubError(f"{what}: the hub answered HTTP {status}") from None
        return f"the hub answered HTTP {status}", _asked_wait_s(error.response)
    if isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol):
        raise ValueError("HF_ENDPOINT must be an address like https://huggingface.co") from None
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        if not hub.answered and count >= min(_NO_NETWORK_TRIES - 1, hub.retries):
            raise NoNetworkError("no connection") from None
        return "no connection", None
    if isinstance(error, httpx2.TimeoutException):
        return f"nothing came for {constants.HF_HUB_DOWNLOAD_TIMEOUT} s", None
    if isinstance(error, httpx2.HTTPError):
        return "the connection was cut off", None
    return str(error) if isinstance(error, BadBodyError) else "an answer that is no JSON", None


def _asked_wait_s(response: Any) -> float | None:
    """Seconds to wait, from Retry-After or the hub's `ratelimit` header; None without them."""
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    text = response.headers.get("retry-after", "").strip()
    return float(text) if text.isdigit() else None
