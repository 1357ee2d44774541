"""The load report that gateways ask for in a header, and get in one."""

import json
from typing import Any

import pytest

from server.api.load_report import HEADER
from tests.api.conftest import KEY, Live

FORMAT = f"{HEADER}-format"
NAMES = {"kv_cache_usage_perc", "num_requests_waiting"}
TEXT: dict[str, Any] = {"prompt": "Hi", "max_tokens": 1}


@pytest.mark.parametrize("body", [TEXT, {**TEXT, "stream": True}, {**TEXT, "temperature": 9}], ids=str)
def test_it_comes_with_every_kind_of_answer(live: Live, body: dict[str, Any]) -> None:
    answer = live.http.post("/v1/completions", json=body, headers={FORMAT: "JSON"})
    form, _, report = answer.headers[HEADER].partition(" ")
    assert form == "JSON"
    named = json.loads(report)["named_metrics"]
    assert named.keys() == NAMES
    assert 0 <= named["kv_cache_usage_perc"] <= 1
    assert named["num_requests_waiting"] == 0


def test_it_comes_as_text_too(live: Live) -> None:
    answer = live.http.post("/v1/completions", json=TEXT, headers={FORMAT: "text"})
    form, _, report = answer.headers[HEADER].partition(" ")
    assert form == "TEXT"
    named = dict(part.split("=") for part in report.split(", "))
    assert named.keys() == {f"named_metrics.{name}" for name in NAMES}
    assert all(float(value) >= 0 for value in named.values())


@pytest.mark.parametrize("headers", [{}, {FORMAT: ""}, {FORMAT: "BIN"}, {HEADER: "JSON"}], ids=str)
def test_who_does_not_ask_gets_none(live: Live, headers: dict[str, str]) -> None:
    assert HEADER not in live.http.post("/v1/completions", json=TEXT, headers=headers).headers


def test_who_has_no_key_gets_none(strict: Live) -> None:
    asks = {FORMAT: "JSON"}
    assert HEADER in strict.http.get("/v1/models", headers=asks).headers
    refused = strict.http.get("/v1/models", headers={**asks, "authorization": f"Bearer {KEY}x"})
    assert refused.status_code == 401
    assert HEADER not in refused.headers
