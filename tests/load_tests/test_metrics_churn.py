"""Thousands of adapters come and go on a live server, and its metrics stay bounded."""

from pathlib import Path

import pytest

from load_tests import metrics_churn


@pytest.mark.slow
@pytest.mark.timeout(3600)  # 5,000 requests, and a store of 5,000 adapters
def test_five_thousand_adapters_leave_the_series_under_the_cap(tmp_path: Path) -> None:
    row = metrics_churn.measure(tmp_path, num_adapters=5000, cap=100, num_streams=4, interval_s=2.0)
    assert (row["num_requests"], row["num_failed"]) == (5000, 0)
    assert row["num_on_host"] > 100, "the cap is reached"
    assert row["max_series_of_adapters"] <= metrics_churn.max_named(100)
    assert row["max_series"] < metrics_churn.max_named(100) + 1500
    assert row["max_lora_requests_info"] == 1


def test_the_cap_counts_all_that_an_adapter_may_have() -> None:
    text = (
        'graft_adapter_bytes{adapter="a",tier="host"} 1\nvllm:lora_adapter_loaded{model_name="m",adapter_name="a"} 1\n'
        'graft_requests_total{route="/v1/adapters/{name}",status="200"} 1\n'
    )
    assert len(metrics_churn._OF_AN_ADAPTER.findall(text)) == 2
    assert metrics_churn.max_named(100) == 1116
