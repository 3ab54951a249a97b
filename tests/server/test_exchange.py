"""What clients of today send beside what a route knows: fields of others, ids, numbers as floats."""

import logging

import httpx
import pytest

from tests.fakes import echo_script
from tests.server.conftest import Server, events
from toppings.exchanges.log_lines import NamingFormatter
from toppings.log_files import LOG_FORMAT
from toppings.request_ids import REQUEST_ID, VALID_ID
from toppings.server.exchange import MAX_NAMES_BYTES, MAX_WARNED, current_exchange

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
COMPLETION = {"prompt": "hello", "max_tokens": 2}
LORAX = {"inputs": "hello", "parameters": {"max_new_tokens": 2}}
LIGHTLLM = {**LORAX, "lora_dir": None}
IGNORED = "x-toppings-ignored"
BODIES = [
    ("/v1/completions", COMPLETION),
    ("/v1/chat/completions", CHAT),
    ("/generate", LORAX),
    ("/generate", LIGHTLLM),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_a_field_that_nobody_knows_is_told_of(
    server: Server, path: str, body: dict[str, object]
) -> None:
    known = await server.post(path, **body)
    reply = await server.post(path, **body, litellm_trace=1, another={"a": [1]})
    assert reply.status_code == 200
    assert reply.headers[IGNORED] == "litellm_trace, another"
    assert IGNORED not in known.headers
    assert server.engine.calls[0].sampling == server.engine.calls[1].sampling


async def test_fields_of_parts_are_told_of_too(server: Server) -> None:
    parameters = {"max_new_tokens": 2, "flavour": "sweet"}
    reply = await server.post("/generate", inputs="hello", parameters=parameters)
    assert (reply.status_code, reply.headers[IGNORED]) == (200, "flavour")
    options = {"include_usage": True, "colour": "red"}
    reply = await server.complete(stream=True, stream_options=options)
    assert (reply.status_code, reply.headers[IGNORED]) == (200, "colour")


async def test_an_answer_that_refuses_names_them_as_well(server: Server) -> None:
    reply = await server.complete(temperature=-1, flavour="sweet")
    assert (reply.status_code, reply.headers[IGNORED]) == (400, "flavour")


async def test_names_are_escaped_and_bounded(server: Server) -> None:
    reply = await server.complete(**{"a, b\r\nX-Evil: 1": 1, "\u00e9\U0001f600": 2, "x" * 100_000: 3})
    assert reply.status_code == 200
    assert "x-evil" not in reply.headers
    names = reply.headers[IGNORED].split(", ")
    assert names[:2] == ["a%2C%20b%0D%0AX-Evil%3A%201", "%C3%A9%F0%9F%98%80"]
    many = await server.complete(**{f"{i}{'y' * 60}": i for i in range(2000)})
    assert many.headers[IGNORED].endswith(", ...")
    assert len(many.headers[IGNORED]) < 2 * MAX_NAMES_BYTES


async def test_each_is_warned_of_once_and_so_many_at_most(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "toppings.server.exchange"):
        for _ in range(3):
            await server.complete(flavour="sweet")
        assert [record.getMessage().count("'flavour'") for record in caplog.records] == [1]
        for start in range(0, 2 * MAX_WARNED, 50):
            await server.complete(**{f"f{start + i}": 1 for i in range(50)})
    assert len(caplog.records) == MAX_WARNED


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**COMPLETION, "length_penalty": 3}),
        ("/v1/completions", {**COMPLETION, "use_beam_search": True}),
        ("/v1/completions", {**COMPLETION, "max_completion_tokens": 3}),
        ("/v1/chat/completions", {**CHAT, "lora_path": "a"}),
        ("/v1/responses", {"input": "hi", "max_tokens": 3}),
        ("/v1/responses", {"input": "hi", "logit_bias": {"5": 1}}),
        ("/v1/messages", {**CHAT, "model": "base", "min_tokens": 3}),
        ("/v1/messages", {**CHAT, "model": "base", "n": 2}),
        ("/generate", {**LORAX, "max_new_tokens": 3}),
        ("/generate", {**LIGHTLLM, "temperature": 0.5}),
        ("/generate", {**LORAX, "parameters": {"top_n_tokens": 3}}),
        ("/generate", {**LIGHTLLM, "parameters": {"regular_constraint": "a+"}}),
    ],
)
async def test_a_known_field_that_would_change_the_answer_is_refused(
    server: Server, path: str, body: dict[str, object]
) -> None:
    reply = await server.post(path, **body)
    assert reply.status_code in (400, 422)
    assert "is not supported; leave it out" in reply.text
    assert not server.engine.calls


