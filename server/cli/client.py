"""A client of one server: its address and key, its models, its streamed answers, and its refusals as sentences.

Owns how the commands that talk to a server reach it and read it. Knows nothing about terminals and files.
"""

import argparse
import json
import re
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from server.cli.command import settings_of
from server.ground.errors import GraftError, StartupRefused

_CONNECT_S = 10.0
_SILENCE_S = 600.0  # between two parts of an answer
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_MAX_SHOWN = 300  # characters of an answer that is not the server's own
_MAX_MESSAGE = 2000  # characters of an error that is
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line feeds
_SHOWN_CONTROL = "\ufffd"


class NoAnswer(GraftError):
    """No whole answer came: the connection broke, or what came is not what such a server sends."""

    code = "no_answer"


class Unreachable(NoAnswer):
    """Nobody listens there."""

    code = "unreachable"


class Silent(NoAnswer):
    """The server kept the connection and sent nothing for too long."""

    code = "timed_out"


class Refused(GraftError):
    """The server answered with an error; `status` is its own."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is (no slash at the end, and no /v1), and the key that it asks for."""

    url: str
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event of a stream adds to the first choice."""

    text: str = ""
    finish_reason: str | None = None
    reasoning: str = ""


def without_control(text: str) -> str:
    """A server's text as a terminal may have it: it would obey the control characters."""
    return _CONTROL.sub(_SHOWN_CONTROL, text)


def add_url(parser: argparse.ArgumentParser) -> None:
    text = "the server (default: where graft serve listens with the settings of here; the key: GRAFT_API_KEY)"
    parser.add_argument("--url", metavar="URL", default=None, help=text)


def address_of(arguments: argparse.Namespace) -> Address:
    """What --url says, or where a server listens that was started here. Raises StartupRefused for no such URL."""
    is_given = arguments.url is not None
    settings = settings_of(("api_key",) if is_given else ("api_key", "host", "port"), arguments)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    return Address(_checked(arguments.url) if is_given else settings.url, key)


def _checked(url: str) -> str:
    """OpenAI's clients are told the address with /v1, and people copy it from there."""
    try:
        parts = urlsplit(url)
        is_web = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        is_web = False
    if not is_web:
        raise StartupRefused(f"--url is {url!r}: it must be an address such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def connect(
    address: Address,
    *,
    max_connections: int = 16,
    max_silence_s: float = _SILENCE_S,
    transport: httpx.AsyncBaseTransport | None = None,
) -> httpx.AsyncClient:
    """A client to be closed by its user; nothing is sent yet. `transport`: instead of the network."""
    headers = {} if address.api_key is None else {"authorization": f"Bearer {address.api_key}"}
    return httpx.AsyncClient(
        base_url=address.url,
        headers=headers,
        transport=transport,
        timeout=httpx.Timeout(max_silence_s, connect=_CONNECT_S, pool=None),
        limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        # No proxy stands between a machine and itself, whatever HTTP_PROXY says.
        trust_env=urlsplit(address.url).hostname not in _LOOPBACK,
    )


def as_json(body: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for httpx. Its own `json` cannot send what JSON has to escape: the server is to judge that."""
    return {"content": json.dumps(body).encode(), "headers": {"content-type": "application/json"}}


async def models(http: httpx.AsyncClient) -> list[dict[str, Any]]:
    """The cards of GET /v1/models: the base under each of its names, then its adapters. Raises NoAnswer or Refused."""
    with answering(http):
        answer = await http.get("/v1/models")
    _require_ok(http, answer.status_code, answer.content)
    found = _parsed(answer.content)
    cards = found.get("data") if isinstance(found, dict) else None
    if not isinstance(cards, list) or not cards or not all(map(_is_card, cards)):
        raise NoAnswer(f"What answers at {http.base_url} is no server of models; name one with --url.")
    return cards


def _is_card(card: object) -> bool:
    return isinstance(card, dict) and isinstance(card.get("id"), str)


async def stream(http: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> AsyncIterator[Piece]:
    """The first choice of a streamed completion or chat completion, as it comes.

    Ends with the answer's end; an answer that breaks off raises NoAnswer, one that fails or is refused Refused.
    Whoever leaves before the end closes the connection, and the server stops generating.
    """
    with answering(http):
        async with http.stream("POST", path, **as_json({**body, "stream": True})) as answer:
            if answer.status_code != 200:
                _require_ok(http, answer.status_code, await answer.aread())
            async for payload in _payloads(answer.aiter_bytes()):
                if payload == b"[DONE]":
                    return
                yield _piece(http, payload)
    raise NoAnswer(f"The server at {http.base_url} broke its answer off in the middle.")


async def _payloads(parts: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events. Lines end at line feeds alone: httpx would also split at U+2028 in a text."""
    held = b""
    async for part in parts:
        *lines, held = (held + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def _piece(http: httpx.AsyncClient, payload: bytes) -> Piece:
    event = _parsed(payload)
    if not isinstance(event, dict):
        raise NoAnswer(f"The server at {http.base_url} sent an event that is no JSON object.")
    if "error" in event:
        raise Refused(_message(event) or "the answer failed", 500)
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return Piece()
    part = choice.get("delta", choice)
    said = part if isinstance(part, dict) else {}
    return Piece(
        _text(said, "content") or _text(said, "text"),
        _text(choice, "finish_reason") or None,
        _text(said, "reasoning_content") or _text(said, "reasoning"),
    )


def _text(part: Mapping[str, Any], name: str) -> str:
    value = part.get(name)
    return value if isinstance(value, str) else ""


@contextmanager
def answering(http: httpx.AsyncClient) -> Iterator[None]:
    """Turns what can go wrong on the way into NoAnswer, with a word for what to do."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Unreachable(
            f"No server answers at {http.base_url} ({str(error) or type(error).__name__}); "
            "start one with graft serve, or name another with --url."
        ) from None
    except httpx.TimeoutException:
        raise Silent(f"The server at {http.base_url} has sent nothing for {http.timeout.read:.0f} s.") from None
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise NoAnswer(f"The server at {http.base_url} broke the connection off ({reason}).") from None


def _require_ok(http: httpx.AsyncClient, status: int, content: bytes) -> None:
    if status == 200:
        return
    if status == 401:
        raise Refused(f"The server at {http.base_url} asks for its API key: set GRAFT_API_KEY to it.", status)
    said = _message(_parsed(content)) or without_control(content[:_MAX_SHOWN].decode(errors="replace")).strip()
    raise Refused(f"{said or 'no reason given'} (status {status})", status)


def _message(answer: object) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    said = str(error.get("message", "")) if isinstance(error, dict) else ""
    return without_control(said if len(said) <= _MAX_MESSAGE else f"{said[:_MAX_MESSAGE]}...")


def _parsed(content: bytes) -> Any:
    """None for what is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
