"""Who waits, and whose turn it is: weighted fair service in tokens, per tenant and within it per adapter.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each client has
what it was served, in tokens of prompts, by its weight; the one with the least is next. Who comes back from
idleness counts from where the others are now: the virtual time, which is what the last one to be chosen had
been served (start-time fair queueing, Goyal et al., 1996). So nobody saves up a claim, and nothing stands
idle for one who is. Clients form two levels: tenants, by their weights, and each tenant's adapters.

A prompt is charged when it starts, what is drawn for it before somebody asks whose turn it is: both depend on
the request alone, so that a step costs nothing. What is computed again after a preemption is not charged.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from toppings.core import Request
from toppings.engine.fair_clients import Client, Level

OUTPUT_WEIGHT = 2.0
"""What a token that is drawn costs, in tokens of a prompt: as in the publication."""

OWED_PER_TOKEN = 16.0
"""Tokens that a request draws, before it makes way again, for each that its new start had to compute."""


@dataclass(slots=True)
class Account:
    """Of a request, from its arrival to its end: whose it is, and how many of its tokens are charged."""

    client: Client
    tenant: Client
    num_outputs: int = 0
    has_started: bool = False


class FairQueue:
    """Requests that wait, and what was served to whom; by the policy `fcfs` all are one client's.

    `num_generated`: tokens that were drawn for a request; `in_turn`: the order among a client's own;
    `max_num_seqs`: places of those that run.
    """

    def __init__(
        self,
        policy: str,
        num_generated: Callable[[Request], int],
        in_turn: Callable[[Sequence[Request]], Iterator[Request]],
        max_num_seqs: int,
    ) -> None:
        self.tenants = Level()
        self._has_priorities = False  # whether a request has had another one than 0
        self._is_fair = policy != "fcfs"
        self._num_generated, self._in_turn = num_generated, in_turn
        self._max_num_seqs = max_num_seqs
        self._num_active = 0  # tenants
        self._active_weight = 0.0
        self._num_batch = 0  # requests of the class batch, waiting or running
        self._accounts: dict[Request, Account] = {}
        self._waiting: dict[Request, None] = {}
        self._running: dict[Request, Account] = {}
        self._aside: list[Client] = []  # for the rest of this step

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._waiting)

    def __contains__(self, request: object) -> bool:
        return request in self._waiting

    # --- who waits ---

    def add(self, request: Request) -> None:
        """It waits from now on: behind its client's others of its priority, as it arrived."""
        account = self._accounts.get(request)
        is_new = account is None
        if account is None:
            client = self._client_of(request)
            account = self._accounts[request] = Account(client, self._tenant_of(client))
            self._num_batch += request.is_batch
            if request.priority and not self._has_priorities:
                self._look_at_priorities()
        client = account.client
        self._waiting[request] = None
        client.insert(request, is_new=is_new)
        self._count(client, waiting=1)
        # Adapters first: a tenant's place is that of its first adapter.
        for level, each in self._levels(client):
            if each.num_waiting == 1:
                level.begin_wait(each, request.arrived_at)
            elif client.requests[0] is request:
                level.push(each)

    def _look_at_priorities(self) -> None:
        self._has_priorities = self.tenants.has_priorities = True
        for tenant in self.tenants.clients.values():
            self._adapters_of(tenant).has_priorities = True

    def remove(self, request: Request) -> None:
        """It has ended, waiting or running."""
        if request in self._waiting:
            self._leave(request)
        else:
            self._end_run(request)
        client = self._accounts.pop(request).client
        self._num_batch -= request.is_batch
        for level, each in self._levels(client):
            if not each.is_active:
                level.forget(each)

    def start(self, request: Request, num_tokens: float, now: float) -> None:
        """From waiting to running, to compute so many tokens of its prompt, and what else counts as such."""
        account = self._accounts[request]
        for level, each in self._levels(account.client):
            level.note_start(each, now)
        self._count(account.client, running=1)
        self._leave(request)
        self._running[request] = account
        if account.has_started:
            request.num_owed_tokens += (1 if request.is_batch else OWED_PER_TOKEN) * num_tokens
        else:
            account.has_started = True
            self._charge(account, num_tokens)

    def put_back(self, request: Request) -> None:
        """From running to waiting: it was preempted."""
        self._end_run(request)
        self.add(request)

    def _end_run(self, request: Request) -> None:
        account = self._running.pop(request)
        self._settle(request, account)
        self._count(account.client, running=-1)

    def _leave(self, request: Request) -> None:
        client = self._accounts[request].client
        del self._waiting[request]
        client.requests.remove(request)
        self._count(client, waiting=-1)
        for level, each in self._levels(client):
            if not each.num_waiting:
                level.end_wait(each)

    # --- whose turn it is ---

    @property
    def first(self) -> Request | None:
        """Whose turn is next, as far as what was served is known."""
        tenant = self.tenants.peek()
        client = None if tenant is None or tenant.adapters is None else tenant.adapters.peek()
        return None if client is None else client.requests[0]

    def candidates(self, now: float) -> Generator[Request, None, None]:
        """Those that wait, as their turns come; whoever starts one says so before it asks for the next."""
        orders: dict[Client, Iterator[Request]] = {}
        try:
            while (client := self._next(now)) is not None:
                if client not in orders:
                    orders[client] = self._in_turn(client.requests)
                request = next(orders[client], None)
                if request is not None:
                    yield request
                elif client.num_waiting:  # all that are left have been asked for
                    self._set_aside(client)
        finally:
            self._restore()

    def pass_over(self, request: Request) -> None:
        """It cannot start in this step, nor can others of its tenant."""
        account = self._accounts[request]
        self._set_aside(account.client)
        account.tenant.is_aside = True

    def _next(self, now: float) -> Client | None:
        tenant = self.tenants.next(now)
        return None if tenant is None or tenant.adapters is None else tenant.adapters.next(now)

    def _set_aside(self, client: Client) -> None:
        client.is_aside = True
        self._aside.append(client)
        (level, _), (_, tenant) = self._levels(client)
        tenant.is_aside = level.peek() is None

    def _restore(self) -> None:
        aside, self._aside = self._aside, []
        pairs = [pair for client in aside for pair in self._levels(client)]
        for _, each in pairs:
            each.is_aside = False
        for level, each in pairs:
            if each.num_waiting and each.entry is None:
                level.push(each)

    def precedes(self, request: Request, other: Request) -> bool:
        """Its client is before the other's, which is running."""
        return self._place(request) < self._place(other)

    def _place(self, request: Request) -> tuple[int, float, float]:
        account = self._accounts[request]
        return request.priority, account.tenant.served, account.client.served

    def tenant_of(self, request: Request) -> Client:
        return self._accounts[request].tenant

    def is_running(self, request: Request) -> bool:
        return request in self._running

    def num_lost(self, request: Request) -> int:
        """Tokens that are to be computed again if it makes way now."""
        return len(request.prompt_token_ids) + self._num_generated(request)

    def is_guest(self, request: Request) -> bool:
        """Its tenant asks for no more than its share of places, while others do."""
        if not self.has_several_tenants:
            return False
        tenant = self.tenant_of(request)
        num_asked = tenant.num_waiting + tenant.num_running
        return num_asked <= max(1.0, self.share_of(tenant) * self._max_num_seqs)

    def share_of(self, tenant: Client) -> float:
        """By weight, among the tenants that have requests."""
        return tenant.weight / self._active_weight

    @property
    def has_several_tenants(self) -> bool:
        """With requests, waiting or running."""
        return self._num_active > 1

    @property
    def may_displace(self) -> bool:
        """A request that waits may have a claim to the place of one that runs."""
        return self.has_several_tenants or self._num_batch > 0

    @property
    def is_contended(self) -> bool:
        """Several clients may have requests, or there are some of both classes."""
        tenants = self.tenants.clients.values()
        return (
            len(tenants) > 1
            or self._num_batch > 0
            or any(len(self._adapters_of(tenant).clients) > 1 for tenant in tenants)
        )

    # --- what was served ---

    def settle(self) -> None:
        """Charge what has been drawn, if there is somebody to compare with."""
        if self.is_contended:
            num_generated = self._num_generated
            for request, account in self._running.items():
                if (num_new := num_generated(request) - account.num_outputs) > 0:
                    self._note_drawn(request, account, num_new)

    def settle_one(self, request: Request) -> None:
        """Charge what has been drawn for it, which runs."""
        self._settle(request, self._running[request])

    def refund(self, request: Request, num_tokens: int) -> None:
        """Tokens of its prompt that were not computed."""
        account = self._accounts[request]
        self._charge(account, -num_tokens)
        for level, each in self._levels(account.client):
            if each.num_waiting:
                level.push(each)

    def _settle(self, request: Request, account: Account) -> None:
        num_new = self._num_generated(request) - account.num_outputs
        if num_new > 0:
            self._note_drawn(request, account, num_new)

    @staticmethod
    def _note_drawn(request: Request, account: Account, num_new: int) -> None:
        account.num_outputs += num_new
        account.client.served += OUTPUT_WEIGHT * num_new
        account.tenant.served += OUTPUT_WEIGHT * num_new / account.tenant.weight
        if request.num_owed_tokens:
            request.num_owed_tokens = max(0.0, request.num_owed_tokens - num_new)

    @staticmethod
    def _charge(account: Account, num_tokens: float) -> None:
        account.client.served += num_tokens
        account.tenant.served += num_tokens / account.tenant.weight

    # --- clients ---

    def _client_of(self, request: Request) -> Client:
        is_fair = self._is_fair
        tenant = self.tenants.client(request.tenant if is_fair else "", None)
        self._active_weight += (request.weight - tenant.weight) * tenant.is_active
        tenant.weight = request.weight
        if tenant.adapters is None:
            tenant.adapters = Level()
            tenant.adapters.has_priorities = self._has_priorities
        return tenant.adapters.client(request.adapter_id if is_fair else None, tenant)

    def _levels(self, client: Client) -> Iterable[tuple[Level, Client]]:
        tenant = self._tenant_of(client)
        return (self._adapters_of(tenant), client), (self.tenants, tenant)

    @staticmethod
    def _tenant_of(client: Client) -> Client:
        assert client.parent is not None
        return client.parent

    @staticmethod
    def _adapters_of(tenant: Client) -> Level:
        assert tenant.adapters is not None
        return tenant.adapters

    def _count(self, client: Client, *, waiting: int = 0, running: int = 0) -> None:
        tenant = self._tenant_of(client)
        was_active = tenant.is_active
        for each in (client, tenant):
            each.num_waiting += waiting
            each.num_running += running
        if was_active != tenant.is_active:
            change = 1 if tenant.is_active else -1
            self._num_active += change
            self._active_weight = self._num_active and self._active_weight + change * tenant.weight

    def check_integrity(self, running: Sequence[Request]) -> None:
        """Counts are those of the requests, and all that wait can come to their turn."""
        assert self._running.keys() == set(running), "who runs is not known"
        active = [t for t in self.tenants.clients.values() if t.is_active]
        assert self._num_active == len(active), "tenants are counted wrongly"
        assert abs(self._active_weight - sum(t.weight for t in active)) <= 1e-6 * (1 + self._active_weight)
        assert self._accounts.keys() == {*self._waiting, *self._running}, "a request has no account"
        assert self._num_batch == sum(r.is_batch for r in self._accounts), (
            "batch requests are counted wrongly"
        )
        for tenant in self.tenants.clients.values():
            assert tenant.adapters is not None
            clients = tenant.adapters.clients.values()
            assert tenant.num_waiting == sum(c.num_waiting for c in clients), "a tenant counts wrongly"
            assert tenant.num_running == sum(c.num_running for c in clients), "a tenant counts wrongly"
            for client in clients:
                assert client.num_waiting == len(client.requests), "a client counts wrongly"
                assert not client.is_aside, "a client stands aside between steps"
        assert sum(t.num_waiting for t in self.tenants.clients.values()) == len(self._waiting)
        assert (self.first is None) == (not self._waiting), "nobody's turn comes"
