"""Whether a grammar compiles, found out in a process of its own that may be lost over it.

Owns that process, its limits, and the sentences for what goes wrong with a grammar. Knows nothing about what keeps
grammars or follows them.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llguidance import LLTokenizer

# Of llguidance's limits those whose default is not for strangers.
GRAMMAR_LIMITS: Mapping[str, Any] = {
    "max_lexer_states": 20_000,  # 1 to 2 KB each, in every answer that is under way
    "max_grammar_size": 100_000,
    "verbose_errors": False,  # or its messages are pages of the parser's inside
}
_CPU_S = 2.0  # a schema of 64 KiB takes less, and what takes more is nearly always exponential
_MAX_BYTES = 2 << 30  # of address space: a tokenizer of 256k tokens takes a tenth
_PROGRAM = Path(__file__).with_name("grammar_process.py")
_NOTHING = re.compile(r"NoExtension(Bias)?")  # llguidance's word for a grammar that has no first token
_FORCED = "doesn't satisfy the grammar; forced bytes"
_MAX_WORDS = 300


class GrammarRefused(Exception):
    """A grammar does not compile, or nothing satisfies it. Says why in a sentence without its end."""


class GrammarsUnavailable(Exception):
    """No grammar can be compiled for this tokenizer. Says why."""


@dataclass(frozen=True, slots=True)
class TokenizerText:
    """A tokenizer as llguidance reads it. `vocab_size` counts logits, of which there may be more than tokens."""

    tokenizer: str  # the JSON of Hugging Face's `tokenizers`
    vocab_size: int
    eos_ids: tuple[int, ...]

    def loaded(self) -> LLTokenizer:
        """Raises GrammarsUnavailable."""
        try:
            return LLTokenizer(self.tokenizer, n_vocab=self.vocab_size, eos_token=list(self.eos_ids) or None)
        except ValueError as error:
            raise GrammarsUnavailable(str(error)) from error


class GrammarTrial:
    """Tries grammars one after another. Belongs to one thread; starts its process when it needs one."""

    def __init__(self, tokenizer: TokenizerText) -> None:
        self._tokenizer = tokenizer
        self._process: subprocess.Popen[str] | None = None

    def compilable(self, form: str, text: str) -> str:
        """The grammar in llguidance's own form, known to compile. Blocks while the process has processor time left.

        Raises GrammarRefused, GrammarsUnavailable.
        """
        process = self._living() or self._started()
        answer = _asked(process, {"form": form, "text": text})
        if answer is None:
            raise GrammarRefused(self._lost(process))
        if "error" in answer:
            raise GrammarRefused(_sentence(answer["error"]))
        return answer["grammar"]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            _reap(self._process)
            self._process = None

    def _living(self) -> "subprocess.Popen[str] | None":
        """The process, unless the system has ended it meanwhile."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        return self._process

    def _started(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-I", str(_PROGRAM), str(_CPU_S), str(_MAX_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={"PYTHONUTF8": "1"},
            start_new_session=True,
        )
        answer = _asked(process, asdict(self._tokenizer) | {"limits": dict(GRAMMAR_LIMITS)})
        if answer is None or "error" in answer:
            process.kill()
            _reap(process)
            raise GrammarsUnavailable("the process that compiles grammars does not start")
        self._process = process
        return process

    def _lost(self, process: "subprocess.Popen[str]") -> str:
        self._process = None
        _reap(process)
        if process.returncode == -signal.SIGPROF:
            return f"it takes more than {_CPU_S:g} s to compile; make it simpler"
        return "it is nested too deeply, or too large to compile"


def _asked(process: "subprocess.Popen[str]", request: Mapping[str, Any]) -> dict[str, str] | None:
    """The answer; None when the process is gone. It ends by itself when its time is over."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    except OSError:
        return None
    line = process.stdout.readline()
    answer: dict[str, str] | None = json.loads(line) if line.endswith("\n") else None
    return answer


def _reap(process: "subprocess.Popen[str]") -> None:
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
