"""The client: where a server is, what its streams say however they are cut, and what it says of one that is silent."""

import argparse
import asyncio
import json
import threading
from collections.abc import AsyncIterator

import httpx
import pytest

from server.cli.client import (
    Address,
    NoAnswer,
    Piece,
    Refused,
    Silent,
    Unreachable,
    address_of,
    connect,
    models,
    stream,
)
from server.ground.errors import StartupRefused
from tests.cli.conftest import Reply, Scripted, streamed

PATH = "/v1/chat/completions"


def said(url: str, **options: float) -> list[Piece]:
    async def read() -> list[Piece]:
        async with connect(Address(url), **options) as http:  # type: ignore[arg-type]
            return [piece async for piece in stream(http, PATH, {"messages": []})]

    return asyncio.run(read())


def listed(url: str) -> list[dict[str, object]]:
    async def read() -> list[dict[str, object]]:
        async with connect(Address(url)) as http:
            return await models(http)

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("https://example.org/base/v1", "https://example.org/base"),
        ("http://[::1]:8000/v1/", "http://[::1]:8000"),
    ],
)
def test_an_address_may_be_that_of_other_clients(given: str, found: str) -> None:
    assert address_of(argparse.Namespace(url=given)).url == found


@pytest.mark.parametrize(
    "url", ["", "localhost", "localhost:8000", "ftp://x", "http://", "http://x:99999", "http://x:y"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(StartupRefused, match="--url is"):
        address_of(argparse.Namespace(url=url))


def test_without_one_it_is_where_a_server_of_here_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address_of(argparse.Namespace(url=None)) == Address("http://127.0.0.1:8000")
    monkeypatch.setenv("GRAFT_PORT", "8123")
    monkeypatch.setenv("GRAFT_API_KEY", "sesame")
    assert address_of(argparse.Namespace(url=None)) == Address("http://127.0.0.1:8123", "sesame")


def test_a_server_of_this_machine_is_asked_without_a_proxy(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert listed(scripted.url)


TEXTS = ("a", "é🎉", "two\u2028lines\u0085\r", "")


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 7, 100_000])
def test_a_stream_says_the_same_however_it_is_cut(num_bytes: int) -> None:
    raw = b": keep-alive\n\n" + b"".join(streamed(*TEXTS).parts)

    class Cut(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for at in range(0, len(raw), num_bytes):
                yield raw[at : at + num_bytes]

    async def read() -> list[Piece]:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Cut()))
        async with connect(Address("http://here"), transport=transport) as http:
            return [piece async for piece in stream(http, PATH, {})]

    assert asyncio.run(read()) == [*map(Piece, TEXTS), Piece(finish_reason="stop")]


def test_parts_that_are_null_or_odd_say_nothing(scripted: Scripted) -> None:
    odd = [None, [], [None], [{"delta": None}], [{"delta": {"content": 5}, "finish_reason": 1}], [5], {"a": 1}]
    events = b"".join(f"data: {json.dumps({'choices': choices})}\n\n".encode() for choices in odd)
    scripted.answer = lambda body: Reply(parts=(events, b"data: [DONE]\n\n"))
    assert said(scripted.url) == [Piece()] * len(odd)


def test_reasoning_comes_apart_under_either_name(scripted: Scripted) -> None:
    deltas = [{"reasoning_content": "Hm"}, {"reasoning": "."}, {"content": "Yes."}]
    events = b"".join(f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n".encode() for delta in deltas)
    scripted.answer = lambda body: Reply(parts=(events, b"data: [DONE]\n\n"))
    assert said(scripted.url) == [Piece(reasoning="Hm"), Piece(reasoning="."), Piece("Yes.")]


def test_a_terminal_does_not_obey_a_servers_errors(scripted: Scripted) -> None:
    attack = "\x1b]52;c;cm0gLXJm\x07" + "x" * 5000
    for body in (json.dumps({"error": {"message": attack}}), attack):
        scripted.answer = lambda _, body=body: Reply(400, (body.encode(),))  # type: ignore[misc]
        with pytest.raises(Refused, match="^.]52;c;cm0gLXJm.x") as refused:
            said(scripted.url)
        assert "\x1b" not in refused.value.message
        assert len(refused.value.message) < 2100


def test_a_stream_without_its_end_is_no_answer(scripted: Scripted) -> None:
    scripted.answer = lambda body: streamed("half", ending=b"")
    with pytest.raises(NoAnswer, match="broke its answer off"):
        said(scripted.url)


def test_a_connection_that_breaks_is_no_answer(scripted: Scripted) -> None:
    scripted.answer = lambda body: streamed("half", ending=b"", hangs_up=True)
    with pytest.raises(NoAnswer, match="broke the connection off"):
        said(scripted.url)


def test_an_answer_that_fails_in_the_middle_says_why(scripted: Scripted) -> None:
    scripted.answer = lambda body: streamed("half", ending=b'data: {"error": {"message": "the device is gone"}}\n\n')
    with pytest.raises(Refused, match="the device is gone"):
        said(scripted.url)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(404, (b'{"error": {"message": "no adapter x"}}',)), r"no adapter x \(status 404\)"),
        (Reply(502, (b"<html>bad gateway</html>",)), "bad gateway"),
        (Reply(500, (b"",)), "no reason given"),
        (Reply(401, (b"",)), "GRAFT_API_KEY"),
        (Reply(200, (b"data: nonsense\n",)), "no JSON"),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(scripted: Scripted, reply: Reply, words: str) -> None:
    scripted.answer = lambda body: reply
    with pytest.raises((Refused, NoAnswer), match=words):
        said(scripted.url)


def test_a_server_that_is_not_there_is_named_with_a_remedy() -> None:
    with pytest.raises(Unreachable, match=r"http://127\.0\.0\.1:9 .*graft serve.*--url"):
        listed("http://127.0.0.1:9")


def test_a_server_that_says_nothing_is_not_waited_for_for_ever(scripted: Scripted) -> None:
    def never(body: object) -> Reply:
        released.acquire()
        return Reply()

    released = threading.Semaphore(0)
    scripted.answer = never
    with pytest.raises(Silent):
        said(scripted.url, max_silence_s=0.01)
    released.release()


@pytest.mark.parametrize(
    "cards", [b"<html>", b"[]", b'{"data": []}', b'{"data": [1]}', b'{"data": [{"id": 5}]}', b"[" * 100_000]
)
def test_what_is_no_server_of_models_is_told_so(scripted: Scripted, cards: bytes) -> None:
    scripted.cards = cards
    with pytest.raises(NoAnswer, match="is no server of models"):
        listed(scripted.url)
