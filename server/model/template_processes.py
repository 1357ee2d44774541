"""The processes in which chat templates are rendered, and what becomes of a template that does not end.

Owns the processes, their limits, and the sentences for what goes wrong in them. A process is started when a template
first needs one, kept for the next, and ended when a template breaks its limits. Knows nothing about what templates say.
"""

import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.ground.errors import BadRequest

MAX_PROCESSES = 2  # renderings at once; the others wait
_PROGRAM = Path(__file__).with_name("template_process.py")
_LENGTH = struct.Struct(">Q")
_READ_BYTES = 1 << 20
_ENDING_S = 5.0


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one rendering may take. The processor's time is what counts: a machine that is busy costs no request."""

    cpu_s: float = 5.0
    wall_s: float = 120.0
    memory_bytes: int = 512 << 20  # of address space
    max_chars: int = 8 << 20  # of the text that comes out


class TemplateFailed(BadRequest):
    """A template refused its messages, or could not be rendered. `kind` is the name of the exception in it."""

    code = "chat_template_failed"

    def __init__(self, words: str, kind: str = "") -> None:
        super().__init__(words)
        self.kind = kind


class _Ended(Exception):
    """The process is gone, or was ended."""


class TemplateProcesses:
    """Renders templates, at most MAX_PROCESSES at once. Safe for many threads; calls block, each for a limited time."""

    def __init__(self, limits: TemplateLimits | None = None) -> None:
        self._limits = limits or TemplateLimits()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._free = threading.BoundedSemaphore(MAX_PROCESSES)
        # However this object goes, the processes do: they would wait for requests for ever.
        self.close = weakref.finalize(self, _end_all, self._idle)

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text of `template` with these variables, which must be plain JSON.

        Raises TemplateFailed with the template's own words for what it raises, and for what breaks a limit.
        """
        text: str = self._ask(template, variables)["text"]
        return text

    def variables(self, template: str) -> frozenset[str]:
        """The names that `template` reads and does not set. Raises TemplateFailed where it is no template."""
        return frozenset(self._ask(template, None)["variables"])

    def _ask(self, template: str, variables: Mapping[str, Any] | None) -> dict[str, Any]:
        content = json.dumps({"template": template, "variables": variables}).encode()
        with self._free:
            answer = self._exchange(_LENGTH.pack(len(content)) + content)
        if "error" in answer:
            raise TemplateFailed(answer["error"]["words"], answer["error"]["kind"])
        return answer

    def _exchange(self, request: bytes) -> dict[str, Any]:
        process = self._take()
        try:
            answer = _exchanged(process, request, time.monotonic() + self._limits.wall_s)
        except _Ended as ended:
            _reap(process)
            raise self._broken(process) from ended
        if _is_out_of_memory(answer):
            process.kill()
            _reap(process)
            return answer
        self._idle.append(process)
        if not self.close.alive:  # closed meanwhile
            _end_all(self._idle)
        return answer

    def _take(self) -> subprocess.Popen[bytes]:
        """A process that lives; one that idled may have been ended by the system meanwhile."""
        while True:
            try:
                process = self._idle.pop()
            except IndexError:
                return _start(self._limits)
            if process.poll() is None:
                return process
            _reap(process)

    def _broken(self, process: subprocess.Popen[bytes]) -> TemplateFailed:
        if process.returncode == -signal.SIGPROF:
            return TemplateFailed(f"it takes more than {self._limits.cpu_s:g} s of the processor", "TimeoutError")
        return TemplateFailed("the process that renders it ended; it may take too much memory or time", "ProcessError")


def _start(limits: TemplateLimits) -> subprocess.Popen[bytes]:
    """Isolated (-I) and with an empty environment: what a template could get out of its sandbox to see is little."""
    numbers = (str(limits.cpu_s), str(limits.memory_bytes), str(limits.max_chars))
    return subprocess.Popen(
        [sys.executable, "-I", str(_PROGRAM), *numbers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        start_new_session=True,
    )


def _exchanged(process: subprocess.Popen[bytes], request: bytes, deadline_s: float) -> dict[str, Any]:
    """The answer. Raises _Ended where the process ends first, or `deadline_s` (monotonic) comes."""
    assert process.stdin is not None
    try:
        # The process reads a request whole before it does anything, so this does not wait for what it does.
        process.stdin.write(request)
        process.stdin.flush()
    except OSError as error:
        raise _Ended from error
    (num_bytes,) = _LENGTH.unpack(_read(process, _LENGTH.size, deadline_s))
    answer: dict[str, Any] = json.loads(_read(process, num_bytes, deadline_s))
    return answer


def _read(process: subprocess.Popen[bytes], num_bytes: int, deadline_s: float) -> bytes:
    assert process.stdout is not None
    descriptor, content, readable = process.stdout.fileno(), bytearray(), select.poll()
    readable.register(descriptor, select.POLLIN)
    while len(content) < num_bytes:
        if not readable.poll(max(deadline_s - time.monotonic(), 0) * 1000):
            process.kill()
            raise _Ended
        piece = os.read(descriptor, min(num_bytes - len(content), _READ_BYTES))
        if not piece:
            raise _Ended
        content += piece
    return bytes(content)


def _is_out_of_memory(answer: Mapping[str, Any]) -> bool:
    """Whether its process has no room left: what fills it are templates of others too, and the next would fail."""
    return "error" in answer and answer["error"]["kind"] == "MemoryError"


def _end_all(processes: list[subprocess.Popen[bytes]]) -> None:
    while processes:
        process = processes.pop()
        process.kill()
        _reap(process)


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Waits for a process that is ending, and leaves nothing open."""
    try:
        process.wait(_ENDING_S)
    except subprocess.TimeoutExpired:  # it has closed its output and goes on: a program that is not ours
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with suppress(OSError):  # what was not sent
            stream.close()
