"""The servers, the router's accounts and a policy on a virtual clock.

The accounts learn what the router's would, when they would: a request waits until its first token, and an
adapter counts as held where a request for it was sent. Only time to carry the news is left out.
"""

import heapq
from collections.abc import Sequence

from stand_in.load import Load
from stand_in.results import Observed
from stand_in.server import KV_TOKENS, MAX_NUM_SEQS, Job, Server
from toppings.cluster.fleet import Fleet
from toppings.cluster.perf_model import CONTEXT_TOKENS
from toppings.cluster.policies import Policy
from toppings.cluster.snapshot import InstanceSnapshot
from toppings.lab.outcome import Outcome

MIGRATION_INTERVAL_MS = 100.0


def observe(load: Load, policy: Policy, servers: Sequence[Server]) -> Observed:
    """Of servers that nobody has used yet; all the load's adapters are in their host memory."""
    jobs = load.jobs()
    trial = Trial(jobs, set(load.ranks), policy, servers)
    trial.run()
    outcomes = [
        Outcome(
            str(job.snapshot.adapter),
            job.arrived_at / 1e3,
            job.ended_at - job.arrived_at,
            job.first_token_at - job.arrived_at,
            job.num_tokens,
        )
        for job in jobs
    ]
    return Observed(outcomes, [server.rank_counts for server in trial.servers.values()])


class Trial:
    """One policy over one load, from its first arrival until everything has ended."""

    def __init__(
        self, jobs: list[Job], adapters: set[str], policy: Policy, servers: Sequence[Server]
    ) -> None:
        self.policy = policy
        self._on_host = adapters
        self.servers = {server.name: server for server in servers}
        model = servers[0].model
        self.fleet = Fleet(
            InstanceSnapshot(
                instance_id=name,
                perf_model=model,
                kv_tokens_total=KV_TOKENS,
                max_num_seqs=MAX_NUM_SEQS,
                max_adapters=servers[0].device_adapters,
                on_host=frozenset(adapters),
            )
            for name in self.servers
        )
        self.num_left = len(jobs)
        self.events: list[tuple[float, int, object]] = []
        self._busy: set[str] = set()
        self._counts_context = bool(model.decode.vector[CONTEXT_TOKENS])
        self._count = 0
        for job in jobs:
            self._at(job.arrived_at, job)
        self._at(MIGRATION_INTERVAL_MS, None)

    def run(self) -> None:
        while self.num_left:
            now, _, subject = heapq.heappop(self.events)
            if isinstance(subject, Server):
                self._end_step(now, subject)
            elif isinstance(subject, Job):
                self._arrive(now, subject)
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
        assert job.snapshot.adapter is not None
        self.fleet.enqueue(server.name, job.snapshot)
        self.fleet.add_adapter(server.name, job.snapshot.adapter)
        server.waiting.append(job)
        if server.name not in self._busy:
            self._start_step(now, server)

    def _start_step(self, now: float, server: Server) -> None:
        step_ms = server.start_step()
        if step_ms is None:
            self._busy.discard(server.name)
            return
        self._busy.add(server.name)
        self._at(now + step_ms, server)
        if server.batch:  # it has loaded adapters, and dropped others
            sent = {str(job.snapshot.adapter) for job in server.waiting}
            self.fleet.set_adapters(server.name, on_device={*server.held, *sent}, on_host=self._on_host)

    def _end_step(self, now: float, server: Server) -> None:
        served, ended = server.end_step()
        for job in server.batch:
            job.first_token_at = now
            self.fleet.start(server.name, job.snapshot.request_id)
        if self._counts_context:  # else no decision looks at it
            for job in served:
                self.fleet.grow(server.name, job.snapshot.request_id, 1)
        for job in ended:
            job.ended_at = now
            self.fleet.finish(server.name, job.snapshot.request_id)
        self.num_left -= len(ended)
        self.fleet.set_limits(server.name, kv_tokens_used=server.kv_tokens_used)
        self._start_step(now, server)

    def _rebalance(self, now: float) -> None:
        for move in self.policy.migrations(self.fleet):
            source = self.servers[move.source_id]
            waiting = (*source.waiting, *source.batch)
            job = next(j for j in waiting if j.snapshot.request_id == move.request_id)
            source.abort(job)
            self.fleet.finish(source.name, move.request_id)
            self._send(now, job, self.servers[move.target_id])
        self._at(now + MIGRATION_INTERVAL_MS, None)
