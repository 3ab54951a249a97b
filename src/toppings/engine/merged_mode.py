"""Merged mode: the adapter that makes nearly all of the work is folded into the base model's weights for as
long as that saves time. A little is done between two steps, so that nobody waits for much longer than a step.
"""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

import torch

from toppings.adapters.manager import AdapterManager
from toppings.config import ConfigError
from toppings.core import BatchItem
from toppings.engine.device_lora import DeviceLora
from toppings.engine.fold_policy import FoldCosts, FoldPolicy
from toppings.engine.folded_base import FoldedBase
from toppings.engine.scheduler import Scheduler
from toppings.messages import MergedStatus
from toppings.model.decoder import Decoder
from toppings.ops.lora import LoraForm, LoraSegments

IDLE_S = 0.02
"""Of work between two looks for messages while no request runs."""
MAX_PRICES = 64
"""Adapters whose costs are remembered."""
NUM_TIMES = 3
MEASURED_ROWS = (1, 33)
SWITCH_SHARE = 2.0
"""Folding in and out, in times of computing the folded weights: each is also copied once."""

logger = logging.getLogger(__name__)

Meter = Callable[[int], FoldCosts]
"""Measures an adapter's costs, by its slot."""


class MergedMode:
    """For one engine, called by its thread between steps. `memory`: bytes of host memory that are free."""

    def __init__(
        self,
        folded: FoldedBase,
        adapters: AdapterManager,
        scheduler: Scheduler,
        policy: FoldPolicy,
        meter: Meter,
        memory: Callable[[], int],
    ) -> None:
        """Raises ConfigError where the copy that is kept of the weights would not fit."""
        self.folded = folded
        self.counters = {"merged_mode_folds": 0, "merged_mode_unfolds": 0}
        self._adapters, self._scheduler = adapters, scheduler
        self.policy, self.meter, self._memory = policy, meter, memory
        self._costs: OrderedDict[int, FoldCosts] = OrderedDict()
        self._refused: OrderedDict[int, None] = OrderedDict()  # adapters that could not be folded
        self._step_s = 0.0
        needed, free = folded.needed_bytes(), memory()
        if needed > free:
            raise ConfigError(
                "merged_mode is 'auto', but the copy of the base model's weights that it keeps takes"
                f" {needed} bytes of host memory, and {free} are free; use off"
            )

    def note_step(self, items: Sequence[BatchItem], step_s: float, now: float) -> None:
        """A step has ended."""
        rows: Counter[int | None] = Counter()
        for item in items:
            rows[item.request.adapter_id] += item.num_rows
        self._step_s = step_s
        self.policy.note_step(rows, step_s, now)

    def poll(self) -> bool:
        """Some of what there is to do: as much as takes as long as the last step, little where none runs.
        Whether there was anything."""
        wanted, was = self._wanted(), (self.folded.adapter_id, self.folded.num_folded)
        stop_at = time.perf_counter() + (self._step_s if self._scheduler.running else IDLE_S)
        while self._advance(wanted) and time.perf_counter() < stop_at:
            pass
        return was != (self.folded.adapter_id, self.folded.num_folded)

    def status(self) -> MergedStatus:
        folded, policy = self.folded, self.policy
        shown = folded.adapter_id if folded.adapter_id is not None else policy.candidate
        return MergedStatus(
            adapter_id=folded.adapter_id,
            num_folded=folded.num_folded,
            num_groups=folded.num_pieces,
            kept_bytes=folded.kept_bytes,
            share=policy.share_of(shown) if shown is not None else 0.0,
            gain=policy.gain if shown is not None and shown == policy.priced else 0.0,
        )

    def _wanted(self) -> int | None:
        """The adapter that is to be folded."""
        current = self.folded.adapter_id
        if current is not None and self._must_leave(current):
            self.policy.leave()
        if self.policy.target is None and current is None:
            self._look_at(self.policy.candidate)
        target = self.policy.target
        if target is not None and current is None and not self._may_begin(target):
            self.policy.leave()
            return None
        return target

    def _must_leave(self, adapter_id: int) -> bool:
        """It is to be unloaded, or its room is needed for a request that waits."""
        starved = self._scheduler.draining.starved
        if adapter_id in self._adapters.leaving:
            return True
        return starved is not None and adapter_id in self._adapters.victims_for(starved)

    def _look_at(self, candidate: int | None) -> None:
        """Its costs are measured, unless they are known."""
        if candidate is None or candidate in (self.policy.priced, *self._refused):
            return
        if not self._adapters.can_fold(candidate):
            return
        if candidate not in self._costs:
            self._costs[candidate] = self.meter(self._adapters.slot_of(candidate))
            _bound(self._costs)
        self.policy.price(candidate, self._costs[candidate])

    def _may_begin(self, adapter_id: int) -> bool:
        is_free = adapter_id not in self._refused and self._scheduler.draining.starved is None
        if not (is_free and self._adapters.can_fold(adapter_id)):
            return False
        needed, free = self.folded.needed_bytes(self._adapters.slot_of(adapter_id)), self._memory()
        if needed > free:
            self._refuse(
                adapter_id, f"the copy of the weights takes {needed} bytes of host memory, {free} are free"
            )
        return needed <= free

    def _advance(self, wanted: int | None) -> bool:
        """A piece of the way to what is wanted; whether there may be more to do."""
        folded = self.folded
        if folded.adapter_id is None:
            if wanted is None:
                return False
            folded.begin(wanted, self._adapters.slot_of(wanted))
            self._adapters.set_folded(wanted, True)
            logger.info("adapter %s is being folded into the base model's weights", wanted)
        if folded.adapter_id != wanted:
            return self._unfold()
        if folded.is_whole:
            return False
        try:
            folded.fold_next()
        except (ValueError, RuntimeError, MemoryError) as error:
            assert wanted is not None
            self._refuse(wanted, str(error))
            self.policy.leave()
            return False
        self.counters["merged_mode_folds"] += folded.is_whole
        return not folded.is_whole

    def _unfold(self) -> bool:
        folded = self.folded
        assert folded.adapter_id is not None
        if folded.num_folded:
            self.counters["merged_mode_unfolds"] += folded.is_whole
            folded.unfold_last()
            return True
        logger.info("adapter %s is no longer in the base model's weights", folded.adapter_id)
        self._adapters.set_folded(folded.adapter_id, False)
        folded.end()
        return False

    def _refuse(self, adapter_id: int, reason: str) -> None:
        logger.warning("adapter %s is not folded into the base model's weights: %s", adapter_id, reason)
        self._refused[adapter_id] = None
        _bound(self._refused)


