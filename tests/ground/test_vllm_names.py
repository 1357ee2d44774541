"""vLLM's names: made of ours, with its labels, and one series where vLLM has thousands."""

from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.ground.adapter_series import AdapterState
from server.ground.families import FAMILIES
from server.ground.metrics import Metrics, Moment
from server.ground.vllm_names import LOADED, REQUESTS_INFO, SAME, VllmNames

OWN = {"model_name": "org/base", "engine": "0"}


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics(also=VllmNames("org/base", clock=lambda: 1234.5))
    metrics.watch(
        lambda: {
            name: {tuple("7" for _ in family.labels): 7.0} if family.labels else 7.0
            for name, family in FAMILIES.items()
            if family.is_watched and "adapter" not in family.labels
        }
    )
    return metrics


def samples(metrics: Metrics, name: str) -> list[tuple[dict[str, str], float]]:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return [(s.labels, s.value) for family in families for s in family.samples if s.name == name]


def test_every_name_is_there_with_vllms_labels_and_our_value(metrics: Metrics) -> None:
    text = metrics.exposition().decode()
    for ours, theirs in SAME.items():
        assert f"# TYPE {theirs} {FAMILIES[ours].kind}\n" in text
    assert samples(metrics, "vllm:num_requests_running") == [(OWN, 7)]
    assert samples(metrics, "vllm:cache_config_info") == [(OWN | {"block_size": "7", "num_gpu_blocks": "7"}, 7)]


def test_counters_and_histograms_keep_their_ends(metrics: Metrics) -> None:
    metrics.count_finished("length")
    metrics.count_prompt(11, num_cached=4)
    metrics.observe_first_token(0.03, queue_s=0.01)
    metrics.step(SimpleNamespace(num_sequences=1, num_tokens=8, num_adapters=0, num_methods=0, duration_s=0.1))
    assert (OWN | {"finished_reason": "length"}, 1) in samples(metrics, "vllm:request_success_total")
    assert samples(metrics, "vllm:prompt_tokens_total") == [(OWN, 11)]
    assert samples(metrics, "vllm:prompt_tokens_cached_total") == [(OWN, 4)]
    assert samples(metrics, "vllm:time_to_first_token_seconds_sum") == [(OWN, 0.03)]
    assert (OWN | {"le": "0.04"}, 1) in samples(metrics, "vllm:time_to_first_token_seconds_bucket")
    assert samples(metrics, "vllm:iteration_tokens_total_sum") == [(OWN, 8)]


def test_prompt_tokens_are_told_by_source(metrics: Metrics) -> None:
    metrics.count_prompt(11, num_cached=4)
    found = [(OWN | {"source": "local_compute"}, 7), (OWN | {"source": "local_cache_hit"}, 4)]
    assert samples(metrics, "vllm:prompt_tokens_by_source_total") == found


def test_those_that_wait_are_told_by_what_they_wait_for() -> None:
    metrics = Metrics(also=VllmNames("org/base"))
    metrics.watch(lambda: {"graft_sequences_waiting": 7.0, "graft_sequences_short_of_room": 2.0})
    found = [(OWN | {"reason": "capacity"}, 5), (OWN | {"reason": "deferred"}, 2)]
    assert samples(metrics, "vllm:num_requests_waiting_by_reason") == found


def test_what_the_queue_turned_away_is_there_from_the_start_and_nothing_else_is(metrics: Metrics) -> None:
    def told() -> list[tuple[dict[str, str], float]]:
        return samples(metrics, "vllm:admission_rejections_total")

    model = {"model_name": "org/base"}
    assert told() == [(model | {"reason": "queue_full"}, 0), (model | {"reason": "queue_timeout"}, 0)]
    for reason in ("queue_full", "missing_field"):
        metrics.count_rejection(reason)
    assert told() == [(model | {"reason": "queue_full"}, 1), (model | {"reason": "queue_timeout"}, 0)]


def test_a_loaded_adapter_is_one_series_at_its_best_level(metrics: Metrics) -> None:
    states = [
        AdapterState("hot", "lora", 8, True, host_bytes=1, device_bytes=1),
        AdapterState("warm", "ia3", 0, host_bytes=1),
    ]
    metrics.look_at(lambda names: Moment(adapters=states))
    assert samples(metrics, LOADED) == [
        (OWN | {"adapter_name": "hot", "level": "gpu", "pinned": "true", "rank": "8"}, 1),
        (OWN | {"adapter_name": "warm", "level": "cpu", "pinned": "false", "rank": "0"}, 1),
    ]
    states.clear()
    assert samples(metrics, LOADED) == []


def test_requests_info_is_one_series_whatever_happens_and_tells_where_adapters_are(metrics: Metrics) -> None:
    states: list[AdapterState] = []
    metrics.look_at(lambda names: Moment(adapters=states))
    for index in range(50):
        states[:] = [
            AdapterState("idle", host_bytes=1, device_bytes=1),
            AdapterState(f"a{index}", host_bytes=1, device_bytes=1, num_running=1, num_waiting=2),
            AdapterState(f"b{index}", host_bytes=1, num_waiting=1),
        ]
        told = {"running_lora_adapters": f"a{index},idle", "waiting_lora_adapters": f"b{index}", "max_lora": "7"}
        assert samples(metrics, REQUESTS_INFO) == [(told, 1234.5)]


def test_without_the_setting_there_is_none_of_them() -> None:
    assert b"vllm:" not in Metrics().exposition()
