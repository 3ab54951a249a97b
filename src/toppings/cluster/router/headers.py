"""What of a request's headers a server sees, and of an answer's headers a client."""

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from toppings.cluster.router.exchange import account_of
from toppings.cluster.router.flight import Flight
from toppings.cluster.router.state import RouterState
from toppings.cluster.router.upstream import Upstream
from toppings.cluster.snapshot import Choice
from toppings.request_ids import REQUEST_ID
from toppings.slo import BATCH, SLO_CLASS_HEADER
from toppings.tenants.book import TENANT_HEADER
from toppings.tenants.tenant import Tenant

HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"}
    | {"transfer-encoding", "upgrade", "host", "content-length", "expect"}
)


def _end_to_end(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    return CIMultiDict([pair for pair in headers.items() if pair[0].lower() not in HOP_BY_HOP])


def request_headers(
    state: RouterState, request: web.Request, upstream: Upstream, flight: Flight
) -> CIMultiDict[str]:
    """The client's own, with the id that its attempts have in common, the servers' key, and who asks. Keys
    that the router asks for, a tenant's or its administrator's, are for it alone."""
    kept, tenant = _end_to_end(request.headers), account_of(request).tenant
    kept[REQUEST_ID] = flight.client_id
    key = upstream.settings.upstream_api_key
    for name in (
        TENANT_HEADER,
        *(("X-Api-Key", "Authorization") if key or state.config.asks_for_keys else ()),
    ):
        kept.popall(name, None)
    if key:
        kept["Authorization"] = f"Bearer {key}"
    kept.update(upstream.headers_for(tenant))
    if flight.request.is_batch:
        kept[SLO_CLASS_HEADER] = BATCH
    flight.attempt.inject(kept)
    return kept


def response_headers(headers: CIMultiDictProxy[str], choice: Choice, tenant: Tenant) -> CIMultiDict[str]:
    """Which server it was is for administrators to know."""
    kept = _end_to_end(headers)
    if tenant.is_admin:
        kept["X-Toppings-Instance"] = choice.instance_id
    if choice.breaks_slo:
        kept["X-Toppings-SLO"] = "at-risk"
    return kept
