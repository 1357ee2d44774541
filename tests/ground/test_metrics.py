"""Metric definitions: names, units and what one event adds."""

import gc
import re
from collections.abc import Collection
from types import SimpleNamespace

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.ground.adapter_series import AdapterState
from server.ground.families import FAMILIES
from server.ground.metrics import Metrics, Moment
from tests.ground.metrics_page import PAGE, tables, written


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def test_requests_are_counted_and_timed_by_route(metrics: Metrics) -> None:
    metrics.observe_request("/v1/completions", 200, 0.25)
    metrics.observe_request("/v1/completions", 503, 0.75)
    assert value(metrics, "graft_requests_total", route="/v1/completions", status="503") == 1
    assert value(metrics, "graft_request_seconds_sum", route="/v1/completions") == 1.0


def test_tokens_that_come_together_share_their_wait(metrics: Metrics) -> None:
    metrics.observe_next_tokens(4, 0.2)
    assert value(metrics, "graft_inter_token_latency_seconds_count") == 4
    assert value(metrics, "graft_inter_token_latency_seconds_sum") == pytest.approx(0.2)


def test_a_step_is_its_sequences_tokens_adapters_and_methods(metrics: Metrics) -> None:
    metrics.step(SimpleNamespace(num_sequences=3, num_tokens=40, num_adapters=2, num_methods=1, duration_s=0.01))
    whats = ("sequences", "tokens", "adapters", "methods", "seconds")
    assert [value(metrics, f"graft_step_{what}_sum") for what in whats] == [3, 40, 2, 1, 0.01]


def test_state_is_read_when_it_is_asked_for(metrics: Metrics) -> None:
    cache = {"graft_prefix_cache_queries_total": 50.0, "graft_prefix_cache_hits_total": 16.0}
    state = {"graft_sequences_running": 1.0, "graft_steps_total": 5.0, **cache}
    metrics.watch(lambda: state)
    state["graft_sequences_running"] = 7.0
    assert value(metrics, "graft_sequences_running") == 7
    assert value(metrics, "graft_steps_total") == 5
    assert [value(metrics, f"graft_prefix_cache_{what}_total") for what in ("queries", "hits")] == [50, 16]
    assert b"# TYPE graft_steps_total counter" in metrics.exposition()


def test_a_scrape_looks_once_and_tells_all_that_it_has_found() -> None:
    def look(names: Collection[str]) -> Moment:
        looks.append(sorted(names))
        others = Metrics(side="engine")
        others.count_fetch("done")
        return Moment(
            {"graft_sequences_running": 3, "graft_build_info": {("7",): 1}},
            [AdapterState("loaded", host_bytes=100)],
            families=others.collected(),
        )

    looks: list[list[str]] = []
    metrics = Metrics(side="http")
    metrics.adapters.count_sequence(["loaded", "left"])
    metrics.look_at(look)
    text = metrics.exposition().decode()
    assert looks == [["left", "loaded"]]
    for line in (
        "graft_sequences_running 3.0",
        'graft_build_info{version="7"} 1.0',
        'graft_adapter_bytes{adapter="loaded",tier="host"} 100',
        'graft_adapter_fetches_total{outcome="done"} 1.0',
    ):
        assert f"{line}\n" in text


def test_two_servers_in_one_process_do_not_share_their_metrics(metrics: Metrics) -> None:
    other = Metrics()
    metrics.count_output_tokens(3)
    assert value(other, "graft_output_tokens_total") == 0


def test_a_state_with_labels_is_a_series_for_each_of_their_values(metrics: Metrics) -> None:
    metrics.watch(lambda: {"graft_adapter_lookups_total": {("host",): 2.0, ("device",): 5.0}})
    assert value(metrics, "graft_adapter_lookups_total", tier="device") == 5
    assert value(metrics, "graft_adapter_lookups_total", tier="host") == 2


