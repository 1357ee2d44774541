"""Server-sent events, byte for byte, and what a stream does when something fails."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from server.ground.config import Settings
from tests.api.adapter_files import lora_files
from tests.api.conftest import Gate, Live, eventually, serving

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 4, "ignore_eos": True}
TEXT = {"prompt": "Hi", "stream": True, "max_tokens": 4, "ignore_eos": True}
BOTH = pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])


def with_logprobs(body: dict[str, Any]) -> dict[str, Any]:
    """The request, so that every token makes a chunk: one that ends within a character has no text to send."""
    return {**body, "logprobs": True if "messages" in body else 0}


def events(live: Live, path: str, body: dict[str, Any]) -> list[str]:
    """The payloads of a stream's events, having checked its framing."""
    with live.http.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        raw = answer.read().decode()
    assert raw.endswith("\n\n")
    frames = raw.removesuffix("\n\n").split("\n\n")
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    return [frame.removeprefix("data: ") for frame in frames]


@BOTH
def test_a_stream_ends_with_done(live: Live, path: str, body: dict[str, Any]) -> None:
    *sent, last = events(live, path, body)
    assert last == "[DONE]"
    chunks = [json.loads(chunk) for chunk in sent]
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@BOTH
def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(live: Live, path: str, body: dict[str, Any]) -> None:
    *sent, _ = events(live, path, {**body, "stream_options": {"include_usage": True}})
    *chunks, last = [json.loads(chunk) for chunk in sent]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks)


@BOTH
def test_usage_may_run_along(live: Live, path: str, body: dict[str, Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *sent, _ = events(live, path, {**body, "stream_options": options})
    counts = [json.loads(chunk)["usage"]["completion_tokens"] for chunk in sent]
    assert counts == sorted(counts)
    assert counts[-1] == 4


@BOTH
def test_what_is_refused_is_refused_before_the_stream_begins(live: Live, path: str, body: dict[str, Any]) -> None:
    for change, status in (({"adapter": "nobody"}, 404), ({"max_tokens": 5000}, 400), ({"use_beam_search": True}, 400)):
        refused = live.post(path, **{**body, **change})
        assert refused.status_code == status
        assert refused.headers["content-type"] == "application/json"
        assert refused.json()["error"]["message"]


@BOTH
def test_an_adapter_that_cannot_be_loaded_is_refused_before_the_stream_begins(
    path: str, body: dict[str, Any], settings: Callable[..., Settings], tmp_path: Path
) -> None:
    files = lora_files(1)
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(files.config)
    (folder / "adapter_model.safetensors").write_bytes(files.weights[:-8])
    with serving(settings(adapters=tmp_path)) as live:
        for stream in (True, False):
            refused = live.post(path, **{**body, "stream": stream, "adapter": "broken"})
            assert refused.status_code >= 400
            assert "adapter_model.safetensors" in refused.json()["error"]["message"]
        assert live.server.registry.stats().num_leases == 0


@BOTH
def test_a_failure_before_the_first_token_has_a_status(
    live: Live, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(live.server.runner, "run", _broken)
            failed = live.post(path, **{**body, "stream": stream})
        assert failed.status_code == 500
        assert failed.json()["error"]["code"] == "generation_failed"
        assert live.post(path, **body).status_code == 200  # the engine goes on


@BOTH
def test_a_failure_in_mid_stream_is_an_error_event_and_no_done(
    live: Live, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter([live.server.runner.run] * 3)
    monkeypatch.setattr(live.server.runner, "run", lambda *step: next(steps, _broken)(*step))
    request = {**with_logprobs(body), "max_tokens": 100, "adapter": "first"}
    *chunks, last = [json.loads(event) for event in events(live, path, request)]
    assert len(chunks) >= 3
    assert all("choices" in chunk for chunk in chunks)
    assert last.keys() == {"error"}
    assert last["error"].keys() == {"message", "type", "param", "code"}
    assert last["error"]["code"] == "generation_failed"
    eventually(lambda: live.server.registry.stats().num_leases == 0)


@BOTH
def test_a_defect_in_mid_stream_is_an_error_event_that_tells_nothing(
    live: Live, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = iter("ab")  # then StopIteration is raised, which nobody foresees
    monkeypatch.setattr(live.server.tokenizer, "token_text", lambda token_id: next(texts))
    *chunks, last = [json.loads(event) for event in events(live, path, with_logprobs(body))]
    assert chunks
    assert all("choices" in chunk for chunk in chunks)
    assert last["error"]["code"] == "internal_error"
    assert "stream of request req_" in caplog.text


def test_openais_client_raises_for_a_failure_in_mid_stream(
    live: Live, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.allow(2)
    stream = live.openai.completions.create(model="tiny", prompt="Hi", max_tokens=100, stream=True, logprobs=0)
    next(iter(stream))
    monkeypatch.setattr(gate, "_run", _broken)
    gate.allow(1)
    with pytest.raises(openai.APIError, match="step failed"):
        list(stream)


def _broken(*step: Any) -> Any:
    raise RuntimeError("the device is gone")
