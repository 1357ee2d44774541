"""Clients that are slow, silent, gone or many: what they hold ends, and the others are served meanwhile."""

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from server.api.connections import Patience, Seldom, WatchedConnection, watched
from server.ground.config import Settings
from tests.api.conftest import Live, eventually, serving

# Longer than a good client needs between two packets, mostly; where it is not, these tests ask again.
IMPATIENT = Patience(head_s=1.0, body_s=1.0, body_bytes=1000, answer_s=1.0, max_connections=40)
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def impatient(settings: Callable[..., Settings]) -> Iterator[Live]:
    with serving(settings(), IMPATIENT) as live:
        yield live


def is_served(live: Live) -> bool:
    with suppress(httpx.TransportError):
        return live.http.get("/health").status_code == 200
    return False


def is_ended(connection: socket.socket) -> bool:
    """Whether the server ends it, after all that it has to say."""
    with suppress(ConnectionError):
        read_all(connection)  # beyond its time limit the test fails
    return True


def received_from(connection: socket.socket) -> bytes:
    """What comes next; nothing where the connection has ended, in order or not."""
    connection.settimeout(60)
    with suppress(ConnectionError):
        return connection.recv(1 << 20)
    return b""


def read_all(connection: socket.socket) -> None:
    connection.settimeout(60)
    while connection.recv(1 << 20):
        pass


def drip(connection: socket.socket, drop: bytes) -> None:
    """Sends a drop at a time, until the server has had enough."""
    connection.settimeout(0.02)
    with suppress(ConnectionError):
        for _ in range(3000):
            connection.send(drop)
            with suppress(TimeoutError):
                if not connection.recv(65536):
                    return
        raise AssertionError("the server listens to drops for ever")


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET /health HTTP/1.1\r\n", HEAD])
def test_a_head_that_does_not_come_ends_the_connection(impatient: Live, sent: bytes) -> None:
    with closing(impatient.connect()) as silent:
        silent.sendall(sent)
        assert is_ended(silent)


def test_a_head_that_drips_buys_no_time(impatient: Live) -> None:
    with closing(impatient.connect()) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nx-slow: ")
        drip(slow, b"a")
    eventually(lambda: is_served(impatient))


def test_a_second_head_on_a_connection_is_watched_as_the_first(impatient: Live) -> None:
    with closing(impatient.connect()) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert slow.recv(65536).startswith(b"HTTP/1.1 200")
        slow.sendall(b"GET /health")
        assert is_ended(slow)


@pytest.mark.parametrize("path", [b"/v1/completions", b"/v1/adapters"])
def test_a_body_that_stops_or_drips_ends_the_connection_and_leaves_nothing(impatient: Live, path: bytes) -> None:
    head = b"POST " + path + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n"
    head += b"content-type: multipart/form-data; boundary=b\r\n\r\n"
    with closing(impatient.connect()) as silent, closing(impatient.connect()) as slow:
        for connection in (silent, slow):
            connection.sendall(head)
        assert is_ended(silent)
        drip(slow, b"-")
    eventually(lambda: not list(impatient.store.glob(".incoming/*")))


def test_answers_that_nobody_reads_are_ended(impatient: Live) -> None:
    asked = 200  # of some 100 KB each: more than the system buffers of a connection
    with impatient.deaf() as deaf:
        deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * asked)
        own = deaf.getsockname()
        assert deaf.recv(4) == b"HTTP"  # it has begun
        eventually(lambda: own not in {connection.client for connection in tuple(impatient.connections)})
        received = b"HTTP" + b"".join(iter(lambda: received_from(deaf), b""))
        assert 0 < received.count(b"HTTP/1.1 200") < asked


