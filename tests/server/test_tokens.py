"""`/tokenize` and `/detokenize` against the tokeniser and the chat template themselves."""

from typing import Any

import pytest

from tests.server.conftest import Server

MESSAGES = [{"role": "user", "content": "hello"}]


async def test_a_prompt_and_back(server: Server) -> None:
    text = server.state.text
    reply = (
        await server.post("/tokenize", model="base", prompt="hello there", return_token_strs=True)
    ).json()
    ids = text.encode("hello there")
    assert (reply["tokens"], reply["count"], reply["max_model_len"]) == (ids, len(ids), 128)
    assert reply["token_strs"] == text._tokenizer.convert_ids_to_tokens(ids)
    back = await server.post("/detokenize", tokens=[float(i) for i in ids])
    assert back.json() == {"prompt": text.decode(ids, skip_special_tokens=False)}
    bare = (await server.post("/tokenize", prompt="hello there", add_special_tokens=False)).json()
    assert bare["tokens"] == text.encode("hello there", add_special_tokens=False)
    assert bare["token_strs"] is None
    assert not server.engine.calls


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False}])
async def test_a_chat(server: Server, options: dict[str, Any]) -> None:
    reply = await server.post("/tokenize", messages=MESSAGES, **options)
    assert reply.json()["tokens"] == server.state.text.chat(MESSAGES, **options)


async def test_a_chat_counts_what_its_answer_is_charged_for(server: Server) -> None:
    counted = (await server.post("/tokenize", messages=MESSAGES)).json()["count"]
    answered = (await server.post("/v1/chat/completions", messages=MESSAGES, max_tokens=1)).json()
    assert answered["usage"]["prompt_tokens"] == counted


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "either prompt or messages"),
        ("/tokenize", {"prompt": 5}, "body.prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "pope", "content": "x"}]}, "messages.0.role"),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, "nobody"),
        ("/tokenize", {"prompt": "a", "mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
        ("/tokenize", {"prompt": "x" * 200_000}, "maximum context length"),
        ("/detokenize", {}, "body.tokens"),
        ("/detokenize", {"tokens": [512]}, "token id 512"),
        ("/detokenize", {"tokens": [-1]}, "token id -1"),
        ("/detokenize", {"tokens": [1.5]}, "body.tokens.0"),
        ("/detokenize", {"tokens": [1], "model": "nobody"}, "nobody"),
    ],
)
async def test_what_cannot_be_done_is_named(
    server: Server, path: str, body: dict[str, object], named: str
) -> None:
    reply = await server.post(path, **body)
    assert reply.status_code == (404 if named == "nobody" else 400)
    assert named in reply.json()["error"]["message"]


async def test_nothing_is_nothing(server: Server) -> None:
    assert (await server.post("/detokenize", tokens=[])).json() == {"prompt": ""}
    empty = await server.post("/tokenize", prompt="", add_special_tokens=False)
    assert (empty.status_code, empty.json()["tokens"]) == (200, [])
