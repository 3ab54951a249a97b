"""Hubs and web servers whose answers never end, are no answers, or name what cannot be."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from huggingface_hub import constants

from toppings.sources import hub
from toppings.sources.adapters import find_adapter, parse_source
from toppings.sources.fetch import FetchDenied, FetchError, FetchNotFound, Room
from toppings.sources.hub import HubFiles, split_id
from toppings.sources.web import WebPlace, open_url

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WANTED = frozenset({CONFIG, WEIGHTS})
SHA = "a" * 40


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Odd"

    def log_message(self, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.asked.append(self.path)
        with suppress(OSError):
            self.server.answer(self)

    def head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def trickle(self) -> None:
        while not self.server.is_over.wait(0.01):
            self.wfile.write(b" ")


class Odd(ThreadingHTTPServer):
    """Answers as `answer` does; `asked` are the paths as they were spelt."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[Handler], None] = lambda handler: handler.head(404)
        self.is_over = threading.Event()
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Odd]:
    """Also the hub of this process."""
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    with Odd() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.is_over.set()
        server.shutdown()
        thread.join()


def said(content: bytes) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.head(200, Content_Length=str(len(content)))
        handler.wfile.write(content)

    return answer


@pytest.mark.parametrize("is_gated", [False, True], ids=["repository", "file"])
def test_a_hub_that_trickles_is_given_up_after_the_whole_time(
    odd: Odd, monkeypatch: pytest.MonkeyPatch, is_gated: bool
) -> None:
    told = json.dumps({"sha": SHA, "gated": "auto", "siblings": [{"rfilename": CONFIG}]}).encode()

    def answer(handler: Handler) -> None:
        if is_gated and handler.path.startswith("/api/"):
            said(told)(handler)
            return
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        handler.trickle()

    odd.answer = answer
    monkeypatch.setattr(hub, "API_TIMEOUT_S", 0.5)
    with pytest.raises(FetchError, match=r"has not come within 0\.5 s"):
        HubFiles("org/one", WANTED)
    assert all("org/one" in path for path in odd.asked)  # and nothing else is waited for


