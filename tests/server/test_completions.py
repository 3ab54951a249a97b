import asyncio
import gc
from dataclasses import replace
from typing import Any

import pytest

from tests.server.conftest import Server, events


async def test_a_completion_has_the_usual_shape(server: Server) -> None:
    reply = (await server.complete("abc", max_tokens=3, add_special_tokens=False)).json()
    [choice] = reply["choices"]
    assert (reply["object"], reply["model"]) == ("text_completion", "base")
    assert choice == {
        "index": 0,
        "text": "abc",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert reply["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_prompts_and_choices_are_indexed_in_order(server: Server) -> None:
    reply = await server.complete(["abc", "xyz"], n=2, max_tokens=3, add_special_tokens=False)
    texts = [(c["index"], c["text"]) for c in reply.json()["choices"]]
    assert texts == [(0, "abc"), (1, "abc"), (2, "xyz"), (3, "xyz")]


@pytest.mark.parametrize("prompt", [[70, 71], [[70, 71]]])
async def test_token_ids_are_taken_as_they_are(server: Server, prompt: object) -> None:
    await server.complete(prompt)
    assert server.engine.calls[0].prompt_token_ids == [70, 71]


async def test_a_stream_adds_up_to_the_whole(server: Server) -> None:
    body = {"max_tokens": 7, "n": 2, "add_special_tokens": False}
    whole = (await server.complete(["héllo", "xyz"], **body)).json()
    options = {"include_usage": True}
    chunks = events(await server.complete(["héllo", "xyz"], stream=True, stream_options=options, **body))
    texts = ["", "", "", ""]
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert texts[0].startswith("hél")
    assert chunks[-1] == {**chunks[0], "choices": [], "usage": whole["usage"]}


async def test_a_stream_without_options_says_nothing_of_usage(server: Server) -> None:
    assert all("usage" not in chunk for chunk in events(await server.complete(stream=True)))


async def test_echo_puts_the_prompt_first(server: Server) -> None:
    reply = await server.complete("ab", echo=True, max_tokens=2, add_special_tokens=False)
    assert reply.json()["choices"][0]["text"] == "abab"


async def test_tokens_may_be_named_whose_logprobs_are_wanted(server: Server) -> None:
    body: dict[str, Any] = {"max_tokens": 2, "logprob_token_ids": [98, 5], "model": "base"}
    plain = (await server.complete("ab", **body)).json()["choices"][0]
    chat = [{"role": "user", "content": "hi"}]
    chatted = (await server.post("/v1/chat/completions", messages=chat, **body)).json()["choices"][0]
    assert len(plain["logprobs"]["tokens"]) == len(chatted["logprobs"]["content"]) == 2
    for call in server.engine.calls:
        assert (call.sampling.logprobs, call.sampling.logprob_token_ids) == (0, (98, 5))
    for wrong, reason in (([4096], "logprob_token_ids holds token id 4096"), ([1] * 129, "holds 129 ids")):
        refused = await server.complete("ab", logprob_token_ids=wrong)
        assert refused.status_code == 400
        assert reason in refused.json()["error"]["message"]


async def test_logprobs_have_texts_and_offsets(server: Server) -> None:
    reply = await server.complete("ab", logprobs=2, max_tokens=2, add_special_tokens=False)
    logprobs = reply.json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b"]
    assert logprobs["text_offset"] == [0, 1]
    assert logprobs["token_logprobs"] == [-0.5, -0.5]
    assert len(logprobs["top_logprobs"][0]) == 2


async def test_choices_of_a_seeded_request_have_seeds_of_their_own(server: Server) -> None:
    await server.complete(n=3, seed=7)
    assert sorted(call.sampling.seed or 0 for call in server.engine.calls) == [7, 8, 9]


async def test_sampling_fields_reach_the_engine(server: Server) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}
    await server.complete(**fields, ignore_eos=True, min_tokens=2, stop="x", stop_token_ids=[9])
    sampling = server.engine.calls[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert (sampling.ignore_eos, sampling.min_tokens) == (True, 2)
    assert (sampling.stop, sampling.stop_token_ids) == (("x",), (9,))


async def test_chat_has_the_usual_shape(server: Server) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "you"}]}
    ]
    reply = (await server.post("/v1/chat/completions", messages=messages, max_tokens=4)).json()
    assert reply["object"] == "chat.completion"
    assert reply["choices"][0]["message"]["role"] == "assistant"
    assert reply["usage"]["completion_tokens"] == 4
    prompt = server.state.text.decode(server.engine.calls[0].prompt_token_ids)
    assert "hi you" in prompt


