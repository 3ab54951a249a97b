"""What clients are told of prompts, and how they change what may be drawn; the engine is a fake."""

import base64
import struct

import openai
import pytest

from tests.server.conftest import Server, events

PROMPT = [5, 6, 7]


async def test_echo_with_logprobs_tells_of_the_prompt_first(server: Server) -> None:
    """As lm-eval asks: token ids in, one token out, everything with its likeliest alternative."""
    body = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    reply = (await server.complete([PROMPT, [8]], **body)).json()
    first, second = reply["choices"]
    text = server.state.text
    told = first["logprobs"]
    assert told["tokens"] == [text.token_name(t) for t in (*PROMPT, PROMPT[0])]
    assert told["token_logprobs"] == [None, -6.0, -7.0, -0.5]
    assert told["top_logprobs"][:3] == [None, {text.token_name(7): -1.0}, {text.token_name(8): -1.0}]
    assert len(told["text_offset"]) == 4
    assert second["logprobs"]["token_logprobs"] == [None, -0.5]
    assert [reply["usage"][f"{kind}_tokens"] for kind in ("prompt", "completion", "total")] == [4, 2, 6]


async def test_offsets_point_into_the_text(server: Server) -> None:
    reply = await server.complete("héy", echo=True, logprobs=0, max_tokens=3, add_special_tokens=False)
    [choice] = reply.json()["choices"]
    told = choice["logprobs"]
    for name, start in zip(told["tokens"], told["text_offset"], strict=True):
        assert name.startswith("bytes:") or choice["text"][start : start + len(name)] == name
    assert told["top_logprobs"][1:] == [{}] * (len(told["tokens"]) - 1)


async def test_a_stream_tells_the_same(server: Server) -> None:
    body = {"echo": True, "logprobs": 2, "max_tokens": 3, "n": 2}
    whole = (await server.complete(PROMPT, **body)).json()["choices"]
    told: list[list[float | None]] = [[], []]
    offsets: list[list[int]] = [[], []]
    for chunk in events(await server.complete(PROMPT, **body, stream=True)):
        for choice in chunk["choices"]:
            told[choice["index"]] += choice["logprobs"]["token_logprobs"]
            offsets[choice["index"]] += choice["logprobs"]["text_offset"]
    assert told == [choice["logprobs"]["token_logprobs"] for choice in whole]
    assert offsets == [choice["logprobs"]["text_offset"] for choice in whole]


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_nothing_is_drawn_where_only_scores_are_asked_for(server: Server, logprobs: int | None) -> None:
    reply = await server.complete("ab", echo=True, max_tokens=0, logprobs=logprobs, add_special_tokens=False)
    body = reply.json()
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert (choice["logprobs"] is None) == (logprobs is None)
    assert body["usage"]["completion_tokens"] == 0
    assert (await server.complete(max_tokens=0)).status_code == 400


async def test_prompt_logprobs_have_vllms_form(server: Server) -> None:
    text = server.state.text
    expected = [
        None,
        *(
            {
                f"{t}": {"logprob": -float(t), "rank": 3, "decoded_token": text.token_text(t)},
                f"{t + 1}": {"logprob": -1.0, "rank": 1, "decoded_token": text.token_text(t + 1)},
            }
            for t in PROMPT[1:]
        ),
    ]
    reply = (await server.complete(PROMPT, prompt_logprobs=1, logprobs=0, echo=True, max_tokens=2)).json()
    assert reply["choices"][0]["prompt_logprobs"] == expected
    assert reply["choices"][0]["logprobs"]["top_logprobs"][1] == {}
    messages = [{"role": "user", "content": "hi"}]
    chat = (
        await server.post("/v1/chat/completions", messages=messages, prompt_logprobs=0, max_tokens=0)
    ).json()
    assert len(chat["prompt_logprobs"]) == len(server.engine.calls[-1].prompt_token_ids)
    assert chat["usage"]["completion_tokens"] == 0


