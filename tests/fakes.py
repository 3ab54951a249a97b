"""Stand-ins for an engine: scripted tokens, delays, death. The interface is EngineClient's."""

import asyncio
import itertools
import random
from array import array
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from toppings.bad_input import RequestError
from toppings.core import FinishReason
from toppings.engine.client import EngineDeadError
from toppings.messages import (
    AdapterStatus,
    ColdStart,
    EngineReady,
    EngineStats,
    PromptLogprobs,
    RequestOutput,
    TokenLogprobs,
)
from toppings.sampling_params import SamplingParams
from toppings.sandbox.grammars import matcher_of

VOCAB_SIZE = 512


@dataclass
class Call:
    """One request as the engine saw it; `is_closed` before its end means it was aborted."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter_id: int | None
    cache_salt: str | None = None
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    num_sent: int = 0
    has_ended: bool = False
    was_aborted: bool = False


def echo_script(call: Call) -> list[int]:
    """The prompt's tokens over and over."""
    return list(itertools.islice(itertools.cycle(call.prompt_token_ids), call.sampling.max_tokens))


def following_script(vocabulary: Any, eos_token_id: int) -> Callable[[Call], list[int]]:
    """A random output that the structure allows, ended where it may; without one, the prompt's tokens.

    `vocabulary`: an `llguidance.LLTokenizer`.
    """

    def follow(call: Call) -> list[int]:
        structure, draw = call.sampling.structure, random.Random(0)
        if structure is None:
            return echo_script(call)
        matcher = matcher_of(vocabulary, structure.kind, structure.text)
        tokens: list[int] = []
        while len(tokens) < call.sampling.max_tokens:
            mask = matcher.compute_bitmask()
            allowed = [i for i in range(VOCAB_SIZE) if mask[i // 8] >> i % 8 & 1]
            tokens.append(eos_token_id if eos_token_id in allowed else draw.choice(allowed))
            if tokens[-1] == eos_token_id:
                break
            matcher.consume_token(tokens[-1])
        return tokens

    return follow


@dataclass
class FakeEngineClient:
    """Answers each request with `script(call)`, one token per output, held back while `gate` is unset.

    The last token ends with STOP where the script is shorter than max_tokens, else with LENGTH.
    """

    script: Callable[[Call], list[int]] = echo_script
    info: EngineReady = field(
        default_factory=lambda: EngineReady(
            "base", 128, 8, VOCAB_SIZE, 16, 64, 1 << 20, 1 << 21, hidden_size=8
        )
    )
    delay_s: float = 0.0
    error: str | None = None
    cold_start: ColdStart | None = None
    num_cached_tokens: int = 0
    adapters: list[AdapterStatus] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    pinned: dict[int, bool] = field(default_factory=dict)
    pin_error: str | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    died: asyncio.Event = field(default_factory=asyncio.Event)
    cut: asyncio.Event = field(default_factory=asyncio.Event)
    num_pending: int = 0
    down_reason: str = "the engine has died"

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def is_alive(self) -> bool:
        return not self.died.is_set()

    @property
    def num_running(self) -> int:
        return sum(not (call.has_ended or call.was_aborted) for call in self.calls)

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        adapter_id: int | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
        tenant: str = "",
        weight: float = 1.0,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        self._check_alive()
        call = Call(
            prompt_token_ids,
            sampling,
            adapter_id,
            cache_salt,
            tenant=tenant,
            weight=weight,
            priority=priority,
        )
        self.calls.append(call)
        self.num_pending += 1
        try:
            tokens = self.script(call)
            if sampling.max_tokens == 0:
                await self._wait()
                call.num_sent += 1
                self.num_pending -= 1
                yield RequestOutput("x", [], finish_reason=FinishReason.LENGTH, **self._told(call))
            for index, token_id in enumerate(tokens):
                await self._wait()
                if index == 0:
                    self.num_pending -= 1
                call.num_sent += 1
                yield self._output(call, tokens, index, token_id)
                if self.cut.is_set():
                    yield RequestOutput("x", [], finish_reason=FinishReason.ABORT, error="shutting down")
                    return
            call.has_ended = True
        finally:
            if call.num_sent == 0:
                self.num_pending -= 1
            call.was_aborted = not call.has_ended

    async def remove_adapter(self, adapter_id: int) -> None:
        self._check_alive()
        while any(c.adapter_id == adapter_id and not (c.has_ended or c.was_aborted) for c in self.calls):
            await asyncio.sleep(0.001)
        self.removed.append(adapter_id)

    async def pin_adapter(self, adapter_id: int, is_pinned: bool) -> None:
        if self.pin_error:
            raise RequestError(self.pin_error)
        self.pinned[adapter_id] = is_pinned

    async def shutdown(self, deadline_s: float) -> None:
        """Waits for running requests, then cuts them."""
        ends_at = asyncio.get_running_loop().time() + deadline_s
        while self.num_running and asyncio.get_running_loop().time() < ends_at:
            await asyncio.sleep(0.001)
        self.cut.set()
        self.gate.set()
        while self.num_running:
            await asyncio.sleep(0.001)
        self.died.set()

    async def stats(self) -> EngineStats:
        self._check_alive()
        return EngineStats(
            call_id=0,
            num_running=self.num_running,
            num_waiting=2,
            kv_pages_used=16,
            kv_pages_total=64,
            page_size=16,
            host_bytes_used=400,
            host_bytes_total=1000,
            device_bytes_used=300,
            device_bytes_total=1000,
            adapters=self.adapters,
            running_ranks=[8],
            waiting_ranks=[],
            waiting_tokens=0,
            context_tokens=12,
            counters={
                **{"preemptions": 3, "device_hits": 5},
                **{"prefix_cache_queries": 64, "prefix_cache_hits": 32},
            },
        )

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise EngineDeadError("the engine has died")

    async def _wait(self) -> None:
        await asyncio.sleep(self.delay_s)
        gate, died = (asyncio.ensure_future(e.wait()) for e in (self.gate, self.died))
        try:
            await asyncio.wait({gate, died}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gate.cancel()
            died.cancel()
        self._check_alive()

    def _output(self, call: Call, tokens: list[int], index: int, token_id: int) -> RequestOutput:
        if self.error is not None:
            return RequestOutput("x", [], finish_reason=FinishReason.ERROR, error=self.error)
        is_last = index == len(tokens) - 1
        ending = FinishReason.LENGTH if len(tokens) >= call.sampling.max_tokens else FinishReason.STOP
        return RequestOutput(
            "x",
            [token_id],
            logprobs=None if call.sampling.logprobs is None else [self._logprob(call, token_id)],
            finish_reason=ending if is_last else None,
            stop_token_id=token_id if is_last and token_id in call.sampling.stop_token_ids else None,
            queue_ms=1.5 if index == 0 else None,
            cold_start=self.cold_start if index == 0 else None,
            num_cached_tokens=self.num_cached_tokens if index == 0 else None,
            **(self._told(call) if index == 0 else {}),
        )

    def _told(self, call: Call) -> dict[str, Any]:
        """Of the prompt: token t has the log-probability -t, and alternatives t + 1, t + 2 that have -1, -2;
        its embedding points along the axis of its length."""
        told: dict[str, Any] = {}
        tokens, num_top = call.prompt_token_ids[1:], call.sampling.prompt_logprobs
        if num_top is not None:
            top = [(t + 1 + i, -1.0 - i) for t in tokens for i in range(num_top)]
            told["prompt_logprobs"] = PromptLogprobs(
                num_top,
                array("f", [-t for t in tokens]).tobytes(),
                array("i", [3] * len(tokens)).tobytes(),
                array("i", [token_id for token_id, _ in top]).tobytes(),
                array("f", [value for _, value in top]).tobytes(),
            )
        if call.sampling.pooling is not None:
            axes = [float(i == len(tokens)) for i in range(self.info.hidden_size)]
            told["embedding"] = array("f", axes).tobytes()
        return told

    @staticmethod
    def _logprob(call: Call, token_id: int) -> TokenLogprobs:
        top = [(token_id + i, -0.5 - i) for i in range(call.sampling.logprobs or 0)]
        return TokenLogprobs(token_id, -0.5, 1, top)
