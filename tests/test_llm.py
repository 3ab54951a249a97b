"""`LLM`: the engine without HTTP, over the built-in demo."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import aclosing, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.waiting import PATIENCE_S
from tests.warm import WARM
from toppings import LLM, SamplingParams, Structure, StructureKind
from toppings.adapters.errors import AdapterExists, AdapterNotFound, StateHeldError
from toppings.bad_input import RequestError
from toppings.config import ConfigError, EngineConfig
from toppings.core import FinishReason
from toppings.demo import demo_adapters_dir
from toppings.detokenizer import GenerationError
from toppings.engine.base import hold_state
from toppings.engine.client import EngineDeadError
from toppings.engine.meeting_place import MeetingPlace

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(
        "demo", state_dir=str(tmp_path_factory.mktemp("state")), kv_cache_bytes="32MiB", num_threads=1
    ) as llm:
        for path in demo_adapters_dir().iterdir():
            llm.load_adapter(path.name, path)
        yield llm


def test_one_batch_gives_each_prompt_its_own_adapters_answer(llm: LLM) -> None:
    names = [None, *(record.name for record in llm.adapters())]
    answers = llm.generate(["Tell me about the sea."] * len(names), GREEDY, adapter=names)
    assert len({answer.text for answer in answers}) == len(names)
    alone = llm.generate("Tell me about the sea.", GREEDY, adapter=names[1])
    assert alone[0].text == answers[1].text


def test_a_stream_yields_the_text_of_generate(llm: LLM) -> None:
    async def stream() -> str:
        return "".join([output.text async for output in llm.stream("What is a river?", GREEDY)])

    assert asyncio.run(stream()) == llm.generate("What is a river?", GREEDY)[0].text


def test_outputs_are_held_to_a_structure(llm: LLM) -> None:
    def held(kind: StructureKind, text: str) -> str:
        params = SamplingParams(temperature=0.0, max_tokens=60, structure=Structure(kind, text))
        [answer] = llm.generate("What colour is the sea?", params, adapter="pirate")
        assert answer.finish_reason is FinishReason.STOP
        return answer.text

    assert held(StructureKind.CHOICE, '["blue", "green"]') in ("blue", "green")
    assert held(StructureKind.GRAMMAR, 'root ::= "sea " [0-9]').startswith("sea ")
    with pytest.raises(RequestError, match=r"the json_schema cannot be followed: .*uniqueItems"):
        held(StructureKind.JSON_SCHEMA, '{"type": "array", "uniqueItems": true}')


def test_streams_may_be_left_early(llm: LLM) -> None:
    async def first() -> str:
        async with aclosing(llm.stream("What is a river?", GREEDY)) as outputs:
            return (await anext(outputs)).text

    assert asyncio.run(first())


def test_token_ids_are_prompts_too(llm: LLM) -> None:
    token_ids = llm.text_model.encode("What is a river?")
    by_ids, by_text = llm.generate(token_ids, GREEDY), llm.generate("What is a river?", GREEDY)
    assert by_ids[0].token_ids == by_text[0].token_ids


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = llm.generate("Tell me about the sea.", GREEDY)[0].text
    stop = whole[5:9]
    cut = llm.generate(
        "Tell me about the sea.", SamplingParams(temperature=0.0, max_tokens=24, stop=(stop,))
    )[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason is FinishReason.STOP


def test_reloading_an_adapter_serves_the_new_weights(llm: LLM, tmp_path: Path) -> None:
    one, other = sorted(demo_adapters_dir().iterdir())[:2]
    llm.load_adapter("reloaded", one)
    before = llm.generate("Tell me about the sea.", GREEDY, adapter="reloaded")[0].text
    llm.load_adapter("reloaded", other, replace=True)
    after = llm.generate("Tell me about the sea.", GREEDY, adapter="reloaded")[0].text
    assert after == llm.generate("Tell me about the sea.", GREEDY, adapter=other.name)[0].text != before
    llm.unload_adapter("reloaded")
    with pytest.raises(AdapterNotFound):
        llm.generate("x", GREEDY, adapter="reloaded")


def test_an_adapter_that_is_registered_as_it_is_stays(llm: LLM, tmp_path: Path) -> None:
    """So a program runs a second time with what its first run has left."""
    one, other = sorted(demo_adapters_dir().iterdir())[:2]
    copy = shutil.copytree(one, tmp_path / "copy")
    first = llm.load_adapter("again", one)
    assert llm.load_adapter("again", one) == llm.load_adapter("again", copy) == first
    with pytest.raises(AdapterExists, match=r"other files \(.*replace=True"):
        llm.load_adapter("again", other)
    llm.unload_adapter("again")


def test_bad_input_is_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 adapters for 1 prompts"):
        llm.generate(["x"], adapter=["a", "b"])
    with pytest.raises(RequestError, match="0 tokens"):
        llm.generate([[]])
    with pytest.raises(ConfigError, match="colour"):
        LLM(colour="red")


@pytest.mark.parametrize("prompts", [b"hi", 5, None, [None], [b"hi"], {"a": 1}, [1.5], [[True]], [["a"]]])
def test_a_prompt_of_another_type_is_named(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError, match="it must be a text"):
        llm.generate(prompts, GREEDY)


def test_arrays_of_token_ids_are_prompts(llm: LLM) -> None:
    ids = llm.text_model.encode("What is a river?")
    array: Any = np.array(ids)
    expected = llm.generate(ids, GREEDY)
    assert llm.generate(array, GREEDY) == expected
    assert llm.generate([array], GREEDY) == expected


@pytest.mark.parametrize(
    ("named", "arguments"),
    [("sampling", {"sampling": {}}), ("adapter", {"adapter": 5}), ("adapter", {"adapter": [5]})],
)
def test_an_argument_of_another_type_is_named(llm: LLM, named: str, arguments: Any) -> None:
    with pytest.raises(RequestError, match=f"{named} is"):
        llm.generate("hi", **{"sampling": GREEDY, **arguments})


@pytest.mark.parametrize(
    "params",
    [
        *({"stop": [1]}, {"stop": "ab"}, {"stop": None}, {"stop_token_ids": None}, {"stop_token_ids": 3}),
        *({"ignore_eos": "no"}, {"structure": {"kind": "regex"}}),
    ],
)
def test_a_sampling_parameter_of_another_type_is_named(params: Any) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(params))} (is|holds)"):
        SamplingParams(**params)


def test_tokens_outside_the_vocabulary_are_named_and_hurt_nobody(llm: LLM) -> None:
    with pytest.raises(GenerationError, match="token id 1000000"):
        llm.generate([[5, 1_000_000]], GREEDY)
    assert llm.generate("Tell me about the sea.", GREEDY)[0].text


DYING = """
import os
import shutil
from toppings import LLM
from toppings.engine.client import EngineClient

