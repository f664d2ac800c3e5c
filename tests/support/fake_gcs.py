"""A local server that speaks the part of Google Cloud Storage's JSON API that a run uses.

Objects are in memory. gcsfs lists, reads, uploads (multipart and resumable), moves and deletes;
TensorStore reads and uploads (media), on condition of a generation. Requests are logged as
"METHOD path".
"""

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
MOVE = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)")
LIST = re.compile(r"/storage/v1/b/([^/]+)/o")
UPLOAD = re.compile(r"/upload/storage/v1/b/([^/]+)/o")
BUCKET = re.compile(r"/storage/v1/b/([^/]+)")


class Object(NamedTuple):
    """The content of an object, and the number of the write that made it."""

    data: bytes
    generation: int


@dataclass
class FakeGcs:
    """Objects by (bucket, name); every bucket exists.

    Requests that match the pattern `refused` get a 403. One that matches `held` sets `holding` and
    waits for `release`.
    """

    objects: dict[tuple[str, str], Object] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    refused: str | None = None
    held: str | None = None
    holding: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    endpoint: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    num_writes: int = 0
    uploads: dict[str, tuple[str, str, bytearray]] = field(default_factory=dict)

    def names(self, bucket: str) -> list[str]:
        """What lies in a bucket, sorted."""
        with self.lock:
            return sorted(name for there, name in self.objects if there == bucket)

    def read(self, bucket: str, name: str) -> bytes:
        """The content of an object."""
        return self.objects[bucket, name].data

    def environment(self) -> dict[str, str]:
        """Variables that send gcsfs and TensorStore here, for a process without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.endpoint,
            "TENSORSTORE_GCS_HTTP_URL": self.endpoint,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "FSSPEC_GCS_TOKEN": "anon",
        }


@contextmanager
def running_gcs() -> Iterator[FakeGcs]:
    """A store on a free port of this machine."""
    gcs = FakeGcs()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"gcs": gcs}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    gcs.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield gcs
    finally:
        gcs.release.set()
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that were killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    gcs: FakeGcs
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""

    def _answer(self) -> None:
        """One request of any kind."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        request = f"{self.command} {unquote(self.path)}"
        self.gcs.log.append(request)
        if self.gcs.refused and re.search(self.gcs.refused, request):
            return self._send(403, b"{}")
        if self.gcs.held and re.search(self.gcs.held, request):
            self.gcs.holding.set()
            self.gcs.release.wait()
            self.close_connection = True
            return None
        with self.gcs.lock:
            if matched := MOVE.fullmatch(url.path):
                return self._move(*map(unquote, matched.groups()))
            if matched := OBJECT.fullmatch(url.path):
                return self._object(unquote(matched[1]), unquote(matched[2]), query)
            if matched := UPLOAD.fullmatch(url.path):
                return self._upload(unquote(matched[1]), query, body)
            if matched := LIST.fullmatch(url.path):
                return self._list(unquote(matched[1]), query)
            if matched := BUCKET.fullmatch(url.path):
                return self._send_json({"kind": "storage#bucket", "name": unquote(matched[1])})
        return self._send(501, b"{}")

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def _object(self, bucket: str, name: str, query: dict[str, str]) -> None:
        found = self.gcs.objects.get((bucket, name))
        generation = found.generation if found else 0
        if int(query.get("ifGenerationMatch", generation)) != generation:
            return self._send(412, b"{}")
        if found is None:
            return self._send(404, b"{}")
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._send(304, b"")
        if self.command == "DELETE":
            del self.gcs.objects[bucket, name]
            return self._send(204, b"")
        if query.get("alt") != "media":
            return self._send_json(_resource(bucket, name, found))
        headers = {"X-Goog-Generation": str(generation)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, found.data, headers)
        size = len(found.data)
        first = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
        last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
        if first > last:
            return self._send(416, b"{}")
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return self._send(206, found.data[first : last + 1], headers)

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        if session := query.get("upload_id"):
            to, name, received = self.gcs.uploads[session]
            received += body
            if self.headers["Content-Range"].endswith(f"/{len(received)}"):
                return self._insert(to, name, bytes(received), query)
            return self._send(308, b"", {"Range": f"bytes=0-{len(received) - 1}"})
        kind = query["uploadType"]
        if kind == "media":
            return self._insert(bucket, query["name"], body, query)
        if kind == "resumable":
            session = str(len(self.gcs.uploads))
            name = query.get("name") or json.loads(body)["name"]
            self.gcs.uploads[session] = (bucket, name, bytearray())
            location = f"{self.gcs.endpoint}/upload/storage/v1/b/{bucket}/o?upload_id={session}"
            return self._send(200, b"", {"Location": location})
        boundary = re.search('boundary="(.+)"', self.headers["Content-Type"])
        assert boundary
        _, described, content = body.split(f"--{boundary[1]}".encode(), 2)
        name = json.loads(described.split(b"\n\n", 1)[1])["name"]
        data = content.split(b"\n\n", 1)[1].removesuffix(f"\n--{boundary[1]}--".encode())
        return self._insert(bucket, name, data, query)

    def _insert(self, bucket: str, name: str, data: bytes, query: dict[str, str]) -> None:
        found = self.gcs.objects.get((bucket, name))
        generation = found.generation if found else 0
        if int(query.get("ifGenerationMatch", generation)) != generation:
            return self._send(412, b"{}")
        return self._send_json(_resource(bucket, name, self._put(bucket, name, data)))

    def _put(self, bucket: str, name: str, data: bytes) -> Object:
        self.gcs.num_writes += 1
        written = Object(data, self.gcs.num_writes)
        self.gcs.objects[bucket, name] = written
        return written

    def _move(self, bucket: str, source: str, target: str) -> None:
        found = self.gcs.objects.pop((bucket, source), None)
        if found is None:
            return self._send(404, b"{}")
        return self._send_json(_resource(bucket, target, self._put(bucket, target, found.data)))

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        found: dict[str, dict[str, Any] | None] = {}  # None for a folder
        for (there, name), each in sorted(self.gcs.objects.items()):
            if there == bucket and name.startswith(prefix):
                cut = name.find(delimiter, len(prefix)) if delimiter else -1
                folder = cut >= 0
                found[name[: cut + 1] if folder else name] = (
                    None if folder else _resource(bucket, name, each)
                )
        names = [name for name in found if name > query.get("pageToken", "")]
        page = names[: int(query.get("maxResults", 1000))]
        answer: dict[str, Any] = {
            "kind": "storage#objects",
            "items": [found[name] for name in page if found[name]],
            "prefixes": [name for name in page if not found[name]],
        }
        if len(page) < len(names):
            answer["nextPageToken"] = page[-1]
        self._send_json(answer)

    def _send_json(self, value: dict[str, Any]) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _resource(bucket: str, name: str, found: Object) -> dict[str, Any]:
    time = f"2026-01-01T00:{found.generation // 60 % 60:02}:{found.generation % 60:02}.000Z"
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "size": str(len(found.data)),
        "generation": str(found.generation),
        "metageneration": "1",
        "timeCreated": time,
        "updated": time,
    }
