from toppings.server.exchange import Exchange
from toppings.server.left_requests import MAX_LEFT, LeftRequests
from toppings.server.metrics import RequestTimer
from toppings.tenants.account import Account
from toppings.tenants.tenant import Tenant


def exchange(name: str, *num_tokens: int, outcome: str = "abort", path: str = "/v1/completions") -> Exchange:
    timers = [RequestTimer(0.0, 9, False, num_tokens=num, outcome=outcome) for num in num_tokens]
    return Exchange(name, path, account=Account(Tenant(name="search")), timers=timers)


def test_what_requests_came_to_when_their_clients_left_is_told_in_order() -> None:
    left = LeftRequests()
    left.note(exchange("one", 5))
    left.note(exchange("ended", 5, outcome="stop"))
    left.note(exchange("two", 3, 4))
    left.note(exchange("refused"))
    left.note(exchange("counted", 1, path="/tokenize"))
    assert [(e.tenant, e.request_id, e.prompt_tokens, e.answer_tokens) for e in left] == [
        ("search", "one", 9, 5),
        ("search", "two", None, 7),
    ]
    first, second = left
    assert first.number < second.number


def test_only_the_latest_are_kept() -> None:
    left = LeftRequests()
    for index in range(MAX_LEFT + 3):
        left.note(exchange(str(index), 1))
    assert [entry.request_id for entry in left] == [str(i) for i in range(3, MAX_LEFT + 3)]
