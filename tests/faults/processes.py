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
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from server.adapters.store.folder_store import INCOMING_FOLDER
from tests.faults.load import MODEL, PATIENCE_S, SLACK, Case, End, await_that
from tests.faults.record import Counts, current_fault, note

NUM_COMPARED = 60  # characters: beyond a sentence's end that is ignored two tokens may be as likely as one another
_ROOT = Path(__file__).parents[2]
_GAUGES = {
    "sequences running": "graft_sequences_running",
    "sequences waiting": "graft_sequences_waiting",
    "blocks": "graft_kv_blocks_used",
    "leases": "graft_adapter_leases",
}
_HELD = {"threads": "task", "descriptors": "fd"}
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
    url: str = ""  # of its last life
    starts_s: list[float] = field(default_factory=list)  # of each life, from its start to the first answer
    killed: list[str] = field(default_factory=list)  # the addresses of the lives that were
    _popen: subprocess.Popen[str] | None = None

    def start(self) -> "Process":
        flags = {**_FLAGS, "store": str(self.store), **self.flags}
        told = [text for name, value in flags.items() for text in (f"--{name}", value)]
        command = [sys.executable, "-m", "tests.faults.faulty_server", self.fault, "serve", str(MODEL), *told]
        begun_s = time.monotonic()
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=_ROOT)
        self.url = self._told_url()
        with self.client() as http:
            assert http.get("/ready").status_code == 200
        self.starts_s.append(time.monotonic() - begun_s)
        return self

    def _told_url(self) -> str:
        assert self._popen is not None
        assert self._popen.stdout is not None
        for line in self._popen.stdout:  # it ends when the process does
            if (found := re.search(r"http://127\.0\.0\.1:\d+", line)) is not None:
                return found.group()
        raise AssertionError(self.log.read_text()[-3000:])

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    def client(self) -> httpx.Client:
        """Every request has a connection of its own: one that is kept may close just as it is used."""
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, limits=limits)

    def send(self, sent: signal.Signals) -> None:
        if sent is signal.SIGKILL:
            self.killed.append(self.url)
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

    def holds(self) -> dict[str, int]:
        """What it has of its own, which the lives of one process have alike."""
        folder = Path(f"/proc/{self.pid}")
        return {what: len(list((folder / where).iterdir())) for what, where in _HELD.items()}

    def left_over(self, before: Mapping[str, int]) -> dict[str, int]:
        """What it holds for requests that are over, and of its own beyond what it had `before`."""
        with self.client() as http:
            http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1})  # lets go of idle threads
            samples = dict(re.findall(r"^(\w+) (\S+)$", http.get("/metrics").text, re.MULTILINE))
        found = {what: int(float(samples[gauge])) for what, gauge in _GAUGES.items()}
        found |= {what: max(number - before[what] - SLACK, 0) for what, number in self.holds().items()}
        return found | {"files": len(list((self.store / INCOMING_FOLDER).iterdir()))}


def note_streams(streams: Sequence["Begun"], left_over: Mapping[str, int], right: Sequence[str] = ()) -> None:
    """The counts of a fault whose requests were begun before it; none of them is to have an end that is no end."""
    ends = [each.ended() for each in streams]
    texts = [end.text for end in ends if end.text is not None and end.code is None]
    num_right = sum(text[:NUM_COMPARED] in right for text in texts)
    counts = Counts(
        fault=current_fault(),
        num_right=num_right,
        refused=dict(Counter(end.code for end in ends if end.code is not None)),
        num_lost=sum(end.text is None and end.code is None for end in ends),
        num_wrong=len(texts) - num_right,
        left_over=left_over,
    )
    note(counts)
    assert (counts.num_lost, counts.num_wrong, counts.num_left_over) == (0, 0, 0), counts


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
