"""Limits of a key: what is counted, what is refused, and what is told of it."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.keys.budget import Bucket, Budget, Budgets, Day
from server.api.keys.key import Key, Limits, Scope
from server.ground.config import Settings
from server.ground.errors import BadRequest, RateLimited
from tests.api.conftest import Gate, Live, eventually, serving
from tests.api.keys.tenants import Tenant, entry, write_keys

DAY_S = 86_400


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def key(name: str, limits: Limits) -> Key:
    return Key(name, b"", frozenset(Scope), owner=name, limits=limits)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), max_size=50), st.integers(1, 100))
def test_a_bucket_gives_at_most_its_limit_and_what_time_brings(steps: list[tuple[float, int]], limit: int) -> None:
    clock = Clock()
    bucket = Bucket(limit, 60.0, clock)
    spent = 0
    for passed_s, wanted in steps:
        clock.now_s += passed_s
        taken = min(wanted, bucket.remaining)
        bucket.spend(taken)
        spent += taken
        assert 0 <= bucket.remaining <= limit
        assert spent <= limit + limit * clock.now_s / 60 + 1e-6
    clock.now_s += bucket.wait_s + 1e-6
    assert bucket.wait_s == 0


def test_what_is_overdrawn_has_to_come_in_first() -> None:
    clock = Clock()
    bucket = Bucket(60, 60.0, clock)
    bucket.spend(90)
    assert (bucket.remaining, bucket.wait_s, bucket.reset_s) == (0, 31.0, 90.0)
    clock.now_s -= 1000  # a clock that jumps back gives nothing and takes nothing
    assert bucket.wait_s == 31.0


def test_a_day_ends_at_midnight_and_does_not_come_twice() -> None:
    clock = Clock(10 * DAY_S + 5.0)
    day = Day(100, clock)
    day.spend(120)
    assert (day.remaining, day.wait_s) == (0, DAY_S - 5.0)
    clock.now_s -= DAY_S
    assert day.remaining == 0
    clock.now_s += 2 * DAY_S
    assert (day.remaining, day.wait_s) == (100, 0)


def test_a_refused_request_costs_nothing() -> None:
    budget = Budget(Limits(requests_per_minute=2, concurrent_requests=1), Clock(), Clock())
    share = budget.begin()
    for _ in range(3):
        with pytest.raises(RateLimited, match="1 requests at once"):
            budget.begin()
    share.end()
    budget.begin().end()
    with pytest.raises(RateLimited, match="2 requests per minute") as refused:
        budget.begin()
    assert refused.value.retry_after_s == 30
    assert budget.num_running == 0


def test_a_share_takes_all_its_places_or_none_more() -> None:
    budget = Budget(Limits(concurrent_requests=8), Clock(), Clock())
    first, second = budget.begin(), budget.begin()
    first.widen(5, "n")
    assert budget.num_running == 6
    with pytest.raises(RateLimited, match="8 requests at once"):
        second.widen(4, "n")
    with pytest.raises(BadRequest, match="9 sequences") as refused:
        second.widen(9, "prompt")
    assert (refused.value.param, budget.num_running) == ("prompt", 6)
    second.widen(3, "n")
    for share in (first, second, first, second):
        share.end()
    assert budget.num_running == 0


def test_without_the_limit_any_number_runs() -> None:
    budget = Budget(Limits(), Clock(), Clock())
    share = budget.begin()
    share.widen(4096, "n")
    share.end()
    assert budget.num_running == 0


def test_the_narrower_limit_of_tokens_is_told() -> None:
    budget = Budget(Limits(tokens_per_minute=100, tokens_per_day=120), Clock(), Clock())
    assert budget.headers()["x-ratelimit-limit-tokens"] == "100"
    budget.spend_tokens(90)
    assert budget.headers()["x-ratelimit-remaining-tokens"] == "10"
    assert "x-ratelimit-limit-requests" not in budget.headers()
    assert Budget(Limits(), Clock(), Clock()).headers() == {}


def test_there_are_no_more_budgets_than_keys() -> None:
    budgets = Budgets()
    one = key("one", Limits(requests_per_minute=5))
    assert budgets.of(one) is budgets.of(one)
    for number in range(100):
        budgets.of(key(f"key-{number}", Limits()))
    budgets.keep({"one"})
    assert list(budgets._by_name) == ["one"]
    changed = key("one", Limits(requests_per_minute=6))
    assert budgets.of(changed).limits.requests_per_minute == 6


def test_what_a_key_has_used_is_its_own_and_a_limit_of_storage_does_not_give_it_back() -> None:
    budgets = Budgets()
    one, other = (Key(name, b"", frozenset(Scope), "acme", limits=Limits(tokens_per_day=9)) for name in ("one", "two"))
    budgets.of(one).spend_tokens(9)
    assert budgets.of(other).headers()["x-ratelimit-remaining-tokens"] == "9"
    stored = replace(one, limits=replace(one.limits, storage_bytes=5))  # as when another key of its owner has changed
    assert budgets.of(stored).headers()["x-ratelimit-remaining-tokens"] == "0"


@pytest.fixture(scope="module")
def limited(settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    file = write_keys(
        tmp_path_factory.mktemp("keys") / "keys.yaml",
        entry("slow", limits={"requests_per_minute": 3}),
        entry("one-at-once", limits={"concurrent_requests": 1}),
        entry("eight-at-once", limits={"concurrent_requests": 8}),
        entry("few", limits={"tokens_per_minute": 50}),
        entry("few-a-day", limits={"tokens_per_day": 5}),
        entry("free"),
        entry("operator", ["infer", "admin"]),
    )
    with serving(settings(api_keys=file)) as live:
        yield live


def test_requests_are_counted_and_what_is_left_is_told(limited: Live) -> None:
    slow = Tenant(limited, "slow")
    left = [slow.ask("GET", "/v1/models").headers["x-ratelimit-remaining-requests"] for _ in range(3)]
    assert left == ["2", "1", "0"]
    refused = slow.ask("GET", "/v1/models")
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert refused.headers["retry-after-ms"] == f"{refused.headers['retry-after']}000"
    assert (refused.headers["x-should-retry"], refused.headers["x-ratelimit-limit-requests"]) == ("true", "3")
    assert refused.headers["x-request-id"]
    assert Tenant(limited, "free").ask("GET", "/v1/models").status_code == 200


def test_tokens_are_counted_of_prompts_and_answers(limited: Live) -> None:
    few = Tenant(limited, "few")
    prompt = list(range(5, 35))
    first = few.complete(prompt=prompt, max_tokens=8, ignore_eos=True)
    assert first.headers["x-ratelimit-remaining-tokens"] == "12"  # told when the answer has come
    streamed = few.complete(prompt=prompt, max_tokens=8, ignore_eos=True, stream=True)
    assert "[DONE]" in streamed.text
    refused = few.complete(prompt=prompt, max_tokens=8)
    assert (refused.status_code, refused.headers["x-ratelimit-remaining-tokens"]) == (429, "0")


def test_a_spent_day_is_not_waited_out_by_clients(limited: Live) -> None:
    few = Tenant(limited, "few-a-day")
    assert few.complete(prompt=[5, 6, 7, 8, 9], max_tokens=1).status_code == 200
    refused = few.complete(prompt=[5], max_tokens=1)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) <= DAY_S
    assert (refused.headers["x-should-retry"] == "false") == (int(refused.headers["retry-after"]) > 60)


def test_nobody_goes_before_others_but_the_operator(limited: Live) -> None:
    refused = Tenant(limited, "free").complete(priority=-1)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
    assert Tenant(limited, "free").complete(priority=5).status_code == 200
    assert Tenant(limited, "operator").complete(priority=-1).status_code == 200


def test_requests_at_once_are_counted_until_their_end(limited: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(limited.server.runner.run)
    monkeypatch.setattr(limited.server.runner, "run", gate)
    one = Tenant(limited, "one-at-once")
    with closing(post(one, b'{"prompt": "Hi", "max_tokens": 2}')):
        eventually(lambda: limited.server.engine.stats().num_in_flight == 1)
        refused = one.ask("GET", "/v1/models")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    gate.allow(100)  # who leaves gives the place back
    eventually(lambda: one.ask("GET", "/v1/models").status_code == 200)


def post(tenant: Tenant, body: bytes) -> socket.socket:
    """A connection on which a completion has been asked for."""
    connection = tenant.live.connect()
    fields = f"host: x\r\ncontent-type: application/json\r\nauthorization: {tenant.headers['authorization']}"
    head = f"POST /v1/completions HTTP/1.1\r\n{fields}\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_counts_as_its_sequences_until_it_ends(
    limited: Live, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    gate = Gate(limited.server.runner.run)
    monkeypatch.setattr(limited.server.runner, "run", gate)
    eight, engine = Tenant(limited, "eight-at-once"), limited.server.engine
    body = {"prompt": ["Hi", "Ho", "He"], "n": 2, "max_tokens": 2, "stream": stream}
    with closing(post(eight, json.dumps(body).encode())):
        eventually(lambda: engine.stats().num_in_flight == 6)
        refused = eight.complete(n=3, max_tokens=1)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert "6 run" not in refused.text, "its own place is counted, too"
        assert engine.stats().num_in_flight == 6, "what is refused never reaches the engine"
        assert eight.ask("GET", "/v1/models").status_code == 200
    gate.allow(1_000_000)
    eventually(lambda: eight.complete(n=8, max_tokens=1).status_code == 200)  # who leaves gives all places back


def test_every_end_gives_the_places_back(limited: Live) -> None:
    eight = Tenant(limited, "eight-at-once")
    ends: list[tuple[dict[str, Any], int]] = [
        ({"n": 8, "max_tokens": 1}, 200),
        ({"n": 8, "max_tokens": 1, "stream": True}, 200),
        ({"n": 8, "adapter": "nobody"}, 404),
        ({"n": 8, "max_tokens": 10**6}, 400),
        ({"n": 8, "priority": -1}, 400),
        ({"n": 9}, 400),
        ({"prompt": ["Hi"] * 9}, 400),
    ]
    for _ in range(2):
        for body, status in ends:
            answer = eight.complete(**body)
            assert answer.status_code == status, (body, answer.text)
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert eight.ask("POST", "/v1/chat/completions", {**chat, "n": 9}).json()["error"]["param"] == "n"
    assert eight.ask("POST", "/v1/chat/completions", {**chat, "n": 8}).status_code == 200
