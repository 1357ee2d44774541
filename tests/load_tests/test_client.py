"""The sender over real sockets, against a server of another make that can fail in every way."""

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from load_tests import client, events
from load_tests.client import MAX_DETAIL_CHARS, Dialect, Models, Run, ServerRefused
from load_tests.outcome import End
from load_tests.plan import Request, TokenScale
from tests.load_tests.another_make import BASE, AnotherMake, nobody_listening

PROMPT = "the house has a door"
FAR_S = 1e6  # later than any test runs


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with client.open_session(None) as session:
        yield session


async def send(
    session: aiohttp.ClientSession,
    url: str,
    *names: str,
    at_s: tuple[float, ...] = (),
    drain_s: float = 120,
    interrupted: asyncio.Event | None = None,
    **asked: Any,
) -> Run:
    """A request for each name, all at once unless times are said."""
    dialect = Dialect(url, BASE, **asked)
    times = at_s or (0.0,) * len(names)
    requests = [Request(number, at, names[number], number + 1, 16) for number, at in enumerate(times)]
    plan = [(request, dialect.body(request.adapter, PROMPT, 3)) for request in requests]
    return await client.send(session, dialect, plan, drain_s, interrupted or asyncio.Event())


def body(adapter: str | None, **asked: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Dialect("http://x", **({"base": "b"} | asked)).body(adapter, "hello", 8))
    return found


def test_a_request_is_greedy_streamed_and_counted() -> None:
    assert body("a") == {
        "model": "a",
        "prompt": "hello",
        "stream": True,
        "max_tokens": 8,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("adapter", "asked", "names"),
    [
        ("a", {}, {"model": "a"}),
        (None, {}, {"model": "b"}),
        ("a", {"adapter_field": "adapter"}, {"model": "b", "adapter": "a"}),
        (None, {"adapter_field": "adapter"}, {"model": "b"}),
        ("a", {"adapter_field": "adapter", "base": None}, {"adapter": "a"}),
        ("a", {"model_template": "{base}:{adapter}"}, {"model": "b:a"}),
        (None, {"model_template": "{base}:{adapter}"}, {"model": "b"}),
        (None, {"base": None}, {}),
    ],
)
def test_each_make_is_told_the_adapter_in_its_own_way(
    adapter: str | None, asked: dict[str, Any], names: dict[str, str]
) -> None:
    found = body(adapter, **asked)
    assert {field: found[field] for field in ("model", "adapter") if field in found} == names


def test_a_chat_is_one_message_of_the_user() -> None:
    found = body("a", is_chat=True)
    assert found["messages"] == [{"role": "user", "content": "hello"}]
    assert "prompt" not in found
    assert Dialect("http://x", "b", is_chat=True).endpoint == "/v1/chat/completions"


def test_what_a_make_does_not_know_is_left_out() -> None:
    assert "stream_options" not in body("a", wants_usage=False)
    assert "ignore_eos" not in body("a")
    assert body("a", ignore_eos=True)["ignore_eos"] is True


@pytest.mark.parametrize("is_chat", [False, True])
async def test_a_whole_answer_is_told_with_its_tokens_and_counts(session: aiohttp.ClientSession, is_chat: bool) -> None:
    async with AnotherMake().listening() as url:
        run = await send(session, url, "whole", is_chat=is_chat)
    (outcome,) = run.outcomes
    assert (outcome.end, outcome.finish_reason, outcome.error) == (End.COMPLETED, "length", None)
    assert (len(outcome.token_times_s), outcome.num_output_tokens, outcome.num_prompt_tokens) == (3, 3, 11)
    times = [0.0, outcome.sent_s, *outcome.token_times_s, outcome.ended_s, run.elapsed_s]
    assert times == sorted(times)
    assert not run.is_interrupted


@pytest.mark.parametrize(
    ("answer", "num_chunks", "num_output_tokens", "finish_reason"),
    [
        ("uncounted", 3, None, "length"),
        ("without_done", 3, None, "length"),
        ("silent", 1, None, "stop"),
        ("held_after_done", 3, 3, "length"),
    ],
)
async def test_an_answer_is_whole_once_it_has_said_that_it_ends(
    session: aiohttp.ClientSession, answer: str, num_chunks: int, num_output_tokens: int | None, finish_reason: str
) -> None:
    async with AnotherMake().listening() as url:
        (outcome,) = (await send(session, url, answer)).outcomes
    assert (outcome.end, outcome.finish_reason) == (End.COMPLETED, finish_reason)
    assert (len(outcome.token_times_s), outcome.num_output_tokens) == (num_chunks, num_output_tokens)


