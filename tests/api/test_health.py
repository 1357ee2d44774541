"""What operators and orchestrators ask."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from server import __version__
from server.ground.config import Settings
from server.ground.exposition import CONTENT_TYPE
from server.ground.families import FAMILIES
from tests.api.conftest import Gate, Live, eventually, serving


def test_a_server_that_works_is_healthy_and_ready(live: Live) -> None:
    assert live.http.get("/health").status_code == 200
    assert live.http.get("/ready").status_code == 200
    assert live.http.get("/version").json() == {"version": __version__}


def test_the_names_that_others_give_to_the_same_questions(live: Live) -> None:
    for path in ("/ping", "/v2/health/live"):
        assert live.http.get(path).json() == live.http.get("/health").json()
    assert live.http.post("/ping").status_code == 200
    assert live.http.get("/v2/health/ready").json() == live.http.get("/ready").json()


def test_the_load_counts_what_is_in_flight(live: Live, gate: Gate) -> None:
    assert live.http.get("/load").json() == {"server_load": 0}
    with live.send("/v1/completions", prompt="Hi", max_tokens=2, n=3):
        eventually(lambda: live.http.get("/load").json() == {"server_load": 3})
        gate.allow(100)
    eventually(lambda: live.http.get("/load").json() == {"server_load": 0})


def test_a_dead_engine_is_told_to_all_who_ask(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*step: Any) -> Any:
        raise RuntimeError("the device is gone")

    with serving(settings()) as live:
        monkeypatch.setattr(live.server.runner, "run", broken)
        while live.server.engine.is_alive:
            assert live.post("/v1/completions", prompt="Hi", max_tokens=1).status_code == 500
        for path in ("/health", "/ready", "/ping", "/v2/health/live", "/v2/health/ready"):
            answer = live.http.get(path)
            assert answer.status_code == 503
            assert answer.headers["x-should-retry"] == "true"
            assert answer.json()["error"]["code"] == "engine_dead"


def test_metrics_are_prometheus_text_with_every_state(live: Live) -> None:
    answer = live.http.get("/metrics")
    assert answer.headers["content-type"] == CONTENT_TYPE
    told = set(re.findall(r"^# TYPE (graft_\w+) \w+$", answer.text, re.MULTILINE))
    assert told == FAMILIES.keys()
    assert live.metric("graft_adapters") >= 2


def test_tokens_and_endings_are_counted(live: Live) -> None:
    names = ("graft_prompt_tokens_total", "graft_output_tokens_total", "graft_time_to_first_token_seconds_count")
    finished = ("graft_sequences_finished_total", {"finish_reason": "length"})
    before = [live.metric(name) for name in names], live.metric(finished[0], **finished[1])
    live.post("/v1/completions", prompt=[[65, 66], [67]], max_tokens=5, n=2, ignore_eos=True)
    after = [live.metric(name) for name in names], live.metric(finished[0], **finished[1])
    assert [b - a for a, b in zip(before[0], after[0], strict=True)] == [6, 20, 4]
    assert after[1] - before[1] == 4


def test_the_composition_of_batches_is_observed(live: Live) -> None:
    before = live.metric("graft_step_adapters_count"), live.metric("graft_step_adapters_sum")
    live.post("/v1/completions", prompt="Hi", max_tokens=3, adapter="first", ignore_eos=True)
    after = live.metric("graft_step_adapters_count"), live.metric("graft_step_adapters_sum")
    assert after[0] - before[0] == after[1] - before[1] == 3


def test_labels_come_from_a_closed_set(live: Live) -> None:
    for path in ("/v1/models/evil-name", "/v1/adapters/evil-name", "/evil-name"):
        live.http.get(path)
    live.post("/v1/completions", prompt="Hi", adapter="evil-name", model="evil-name")
    assert "evil-name" not in live.http.get("/metrics").text
    assert live.metric("graft_requests_total", route="/v1/adapters/{name}", status="404") >= 1
    assert live.metric("graft_requests_total", route="unmatched", status="404") >= 1
