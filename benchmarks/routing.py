"""Policies compared: SLO attainment, TPT and TTFT of eight servers at three rates (published Fig. 18).

The servers are stand-ins on a virtual clock: continuous batching whose steps take what the performance model
of the published machine says, a prefill that interrupts decoding, adapters loaded before the prefill that
needs them and kept while there is room (least recently used leaves). Policies and accounts are the router's.
Load: Poisson arrivals, lognormal lengths with the means of LMSYS chat (70 and 214 tokens), 512 adapters of
four ranks with the popularity of the published traces. The SLO is 1.5 times the base model's TPT. What it
leaves out: HTTP, stale knowledge of the servers, chunked prefill, preemption. Ends in one JSON line.
"""

import argparse
import heapq
import json
import math
import random
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace
from statistics import mean, quantiles, stdev

from toppings.cluster.fleet import Fleet
from toppings.cluster.perf_model import BatchRow, PerfModel, load_perf_model
from toppings.cluster.policies import POLICIES, Policy, PolicySettings, make_policy
from toppings.cluster.snapshot import InstanceSnapshot, RequestSnapshot

RANKS = (8, 16, 32, 64)
NUM_ADAPTERS = 512
BYTES_PER_RANK = 101_000_000 / 64  # Llama-2-7B, q, k and v
MAX_NUM_SEQS = 64
MAX_DEVICE_ADAPTERS = 64
KV_TOKENS = 40_000.0  # what 40 GB leave beside Llama-2-7B and its adapters
MEAN_PROMPT, MEAN_RESPONSE, MAX_TOKENS = 70, 214, 1000
LENGTH_SIGMA = 0.9
MIGRATION_INTERVAL_MS = 100.0
WARM_UP_SHARE = 0.15


@dataclass(slots=True)
class Job:
    snapshot: RequestSnapshot
    num_tokens: int
    arrived_at: float
    first_token_at: float = 0.0
    ended_at: float = 0.0
    num_done: int = 0

    @property
    def tpt_ms(self) -> float:
        return (self.ended_at - self.arrived_at) / self.num_tokens


@dataclass(slots=True)
class Server:
    """One stand-in; `batch` is what its step under way computes."""

    name: str
    model: PerfModel
    waiting: deque[Job] = field(default_factory=deque)
    running: list[Job] = field(default_factory=list)
    batch: list[Job] = field(default_factory=list)
    is_busy: bool = False
    held: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def start_step(self) -> float | None:
        """The ms that the next step takes; None where there is nothing to do."""
        room = MAX_NUM_SEQS - len(self.running)
        self.batch = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
        if self.batch:
            rows = [BatchRow(j.snapshot.rank, num_tokens=j.snapshot.prompt_tokens) for j in self.batch]
            loads = sum(self._load_ms(job.snapshot) for job in self.batch)
            return self.model.prefill.predict_batch(rows) + loads
        if self.running:
            return self.model.decode.predict_batch(BatchRow(job.snapshot.rank) for job in self.running)
        return None

    def _load_ms(self, request: RequestSnapshot) -> float:
        assert request.adapter is not None
        is_held = request.adapter in self.held
        self.held[request.adapter] = None
        self.held.move_to_end(request.adapter)
        if len(self.held) > MAX_DEVICE_ADAPTERS:
            self.held.popitem(last=False)
        return 0.0 if is_held else self.model.load_ms(request.adapter_bytes, is_on_host=True)

    def end_step(self) -> list[Job]:
        """The jobs that got a token; those whose last it was are no longer running."""
        self.running += self.batch
        served = self.batch or list(self.running)
        for job in served:
            job.num_done += 1
        self.running = [job for job in self.running if job.num_done < job.num_tokens]
        return served


class Trial:
    """One policy over one load, from its first arrival until everything has ended."""

    def __init__(self, jobs: list[Job], policy: Policy, model: PerfModel, num_servers: int) -> None:
        self.policy = policy
        self.servers = {f"s{i}": Server(f"s{i}", model) for i in range(num_servers)}
        self.fleet = Fleet(
            InstanceSnapshot(
                instance_id=name,
                perf_model=model,
                kv_tokens_total=KV_TOKENS,
                max_num_seqs=MAX_NUM_SEQS,
                max_adapters=MAX_DEVICE_ADAPTERS,
            )
            for name in self.servers
        )
        self.num_left = len(jobs)
        self.events: list[tuple[float, int, object]] = []
        self._count = 0
        for job in jobs:
            self._at(job.arrived_at, job)
        self._at(MIGRATION_INTERVAL_MS, None)

    def run(self) -> None:
        while self.num_left:
            now, _, subject = heapq.heappop(self.events)
            if isinstance(subject, Job):
                self._arrive(now, subject)
            elif isinstance(subject, Server):
                self._end_step(now, subject)
            else:
                self._rebalance(now)
        self.fleet.check_integrity()
        assert not self.fleet.num_requests.any()

    def _at(self, time_ms: float, subject: object) -> None:
        self._count += 1
        heapq.heappush(self.events, (time_ms, self._count, subject))

    def _arrive(self, now: float, job: Job) -> None:
        choice = self.policy.choose(job.snapshot, self.fleet)
        assert choice is not None
        self._send(now, job, self.servers[choice.instance_id])

    def _send(self, now: float, job: Job, server: Server) -> None:
        self.fleet.enqueue(server.name, job.snapshot)
        server.waiting.append(job)
        if not server.is_busy:
            self._start_step(now, server)

    def _start_step(self, now: float, server: Server) -> None:
        step_ms = server.start_step()
        server.is_busy = step_ms is not None
        for job in server.batch:  # admitted: it waits no longer
            self.fleet.start(server.name, job.snapshot.request_id)
        if step_ms is not None:
            self.fleet.set_adapters(server.name, on_device=set(server.held), on_host=set())
            self._at(now + step_ms, server)

    def _end_step(self, now: float, server: Server) -> None:
        for job in server.end_step():
            if job.num_done == 1:
                job.first_token_at = now
            self.fleet.grow(server.name, job.snapshot.request_id, 1)
            if job.num_done == job.num_tokens:
                job.ended_at = now
                self.num_left -= 1
                self.fleet.finish(server.name, job.snapshot.request_id)
        self._start_step(now, server)

    def _rebalance(self, now: float) -> None:
        for move in self.policy.migrations(self.fleet):
            source = self.servers[move.source_id]
            job = next(j for j in source.waiting if j.snapshot.request_id == move.request_id)
            source.waiting.remove(job)
            self.fleet.finish(source.name, move.request_id)
            self._send(now, job, self.servers[move.target_id])
        self._at(now + MIGRATION_INTERVAL_MS, None)


