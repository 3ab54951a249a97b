"""Times single steps of an engine in this process, on batches made to order."""

import time
from collections.abc import Mapping
from itertools import count

from toppings.cluster.batch_row import BatchRow
from toppings.engine.engine import Engine
from toppings.lab.batches.plan import Rows, StepLimits
from toppings.messages import AddRequest
from toppings.sampling_params import SamplingParams

NUM_DECODE_STEPS = 2
"""Timed steps of a decode batch, after one that admits its sequences and is not timed."""
_TOKEN_ID = 1


class BatchDriver:
    """To be used by the thread that made the engine, whose adapters are all on the device.

    Sequences are put into the engine as if their context had been computed: the cache holds what it holds,
    for no step takes longer for the values in it. What is timed is `Engine.step`: scheduling, forward,
    sampling.
    """

    def __init__(self, engine: Engine, adapter_ids: Mapping[str, int]) -> None:
        self._engine = engine
        self._adapter_ids = adapter_ids
        self._request_ids = count()

    def limits(self, max_num_batched_tokens: int) -> StepLimits:
        """Half of the cache is kept free, so that no sequence is refused or preempted."""
        info = self._engine.info
        return StepLimits(
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=info.max_model_len,
            max_cached_tokens=info.num_pages // 2 * info.page_size,
        )

    def decode_ms(self, rows: Rows, num_steps: int = NUM_DECODE_STEPS) -> list[float]:
        """ms of each timed step; the middle one has the rows' contexts."""
        num_before = 1 + num_steps // 2
        for row in rows:
            self._add(row, num_context=max(1, row.num_context - num_before), max_tokens=num_steps + 2)
        self._step(len(rows))
        times = [self._step(len(rows)) for _ in range(num_steps)]
        self._engine.abort_all("it was timed")
        return times

    def prefill_ms(self, rows: Rows) -> list[float]:
        """ms of the one step that computes all rows' tokens."""
        for row in rows:
            self._add(row, num_context=row.num_context, max_tokens=1)
        return [self._step(len(rows))]

    def _add(self, row: BatchRow, *, num_context: int, max_tokens: int) -> None:
        prompt = [_TOKEN_ID] * (num_context + row.num_tokens)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        adapter_id = None if row.adapter is None else self._adapter_ids[row.adapter]
        message = AddRequest(str(next(self._request_ids)), prompt, sampling, adapter_id, is_cacheable=False)
        refusal = self._engine.add(message)
        if refusal is not None:
            raise RuntimeError(f"the engine refused a sequence of {len(prompt)} tokens: {refusal.error}")
        *_, request = self._engine.scheduler.waiting
        has_room = self._engine.scheduler.pages.grow(request.page_table, len(prompt))
        assert has_room, "the limits leave half of the cache free"
        request.num_computed_tokens = num_context

    def _step(self, num_rows: int) -> float:
        started_at = time.perf_counter()
        outputs = self._engine.step()
        ms = (time.perf_counter() - started_at) * 1e3
        errors = [output.error for output in outputs if output.error is not None]
        if errors or len(outputs) != num_rows:
            raise RuntimeError(f"a step for {num_rows} sequences gave {len(outputs)} tokens: {errors[:1]}")
        return ms
