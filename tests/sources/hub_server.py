"""A hub on this machine: what huggingface_hub's client asks for, of directories; and what can go wrong."""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+?)(?:/(?P<what>revision|tree)/(?P<revision>[^/?]+))?(?:\?.*)?"
)
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)(?:\?.*)?")


class Hub(ThreadingHTTPServer):
    """Repositories are the directories `root/org/name`. `tokens`: what may read a repository, where not all
    may; of those in `gated` everybody hears what they hold. `refused`: their files are answered 401, as a
    plain web server does. `hides_absent`: what is not there is answered 403, as stores do of what may not be
    listed. `untold`: nothing is said of their files' length and revision. `faults`: what
    happens to who fetches its weights. `num_fetched`: of each file, how often. `ranges`: what was asked for
    of files by parts."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.tokens: dict[str, str] = {}
        self.gated: set[str] = set()
        self.refused: set[str] = set()
        self.hides_absent = False
        self.untold: set[str] = set()
        self.faults: dict[str, str] = {}
        self.ranges: list[str] = []
        self.num_fetched: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def revision(self, repo: str) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for file in self.files(repo):
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()

    def files(self, repo: str) -> list[Path]:
        return sorted(path for path in (self.root / repo).rglob("*") if path.is_file())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path)
        for pattern, answer in ((API, self._api), (FILE, self._file)):
            if (match := pattern.fullmatch(path)) is not None:
                if self._may_read(match["repo"], is_told=pattern is API):
                    answer(**match.groupdict())
                return
        self._send(404, b"")

    def _may_read(self, repo: str, *, is_told: bool) -> bool:
        token = self.server.tokens.get(repo)
        if not (self.server.root / repo).is_dir():
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return False
        if repo in self.server.refused:
            self._send(401, b"{}")
            return False
        is_gated = repo in self.server.gated
        if token and self.headers.get("Authorization") != f"Bearer {token}" and not (is_gated and is_told):
            code = "GatedRepo" if is_gated else "RepoNotFound"
            self._send(403 if is_gated else 401, b"{}", {"X-Error-Code": code})
            return False
        return True

    def _api(self, repo: str, what: str | None, revision: str | None) -> None:
        current = self.server.revision(repo)
        if revision not in (None, "main", current):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        folder = self.server.root / repo
        files = [(str(f.relative_to(folder)), f.stat().st_size) for f in self.server.files(repo)]
        if what == "tree":
            found: Any = [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in files]
        else:
            siblings = [{"rfilename": name, "size": size} for name, size in files]
            is_gated = repo in self.server.gated
            found = {"id": repo, "modelId": repo, "sha": current, "siblings": siblings}
            found |= {"private": repo in self.server.tokens and not is_gated}
            found |= {"gated": "manual" if is_gated else False}
        self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, file: str) -> None:
        path = self.server.root / repo / file
        if not path.is_file():
            self._send(403 if self.server.hides_absent else 404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        headers = {
            "X-Repo-Commit": self.server.revision(repo),
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
        }
        if self.command == "GET":
            self.server.num_fetched[f"{repo}/{file}"] += 1
            fault = self.server.faults.get(repo)
            if fault is not None and file.endswith(".safetensors"):
                self._fail(fault, content)
                return
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if wanted and self.headers.get("If-Range") == headers["ETag"]:
                self.server.ranges.append(f"{file} {wanted[1]}")
                start = int(wanted[1])
                part = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self._send(206, content[start:], {**headers, "Content-Range": part})
                return
        self._send(200, content, headers, is_told=repo not in self.server.untold)

    def _fail(self, fault: str, content: bytes) -> None:
        self.close_connection = True
        if fault == "elsewhere":
            self._send(302, b"", {"Location": "http://127.0.0.2:9/secrets"})
            return
        self.send_response(200)
        if fault == "short":
            self.send_header("Content-Length", str(len(content) // 2))
            content = content[: len(content) // 2]
        elif fault == "cut":
            self.send_header("Content-Length", str(len(content)))
            content = content[: len(content) // 2]
        elif fault == "slow":
            content = content[: len(content) // 2]
        self.end_headers()
        try:
            self.wfile.write(content)
            while fault in ("endless", "slow"):
                self.wfile.write(b"x" * (65536 if fault == "endless" else 1))
                time.sleep(0.0 if fault == "endless" else 0.05)
        except OSError:
            pass

    def _send(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, *, is_told: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            if is_told:
                self.send_header(name, value)
        self.close_connection = not is_told
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def running_hub(root: Path) -> Iterator[Hub]:
    with Hub(root) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
