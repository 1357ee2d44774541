"""Whether a grammar compiles, found out in a process of its own that may be lost over it.

Owns that process, its limits, and the sentences for what goes wrong with a grammar. Knows nothing about what keeps
grammars or follows them.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llguidance import LLTokenizer

from server.ground.errors import Overloaded

# Of llguidance's limits those whose default is not for strangers.
GRAMMAR_LIMITS: Mapping[str, Any] = {
    "max_lexer_states": 20_000,  # 1 to 2 KB each, in every answer that is under way
    "max_grammar_size": 100_000,
    "verbose_errors": False,  # or its messages are pages of the parser's inside
}
_CPU_S = 2.0  # a schema of 64 KiB takes less, and what takes more is nearly always exponential
_WALL_S = 60.0  # a busy machine may take so long over that; a process that is silent for longer does not go on
_MAX_BYTES = 2 << 30  # of address space: a tokenizer of 256k tokens takes a tenth
_MAX_COMPILED_BYTES = 16 << 20  # a schema of 60 KiB takes 4 MB
_PIECE_BYTES = 1 << 16
_ENDING_S = 5.0
_PROGRAM = Path(__file__).with_name("grammar_process.py")
_NOTHING = re.compile(r"NoExtension(Bias)?")  # llguidance's word for a grammar that has no first token
_FORCED = "doesn't satisfy the grammar; forced bytes"
_MAX_WORDS = 300


class GrammarRefused(Exception):
    """A grammar does not compile, or nothing satisfies it. Says why in a sentence without its end."""


class GrammarsUnavailable(Exception):
    """No grammar can be compiled for this tokenizer. Says why."""


class _Silent(Exception):
    """The process lives, and says nothing."""


@dataclass(frozen=True, slots=True)
class TokenizerText:
    """A tokenizer as llguidance reads it. `vocab_size` counts logits, of which there may be more than tokens."""

    tokenizer: str  # the JSON of Hugging Face's `tokenizers`
    vocab_size: int
    eos_ids: tuple[int, ...]

    def loaded(self) -> LLTokenizer:
        """Holds Python's lock while it reads, about a second for 100,000 tokens. Raises GrammarsUnavailable."""
        try:
            return LLTokenizer(self.tokenizer, n_vocab=self.vocab_size, eos_token=list(self.eos_ids) or None)
        except ValueError as error:
            raise GrammarsUnavailable(str(error)) from error


@dataclass(frozen=True, slots=True)
class Compilable:
    """A grammar in llguidance's own form, known to compile, and the memory that it takes then."""

    grammar: str
    compiled_bytes: int  # 0 with a C library that does not say


