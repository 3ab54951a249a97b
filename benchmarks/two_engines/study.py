"""What is asked of the engines: whether placements come in the order that simulations say, and whether a plan
keeps what it promised.
"""

import asyncio
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from stand_in import over_http
from stand_in.load import BYTES_PER_RANK, Load

from toppings.cluster.perf_model import PerfModel
from toppings.lab.capacity.planner import FleetPlan, Planner
from toppings.lab.capacity.spec import PlanSpec
from toppings.lab.capacity.trials import Trials
from toppings.lab.outcome import Outcome
from toppings.lab.players.simulator import SimulatorPlayer
from toppings.lab.validation.loads import MEAN_RESPONSE
from toppings.sim.runs import run_jobs
from toppings.sim.settings import base_tpt_ms
from toppings.sim.trace import Trace
from two_engines.fleet import (
    KV_TOKENS,
    NUM_ENGINES,
    POLICY,
    SHAPE,
    Home,
    Setting,
    make_home,
    play,
    running_engines,
)

SLO_FACTOR = 4.0
"""Objective for the time per token, in terms of the base model's alone: answers are short, and their prompts
and loads count."""
WARM_UP_SHARE = 0.15
"""Of a load, that is not counted: before it devices hold what others left there, or nothing."""
CALIBRATION_SEED, UNSEEN_SEED = 1000, 2000
CALIBRATION_SHARE = 0.6
"""Of the rate at which simulated servers saturate."""
NUM_CALIBRATIONS, LEAST_SLOWNESS = 3, 0.02
OVERLOAD = 1.15
"""Of the load that the plan promises for, so that placements differ."""
TIE = 0.02
"""Of attainment: placements this close have no order."""
SETTING = Setting()
TOY_SETTING = Setting(
    shape=replace(SHAPE, hidden=64, layers=2, heads=4, kv_heads=4, intermediate=128, vocab=512),
    num_adapters=12,
    slots=4,
    load_ms=0.5,
    profile_s=0.0,
    num_requests=12,
    seeds=1,
    plan_seeds=2,
    placements=("none", "adaptive"),
)
Row = dict[str, Any]


def study(setting: Setting) -> Iterator[Row]:
    """A row of each placement, and in the end those of the order and of the plan."""
    with make_home(setting) as home:
        told = asyncio.run(_with_engines(home))
    yield {"what": "calibration", **told.calibration}
    yield {"what": "plan", **told.promise}
    by_clock: dict[str, dict[str, float]] = {"engines": told.attained}
    for clock, observe in (("simulated", _simulated), ("stand-ins", _over_stand_ins)):
        by_clock[clock] = {
            placement: _mean(
                [_attained(observe(told, placement, trace), trace, told.slo_ms) for trace in told.traces]
            )
            for placement in setting.placements
        }
    for placement in setting.placements:
        attained = {clock: row[placement] for clock, row in by_clock.items()}
        yield {"what": "placement", "placement": placement, "rate": told.traces[0].rate, **attained}
    yield {
        "what": "order",
        **{
            f"{clock}_as_simulated": is_same_order(by_clock[clock], by_clock["simulated"])
            for clock in ("engines", "stand-ins")
        },
    }


def is_same_order(found: dict[str, float], simulated: dict[str, float]) -> bool:
    """No pair is clearly one way here and clearly the other way there."""
    return not any(
        abs(found[a] - found[b]) > TIE
        and abs(simulated[a] - simulated[b]) > TIE
        and (found[a] > found[b]) != (simulated[a] > simulated[b])
        for a, b in combinations(found, 2)
    )


@dataclass(frozen=True)
class _Told:
    """What the engines told; `model` has what steps cost where both run, `traces` are the order's."""

    setting: Setting
    model: PerfModel
    slo_ms: float
    traces: Sequence[Trace]
    calibration: Row
    promise: Row
    attained: dict[str, float]


async def _with_engines(home: Home) -> _Told:
    setting = home.setting
    async with running_engines(home) as urls:
        slowness, model = await _calibrated(home, urls)
        slo_ms = SLO_FACTOR * base_tpt_ms(model)
        plan = _plan(setting, model, slo_ms)
        promise = await _held_against(plan, setting, urls, slo_ms)
        traces = [setting.trace(seed, OVERLOAD * plan.rate) for seed in range(setting.seeds)]
        attained: dict[str, float] = {}
        for placement in setting.placements:
            outcomes = [await play(urls, placement, slo_ms, trace) for trace in traces]
            attained[placement] = _mean(
                [_attained(each, trace, slo_ms) for each, trace in zip(outcomes, traces, strict=True)]
            )
    calibration = {
        "slowness": slowness,
        "base_tpt_ms": base_tpt_ms(model),
        "slo_tpt_ms": slo_ms,
        "link_gbps": model.link_gbps,
        "r2": home.steps.details.get("r2"),
        "machine_load": os.getloadavg()[0],
    }
    return _Told(setting, model, slo_ms, traces, calibration, promise, attained)


