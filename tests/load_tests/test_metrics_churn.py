"""Thousands of adapters come and go on a live server, and its metrics stay bounded."""

from pathlib import Path

import pytest

from load_tests import metrics_churn


@pytest.mark.slow
@pytest.mark.timeout(1800)  # as many requests, and a store of as many adapters
def test_adapters_that_come_and_go_leave_the_series_under_the_cap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"kv-memory": "8MiB", "adapter-memory": "4MiB", "host-memory": "8MiB"}
    monkeypatch.setattr(metrics_churn, "_TIERS", small)
    row = metrics_churn.measure(tmp_path, num_adapters=600, cap=100, num_streams=4, interval_s=2.0)
    assert (row["num_requests"], row["num_failed"]) == (600, 0)
    assert row["num_on_host"] > 100, "the cap is reached"
    assert row["device_evictions_total"] >= 600 - row["num_resident"] > 0
    assert row["max_series"] < metrics_churn.max_named(100) + 1500
    assert metrics_churn.faults(row, 600, 100) == []
    assert min(row[f"cpu_{part}_ms"] for part in ("registry", "adapters", "families", "all")) > 0


def test_a_run_in_which_nothing_was_evicted_is_a_fault() -> None:
    row = {
        "num_resident": 50,
        "device_evictions_total": 0,
        "host_evictions_total": 0,
        "max_series_of_adapters": 500,
        "max_lora_requests_info": 1,
    }
    assert len(metrics_churn.faults(row, 50, 100)) == 3
    row |= {"num_resident": 40, "device_evictions_total": 10, "host_evictions_total": 10}
    assert metrics_churn.faults(row, 50, 100) == []
    assert len(metrics_churn.faults(row, 50, 10)) == 1


def test_the_cap_counts_all_that_an_adapter_may_have() -> None:
    text = (
        'graft_adapter_bytes{adapter="a",tier="host"} 1\nvllm:lora_adapter_loaded{model_name="m",adapter_name="a"} 1\n'
        'graft_requests_total{route="/v1/adapters/{name}",status="200"} 1\n'
    )
    assert len(metrics_churn._OF_AN_ADAPTER.findall(text)) == 2
    assert metrics_churn.max_named(100) == 1116
