"""A local server that speaks the part of the Hugging Face hub's protocol that downloads use.

The repository's files are listed by the API, and `resolve` redirects to a second server, as the
hub does to its CDN. Both log every request. A fault is queued with a pattern, and used up by the
first request whose "server path kind" it matches; the kind is footer or file.
"""

import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as arrow
import pyarrow.parquet as parquet

FOOTER_BYTES = 1 << 16  # what is asked for to get a footer; the shards here are larger
REASONED = "<think>Step {n}.</think>\nAnswer {n}."
# What is wrong with some rows of a generated Glaive shard, by row number modulo 10.
DEFECTS = {
    3: "No thought at all.",
    5: "<think>Never closed, step {n}.",
    7: None,
    8: "<think> </think>\nEmpty thought.",
}


class Request(NamedTuple):
    """One logged request."""

    server: str  # "hub" or "cdn"
    path: str
    range: str | None
    authorization: str | None


def glaive_rows(numbers: Iterable[int]) -> list[dict[str, Any]]:
    """Rows in the Glaive schema, four of ten defective, long enough for faults within a shard."""
    rows = []
    for n in numbers:
        response = DEFECTS.get(n % 10, REASONED)
        # Hexadecimal digests do not compress much.
        filler = "".join(hashlib.sha256(f"{n} {i}".encode()).hexdigest() for i in range(20))
        prompt = f"Question {n}? {filler}"
        rows.append({"prompt": prompt, "response": response and response.format(n=n)})
    return rows


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    """A Parquet file of several row groups."""
    out = BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), out, row_group_size=40)
    return out.getvalue()


