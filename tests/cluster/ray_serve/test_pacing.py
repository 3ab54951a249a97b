import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

import pytest

from tests.waiting import PATIENCE_S
from toppings.cluster.ray_serve.pacing import join, paced
from toppings.core import FinishReason
from toppings.messages import PromptLogprobs, RequestOutput, TokenLogprobs

NEVER_S = 60.0


def output(token_id: int, *, ends: bool = False) -> RequestOutput:
    return RequestOutput("r", [token_id], finish_reason=FinishReason.LENGTH if ends else None)


class Source:
    """Outputs, each let go by the test; `error` comes after them."""

    def __init__(self, outputs: Sequence[RequestOutput], error: Exception | None = None) -> None:
        self.outputs, self.error = outputs, error
        self.allowed = asyncio.Semaphore(0)
        self.is_closed = False

    async def generate(self) -> AsyncGenerator[RequestOutput, None]:
        try:
            for each in self.outputs:
                await self.allowed.acquire()
                yield each
            if self.error is not None:
                raise self.error
        finally:
            self.is_closed = True

    async def release(self, count: int) -> None:
        for _ in range(count):
            self.allowed.release()
        await asyncio.sleep(0.01)


async def test_the_first_output_is_not_held_back() -> None:
    source = Source([output(1), output(2, ends=True)])
    stream = paced(source.generate(), lambda: NEVER_S)
    await source.release(1)
    assert (await asyncio.wait_for(anext(stream), PATIENCE_S)).token_ids == [1]
    await stream.aclose()


async def test_what_comes_within_a_period_is_joined_and_the_last_ends_it() -> None:
    source = Source([output(i, ends=i == 4) for i in range(5)])
    stream = paced(source.generate(), lambda: NEVER_S)
    await source.release(1)
    assert (await anext(stream)).token_ids == [0]
    rest = asyncio.create_task(anext(stream))
    await source.release(3)
    assert not rest.done()
    await source.release(1)
    joined = await asyncio.wait_for(rest, PATIENCE_S)
    assert (joined.token_ids, joined.finish_reason) == ([1, 2, 3, 4], FinishReason.LENGTH)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_without_a_period_every_output_is_a_message() -> None:
    source = Source([output(i, ends=i == 2) for i in range(3)])
    stream = paced(source.generate(), lambda: 0.0)
    taken = []
    for _ in range(3):
        await source.release(1)
        taken.append((await anext(stream)).token_ids)
    assert taken == [[0], [1], [2]]
    await stream.aclose()


async def test_an_exception_comes_after_all_tokens() -> None:
    source = Source([output(1), output(2)], error=RuntimeError("gone"))
    stream = paced(source.generate(), lambda: NEVER_S)
    await source.release(1)
    assert (await anext(stream)).token_ids == [1]
    await source.release(1)
    assert (await asyncio.wait_for(anext(stream), PATIENCE_S)).token_ids == [2]
    with pytest.raises(RuntimeError, match="gone"):
        await anext(stream)


async def test_closing_it_closes_the_source() -> None:
    source = Source([output(i) for i in range(3)])
    stream = paced(source.generate(), lambda: 0.0)
    await source.release(1)
    await anext(stream)
    await stream.aclose()
    assert source.is_closed


def test_joined_outputs_keep_everything() -> None:
    logprobs = [TokenLogprobs(7, -0.5, 1), TokenLogprobs(8, -0.25, 1)]
    first = RequestOutput("r", [7], logprobs=logprobs[:1], queue_ms=1.5)
    last = RequestOutput(
        "r", [8], logprobs=logprobs[1:], finish_reason=FinishReason.STOP, stop_token_id=8, error="x"
    )
    assert join([first, last]) == RequestOutput(
        "r",
        [7, 8],
        logprobs=logprobs,
        finish_reason=FinishReason.STOP,
        stop_token_id=8,
        error="x",
        queue_ms=1.5,
    )
    assert join([first]) is first


def test_what_is_told_of_the_prompt_outlives_joining() -> None:
    told = PromptLogprobs(0, b"\0\0\0\0", b"\1\0\0\0", b"", b"")
    first = replace(output(1), prompt_logprobs=told, num_cached_tokens=16)
    joined = join([first, output(2), output(3, ends=True)])
    assert (joined.prompt_logprobs, joined.num_cached_tokens) == (told, 16)
