"""Who asks, by keys and headers; and the file of tenants as it changes."""

import errno
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.waiting import first_good, wait_until
from toppings.bad_input import RequestError
from toppings.config import ConfigError
from toppings.messages import AddRequest, check_salt
from toppings.sampling_params import SamplingParams
from toppings.tenants.book import TenantBook
from toppings.tenants.file import parse
from toppings.tenants.keys import add_key, digest_of, revoke_key
from toppings.tenants.refusals import Refusal
from toppings.tenants.tenant import Tenant

FILE = """\
# who may do what
tenants:
  search: {use: ["search-*", shared], requests_per_minute: 600}   # a comment
  ops:
    admin: on
    weight: 2.5
"""


MAX_COST_S = 1e-4
TWIN = f"{{id: x, tenant: a, sha256: {64 * 'a'}}}, "


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.yaml"
    path.write_text(FILE)
    return path


def bearer(key: str) -> bytes:
    return f"Bearer {key}".encode()


def name_of(book: TenantBook, key: str) -> str | None:
    """None where it opens nothing."""
    try:
        return book.identify(bearer(key), b"").name
    except Refusal:
        return None


def test_a_key_is_found_until_it_is_revoked(path: Path) -> None:
    one, two = add_key(path, "search"), add_key(path, "ops")
    book = TenantBook(str(path), "the-one")
    assert [name_of(book, key.text) for key in (one, two)] == ["search", "ops"]
    assert book.identify(b"", one.text.encode()).name == "search"
    assert book.identify(bearer("the-one"), b"").tenant.is_admin
    assert name_of(book, one.text[:-1]) is None
    assert revoke_key(path, one.entry.id) == one.entry
    assert book.reload()
    assert [name_of(book, key.text) for key in (one, two)] == [None, "ops"]


def test_the_file_has_no_key_and_keeps_its_comments(path: Path) -> None:
    keys = [add_key(path, "search") for _ in range(3)]
    text = path.read_text()
    assert text.startswith(FILE)
    assert not any(key.text in text or key.text.split("-", 2)[2] in text for key in keys)
    revoke_key(path, keys[1].entry.id)
    assert {key.id for key in parse(path.read_text(), "").keys} == {keys[0].entry.id, keys[2].entry.id}
    assert len(keys[0].text.split("-", 2)[2]) == 43  # 256 bits


@pytest.mark.parametrize(
    "keys",
    [
        *("keys: []\n", "keys:\n", "keys:   # none yet\n", "keys:\n# here\n\n", "keys:\n  - {entry}\n"),
        "keys:\n- {entry}\ntenants: {{ops: , search: }}\n",
    ],
)
def test_a_key_is_added_to_whatever_list_is_there(path: Path, keys: str) -> None:
    entry = '{"id": "old", "tenant": "ops", "sha256": "' + 64 * "a" + '"}'
    text = keys.replace("{entry}", entry).replace("{{", "{").replace("}}", "}")
    path.write_text(text if "tenants" in text else FILE + text)
    before = {key.id for key in parse(path.read_text(), "").keys}
    key = add_key(path, "search")
    assert {k.id for k in parse(path.read_text(), "").keys} == {*before, key.entry.id}


def test_keys_that_are_written_otherwise_stay_as_they_are(path: Path) -> None:
    entries = [f'{{"id": "{c}", "tenant": "ops", "sha256": "{64 * c}"}}' for c in "ab"]
    path.write_text(f"{FILE}keys: [{', '.join(entries)}]\n")
    before = path.read_text()
    for change in (lambda: add_key(path, "ops"), lambda: revoke_key(path, "a")):
        with pytest.raises(ConfigError):
            change()
        assert path.read_text() == before


def test_no_key_for_a_tenant_that_there_is_not(path: Path) -> None:
    with pytest.raises(ConfigError, match="no tenant 'serch'; there are: search, ops"):
        add_key(path, "serch")
    with pytest.raises(ConfigError, match="no key 'x'"):
        revoke_key(path, "x")
    assert path.read_text() == FILE