async def test_chat_may_use_all_the_room_by_default(server: Server) -> None:
    reply = (await server.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])).json()
    assert reply["usage"]["total_tokens"] == server.engine.info.max_model_len


async def test_a_chat_stream_names_the_role_first(server: Server) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 3,
        "stream": True,
        "logprobs": True,
    }
    chunks = events(await server.post("/v1/chat/completions", **body, top_logprobs=1))
    first, second = (chunk["choices"][0] for chunk in chunks[:2])
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert second["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] == -0.5
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_an_answer_can_be_sent_back_as_a_message(server: Server) -> None:
    answer: dict[str, object] = {
        "role": "assistant",
        "content": "yes",
        "refusal": None,
        "tool_calls": [],
        "function_call": None,
    }
    messages = [{"role": "user", "content": "hi"}, answer, {"role": "user", "content": "so?"}]
    reply = await server.post("/v1/chat/completions", messages=messages, max_tokens=1)
    assert reply.status_code == 200


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 4, "n": 5}, "best_of is 4; it must be at least n, 5"),
        ({"best_of": 4, "stream": True}, "best_of is 4"),
        ({"logit_bias": {"five": 1}}, "logit_bias has the key 'five'"),
        ({"logit_bias": {"5": 101}}, "logit_bias of token 5 is 101"),
        ({"logit_bias": {"512": 1}}, "logit_bias holds token id 512"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias names a token id twice"),
        ({"logit_bias": {f"{i}": 1 for i in range(1025)}}, "logit_bias"),
        ({"allowed_token_ids": [5] * 65537}, "allowed_token_ids holds 65537 ids"),
        ({"allowed_token_ids": [5, -1]}, "allowed_token_ids holds an id that is -1"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [512]}, "allowed_token_ids holds token id 512"),
        ({"allowed_token_ids": [5], "guided_regex": "a+"}, "allowed_token_ids and structure"),
        ({"bad_words": [" "]}, "bad_words holds ' '"),
        ({"bad_words": ["x"] * 257}, "bad_words holds 257 words"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs is not allowed with stream"),
        ({"prompt": [[5] * 100] * 250, "prompt_logprobs": 20}, "525000 log-probabilities of prompts"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0"),
        ({"truncate_prompt_tokens": 129}, "truncate_prompt_tokens is 129"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p is 0"),
        ({"logprobs": 99}, "logprobs is 99"),
        ({"n": 0}, "body.n"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"stop": [""]}, "stop holds an empty string"),
        ({"stop_token_ids": [100000]}, "100000"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": []}, "empty"),
        ({"prompt": [512]}, "token id 512"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": 5}, "body.prompt"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"n": 300}, "300 sequences"),
    ],
)
async def test_a_bad_completion_is_refused_by_name(
    server: Server, body: dict[str, object], named: str
) -> None:
    reply = await server.post("/v1/completions", **{"prompt": "hi", **body})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, 400)
    assert named in error["message"]
    assert not server.engine.calls


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"messages": []}, "body.messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "type"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
async def test_a_bad_chat_is_refused_by_name(server: Server, body: dict[str, object], named: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    reply = await server.post("/v1/chat/completions", **{"messages": messages, **body})
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]


async def test_fields_that_ask_for_nothing_are_accepted(server: Server) -> None:
    body = {"user": "me", "best_of": 1, "suffix": None, "logit_bias": {}, "metadata": {"a": "b"}, "top_k": -1}
    assert (await server.complete(**body)).status_code == 200


