"""What checkpoints say of chats and of sampling is heeded: templates, names, special tokens, defaults."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from tests.sandbox.jobs import end_jobs
from tests.server.conftest import Server
from tests.waiting import PATIENCE_S
from toppings import chat_template
from toppings.adapters import peft_matches
from toppings.sandbox import pool

OWN = (
    "{% for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}] "
    "{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[bot]{% endif %}"
)
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CHAT = [{"role": "user", "content": "hi"}]


def make_adapter(server: Server, tmp_path: Path, name: str, template: str) -> None:
    source = Path(server.state.config.server.adapters) / "adapter-00000"
    shutil.copytree(source, tmp_path / name)
    (tmp_path / name / "chat_template.jinja").write_text(template)
    server.registry.register(name, tmp_path / name)


async def prompt_of(server: Server, **body: object) -> str:
    reply = await server.post("/v1/chat/completions", **{"messages": CHAT, "max_tokens": 1, **body})
    assert reply.status_code == 200, reply.text
    return server.state.text.decode(server.engine.calls[-1].prompt_token_ids, skip_special_tokens=False)


async def test_an_adapters_own_chat_template_is_used(server: Server, tmp_path: Path) -> None:
    make_adapter(server, tmp_path, "own", OWN)
    assert await prompt_of(server, model="own") == "[user] hi\n[bot]"
    assert await prompt_of(server, model="base") == "<|begin|><|turn|>user\nhi<|end|><|turn|>assistant\n"


async def test_a_template_is_the_registered_ones_whatever_becomes_of_its_file(
    server: Server, tmp_path: Path
) -> None:
    make_adapter(server, tmp_path, "own", OWN)
    shutil.rmtree(tmp_path / "own")
    assert await prompt_of(server, model="own") == "[user] hi\n[bot]"


async def test_a_reloaded_adapter_has_its_new_template(server: Server, tmp_path: Path) -> None:
    make_adapter(server, tmp_path, "own", OWN)
    await prompt_of(server, model="own")
    (tmp_path / "own" / "chat_template.jinja").write_text("new {{ messages[0].content }}")
    server.registry.register("own", tmp_path / "own", replace=True)
    assert await prompt_of(server, model="own") == "new hi"


async def test_a_name_reaches_the_template(server: Server, tmp_path: Path) -> None:
    make_adapter(server, tmp_path, "own", OWN)
    named = [{**CHAT[0], "name": "ada"}]
    assert await prompt_of(server, model="own", messages=named) == "[user ada] hi\n[bot]"


async def test_special_tokens_are_added_to_a_chat_when_asked_for(server: Server, tmp_path: Path) -> None:
    make_adapter(server, tmp_path, "own", OWN)
    plain = await prompt_of(server, model="own")
    assert await prompt_of(server, model="own", add_special_tokens=False) == plain
    special = server.state.text.decode(server.state.text.encode(plain), skip_special_tokens=False)
    assert await prompt_of(server, model="own", add_special_tokens=True) == special


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ENDLESS, "longer than 0.2 s"),
        ("{{ 'a' * 10**10 }}", "memory"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('only poems') }}", "only poems"),
    ],
)
async def test_a_template_that_fails_is_a_400_that_names_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, reason: str
) -> None:
    monkeypatch.setattr(chat_template, "RENDER_CPU_S", 0.2)
    make_adapter(server, tmp_path, "own", template)
    reply = await server.post("/v1/chat/completions", model="own", messages=CHAT)
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert message.startswith("the chat template of adapter 'own' refuses")
    assert reason in message


async def test_others_chat_while_an_adapters_template_runs(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "RENDER_CPU_S", PATIENCE_S)
    monkeypatch.setattr(pool, "TURN_TIMEOUT_S", PATIENCE_S)
    make_adapter(server, tmp_path, "slow", ENDLESS)
    await prompt_of(server)  # a process has started
    slow = [
        asyncio.create_task(server.post("/v1/chat/completions", model="slow", messages=CHAT))
        for _ in range(2)
    ]
    await asyncio.sleep(0.1)
    assert await prompt_of(server)
    assert not any(task.done() for task in slow)
    await end_jobs(slow)
    assert {(await task).status_code for task in slow} <= {400, 503}  # 503: no turn in time


class TestDefaults:
    @pytest.fixture(params=["auto", "none"])
    def settings(self, request: pytest.FixtureRequest, tmp_path: Path, model_dir: Path) -> dict[str, object]:
        shutil.copytree(model_dir, tmp_path / "model" / "base")
        fields = {"do_sample": True, "temperature": 0.6, "top_k": 20, "max_new_tokens": 7, "top_p": None}
        (tmp_path / "model" / "base" / "generation_config.json").write_text(json.dumps(fields))
        return {"model": str(tmp_path / "model" / "base"), "generation_config": request.param}

    async def test_the_models_defaults_are_for_what_a_request_leaves_out(self, server: Server) -> None:
        is_on = server.state.config.engine.generation_config == "auto"
        await server.post("/v1/completions", prompt="hi")
        sampling = server.engine.calls[-1].sampling
        expected = (0.6, 20, 7) if is_on else (1.0, 0, 16)
        assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == expected
        assert sampling.top_p == 1.0

    async def test_what_a_request_says_counts(self, server: Server) -> None:
        await server.post("/v1/completions", prompt="hi", temperature=0, top_k=-1, max_tokens=9)
        sampling = server.engine.calls[-1].sampling
        assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0, 0, 9)

    async def test_lightllm_requests_leave_them_to_the_model_too(self, server: Server) -> None:
        is_on = server.state.config.engine.generation_config == "auto"
        bodies: list[dict[str, object]] = [{}, {"do_sample": True, "top_k": -1}, {"do_sample": False}]
        for parameters in bodies:
            reply = await server.post("/generate", inputs="hi", parameters=parameters, lora_dir=None)
            assert reply.status_code == 200, reply.text
        told = [
            (c.sampling.temperature, c.sampling.top_k, c.sampling.max_tokens) for c in server.engine.calls
        ]
        assert told == (
            [(0.6, 20, 16), (0.6, 0, 16), (0, 20, 16)] if is_on else [(0, 0, 16), (1, 0, 16), (0, 0, 16)]
        )

    async def test_lorax_requests_are_greedy_unless_they_ask_for_more(self, server: Server) -> None:
        for parameters in ({}, {"do_sample": True}, {"top_p": 0.5}):
            await server.post("/generate", inputs="hi", parameters=parameters)
        told = [
            (c.sampling.temperature, c.sampling.top_k, c.sampling.max_tokens) for c in server.engine.calls
        ]
        assert told == [(0, 0, 20), (1, 0, 20), (1, 0, 20)]

    async def test_a_chats_length_is_the_models_by_default(self, server: Server) -> None:
        await server.post("/v1/chat/completions", messages=CHAT)
        is_on = server.state.config.engine.generation_config == "auto"
        assert (server.engine.calls[-1].sampling.max_tokens == 7) is is_on


class TestPatterns:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> dict[str, object]:
        return {"adapter_roots": [str(tmp_path)]}

    async def test_others_are_answered_while_a_pattern_backtracks(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(peft_matches, "PATTERN_CPU_S", PATIENCE_S)
        shutil.copytree(Path(server.state.config.server.adapters) / "adapter-00000", tmp_path / "bad")
        file = tmp_path / "bad" / "adapter_config.json"
        fields = {**json.loads(file.read_text()), "target_modules": r"(?:(?:\w+\.?)+)+!"}
        file.write_text(json.dumps(fields))
        body = {"lora_name": "bad", "lora_path": str(tmp_path / "bad")}
        loading = asyncio.create_task(server.post("/v1/load_lora_adapter", **body))
        await asyncio.sleep(0.1)
        assert (await server.complete(max_tokens=1)).status_code == 200
        assert not loading.done()
        await end_jobs([loading])
        reply = await loading
        assert reply.status_code == 400
        assert "target_modules" in reply.json()["error"]["message"]