async def test_what_changes_the_choice_reaches_the_engine(server: Server) -> None:
    fields = {"logit_bias": {"5": -100, "7": 2.5}, "allowed_token_ids": [5, 7], "bad_words": ["ab"]}
    assert (await server.complete(**fields)).status_code == 200
    sampling = server.engine.calls[0].sampling
    assert sampling.logit_bias == ((5, -100.0), (7, 2.5))
    assert sampling.allowed_token_ids == (5, 7)
    encode = server.state.text.encode
    assert tuple(encode("ab", add_special_tokens=False)) in sampling.bad_token_ids


@pytest.mark.parametrize("prompt", ["a b c d e f g h " * 20_000, [9] * 500])
async def test_a_long_prompt_keeps_its_end(server: Server, prompt: str | list[int]) -> None:
    for wanted, expected in ((3, 3), (-1, server.engine.info.max_model_len - 4)):
        reply = await server.complete(prompt, truncate_prompt_tokens=wanted, max_tokens=4, echo=True)
        assert reply.status_code == 200, reply.text
        kept = server.engine.calls[-1].prompt_token_ids
        assert len(kept) == expected
        if isinstance(prompt, str):
            whole = server.state.text._tokenizer.encode(prompt)
            assert kept == whole[-expected:]
        assert reply.json()["choices"][0]["text"].startswith(server.state.text.decode(kept))


async def test_the_best_of_several_are_told_best_first(server: Server) -> None:
    reply = (await server.complete(PROMPT, n=2, best_of=4, max_tokens=3)).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert len(server.engine.calls) == 4
    assert reply["choices"][0]["logprobs"] is None
    assert reply["usage"]["completion_tokens"] == 12


async def test_embeddings_have_openais_form(server: Server) -> None:
    reply = (await server.post("/v1/embeddings", input=[[5, 6], [7], [5, 6, 7]])).json()
    vectors = [each["embedding"] for each in reply["data"]]
    assert [vector.index(1.0) for vector in vectors] == [1, 0, 2]
    assert [each["index"] for each in reply["data"]] == [0, 1, 2]
    assert reply["usage"]["prompt_tokens"] == 6
    one = (await server.post("/v1/embeddings", input=[5, 6], encoding_format="base64", dimensions=8)).json()
    packed = base64.b64decode(one["data"][0]["embedding"])
    assert list(struct.unpack("<8f", packed)) == vectors[0]
    pooled = await server.post("/v1/embeddings", input="hello", pooling="mean")
    assert pooled.status_code == 200
    assert server.engine.calls[-1].sampling.pooling == "mean"


async def test_the_openai_package_reads_embeddings(server: Server, url: str) -> None:
    server.registry.register("a", server.state.config.server.adapters + "/adapter-00000")
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        reply = await client.embeddings.create(model="a", input=["hello", "you"])
    assert [len(each.embedding) for each in reply.data] == [8, 8]
    assert server.engine.calls[0].adapter_id is not None


async def test_scores_are_cosines(server: Server) -> None:
    body = {"text_1": "ab", "text_2": ["ab", "abc", "cd"], "add_special_tokens": False}
    for path in ("/score", "/v1/score"):
        reply = (await server.post(path, **body)).json()
        assert [each["score"] for each in reply["data"]] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/embeddings", {"input": []}, "input is an empty list"),
        ("/v1/embeddings", {"input": ["", "a"], "add_special_tokens": False}, "the prompt is empty"),
        ("/v1/embeddings", {"input": [512]}, "token id 512"),
        ("/v1/embeddings", {"input": [5] * 129}, "maximum context length is 128"),
        ("/v1/embeddings", {"input": "a", "dimensions": 4}, "dimensions is 4"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "pooling": "max"}, "pooling"),
        ("/v1/embeddings", {"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ("/v1/embeddings", {"input": ["a"] * 300}, "300 sequences"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1 holds 2 texts"),
        ("/score", {"text_1": [], "text_2": "a"}, "at least one text"),
    ],
)
async def test_what_cannot_be_pooled_is_refused_by_name(
    server: Server, path: str, body: dict[str, object], named: str
) -> None:
    reply = await server.post(path, **body)
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]
    assert not server.engine.calls
