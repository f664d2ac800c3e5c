"""What to do when the hub fails: try again, wait as long as it asks, or give up, in one line.

No message holds what a server answered, nor an address: both could carry a token.
"""

import email.utils
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT_S = 60.0  # of the doubling waits
_LONGEST_ASKED_WAIT_S = 900.0  # the hub's rate limits count over 5 minutes
_NO_NETWORK_TRIES = 2  # before the first answer; the usual retries would take two minutes


class HubError(Exception):
    """The hub did not deliver in spite of the retries; the same call later goes on from there."""


class NoNetworkError(ValueError):
    """The hub was never reached."""


class BadBodyError(Exception):
    """An answer whose bytes cannot be right."""


class WrongPartError(BadBodyError):
    """Another part of the file than asked for, which cannot go on from what is there."""


TRIED_AGAIN = (
    *(httpx2.HTTPError, httpx2.InvalidURL, OfflineModeIsEnabled),
    *(json.JSONDecodeError, BadBodyError),
)


@dataclass
class Hub:
    """How to reach the hub.

    `retries` counts tries in a row that brought no byte. The wait before the first of them doubles
    with each; an answer's Retry-After goes before it. `note` gets one line for each.
    """

    token: str | None = field(default=None, repr=False)  # a traceback may show the object
    retries: int = 6
    retry_wait_s: float = 1.0
    note: Callable[[str], None] = lambda line: None
    answered: bool = False  # whether the hub ever was reached

    def __post_init__(self) -> None:
        if self.token is not None and not re.fullmatch("[!-~]+", self.token):
            raise ValueError("HF_TOKEN holds characters that no token has; set it again, or unset")


class Tries:
    """Counts the tries of one thing that brought nothing, and waits in between."""

    def __init__(self, hub: Hub, what: str):
        self.hub = hub
        self.what = what
        self.count = 0

    def failed(self, error: Exception) -> None:
        """Sleeps before the next try; raises where there is none, or where none would help."""
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
    """(why, seconds that the hub asks to wait or None), in words that hold nothing of an answer."""
    if isinstance(error, OfflineModeIsEnabled):
        raise NoNetworkError("HF_HUB_OFFLINE is set") from None
    if isinstance(error, GatedRepoError):
        raise ValueError(
            f"{what}: is gated; accept its terms on the hub's page and set HF_TOKEN"
        ) from None
    if isinstance(error, RepositoryNotFoundError | RemoteEntryNotFoundError):
        raise ValueError(
            f"{what}: is not on the hub, or is private: check the name, or set HF_TOKEN"
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
    """Retry-After in seconds or as a date, or the hub's own `ratelimit` header."""
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    text = response.headers.get("retry-after", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
