"""Metric definitions: names, units and what one event adds."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.ground.metrics import GAUGES, TOTALS, Metrics


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


def test_a_step_is_its_sequences_its_tokens_and_its_adapters(metrics: Metrics) -> None:
    metrics.step(SimpleNamespace(num_sequences=3, num_tokens=40, num_adapters=2, duration_s=0.01))
    sums = [value(metrics, f"graft_step_{what}_sum") for what in ("sequences", "tokens", "adapters", "seconds")]
    assert sums == [3, 40, 2, 0.01]


def test_state_is_read_when_it_is_asked_for(metrics: Metrics) -> None:
    cache = {"graft_prefix_cache_queries_total": 50.0, "graft_prefix_cache_hits_total": 16.0}
    state = {"graft_sequences_running": 1.0, "graft_steps_total": 5.0, **cache}
    metrics.watch(lambda: state)
    state["graft_sequences_running"] = 7.0
    assert value(metrics, "graft_sequences_running") == 7
    assert value(metrics, "graft_steps_total") == 5
    assert [value(metrics, f"graft_prefix_cache_{what}_total") for what in ("queries", "hits")] == [50, 16]
    assert b"# TYPE graft_steps_total counter" in metrics.exposition()


def test_two_servers_in_one_process_do_not_share_their_metrics(metrics: Metrics) -> None:
    other = Metrics()
    metrics.count_output_tokens(3)
    assert value(other, "graft_output_tokens_total") == 0


def test_names_carry_the_prefix_and_totals_say_so() -> None:
    assert all(
        name.startswith("graft_") and help_text.endswith(".") for name, help_text in {**GAUGES, **TOTALS}.items()
    )
    assert all(name.endswith("_total") for name in TOTALS)
    assert not any(name.endswith("_total") for name in GAUGES)


def test_the_reference_names_every_metric_and_no_other(metrics: Metrics) -> None:
    metrics.watch(lambda: dict.fromkeys([*GAUGES, *TOTALS], 0.0))
    families = {
        f"{family.name}_total" if family.type == "counter" else family.name for family in metrics.registry.collect()
    }
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(graft_\w+)`", page)) == families
