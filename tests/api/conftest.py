"""Real servers for the tests of the HTTP floor: uvicorn in a thread, over a tiny random Llama, on a free port."""

import json
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from server.api.connections import Patience, watched
from server.assemble import Server, assemble
from server.ground.config import Settings
from tests.api.adapter_files import AdapterFiles, lora_files

KEY = "sesame-open"
MAX_UPLOAD_BYTES = 256 * 1024


@dataclass(frozen=True)
class Live:
    """A server that listens, and clients that talk to it."""

    server: Server
    url: str
    store: Path
    http: httpx.Client
    openai: OpenAI
    connections: Collection[Any]  # that are open, as the server sees it

    @property
    def address(self) -> tuple[str, int]:
        return self.http.base_url.host, self.http.base_url.port or 0

    def post(self, path: str, **body: Any) -> httpx.Response:
        # Not httpx's `json`: it cannot send what JSON has to escape, halves of surrogate pairs.
        return self.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})

    def connect(self) -> socket.socket:
        """A bare connection; one that hears nothing for long fails its test and not the whole run."""
        return socket.create_connection(self.address, timeout=120)

    @contextmanager
    def deaf(self) -> Iterator[socket.socket]:
        """A connection that takes little before it is read."""
        with closing(socket.socket()) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(self.address)
            yield deaf

    def send(self, path: str, on: socket.socket | None = None, **body: Any) -> socket.socket:
        """A connection on which a whole request has been sent and nothing read; closing it is leaving."""
        content = json.dumps(body).encode()
        key = self.http.headers["authorization"]
        fields = f"host: x\r\nauthorization: {key}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
        connection = on or self.connect()
        connection.sendall(f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode() + content)
        return connection

    def metric(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [s for family in families for s in family.samples if s.name == name]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    def upload(self, name: str, files: AdapterFiles, **query: str) -> httpx.Response:
        return self.http.post("/v1/adapters", data={"name": name}, files=files.parts(), params=query)


def eventually(is_true: Callable[[], bool], within_s: float = 120) -> None:
    """Wait for something that other threads do. The limit is for a server that hangs, not for one that is slow."""
    deadline = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def event_data(answer: httpx.Response) -> Iterator[str]:
    """The data of a stream's events, [DONE] among them; comments keep a slow stream alive and say nothing."""
    return (line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: "))


class Gate:
    """Stands before the engine's steps and lets through as many as the test allows."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._permits = threading.Semaphore(0)

    def __call__(self, *step: Any) -> Any:
        self._permits.acquire()
        return self._run(*step)

    def allow(self, num_steps: int) -> None:
        self._permits.release(num_steps)


UNHURRIED = Patience(head_s=600, body_s=600, answer_s=600)  # a test's own client may be slow


def _configuration(server: Server, patience: Patience) -> uvicorn.Config:
    """uvicorn's, with two limits moved out of the tests' way.

    Its keep-alive of 5 s is also httpx's: a request sent at that age would meet the connection as it closes. And a
    connection that a failed test has left open must not hold up the end of the run.
    """
    return uvicorn.Config(
        server.app,
        port=0,
        log_level="warning",
        ws="none",
        http=watched(patience),
        timeout_keep_alive=3600,
        timeout_graceful_shutdown=30,
    )


@contextmanager
def serving(
    settings: Settings, patience: Patience = UNHURRIED, assembled: Callable[[Settings], Any] = assemble
) -> Iterator[Live]:
    """`assembled` makes the server: in one process, where nobody says otherwise."""
    server = assembled(settings)
    listener = uvicorn.Server(_configuration(server, patience))
    thread = threading.Thread(target=listener.run)
    thread.start()
    try:
        eventually(lambda: listener.started)
        url = f"http://127.0.0.1:{listener.servers[0].sockets[0].getsockname()[1]}"
        key = settings.api_key.get_secret_value() if settings.api_key else "none-needed"
        headers = {"authorization": f"Bearer {key}"}
        with (
            httpx.Client(base_url=url, headers=headers, timeout=120) as http,
            OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120) as openai,
        ):
            yield Live(server, url, settings.store, http, openai, listener.server_state.connections)
    finally:
        listener.should_exit = True
        thread.join()
        server.close()


@pytest.fixture(scope="session")
def settings(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Settings]:
    def make(**changes: Any) -> Settings:
        plain: dict[str, Any] = {
            "model": str(tiny_llama),
            "served_model_name": ("tiny", "org/tiny"),
            "quantize": "none",
            "dtype": "float32",
            "device": "cpu",
            "store": tmp_path_factory.mktemp("store"),
        }
        return Settings(**(plain | changes))

    return make


@pytest.fixture(scope="session")
def live(settings: Callable[..., Settings]) -> Iterator[Live]:
    """A server without a key that has the adapters `first` and `second`."""
    with serving(settings()) as live:
        assert live.upload("first", lora_files(1)).status_code == 201
        assert live.upload("second", lora_files(2)).status_code == 201
        yield live


@pytest.fixture(scope="session")
def strict(settings: Callable[..., Settings]) -> Iterator[Live]:
    """A server with a key, a short queue and small uploads. Its clients send the key."""
    with serving(settings(api_key=KEY, max_upload_bytes=MAX_UPLOAD_BYTES, max_queued=4)) as live:
        yield live


@pytest.fixture
def gate(live: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate before the steps of `live`; whatever waits at the end of the test passes."""
    yield from _gated(live, monkeypatch)


@pytest.fixture
def strict_gate(strict: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    yield from _gated(strict, monkeypatch)


def _gated(live: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(live.server.runner.run)
    monkeypatch.setattr(live.server.runner, "run", gate)
    yield gate
    gate.allow(1_000_000)
    eventually(lambda: live.server.engine.stats().num_in_flight == 0)