async def test_an_engine_error_before_the_first_token_has_its_own_status(server: Server) -> None:
    server.engine.error = "the weights are gone"
    for stream in (False, True):
        reply = await server.complete(stream=stream)
        assert reply.status_code == 500
        assert "weights are gone" in reply.json()["error"]["message"]


async def test_an_error_in_mid_stream_is_one_event(server: Server) -> None:
    task = asyncio.create_task(server.complete(stream=True, max_tokens=50))
    server.engine.delay_s = 0.01
    while not (server.engine.calls and server.engine.calls[0].num_sent > 2):
        await asyncio.sleep(0.001)
    server.engine.died.set()
    chunks = events(await task)
    assert [("error" in chunk) for chunk in chunks][-2:] == [False, True]


async def test_every_open_request_hears_of_the_engines_death(server: Server) -> None:
    server.engine.gate.clear()
    tasks = [asyncio.create_task(server.complete(stream=bool(i % 2))) for i in range(4)]
    while len(server.engine.calls) < 4:
        await asyncio.sleep(0.001)
    server.engine.died.set()
    replies = await asyncio.gather(*tasks)
    assert [r.status_code for r in replies] == [503] * 4
    assert all(r.json()["error"]["type"] == "EngineDeadError" for r in replies)
    assert (await server.http.get("/health")).status_code == 503


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/json"]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
async def test_json_is_read_whatever_its_content_type(server: Server, path: str, kind: str | None) -> None:
    body = {
        "/v1/completions": b'{"prompt": "hi"}',
        "/v1/chat/completions": b'{"messages": [{"role": "user", "content": "hi"}]}',
        "/generate": b'{"inputs": "hi", "parameters": {}}',
    }[path]
    headers = {} if kind is None else {"content-type": kind}
    assert (await server.http.post(path, content=body, headers=headers)).status_code == 200


async def test_an_assistant_may_have_said_nothing(server: Server) -> None:
    said: list[dict[str, object]] = [{"role": "assistant", "content": None}, {"role": "assistant"}]
    for message in said:
        messages = [{"role": "user", "content": "hi"}, message, {"role": "user", "content": "so?"}]
        reply = await server.post("/v1/chat/completions", messages=messages, max_tokens=1)
        assert reply.status_code == 200


@pytest.mark.parametrize("message", [{"role": "user", "content": None}, {"role": "system"}])
async def test_others_may_not(server: Server, message: dict[str, object]) -> None:
    reply = await server.post("/v1/chat/completions", messages=[message])
    assert (reply.status_code, "content is needed" in reply.text) == (400, True)


async def test_tools_that_are_not_to_be_used_are_accepted(server: Server) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for body in (
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"functions": [{"name": "f"}], "function_call": "none"},
    ):
        reply = await server.post("/v1/chat/completions", messages=messages, max_tokens=1, **body)
        assert reply.status_code == 200
        refused = await server.post(
            "/v1/chat/completions", messages=messages, **{n: v for n, v in body.items() if v != "none"}
        )
        assert refused.status_code == 400


async def test_tokens_that_are_parts_of_a_character_have_their_own_bytes_and_names(server: Server) -> None:
    """The tokeniser writes each byte as a token: an alternative of one is another byte."""
    reply = await server.complete("\u20ac", logprobs=2, max_tokens=3, add_special_tokens=False)
    logprobs = reply.json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2]
    for name, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]):
        assert top[name] == value
    assert logprobs["text_offset"] == [0, 1, 1]


