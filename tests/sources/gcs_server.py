"""Google's object store on this machine: as much of its JSON interface as gcsfs asks to read objects, of a
directory whose sub-directories are buckets."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OBJECT = re.compile(r"(?P<download>/download)?/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>.+)")
LISTING = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/o/?")


class Store(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # the client has heard enough
            self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        if (match := OBJECT.fullmatch(url.path)) is not None:
            self._object(bool(match["download"]) or "alt=media" in url.query, match["bucket"], match["name"])
        elif (match := LISTING.fullmatch(url.path)) is not None:
            prefix = parse_qs(url.query).get("prefix", [""])[0]
            bucket = self.server.root / match["bucket"]
            names = sorted(str(f.relative_to(bucket)) for f in bucket.rglob("*") if f.is_file())
            found = [_described(bucket, name) for name in names if name.startswith(prefix)]
            self._send(200, json.dumps({"items": found}).encode())
        else:
            self._send(404, b"{}")

    def _object(self, is_download: bool, bucket: str, name: str) -> None:
        file = self.server.root / bucket / unquote(name)
        if not file.is_file():
            self._send(404, json.dumps({"error": {"code": 404, "message": "No such object"}}).encode())
            return
        if not is_download:
            self._send(200, json.dumps(_described(self.server.root / bucket, unquote(name))).encode())
            return
        content, wanted = file.read_bytes(), self.headers.get("Range", "")
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", wanted):
            end = min(int(match[2] or len(content)), len(content) - 1)
            part = f"bytes {match[1]}-{end}/{len(content)}"
            self._send(206, content[int(match[1]) : end + 1], {"Content-Range": part})
            return
        self._send(200, content)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        kind = {"Content-Type": "application/json"} if headers is None else headers
        for name, value in {**kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _described(bucket: Path, name: str) -> dict[str, Any]:
    content = (bucket / name).read_bytes()
    return {
        "kind": "storage#object",
        "bucket": bucket.name,
        "name": name,
        "size": str(len(content)),
        "etag": hashlib.sha256(content).hexdigest(),
        "generation": "1",
        "updated": "2026-01-01T00:00:00.000Z",
    }


@contextmanager
def running_store(root: Path) -> Iterator[Store]:
    with Store(root) as store:
        thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield store
        store.shutdown()
        thread.join()
