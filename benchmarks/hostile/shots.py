"""Odd requests, drawn from a seed: the same seed and count give the same requests."""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hostile.routes import JSON, Route, with_value
from hostile.values import MEGABYTE, ODD_VALUES

NOTHING_TO_ADD = (
    *("/health", "/ready", "/ping", "/version", "/stats", "/metrics", "/adapters", "/v1/models"),
    *("/openapi.json", "/docs"),
)
LONG_PATH = "a" * 8000


@dataclass(frozen=True)
class Shot:
    """`wire` makes the bytes that are sent. Where they are no whole request (`is_whole` false), the server
    may wait for the rest, and an answer is not asked for."""

    name: str
    wire: Callable[[], bytes]
    is_whole: bool = True


def request(
    method: str, path: str, body: bytes = b"", content_type: str | None = JSON, headers: tuple[str, ...] = ()
) -> bytes:
    """A whole request, after which the connection is closed."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", *headers]
    if content_type is not None:
        lines.append(f"Content-Type: {content_type}")
    if body or method in ("POST", "PUT", "PATCH"):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + body


def post(route: Route, text: str, **options: object) -> bytes:
    return request(route.method, route.path, text.encode("utf-8", "surrogatepass"), **options)  # type: ignore[arg-type]


def draw_shots(routes: list[Route], seed: int, count: int) -> Iterator[Shot]:
    """`count` requests of all kinds; above some ten thousand, every field has had every odd value."""
    rng = random.Random(seed)
    families = {
        _odd_fields(routes, rng): 12,
        _two_odd_fields(routes, rng): 3,
        _changed_bytes(routes, rng): 4,
        _odd_types(routes, rng): 1,
        _odd_lines(rng): 2,
        _odd_framing(routes, rng): 1,
    }
    turns = [family for family, weight in families.items() for _ in range(weight)]
    rng.shuffle(turns)
    return (next(family) for family in itertools.islice(itertools.cycle(turns), count))


def _odd_fields(routes: list[Route], rng: random.Random) -> Iterator[Shot]:
    """Each field with each odd value, in random order, over and over."""
    cases = [(route, field, odd) for route in routes for field in route.fields() for odd in ODD_VALUES]
    while True:
        rng.shuffle(cases)
        for route, field, odd in cases:

            def wire(route: Route = route, field: tuple[str, ...] = field, odd: object = odd) -> bytes:
                return post(route, with_value(route.good, field, odd.write()))  # type: ignore[attr-defined]

            yield Shot(f"{route.path} {'.'.join(field)} = {odd.name}", wire)


def _two_odd_fields(routes: list[Route], rng: random.Random) -> Iterator[Shot]:
    """Small values only: two large ones show nothing more."""
    small = [odd for odd in ODD_VALUES if len(odd.name) < 24 and len(odd.write()) < 1000]
    while True:
        route = rng.choice(routes)
        fields, odds = rng.sample(route.fields(), 2), rng.sample(small, 2)
        with_first = with_value(route.good, fields[0], odds[0].write())
        try:
            text = with_value(json.loads(with_first), fields[1], odds[1].write())
        except (ValueError, AttributeError, TypeError, IndexError):  # the first value leaves no second place
            text = with_first
        names = [f"{'.'.join(field)} = {odd.name}" for field, odd in zip(fields, odds, strict=True)]
        yield Shot(f"{route.path} {' and '.join(names)}", lambda route=route, text=text: post(route, text))  # type: ignore[misc]


def _changed_bytes(routes: list[Route], rng: random.Random) -> Iterator[Shot]:
    """Good bodies with bytes changed, cut, doubled, put in."""
    while True:
        route = rng.choice(routes)
        body = bytearray(json.dumps(route.good).encode())
        for _ in range(rng.randint(1, 6)):
            place, action = rng.randrange(len(body) + 1), rng.randrange(5)
            if action == 0 and place < len(body):
                body[place] = rng.randrange(256)
            elif action == 1:
                del body[place : place + rng.randint(1, 10)]
            elif action == 2:
                body[place:place] = rng.randbytes(rng.randint(1, 10))
            elif action == 3:
                body[place:place] = body[place : place + 20]
            else:
                body[place:place] = rng.choice(
                    [b"\xff\xfe", b"\\ud83d", b"\\u0000", b"}", b"]", b"1e999", b'"']
                )
        wire = request(route.method, route.path, bytes(body))
        yield Shot(f"{route.path} changed bytes {bytes(body)[:200]!r}", lambda wire=wire: wire)  # type: ignore[misc]


CONTENT_TYPES = (
    *(
        None,
        "",
        "text/plain",
        "text/html",
        "application/xml",
        "multipart/form-data",
        "application/octet-stream",
    ),
    *("application/json; charset=utf-16", "application/json; charset=nonsense", "APPLICATION/JSON", "json"),
    *(
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/vnd.api+json",
        "\xe9",
    ),
)


def _odd_types(routes: list[Route], rng: random.Random) -> Iterator[Shot]:
    encodings = ("utf-8", "utf-16", "utf-32", "utf-8-sig", "cp500")
    while True:
        route, content_type, encoding = rng.choice(routes), rng.choice(CONTENT_TYPES), rng.choice(encodings)
        body = json.dumps(route.good).encode(encoding)
        wire = request(route.method, route.path, body, content_type)
        yield Shot(f"{route.path} as {content_type} in {encoding}", lambda wire=wire: wire)  # type: ignore[misc]


def _odd_lines(rng: random.Random) -> Iterator[Shot]:
    """Methods, paths, queries and headers."""
    methods = (
        "GET",
        "HEAD",
        "POST",
        "PUT",
        "DELETE",
        "PATCH",
        "OPTIONS",
        "TRACE",
        "CONNECT",
        "BREW",
        "get",
        "G" * 500,
    )
    names = (
        "nobody",
        "a/b",
        "a%2Fpin",
        "pin",
        "a/pin/pin",
        "%00",
        "%ff",
        "%ud83d",
        "..%2f..%2f",
        "a\ud83d",
        "é",
        "%",
    )
    paths = (
        *(
            "/",
            "//",
            "/v1",
            "/v1/",
            "/v1/completions/",
            "/nowhere",
            "/../../etc/passwd",
            "*",
            "http://a/health",
        ),
        *(
            f"/{LONG_PATH}",
            f"/adapters/{LONG_PATH}",
            f"/v1/models/{LONG_PATH}",
            "/adapters//pin",
            "/adapters/",
        ),
        *(f"/adapters/{name}" for name in names),
        *(f"/adapters/{name}/pin" for name in names),
        *(f"/v1/models/{name}" for name in names),
        *NOTHING_TO_ADD,
    )
    queries = ("", "?", "?a=1", "?" + "a=1&" * 2000, "?%00=%ff", "#part", "?stream=true")
    headers = (
        *(
            "X-Odd: 1",
            "X-Odd: " + "a" * 30_000,
            "X-Request-Id: \xe9",
            "X-Odd:",
            "Expect: 100-continue",
            "Cookie: a=" + "b" * 5000,
        ),
        *(
            "Authorization: Bearer x",
            "Authorization: ",
            "Origin: http://elsewhere",
            "Origin: null",
            "Host: elsewhere",
        ),
        *(
            "Range: bytes=0-",
            "Accept: image/png",
            "Accept-Encoding: nonsense",
            "Upgrade: websocket",
            "TE: trailers",
        ),
        *(
            "X-Forwarded-For: 8.8.8.8",
            "Content-Encoding: gzip",
            "Bad Header: 1",
            ": empty",
            "X-Null: \0",
            "If-Match: *",
        ),
    )
    while True:
        method, path, query = rng.choice(methods), rng.choice(paths), rng.choice(queries)
        chosen = tuple(rng.sample(headers, rng.randint(0, 3)))
        wire = request(method, path + query, b"", None, chosen)
        said = ", ".join(header[:30] for header in chosen)
        # HEAD's and CONNECT's answers have no body; the rest is as always.
        yield Shot(f"{method[:8]} {path[:40]!r}{query[:12]} {said}", lambda wire=wire: wire)  # type: ignore[misc]


def _odd_framing(routes: list[Route], rng: random.Random) -> Iterator[Shot]:
    """Bytes that are no whole request, or whose lengths contradict."""
    while True:
        route = rng.choice(routes)
        body = json.dumps(route.good).encode()
        start = f"{route.method} {route.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n".encode()
        typed = start + b"Content-Type: application/json\r\n"
        chunked = typed + b"Transfer-Encoding: chunked\r\n\r\n"
        chunk = b"%x\r\n%s\r\n" % (len(body), body)
        cases: list[tuple[str, bytes, bool]] = [
            ("good chunks", chunked + chunk + b"0\r\n\r\n", True),
            (
                "chunks of one byte",
                chunked + b"".join(b"1\r\n%c\r\n" % each for each in body) + b"0\r\n\r\n",
                True,
            ),
            ("a chunk's length in words", chunked + b"many\r\n" + body, True),
            ("a chunk's negative length", chunked + b"-5\r\n" + body, True),
            ("a chunk of 16 EB", chunked + b"ffffffffffffffff\r\n" + body, False),
            ("a chunk without its end", chunked + chunk, False),
            ("both lengths", chunked[:-2] + b"Content-Length: 5\r\n\r\n" + chunk + b"0\r\n\r\n", True),
            ("two lengths", typed + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\n" + body, True),
            ("a negative length", typed + b"Content-Length: -1\r\n\r\n" + body, True),
            ("a length in words", typed + b"Content-Length: many\r\n\r\n" + body, True),
            ("a length of 5,000 digits", typed + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", True),
            ("an announced terabyte", typed + b"Content-Length: 1099511627776\r\n\r\n" + body, True),
            ("a body that never comes", typed + b"Content-Length: 500\r\n\r\n", False),
            (
                "half a body",
                typed + b"Content-Length: %d\r\n\r\n" % len(body) + body[: len(body) // 2],
                False,
            ),
            ("more than announced", typed + b"Content-Length: 2\r\n\r\n" + body, True),
            (
                "an announced body that is too large",
                request("POST", route.path, b"a" * (33 * MEGABYTE)),
                False,
            ),
            ("headers that never end", start + b"X-Odd: 1\r\n" * 20, False),
            ("a header of 200 kB", start + b"X-Odd: " + b"a" * 200_000 + b"\r\n\r\n", True),
            ("many headers", start + b"".join(b"X-%d: 1\r\n" % i for i in range(5000)) + b"\r\n", True),
            ("random bytes", rng.randbytes(300) + b"\r\n\r\n", True),
            ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200), False),
            ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", True),
            ("HTTP/0.9", b"GET /health\r\n\r\n", True),
            ("HTTP/9.9", b"GET /health HTTP/9.9\r\n\r\n", True),
            ("nothing", b"", False),
            ("line feeds alone", start.replace(b"\r\n", b"\n") + b"\n", True),
        ]
        name, wire, is_whole = rng.choice(cases)
        yield Shot(f"{route.path} with {name}", lambda wire=wire: wire, is_whole)  # type: ignore[misc]
