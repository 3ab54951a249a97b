"""Who may ask: the key, and without one only this machine for what changes the fleet. No HTTP library."""

import hmac
from ipaddress import ip_address
from urllib.parse import urlsplit

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def has_key(authorization: str, key: str) -> bool:
    """Whether the header is `Bearer <key>`; the scheme's case is the client's own."""
    scheme, _, given = authorization.partition(" ")
    matches = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), key.encode())
    return matches and scheme.lower() == "bearer"


def why_not_changed(peer: str | None, host: str, origin: str | None, own_host: str) -> str | None:
    """Without a key: why a client may not change the fleet; None where it may.

    The peer's address counts, forwarding headers are anyone's to write. The Host must be one of this
    machine's names: a page of a name that its owner lets point here has that name as Host and Origin.
    """
    if not is_loopback(peer):
        return "this route changes the fleet; without a configured api_key it answers loopback clients only"
    if _host_name(host) not in LOOPBACK_NAMES | {own_host.lower()}:
        named = f"a Host of {host[:100]!r}" if host else "a request without a Host"
        return f"without a configured api_key, {named} may not change the fleet; ask 127.0.0.1 or localhost"
    if origin is not None and _netloc(origin) != host.lower():
        return f"requests from web pages of {origin[:100]} may not change state"
    return None


def is_loopback(address: str | None) -> bool:
    try:
        parsed = ip_address(address or "")
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None
