"""The size of bodies: refused early, answered readably, and never taken by half."""

from collections.abc import Iterator

import pytest

from tests.api.conftest import Live

LIMIT = 16 * 1024**2


def chunked(num_bytes: int) -> Iterator[bytes]:
    for _ in range(0, num_bytes, 65536):
        yield b" " * 65536


@pytest.mark.parametrize("is_declared", [True, False], ids=["declared", "chunked"])
def test_a_body_over_the_limit_is_a_413(live: Live, is_declared: bool) -> None:
    body = b" " * (LIMIT + 1) if is_declared else chunked(LIMIT + 65536)
    answer = live.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"
    assert str(LIMIT) in answer.json()["error"]["message"]


@pytest.mark.parametrize("is_declared", [True, False], ids=["declared", "chunked"])
def test_what_strangers_may_ask_takes_no_body(strict: Live, is_declared: bool) -> None:
    for num_bytes, status in ((4096, 200), (65536, 413)):
        body = b" " * num_bytes if is_declared or status == 200 else chunked(num_bytes)
        answer = strict.http.request("GET", "/health", content=body, headers={"authorization": ""})
        assert answer.status_code == status


def test_a_body_in_pieces_is_taken_whole(live: Live) -> None:
    pieces = iter([b'{"prompt"', b': "Hi", ', b'"max_tokens": 1', b"}"])
    answer = live.http.post("/v1/completions", content=pieces, headers={"content-type": "application/json"})
    assert answer.status_code == 200
