"""The sender: asks a server for its adapters, sends every request of a plan at its time, and notes how each one went.

Owns HTTP and the clock. Open loop: what has been answered so far has no influence on what is sent when, and the number
of connections has no limit. Knows nothing about percentiles; the servers' dialects are `events`' business.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from load_tests import events
from load_tests.outcome import End, Outcome
from load_tests.plan import WORDS, Request, TokenScale

MAX_DETAIL_CHARS = 300
_MAX_MESSAGE_BYTES = 64 * 1024
# Below the five seconds after which uvicorn closes an idle connection: a request must not be sent into the closing.
_KEEPALIVE_S = 2.0
_END_OF_BODY_S = 1.0
_CALIBRATION_WORDS = (4, 24)  # few, so that they fit any context
_LIST_TIMEOUT_S = 30.0
_CALIBRATION_TIMEOUT_S = 300.0  # a server may compile for its first request


class ServerRefused(Exception):
    """The server cannot be measured: it does not answer, or not as an OpenAI server does. Says what to do."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server is asked."""

    url: str  # without a path
    base: str | None  # the base's name in the field `model`
    adapter_field: str = "model"  # or "adapter"
    model_template: str = "{adapter}"  # SGLang: "{base}:{adapter}"
    is_chat: bool = False
    wants_usage: bool = True
    ignore_eos: bool = False

    @property
    def endpoint(self) -> str:
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    def body(self, adapter: str | None, prompt: str, max_tokens: int) -> bytes:
        """The request as JSON: greedy and streamed."""
        asked: dict[str, Any] = {"stream": True, "max_tokens": max_tokens, "temperature": 0}
        if self.is_chat:
            asked["messages"] = [{"role": "user", "content": prompt}]
        else:
            asked["prompt"] = prompt
        if self.wants_usage:
            asked["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            asked["ignore_eos"] = True
        return json.dumps(asked | self._names(adapter)).encode()

    def _names(self, adapter: str | None) -> dict[str, str]:
        base = {} if self.base is None else {"model": self.base}
        if adapter is None:
            return base
        if self.adapter_field == "adapter":
            return base | {"adapter": adapter}
        return {"model": self.model_template.replace("{base}", self.base or "").replace("{adapter}", adapter)}


@dataclass(frozen=True, slots=True)
class Models:
    """What GET /v1/models lists: adapters are the models that have a parent."""

    base: str | None
    adapters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """All that came of a plan. What was still unsent when the run was interrupted is in no outcome."""

    outcomes: tuple[Outcome, ...]
    elapsed_s: float
    is_interrupted: bool


def open_session(api_key: str | None) -> aiohttp.ClientSession:
    """A session without any limit on connections or time; the caller closes it."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
    return aiohttp.ClientSession(connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=None))


async def list_models(session: aiohttp.ClientSession, url: str) -> Models:
    """Raises ServerRefused if there is no such list."""
    try:
        async with asyncio.timeout(_LIST_TIMEOUT_S), session.get(f"{url}/v1/models", allow_redirects=False) as answer:
            if answer.status != 200:
                raise ServerRefused(f"GET {url}/v1/models: {answer.status} {await _message(answer)}")
            listed = await answer.json(content_type=None)
    except (aiohttp.ClientError, ValueError, TimeoutError) as error:
        raise ServerRefused(f"GET {url}/v1/models: {_named(error)}. Is the server up, and --url right?") from error
    cards = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
        raise ServerRefused(f"GET {url}/v1/models is no list of models: name them with --adapter-names and --base")
    bases = [str(card["id"]) for card in cards if not card.get("parent")]
    adapters = tuple(str(card["id"]) for card in cards if card.get("parent"))
    return Models(bases[0] if bases else None, adapters)


async def calibrate(session: aiohttp.ClientSession, dialect: Dialect, adapter: str | None) -> TokenScale | None:
    """How many tokens our words are, from two requests that are not measured; None if the server does not count.

    Raises ServerRefused if it does not answer them as a stream of completion chunks.
    """
    pairs = []
    for num_words in _CALIBRATION_WORDS:
        request = Request(-1, 0.0, adapter, 0, num_words)
        body = dialect.body(adapter, " ".join(WORDS[:num_words]), 1)
        try:
            async with asyncio.timeout(_CALIBRATION_TIMEOUT_S):
                outcome = await _Exchange(request, time.perf_counter()).ask(session, dialect, body)
        except TimeoutError as error:
            raise ServerRefused(f"no answer to a first request within {_CALIBRATION_TIMEOUT_S:.0f} s") from error
        if outcome.end is not End.COMPLETED:
            raise ServerRefused(f"a first request failed ({outcome.error}): {outcome.detail}")
        if outcome.num_prompt_tokens is None:
            return None
        pairs.append((num_words, outcome.num_prompt_tokens))
    return TokenScale.through(*pairs)


async def send(
    session: aiohttp.ClientSession,
    dialect: Dialect,
    plan: Sequence[tuple[Request, bytes]],
    drain_s: float,
    interrupted: asyncio.Event,
) -> Run:
    """Sends each request of `plan`, in the order of arrival, at its time. Returns when all have ended.

    `drain_s` after the last was sent, or as soon as `interrupted` is set, what is still unanswered is cancelled.
    """
    started = time.perf_counter()
    exchanges: list[_Exchange] = []
    tasks: list[asyncio.Task[Outcome]] = []
    for request, body in plan:
        if await _is_set_by(interrupted, started + request.scheduled_s):
            break
        exchanges.append(_Exchange(request, started))
        tasks.append(asyncio.create_task(exchanges[-1].ask(session, dialect, body)))
    await _wait(tasks, interrupted, drain_s)
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    outcomes = [_outcome(exchange, end) for exchange, end in zip(exchanges, ended, strict=True)]
    return Run(tuple(outcomes), time.perf_counter() - started, interrupted.is_set())


async def _is_set_by(event: asyncio.Event, deadline: float) -> bool:
    """Wait until `deadline` on the performance counter, or until the event."""
    left_s = deadline - time.perf_counter()
    if left_s > 0:
        with suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), left_s)
    return event.is_set()


async def _wait(tasks: Sequence[asyncio.Task[Outcome]], interrupted: asyncio.Event, drain_s: float) -> None:
    """Until all have ended, the interrupt, or the end of the drain; cancels none of them."""
    if not tasks:
        return
    stop = asyncio.create_task(interrupted.wait())
    everything = asyncio.create_task(asyncio.wait(tasks))
    await asyncio.wait({stop, everything}, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    everything.cancel()


def _outcome(exchange: "_Exchange", end: Outcome | BaseException) -> Outcome:
    if isinstance(end, asyncio.CancelledError):
        return exchange.given_up()
    if isinstance(end, BaseException):
        raise end
    return end


@dataclass(slots=True)
class _Exchange:
    """One request under way: what has been read of its answer, with the times."""

    request: Request
    started: float  # the run's zero on the performance counter
    sent_s: float | None = None
    token_times_s: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    done_s: float | None = None  # when [DONE] came

    async def ask(self, session: aiohttp.ClientSession, dialect: Dialect, body: bytes) -> Outcome:
        """Never raises for what a server does; a cancellation goes through."""
        self.sent_s = self._now_s()
        is_answered = False
        try:
            post = session.post(dialect.url + dialect.endpoint, data=body, allow_redirects=False)
            async with post as answer:
                is_answered = True
                return await self._read(answer)
        except events.BadEvent as error:
            return self._failed("bad_event", str(error))
        except aiohttp.ClientConnectorError as error:
            return self._failed("connect", _named(error))
        except (aiohttp.ClientError, OSError) as error:
            return self._failed("cut" if is_answered else "disconnected", _named(error))

    async def _read(self, answer: aiohttp.ClientResponse) -> Outcome:
        if answer.status != 200:
            return self._failed(f"http_{answer.status}", await _message(answer))
        if answer.content_type != "text/event-stream":
            return self._failed("not_a_stream", f"{answer.content_type}: {await _message(answer)}")
        parser = events.EventParser()
        async for part in answer.content.iter_any():
            now_s = self._now_s()
            for data in parser.feed(part):
                error = self._take(data, now_s)
                if error is not None:
                    return self._failed("stream_error", error)
            if self.done_s is not None:
                await _end_of_body(answer)
                break
        return self._ended()

    def _take(self, data: str, now_s: float) -> str | None:
        """Note what one event says; the server's message if it is a failure."""
        if data == events.DONE:
            self.done_s = now_s
            return None
        chunk = events.read_chunk(data)
        # The end of a generation without any text (an end-of-sequence at once) is its first and only token.
        if chunk.has_text or (chunk.finish_reason is not None and not self.token_times_s):
            self.token_times_s.append(now_s)
        self.finish_reason = chunk.finish_reason or self.finish_reason
        if chunk.num_prompt_tokens is not None:
            self.num_prompt_tokens = chunk.num_prompt_tokens
        if chunk.num_output_tokens is not None:
            self.num_output_tokens = chunk.num_output_tokens
        return chunk.error

    def given_up(self) -> Outcome:
        """After a cancellation; one that hit only the wait for the end of the body takes nothing away."""
        return self._outcome(End.CANCELLED) if self.done_s is None else self._ended()

    def _ended(self) -> Outcome:
        """A stream without [DONE] is whole if it said why it ended; text-generation-inference ends so."""
        if self.done_s is None and self.finish_reason is None:
            return self._failed("cut", "the stream ended with neither [DONE] nor a finish_reason")
        if not self.token_times_s:
            return self._failed("empty", "the stream ended without a token")
        return self._outcome(End.COMPLETED)

    def _failed(self, kind: str, detail: str) -> Outcome:
        return self._outcome(End.FAILED, kind, detail[:MAX_DETAIL_CHARS])

    def _outcome(self, end: End, error: str | None = None, detail: str | None = None) -> Outcome:
        now_s = self._now_s()
        return Outcome(
            request=self.request,
            end=end,
            # A task that is cancelled before it ever ran has sent nothing; it was as late as it is now.
            sent_s=now_s if self.sent_s is None else self.sent_s,
            ended_s=now_s if self.done_s is None else self.done_s,
            token_times_s=tuple(self.token_times_s),
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            finish_reason=self.finish_reason,
            error=error,
            detail=detail,
        )

    def _now_s(self) -> float:
        return time.perf_counter() - self.started


async def _end_of_body(answer: aiohttp.ClientResponse) -> None:
    """Read what is left after [DONE]: leaving before it would look to the server like a client that hangs up."""
    with suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(_END_OF_BODY_S):
            await answer.read()


async def _message(answer: aiohttp.ClientResponse) -> str:
    """The error's own sentence, or the beginning of whatever there is."""
    begun = b""
    # The status is the news: a body that breaks off does not change it.
    with suppress(aiohttp.ClientError):
        async for part in answer.content.iter_any():
            begun += part
            if len(begun) > _MAX_MESSAGE_BYTES:
                break
    text = begun.decode(errors="replace")
    try:
        return events.error_message(json.loads(text))[:MAX_DETAIL_CHARS]
    except ValueError:
        return text[:MAX_DETAIL_CHARS]


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
