"""HEAD, OPTIONS, wrong methods, bodies without a content type, and small routes that clients ask for."""

import pytest

from tests.server.conftest import Server
from toppings import __version__

READ = ("/health", "/healthz", "/ready", "/ping", "/version", "/v1/models", "/metrics", "/stats", "/adapters")


@pytest.mark.parametrize("path", READ)
async def test_head_is_get_without_a_body(server: Server, path: str) -> None:
    head, get = await server.http.head(path), await server.http.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"") == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/completions", "OPTIONS, POST"),
        ("HEAD", "/v1/chat/completions", "OPTIONS, POST"),
        ("DELETE", "/health", "GET, HEAD, OPTIONS"),
        ("PUT", "/adapters", "GET, HEAD, OPTIONS, POST"),
        ("GET", "/adapters/a/pin", "DELETE, OPTIONS, POST"),
        ("PATCH", "/ping", "GET, HEAD, OPTIONS, POST"),
        ("POST", "/openapi.json", "GET, HEAD, OPTIONS"),
    ],
)
async def test_a_wrong_method_is_told_the_right_ones(
    server: Server, method: str, path: str, allowed: str
) -> None:
    reply = await server.http.request(method, path)
    assert (reply.status_code, reply.headers["allow"]) == (405, allowed)
    if method != "HEAD":
        message = f"{method} is not allowed on this route, only {allowed}"
        told = {"message": message, "type": "MethodNotAllowedError", "param": None, "code": 405}
        assert reply.json() == {"error": told}
    options = await server.http.options(path)
    assert (options.status_code, options.headers["allow"], options.content) == (204, allowed, b"")


async def test_paths_that_are_not_there_have_no_methods(server: Server) -> None:
    for method in ("OPTIONS", "HEAD", "GET"):
        assert (await server.http.request(method, "/nowhere")).status_code == 404
    told = {"message": "no route is at /v1/nowhere", "type": "NotFoundError", "param": None, "code": 404}
    assert (await server.http.get("/v1/nowhere")).json() == {"error": told}
    of_messages = (await server.http.get("/v1/messages/nowhere")).json()
    assert of_messages["error"] == {
        "type": "not_found_error",
        "message": "no route is at /v1/messages/nowhere",
    }


class TestFromPages:
    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {"allowed_origins": ["https://page.example"]}

    async def test_pages_may_ask_beforehand_and_read_the_id(self, server: Server) -> None:
        headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        asked = await server.http.options("/v1/chat/completions", headers=headers)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://page.example"
        reply = await server.http.get("/v1/models", headers={"Origin": "https://page.example"})
        assert "X-Request-Id" in reply.headers["access-control-expose-headers"]
        headers["Origin"] = "https://other.example"
        assert (await server.http.options("/v1/models", headers=headers)).status_code == 400


LOAD = b'{"lora_name": "a", "lora_path": "nowhere"}'


def is_taken_for_json(status: int) -> bool:
    return status == 404  # there is no such adapter: the body has been read


async def test_json_needs_no_content_type_where_no_page_could_have_sent_it(server: Server) -> None:
    reply = await server.http.post("/v1/load_lora_adapter", content=LOAD)
    assert "content-type" not in reply.request.headers
    assert is_taken_for_json(reply.status_code)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://127.0.0.1:8080"},
        {"Referer": "http://elsewhere/"},
        {"Cookie": "a=b"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
    ],
    ids=str,
)
async def test_what_a_page_could_send_unasked_is_refused(server: Server, headers: dict[str, str]) -> None:
    reply = await server.http.post("/v1/load_lora_adapter", content=LOAD, headers=headers)
    assert (reply.status_code, "Content-Type must be application/json" in reply.text) == (400, True)


class TestWithAKey:
    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {"api_key": "secret"}

    @pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
    async def test_any_content_type_will_do(self, server: Server, kind: str) -> None:
        headers = {"Authorization": "Bearer secret", **({"Content-Type": kind} if kind else {})}
        reply = await server.http.post("/v1/load_lora_adapter", content=LOAD, headers=headers)
        assert is_taken_for_json(reply.status_code)

    async def test_pings_need_no_key(self, server: Server) -> None:
        assert (await server.http.get("/ping")).status_code == 200
        assert (await server.http.get("/version")).status_code == 401


async def test_pings_and_versions(server: Server) -> None:
    assert (await server.http.get("/version")).json() == {"version": __version__}
    assert [(await server.http.request(m, "/ping")).status_code for m in ("GET", "POST")] == [200, 200]
    server.engine.died.set()
    assert [(await server.http.request(m, "/ping")).status_code for m in ("GET", "POST")] == [503, 503]


async def test_what_curl_sends_with_d_is_json_all_the_same(server: Server) -> None:
    headers = {
        "User-Agent": "curl/8.5.0",
        "Accept": "*/*",
        "Content-Type": "application/x-www-form-urlencoded",
    }
    for path, body in (
        ("/v1/completions", b'{"prompt": "hi"}'),
        ("/generate", b'{"inputs": "hi"}'),
        ("/tokenize", b'{"prompt": "hi"}'),
    ):
        reply = await server.http.post(path, content=body, headers=headers)
        assert reply.status_code == 200, reply.text
