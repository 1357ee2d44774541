"""What the client commands talk to: the HTTP floor's own test server, and one that answers as a test tells it to."""

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.api.conftest import gate, live, settings

__all__ = ["gate", "live", "settings"]


@dataclass
class Reply:
    """One answer; `parts` are sent as they come, and `hangs_up` breaks the connection off after them."""

    status: int = 200
    parts: Iterable[bytes] = (b"{}",)
    headers: dict[str, str] = field(default_factory=dict)
    hangs_up: bool = False


def completed(text: str = "fine") -> Reply:
    return Reply(parts=(json.dumps({"choices": [{"index": 0, "text": text}]}).encode(),))


def streamed(*texts: str, ending: bytes = b"data: [DONE]\n\n", hangs_up: bool = False) -> Reply:
    """A chat completion as server-sent events, one for each text."""
    events = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    parts = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode() for event in events]
    return Reply(parts=(*parts, ending), hangs_up=hangs_up)


class Scripted:
    """A listening server. `answer(body)` makes its replies; it may wait, and `asked` has the bodies in order."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], Reply] = lambda body: completed()
        self.asked: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.key: str | None = None  # that it asks for
        self.cards: bytes = json.dumps({"object": "list", "data": [{"id": "tiny", "parent": None}]}).encode()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(Reply(parts=(server.cards,)))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.asked.put(body)
                self._send(server.answer(body))

            def _send(self, reply: Reply) -> None:
                if server.key is not None and self.headers["authorization"] != f"Bearer {server.key}":
                    reply = Reply(401)
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                if reply.hangs_up:  # before a byte that it has announced; without a length the end is the end
                    self.send_header("content-length", str(sum(map(len, reply.parts)) + 1))
                with contextlib.suppress(ConnectionError):  # a client may leave before the end
                    self.end_headers()
                    for part in reply.parts:
                        self.wfile.write(part)
                        self.wfile.flush()
                self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None: ...

        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._listener.daemon_threads = True
        self._thread = threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_port}"

    def close(self) -> None:
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.close()
