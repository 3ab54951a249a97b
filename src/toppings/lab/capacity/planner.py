"""The plan of a fleet: a search over simulations.

Fleets are ordered by `size`: servers at the load that is asked for, or, where the number of servers is given,
loads that grow less by `LOAD_STEP` from one size to the next. So both questions are for the smallest size
that keeps the objectives. It is found for one design, all designs are compared under more load than that one
bears, and it is found again for the best. The answer must hold for all seeds with a margin of one standard
deviation between them, and then for as many that nothing was chosen by: those that bring adapters and loads
which are harder than what was seen make the fleet larger, and are replaced by others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from toppings.lab.capacity.search import smallest
from toppings.lab.capacity.spec import Design
from toppings.lab.capacity.trials import Outcome, Trial, Trials

LOAD_STEP, HEAVIEST_LOAD, NUM_LOADS = 1.02, 100.0, 460
"""Between two loads; the first one and the number of them, in terms of the load that was given: the last one
is a hundredth of it."""
EXCESS = 0.1
"""Of load, on a fleet that bears no more, under which designs are compared."""
NUM_COMPARED = 2
"""Seeds that designs are compared with."""
TIE = 0.002
"""Of attainment: designs that are this close are equal, and the first one listed counts."""
SWING = 0.2
"""Of the load, for the sensitivity."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Attainment over seeds: its mean and standard deviation."""

    attainment: float
    spread: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "Measured":
        values = [outcome.attainment for outcome in outcomes]
        return cls(float(np.mean(values)), float(np.std(values)))


@dataclass(frozen=True)
class FleetPlan:
    """`rate` in requests/s. `expected` over the seeds that the fleet was chosen by, `unseen` over those that
    it was tried with. `designs`: each with its attainment on `compared_on` servers at `compared_at`
    requests/s.
    `curve`: by servers, or where these were given by requests/s, attainment of the chosen design.
    `sensitivity`: attainment after a change. Costs are of 10^6 tokens, in the currency of `gpu_cost`.
    """

    design: Design
    num_instances: int
    rate: float
    pool_bytes: int
    kv_cache_tokens: int
    expected: Measured
    unseen: Measured
    ttft_p99_ms: float
    tpt_p99_ms: float
    cost_per_hour: float
    cost_of_tokens: float
    cost_of_response_tokens: float
    designs: Sequence[tuple[Design, float]]
    compared_on: int
    compared_at: float
    curve: Sequence[tuple[float, float]]
    sensitivity: Mapping[str, Measured]
    num_simulations: int


