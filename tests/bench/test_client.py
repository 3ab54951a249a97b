import asyncio
import socket

import pytest

from tests.bench.fake_server import Script, serving
from tests.waiting import PATIENCE_S, first_good
from toppings.lab.http.apis import APIS, CompletionsApi
from toppings.lab.http.client import LoadClient
from toppings.lab.outcome import Outcome, PlannedCall


async def _send(
    url: str, call: PlannedCall, *, api: str = "completions", timeout_s: float = PATIENCE_S
) -> Outcome:
    async with LoadClient(url, APIS[api](ignores_eos=True), timeout_s=timeout_s) as client:
        return await client.send(call)


def _sent(
    call: PlannedCall,
    script: Script | None = None,
    *,
    api: str = "completions",
    timeout_s: float = PATIENCE_S,
) -> Outcome:
    with serving(script or Script()) as url:
        return asyncio.run(_send(url, call, api=api, timeout_s=timeout_s))


def test_ttft_is_the_time_of_the_first_token_and_e2e_of_the_last() -> None:
    def take() -> Outcome:
        outcome = _sent(PlannedCall("a", [5], 3), Script(first_token_s=0.1, token_s=0.5))
        assert outcome.error is None
        assert outcome.ttft_ms is not None
        assert outcome.ttft_ms >= 100
        assert outcome.e2e_ms >= 1100
        return outcome

    def has_tokens_after_the_first(outcome: Outcome) -> bool:
        """On a busy machine all may come at once."""
        return outcome.ttft_ms is not None and outcome.ttft_ms <= outcome.e2e_ms - 100

    assert has_tokens_after_the_first(first_good(take, has_tokens_after_the_first))


def test_tpt_is_e2e_over_the_tokens_that_usage_counts() -> None:
    outcome = _sent(PlannedCall("a", [5, 6], 4))
    assert (outcome.num_tokens, outcome.num_prompt_tokens) == (4, 2)
    assert outcome.tpt_ms == outcome.e2e_ms / 4


def test_without_usage_events_are_counted() -> None:
    outcome = _sent(PlannedCall("a", [5], 4), Script(has_usage=False))
    assert (outcome.num_tokens, outcome.num_prompt_tokens) == (4, None)


def test_the_body_asks_for_the_adapter_greedily_and_to_the_end() -> None:
    script = Script()
    _sent(PlannedCall("b", [5, 6], 4), script)
    [body] = script.bodies
    assert body["model"] == "b"
    assert body["prompt"] == [5, 6]
    assert (body["max_tokens"], body["temperature"], body["ignore_eos"]) == (4, 0.0, True)


def test_the_generate_api_selects_by_lora_dir_and_counts_events() -> None:
    script = Script()
    outcome = _sent(PlannedCall("b", "some words", 3), script, api="generate")
    assert (outcome.error, outcome.num_tokens) == (None, 3)
    assert script.bodies[0]["lora_dir"] == "b"
    assert script.bodies[0]["parameters"] == {"max_new_tokens": 3, "ignore_eos": True}


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ("refused", "HTTP 404: no such model"),
        ("cut", "the stream ended early, after 1 tokens"),
        ("failed", "the engine has died"),
        ("garbled", "an event that is not understood"),
    ],
)
def test_what_goes_wrong_is_an_outcome_with_the_reason(adapter: str, reason: str) -> None:
    outcome = _sent(PlannedCall(adapter, [5], 4))
    assert outcome.error is not None
    assert reason in outcome.error
    assert outcome.tpt_ms is None


def test_an_error_event_of_the_generate_api_is_an_error() -> None:
    assert _sent(PlannedCall("failed", "x", 4), api="generate").error == "the engine has died"


def test_a_request_that_hangs_ends_at_the_timeout() -> None:
    assert _sent(PlannedCall("hangs", [5], 4), timeout_s=0.3).error == "no whole answer within 0.3 s"


def test_nobody_listening_is_an_error() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        outcome = asyncio.run(_send(url, PlannedCall("a", [5], 4)))
    assert outcome.error is not None
    assert "Cannot connect" in outcome.error


def test_the_key_is_sent() -> None:
    async def send(url: str) -> None:
        async with LoadClient(url, CompletionsApi(ignores_eos=True), api_key="secret") as client:
            await client.send(PlannedCall("a", [5], 1))

    script = Script()
    with serving(script) as url:
        asyncio.run(send(url))
    assert script.keys == ["Bearer secret"]


def test_a_url_without_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="url is 'localhost:1'; it must start with http"):
        LoadClient("localhost:1", CompletionsApi(ignores_eos=True))
