"""Servers in processes of their own, which can be killed, and requests that were begun before.

Owns the life of such a process, its log and its store. Knows nothing about what is done to it.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.faults.load import MODEL, PATIENCE_S, Case, End, await_that

_ROOT = Path(__file__).parents[2]
_FLAGS = {
    "port": "0",
    "quantize": "none",
    "dtype": "float32",
    "device": "cpu",
    "kv-memory": "8MiB",
    "adapter-memory": "8MiB",
    "store-reserve": "0",
    "log-format": "json",
}


@dataclass
class Process:
    """A server that listens; its log grows in `log`, over all its lives."""

    store: Path
    log: Path
    fault: str = "none"
    flags: dict[str, str] = field(default_factory=dict)
    url: str = ""
    start_s: float = 0.0  # from its start to the first answer
    _popen: subprocess.Popen[str] | None = None

    def start(self) -> "Process":
        flags = {**_FLAGS, "store": str(self.store), **self.flags}
        told = [text for name, value in flags.items() for text in (f"--{name}", value)]
        command = [sys.executable, "-m", "tests.faults.faulty_server", self.fault, "serve", str(MODEL), *told]
        begun_s = time.monotonic()
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=_ROOT)
        assert self._popen.stdout is not None
        for line in self._popen.stdout:  # it ends when the process does
            if (found := re.search(r"http://127\.0\.0\.1:\d+", line)) is not None:
                self.url = found.group()
                break
        assert self.url, self.log.read_text()[-3000:]
        with self.client() as http:
            assert http.get("/ready").status_code == 200
        self.start_s = time.monotonic() - begun_s
        return self

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    def client(self) -> httpx.Client:
        """Every request has a connection of its own: one that is kept may close just as it is used."""
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, limits=limits)

    def send(self, sent: signal.Signals) -> None:
        os.kill(self.pid, sent)

    def end(self) -> int:
        """Its exit code, when it has ended by itself."""
        assert self._popen is not None
        code = self._popen.wait(PATIENCE_S)
        assert self._popen.stdout is not None
        self._popen.stdout.close()
        return code

    def kill(self) -> None:
        if self._popen is not None and self._popen.poll() is None:
            with suppress(ProcessLookupError):
                self.send(signal.SIGCONT)
                self.send(signal.SIGKILL)
            self.end()

    def lines(self) -> list[dict[str, Any]]:
        """Its log; what it says to people beside it, and libraries' progress, is left out."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def said(self) -> str:
        return self.log.read_text()


class Begun:
    """A stream of which the first event has been read: a request that was accepted. It is read on in a thread."""

    def __init__(self, process: Process, case: Case) -> None:
        self.end: End | None = None
        self._process = process
        self._case = case
        self._is_begun = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self._is_begun.wait(PATIENCE_S)

    def _read(self) -> None:
        try:
            self.end = self._read_all()
        except httpx.HTTPError as error:
            self.end = End(detail=repr(error))
        finally:
            self._is_begun.set()

    def _read_all(self) -> End:
        text = ""
        body = self._case.body(stream=True) | {"ignore_eos": True}
        with self._process.client() as http, http.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                self._is_begun.set()
                if line == "data: [DONE]":
                    return End(text=text)
                if line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return End(text=text, code=event["error"]["code"])
                    text += event["choices"][0]["text"]
        return End(detail="the stream stopped")

    def ended(self) -> End:
        self._thread.join(PATIENCE_S)
        assert self.end is not None, "a request that never ends"
        return self.end


def begin(process: Process, cases: Sequence[Case]) -> list[Begun]:
    return [Begun(process, case) for case in cases]


def await_status(process: Process, path: str, status: int) -> None:
    def is_so() -> bool:
        with process.client() as http:
            return http.get(path).status_code == status

    await_that(is_so, lambda: f"{path} is never answered with {status}")