async def _calibrated(home: Home, urls: Sequence[str]) -> tuple[float, PerfModel]:
    """The steps' costs times what makes the time per token of a load, simulated, that of the engines: beside
    each other, and with router and client on the same cores, they are slower than one alone.
    """
    setting, player = home.setting, SimulatorPlayer
    config = setting.simulated(home.steps)
    saturated = player(config).play(setting.trace(CALIBRATION_SEED, 1e6))
    ended_after_s = max(each.sent_at + each.e2e_ms / 1e3 for each in saturated)
    trace = setting.trace(CALIBRATION_SEED, CALIBRATION_SHARE * len(saturated) / ended_after_s)
    found = _mean_tpt_ms(await play(urls, "none", float("inf"), trace))
    slowness = 1.0
    for _ in range(NUM_CALIBRATIONS):
        model = _slower(home.steps, slowness)
        simulated = _mean_tpt_ms(player(replace(config, perf_model=model)).play(trace))
        slowness = max(LEAST_SLOWNESS, slowness * found / simulated)
    return slowness, _slower(home.steps, slowness)


def _slower(model: PerfModel, factor: float) -> PerfModel:
    """Steps; loads take what the emulated link says."""
    return replace(over_http.stretched(model, factor), link_gbps=model.link_gbps)


def _plan(setting: Setting, model: PerfModel, slo_ms: float) -> FleetPlan:
    """The load that so many servers hold, and with which placement."""
    config = setting.simulated(model)
    memory_bytes = config.device_pool_bytes + KV_TOKENS * setting.kv_token_bytes
    share = (config.device_pool_bytes + 0.5) / memory_bytes
    spec = PlanSpec(
        slo_tpt_ms=slo_ms,
        attainment=setting.attainment,
        num_instances=NUM_ENGINES,
        policies=(POLICY,),
        placements=setting.placements,
        memory_bytes=memory_bytes,
        kv_token_bytes=setting.kv_token_bytes,
        pool_shares=(share,),
        seeds=setting.plan_seeds,
    )
    base = replace(config, slo_tpt_ms=slo_ms)

    def run(purpose: str, jobs: Any) -> Any:
        return run_jobs(jobs, num_processes=1)

    trials = Trials(spec, base, lambda seed: setting.trace(seed, 1.0), run)
    return Planner(trials, 0, 1).plan()


async def _held_against(plan: FleetPlan, setting: Setting, urls: Sequence[str], slo_ms: float) -> Row:
    """What it promised and what the engines attain, over loads that it has not seen."""
    traces = [setting.trace(UNSEEN_SEED + i, plan.rate) for i in range(setting.seeds)]
    placement = plan.design.placement
    found = [
        _attained(await play(urls, placement, slo_ms, trace), trace, slo_ms, warm_up_share=0.0)
        for trace in traces
    ]
    return {
        "rate": plan.rate,
        "placement": placement,
        "promised": plan.expected.attainment,
        "promised_unseen": plan.unseen.attainment,
        "found": _mean(found),
        "found_by_load": found,
        "difference": _mean(found) - plan.unseen.attainment,
    }


def _simulated(told: _Told, placement: str, trace: Trace) -> list[Outcome]:
    config = told.setting.simulated(told.model)
    return SimulatorPlayer(replace(config, placement=placement, slo_tpt_ms=told.slo_ms)).play(trace)


def _over_stand_ins(told: _Told, placement: str, trace: Trace) -> list[Outcome]:
    """Adapters of stand-ins are of another size, so that their link is as much faster."""
    setting, gbps = told.setting, told.model.link_gbps
    assert gbps is not None
    model = replace(told.model, link_gbps=gbps * BYTES_PER_RANK / setting.bytes_per_rank)
    observed = over_http.observe(
        Load(trace, float(MEAN_RESPONSE)),
        POLICY,
        over_http.Stretched.of(model, told.slo_ms, 1.0),
        num_servers=NUM_ENGINES,
        device_adapters=setting.slots,
        seed=0,
        placement=placement,
        num_copies=1,
    )
    return list(observed.outcomes)


def _attained(
    outcomes: Sequence[Outcome], trace: Trace, slo_ms: float, *, warm_up_share: float = WARM_UP_SHARE
) -> float:
    """Share of the requests after the warm-up that were within the objective."""
    is_counted = trace.arrivals_s >= warm_up_share * trace.duration_s
    tpt_ms = np.array([each.tpt_ms for each in outcomes], dtype=np.float64)
    return float((tpt_ms[is_counted] <= slo_ms).mean())


def _mean_tpt_ms(outcomes: Sequence[Outcome]) -> float:
    return _mean([each.tpt_ms or 0.0 for each in outcomes])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