@dataclass
class FakeHub:
    """Repositories by name and commit, what "main" means, faults to come, requests so far."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    configs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    main: dict[str, str] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)
    log: list[Request] = field(default_factory=list)
    # The fault "hold" sends half of what is asked for (the API: nothing), sets `holding` and waits
    # for `release`.
    holding: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    endpoint: str = ""
    cdn: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        """A new commit of `repo`, which "main" now means."""
        state = json.dumps([repo, len(self.repos.get(repo, {})), sorted(files)])
        commit = hashlib.sha1(state.encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = files
        self.main[repo] = commit
        return commit

    def take_fault(self, request: Request) -> str | None:
        """The next fault for this request, which is over then."""
        kind = "footer" if _is_footer(request.range) else "file"
        address = f"{request.server} {request.path} {kind}"
        with self._lock:
            for index, (pattern, fault) in enumerate(self.faults):
                if re.search(pattern, address):
                    del self.faults[index]
                    return fault
        return None

    def wait_held(self, client: subprocess.Popen[str]) -> None:
        """Returns when the fault "hold" holds a request of the client."""
        while not self.holding.wait(0.1):
            assert client.poll() is None, client.communicate()

    def downloads(self) -> list[tuple[str, str | None]]:
        """(file name, range) of what was asked of the CDN, but for footers."""
        asked = [request for request in self.log if request.server == "cdn"]
        return [(r.path.split("/")[-1], r.range) for r in asked if not _is_footer(r.range)]


def _is_footer(bytes_range: str | None) -> bool:
    first, last = (bytes_range or "bytes=0-").removeprefix("bytes=").split("-")
    return bool(last) and int(last) - int(first) + 1 == FOOTER_BYTES


def _listing(name: str, data: bytes) -> dict[str, Any]:
    """A file as the API lists it."""
    git_oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_oid}
    if name.endswith((".parquet", ".safetensors", ".model")):
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
    return entry


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A hub on two free ports of this machine."""
    hub = FakeHub()
    servers = []
    for name in ("hub", "cdn"):
        handler = type("Handler", (_Handler,), {"hub": hub, "server_name": name})
        server = _Server(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        hub.release.set()
        for server in servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that were killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    server_name: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        """Answers one request."""
        path = unquote(self.path)
        wanted, authorization = self.headers.get("range"), self.headers.get("authorization")
        request = Request(self.server_name, path, wanted, authorization)
        self.hub.log.append(request)
        try:
            self._fail_or_answer(path, self.hub.take_fault(request))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_GET  # what huggingface_hub asks of a file before it downloads it

    def _fail_or_answer(self, path: str, fault: str | None) -> None:
        if fault in ("500", "501", "503", "401", "403"):
            return self._send(int(fault), self._echo())
        if fault and fault.startswith("429"):
            return self._send(429, self._echo(), {"Retry-After": fault.removeprefix("429 ")})
        if fault and fault.startswith("answer "):  # as a proxy's login page, or another server's
            return self._send(200, fault.removeprefix("answer ").encode())
        if self.server_name == "cdn":
            return self._blob(path, fault)
        if fault == "hold":
            self.hub.holding.set()
            self.hub.release.wait()
        parts = path.split("?")[0].strip("/").split("/")
        if len(parts) < 4:
            return self._send(404, b"")  # the client asks for more than data
        if parts[:2] == ["api", "datasets"] or parts[:2] == ["api", "models"]:
            is_tree = parts[4:5] == ["tree"]
            revision = parts[5] if len(parts) > 5 else None
            return self._info("/".join(parts[2:4]), revision, is_tree=is_tree)
        parts = parts[1:] if parts[0] == "datasets" else parts
        repo, commit, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        commit = self.hub.main.get(repo, "") if commit == "main" else commit
        data = self.hub.repos.get(repo, {}).get(commit, {}).get(file)
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        listed = _listing(file, data)
        headers = {
            "Location": f"{self.hub.cdn}/{repo}/{commit}/{file}",
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{listed.get("lfs", {}).get("sha256", listed["blobId"])}"',
            "X-Linked-Size": str(len(data)),
        }
        return self._send(302, b"", headers)

    def _echo(self) -> bytes:
        """An error that repeats the caller's own headers, as a careless proxy would."""
        return json.dumps({"error": str(dict(self.headers))}).encode()

    def _info(self, repo: str, revision: str | None, is_tree: bool) -> None:
        commits = self.hub.repos.get(repo)
        if commits is None:
            return self._send(404, self._echo(), {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.main[repo] if revision in (None, "main") else revision
        if commit not in commits:
            return self._send(404, self._echo(), {"X-Error-Code": "RevisionNotFound"})
        siblings = [_listing(name, data) for name, data in commits[commit].items()]
        if is_tree:
            tree = [
                {"type": "file", "path": each["rfilename"], "oid": each["blobId"]}
                | {"size": each["size"]}
                | ({"lfs": each["lfs"] | {"oid": each["lfs"]["sha256"]}} if "lfs" in each else {})
                for each in siblings
            ]
            return self._send(200, json.dumps(tree).encode())
        card = {"configs": self.hub.configs[repo]} if repo in self.hub.configs else None
        body = {"id": repo, "sha": commit, "siblings": siblings, "cardData": card, "tags": []}
        return self._send(200, json.dumps(body).encode())

    def _blob(self, path: str, fault: str | None) -> None:
        owner, name, commit, file = path.strip("/").split("/", 3)
        data = self.hub.repos[f"{owner}/{name}"][commit][file]
        start, stop = 0, len(data)
        if wanted := self.headers.get("range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), int(last) + 1 if last else len(data)
        total = len(data)
        body = data[start:stop]
        if fault == "corrupt":
            body = bytes(byte ^ 1 for byte in body)
        if fault == "wrong length":
            total -= 7
        half = len(body) // 2
        shown = half if fault == "short" else len(body)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(shown))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
        self.end_headers()
        if fault in ("cut", "stall", "hold", "short"):
            self.wfile.write(body[:half])
            self.wfile.flush()
            self.close_connection = True
            if fault == "hold":
                self.hub.holding.set()
                self.hub.release.wait()
            elif fault == "stall":  # until the client has had enough and hangs up
                self.connection.recv(1)
            return
        self.wfile.write(body)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
