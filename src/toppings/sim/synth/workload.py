"""A workload is an arrival process, a popularity and lengths; presets are named for what they are."""

from dataclasses import dataclass

from toppings.sim.assign import DEFAULT_RANKS, check_ranks, check_size, deal_ranks
from toppings.sim.seeds import generator
from toppings.sim.synth.arrivals import make_arrivals
from toppings.sim.synth.lengths import draw_lengths
from toppings.sim.synth.popularity import draw_adapters, drift
from toppings.sim.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`rate` in requests per second. `drift_s`: a tenth of the adapters exchange popularity so often (0:
    never).

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

    def __post_init__(self) -> None:
        for name in ("rate", "duration_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.drift_s < float("inf"):
            raise ValueError(f"drift_s is {self.drift_s}; it must be at least 0")
        check_ranks(self.ranks)

    def describe(self) -> str:
        drifting = f", drift every {self.drift_s:g} s" if self.drift_s else ""
        return f"{self.arrivals} arrivals, {self.popularity} popularity, {self.lengths} lengths{drifting}"

    def make_trace(self, seed: int) -> Trace:
        """The same trace for the same seed. Raises ValueError for a text that names no generator."""
        check_size(self.rate * self.duration_s, "the workload")
        arrivals_s = make_arrivals(self.arrivals)(self.rate, self.duration_s, generator(seed, "arrivals"))
        num = len(arrivals_s)
        adapters = draw_adapters(self.popularity, self.num_adapters, num, generator(seed, "popularity"))
        if self.drift_s:
            rng = generator(seed, "drift")
            adapters = drift(adapters, arrivals_s, self.num_adapters, self.drift_s, rng)
        prompt, response = draw_lengths(self.lengths, num, generator(seed, "lengths"))
        ranks = deal_ranks(self.num_adapters, self.ranks, seed)
        return Trace(arrivals_s, adapters, prompt, response, ranks, self.duration_s, self.describe())


PRESETS: dict[str, Workload] = {
    "poisson-chat": Workload(),
    "even-chat": Workload(arrivals="even"),
    "azure-code-like": Workload(arrivals="code", lengths="azure_code", rate=2.57),
    "azure-conversation-like": Workload(arrivals="conversation", lengths="azure_conversation", rate=5.53),
    "flat-chat": Workload(popularity="uniform", num_adapters=1000),
    "drifting-chat": Workload(drift_s=60.0),
    "bursty-chat": Workload(arrivals="code"),
}
"""`poisson-chat`: published popularity, chat lengths; `even-chat`: evenly spaced, the least demanding
arrivals; `azure-*-like`: arrivals and lengths fitted to Azure LLM 2023; the rest varies one thing of
`poisson-chat`."""


def preset(name: str) -> Workload:
    """Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown workload {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
