"""Odd requests to the demo's server: each is answered, none harms another.

The bounds of time here are for any machine; `benchmarks/fuzz.py` has the promised ones, and more requests.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hostile.adapters import ADAPTER_KINDS
from hostile.fuzzing import (
    DEMO_OPTIONS,
    demo_workshop,
    fuzz_adapters,
    fuzz_requests,
    settle,
    warm,
)
from hostile.routes import known_routes
from hostile.served import Served, Usage
from hostile.shots import draw_shots

from tests.waiting import PATIENCE_S
from toppings.demo import demo_adapters_dir

NUM_REQUESTS = 800
LIMIT_S = HEALTH_S = PATIENCE_S
MAX_GROWTH_PERCENT = 15.0
OVER_HTTP = ADAPTER_KINDS[::12]


def test_what_there_was_none_of_and_is_now_has_grown() -> None:
    before = Usage(100, 0, 4, 0, 2, 1, {"engine": 100})
    grown = before.growth_percent(replace(before, rss_bytes=110, num_memfds=3))
    assert grown == {
        "rss_bytes": pytest.approx(10.0),
        "shared_bytes": 0.0,
        "num_fds": 0.0,
        "num_memfds": 100.0,
        "num_threads": 0.0,
        "num_processes": 0.0,
    }


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("roots")


@pytest.fixture(scope="module")
def served(roots: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("server")
    with Served(folder, *DEMO_OPTIONS, "--adapter-roots", str(roots)) as served:
        yield served


@pytest.fixture(scope="module")
def volley(served: Served) -> dict[str, Any]:
    """What became of the odd requests; `growth_percent` beside it."""
    warm(served)
    before = served.usage()
    result = fuzz_requests(served, NUM_REQUESTS, limit_s=LIMIT_S)
    return {**result, "growth_percent": before.growth_percent(settle(served))["rss_bytes"]}


def test_odd_requests_are_answered_in_time_and_never_with_a_bare_5xx(volley: dict[str, Any]) -> None:
    assert volley["failures"] == []
    assert volley["sent"] >= NUM_REQUESTS
    assert len(volley["statuses"]) >= 5


def test_health_answers_while_odd_requests_come(volley: dict[str, Any]) -> None:
    assert volley["health_refused"] == 0
    assert volley["health_ms"]["max"] < HEALTH_S * 1e3


def test_odd_requests_leave_no_memory_behind(volley: dict[str, Any]) -> None:
    assert volley["growth_percent"] < MAX_GROWTH_PERCENT


@pytest.mark.usefixtures("volley")
def test_every_place_in_the_queue_is_free_after_odd_requests(served: Served) -> None:
    stats = served.wait_until_idle()
    assert (stats["num_open"], stats["num_pending"]) == (0, 0)
    body = {"prompt": ["Hello."] * stats["max_queue"], "max_tokens": 1}
    status, content = served.ask("/v1/completions", body, timeout_s=PATIENCE_S)
    assert (status, len(content.get("choices", ()))) == (200, stats["max_queue"])


@pytest.mark.usefixtures("volley")
def test_every_model_is_served_after_odd_requests(served: Served) -> None:
    names = [card["id"] for card in served.ask("/v1/models")[1]["data"]]
    assert [served.complete(name)[0] for name in names] == [200] * len(names)


def test_bad_adapters_over_http_are_refused_with_a_reason_or_served(served: Served, roots: Path) -> None:
    result = fuzz_adapters(served, demo_workshop(), roots, OVER_HTTP, limit_s=LIMIT_S)
    assert result["failures"] == []
    assert result["refused"] + result["served"] == len(OVER_HTTP)
    assert result["health_ms"]["max"] < HEALTH_S * 1e3


def test_forced_calls_fit_their_tools(served: Served, roots: Path) -> None:
    """In the form of the adapter's own template, which is short, as this server's context is."""
    shutil.copytree(demo_adapters_dir() / "pirate", roots / "caller")
    told = "{{ messages[0].content }}{% for t in tools %} {{ t.function.name }}{% endfor %}"
    (roots / "caller" / "chat_template.jinja").write_text(told + "{# [TOOL_CALLS] #}")
    named = {"lora_name": "caller", "lora_path": str(roots / "caller")}
    assert served.ask("/v1/load_lora_adapter", named, timeout_s=PATIENCE_S)[0] == 200
    days = {"type": "integer", "minimum": 1, "maximum": 9}
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "K\u00f6ln"]}, "days": days},
        "required": ["city", "days"],
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("a", "b")]
    chat = [{"role": "user", "content": "Weather?"}]
    for choice in ("required", {"type": "function", "function": {"name": "b"}}):
        body = {"model": "caller", "messages": chat, "tools": tools, "tool_choice": choice, "n": 3}
        forced = {**body, "parallel_tool_calls": False, "max_tokens": 150}
        status, content = served.ask("/v1/chat/completions", forced, timeout_s=PATIENCE_S)
        assert status == 200, content
        for answer in content["choices"]:
            [call] = answer["message"]["tool_calls"]
            assert answer["finish_reason"] == "tool_calls"
            assert call["function"]["name"] in ("a", "b")[choice != "required" :]
            jsonschema.Draft202012Validator(schema).validate(json.loads(call["function"]["arguments"]))
    assert served.ask("/v1/unload_lora_adapter", {"lora_name": "caller"}, timeout_s=PATIENCE_S)[0] == 200


def test_a_seed_gives_the_same_requests(served: Served) -> None:
    routes = known_routes(served.ask("/openapi.json")[1])
    first, second, other = (
        [(shot.name, len(shot.wire())) for shot in draw_shots(routes, seed, 100)] for seed in (0, 0, 1)
    )
    assert first == second != other
