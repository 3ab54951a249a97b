"""Who a request comes from: the tenants file as it is now, the administrator's key, and what a front says."""

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from weakref import ReferenceType, ref

from toppings.bad_input import shown
from toppings.settings import ConfigError
from toppings.tenants.account import Account
from toppings.tenants.expiry import Ending, Endings, read_instant
from toppings.tenants.file import KeyEntry, TenantsFile, parse, read_text
from toppings.tenants.keys import digest_of
from toppings.tenants.refusals import Refusal, denied, expired, unauthorized
from toppings.tenants.tenant import Tenant

logger = logging.getLogger(__name__)

TENANT_HEADER = "X-Toppings-Tenant"
"""Of a front to the servers behind it: `Tenant.to_header` of who asks."""
RELOAD_S = 1.0
MAX_DELEGATED = 4096
ADMIN = Tenant(admin="on")


class TenantBook:
    """Without a file and without a key everybody is an administrator. Of the file, what was read last and
    could be read counts. Used from one event loop; `reload` may be called from any thread. `clock`: seconds,
    for the limits; `wall_clock`: Unix time, for keys that expire.

    Raises ConfigError where the file cannot be read at first.
    """

    def __init__(
        self,
        path: str = "",
        api_key: str = "",
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._path, self.clock, self.wall_clock = Path(path) if path else None, clock, wall_clock
        self.asks_for_keys = bool(path or api_key)
        self._admin = Account(ADMIN, self.now)
        self._admin_digest = digest_of(api_key.encode()) if api_key else None
        self._accounts: dict[str, Account] = {}
        self._by_digest: dict[bytes, Account] = {}
        self._keys: dict[bytes, KeyEntry] = {}
        self._ends: dict[bytes, Ending] = {}  # of keys that expire, the first first
        self._endings = Endings()
        self._delegated: dict[str, Account] = {}
        self._secret = secrets.token_bytes(32)
        self.on_change: Callable[[TenantsFile, TenantsFile], None] | None = None
        """Called with the file as it was and as it is now; perhaps by the thread that watches it."""
        self._file = TenantsFile()
        self._mark: object = None
        self._complaint = ""
        self._fill(TenantsFile())
        if self._path is not None:
            self._mark = _mark_of(self._path)
            self._fill(parse(read_text(self._path), str(self._path)))

    def now(self) -> float:
        return self.clock()

    @property
    def accounts(self) -> Mapping[str, Account]:
        """By tenants' names."""
        return self._accounts

    # --- who is it ---

    def identify(self, authorization: bytes, plain: bytes, delegated: bytes | None = None) -> Account:
        """Who sent the headers `Authorization` (as `Bearer KEY`), `X-Api-Key` and `TENANT_HEADER`.

        Raises Refusal: 401 for a missing, wrong or expired key, 400 or 403 for a tenant's header that is none
        or comes from one who may not send it.
        """
        account = self._admin
        if self.asks_for_keys:
            digest = self._opening(authorization, plain)
            found = self._by_digest.get(digest)  # the file may just have changed
            if found is None:
                raise unauthorized(is_given=bool(authorization.strip() or plain.strip()))
            account, end = found, self._ends.get(digest)
            if end is not None and end.until <= self.wall_clock():
                raise expired(end.key_id, end.text)
        return account if delegated is None else self._act_for(account, delegated)

    def anybody(self) -> Account:
        """Who asks where no key is asked for."""
        return self._admin

    def key_of(self, authorization: bytes, plain: bytes) -> KeyEntry | None:
        """The tenants file's key that opens, or did until it expired; None where it is another, or none."""
        return self._keys.get(self._opening(authorization, plain))

    def _opening(self, authorization: bytes, plain: bytes) -> bytes:
        """The digest of the key that counts; b"" where none opens."""
        given = (digest for digest in _digests(authorization, plain) if digest in self._by_digest)
        return next(given, b"")

    def _act_for(self, account: Account, header: bytes) -> Account:
        """The tenant that a front names; its limits are the front's to hold."""
        if not account.tenant.is_admin:
            raise denied(f"the header {TENANT_HEADER} is for administrators' keys")
        text = header.decode("latin-1")
        found = self._delegated.get(text)
        if found is None:
            try:
                found = Account(Tenant.from_header(text), self.now)
            except ConfigError as error:
                raise Refusal(400, f"the header {TENANT_HEADER} is {shown(text)!r}: {error}") from error
            if len(self._delegated) >= MAX_DELEGATED:
                del self._delegated[next(iter(self._delegated))]
            self._delegated[text] = found
        return found

    def salt(self, tenant: Tenant, given: str | None) -> str | None:
        """What keeps the cached blocks of a tenant's prompts apart from others': nobody else can name it."""
        if not tenant.has_own_cache:
            return given
        text = f"{tenant.name}\0{'' if given is None else given}"
        return blake2b(text.encode(), key=self._secret, digest_size=32).hexdigest()

    # --- the file ---

    def reload(self) -> bool:
        """Whether the file has changed and was read. One that cannot be read leaves all as it was; the log
        says so, once, and it is tried again at the next look."""
        if self._path is None:
            return False
        mark = _mark_of(self._path)
        if mark == self._mark:
            return False
        try:
            text = read_text(self._path)
        except ConfigError as error:  # perhaps for a moment only: its mark is not kept
            self._complain(error)
            return False
        self._mark = mark
        try:
            file = parse(text, str(self._path))
        except ConfigError as error:
            self._complain(error)
            return False
        self._complaint = ""
        self._fill(file)
        logger.info("%s is read anew: %d tenants, %d keys", self._path, len(file.tenants), len(file.keys))
        return True

    def watch(self) -> None:
        """Read the file again, in a thread of its own, soon after it has changed; as long as the book is
        there."""
        if self._path is not None:
            threading.Thread(target=_watch, args=(ref(self),), name="toppings-tenants", daemon=True).start()

    def warn_of_endings(self) -> None:
        """In the log, of keys that expire soon or have; by the thread that watches the file."""
        self._endings.tell(self._ends.values(), self.wall_clock())

    def _complain(self, error: ConfigError) -> None:
        if str(error) != self._complaint:
            self._complaint = str(error)
            logger.error("the tenants stay as they were: %s", error)

    def _fill(self, file: TenantsFile) -> None:
        accounts = {}
        for name, tenant in file.tenants.items():
            account = accounts[name] = self._accounts.get(name) or Account(tenant, self.now)
            account.tenant = tenant
        for key in file.orphans:
            logger.warning("key %s opens nothing: there is no tenant %r", key.id, key.tenant)
        by_digest = {
            bytes.fromhex(key.sha256): accounts[key.tenant] for key in file.keys if key.tenant in accounts
        }
        keys, ends = {bytes.fromhex(key.sha256): key for key in file.keys}, _ends_of(file)
        if self._admin_digest is not None:
            by_digest[self._admin_digest] = self._admin
            ends.pop(self._admin_digest, None)
            if self._admin_digest in keys:
                key = keys.pop(self._admin_digest)
                logger.warning(
                    "key %s of tenant %s is the api_key: it opens as that, and never expires",
                    key.id,
                    key.tenant,
                )
        self._keys, self._ends = keys, ends
        self._accounts, self._by_digest = accounts, by_digest
        before, self._file = self._file, file
        if self.on_change is not None:
            self.on_change(before, file)


def _ends_of(file: TenantsFile) -> dict[bytes, Ending]:
    ends = [
        (Ending(read_instant(key.expires).timestamp(), key.id, key.tenant, key.expires), key.sha256)
        for key in file.keys
        if key.expires and key.tenant in file.tenants
    ]
    return {bytes.fromhex(sha256): end for end, sha256 in sorted(ends, key=lambda each: each[0].until)}


def _digests(authorization: bytes, plain: bytes) -> list[bytes]:
    """Of the keys that a request's headers give, the first to count first."""
    scheme, _, bearer = authorization.strip().partition(b" ")
    given = (bearer.strip() if scheme.lower() == b"bearer" else b"", plain.strip())
    return [digest_of(key) for key in given if key]


def _mark_of(path: Path) -> object:
    """Another one where the file is another; also where it is not there."""
    try:
        status = os.stat(path)
    except OSError as error:
        return error.errno
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev


def _watch(book: "ReferenceType[TenantBook]") -> None:
    while True:
        time.sleep(RELOAD_S)
        found = book()
        if found is None:
            return
        try:
            found.reload()
            found.warn_of_endings()
        except Exception:
            logger.exception("the tenants file cannot be looked at")
        del found
