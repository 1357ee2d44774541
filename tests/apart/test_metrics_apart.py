"""GET /metrics of two processes: one page, each family once, the names of one process and those of the other's own."""

import socket
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.apart.calls import Calls
from server.apart.channel import Channel
from server.apart.twins import StateTwin
from server.api.snapshot import Snapshot
from server.ground.families import FAMILIES, OTHER_PROCESS
from tests.api.conftest import Live, eventually

OWN = ("cpu_seconds_total", "resident_memory_bytes", "open_fds")


def scraped(live: Live) -> str:
    return live.http.get("/metrics").text


def heads(text: str) -> list[str]:
    """The names of the families, as often as they stand there."""
    return [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]


def use(live: Live) -> None:
    for adapter in ("pirate-lora", None):
        asked = {"prompt": "The old boat", "max_tokens": 4, "ignore_eos": True}
        live.post("/v1/completions", **asked | ({} if adapter is None else {"adapter": adapter}))


def test_the_names_are_those_of_one_process_each_once(one: Live, two: Live) -> None:
    use(one)
    use(two)
    found, expected = heads(scraped(two)), heads(scraped(one))
    assert len(found) == len(set(found))
    assert {name for name in found if not name.startswith(f"{OTHER_PROCESS}_process_")} == set(expected)
    assert set(FAMILIES) <= set(found)
    assert any(name.startswith("vllm:") for name in found)


def test_the_page_is_prometheus_text_and_no_series_is_there_twice(two: Live) -> None:
    families = list(text_string_to_metric_families(scraped(two)))
    series = [(s.name, *sorted(s.labels.items())) for family in families for s in family.samples]
    assert len(series) == len(set(series))


def test_a_scrape_asks_the_other_process_once(two: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it counts an adapter that is on no tier any more, and has to find out whether that is gone."""
    use(two)
    assert two.post("/v1/adapters/pirate-lora/unload").status_code == 200
    calls: Calls = two.server.calls  # type: ignore[attr-defined]
    begin, asked = calls.begin, list[tuple[str, str]]()

    def counted(part: str, method: str, *arguments: Any, **named: Any) -> Any:
        asked.append((part, method))
        return begin(part, method, *arguments, **named)

    monkeypatch.setattr(calls, "begin", counted)
    text = scraped(two)
    assert set(FAMILIES) <= set(heads(text))
    assert len(asked) == 1, asked


def test_of_a_process_that_is_lost_totals_stay_and_nothing_is_loaded(two: Live) -> None:
    use(two)
    known: Snapshot = two.server.calls.call("state", "snapshot", ["no-such"])  # type: ignore[attr-defined]
    assert (set(known.gone), bool(known.adapters), bool(known.families)) == ({"no-such"}, True, True)
    here, there = socket.socketpair()
    calls = Calls(Channel(here), lambda: "it was killed", 3600.0)
    there.close()
    eventually(lambda: calls.fault is not None)
    assert StateTwin(calls, known).snapshot(["no-such"]) == Snapshot(known.engine, known.registry)
    calls.close()


def test_what_happens_in_either_process_is_counted_once(two: Live) -> None:
    names = ("graft_step_tokens_sum", "graft_prompt_tokens_total", "graft_output_tokens_total", "graft_requests_total")
    before = {name: two.metric(name) for name in names}
    use(two)
    after = {name: two.metric(name) - before[name] for name in names}
    assert after["graft_output_tokens_total"] == 8
    assert after["graft_step_tokens_sum"] >= 6 + 2, "what a step computes: prompts that are not found, and tokens"
    assert after["graft_prompt_tokens_total"] == 8
    assert two.metric("graft_adapter_load_seconds_count", transition="host_to_device") > 0
    assert two.metric("graft_engine_up") == 1


def test_the_other_process_has_its_own_figures(two: Live) -> None:
    for name in OWN:
        theirs, ours = two.metric(f"{OTHER_PROCESS}_process_{name}"), two.metric(f"process_{name}")
        assert theirs > 0
        assert theirs != ours