@pytest.mark.parametrize(
    ("answer", "error", "detail"),
    [
        ("missing", "http_404", "The model `missing` does not exist."),
        ("broken", "http_500", "EngineCore encountered an issue."),
        ("broken_proxy", "http_502", "<h1>Bad Gateway</h1>"),
        ("broken_off", "http_503", "no room for"),
        ("moved", "http_307", "elsewhere"),
        ("unstreamed", "not_a_stream", "application/json: "),
        ("garbled", "bad_event", "not JSON: '{not json'"),
        ("failing", "stream_error", "EngineCore died"),
        ("ending_early", "cut", "the stream ended with neither [DONE] nor a finish_reason"),
        ("empty", "empty", "the stream ended without a token"),
        ("cut", "cut", ""),
        ("hung_up", "disconnected", "ServerDisconnectedError"),
    ],
)
async def test_what_goes_wrong_has_a_kind_and_the_servers_own_words(
    session: aiohttp.ClientSession, answer: str, error: str, detail: str
) -> None:
    async with AnotherMake().listening() as url:
        (outcome,) = (await send(session, url, answer)).outcomes
    assert (outcome.end, outcome.error) == (End.FAILED, error)
    assert outcome.detail is not None
    assert outcome.detail.startswith(detail)
    assert len(outcome.detail) <= MAX_DETAIL_CHARS


async def test_one_that_fails_takes_nothing_from_the_others(session: aiohttp.ClientSession) -> None:
    names = ("whole", "cut", "whole", "missing", "hung_up", "whole")
    async with AnotherMake().listening() as url:
        run = await send(session, url, *names)
    assert [outcome.request.adapter for outcome in run.outcomes] == list(names)
    assert [outcome.end is End.COMPLETED for outcome in run.outcomes] == [name == "whole" for name in names]


async def test_nobody_there_is_an_error_of_each_request(session: aiohttp.ClientSession) -> None:
    with nobody_listening() as url:
        run = await send(session, url, "whole", "whole")
    assert [(outcome.end, outcome.error) for outcome in run.outcomes] == 2 * [(End.FAILED, "connect")]


async def test_no_answer_is_waited_for_before_the_next_request(session: aiohttp.ClientSession) -> None:
    """The server answers nobody before all have asked: with a limit on connections this would never end."""
    make = AnotherMake(num_together=150)
    async with make.listening() as url:
        run = await send(session, url, *150 * ["together"])
    assert [outcome.end for outcome in run.outcomes] == 150 * [End.COMPLETED]


async def test_nothing_is_sent_before_its_time(session: aiohttp.ClientSession) -> None:
    async with AnotherMake().listening() as url:
        run = await send(session, url, "whole", "whole", "whole", at_s=(0.0, 0.02, 0.05))
    assert all(outcome.lag_s > -0.001 for outcome in run.outcomes)  # the loop's clock has a resolution


# A connection that is given up before it stands is left to the collector, which must find it in this test.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
async def test_what_is_unanswered_at_the_end_of_the_drain_is_cancelled(session: aiohttp.ClientSession) -> None:
    async with AnotherMake().listening() as url:
        run = await send(session, url, "held", "held", drain_s=0)
    gc.collect()
    assert [(outcome.end, outcome.error) for outcome in run.outcomes] == 2 * [(End.CANCELLED, None)]
    assert all(0 <= outcome.sent_s <= outcome.ended_s for outcome in run.outcomes)
    assert not run.is_interrupted


