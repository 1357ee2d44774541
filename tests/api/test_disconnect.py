"""A client that leaves: its sequences end within one step, whatever it was waiting for."""

from typing import Any

import pytest

from tests.api.conftest import Gate, Live, eventually

TEXT = ("/v1/completions", {"prompt": "Hi", "max_tokens": 200, "ignore_eos": True, "logprobs": 0})
CHAT = (
    "/v1/chat/completions",
    {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200, "ignore_eos": True},
)


def num_aborted(live: Live) -> float:
    return live.metric("graft_sequences_finished_total", finish_reason="abort")


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(("path", "body"), [TEXT, CHAT])
@pytest.mark.parametrize("num_choices", [1, 3])
def test_leaving_ends_the_sequences_within_one_step(
    live: Live, gate: Gate, path: str, body: dict[str, Any], stream: bool, num_choices: int
) -> None:
    engine, registry = live.server.engine, live.server.registry
    before = num_aborted(live)
    connection = live.send(path, **body, stream=stream, n=num_choices, adapter="first")
    gate.allow(1)
    received = b""
    while stream and b"data: " not in received:
        part = connection.recv(65536)
        assert part, f"the server has hung up: {received!r}"
        received += part
    eventually(lambda: engine.stats().num_in_flight == num_choices)
    connection.close()
    eventually(lambda: num_aborted(live) == before + num_choices)
    gate.allow(1)
    eventually(lambda: engine.stats().num_in_flight == 0)
    # In flight is what the engine counts down first; its thread may be interrupted before it lets go of the rest.
    eventually(lambda: registry.stats().num_leases == 0)
    assert engine.stats().num_used_blocks == 0
    assert registry.stats().num_residencies == 0


def test_others_in_the_batch_do_not_notice(live: Live) -> None:
    request = {"prompt": "The others", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "adapter": "second"}
    alone = live.post("/v1/completions", **request).json()["choices"]
    leaving = [live.send(TEXT[0], **TEXT[1]) for _ in range(4)]
    for connection in leaving[:2]:
        connection.close()
    together = live.post("/v1/completions", **request).json()["choices"]
    for connection in leaving[2:]:
        connection.close()
    assert together == alone
    eventually(lambda: live.server.engine.stats().num_in_flight == 0)


def test_leaving_in_the_middle_of_the_body_starts_nothing(live: Live) -> None:
    # Before its body is whole a request has no route: requests of other tests that were left are not counted with it.
    left = {"route": "unmatched", "status": "499"}
    before = live.metric("graft_requests_total", **left)
    connection = live.connect()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
    connection.close()
    eventually(lambda: live.metric("graft_requests_total", **left) == before + 1)
    assert live.server.engine.stats().num_in_flight == 0