class TestStrict:
    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {"strict_fields": "on"}

    @pytest.mark.parametrize(("path", "body"), BODIES)
    async def test_such_a_field_is_refused_by_name(
        self, server: Server, path: str, body: dict[str, object]
    ) -> None:
        assert (await server.post(path, **body)).status_code == 200
        reply = await server.post(path, **body, flavour="sweet")
        assert reply.status_code in (400, 422)
        assert "flavour is no field" in reply.text


async def test_administration_stays_strict(server: Server) -> None:
    reply = await server.post("/v1/load_lora_adapter", lora_name="a", lora_path="b", flavour="sweet")
    assert (reply.status_code, "body.flavour" in reply.text) == (400, True)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**COMPLETION, "max_tokens": 5.0, "top_k": 3.0, "n": 1.0, "logprobs": 2.0}),
        ("/v1/completions", {"prompt": [5.0, 6], "max_tokens": 5.0, "stop_token_ids": [3.0]}),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 5.0, "seed": 1.0}),
        ("/generate", {"inputs": "hello", "parameters": {"max_new_tokens": 5.0, "seed": 1.0}}),
        ("/generate", {"inputs": "hello", "lora_dir": None, "parameters": {"max_new_tokens": 5.0}}),
    ],
)
async def test_a_whole_number_may_be_written_as_a_fraction(
    server: Server, path: str, body: dict[str, object]
) -> None:
    assert (await server.post(path, **body)).status_code == 200
    [call] = server.engine.calls
    assert call.sampling.max_tokens == 5
    assert all(type(token) is int for token in call.prompt_token_ids)


@pytest.mark.parametrize("value", [5.5, 1e300, True, "5"])
@pytest.mark.parametrize("name", ["max_tokens", "n", "seed", "logprobs"])
async def test_what_is_no_whole_number_is_refused(server: Server, name: str, value: object) -> None:
    reply = await server.complete(**{name: value})
    assert (reply.status_code, name in reply.text) == (400, True)