def test_a_changed_file_is_kept_private_and_its_link_a_link(path: Path, tmp_path: Path) -> None:
    path.chmod(0o600)
    link = tmp_path / "link.yaml"
    link.symlink_to(path)
    add_key(link, "ops")
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tenants: {a: {us: x}}", r"tenant a: unknown setting 'us'; did you mean use"),
        ("tenants: {a: {requests_per_minute: -1}}", "requests_per_minute is -1; it must be at least 0"),
        ("tenants: {a: {weight: .nan}}", "weight is nan"),
        ("tenants: {a: {admin: maybe}}", "admin is 'maybe'; choose one of on, off"),
        ("tenants: {a: [x]}", "it must be a mapping"),
        ("tenants: {a: {name: b}}", "name"),
        ("tenants: {'a b': }", "a tenant is named 'a b'"),
        ("tenants: {1: }", "a tenant's name is 1; it must be a text"),
        ("tenants: {a: , b: , a: }", "'a' stands there twice"),
        ("tenants: [a]", "tenants is a list"),
        ("tenant: {a: }", "unknown part 'tenant'"),
        ("keys: {a: }", "keys is a dict"),
        ("keys: [{id: x, tenant: a}]", "no sha256"),
        (f"keys: [{{id: x, tenant: a, sha256: '{'A' * 64}'}}]", "small letters"),
        (f"keys: [{{id: 12, tenant: a, sha256: '{'a' * 64}'}}]", "in quotes"),
        (
            f"keys: [{', '.join(2 * ['{id: x, tenant: a, sha256: ' + 64 * 'a' + '}'])}]",
            "two keys have the id",
        ),
        ("tenants: {a: {base-model: on, base_model: off}}", "'base_model' stands there twice"),
        ("", "it has no part 'tenants'"),
        ("keys: []", "it has no part 'tenants'"),
        ("- a", "holds a list"),
        ("a: [", "no YAML"),
        (f"tenants: {{a: {{use: ['{'x' * 5000}']}}}}", "at most 4096"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        parse(text, "tenants.yaml")
    assert str(caught.value).startswith("tenants.yaml")


def test_settings_may_be_shared_as_yaml_has_it() -> None:
    text = "tenants:\n  a: &team {weight: 2, use: [x]}\n  b: {<<: *team, use: [y]}\n"
    found = parse(text, "tenants.yaml").tenants
    assert (found["b"].weight, found["b"].use) == (2.0, ("y",))


def test_a_broken_file_leaves_all_as_it_was_and_says_so_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = add_key(path, "search")
    book = TenantBook(str(path))
    good = path.read_text()
    for breaks in (lambda: path.write_text("tenants: {search: {"), lambda: path.write_text(""), path.unlink):
        caplog.clear()
        breaks()
        assert [book.reload() for _ in range(3)] == [False] * 3
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert "stay as they were" in caplog.text
        assert name_of(book, key.text) == "search"
    path.write_text(good.replace("minute: 600", "minute: 7"))
    assert book.reload()
    assert book.accounts["search"].tenant.requests_per_minute == 7
    with pytest.raises(ConfigError, match="cannot read tenants_file"):
        TenantBook(str(path.with_name("nowhere")))


def test_a_file_that_cannot_be_opened_for_a_moment_is_read_later(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = add_key(path, "search")
    book = TenantBook(str(path))
    revoke_key(path, key.entry.id)

    def fails(code: int) -> Callable[..., object]:
        def opened(*_: object, **__: object) -> object:
            raise OSError(code, os.strerror(code))

        return opened

    for code in (errno.EMFILE, errno.EACCES):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", fails(code))
            caplog.clear()
            assert [book.reload() for _ in range(3)] == [False] * 3
            assert [record.levelname for record in caplog.records] == ["ERROR"]
            assert os.strerror(code) in caplog.text
        assert name_of(book, key.text) == "search"
    assert book.reload()
    assert name_of(book, key.text) is None
    assert not book.reload()


def test_a_change_that_keeps_size_and_time_is_seen(path: Path) -> None:
    book = TenantBook(str(path))
    before = path.stat()
    path.write_text(FILE.replace("minute: 600", "minute: 700"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert book.reload()
    assert book.accounts["search"].tenant.requests_per_minute == 700


def test_what_was_used_outlives_a_change_of_the_file(path: Path) -> None:
    key = add_key(path, "search")
    book = TenantBook(str(path))
    account = book.identify(bearer(key.text), b"")
    account.take_request()
    path.write_text(path.read_text().replace("minute: 600", "minute: 601"))
    assert book.reload()
    assert book.identify(bearer(key.text), b"") is account
    assert account.headers()["x-ratelimit-limit-requests"] == "601"


def test_keys_of_a_tenant_that_has_gone_open_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = add_key(path, "search")
    book = TenantBook(str(path))
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "search:" not in line))
    with caplog.at_level(logging.WARNING):
        assert book.reload()
    assert name_of(book, key.text) is None
    assert f"key {key.entry.id} opens nothing" in caplog.text


def test_a_watched_file_is_read_anew_by_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toppings.tenants.book.RELOAD_S", 0.01)
    book = TenantBook(str(path))
    book.watch()
    key = add_key(path, "ops")
    wait_until(lambda: name_of(book, key.text) == "ops")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_schemes_are_taken_in_any_case(scheme: str) -> None:
    book = TenantBook(api_key="secret")
    assert book.identify(f"{scheme} secret".encode(), b"").tenant.is_admin
    for wrong in (f"{scheme} Secret".encode(), b"Basic secret", b"secret", scheme.encode()):
        with pytest.raises(Refusal, match="Incorrect API key"):
            book.identify(wrong, b"")
    with pytest.raises(Refusal, match="didn't provide"):
        book.identify(b"", b"")


def test_without_file_and_key_everybody_is_an_administrator() -> None:
    assert TenantBook().identify(b"", b"").tenant.is_admin
    assert not TenantBook().asks_for_keys


# --- a front's header ---


def test_a_tenant_comes_through_a_front_whole_but_for_its_limits(path: Path) -> None:
    told = {"use": ["ä*", "b"], "weight": 2, "share-prefixes": True, "adapter_bytes": "1MiB"}
    tenant = Tenant.parse("search", {**told, "max_requests": 3, "tokens_per_minute": 10})
    header = tenant.to_header()
    assert header.isascii()
    book = TenantBook(api_key="front")
    account = book.identify(bearer("front"), b"", header.encode())
    assert account.tenant == Tenant.parse("search", told)
    assert book.identify(bearer("front"), b"", header.encode()) is account


def test_only_an_administrators_key_may_speak_for_tenants(path: Path) -> None:
    key = add_key(path, "search")
    header = Tenant(name="ops", admin="on").to_header().encode()
    book = TenantBook(str(path), "front")
    for given, status in ((key.text, 403), ("wrong", 401), ("", 401)):
        with pytest.raises(Refusal) as refused:
            book.identify(bearer(given), b"", header)
        assert refused.value.status == status
    for header in (b"search", b"{}", b'{"name": "a b"}', b'{"name": "a", "what": 1}', b"[" * 100_000):
        with pytest.raises(Refusal, match="X-Toppings-Tenant") as refused:
            book.identify(bearer("front"), b"", header)
        assert refused.value.status == 400


# --- cached blocks ---


def test_tenants_share_cached_blocks_only_if_they_say_so() -> None:
    book = TenantBook()
    a, b, c, d = (
        Tenant(name=n, share_prefixes=s) for n, s in (("a", "off"), ("b", "off"), ("c", "on"), ("d", "on"))
    )
    salts = [book.salt(t, given) for t in (a, b) for given in (None, "x", "y")]
    assert len(set(salts)) == 6
    assert book.salt(a, "x") == book.salt(a, "x") != TenantBook().salt(a, "x")
    assert [book.salt(t, "x") for t in (c, d, Tenant(admin="on"))] == ["x"] * 3
    assert book.salt(c, None) is None
    for salt in salts:
        check_salt(salt)


def test_a_salt_that_is_none_is_refused_all_the_same() -> None:
    for salt in ("", "x" * 1025):
        with pytest.raises(RequestError):
            AddRequest("r", [1], SamplingParams(), cache_salt=salt)


# --- what it costs ---


def calls_of(work: Callable[[], object]) -> int:
    """How many functions `work` calls, of Python's and of C's."""
    num_calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return num_calls


def many(num_keys: int) -> str:
    tenants = "".join(
        f"  t{i}: {{use: [a{i}-*, shared-*], requests_per_minute: 1000000, tokens_per_minute: 1000000000}}\n"
        for i in range(num_keys)
    )
    keys = "".join(
        f'- {{"id": "k{i}", "tenant": "t{i}", "sha256": "{digest_of(f"key-{i}".encode()).hex()}"}}\n'
        for i in range(num_keys)
    )
    return f"tenants:\n{tenants}keys:\n{keys}"


def test_how_a_wrong_key_is_refused_does_not_depend_on_how_wrong_it_is(path: Path) -> None:
    """What is compared is a hash, looked up at once, whichever key of however many it may be."""
    path.write_text(many(50))
    book = TenantBook(str(path), "the-one")

    def steps(key: str) -> int:
        return calls_of(lambda: name_of(book, key))

    wrong = ["key-4_", "key-49x", "xey-49", "the-onf", "x" * 40]
    assert len({steps(key) for key in wrong}) == 1
    assert len({steps(key) for key in ("key-0", "key-49", "the-one")}) == 1
    assert not any("key-" in str(value) for value in vars(book).values())


def test_a_request_costs_a_tenth_of_a_millisecond_with_a_thousand_keys(path: Path) -> None:
    """Processor time of finding who asks, counting, looking at an adapter's name, and the headers."""
    path.write_text(many(1000))
    book = TenantBook(str(path))
    names = [f"a{i % 1000}-{i}" for i in range(10_000)]

    def ask(i: int) -> bool:
        account = book.identify(bearer(f"key-{i % 1000}"), b"")
        account.take_request()
        allowed = account.tenant.may_use(names[i]) and not account.tenant.may_use(names[i - 1])
        place = account.enter(1, max_queue=128)
        account.take_tokens(100)
        place.spend(10)
        place.leave()
        return allowed and len(account.headers()) == 6

    def cost_s() -> float:
        started_at = time.thread_time()
        assert all(ask(i) for i in range(1000))
        return (time.thread_time() - started_at) / 1000

    assert first_good(cost_s, lambda cost: cost < MAX_COST_S, 20) < MAX_COST_S
