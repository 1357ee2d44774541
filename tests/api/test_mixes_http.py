"""Weights and mixes over HTTP: what may be asked for, what is told of it, and what is refused in which words."""

import json
from typing import Any

import pytest

from tests.api.conftest import Live, event_data

MIX = [{"name": "first", "weight": 0.7}, {"name": "second", "weight": 0.3}]


@pytest.fixture
def versions(live: Live) -> dict[str, str]:
    return {name: str(live.http.get(f"/v1/adapters/{name}").json()["version"]) for name in ("first", "second")}


def ask(live: Live, adapter: Any, **fields: Any) -> Any:
    body = {"prompt": "Hi", "max_tokens": 4, "temperature": 0, **fields}
    return live.post("/v1/completions", adapter=adapter, **body)


def text(live: Live, adapter: Any) -> str:
    answer = ask(live, adapter, max_tokens=12)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def refusal(live: Live, adapter: Any, **fields: Any) -> dict[str, Any]:
    refused = ask(live, adapter, **fields)
    assert refused.status_code == 400, refused.text
    error: dict[str, Any] = refused.json()["error"]
    assert len(refused.text) < 1000
    return error


# What is answered


def test_a_mix_tells_what_it_is_made_of(live: Live, versions: dict[str, str]) -> None:
    answer = ask(live, MIX).json()
    assert answer["adapter"] == [
        {"name": "first", "version": versions["first"], "weight": 0.7},
        {"name": "second", "version": versions["second"], "weight": 0.3},
    ]
    chat = live.post("/v1/chat/completions", adapter=MIX, max_tokens=2, messages=[{"role": "user", "content": "Hi"}])
    assert chat.json()["adapter"] == answer["adapter"]


def test_a_stream_tells_it_in_every_chunk(live: Live, versions: dict[str, str]) -> None:
    body = {"prompt": "Hi", "max_tokens": 3, "adapter": [*MIX], "stream": True, "n": 2, "ignore_eos": True}
    with live.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = list(event_data(stream))
    assert lines[-1] == "[DONE]"
    shown = [json.loads(line)["adapter"] for line in lines[:-1]]
    assert shown
    assert all([part["version"] for part in adapter] == list(versions.values()) for adapter in shown)


@pytest.mark.parametrize(
    "form", ["first", {"name": "first"}, {"name": "first", "weight": 1}, {"name": "first", "weight": None}]
)
def test_all_ways_to_say_one_whole_adapter_are_the_same(live: Live, versions: dict[str, str], form: Any) -> None:
    assert ask(live, form).json()["adapter"] == {"name": "first", "version": versions["first"]}
    assert text(live, form) == text(live, "first")


def test_a_list_is_answered_with_a_list(live: Live, versions: dict[str, str]) -> None:
    whole = {"name": "first", "version": versions["first"], "weight": 1.0}
    assert ask(live, ["first"]).json()["adapter"] == [whole]
    assert ask(live, ["first", {"name": "second", "weight": 0}]).json()["adapter"] == [whole]
    assert ask(live, {"name": "first", "weight": 0.5}).json()["adapter"] == {**whole, "weight": 0.5}


def test_weights_change_the_answer_and_their_order_does_not(live: Live) -> None:
    answers = {text(live, form) for form in (MIX, MIX[::-1])}
    assert len(answers) == 1
    answers |= {
        text(live, "first"),
        text(live, "second"),
        text(live, {"name": "first", "weight": -1}),
        text(live, None),
    }
    assert len(answers) == 5


@pytest.mark.parametrize("nothing", [{"name": "first", "weight": 0}, [{"name": "first", "weight": -0.0}]])
def test_a_weight_of_nothing_is_the_base_and_is_told_so(live: Live, nothing: Any) -> None:
    assert ask(live, nothing).json()["adapter"] is None
    assert text(live, nothing) == text(live, None)


def test_versions_can_be_mixed_by_prefix(live: Live, versions: dict[str, str]) -> None:
    mix = [f"first@{versions['first'][:8]}", {"name": f"second@{versions['second']}", "weight": -0.5}]
    assert [part["version"] for part in ask(live, mix).json()["adapter"]] == list(versions.values())


def test_the_model_may_name_the_one_adapter_that_is_weighed(live: Live, versions: dict[str, str]) -> None:
    weighed = {"name": "first", "weight": 0.5}
    assert ask(live, weighed, model="first").json()["adapter"] == {**weighed, "version": versions["first"]}
    assert ask(live, MIX, model="tiny").status_code == 200


# What is refused


@pytest.mark.parametrize(("model", "adapter"), [("first", MIX), ("second", {"name": "first", "weight": 0.5})])
def test_a_model_that_is_another_adapter_is_a_conflict(live: Live, model: str, adapter: Any) -> None:
    assert refusal(live, adapter, model=model)["param"] == "adapter"


@pytest.mark.parametrize(
    ("adapter", "param"),
    [
        ([], "adapter"),
        (["first"] * 9, "adapter"),
        (7, "adapter"),
        (True, "adapter"),
        ({}, "adapter.name"),
        ([[]], "adapter[0]"),
        ([["first"]], "adapter[0]"),
        (["first", 3], "adapter[1]"),
        (["first", None], "adapter[1]"),
        ({"weight": 0.5}, "adapter.name"),
        ({"name": 7}, "adapter.name"),
        ({"name": "first", "weight": 16.1}, "adapter.weight"),
        ({"name": "first", "weight": -1e300}, "adapter.weight"),
        ({"name": "first", "weight": "0.5"}, "adapter.weight"),
        ({"name": "first", "weight": True}, "adapter.weight"),
        ({"name": "first", "weight": [0.5]}, "adapter.weight"),
        ({"name": "first", "weight": float("nan")}, None),
        ({"name": "first", "weight": float("inf")}, None),
        ({"name": "first", "scale": 0.5}, "adapter.scale"),
        ([{"name": "first"}, {"name": "second", "weight": 17}], "adapter[1].weight"),
        ({"name": "\ud800"}, "adapter.name"),
        ([{"name": "first", "weight": 0.5}, "first"], "adapter"),
    ],
    ids=repr,
)
def test_what_is_no_mix_is_refused_by_its_field(live: Live, adapter: Any, param: str | None) -> None:
    error = refusal(live, adapter)
    if param is not None:
        assert error["param"] == param
    assert live.server.registry.stats().num_leases == 0


def test_an_unknown_part_is_not_found(live: Live) -> None:
    for weight in (0.5, 0):
        refused = ask(live, ["first", {"name": "frist", "weight": weight}])
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "adapter_not_found")
    assert live.server.registry.stats().num_leases == 0


def test_every_lease_of_a_mix_ends_with_its_request(live: Live) -> None:
    live.post("/v1/completions", prompt=["Hi", "Ho"], n=3, max_tokens=2, adapter=MIX)
    live.post("/v1/completions", prompt="Hi", max_tokens=5000, adapter=MIX)  # refused at submission
    stats = live.server.registry.stats()
    assert (stats.num_leases, stats.num_residencies) == (0, 0)
    assert live.server.registry.check_integrity() == ()


def test_a_mix_is_not_listed(live: Live) -> None:
    ask(live, MIX)
    assert {adapter["name"] for adapter in live.http.get("/v1/adapters").json()["data"]} >= {"first", "second"}
    listed = live.http.get("/v1/models").text + live.http.get("/v1/adapters").text
    assert "0.7*first" not in listed
