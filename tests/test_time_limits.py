"""--queue-timeout and --request-timeout as clients meet them: the test moves the clock and lets the steps through."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.ground.config import Settings
from tests.api.conftest import Gate, Live, event_data, eventually, serving

QUEUE_TIMEOUT_S, REQUEST_TIMEOUT_S = 10.0, 60.0
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50, "ignore_eos": True}
TEXT = {"prompt": "Hi", "max_tokens": 50, "ignore_eos": True}
BOTH = pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def live(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One seat, so that a second request waits."""
    flags: dict[str, Any] = {"quantize": "none", "dtype": "float32", "device": "cpu", "max_sequences": 1}
    flags |= {"model": str(tiny_llama), "store": tmp_path_factory.mktemp("store")}
    flags |= {"queue_timeout": QUEUE_TIMEOUT_S, "request_timeout": REQUEST_TIMEOUT_S}
    with serving(Settings(**flags)) as live:
        yield live


@pytest.fixture
def clock(live: Live, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(live.server.engine._scheduler, "_clock", clock)
    return clock


@pytest.fixture
def gate(live: Live, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Steps run as the test allows; whatever is left at its end runs out."""
    gate = Gate(live.server.runner.run)
    monkeypatch.setattr(live.server.runner, "run", gate)
    yield gate
    gate.allow(1_000_000)
    eventually(lambda: live.server.engine.stats().num_in_flight == 0)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def posted(pool: ThreadPoolExecutor, live: Live, path: str, body: dict[str, Any]) -> "Future[httpx.Response]":
    """A request under way, accepted by the engine."""
    num_before = live.server.engine.stats().num_in_flight
    future = pool.submit(lambda: live.post(path, **body))
    eventually(lambda: live.server.engine.stats().num_in_flight == num_before + 1)
    return future


@BOTH
def test_a_request_that_waits_too_long_gets_503_and_when_to_come_again(
    live: Live, gate: Gate, clock: Clock, pool: ThreadPoolExecutor, path: str, body: dict[str, Any]
) -> None:
    running = posted(pool, live, path, body)
    eventually(lambda: live.server.engine.stats().num_running == 1)
    waiting = [posted(pool, live, path, {**body, "stream": stream}) for stream in (False, True)]
    clock.now_s = QUEUE_TIMEOUT_S + 1
    gate.allow(1_000)
    for refused in (future.result() for future in waiting):
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"
        assert refused.json()["error"]["code"] == "overloaded"
        assert "queue_timeout is 10 s" in refused.json()["error"]["message"]
    assert running.result().status_code == 200, "what has started is not in the queue"


@BOTH
def test_a_request_that_takes_too_long_gets_504_and_is_not_sent_again(
    live: Live, gate: Gate, clock: Clock, pool: ThreadPoolExecutor, path: str, body: dict[str, Any]
) -> None:
    slow = posted(pool, live, path, body)
    clock.now_s = REQUEST_TIMEOUT_S + 1
    gate.allow(1_000)
    refused = slow.result()
    assert refused.status_code == 504
    assert refused.headers["x-should-retry"] == "false"
    error = refused.json()["error"]
    assert (error["code"], error["type"]) == ("request_timeout", "server_error")
    assert "request_timeout is 60 s" in error["message"]


@BOTH
def test_a_stream_that_takes_too_long_ends_in_an_error_event(
    live: Live, gate: Gate, clock: Clock, path: str, body: dict[str, Any]
) -> None:
    gate.allow(3)
    # With its ids every token is an event, also one whose character is not whole yet.
    with live.http.stream("POST", path, json={**body, "stream": True, "return_token_ids": True}) as answer:
        lines = event_data(answer)
        assert "choices" in json.loads(next(lines))
        clock.now_s = REQUEST_TIMEOUT_S + 1
        gate.allow(1_000)
        *chunks, last = [json.loads(line) for line in lines]
    assert all("choices" in chunk for chunk in chunks)
    assert last["error"]["code"] == "request_timeout"


def test_nothing_is_held_when_time_is_up(live: Live, gate: Gate, clock: Clock, pool: ThreadPoolExecutor) -> None:
    futures = [posted(pool, live, "/v1/completions", TEXT) for _ in range(3)]
    clock.now_s = REQUEST_TIMEOUT_S + 1
    gate.allow(1_000)
    assert sorted(future.result().status_code for future in futures) == [504, 504, 504]
    stats = live.server.engine.stats()
    assert (stats.num_in_flight, stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0, 0)
