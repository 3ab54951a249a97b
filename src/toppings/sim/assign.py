"""What published traces lack: adapters, their ranks, and where need be lengths. All of it seeded."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toppings.sim.blocks import PromptBlocks
from toppings.sim.seeds import generator
from toppings.sim.synth.lengths import draw_lengths
from toppings.sim.synth.popularity import draw_adapters
from toppings.sim.trace import MAX_REQUESTS, FloatArray, IntArray, Trace

DEFAULT_RANKS = (8, 16, 32, 64)
DEFAULT_NUM_ADAPTERS = 128


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """How a trace file becomes a `Trace`.

    `num_adapters`: functions are dealt to so many adapters (0: an adapter each); where the format knows no
    functions, so many are drawn from `popularity` (0: 128). `ranks` are dealt to the adapters; `lengths`
    serves formats without token counts. Only the window `start_s`, `duration_s` (0: to the end) is kept.
    `rate` (0: as recorded): invocation counts are thinned or multiplied to it, other formats are stretched
    in time.
    """

    num_adapters: int = 0
    popularity: str = "published"
    ranks: tuple[int, ...] = DEFAULT_RANKS
    lengths: str = "chat"
    rate: float = 0.0
    start_s: float = 0.0
    duration_s: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_adapters", "rate", "start_s", "duration_s", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        check_ranks(self.ranks)


def check_ranks(ranks: Sequence[int]) -> None:
    if not ranks or any(rank < 1 for rank in ranks):
        raise ValueError(f"ranks are {tuple(ranks)}; give at least one, each at least 1")


def deal(num: int, values: Sequence[int], seed: int, purpose: str) -> IntArray:
    """`values` in turn over a seeded order of `num` takers [num]: shares differ by at most one."""
    order = generator(seed, purpose).permutation(num)
    dealt = np.empty(num, dtype=np.int32)
    dealt[order] = np.resize(np.asarray(values, dtype=np.int32), num)
    return dealt


def deal_ranks(num_adapters: int, ranks: Sequence[int], seed: int) -> IntArray:
    return deal(num_adapters, ranks, seed, "ranks")


def functions_to_adapters(num_functions: int, options: TraceOptions) -> IntArray:
    """Each function's adapter [F]: its own, or, for fewer adapters, in turn over a seeded order of
    functions.
    """
    if not options.num_adapters or options.num_adapters >= num_functions:
        return np.arange(num_functions, dtype=np.int32)
    return deal(num_functions, range(options.num_adapters), options.seed, "functions")


def trace_of_functions(
    arrivals_s: FloatArray,
    functions: IntArray,
    num_functions: int,
    duration_s: float,
    options: TraceOptions,
    origin: str,
) -> Trace:
    """A trace of invocations [N], ascending, of functions [N]: lengths are drawn."""
    adapters = functions_to_adapters(num_functions, options)
    prompt, response = draw_lengths(options.lengths, len(arrivals_s), generator(options.seed, "lengths"))
    num_adapters = int(adapters.max(initial=-1)) + 1
    ranks = deal_ranks(num_adapters, options.ranks, options.seed)
    return Trace(arrivals_s, adapters[functions], prompt, response, ranks, duration_s, origin)


def trace_of_lengths(
    times_s: FloatArray,
    prompt: IntArray,
    response: IntArray,
    options: TraceOptions,
    origin: str,
    blocks: PromptBlocks | None = None,
) -> Trace:
    """A trace of requests [N] in any order with known lengths: adapters are drawn, once for a conversation.

    Requests without prompt or response tokens failed: they are left out and counted. Time starts with the
    first.
    """
    is_served = (prompt > 0) & (response > 0)
    num_dropped = int(len(times_s) - is_served.sum())
    if not is_served.any():
        raise ValueError(f"{origin}: no request has both prompt and response tokens")
    order = np.flatnonzero(is_served)[np.argsort(times_s[is_served], kind="stable")]
    arrivals_s = times_s[order] - times_s[order[0]]
    num_adapters = options.num_adapters or DEFAULT_NUM_ADAPTERS
    adapters = draw_adapters(
        options.popularity, num_adapters, len(order), generator(options.seed, "popularity")
    )
    if blocks is not None:
        blocks = blocks.take(order)
        adapters = of_talks(adapters, blocks, prompt[order])
    trace = Trace(
        arrivals_s,
        adapters,
        prompt[order].astype(np.int32),
        response[order].astype(np.int32),
        deal_ranks(num_adapters, options.ranks, options.seed),
        max(float(arrivals_s[-1]), 1e-9),
        origin,
        num_dropped=num_dropped,
        blocks=blocks,
    )
    return windowed(trace, options)


def of_talks(adapters: IntArray, blocks: PromptBlocks, prompts: IntArray) -> IntArray:
    """The same draws [N], but a prompt that goes on behind the last full block of an earlier one has that
    one's adapter. Its first block is none to go on from: it may be a system prompt that all begin with.
    """
    chosen, ends = adapters.copy(), dict[int, int]()
    for row, num_tokens in enumerate(prompts.tolist()):
        ids = blocks[row]
        earlier = next((ends[each] for each in reversed(ids[1:]) if each in ends), None)
        if earlier is not None:
            chosen[row] = earlier
        num_full = min(num_tokens // blocks.block_len, len(ids))
        if num_full > 1:
            ends[ids[num_full - 1]] = int(chosen[row])
    return chosen


def windowed(trace: Trace, options: TraceOptions) -> Trace:
    """The window the options ask for, stretched to their rate."""
    if options.start_s or options.duration_s:
        trace = trace.between(options.start_s, options.start_s + (options.duration_s or trace.duration_s))
    return trace.scaled_to(options.rate) if options.rate and len(trace) else trace


def check_size(num_requests: float, origin: str) -> None:
    if num_requests > MAX_REQUESTS:
        raise ValueError(
            f"{origin} holds {num_requests:,.0f} requests, more than {MAX_REQUESTS:,}; "
            "ask for a lower rate or a shorter window"
        )
