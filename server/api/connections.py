"""Connections that are watched: what a client may keep waiting, and how many may be open.

Owns the patience with clients that are slow, silent or gone. uvicorn itself waits for ever for a request's head, for
its body, and for a client that does not read. Knows nothing about requests.

A head has a time limit from its first byte (or from the opening of the connection), which drops of it do not extend. A
body, and an answer, must move: within each window a client sends, or takes, more than a trickle. When all connections
are taken, a new one takes the place of the one that has been idle longest.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_TALKATIVE = ("asyncio", "python_multipart.multipart", "uvicorn.error")  # which warn of each odd client
_MINUTE_S = 60.0
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain; charset=utf-8\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: 29\r\n\r\nAll connections are in use.\r\n"
)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a client may take."""

    head_s: float = 20.0  # for the head of a request, as a whole
    body_s: float = 30.0  # for `body_bytes` of a body, or its end, while the server reads
    body_bytes: int = 15_000
    answer_s: float = 60.0  # for taking what fills the buffers of its connection
    max_connections: int = 4096


class WatchedConnection(H11Protocol):
    """uvicorn's connection, which ends itself when its client takes too long."""

    patience = Patience()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._opened_s = self.loop.time()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._num_body_bytes = 0  # since the window began

    # What uvicorn's event loop tells

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.patience.max_connections and not self._displace():
            transport.write(_FULL)
            transport.close()
        self._follow_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_body_bytes += len(data)
        super().data_received(data)
        self._follow_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._opened_s = self.loop.time()
        self._follow_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("answer", self.patience.answer_s, self._end)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("answer")

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():  # closing would wait for a client that does not read
            self.transport.abort()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being answered on it."""
        return self.cycle is None or self.cycle.response_complete

    # The watch

    def _follow_request(self) -> None:
        """After each event: which clocks run."""
        if self.transport.is_closing():  # which waits until the client has taken the rest
            self._start("answer", self.patience.answer_s, self._end)
            return
        state = self.conn.their_state
        if state is h11.IDLE and self.timeout_keep_alive_task is None:  # else uvicorn's clock for idle ones runs
            self._start("head", self.patience.head_s, self._end)
        else:
            self._stop("head")
        if state is h11.SEND_BODY:
            self._start("body", self.patience.body_s, self._check_body)
        else:
            self._stop("body")

    def _check_body(self) -> None:
        """At the end of a window. While the server itself does not read, nobody is slow.

        What still comes after the answer is of no use, and gets one window.
        """
        is_slow = self._num_body_bytes < self.patience.body_bytes and not self.flow.read_paused
        if is_slow or self.is_idle:
            self._end()
        else:
            self._start("body", self.patience.body_s, self._check_body)

    def _start(self, name: str, delay_s: float, end: Callable[[], None]) -> None:
        """Does nothing while that clock runs: what a client sends meanwhile buys it no time."""
        if name in self._timers:
            return

        def ring() -> None:
            del self._timers[name]
            end()

        if name == "body":
            self._num_body_bytes = 0
        self._timers[name] = self.loop.call_later(delay_s, ring)

    def _stop(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _end(self) -> None:
        self.transport.abort()

    def _displace(self) -> bool:
        """Ends the connection that has been idle longest, for this one to take its place; whether there was one."""
        idle = [other for other in self.connections if isinstance(other, WatchedConnection) and other.is_idle]
        others = [other for other in idle if other is not self and not other.transport.is_closing()]
        if not others:
            return False
        min(others, key=lambda other: other._opened_s).transport.abort()
        return True


class Seldom(logging.Filter):
    """Lets one warning of a kind through in a minute: strangers must not be able to fill the log."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._last_s: dict[tuple[str, int], float] = {}  # by the line of code

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        now_s, line = self._clock(), (record.pathname, record.lineno)
        if now_s - self._last_s.get(line, -_MINUTE_S) < _MINUTE_S:
            return False
        self._last_s[line] = now_s
        return True


def watched(patience: Patience) -> type[WatchedConnection]:
    """Connections with this much patience, for uvicorn's `http`."""
    for name in _TALKATIVE:
        log = logging.getLogger(name)
        if not any(isinstance(present, Seldom) for present in log.filters):
            log.addFilter(Seldom())
    return type("WatchedConnection", (WatchedConnection,), {"patience": patience})