def test_the_wait_for_a_first_token_is_queue_and_prefill(metrics: Metrics) -> None:
    metrics.observe_first_token(0.75, queue_s=0.5)
    sums = [value(metrics, f"graft_{what}_seconds_sum") for what in ("sequence_queue", "sequence_prefill")]
    assert sums == [0.5, 0.25]
    assert value(metrics, "graft_time_to_first_token_seconds_sum") == 0.75


def test_a_finished_sequence_is_timed_as_a_whole_and_by_token(metrics: Metrics) -> None:
    metrics.observe_finished(num_prompt_tokens=7, num_output_tokens=5, whole_s=3.0, queue_s=1.0)
    metrics.observe_decode(5, 2.0)
    assert value(metrics, "graft_sequence_seconds_sum") == 3
    assert value(metrics, "graft_sequence_inference_seconds_sum") == 2
    assert value(metrics, "graft_sequence_prompt_tokens_sum") == 7
    assert value(metrics, "graft_time_per_output_token_seconds_sum") == 0.5


def test_one_token_alone_has_no_time_per_token(metrics: Metrics) -> None:
    metrics.observe_decode(1, 0.0)
    assert value(metrics, "graft_time_per_output_token_seconds_count") == 0


def test_only_merges_that_are_stored_are_timed(metrics: Metrics) -> None:
    metrics.count_merge("rejected", 5.0)
    metrics.count_merge("stored", 2.0)
    assert value(metrics, "graft_merge_seconds_sum") == 2
    assert value(metrics, "graft_merges_total", result="rejected") == 1


def test_the_text_says_what_the_clients_own_writer_says(metrics: Metrics) -> None:
    """With the characters that have to be escaped, and numbers of every kind."""
    hostile = 'a"b\\c\nd'
    metrics.watch(
        lambda: {"graft_build_info": {(hostile,): 1}, "graft_adapters": float("inf"), "graft_engine_up": True}
    )
    metrics.observe_request("/v1/completions", 200, 0.25)
    ours, theirs = (
        {(s.name, *sorted(s.labels.items()), s.value) for f in text_string_to_metric_families(text) for s in f.samples}
        for text in (metrics.exposition().decode(), generate_latest(metrics.registry).decode())
    )
    assert {s for s in ours ^ theirs if not s[0].startswith(("process_", "graft_adapter_"))} == set()
    assert ("graft_build_info", ("version", hostile), 1) in ours


def test_a_scrape_of_thousands_of_adapters_makes_no_work_for_the_collector(metrics: Metrics) -> None:
    def num_collections() -> int:
        return sum(generation["collections"] for generation in gc.get_stats())

    def look(names: Collection[str]) -> Moment:
        during.append(num_collections())
        states = [AdapterState(f"a{index}", host_bytes=1) for index in range(10_000)]
        during.append(num_collections())
        return Moment(adapters=states)

    during: list[int] = []
    metrics.look_at(look)
    metrics.exposition()
    assert during[0] == during[1]
    assert gc.isenabled()


def test_names_carry_the_prefix_and_totals_say_so() -> None:
    for name, family in FAMILIES.items():
        assert name.startswith("graft_")
        assert family.text.endswith(".")
        assert name.endswith("_total") == (family.kind == "counter")
        assert bool(family.buckets) == (family.kind == "histogram")


def test_no_histogram_carries_the_name_of_an_adapter() -> None:
    assert not [f.name for f in FAMILIES.values() if f.kind == "histogram" and "adapter" in f.labels]


def test_the_reference_leaves_abbreviations_as_they_are() -> None:
    assert "| HTTP requests answered |" in tables()
    assert "| sequences that ended |" in tables()


def test_the_reference_names_files_that_are_there() -> None:
    named = re.findall(r"`((?:deploy|server|tests)/[\w/.]+)`", PAGE.read_text(encoding="utf-8"))
    assert "deploy/prometheus/prometheus.yml" in named
    assert [name for name in named if not (PAGE.parents[1] / name).is_file()] == []


def test_the_reference_is_written_from_the_code() -> None:
    """When it is not: `python -m tests.ground.metrics_page`."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page)