def _bound(kept: OrderedDict[int, object] | OrderedDict[int, FoldCosts] | OrderedDict[int, None]) -> None:
    while len(kept) > MAX_PRICES:
        kept.popitem(last=False)


def make_meter(
    decoder: Decoder,
    adapters: AdapterManager,
    folded: FoldedBase,
    out_offsets: dict[str, tuple[int, ...]],
    form: LoraForm,
) -> Meter:
    """Runs an adapter's products over all layers for two numbers of rows, and computes a part of the folded
    weights; takes about as long as a step."""
    pool = adapters.pool

    @torch.inference_mode()
    def pass_s(slot: int, num_rows: int) -> float:
        segments = LoraSegments([0, num_rows], [slot], pool.max_rank_of([slot]), form)
        lora = DeviceLora(pool, segments, out_offsets, pool.groups_of([slot]), adjusts=False)
        work = []
        for layer, group, linear in folded.pieces_of(slot):
            x = torch.zeros(num_rows, linear.num_in, dtype=decoder.dtype, device=decoder.device)
            work.append((layer, group, x, x.new_zeros(num_rows, linear.num_out)))

        def run() -> None:
            for each in work:
                lora.finish(*each)
            folded.finish()

        return min(_timed(run) for _ in range(NUM_TIMES))

    def measure(slot: int) -> FoldCosts:
        few, many = (pass_s(slot, num_rows) for num_rows in MEASURED_ROWS)
        row_s = max(0.0, many - few) / (MEASURED_ROWS[1] - MEASURED_ROWS[0])
        shares: list[float] = []
        tried_s = min(_timed(lambda: shares.append(folded.try_out(slot))) for _ in range(NUM_TIMES))
        return FoldCosts(max(0.0, few - row_s), row_s, SWITCH_SHARE * tried_s / shares[0])

    return measure


def _timed(run: Callable[[], None]) -> float:
    started_at = time.perf_counter()
    run()
    return time.perf_counter() - started_at