class Planner:
    """`width` simulations run at once."""

    def __init__(self, trials: Trials, first_seed: int, width: int) -> None:
        self.spec, self._trials, self._width = trials.spec, trials, width
        self._seeds = range(first_seed, first_seed + self.spec.seeds)

    def plan(self) -> FleetPlan:
        """Raises ValueError where no fleet within the bounds keeps the objectives."""
        spec = self.spec
        first = next(iter(self._that_fit(spec.ways_to_divide(spec.first_design()))))
        size = self._smallest(first, self._guess(first), "how many")
        compared_on, load = self._fleet(size)
        load *= 1 + EXCESS
        placed = self._compare(spec.ways_to_place(first), compared_on, load, "policies and placements")
        ways_to_divide = self._that_fit(spec.ways_to_divide(_first_best(placed)))
        divided = self._compare(ways_to_divide, compared_on, load, "pool and cache")
        best = _first_best(divided)
        if best != first:
            size = self._smallest(best, size, "how many of the best")
        size, unseen_seeds = self._settled(best, size)
        return FleetPlan(
            design=best,
            designs=list({**placed, **divided}.items()),
            compared_on=compared_on,
            compared_at=load * self._trials.rate,
            **self._told(best, size, unseen_seeds),
        )

    # --- sizes ---

    @property
    def _is_inverse(self) -> bool:
        return self.spec.num_instances > 0

    @property
    def _most(self) -> int:
        return NUM_LOADS if self._is_inverse else self.spec.max_instances

    def _fleet(self, size: int) -> tuple[int, float]:
        """Servers, and the load in terms of what was given."""
        if self._is_inverse:
            return self.spec.num_instances, HEAVIEST_LOAD * LOAD_STEP**-size
        return size, 1.0

    def _guess(self, design: Design) -> int:
        num_servers = self._trials.guess(design)
        if not self._is_inverse:
            return num_servers
        load = self.spec.num_instances / num_servers
        return max(1, round(math.log(HEAVIEST_LOAD / load, LOAD_STEP)))

    def _stride(self, size: int) -> int:
        if self._is_inverse:
            return round(math.log1p(EXCESS) / math.log(LOAD_STEP))
        return max(1, round(EXCESS * size))

    # --- the search ---

    def _outcomes(
        self, design: Design, sizes: Sequence[int], seeds: Sequence[int], why: str
    ) -> list[Outcome]:
        trials = [Trial(design, *self._fleet(size), seed) for size in sizes for seed in seeds]
        return self._trials.outcomes(why, trials)

    def _smallest(self, design: Design, guess: int, why: str) -> int:
        def holds(sizes: Sequence[int]) -> list[bool]:
            outcomes = self._outcomes(design, sizes, self._seeds[:1], why)
            return [outcome.attainment >= self.spec.attainment for outcome in outcomes]

        size = smallest(holds, guess, stride=self._stride(guess), most=self._most, width=self._width)
        if size is None:
            raise self._out_of_reach(design)
        return size

    def _that_fit(self, designs: Sequence[Design]) -> list[Design]:
        fitting = [design for design in designs if self._trials.fits(design)]
        if not fitting:
            largest = max(self.spec.pool_bytes(design) for design in designs)
            raise ValueError(
                f"pool_shares {', '.join(f'{each:g}' for each in self.spec.pool_shares)} of memory_bytes "
                f"{self.spec.memory_bytes} are {largest} bytes at most; the largest adapter takes more"
            )
        return fitting

    def _compare(
        self, designs: Sequence[Design], num_instances: int, load: float, why: str
    ) -> dict[Design, float]:
        """Attainment of each."""
        seeds = self._seeds[:NUM_COMPARED]
        trials = [Trial(design, num_instances, load, seed) for design in designs for seed in seeds]
        outcomes = iter(self._trials.outcomes(why, trials))
        return {design: Measured.of([next(outcomes) for _ in seeds]).attainment for design in designs}

    def _settled(self, design: Design, size: int) -> tuple[int, range]:
        """The smallest near `size` that holds for all seeds, and then for others; and these."""
        step, seeds = max(1, size // 50), self._seeds
        while size > step and self._holds(design, size, seeds) and self._holds(design, size - step, seeds):
            size -= step
        unseen = range(seeds.stop, seeds.stop + len(seeds))
        while True:
            if self._holds(design, size, seeds):
                if self._holds(design, size, unseen):
                    return size, unseen
                unseen = range(unseen.stop, unseen.stop + len(unseen))
            if size == self._most:
                raise self._out_of_reach(design)
            size = min(size + step, self._most)

    def _holds(self, design: Design, size: int, seeds: Sequence[int]) -> bool:
        """With the margin."""
        found = Measured.of(self._outcomes(design, [size], seeds, "with all seeds"))
        return found.attainment - found.spread >= self.spec.attainment

    def _out_of_reach(self, design: Design) -> ValueError:
        num_instances, load = self._fleet(self._most)
        [outcome] = self._outcomes(design, [self._most], self._seeds[:1], "the largest fleet")
        kept = [
            f"{name} {value:g} ms"
            for name, value in (("TTFT", self.spec.slo_ttft_ms), ("TPT", self.spec.slo_tpt_ms))
            if math.isfinite(value)
        ]
        return ValueError(
            f"{' and '.join(kept)} for {self.spec.attainment:.2%} of the requests cannot be had: with "
            f"{num_instances} servers at {load * self._trials.rate:.3g} requests/s it is "
            f"{outcome.attainment:.2%}, 99 % of first tokens within {outcome.ttft_p99_ms:.1f} ms, of times "
            f"per token within {outcome.tpt_p99_ms:.1f} ms"
        )

    # --- what is told ---

    def _told(self, design: Design, size: int, unseen_seeds: Sequence[int]) -> dict[str, Any]:
        """What a plan says of the chosen fleet."""
        spec, (num_instances, load) = self.spec, self._fleet(size)
        found = self._outcomes(design, [size], self._seeds, "")
        per_hour = num_instances * spec.gpu_cost
        prompt, response = (
            float(np.mean([getattr(each, name) for each in found])) * 3600 / 1e6
            for name in ("prompt_tokens_per_s", "response_tokens_per_s")
        )
        return {
            "num_instances": num_instances,
            "rate": load * self._trials.rate,
            "pool_bytes": spec.pool_bytes(design),
            "kv_cache_tokens": spec.kv_cache_tokens(design),
            "expected": Measured.of(found),
            "unseen": Measured.of(self._outcomes(design, [size], unseen_seeds, "")),
            "ttft_p99_ms": float(np.mean([each.ttft_p99_ms for each in found])),
            "tpt_p99_ms": float(np.mean([each.tpt_p99_ms for each in found])),
            "cost_per_hour": per_hour,
            "cost_of_tokens": per_hour / (prompt + response),
            "cost_of_response_tokens": per_hour / response,
            "sensitivity": self._sensitivity(design, num_instances, load),
            "curve": self._curve(design),
            "num_simulations": len(self._trials),
        }

    def _sensitivity(self, design: Design, num_instances: int, load: float) -> dict[str, Measured]:
        usual = Trial(design, num_instances, load, 0)
        changed = {
            f"load -{SWING:.0%}": replace(usual, load=load * (1 - SWING)),
            f"load +{SWING:.0%}": replace(usual, load=load * (1 + SWING)),
        }
        if num_instances > 1:
            changed["one server lost"] = replace(usual, loses_one=True)
        trials = [replace(trial, seed=seed) for trial in changed.values() for seed in self._seeds]
        outcomes = iter(self._trials.outcomes("what if", trials))
        return {name: Measured.of([next(outcomes) for _ in self._seeds]) for name in changed}

    def _curve(self, design: Design) -> list[tuple[float, float]]:
        points: dict[float, list[Outcome]] = {}
        for trial, outcome in self._trials.of_design(design).items():
            if trial.load == 1.0 or self._is_inverse:
                at = trial.load * self._trials.rate if self._is_inverse else trial.num_instances
                points.setdefault(at, []).append(outcome)
        return [(at, Measured.of(points[at]).attainment) for at in sorted(points)]


def _first_best(compared: Mapping[Design, float]) -> Design:
    """The first one listed of those that are as good as the best."""
    most = max(compared.values())
    return next(design for design, attainment in compared.items() if attainment >= most - TIE)
