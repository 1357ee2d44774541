"""Comments on a silent stream: clients pass over them, and nothing about a stream changes but when its status goes.

A gate holds the engine's steps back, so that the stream is silent for as long as the test wants.
"""

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from server.ground.config import Settings
from tests.api.adapter_files import lora_files
from tests.api.conftest import Gate, Live, eventually, serving

COMMENT = b": keep-alive\n\n"
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 3, "ignore_eos": True}
TEXT = {"prompt": "Hi", "stream": True, "max_tokens": 3, "ignore_eos": True}
BOTH = pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])


@pytest.fixture(scope="module")
def alive(settings: Callable[..., Settings]) -> Iterator[Live]:
    with serving(settings(sse_keep_alive_interval=0.02)) as live:
        assert live.upload("first", lora_files(1)).status_code == 201
        yield live


@pytest.fixture
def steps(alive: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(alive.server.runner.run)
    monkeypatch.setattr(alive.server.runner, "run", gate)
    yield gate
    gate.allow(1_000_000)
    eventually(lambda: alive.server.engine.stats().num_in_flight == 0)


class Reader:
    """What has come on a bare connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.text = b""

    def until(self, is_enough: Callable[[bytes], bool]) -> bytes:
        while not is_enough(self.text):
            part = self._connection.recv(65536)
            assert part, f"it ended with {self.text[-200:]!r}"
            self.text += part
        return self.text


def events(text: bytes) -> list[Any]:
    """The payloads of a stream's events, in what came on the wire; [DONE] is no JSON."""
    lines = [line.strip() for line in text.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line[6:]) for line in lines if line != b"data: [DONE]"]


@BOTH
def test_comments_come_before_the_first_token_and_between_tokens(
    alive: Live, steps: Gate, path: str, body: dict[str, Any]
) -> None:
    with alive.send(path, **body) as connection:
        reader = Reader(connection)
        before = reader.until(lambda text: text.count(COMMENT) >= 3)
        assert before.startswith(b"HTTP/1.1 200 ")
        assert b"text/event-stream" in before
        assert b"data: " not in before
        steps.allow(1)
        eventually(lambda: alive.server.engine.stats().num_steps > 0)
        reader.until(lambda text: text.count(COMMENT) >= before.count(COMMENT) + 6)
        steps.allow(100)
        whole = reader.until(lambda text: b"data: [DONE]\n\n" in text)
    assert events(whole)[-1]["choices"][0]["finish_reason"] == "length"
    assert COMMENT not in whole.partition(b"data: [DONE]")[2]


def test_openais_client_passes_over_them(alive: Live, steps: Gate) -> None:
    raw = alive.openai.completions.with_raw_response.create(
        model="first", prompt="Hi", max_tokens=3, seed=1, stream=True, extra_body={"ignore_eos": True}
    )
    assert raw.headers["x-request-id"]  # and no token is there yet
    steps.allow(100)
    streamed = "".join(chunk.choices[0].text for chunk in raw.parse())
    whole = alive.openai.completions.create(
        model="first", prompt="Hi", max_tokens=3, seed=1, extra_body={"ignore_eos": True}
    )
    assert streamed == whole.choices[0].text


def test_openais_chat_client_passes_over_them(alive: Live, steps: Gate) -> None:
    stream = alive.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=3, stream=True
    )
    steps.allow(100)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("length", "stop")


@BOTH
def test_a_failure_after_a_comment_is_an_error_event(
    alive: Live, steps: Gate, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_run", _broken)
    with alive.send(path, **{**body, "adapter": "first"}) as connection:
        reader = Reader(connection)
        reader.until(lambda text: COMMENT in text)
        steps.allow(1)
        whole = reader.until(lambda text: text.endswith(b"0\r\n\r\n"))
    (only,) = events(whole)
    assert only["error"]["code"] == "generation_failed"
    assert b"[DONE]" not in whole
    eventually(lambda: alive.server.registry.stats().num_leases == 0)


def test_openais_client_raises_for_a_failure_after_a_comment(
    alive: Live, steps: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_run", _broken)
    stream = alive.openai.completions.create(model="tiny", prompt="Hi", stream=True)
    steps.allow(1)
    with pytest.raises(openai.APIError, match="step failed"):
        list(stream)


@BOTH
def test_what_is_refused_at_once_keeps_its_status(alive: Live, path: str, body: dict[str, Any]) -> None:
    assert alive.post(path, **{**body, "adapter": "nobody"}).status_code == 404
    assert alive.post(path, **{**body, "max_tokens": 5000}).status_code == 400


@BOTH
def test_who_leaves_a_silent_stream_is_noticed(alive: Live, steps: Gate, path: str, body: dict[str, Any]) -> None:
    with alive.send(path, **{**body, "adapter": "first"}) as connection:
        Reader(connection).until(lambda text: COMMENT in text)
    steps.allow(1_000)
    eventually(lambda: alive.server.engine.stats().num_in_flight == 0)
    eventually(lambda: alive.server.registry.stats().num_leases == 0)


def test_a_client_that_reads_nothing_holds_up_nobody(alive: Live, steps: Gate) -> None:
    with alive.send("/v1/completions", **TEXT), alive.send("/v1/completions", **TEXT):
        eventually(lambda: alive.server.engine.stats().num_in_flight == 2)
        steps.allow(1_000)
        assert alive.post("/v1/completions", prompt="Hi", max_tokens=1).status_code == 200


def test_an_answer_that_is_no_stream_has_none(alive: Live, steps: Gate) -> None:
    steps.allow(1_000)
    assert alive.http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2}).text.startswith("{")


def test_zero_switches_them_off(settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(settings(sse_keep_alive_interval=0)) as live:
        gate = Gate(live.server.runner.run)
        monkeypatch.setattr(live.server.runner, "run", gate)
        with live.send("/v1/completions", **TEXT) as connection:
            eventually(lambda: live.server.engine.stats().num_in_flight == 1)
            gate.allow(1_000)
            assert COMMENT not in Reader(connection).until(lambda text: b"[DONE]" in text)


def _broken(batch: Any) -> Any:
    raise RuntimeError("the device is gone")