@pytest.mark.slow
def test_a_stream_that_nobody_reads_is_ended(impatient: Live) -> None:
    # Some megabytes at little cost: more than the system buffers of a connection.
    asked = {"prompt": [*range(5, 245)], "echo": True, "logprobs": 20, "max_tokens": 1, "n": 32, "stream": True}
    body = json.dumps(asked).encode()

    def num_answered() -> float:
        return impatient.metric("graft_requests_total", route="/v1/completions")

    before = num_answered()
    with impatient.deaf() as deaf:
        deaf.sendall(HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        eventually(lambda: num_answered() > before)
        assert impatient.server.engine.stats().num_in_flight == 0
        received = b"".join(iter(lambda: received_from(deaf), b""))
        assert received.startswith(b"HTTP/1.1 200"), received[:500]
        assert b"[DONE]" not in received, len(received)  # nobody is to take it for a whole answer


def test_a_new_connection_takes_the_place_of_the_longest_idle(impatient: Live) -> None:
    with ExitStack() as opened:
        connections = [opened.enter_context(closing(impatient.connect())) for _ in range(3 * IMPATIENT.max_connections)]
        assert is_ended(connections[0])
        eventually(lambda: is_served(impatient))


def test_a_thousand_idle_connections_do_not_stop_service(live: Live) -> None:
    with ExitStack() as opened:
        idle = [opened.enter_context(closing(live.connect())) for _ in range(1000)]
        for connection in idle[::2]:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-slow: ")
        assert live.post("/v1/completions", prompt="Hi", max_tokens=2, adapter="first").status_code == 200
        assert live.http.get("/health").status_code == 200
        assert all(connection.fileno() >= 0 for connection in idle)


# The clocks themselves, with time that passes when the test says so


class Timer:
    def __init__(self, at_s: float, ring: Callable[[], None]) -> None:
        self.at_s = at_s
        self.ring = ring
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Time:
    """What a connection needs of an event loop."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, ring: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.now_s + delay_s, ring))
        return self.timers[-1]

    def create_task(self, coroutine: Coroutine[Any, Any, None], **_: Any) -> "asyncio.Future[None]":
        coroutine.close()
        return asyncio.Future()

    def pass_by(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while due := [timer for timer in self.timers if timer.at_s <= end_s and not timer.is_cancelled]:
            first = min(due, key=lambda timer: timer.at_s)
            self.timers.remove(first)
            self.now_s = first.at_s
            first.ring()
        self.now_s = end_s


class Wire(asyncio.Transport):
    """A connection's other side: what was written, and whether it was ended."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_over = False
        self.is_aborted = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.is_over = True

    def abort(self) -> None:
        self.is_over = self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_over

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0


@pytest.fixture
def time() -> Time:
    return Time()


async def opened(time: Time, state: ServerState | None = None) -> tuple[WatchedConnection, Wire]:
    patience = Patience(head_s=20, body_s=30, body_bytes=1000, answer_s=60, max_connections=3)

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    connection = watched(patience)(
        config=uvicorn.Config(app, log_level="error"), server_state=state or ServerState(), app_state={}, _loop=time
    )
    wire = Wire()
    connection.connection_made(wire)
    return connection, wire


async def test_a_head_has_one_limit_however_it_comes(time: Time) -> None:
    connection, wire = await opened(time)
    for drop in b"GET /health HTTP/1.1\r\n"[:19]:
        connection.data_received(bytes([drop]))
        time.pass_by(1)
        assert not wire.is_over
    time.pass_by(1)
    assert wire.is_over


async def test_a_body_that_moves_has_all_the_time_it_needs(time: Time) -> None:
    connection, wire = await opened(time)
    connection.data_received(HEAD + b"content-length: 1000000\r\n\r\n")
    for _ in range(20):
        connection.data_received(b" " * 1000)
        time.pass_by(30)
        assert not wire.is_over
    connection.data_received(b" " * 999)
    time.pass_by(30)
    assert wire.is_over


async def test_a_body_that_the_server_does_not_read_is_not_slow(time: Time) -> None:
    connection, wire = await opened(time)
    connection.data_received(HEAD + b"content-length: 1000000\r\n\r\n" + b" " * 100_000)
    time.pass_by(300)
    assert not wire.is_over
    connection.flow.resume_reading()
    time.pass_by(60)
    assert wire.is_over


async def test_a_client_that_takes_nothing_of_an_answer_is_let_go(time: Time) -> None:
    connection, wire = await opened(time)
    connection.data_received(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    for _ in range(5):
        connection.pause_writing()
        time.pass_by(59)
        connection.resume_writing()
    time.pass_by(600)
    assert not wire.is_over
    connection.pause_writing()
    time.pass_by(60)
    assert wire.is_over


async def test_a_body_that_comes_after_its_answer_is_not_read_for_ever(time: Time) -> None:
    connection, wire = await opened(time)
    connection.data_received(HEAD + b"content-length: 1000000\r\n\r\n")
    connection.cycle.response_complete = True
    for _ in range(29):
        connection.data_received(b" " * 1000)
        time.pass_by(1)
    assert not wire.is_over
    time.pass_by(1)
    assert wire.is_over


async def test_a_client_that_does_not_take_the_last_of_an_answer_is_let_go(time: Time) -> None:
    connection, wire = await opened(time)
    connection.data_received(b"no HTTP\r\n\r\n")
    assert wire.written.startswith(b"HTTP/1.1 400")
    assert wire.is_over
    time.pass_by(60)
    assert wire.is_aborted


async def test_busy_connections_are_not_displaced(time: Time) -> None:
    state = ServerState()
    busy = [await opened(time, state) for _ in range(3)]
    for connection, _ in busy:
        connection.data_received(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    late, refused = await opened(time, state)
    assert refused.written.startswith(b"HTTP/1.1 503")
    assert refused.is_over
    assert not any(wire.is_over for _, wire in busy)
    late.connection_lost(None)
    head, _, text = refused.written.partition(b"\r\n\r\n")
    assert f"content-length: {len(text)}".encode() in head


async def test_the_longest_idle_is_displaced(time: Time) -> None:
    state = ServerState()
    idle = []
    for _ in range(4):
        idle.append(await opened(time, state))
        time.pass_by(1)
    assert [wire.is_over for _, wire in idle] == [True, False, False, False]


def test_odd_requests_do_not_fill_the_log() -> None:
    clock = Time()
    seldom = Seldom(clock.time)

    def passes(line: int, text: str = "", level: int = logging.WARNING) -> bool:
        return seldom.filter(logging.LogRecord("x", level, "parser.py", line, text, (), None))

    assert [passes(1, f"odd: {number}") for number in range(3)] == [True, False, False]
    assert passes(2)
    assert all(passes(3, level=logging.ERROR) for _ in range(3))
    clock.now_s += 60
    assert passes(1)
