"""GET /metrics of a server that works: what requests, adapters and uploads leave there."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from server.ground.config import Settings
from server.ground.errors import StorageFull
from tests.api.adapter_files import lora_files
from tests.api.conftest import Gate, Live, eventually, serving
from tests.api.test_put import tar


@contextmanager
def rising(live: Live, name: str, by: float, **labels: str) -> Iterator[None]:
    """Within the block the metric rises by so much."""
    before = live.metric(name, **labels)
    yield
    assert live.metric(name, **labels) - before == by


def test_a_refusal_is_counted_by_its_reason(live: Live) -> None:
    refusals = (
        ("adapter_not_found", {"prompt": "Hi", "adapter": "no-such"}),
        ("model_not_found", {"prompt": "Hi", "model": "no-such"}),
        ("missing_field", {"max_tokens": 1}),
        ("context_length_exceeded", {"prompt": "Hi", "max_tokens": 10**9}),
    )
    for reason, body in refusals:
        with rising(live, "graft_rejections_total", 1, reason=reason):
            assert live.post("/v1/completions", **body).status_code in (400, 404)
    with rising(live, "graft_rejections_total", 1, reason="route_not_found"):
        live.http.get("/no/such/route")
    with rising(live, "graft_rejections_total", 1, reason="not_found"):
        live.post("/v1/unload_lora_adapter", lora_name="no-such")


def test_a_full_queue_is_a_reason_of_its_own_and_so_is_a_missing_key(strict: Live, strict_gate: Gate) -> None:
    stats = strict.server.engine.stats
    with strict.send("/v1/completions", prompt="Hi", max_tokens=2, n=4):
        eventually(lambda: stats().num_running == 4)
        with strict.send("/v1/completions", prompt="Hi", max_tokens=2, n=4):
            eventually(lambda: stats().num_waiting == 4)
            with rising(strict, "graft_rejections_total", 1, reason="queue_full"):
                assert strict.post("/v1/completions", prompt="Hi", n=4).status_code == 503
    with rising(strict, "graft_rejections_total", 1, reason="invalid_api_key"):
        assert strict.http.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401


def test_a_stream_that_fails_in_the_middle_is_counted_by_its_reason(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*step: Any) -> Any:
        raise RuntimeError("the device is gone")

    steps = iter([live.server.runner.run] * 3)
    body = {"prompt": "Hi", "stream": True, "max_tokens": 100, "ignore_eos": True, "logprobs": 0, "adapter": "first"}
    with (
        rising(live, "graft_requests_total", 1, route="/v1/completions", status="200"),
        rising(live, "graft_broken_answers_total", 1, reason="generation_failed"),
        rising(live, "graft_sequences_finished_total", 1, finish_reason="error"),
        rising(live, "graft_adapter_failures_total", 1, adapter="first"),
        rising(live, "graft_rejections_total", 0),
        monkeypatch.context() as patch,
    ):
        patch.setattr(live.server.runner, "run", lambda *step: next(steps, broken)(*step))
        assert live.post("/v1/completions", **body).status_code == 200


def test_a_defect_in_the_middle_of_a_stream_is_counted(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter("ab")  # then StopIteration is raised, which nobody foresees
    with rising(live, "graft_broken_answers_total", 1, reason="internal_error"), monkeypatch.context() as patch:
        patch.setattr(live.server.tokenizer, "token_text", lambda token_id: next(texts))
        assert live.post("/v1/completions", prompt="Hi", stream=True, logprobs=0, ignore_eos=True).status_code == 200


def test_an_adapters_requests_and_tokens_are_its_own(live: Live) -> None:
    with (
        rising(live, "graft_adapter_sequences_total", 2, adapter="first"),
        rising(live, "graft_adapter_prompt_tokens_total", 4, adapter="first"),
        rising(live, "graft_adapter_output_tokens_total", 6, adapter="first"),
        rising(live, "graft_adapter_sequences_total", 0, adapter="second"),
    ):
        live.post("/v1/completions", prompt=[65, 66], max_tokens=3, n=2, adapter="first", ignore_eos=True)
    labels = {"adapter": "first", "tier": "device", "method": "lora"}
    assert live.metric("graft_adapter_loaded", **labels) == 1
    assert live.metric("graft_adapter_bytes", adapter="first", tier="device") > 0


def test_prompt_tokens_count_when_the_prefill_ends_and_once(live: Live, gate: Gate) -> None:
    def told() -> list[float]:
        names = ("graft_prompt_tokens_total", "graft_sequences_finished_total")
        return [live.metric(name) for name in names] + [
            live.metric("graft_adapter_prompt_tokens_total", adapter="first")
        ]

    before = told()
    with live.send("/v1/completions", prompt=[65, 66, 67], max_tokens=20, ignore_eos=True, adapter="first"):
        eventually(lambda: live.server.engine.stats().num_in_flight == 1)
        assert told() == before
        gate.allow(2)
        eventually(lambda: told() == [before[0] + 3, before[1], before[2] + 3])
        gate.allow(5)
    eventually(lambda: told() == [before[0] + 3, before[1] + 1, before[2] + 3])


def test_prompt_tokens_that_were_found_are_told(settings: Callable[..., Settings]) -> None:
    with serving(settings(metrics_compat="vllm", prefix_reuse="on", block_size=16)) as live:
        for _ in range(2):
            live.post("/v1/completions", prompt=list(range(60, 100)), max_tokens=1).raise_for_status()
        found = live.metric("graft_prompt_tokens_cached_total")
        assert 16 <= found < 40
        assert live.metric("graft_prompt_tokens_total") == 80
        assert live.metric("vllm:prompt_tokens_by_source_total", source="local_compute") == 80 - found


def test_a_mix_counts_for_each_of_its_adapters(live: Live) -> None:
    mix = [{"name": "first", "weight": 0.5}, {"name": "second", "weight": 0.5}]
    with (
        rising(live, "graft_adapter_output_tokens_total", 2, adapter="first"),
        rising(live, "graft_adapter_output_tokens_total", 2, adapter="second"),
        rising(live, "graft_output_tokens_total", 2),
    ):
        live.post("/v1/completions", prompt="Hi", max_tokens=2, adapter=mix, ignore_eos=True)


def test_names_that_nobody_has_are_unknown(live: Live) -> None:
    with rising(live, "graft_adapter_sequences_total", 2, adapter="unknown"):
        live.post("/v1/completions", prompt="Hi", adapter="evil-name")
        live.post("/v1/completions", prompt="Hi", model="evil-name")
    assert "evil-name" not in live.http.get("/metrics").text


def test_who_runs_and_who_waits_is_told_by_adapter(live: Live, gate: Gate) -> None:
    with live.send("/v1/completions", prompt="Hi", max_tokens=2, n=3, adapter="first"):

        def counts() -> list[float]:
            return [live.metric(f"graft_adapter_sequences_{what}", adapter="first") for what in ("running", "waiting")]

        eventually(lambda: sum(counts()) == 3)
        gate.allow(100)
    eventually(lambda: sum(counts()) == 0)


def test_the_times_of_a_sequence_add_up(live: Live) -> None:
    parts = ("queue", "prefill", "decode")
    names = [f"graft_sequence_{part}_seconds_sum" for part in parts]
    before, whole = [live.metric(name) for name in names], live.metric("graft_sequence_seconds_sum")
    with rising(live, "graft_sequence_seconds_count", 1), rising(live, "graft_sequence_output_tokens_sum", 4):
        live.post("/v1/completions", prompt="Hi", max_tokens=4, ignore_eos=True)
    taken = [live.metric(name) - was for name, was in zip(names, before, strict=True)]
    assert min(taken) >= 0
    assert sum(taken) == pytest.approx(live.metric("graft_sequence_seconds_sum") - whole)


def test_uploads_are_counted_by_their_result_and_vanish_with_the_adapter(live: Live) -> None:
    with rising(live, "graft_uploads_total", 1, result="stored"):
        assert live.upload("passing", lora_files(7)).status_code == 201
    with rising(live, "graft_uploads_total", 1, result="unchanged"):
        assert live.upload("passing", lora_files(7)).status_code == 200
    with rising(live, "graft_uploads_total", 1, result="rejected"):
        assert live.upload("passing", lora_files(8)).status_code == 409
    assert live.metric("graft_adapter_loaded", adapter="passing", tier="host") == 1
    live.http.delete("/v1/adapters/passing").raise_for_status()
    assert '"passing"' not in live.http.get("/metrics").text


@pytest.mark.parametrize("error", [StorageFull("The disk is full."), RuntimeError("a defect")])
def test_an_upload_that_the_server_fails_is_counted_as_failed(
    live: Live, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*arguments: Any, **named: Any) -> Any:
        raise error

    archive = tar(lora_files(9))
    monkeypatch.setattr(live.server.registry, "register", failing)
    with rising(live, "graft_uploads_total", 2, result="failed"), rising(live, "graft_uploads_total", 2):
        assert live.upload("failing", lora_files(9)).status_code >= 500
        assert live.http.put("/v1/adapters/failing", content=archive).status_code >= 500


def test_an_upload_whose_client_leaves_is_counted_as_abandoned(live: Live) -> None:
    before = live.metric("graft_uploads_total"), live.metric("graft_uploads_total", result="abandoned")
    heads = (
        "POST /v1/adapters HTTP/1.1\r\ncontent-type: multipart/form-data; boundary=b\r\n",
        "PUT /v1/adapters/leaving HTTP/1.1\r\n",
    )
    incoming = live.store / ".incoming"
    for head in heads:
        with live.connect() as connection:
            connection.sendall(f"{head}host: x\r\ncontent-length: 5000\r\n\r\n--b\r\n".encode())
            eventually(lambda: any(incoming.iterdir()))
        eventually(lambda: not any(incoming.iterdir()))
    eventually(lambda: live.metric("graft_uploads_total", result="abandoned") == before[1] + 2)
    assert live.metric("graft_uploads_total") == before[0] + 2


def test_merges_are_counted_by_their_result(live: Live) -> None:
    parts = [{"name": "first"}, {"name": "second"}]
    with rising(live, "graft_merges_total", 1, result="stored"), rising(live, "graft_merge_seconds_count", 1):
        assert live.post("/v1/adapters/merge", name="merged", adapters=parts).status_code == 201
    with rising(live, "graft_merges_total", 1, result="rejected"):
        assert live.post("/v1/adapters/merge", name="merged", adapters=[{"name": "no-such"}]).status_code == 404
    live.http.delete("/v1/adapters/merged").raise_for_status()


def test_lookups_and_moves_are_told_by_tier(live: Live) -> None:
    live.http.post("/v1/adapters/first/unload").raise_for_status()
    with (
        rising(live, "graft_adapter_lookups_total", 1, tier="store"),
        rising(live, "graft_adapter_load_seconds_count", 1, transition="store_to_host"),
        rising(live, "graft_adapter_load_seconds_count", 1, transition="host_to_device"),
    ):
        live.post("/v1/completions", prompt="Hi", max_tokens=1, adapter="first")
    with rising(live, "graft_adapter_lookups_total", 1, tier="device"):
        live.post("/v1/completions", prompt="Hi", max_tokens=1, adapter="first")


def test_rows_are_told_and_freed(live: Live) -> None:
    live.post("/v1/completions", prompt="Hi", max_tokens=1, adapter="first")
    assert 0 < live.metric("graft_rank_rows") <= live.metric("graft_rank_row_uses")
    for name in ("first", "second"):
        live.http.post(f"/v1/adapters/{name}/unload").raise_for_status()
    names = ("graft_rank_rows", "graft_rank_rows_shared", "graft_rank_row_uses")
    assert [live.metric(name) for name in names] == [0, 0, 0]


def test_memory_and_the_base_are_told(live: Live) -> None:
    assert live.metric("graft_base_info", device="cpu", quantization="none", dtype="float32") == 1
    for name in ("graft_base_bytes", "graft_kv_cache_bytes", "graft_device_memory_bytes"):
        assert live.metric(name) > 0
    assert live.metric("process_resident_memory_bytes") > 0
    assert live.metric("graft_engine_up") == 1


def test_vllms_names_are_there_for_who_asks_for_them(settings: Callable[..., Settings]) -> None:
    with serving(settings(metrics_compat="vllm", metrics_max_adapters=1)) as live:
        for index in range(3):
            live.upload(f"a{index}", lora_files(index)).raise_for_status()
            live.post("/v1/completions", prompt="Hi", max_tokens=2, adapter=f"a{index}")
        text = live.http.get("/metrics").text
        own = {"model_name": "tiny", "engine": "0"}
        assert len(re.findall(r"^vllm:lora_requests_info\{", text, re.MULTILINE)) == 1
        assert live.metric("vllm:lora_adapter_loaded", **own, level="gpu") == 1, "the cap holds here, too"
        assert live.metric("vllm:num_gpu_loaded_lora_adapters", **own) == 3
        assert live.metric("vllm:generation_tokens_total", **own) == live.metric("graft_output_tokens_total")
        assert live.metric("vllm:num_requests_running", **own) == 0
        assert live.metric("graft_adapter_loaded", adapter="other", tier="device") == 2
