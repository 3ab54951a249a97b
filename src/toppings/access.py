"""Who may ask: API keys and where they come from, and what tells a client on this machine from a web page.

Pure functions for whatever serves HTTP here; none of them knows a web framework.
"""

import hmac
import logging
import os
import stat
from collections.abc import Collection
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from toppings.config import ConfigError

logger = logging.getLogger(__name__)

KEY_VARIABLE = "TOPPINGS_API_KEY"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def read_api_key(option: str = "", key_file: str | Path = "") -> str:
    """The first that is given: the option, what the file holds, the variable `TOPPINGS_API_KEY`; else "".

    Others on the machine see options in the list of processes. Raises ConfigError, without the key, for a
    file that cannot be read or is empty, and for a key that no header can carry.
    """
    if option:
        return _checked(option, "api_key")
    if key_file:
        return _checked(_read(Path(key_file)), f"the key in {key_file}")
    return _checked(os.environ.get(KEY_VARIABLE, "").strip(), KEY_VARIABLE)


def _read(path: Path) -> str:
    try:
        key = path.read_text(encoding="utf-8").strip()
        is_open = path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot read api_key_file {path}: {reason}") from None
    if not key:
        raise ConfigError(f"api_key_file {path} is empty; it must hold the key")
    if is_open:
        logger.warning("api_key_file %s can be read by others; chmod 600 it", path)
    return key


def _checked(key: str, place: str) -> str:
    if any(not char.isprintable() or char.isspace() for char in key):
        raise ConfigError(f"{place} holds white space or control characters; a key has none")
    return key


def is_key(authorization: bytes, key: str) -> bool:
    """Whether a header `Authorization` is `Bearer <key>`, compared in constant time."""
    scheme, _, given = authorization.strip().partition(b" ")
    return hmac.compare_digest(given.strip(), key.encode()) and scheme.lower() == b"bearer"


def is_loopback(address: str) -> bool:
    """Whether a peer's address is of this machine."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def is_named_here(host: str, configured: str) -> bool:
    """Whether a header `Host` (any port) names the loopback, or the host the server is to listen on.

    A web page can make any other name mean 127.0.0.1; its requests then come from this machine and its origin
    is the server's own.
    """
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return name in LOOPBACK_NAMES or (name is not None and name == configured.lower())


def is_own_page(origin: str | None, host: str, allowed: Collection[str] = ()) -> bool:
    """Whether a request is of no web page (no `Origin`), of the server's own, or of one of `allowed`."""
    try:
        return origin is None or origin in allowed or urlsplit(origin).netloc == host
    except ValueError:
        return False