@pytest.mark.parametrize("prompt", [[5.5], [1, 2.5], [[1.5]], [1e300]])
async def test_no_token_id_is_a_fraction(server: Server, prompt: object) -> None:
    assert (await server.complete(prompt)).status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hello", "max_tokens": 1000}),
        ("/v1/completions", {"prompt": "x " * 200}),
        ("/v1/completions", {"prompt": "x" * 200_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x " * 200}]}),
    ],
)
async def test_too_long_a_prompt_is_told_as_clients_know_it(
    server: Server, path: str, body: dict[str, object]
) -> None:
    reply = await server.post(path, **body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["message"].startswith("This model's maximum context length is 128 tokens. However, ")
    assert "Please reduce the length of the" in error["message"]
    assert not server.engine.calls


@pytest.mark.parametrize("given", ["abc-123", "A:b/c+d=e@f~g_h.i", "x" * 128])
async def test_a_clients_id_comes_back(server: Server, given: str) -> None:
    for path in ("/health", "/nowhere", "/v1/models"):
        reply = await server.http.get(path, headers={REQUEST_ID: given})
        assert reply.headers.get_list(REQUEST_ID) == [given]
    stream = await server.http.post(
        "/v1/completions", json={**COMPLETION, "stream": True}, headers={REQUEST_ID: given}
    )
    assert stream.headers[REQUEST_ID] == given


@pytest.mark.parametrize("given", [b"", b"a b", b"x" * 129, b"\xe9", b"a\tb", b'"quoted"', b"a,b"])
async def test_an_id_that_is_of_no_use_is_replaced(server: Server, given: bytes) -> None:
    ids = [
        (await server.http.get("/health", headers={REQUEST_ID.encode(): given})).headers[REQUEST_ID]
        for _ in range(2)
    ]
    assert ids[0] != ids[1]
    assert all(VALID_ID.fullmatch(each) for each in ids)


async def test_answers_to_what_went_wrong_have_an_id(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr(server.engine, "stats", fail)
    reply = await server.http.get("/stats", headers={REQUEST_ID: "mine"})
    assert (reply.status_code, reply.headers[REQUEST_ID]) == (500, "mine")


@pytest.mark.parametrize(("path", "body"), BODIES[:2])
async def test_token_ids_are_returned_where_they_are_asked_for(
    server: Server, path: str, body: dict[str, object]
) -> None:
    prompt = {"prompt": ["abc", "xyz"]} if "prompt" in body else {}
    asked = {**body, **prompt, "return_token_ids": True, "n": 2}
    whole = (await server.post(path, **asked)).json()
    chunks = events(await server.post(path, **asked, stream=True))
    calls = server.engine.calls[: len(whole["choices"])]
    for index, (choice, call) in enumerate(zip(whole["choices"], calls, strict=True)):
        parts = [each for chunk in chunks for each in chunk["choices"] if each["index"] == index]
        streamed = [token for part in parts for token in part.get("token_ids", [])]
        assert choice["token_ids"] == streamed == echo_script(call)[: call.num_sent]
        told = [x["prompt_token_ids"] for x in (choice, *parts) if x.get("prompt_token_ids") is not None]
        if "prompt" in body:
            assert told == [call.prompt_token_ids] * 2
    if "prompt" not in body:
        told = [each["prompt_token_ids"] for each in (whole, *chunks) if "prompt_token_ids" in each]
        assert told == [calls[0].prompt_token_ids] * 3  # whole, and with the first event of each choice
    plain = (await server.post(path, **body)).json()
    assert "token_ids" not in plain["choices"][0]


async def test_log_probabilities_may_name_tokens_by_their_ids(server: Server) -> None:
    options = {"return_tokens_as_token_ids": True, "max_tokens": 2}
    reply = (await server.complete([70, 71], logprobs=1, **options)).json()
    logprobs = reply["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:70", "token_id:71"]
    assert all(name.startswith("token_id:") for top in logprobs["top_logprobs"] for name in top)
    body = {**CHAT, **options, "logprobs": True, "top_logprobs": 1}
    content = (await server.post("/v1/chat/completions", **body)).json()["choices"][0]["logprobs"]["content"]
    for each in content:
        assert each["token"].startswith("token_id:")
        assert each["top_logprobs"][0]["token"].startswith("token_id:")


async def test_lines_of_the_log_name_their_request(server: Server) -> None:
    formatter = NamingFormatter(LOG_FORMAT, current_exchange.get)
    lines: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(formatter.format(record))

    handler = Keeping()
    logging.getLogger("toppings.server").addHandler(handler)
    try:
        body = {"prompt": "x", "odd": 1}
        await server.http.post("/v1/completions", json=body, headers={REQUEST_ID: "mine"})
        logging.getLogger("toppings.server.test").warning("of no request")
    finally:
        logging.getLogger("toppings.server").removeHandler(handler)
    assert [line.endswith("[request mine]") for line in lines] == [True, False]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**COMPLETION, "continue_final_message": False, "messages": None}),
        ("/v1/responses", {"input": "hi", "max_tokens": None, "n": 1, "logprobs": False}),
        ("/v1/messages", {**CHAT, "model": "base", "n": 1, "min_tokens": 0}),
        ("/v1/messages/count_tokens", {**CHAT, "model": "base", "stream": True}),
        ("/generate", {**LORAX, "max_new_tokens": None}),
    ],
)
async def test_a_known_field_that_asks_for_nothing_is_no_error(
    server: Server, path: str, body: dict[str, object]
) -> None:
    reply = await server.post(path, **body)
    assert reply.status_code == 200, reply.text
    assert IGNORED not in reply.headers


class TestBelowAPrefix:
    """As behind Ray Serve, whose `route_prefix` stands in every path."""

    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {"api_key": "root"}

    async def test_routes_are_what_they_are_elsewhere(self, server: Server) -> None:
        transport = httpx.ASGITransport(server.app, root_path="/below")
        async with httpx.AsyncClient(transport=transport, base_url="http://server/below") as http:
            assert (await http.get("/health")).status_code == 200
            assert (await http.get("/v1/models")).status_code == 401
            http.headers["Authorization"] = "Bearer root"
            assert (await http.get("/v1/models")).status_code == 200
            reply = await http.post("/v1/messages", json={}, headers={"X-Request-Id": "mine"})
            assert (reply.json()["type"], reply.json()["request_id"]) == ("error", "mine")
            assert "GET" in (await http.delete("/v1/models")).headers["Allow"]