def test_what_a_hub_says_is_read_within_a_bound(odd: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    odd.answer = said(json.dumps({"sha": SHA, "siblings": [], "more": "x" * 100_000}).encode())
    assert HubFiles("org/one", WANTED).version == SHA
    monkeypatch.setattr(hub, "MAX_API_BYTES", 100_000)
    with pytest.raises(FetchError, match="is larger than 100000 bytes"):
        HubFiles("org/one", WANTED)


@pytest.mark.parametrize(
    "told",
    [
        *({"sha": SHA, "siblings": [{"rfilename": WEIGHTS, "size": s}]} for s in ("abc", [1], -5, True, 1.5)),
        *({"sha": SHA, "siblings": s} for s in ([1, None], {"a": 1}, [{"size": 1}])),
        {"sha": 5},
        [1],
        None,
    ],
    ids=str,
)
def test_a_hub_that_says_what_cannot_be_is_at_fault(odd: Odd, told: object) -> None:
    odd.answer = said(json.dumps(told).encode())
    with pytest.raises(FetchError, match="what the hub says of org/one is not understood"):
        HubFiles("org/one", WANTED)


def test_what_a_hub_leaves_open_is_nobodys_fault(odd: Odd) -> None:
    files = [{"rfilename": CONFIG, "size": None, "lfs": [{}]}, {"rfilename": "../x", "size": 1}]
    told = {"sha": SHA, "private": None, "gated": None, "siblings": files, "tags": None}
    odd.answer = said(json.dumps(told).encode())
    found = HubFiles("org/one", WANTED)
    assert (found.sizes(), found.is_restricted) == ({CONFIG: None}, False)
    odd.answer = said(b'{"sha": null}')
    with pytest.raises(FetchError, match="the hub names no revision of org/one"):
        HubFiles("org/one", WANTED)


@pytest.mark.parametrize("text", [b"", b"<html>", b"\xff", b"[" * 100_000, b'{"sha": ' + b"9" * 5000 + b"}"])
def test_a_hub_that_says_no_json_is_at_fault(odd: Odd, text: bytes) -> None:
    odd.answer = said(text)
    with pytest.raises(FetchError, match="what the hub says of org/one is not understood"):
        HubFiles("org/one", WANTED)


def test_a_hubs_refusals_are_told_by_their_kind(odd: Odd) -> None:
    for status, headers, kind in (
        (401, {}, FetchNotFound),
        (401, {"X_Error_Message": "Invalid credentials in Authorization header"}, FetchDenied),
        (404, {"X_Error_Code": "RevisionNotFound"}, FetchNotFound),
        (403, {"X_Error_Code": "GatedRepo"}, FetchDenied),
        (503, {}, FetchError),
    ):
        odd.answer = lambda handler, s=status, h=headers: handler.head(s, **h)  # type: ignore[misc]
        with pytest.raises(FetchError) as told:
            HubFiles("org/one@v1/x", WANTED)
        assert type(told.value) is kind, told.value
    assert set(odd.asked) == {"/api/models/org/one/revision/v1%2Fx?blobs=true"}


@pytest.mark.parametrize("length", ["9" * 5000, "-5", "abc", "1 2"])
def test_a_length_that_is_none_is_the_web_servers_fault(odd: Odd, length: str) -> None:
    odd.answer = lambda handler: handler.head(200, Content_Length=length)
    with pytest.raises(FetchError, match=r"announces '.+' as its length"):
        WebPlace(odd.url).look("file", Room(1000, 60.0))
    with pytest.raises(FetchError, match=r"announces '.+' as its length"):
        WebPlace(odd.url).open("file", Room(1000, 60.0), (None, ""))


def test_a_redirects_own_body_is_not_read(odd: Odd) -> None:
    def answer(handler: Handler) -> None:
        if handler.path == "/there":
            said(b"found")(handler)
            return
        handler.head(302, Location="/there", Content_Length=str(1 << 40))
        handler.trickle()

    odd.answer = answer
    with closing(open_url(f"{odd.url}/here", Room(1000, 5.0))) as found:
        assert found.read() == b"found"


def test_what_a_web_server_says_stays_on_one_line(odd: Odd) -> None:
    def broken(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 500 Oh\x01no\x1b[31m\r\n\r\n")

    odd.answer = lambda handler: handler.head(302, Location=handler.path, Content_Length="0")
    with pytest.raises(FetchError, match=r"answers 302 .*infinite loop") as told:
        open_url(f"{odd.url}/file", Room(1000, 60.0))
    assert str(told.value).isprintable()
    odd.answer = broken
    with pytest.raises(FetchError, match="answers 500 Oh no") as told:
        open_url(f"{odd.url}/file", Room(1000, 60.0))
    assert str(told.value).isprintable()


@pytest.mark.parametrize(
    ("name", "spelt"),
    [
        ("s sp ace", "/s%20sp%20ace/"),
        ("s-é", "/s-%C3%A9/"),
        ('a"<[^]>|', "/a%22%3C%5B%5E%5D%3E%7C/"),
        ("team/a@b:c", "/team/a@b:c/"),
    ],
)
def test_names_are_spelt_as_addresses_and_followed_by_their_revision(odd: Odd, name: str, spelt: str) -> None:
    source = parse_source(odd.url)
    mark = '"1"'
    odd.answer = lambda handler: handler.head(200, ETag=mark, Content_Length="2")
    first = source.find(name).where
    assert first.startswith(f"{odd.url}/{name}@")
    assert all(path.startswith(spelt) for path in odd.asked)
    mark = '"2"'
    assert source.find(name).where != first


def test_a_name_that_one_source_cannot_have_is_asked_of_the_next(odd: Odd, tmp_path: Path) -> None:
    odd.answer = lambda handler: handler.head(200, ETag='"1"', Content_Length="2")
    sources = [parse_source(text) for text in (f"dir:{tmp_path}", "hub:*", "s3://loras", odd.url)]
    for name in ("é" * 200, "org/naïve::x", "org/a--b::x", "x::file"):
        allowed = [each for each in sources if each.kind != "s3" or "::" in name]
        assert find_adapter(allowed, name).where.startswith(f"{odd.url}/{name}@")
    assert not any(path.startswith("/api/") for path in odd.asked)


@pytest.mark.parametrize("name", ["org/naïve", "org/a--b", "org/a.", "org-/a", "org/a.git", "ôrg/a@main"])
def test_what_no_hub_can_have_is_no_id(name: str) -> None:
    assert split_id(name) is None


@pytest.mark.parametrize("name", ["x::file", "zip::file:///etc/passwd", "a/b::"])
def test_no_name_makes_a_stores_client_read_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a client was made")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(FetchNotFound, match="holds '::'"):
        parse_source("s3://loras").find(name)