EngineClient.start = lambda config: os.kill(os.getpid(), 9)
LLM("demo", num_threads=1)
"""


def test_an_llm_that_is_killed_leaves_no_state_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its state in the temporary folder where the default one is held."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as folder,  # a short path, as such folders have
        closing(hold_state(EngineConfig(model="demo", num_threads=1), "another")),
    ):
        monkeypatch.setattr(tempfile, "tempdir", folder)
        environment = {**os.environ, WARM: "0", "TMPDIR": folder, "PYTHONPATH": os.pathsep.join(sys.path)}
        died = subprocess.run(
            [sys.executable, "-c", DYING], env=environment, capture_output=True, check=False
        )
        assert died.returncode == -signal.SIGKILL, died.stderr.decode()
        (left,) = Path(folder).iterdir()
        assert list(left.glob("registry*"))
        MeetingPlace.make("any").close()  # the next start of a server or an LLM
        assert not list(Path(folder).iterdir())


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_an_engine_that_is_gone_ends_calls_and_close(tmp_path: Path, number: signal.Signals) -> None:
    llm = LLM(
        "demo", state_dir=str(tmp_path), kv_cache_bytes="32MiB", num_threads=1, heartbeat_timeout_s=60.0
    )
    endless = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    failures: list[BaseException] = []

    def call() -> None:
        try:
            llm.generate("Tell me about the sea.", endless)
        except EngineDeadError as error:
            failures.append(error)

    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    pid = llm._client._life._process.pulse.pid  # type: ignore[union-attr]
    assert pid is not None
    os.kill(pid, number)
    caller.join(PATIENCE_S)
    closer = threading.Thread(target=llm.close, daemon=True)
    closer.start()
    closer.join(PATIENCE_S)
    assert not caller.is_alive()
    assert not closer.is_alive()
    assert str(pid) in str(failures[0])
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("x")


def test_two_of_one_model_keep_their_adapters_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in two notebooks; the second one's are gone with it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    started: list[str] = []

    class Engine:
        info = SimpleNamespace(vocab_size=512)

        @classmethod
        async def start(cls, config: EngineConfig) -> "Engine":
            started.append(config.state_dir)
            return cls()

        async def shutdown(self, deadline_s: float) -> None:
            pass

    monkeypatch.setattr("toppings.llm.EngineClient", Engine)
    pirate = demo_adapters_dir() / "pirate"
    with LLM("demo") as one, LLM("demo") as other:
        one.load_adapter("a", pirate)
        other.load_adapter("b", pirate)
        assert [[record.name for record in each.adapters()] for each in (one, other)] == [["a"], ["b"]]
    assert started[0] == ""
    assert not Path(started[1]).exists()
    with (
        pytest.raises(StateHeldError),
        LLM("demo", state_dir=str(tmp_path / "s")),
        LLM("demo", state_dir=str(tmp_path / "s")),
    ):
        pass
