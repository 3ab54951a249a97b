"""How a caller is told no: in OpenAI's words, with what its clients read to wait."""

import math
from dataclasses import dataclass, field

from toppings.bad_input import shown

INVALID, DENIED = "invalid_request_error", "insufficient_permissions"
RATE_LIMITED = "rate_limit_exceeded"
MAX_MESSAGE_CHARS = 2000


@dataclass
class Refusal(Exception):
    """An answer with `status`; `kind`, `code` and `param` are of the error object."""

    status: int
    message: str
    kind: str = INVALID
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Names come from requests, and may be of any length."""
        self.message = shown(self.message, MAX_MESSAGE_CHARS)

    def __str__(self) -> str:
        return self.message


def unauthorized(*, is_given: bool) -> Refusal:
    """Neither the key nor a part of it is repeated."""
    message = "Incorrect API key provided."
    if not is_given:
        message = (
            "You didn't provide an API key. Send it in the header Authorization, as `Bearer KEY`, or in"
            " X-Api-Key."
        )
    return Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def expired(key_id: str, until: str) -> Refusal:
    """For a key that was right until then: whoever has it may know which one it is."""
    message = f"The API key {key_id} expired at {until}. Ask an administrator for a new one."
    return Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def denied(what: str) -> Refusal:
    return Refusal(403, f"You have insufficient permissions for this operation: {what}.", code=DENIED)


def no_access(tenant: str, model: str) -> Refusal:
    """For a model that the tenant may see: of others it is told that there is none."""
    return Refusal(
        403,
        f"Tenant `{tenant}` does not have access to model `{model}`",
        code="model_not_found",
        param="model",
    )


def limited(
    tenant: str, what: str, kind: str, *, limit: int, used: int, requested: int, wait_s: float
) -> Refusal:
    """429; `wait_s`: until it may be asked again, infinite where that would not help, which OpenAI's clients
    are told in their way, too."""
    counts = f"Limit {limit}, Used {used}, Requested {requested}."
    if math.isinf(wait_s):
        message = f"Request too large for tenant `{tenant}` on {what}: Limit {limit}, Requested {requested}."
        return Refusal(429, message, kind, RATE_LIMITED, headers={"X-Should-Retry": "false"})
    headers = {"Retry-After": str(max(1, math.ceil(wait_s))), "Retry-After-Ms": str(math.ceil(wait_s * 1e3))}
    message = (
        f"Rate limit reached for tenant `{tenant}` on {what}: {counts} Please try again in"
        f" {duration(wait_s)}."
    )
    return Refusal(429, message, kind, RATE_LIMITED, headers=headers)


def duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 1.5s, 6m0s, 1h2m3s."""
    if 0 < seconds < 1:
        return f"{math.ceil(seconds * 1e3)}ms"
    if seconds < 60:
        return f"{math.ceil(seconds * 1e3) / 1e3:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"