async def test_a_cancelled_answer_keeps_the_tokens_that_came(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted by the first chunk that is read."""
    interrupted = asyncio.Event()
    read_chunk = events.read_chunk

    def read_and_interrupt(data: str) -> events.Chunk:
        interrupted.set()
        return read_chunk(data)

    monkeypatch.setattr(events, "read_chunk", read_and_interrupt)
    async with AnotherMake().listening() as url:
        run = await send(session, url, "held", interrupted=interrupted)
    (outcome,) = run.outcomes
    assert outcome.end is End.CANCELLED
    assert len(outcome.token_times_s) == 1
    assert outcome.ttft_s is not None


async def test_a_cancellation_takes_nothing_from_an_answer_that_has_ended(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while the server, after [DONE], leaves the connection open."""
    interrupted = asyncio.Event()
    end_of_body = client._end_of_body

    async def interrupt_and_wait(answer: aiohttp.ClientResponse) -> None:
        interrupted.set()
        await end_of_body(answer)

    monkeypatch.setattr(client, "_END_OF_BODY_S", 120)
    monkeypatch.setattr(client, "_end_of_body", interrupt_and_wait)
    async with AnotherMake().listening() as url:
        run = await send(session, url, "held_after_done", interrupted=interrupted)
    (outcome,) = run.outcomes
    assert run.is_interrupted
    assert (outcome.end, len(outcome.token_times_s), outcome.num_output_tokens) == (End.COMPLETED, 3, 3)


async def test_after_an_interrupt_nothing_more_is_sent(session: aiohttp.ClientSession) -> None:
    make, interrupted = AnotherMake(), asyncio.Event()
    make.on_request = interrupted.set
    async with make.listening() as url:
        run = await send(session, url, "held", "whole", at_s=(0.0, FAR_S), interrupted=interrupted)
    assert run.is_interrupted
    assert [outcome.end for outcome in run.outcomes] == [End.CANCELLED]
    assert [asked["model"] for asked in make.asked] == ["held"]


async def test_an_empty_plan_is_a_run() -> None:
    async with client.open_session(None) as session:
        run = await send(session, "http://127.0.0.1:9")
    assert run.outcomes == ()


@pytest.mark.parametrize(("key", "sent"), [("sesame", "Bearer sesame"), (None, None)])
async def test_the_key_goes_with_every_request(key: str | None, sent: str | None) -> None:
    make = AnotherMake()
    async with make.listening() as url, client.open_session(key) as session:
        await client.list_models(session, url)
        await send(session, url, "whole")
    assert make.keys == [sent, sent]


async def test_adapters_are_the_models_that_have_a_parent(session: aiohttp.ClientSession) -> None:
    async with AnotherMake(("a", "b")).listening() as url:
        assert await client.list_models(session, url) == Models(BASE, ("a", "b"))


@pytest.mark.parametrize(
    ("status", "text", "told"),
    [
        (404, '{"error": {"message": "nothing here"}}', "404 nothing here"),
        (302, "", "302"),
        (200, "<html>", "Is the server up, and --url right?"),
        (200, "[]", "name them with --adapter-names and --base"),
        (200, '{"data": {"id": 1}}', "name them with --adapter-names and --base"),
        (200, '{"data": [{"name": "a"}]}', "name them with --adapter-names and --base"),
    ],
)
async def test_a_server_that_lists_no_models_is_refused_with_what_to_do(
    session: aiohttp.ClientSession, status: int, text: str, told: str
) -> None:
    async with AnotherMake(models=(status, text)).listening() as url:
        with pytest.raises(ServerRefused, match="GET .*/v1/models") as caught:
            await client.list_models(session, url)
    assert told in str(caught.value)


async def test_models_of_nobody_are_refused_with_what_to_do(session: aiohttp.ClientSession) -> None:
    with nobody_listening() as url, pytest.raises(ServerRefused, match="Is the server up, and --url right?"):
        await client.list_models(session, url)


async def test_the_scale_of_the_servers_tokenizer_is_measured(session: aiohttp.ClientSession) -> None:
    make = AnotherMake()
    async with make.listening() as url:
        scale = await client.calibrate(session, Dialect(url, BASE), None)
    assert scale == TokenScale(tokens_per_word=2.0, overhead=1.0)
    assert [(asked["model"], asked["max_tokens"]) for asked in make.asked] == 2 * [(BASE, 1)]


async def test_a_server_that_does_not_count_has_no_scale(session: aiohttp.ClientSession) -> None:
    async with AnotherMake().listening() as url:
        assert await client.calibrate(session, Dialect(url, "uncounted"), None) is None


@pytest.mark.parametrize(
    ("model", "told"), [("missing", "(http_404): The model `missing` does not"), ("unstreamed", "(not_a_stream)")]
)
async def test_a_server_that_cannot_answer_once_is_not_measured(
    session: aiohttp.ClientSession, model: str, told: str
) -> None:
    async with AnotherMake().listening() as url:
        with pytest.raises(ServerRefused) as caught:
            await client.calibrate(session, Dialect(url, model), None)
    assert told in str(caught.value)