def adapter_popularity() -> list[float]:
    """p(i) ~ exp(-8.6 x^0.58), x = (i - 0.5) / N: the curve of the published traces."""
    return [math.exp(-8.6 * ((i + 0.5) / NUM_ADAPTERS) ** 0.58) for i in range(NUM_ADAPTERS)]


def make_jobs(rate: float, duration_s: float, seed: int) -> list[Job]:
    """Poisson arrivals at `rate` requests/s; the adapters' ranks are dealt at random, the seed's own deal."""
    generator = random.Random(seed)
    ranks = [generator.choice(RANKS) for _ in range(NUM_ADAPTERS)]
    weights = adapter_popularity()
    jobs: list[Job] = []
    now = 0.0
    while (now := now + generator.expovariate(rate)) < duration_s:
        number = generator.choices(range(NUM_ADAPTERS), weights)[0]
        snapshot = RequestSnapshot(
            request_id=str(len(jobs)),
            adapter=f"a{number}",
            rank=ranks[number],
            prompt_tokens=draw_length(generator, MEAN_PROMPT),
            response_tokens=float(MEAN_RESPONSE),
            adapter_bytes=round(ranks[number] * BYTES_PER_RANK),
        )
        jobs.append(Job(snapshot, draw_length(generator, MEAN_RESPONSE), now * 1e3))
    return jobs


def draw_length(generator: random.Random, mean_tokens: float) -> int:
    mu = math.log(mean_tokens) - LENGTH_SIGMA**2 / 2
    return max(1, min(MAX_TOKENS, round(generator.lognormvariate(mu, LENGTH_SIGMA))))


def measure(
    name: str, rate: float, seed: int, *, model: PerfModel, duration_s: float, slo_ms: float
) -> dict[str, float]:
    jobs = make_jobs(rate, duration_s, seed)
    Trial(jobs, make_policy(name, PolicySettings(slo_ms, seed)), model, num_servers=8).run()
    counted = [job for job in jobs if job.arrived_at >= WARM_UP_SHARE * duration_s * 1e3]
    tpt = [job.tpt_ms for job in counted]
    ttft = [job.first_token_at - job.arrived_at for job in counted]
    return {
        "attainment": mean(value <= slo_ms for value in tpt),
        "tpt_ms": mean(tpt),
        "tpt_p99_ms": quantiles(tpt, n=100)[98],
        "ttft_ms": mean(ttft),
    }


def summarise(trials: list[dict[str, float]]) -> dict[str, float]:
    means = {key: mean(trial[key] for trial in trials) for key in trials[0]}
    spread = stdev(trial["attainment"] for trial in trials) if len(trials) > 1 else 0.0
    return {**means, "attainment_stdev": spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="a few seconds of load: checks that it runs")
    parser.add_argument("--rates", default="30,40,50", help="requests/s of all servers together")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--kernels", default="bgmv,mbgmv", help="decode forms of the published model")
    parser.add_argument("--link-gbps", type=float, default=24.0, help="what adapters are loaded at, GB/s")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--duration", type=float, default=120.0, help="seconds of arrivals, on the virtual clock"
    )
    options = parser.parse_args()
    seeds, duration_s = (1, 5.0) if options.toy else (options.seeds, options.duration)
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for kernel in options.kernels.split(","):
        model = replace(load_perf_model("published").using(kernel), link_gbps=options.link_gbps)
        slo_ms = 1.5 * model.decode.coefficients["steps"]
        for rate in map(float, options.rates.split(",")):
            row = results.setdefault(kernel, {}).setdefault(f"{rate:g}", {})
            for name in options.policies.split(","):
                trials = [
                    measure(name, rate, seed, model=model, duration_s=duration_s, slo_ms=slo_ms)
                    for seed in range(seeds)
                ]
                row[name] = summarise(trials)
                print(
                    f"{kernel:6s} {rate:4g}/s {name:21s} attainment {row[name]['attainment']:6.1%}"
                    f" ±{row[name]['attainment_stdev']:5.1%}  TPT {row[name]['tpt_ms']:5.1f}"
                    f" (p99 {row[name]['tpt_p99_ms']:5.1f})  TTFT {row[name]['ttft_ms']:6.1f} ms",
                    flush=True,
                )
    print(json.dumps({"benchmark": "routing", "seeds": seeds, "duration_s": duration_s, "results": results}))


if __name__ == "__main__":
    main()
