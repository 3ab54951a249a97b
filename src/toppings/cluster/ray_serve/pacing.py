"""Fewer messages where there are many: outputs that come in quick succession travel as one."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from toppings.messages import RequestOutput


async def paced(
    outputs: AsyncGenerator[RequestOutput, None], period_s: Callable[[], float]
) -> AsyncGenerator[RequestOutput, None]:
    """The same tokens, with at least `period_s()` seconds between two outputs but for the first and the last.

    What comes meanwhile is joined. Closing it closes `outputs`; their exceptions come after all tokens.
    """
    ready: list[RequestOutput] = []
    news, ending = asyncio.Event(), asyncio.Event()

    async def read() -> None:
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    ready.append(output)
                    news.set()
                    if output.finish_reason is not None:
                        ending.set()
        finally:
            ending.set()
            news.set()

    reader = asyncio.create_task(read())
    try:
        while True:
            await news.wait()
            news.clear()
            if ready:
                joined = join(ready)
                ready.clear()
                yield joined
            if ending.is_set() and not ready:
                await reader
                if not ready:
                    return
            await _sleep(period_s(), unless=ending)
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def with_signs_of_life(
    outputs: AsyncGenerator[RequestOutput, None], period_s: float
) -> AsyncGenerator[RequestOutput | None, None]:
    """The same outputs, and None whenever there was none for `period_s` seconds. Closing it closes them."""
    async with aclosing(outputs):
        coming: asyncio.Future[RequestOutput | None] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(outputs, None))
                done, _ = await asyncio.wait({coming}, timeout=period_s)
                if not done:
                    yield None
                    continue
                output, coming = coming.result(), None
                if output is None:
                    return
                yield output
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)


async def _sleep(seconds: float, *, unless: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(unless.wait(), seconds)
    except TimeoutError:
        return


def join(outputs: list[RequestOutput]) -> RequestOutput:
    """Successive outputs of one request as one."""
    first, last = outputs[0], outputs[-1]
    if first is last:
        return first
    has_logprobs = any(output.logprobs is not None for output in outputs)
    return RequestOutput(
        request_id=first.request_id,
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        logprobs=[each for output in outputs for each in output.logprobs or []] if has_logprobs else None,
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        error=last.error,
        queue_ms=first.queue_ms,
        cold_start=first.cold_start,
        num_cached_tokens=first.num_cached_tokens,
        prompt_logprobs=first.prompt_logprobs,
        embedding=last.embedding,
    )
