"""What the router reads: settings, request bodies, servers' reports, adapter files."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.fakes import vllm_metrics
from toppings.cluster.report import read_report
from toppings.cluster.router.calls import parse_call
from toppings.cluster.router.directory import AdapterDirectory, AdapterInfo, read_adapter_info
from toppings.cluster.router.metrics_text import translate_metrics
from toppings.cluster.router.replies import ApiError
from toppings.cluster.router.settings import InstanceConfig, RouterConfig
from toppings.config import ConfigError


def parse(path: str, body: dict[str, Any]) -> Any:
    return parse_call(path, json.dumps(body).encode(), 4.0)


@pytest.mark.parametrize(
    ("prompt", "tokens"), [("x" * 398, 100), ([1, 2, 3], 3), (["x" * 197, "y" * 196], 100), ("", 1)]
)
def test_prompt_tokens_are_counted_or_estimated(prompt: object, tokens: int) -> None:
    assert parse("/v1/completions", {"prompt": prompt}).prompt_tokens == pytest.approx(tokens, abs=1)


def test_completion_defaults_to_sixteen_tokens_and_chat_to_no_limit() -> None:
    assert parse("/v1/completions", {"prompt": "x"}).max_tokens == 16
    assert parse("/v1/chat/completions", {"messages": []}).max_tokens is None
    assert parse("/v1/chat/completions", {"messages": [], "max_completion_tokens": 9}).max_tokens == 9


@pytest.mark.parametrize(
    ("path", "field"), [("/v1/embeddings", "input"), ("/score", "text_2"), ("/v1/score", "text_2")]
)
def test_what_is_pooled_counts_as_a_prompt_after_which_little_comes(path: str, field: str) -> None:
    call = parse(path, {"model": "a", field: ["x" * 197, "y" * 196]})
    assert (call.model, call.max_tokens) == ("a", 1)
    assert call.prompt_tokens == pytest.approx(100, abs=1)


@pytest.mark.parametrize(
    ("selector", "model"),
    [
        ({"lora_id": 3}, "3"),
        ({"lora_dir": "/a/b"}, "/a/b"),
        ({"parameters": {"adapter_id": "x"}}, "x"),
        ({"parameters": {"adapter_id": "__base_model__"}}, None),
        ({}, None),
    ],
)
def test_generate_selects_its_adapter_in_any_dialect(selector: dict[str, Any], model: str | None) -> None:
    assert parse("/generate", {"inputs": "x", "parameters": {}, **selector}).model == model


def test_field_of_a_wrong_type_is_left_to_the_server() -> None:
    assert parse("/v1/completions", {"prompt": "x", "model": ["a"]}).model is None


def test_body_that_is_no_json_is_refused() -> None:
    with pytest.raises(ApiError, match="JSON is malformed"):
        parse_call("/v1/completions", b"{x", 4.0)


def test_vllm_metrics_are_read() -> None:
    report = translate_metrics(vllm_metrics(3, ["a", "b"], ("c",)))
    assert report is not None
    assert report.num_requests == 3
    assert (report.kv_tokens_total, report.kv_tokens_used) == (6400.0, 1600.0)
    assert report.max_adapters == 4
    assert report.on_device == {"a", "b"}  # of the newest series only
    assert report.in_use == {"a", "b", "c"}
    assert report.ranks is None


def test_metrics_of_another_kind_are_no_report() -> None:
    assert translate_metrics('# HELP up x\nprocess_cpu_seconds_total 3\nvllm:other{a="b"} 1\n') is None


def test_broken_metric_lines_are_passed_over() -> None:
    report = translate_metrics(
        "vllm:num_requests_running NaN\nvllm:num_requests_waiting 2\nvllm:kv_cache_usage_p"
    )
    assert report is not None
    assert report.num_requests == 2
    assert report.kv_tokens_total is None


STATS = {
    **{"num_running": 2, "num_waiting": 1, "running_ranks": [8, 64], "waiting_ranks": [64]},
    **{"kv_tokens_total": 1600.0, "kv_tokens_used": 160.0, "kv_pages_total": 100, "page_size": 16},
    **{"max_lora": 4, "model": "base", "mode": "pipelined", "num_open": 3},
    **{"on_device": ["a"], "on_host": ["a", "b"]},
}


def test_toppings_stats_are_read() -> None:
    report = read_report(json.dumps(STATS).encode())
    assert report.ranks == {8: 1, 64: 2}
    assert (report.kv_tokens_total, report.kv_tokens_used) == (1600.0, 160.0)
    assert (report.on_device, report.on_host) == ({"a"}, {"a", "b"})
    assert report.max_adapters == 4
    assert report.read_perf_model() is None


def test_perf_model_of_another_version_costs_no_report() -> None:
    report = read_report(json.dumps({**STATS, "perf_model": {"version": 99}}).encode())
    assert (report.read_perf_model(), report.num_requests) == (None, 3)


def test_other_stats_are_refused() -> None:
    with pytest.raises(ValueError, match="num_running"):
        read_report(b'{"num_requests": 3}')


def test_rank_is_the_largest_of_the_adapters_pattern(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "rank_pattern": {"q_proj": 32}}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 99)
    assert read_adapter_info(tmp_path) == AdapterInfo(32, 99)


@pytest.mark.parametrize("text", ["", "[]", '{"r": null}', '{"r": 8, "rank_pattern": 5}'])
def test_unreadable_adapter_config_tells_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    assert read_adapter_info(tmp_path) is None


async def test_an_adapters_rank_is_what_it_counts_for_in_a_step() -> None:
    directory = AdapterDirectory(default_rank=16)
    await directory.learn_list(
        b'[{"name": "a", "rank": 8, "step_rank": 40, "bytes": 9}, {"name": "b", "rank": 8}]'
    )
    assert [directory.get(name).rank for name in "ab"] == [40, 8]


async def test_rank_nobody_tells_is_the_default() -> None:
    directory = AdapterDirectory(default_rank=16)
    await directory.learn_list(
        b'{"adapters": [{"name": "a", "rank": 64, "bytes": 9}, {"name": "b"}, "junk"]}'
    )
    assert directory.get("a") == AdapterInfo(64, 9)
    assert directory.get("b") == AdapterInfo(16, 0)


def test_yaml_settings_are_read(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text(
        "policy: dlora\nslo-tpt-ms: 50\nmax_body_bytes: 1MiB\n"
        "instances:\n- http://a:1/\n- {url: 'http://b:2', id: b, perf_model: published}\n"
    )
    config = RouterConfig.from_yaml(file)
    assert (config.policy, config.slo_tpt_ms, config.max_body_bytes) == ("dlora", 50.0, 2**20)
    assert config.instances == (
        InstanceConfig(url="http://a:1", instance_id="a:1"),
        InstanceConfig(url="http://b:2", instance_id="b", perf_model="published"),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"polcy": "random"}, "unknown setting 'polcy'; did you mean policy"),
        ({"qqq": "random"}, "unknown setting 'qqq'; known: admin_timeout_s, "),
        ({"policy": "best"}, "policy is 'best'; choose one of rank_aware"),
        ({"slo_tpt_ms": 0}, "slo_tpt_ms is 0.0; it must be above 0"),
        ({"port": 70000}, "port is 70000"),
        ({"port": "x"}, "setting port is 'x'; it must be of type int"),
        ({"instances": ["localhost:8080"]}, "instance url is 'localhost:8080'"),
        ({"instances": "http://a:1,http://a:1"}, "two instances have the id 'a:1'"),
        ({"instances": [{"url": "http://a", "ID": 1}]}, "unknown instance setting 'ID'"),
        ({"instances": 3}, "setting instances is 3"),
        ({"perf_model": "nowhere"}, "cannot read performance model 'nowhere'"),
    ],
)
def test_bad_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouterConfig.from_settings(settings)
