"""A workload is an arrival process, a popularity and lengths; presets are named for what they are."""

from dataclasses import dataclass

import numpy as np

from toppings.sim.assign import DEFAULT_RANKS, check_ranks, check_size, deal_ranks
from toppings.sim.seeds import generator
from toppings.sim.synth.arrivals import make_arrivals
from toppings.sim.synth.lengths import draw_lengths
from toppings.sim.synth.popularity import draw_adapters, drift
from toppings.sim.synth.talks import make_talks, num_turns
from toppings.sim.trace import Trace

NUM_LEAD_TALKS = 4
"""Conversations, of mean length, before a trace: hardly one is so long that it began earlier."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`rate` in requests per second. `drift_s`: a tenth of the adapters exchange popularity so often (0:
    never). `turns`: of a conversation, on average, each with all before it as prompt and `pause_s` seconds
    between; `lengths` are then of what is new, and `arrivals` those of conversations.

    Texts are as `make_arrivals`, `popularity` and `draw_lengths` take them; `ranks` are dealt to the
    adapters.
    """

    arrivals: str = "poisson"
    popularity: str = "published"
    lengths: str = "chat"
    rate: float = 5.0
    duration_s: float = 600.0
    num_adapters: int = 128
    ranks: tuple[int, ...] = DEFAULT_RANKS
    drift_s: float = 0.0
    turns: float = 1.0
    pause_s: float = 20.0

    def __post_init__(self) -> None:
        if not 1 <= self.turns < float("inf"):
            raise ValueError(f"turns is {self.turns}; it must be at least 1")
        for name in ("rate", "duration_s", "pause_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.drift_s < float("inf"):
            raise ValueError(f"drift_s is {self.drift_s}; it must be at least 0")
        check_ranks(self.ranks)

    def describe(self) -> str:
        drifting = f", drift every {self.drift_s:g} s" if self.drift_s else ""
        talking = f", {self.turns:g} turns" if self.turns > 1 else ""
        kind = f"{self.arrivals} arrivals, {self.popularity} popularity, {self.lengths} lengths"
        return f"{kind}{drifting}{talking}"

    def make_trace(self, seed: int) -> Trace:
        """The same trace for the same seed. Raises ValueError for a text that names no generator."""
        check_size(self.rate * self.duration_s, "the workload")
        if self.turns > 1:
            return self._make_talks(seed)
        arrivals_s = make_arrivals(self.arrivals)(self.rate, self.duration_s, generator(seed, "arrivals"))
        num = len(arrivals_s)
        adapters = draw_adapters(self.popularity, self.num_adapters, num, generator(seed, "popularity"))
        if self.drift_s:
            rng = generator(seed, "drift")
            adapters = drift(adapters, arrivals_s, self.num_adapters, self.drift_s, rng)
        prompt, response = draw_lengths(self.lengths, num, generator(seed, "lengths"))
        ranks = deal_ranks(self.num_adapters, self.ranks, seed)
        return Trace(arrivals_s, adapters, prompt, response, ranks, self.duration_s, self.describe())

    def _make_talks(self, seed: int) -> Trace:
        """Conversations have begun before the trace does, so that its load is the same all the time."""
        lead_s = NUM_LEAD_TALKS * self.turns * self.pause_s
        span_s, rate = lead_s + self.duration_s, self.rate / self.turns
        starts_s = make_arrivals(self.arrivals)(rate, span_s, generator(seed, "arrivals")) - lead_s
        rng, num = generator(seed, "turns"), len(starts_s)
        nums = num_turns(num, self.turns, rng)
        adapters = draw_adapters(self.popularity, self.num_adapters, num, generator(seed, "popularity"))
        if self.drift_s:
            since_s = np.maximum(starts_s, 0.0)
            adapters = drift(adapters, since_s, self.num_adapters, self.drift_s, generator(seed, "drift"))
        new, response = draw_lengths(self.lengths, int(nums.sum()), generator(seed, "lengths"))
        talks = make_talks(starts_s, nums, new, response, self.pause_s, self.duration_s, rng)
        return Trace(
            talks.arrivals_s,
            adapters[talks.talks],
            talks.prompt_tokens,
            talks.response_tokens,
            deal_ranks(self.num_adapters, self.ranks, seed),
            self.duration_s,
            self.describe(),
            blocks=talks.blocks,
        )


PRESETS: dict[str, Workload] = {
    "poisson-chat": Workload(),
    "even-chat": Workload(arrivals="even"),
    "azure-code-like": Workload(arrivals="code", lengths="azure_code", rate=2.57),
    "azure-conversation-like": Workload(arrivals="conversation", lengths="azure_conversation", rate=5.53),
    "flat-chat": Workload(popularity="uniform", num_adapters=1000),
    "drifting-chat": Workload(drift_s=60.0),
    "bursty-chat": Workload(arrivals="code"),
    "conversations": Workload(lengths="azure_conversation", turns=5.0),
}
"""`poisson-chat`: published popularity, chat lengths; `even-chat`: evenly spaced, the least demanding
arrivals; `azure-*-like`: arrivals and lengths fitted to Azure LLM 2023; `conversations`: five turns on
average, what is new in each as long as there; the rest varies one thing of `poisson-chat`."""


def preset(name: str) -> Workload:
    """Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown workload {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