async def test_chats_tokens_have_the_bytes_of_their_text(server: Server) -> None:
    server.engine.script = lambda call: server.state.text.encode("a\u20acb", add_special_tokens=False)
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 9,
    }
    reply = (await server.post("/v1/chat/completions", **body)).json()["choices"][0]
    content = reply["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).startswith("a\u20acb".encode())
    assert all(len({tuple(top["bytes"]) for top in token["top_logprobs"]}) == 2 for token in content)


async def test_alternatives_of_the_same_text_keep_names_of_their_own(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.state.text, "token_name", lambda token_id: "same")
    reply = await server.complete("a", logprobs=2, max_tokens=1, add_special_tokens=False)
    [top] = reply.json()["choices"][0]["logprobs"]["top_logprobs"]
    [chosen] = server.state.text.encode("a", add_special_tokens=False)
    assert top["same"] == -0.5
    assert [name.startswith("token_id:") for name in top] == [False, True]
    assert f"token_id:{chosen}" not in top


async def test_a_long_answer_is_written_in_parts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toppings.server.replies.PART_LEN", 2)
    monkeypatch.setattr("toppings.server.jobs.LONG_TEXT", 1)
    long = (await server.complete("hello", logprobs=2, max_tokens=7)).json()["choices"]
    monkeypatch.undo()
    assert long == (await server.complete("hello", logprobs=2, max_tokens=7)).json()["choices"]


async def test_a_place_that_is_never_entered_is_given_back(server: Server) -> None:
    """As where the answer to a request cannot even be begun."""
    for _ in range(3):
        server.state.lease(1)
    gc.collect()
    assert (server.state.num_open, server.state.num_waiting) == (0, 0)
    with server.state.lease(2):
        assert (server.state.num_open, server.state.num_waiting) == (1, 2)
    assert server.state.num_open == 0


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
async def test_usage_tells_what_of_each_prompt_was_cached(server: Server, route: str) -> None:
    """Once for all choices of a prompt: the others share what the first has computed."""
    server.engine.num_cached_tokens = 2
    messages = [{"role": "user", "content": "hello"}]
    prompts = {"prompt": ["abcd", "xyz"]} if route == "completions" else {"messages": messages}
    body = {"model": "base", "max_tokens": 3, "n": 3, "cache_salt": "mine", **prompts}
    url = f"/v1/{route}"
    whole = (await server.http.post(url, json=body)).json()["usage"]
    assert whole["prompt_tokens_details"] == {"cached_tokens": 2 * len(prompts.get("prompt", [0]))}
    assert {call.cache_salt for call in server.engine.calls} == {"mine"}
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = events(await server.http.post(url, json={**body, "stream": True, "stream_options": options}))
    assert stream[-1]["usage"] == whole
    whole.pop("completion_tokens_details", None)  # counted at the end alone
    assert stream[-2]["usage"] == whole


CHAT = [{"role": "user", "content": "a"}]
GENERATING: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 3},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 3},
    "/v1/responses": {"input": "a", "max_output_tokens": 3},
    "/v1/messages": {"model": "base", "messages": CHAT, "max_tokens": 3},
    "/v1/embeddings": {"input": "a"},
    "/v1/score": {"text_1": "a", "text_2": "a"},
    "/score": {"text_1": "a", "text_2": "a"},
    "/generate": {"inputs": "a", "parameters": {"max_new_tokens": 3}},
    "/generate_stream": {"inputs": "a", "parameters": {"max_new_tokens": 3}, "lora_dir": None},
}
"""Routes that make the engine compute, each with a body."""


@pytest.mark.parametrize("policy", ["fair", "priority"])
@pytest.mark.parametrize("route", GENERATING)
async def test_a_priority_goes_to_the_engine_where_the_policy_looks_at_it(
    server: Server, route: str, policy: str
) -> None:
    state = server.state
    state.config = replace(state.config, engine=replace(state.config.engine, scheduling_policy=policy))
    body = dict(GENERATING[route])
    if "parameters" in body:
        body["parameters"] = {**body["parameters"], "priority": -2}
    else:
        body["priority"] = -2
    reply = await server.http.post(route, json=body)
    if policy == "priority":
        assert reply.status_code == 200, reply.text
        assert [call.standing.priority for call in server.engine.calls] == [-2]
    else:
        assert reply.status_code in (400, 422)  # the latter is TGI's
        assert "scheduling_policy is 'fair'" in reply.text
        assert not server.engine.calls


@pytest.mark.parametrize("salt", ["", "x" * 1025, 7])
async def test_a_salt_that_is_none_is_refused_by_name(server: Server, salt: object) -> None:
    reply = await server.complete("abc", cache_salt=salt)
    assert reply.status_code == 400
    assert "cache_salt" in reply.json()["error"]["message"]
    assert not server.engine.calls
