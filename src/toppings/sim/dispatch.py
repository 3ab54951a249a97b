"""The simulated router: a policy over the fleet's accounts, and what the router knows of responses."""

from collections.abc import Iterable

from toppings.cluster.fleet import Fleet
from toppings.cluster.instances import Instances
from toppings.cluster.policies import PolicySettings, make_policy
from toppings.cluster.snapshot import InstanceSnapshot, Move, RequestSnapshot
from toppings.sim.instance import Instance
from toppings.sim.placement import SimPlacement
from toppings.sim.request import SimRequest
from toppings.sim.settings import NS_PER_S, SimConfig

RESPONSE_MEMORY = 1000
"""The mean response length weighs about the last so many responses, as in the router."""
SEED_STRIDE = 1_000_003
"""Between the seeds of routers of one run."""


class Dispatcher:
    """Router `index` of the configuration's. Row i of its fleet is instance i. It counts what it sent itself
    and what came back; what a server holds it hears in reports."""

    def __init__(
        self, config: SimConfig, adapter_names: list[str], adapter_bytes: list[int], index: int = 0
    ) -> None:
        seed = config.seed + index * SEED_STRIDE
        self.policy = make_policy(config.policy, PolicySettings(config.slo_tpt_ms, seed, config.candidates))
        self.index = index
        self.ids = [f"instance-{i}" for i in range(config.num_instances)]
        self.fleet = Fleet(
            InstanceSnapshot(
                instance_id=instance_id,
                perf_model=config.perf_model,
                kv_tokens_total=config.num_pages * config.page_size,
                max_num_seqs=config.max_num_seqs,
                on_device=frozenset(adapter_names if config.mode == "cached" else ()),
            )
            for instance_id in self.ids
        )
        self._rows = {instance_id: row for row, instance_id in enumerate(self.ids)}
        self.num_breaking = 0
        self._names, self._bytes = adapter_names, adapter_bytes
        self._believed: list[list[int]] = [[] for _ in self.ids]  # sent there since its last report
        if not config.host_store_bytes:
            everything = frozenset(adapter_names)
            self.fleet.on_host = [everything] * config.num_instances
        self._snapshot_interval = round(config.snapshot_interval_s * NS_PER_S)
        self._snapshot: Instances | None = None
        self._snapshot_due_at = 0
        self._mean_response_tokens = config.response_tokens
        self._num_responses = 1
        self._num_reported: dict[str, int] = {}
        self._uses_context = bool(config.perf_model.decode.coefficients.get("context_tokens"))

    @property
    def moves_requests(self) -> bool:
        """Whether the policy rebalances at all."""
        return self.policy.migrates

    def choose(self, request: SimRequest, now: int) -> int:
        """The row that the request goes to; it is counted there."""
        adapter_id = request.adapter_id
        assert adapter_id is not None
        snapshot = RequestSnapshot(
            request.request_id,
            self._names[adapter_id],
            request.rank,
            len(request.prompt_token_ids),
            self._mean_response_tokens,
            self._bytes[adapter_id],
        )
        choice = self.policy.choose(snapshot, self._view(now))
        assert choice is not None, "all instances are open"
        self.num_breaking += choice.breaks_slo
        self._count(choice.row, snapshot, adapter_id)
        return choice.row

    def _view(self, now: int) -> Instances:
        """What is decided on: the accounts, or the latest of their copies, taken at whole intervals."""
        if not self._snapshot_interval:
            return self.fleet
        if self._snapshot is None or now >= self._snapshot_due_at:
            self._snapshot = self.fleet.frozen()
            self._snapshot_due_at = (now // self._snapshot_interval + 1) * self._snapshot_interval
        return self._snapshot

    def _count(self, row: int, snapshot: RequestSnapshot, adapter_id: int) -> None:
        """The request is sent there, and its adapter is believed to be there soon."""
        self.fleet.enqueue(self.ids[row], snapshot)
        self.fleet.on_device[row].add(self._names[adapter_id])
        self._believed[row].append(adapter_id)

    def started(self, row: int, request: SimRequest) -> None:
        self.fleet.start(self.ids[row], request.request_id)

    def ended(self, row: int, request: SimRequest) -> None:
        self.fleet.finish(self.ids[row], request.request_id)
        if self._uses_context:
            self._num_reported.pop(request.request_id, None)
        self._num_responses = min(self._num_responses + 1, RESPONSE_MEMORY)
        self._mean_response_tokens += (
            request.num_to_generate - self._mean_response_tokens
        ) / self._num_responses

    def rejected(self, row: int, request: SimRequest) -> None:
        self.fleet.finish(self.ids[row], request.request_id)

    def moves(self) -> list[Move]:
        return self.policy.migrations(self.fleet)

    def rows_of(self, move: Move) -> tuple[int, int]:
        return self._rows[move.source_id], self._rows[move.target_id]

    def move(self, request: SimRequest, source: int, target: int) -> None:
        """The request waits on another server from now on; arguments as rows."""
        snapshot = self.fleet.queued[source][request.request_id]
        self.fleet.finish(self.ids[source], request.request_id)
        assert request.adapter_id is not None
        self._count(target, snapshot, request.adapter_id)

    def report(self, row: int, instance: Instance, changed: Iterable[int], now: int) -> None:
        """What the router hears of a server: cache in use, adapters it holds, progress of responses.

        `changed` are the adapters that came to its device or left it since the last report.
        """
        instance_id = self.ids[row]
        self.fleet.set_limits(instance_id, kv_tokens_used=instance.kv_tokens_used(now))
        self._report_adapters(row, instance.placement, changed)
        if self._uses_context:
            self._report_progress(instance_id, instance, now)

    def _report_adapters(self, row: int, placement: SimPlacement, changes: Iterable[int]) -> None:
        """Only what changed is looked at: what came or went there, and what the router only believed to be
        there.
        """
        on_device = self.fleet.on_device[row]
        changed, self._believed[row] = [*changes, *self._believed[row]], []
        for adapter_id in changed:
            if placement.holds(adapter_id):
                on_device.add(self._names[adapter_id])
            else:
                on_device.discard(self._names[adapter_id])
        host_ids = placement.host_ids()
        if host_ids is not None:
            self.fleet.on_host[row] = {self._names[a] for a in host_ids}

    def _report_progress(self, instance_id: str, instance: Instance, now: int) -> None:
        for request, num_computed in instance.running(now):
            if request.router != self.index:
                continue
            num_generated = num_computed - len(request.prompt_token_ids) + 1
            num_new = num_generated - self._num_reported.get(request.request_id, 0)
            if num_generated > 0 and num_new > 0:
                self.fleet.grow(instance_id, request.request_id, num_new)
                self._num_reported[request.request_id] = num_generated