class GrammarTrial:
    """Tries grammars one after another, and owns the process for it, which is started when it is needed.

    Belongs to one thread, but for `stop`.
    """

    def __init__(self, tokenizer: TokenizerText) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # the two fields below
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    def compilable(self, form: str, text: str) -> Compilable:
        """Blocks while the process has time left.

        Raises GrammarRefused, GrammarsUnavailable, and Overloaded for what the machine fails to do now.
        """
        process = self._living() or self._started()
        answer = self._answer(process, {"form": form, "text": text})
        if answer is None:
            raise self._lost(process)
        if "error" in answer:
            raise GrammarRefused(_sentence(answer["error"]))
        compiled_bytes = int(answer["compiled_bytes"])
        if compiled_bytes > _MAX_COMPILED_BYTES:
            most = f"the {_MAX_COMPILED_BYTES >> 20} MiB that one may"
            raise GrammarRefused(f"it takes {compiled_bytes / (1 << 20):.1f} MiB once it is compiled, more than {most}")
        return Compilable(answer["grammar"], compiled_bytes)

    def stop(self) -> None:
        """From any thread: ends the process, so that who waits for it does not, and lets no other start."""
        with self._lock:
            self._is_stopped = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """After the last trial: leaves no process and nothing open."""
        self.stop()
        self._end()

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            _reap(process)

    def _living(self) -> "subprocess.Popen[bytes] | None":
        """The process, unless the system has ended it meanwhile."""
        if self._process is not None and self._process.poll() is not None:
            self._end()
        return self._process

    def _started(self) -> "subprocess.Popen[bytes]":
        with self._lock:
            self._check_goes_on()
            process = self._process = _spawned()
        answer = self._answer(process, asdict(self._tokenizer) | {"limits": dict(GRAMMAR_LIMITS)})
        if answer is None or "error" in answer:
            self._end()
            self._check_goes_on()
            raise GrammarsUnavailable("the process that compiles grammars does not start")
        return process

    def _check_goes_on(self) -> None:
        """Raises Overloaded once stopped: what a process says that was killed for it tells nothing of the grammar."""
        if self._is_stopped:
            raise Overloaded("The server is ending.")

    def _answer(self, process: "subprocess.Popen[bytes]", request: Mapping[str, Any]) -> dict[str, Any] | None:
        """None where the process is gone."""
        try:
            return _asked(process, request, time.monotonic() + _WALL_S)
        except _Silent as silent:
            self._end()
            raise Overloaded("The process that compiles grammars does not answer. Retry in a moment.") from silent

    def _lost(self, process: "subprocess.Popen[bytes]") -> Exception:
        _reap(process)  # without a signal of our own: its last one tells what was wrong
        self._end()
        self._check_goes_on()
        if process.returncode == -signal.SIGPROF:
            return GrammarRefused(f"it takes more than {_CPU_S:g} s to compile; make it simpler")
        return GrammarRefused("it is nested too deeply, or too large to compile")


def _spawned() -> "subprocess.Popen[bytes]":
    """Isolated (-I) and with an empty environment. Raises Overloaded where the machine has no room for a process."""
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", str(_PROGRAM), str(_CPU_S), str(_MAX_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,
        )
    except OSError as error:
        words = error.strerror or type(error).__name__
        raise Overloaded(f"No process can be started to compile a grammar: {words}. Retry in a moment.") from error
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    return process


def _asked(process: "subprocess.Popen[bytes]", request: Mapping[str, Any], deadline_s: float) -> dict[str, Any] | None:
    """The answer; None when the process is gone. Raises _Silent when `deadline_s` (monotonic) comes first."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        _write(process.stdin.fileno(), json.dumps(request).encode() + b"\n", deadline_s)
    except OSError:
        return None
    line = _line(process.stdout.fileno(), deadline_s)
    answer: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
    return answer


def _write(descriptor: int, content: bytes, deadline_s: float) -> None:
    rest, ready = memoryview(content), select.poll()
    ready.register(descriptor, select.POLLOUT)
    while rest:
        _wait(ready, deadline_s)
        rest = rest[os.write(descriptor, rest[:_PIECE_BYTES]) :]


def _line(descriptor: int, deadline_s: float) -> bytes:
    """Without its end where the stream ends first."""
    content, ready = bytearray(), select.poll()
    ready.register(descriptor, select.POLLIN)
    while not content.endswith(b"\n"):
        _wait(ready, deadline_s)
        piece = os.read(descriptor, _PIECE_BYTES)
        if not piece:
            break
        content += piece
    return bytes(content)


def _wait(ready: "select.poll", deadline_s: float) -> None:
    if not ready.poll(max(deadline_s - time.monotonic(), 0) * 1000):
        raise _Silent


def _reap(process: "subprocess.Popen[bytes]") -> None:
    """Waits for a process that is ending, and leaves nothing open."""
    try:
        process.wait(_ENDING_S)
    except subprocess.TimeoutExpired:  # it has closed its output, and goes on
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with suppress(OSError):  # what was not sent
            stream.close()


def _sentence(words: str) -> str:
    """llguidance's message on one line, without its drawings of where in a text something is."""
    if _NOTHING.match(words):
        return "nothing satisfies it"
    if _FORCED in words:
        return "it spells out a special token of the model, which stands for more than its text"
    first, *others = words.splitlines() or [""]
    of_regex = [line.removeprefix("error: ") for line in others if line.startswith("error: ")]
    return (of_regex[-1] if of_regex else first)[:_MAX_WORDS].rstrip(". ")
