"""Who may ask: API keys and where they come from, and what tells a client on this machine from a web page.

Pure functions for whatever serves HTTP here; none of them knows a web framework.
"""

import logging
import os
import stat
from collections.abc import Collection
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from toppings.bad_input import shown
from toppings.config import Config, ConfigError

logger = logging.getLogger(__name__)

KEY_VARIABLE, UPSTREAM_KEY_VARIABLE = "TOPPINGS_API_KEY", "TOPPINGS_UPSTREAM_API_KEY"
JSON_TYPE = "application/json"
BROWSER_HEADERS = frozenset({"origin", "referer", "cookie"})
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def read_api_key(
    option: str = "",
    key_file: str | Path = "",
    *,
    name: str = "api_key",
    variable: str = KEY_VARIABLE,
) -> str:
    """The first that is given: the option, what the file holds, the environment's `variable`; else "".

    Others on the machine see options in the list of processes. Raises ConfigError, without the key, for a
    file that cannot be read or is empty, and for a key that no header can carry; `name` is the option's.
    """
    if option:
        return _checked(option, name)
    if key_file:
        return _checked(_read(Path(key_file), f"{name}_file"), f"the key in {key_file}")
    return _checked(os.environ.get(variable, "").strip(), variable)


def with_api_key(config: Config) -> Config:
    """`config` with the key read from where it stands; it is kept out of every file and message."""
    key = read_api_key(config.server.api_key, config.server.api_key_file)
    return replace(config, server=replace(config.server, api_key=key))


def _read(path: Path, name: str) -> str:
    try:
        key = path.read_text(encoding="utf-8").strip()
        is_open = path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot read {name} {path}: {reason}") from None
    if not key:
        raise ConfigError(f"{name} {path} is empty; it must hold the key")
    if is_open:
        logger.warning("%s %s can be read by others; chmod 600 it", name, path)
    return key


def _checked(key: str, place: str) -> str:
    if any(not char.isprintable() or char.isspace() for char in key):
        raise ConfigError(f"{place} holds white space or control characters; a key has none")
    return key


def why_not_changed(
    peer: str | None, host: str, origin: str | None, configured: str, allowed: Collection[str] = ()
) -> str | None:
    """Without a key: why a client may not change state; None where it may.

    It must be on this machine, ask by a name that no web page can make its own, and come from no foreign web
    page. The address of its connection, `peer`, counts: forwarding headers are anyone's to write. `host` and
    `origin` are its headers, `configured` is the host the server is to listen on, `allowed` are web pages.
    """
    if peer is None or not is_loopback(peer):
        return "without a configured api_key, routes that change state answer loopback clients only"
    if not _is_named_here(host, configured):
        return (
            f"the header Host is {shown(host)!r}; without a configured api_key, routes that change state "
            f"answer to localhost, 127.0.0.1, [::1] and {configured} only"
        )
    if not _is_own_page(origin, host, allowed):
        return f"requests from web pages of {shown(origin or '')} may not change state"
    return None


def why_not_json(content_type: str, headers: Collection[str], *, has_key: bool) -> str | None:
    """Why a body that changes state is not taken for JSON, by its content type; None where it is.

    The content type is a second lock on top of `why_not_changed`: a page of another site can send a form or a
    plain text to this machine without asking, but not JSON under its name. Where a key is asked for, no page
    can send that unasked, and any content type will do. Without a key, none at all will do too, if none of
    `headers` (names in small letters) is one that browsers add to what pages send.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if has_key or kind == JSON_TYPE or (kind.startswith("application/") and kind.endswith("+json")):
        return None
    if not kind and not any(name in BROWSER_HEADERS or name.startswith("sec-") for name in headers):
        return None
    sent = f"it is {shown(content_type)!r}" if content_type else "there is none"
    return f"the header Content-Type must be {JSON_TYPE}; {sent}"


def is_loopback(address: str) -> bool:
    """Whether a peer's address is of this machine."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def _is_named_here(host: str, configured: str) -> bool:
    """Whether a header `Host` (any port) names the loopback, or the host the server is to listen on.

    A web page can make any other name mean 127.0.0.1; its requests then come from this machine and its origin
    is the server's own.
    """
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return name in LOOPBACK_NAMES or (name is not None and name == configured.lower())


def _is_own_page(origin: str | None, host: str, allowed: Collection[str]) -> bool:
    """Whether a request is of no web page (no `Origin`), of the server's own, or of one of `allowed`."""
    try:
        return origin is None or origin in allowed or urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False
