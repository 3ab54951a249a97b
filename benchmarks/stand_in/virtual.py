"""The servers and the router's dispatcher on a virtual clock.

It learns what the router's would, when that would; only time to carry the news is left out.
"""

import heapq
from collections.abc import Sequence

from stand_in.load import Load
from stand_in.results import Observed
from stand_in.server import Job, Server
from toppings.cluster.dispatcher import Dispatcher
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
        self._on_host = adapters
        self.servers = {server.name: server for server in servers}
        model = servers[0].model
        snapshots = (InstanceSnapshot(instance_id=name, perf_model=model) for name in self.servers)
        self.dispatcher = Dispatcher(policy, snapshots)
        for server in servers:
            self._report(server)
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
        self.dispatcher.fleet.check_integrity()
        assert not self.dispatcher.fleet.num_requests.any()

    def _at(self, time_ms: float, subject: object) -> None:
        self._count += 1
        heapq.heappush(self.events, (time_ms, self._count, subject))

    def _arrive(self, now: float, job: Job) -> None:
        choice = self.dispatcher.place(job.snapshot, now)
        assert choice is not None
        self._take_in(now, job, self.servers[choice.instance_id])

    def _take_in(self, now: float, job: Job, server: Server) -> None:
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
            self._report(server)

    def _report(self, server: Server) -> None:
        self.dispatcher.report(server.name, server.report(self._on_host))

    def _end_step(self, now: float, server: Server) -> None:
        served, ended = server.end_step()
        for job in server.batch:
            job.first_token_at = now
            self.dispatcher.started(job.snapshot.request_id)
        if self._counts_context:  # else no decision looks at it
            for job in served:
                self.dispatcher.grown(job.snapshot.request_id, 1)
        for job in ended:
            job.ended_at = now
            self.dispatcher.ended(job.snapshot.request_id)
        self.num_left -= len(ended)
        self._report(server)
        self._start_step(now, server)

    def _rebalance(self, now: float) -> None:
        for move in self.dispatcher.moves():
            source = self.servers[move.source_id]
            waiting = (*source.waiting, *source.batch)
            job = next(j for j in waiting if j.snapshot.request_id == move.request_id)
            source.abort(job)
            self.dispatcher.sent(job.snapshot, move.target_id)
            self._take_in(now, job, self.servers[move.target_id])
        self._at(now + MIGRATION_INTERVAL_MS, None)
