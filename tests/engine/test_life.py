"""What becomes of an engine, judged from what its process tells; without a process."""

import asyncio
import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import PATIENCE_S
from toppings.config import EngineConfig
from toppings.engine.client import EngineClient, EngineStartError
from toppings.engine.heartbeat import _BEAT, LOOK_S, Pulse, open_lifeline
from toppings.engine.life import EngineLife
from toppings.engine.meeting_place import MeetingPlace
from toppings.engine.process import EngineLog
from toppings.engine.spawn import Spawner
from toppings.messages import EngineReady

READY = EngineReady("base", 128, 8, 512, 16, 64, 1 << 20, 1 << 21)


class FakeProcess:
    """Beats as it is told to; ends when it is killed."""

    name, is_of_warm = "the engine's process 1", False

    def __init__(self) -> None:
        mine, self.theirs = open_lifeline()
        self.pulse = Pulse(mine)
        self.beat(os.getpid())

    def beat(self, value: int) -> None:
        self.theirs.send(_BEAT.pack(value))

    def kill(self) -> None:
        self.theirs.close()

    def how_it_ended(self) -> str:
        return "it ended"


class FakeSpawner:
    def __init__(self) -> None:
        self.process = FakeProcess()

    def spawn(self, *_: object) -> FakeProcess:
        return self.process


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As short as what an address of a socket may be made of."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)
        assert not list(Path(name).glob("toppings-meet-*"))


def begin(**settings: Any) -> tuple[EngineLife, FakeProcess]:
    spawner: Any = FakeSpawner()
    config = EngineConfig(model="base", **settings)
    return EngineLife(spawner, config, EngineLog(), lambda _: None, is_first=True), spawner.process


async def test_a_start_longer_than_a_step_may_take_is_no_step_that_hangs() -> None:
    life, process = begin(step_timeout_s=PATIENCE_S)
    running = asyncio.create_task(life.run())
    process.beat(10**6)  # the loop has not turned, for there is none yet
    await asyncio.sleep(2 * LOOK_S)
    life.note_ready(READY)
    await asyncio.sleep(2 * LOOK_S)
    assert not running.done()
    process.beat(0)
    process.kill()
    assert await running == "it ended"


async def test_a_step_that_hangs_ends_the_engine_however_soon_after_its_start() -> None:
    life, process = begin(step_timeout_s=LOOK_S)
    running = asyncio.create_task(life.run())
    life.note_ready(READY)
    process.beat(1)
    assert "hangs in a step, for more than 0.1 s (step_timeout_s)" in await running


class TestWhatFailsBeforeThereIsAProcess:
    """It is a start that failed, with its cause, and one that may be tried again; nothing stays behind."""

    async def test_a_process_that_cannot_be_spawned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

        monkeypatch.setattr(Spawner, "spawn", fail)
        with pytest.raises(EngineStartError, match=r"cannot be started: .*temporarily unavailable"):
            await EngineClient.start(EngineConfig(model="base"))

    async def test_no_folder_to_meet_in_is_a_start_that_is_tried_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After an engine that has served, the next is tried until the bound."""
        spawner = FakeSpawner()
        monkeypatch.setattr(Spawner, "spawn", spawner.spawn)
        client = EngineClient(EngineConfig(model="base"), EngineLog(), 2, Spawner(stays=True))
        while client._life is None:
            await asyncio.sleep(0)
        client._note_ready(READY)

        def fail(_: str) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(MeetingPlace, "make", fail)
        spawner.process.kill()
        async with asyncio.timeout(PATIENCE_S):
            await client.died.wait()
        assert client.num_restarts == 2
        assert client.down_reason == (
            "the engine has died: the engine's process cannot be started: [Errno 28] No space left on device"
        )
        with suppress(EngineStartError):
            await client.shutdown(0.0)
