"""Several adapters asked at once, and their answers as they come: in columns on a terminal, else one after another.

Owns how streamed answers look. Knows nothing about conversations and commands.
"""

import argparse
import asyncio
import io
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

import httpx
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from server.cli.client import Address, add_url, connect, stream, without_control
from server.ground.errors import GraftError

MIN_COLUMN = 24  # narrower ones are not read: then the answers come one after another
_SPARE_LINES = 4  # of a terminal's height: headings, and what was typed
_DIM, _NOT_DIM = "\x1b[2m", "\x1b[22m"


_FIELDS = (
    ("--max-tokens", int, "N", "length of an answer, at most"),
    ("--temperature", float, "X", "0: always the most likely token (default: the server's, 1)"),
    ("--top-p", float, "X", "the share of probability that is drawn from"),
    ("--seed", int, "N", "the same seed gives the same answer"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What a command that asks for answers is told: the server, who answers, and how."""
    add_url(parser)
    text = "who answers: an adapter, name@version, or a name of the base; give it twice for two side by side"
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME", help=text)
    for flag, kind, metavar, text in _FIELDS:
        parser.add_argument(flag, type=kind, default=None, metavar=metavar, help=text)


def fields_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The request fields that flags gave. Their limits are the server's to tell."""
    names = [flag.removeprefix("--").replace("-", "_") for flag, *_ in _FIELDS]
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def shown(text: str, out: TextIO) -> str:
    """What a model wrote, as it may be printed: a terminal would obey the control characters in it."""
    return without_control(text) if out.isatty() else text


@dataclass(slots=True)
class Voice:
    """One adapter's answer to one request, as far as it has come."""

    name: str
    body: Mapping[str, Any]
    text: str = ""
    reasoning: str = ""  # what it has thought before
    finish_reason: str | None = None
    error: GraftError | None = None

    async def listen(self, http: httpx.AsyncClient, path: str, heard: Callable[[str, bool], None]) -> None:
        """Reads the answer to its end; a failure is kept, for the others go on.

        `heard` is given each text, and whether it is thought.
        """
        try:
            async for piece in stream(http, path, self.body):
                self.finish_reason = piece.finish_reason or self.finish_reason
                if piece.reasoning:
                    self.reasoning += piece.reasoning
                    heard(piece.reasoning, True)
                if piece.text:
                    self.text += piece.text
                    heard(piece.text, False)
        except GraftError as error:
            self.error = error


class Screen(Protocol):
    """Where answers are shown; voices are numbered in their order."""

    def heard(self, voice: int, text: str, is_thought: bool = False) -> None: ...
    def ended(self, voice: int) -> None: ...


async def listen_to_all(http: httpx.AsyncClient, path: str, voices: Sequence[Voice], screen: Screen) -> None:
    """All answers at once. When this is cancelled the voices keep what they have said, and the server stops."""

    async def one(index: int, voice: Voice) -> None:
        await voice.listen(http, path, lambda text, is_thought: screen.heard(index, text, is_thought))
        screen.ended(index)

    await asyncio.gather(*(one(index, voice) for index, voice in enumerate(voices)))


@contextmanager
def connected(address: Address) -> Iterator[tuple[asyncio.Runner, httpx.AsyncClient]]:
    """A loop to run requests on, one after another, and a client that lives on it. Lets any text be printed."""
    for file in (sys.stdin, sys.stdout):
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="replace")
    with asyncio.Runner() as runner:
        http = connect(address)
        try:
            yield runner, http
        finally:
            runner.run(http.aclose())


def hear(runner: asyncio.Runner, http: httpx.AsyncClient, path: str, voices: Sequence[Voice]) -> bool:
    """Shows the answers on standard output as they come. False if Ctrl-C has stopped them, on the server, too."""
    with screen_for(voices, sys.stdout) as screen:
        try:
            runner.run(_stoppable(listen_to_all(http, path, voices, screen)))
        except (KeyboardInterrupt, asyncio.CancelledError):
            return False
    return True


async def _stoppable(listening: Coroutine[Any, Any, None]) -> None:
    """Has Ctrl-C cancel it by a handler of the loop's, which wakes the loop.

    The runner's own does not: where the signal reaches another thread of the process (the screen's), it is noticed only
    when the loop has something else to do.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is None or threading.current_thread() is not threading.main_thread():
        await listening
        return
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        await listening
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextmanager
def screen_for(voices: Sequence[Voice], out: TextIO) -> Iterator[Screen]:
    """Columns where there are several voices and a terminal with room for them; else lines of text."""
    console = Console(file=out, highlight=False)
    is_terminal = console.is_terminal and not console.is_dumb_terminal
    if len(voices) > 1 and is_terminal and console.width // len(voices) >= MIN_COLUMN:
        columns = _Columns(console, voices)
        with Live(get_renderable=columns.tail, console=console, transient=True, refresh_per_second=12):
            yield columns
        console.print(columns.whole())
    else:
        lines = _Lines(voices, out, shows_thoughts=is_terminal)
        try:
            yield lines
        finally:
            lines.close()


class _Lines:
    """Text as it comes: of the first voice, and of each other once those before it have ended.

    What a voice thinks stands dimmed on lines of its own, where that can be shown.
    """

    def __init__(self, voices: Sequence[Voice], out: TextIO, *, shows_thoughts: bool) -> None:
        self._out = out
        self._names = [voice.name for voice in voices]
        self._shows_thoughts = shows_thoughts
        self._waiting: list[list[tuple[str, bool]]] = [[] for _ in voices]
        self._has_ended = [False] * len(voices)
        self._current = 0
        self._is_at_start = True  # of a line
        self._is_thinking = False
        self._announce()

    def heard(self, voice: int, text: str, is_thought: bool = False) -> None:
        if is_thought and not self._shows_thoughts:
            return
        if voice == self._current:
            self._say(text, is_thought)
        else:
            self._waiting[voice].append((text, is_thought))

    def ended(self, voice: int) -> None:
        self._has_ended[voice] = True
        while self._current < len(self._names) and self._has_ended[self._current]:
            self._next()

    def close(self) -> None:
        """Shows what was stopped before its turn came, too."""
        while self._current < len(self._names):
            self._next()

    def _next(self) -> None:
        self._say("", is_thought=False)
        self._end_line()
        self._current += 1
        if self._current < len(self._names):
            self._announce()

    def _announce(self) -> None:
        if len(self._names) > 1:
            self._write(f"[{self._names[self._current]}]\n")
        for text, is_thought in self._waiting[self._current]:
            self._say(text, is_thought)

    def _say(self, text: str, is_thought: bool) -> None:
        if is_thought != self._is_thinking:
            self._end_line()
            self._out.write(_DIM if is_thought else _NOT_DIM)
        self._is_thinking = is_thought
        self._write(text)

    def _write(self, text: str) -> None:
        if text:
            self._out.write(shown(text, self._out))
            self._out.flush()
            self._is_at_start = text.endswith("\n")

    def _end_line(self) -> None:
        if not self._is_at_start:
            self._write("\n")


class _Columns:
    """A column for each voice: while it speaks the end of what it has said, as much as fits; then all of it."""

    def __init__(self, console: Console, voices: Sequence[Voice]) -> None:
        self._console = console
        self._voices = voices

    def heard(self, voice: int, text: str, is_thought: bool = False) -> None:
        """The screen reads the voices by itself."""

    def ended(self, voice: int) -> None: ...

    def tail(self) -> Table:
        return self._table(max(self._console.height - _SPARE_LINES, 1))

    def whole(self) -> Table:
        return self._table(None)

    def _table(self, num_lines: int | None) -> Table:
        table = Table.grid(padding=(0, 2), expand=True)
        for _ in self._voices:
            table.add_column(ratio=1, overflow="fold")
        table.add_row(*(Text(without_control(voice.name), style="bold") for voice in self._voices))
        table.add_row(*(self._cell(voice, num_lines) for voice in self._voices))
        return table

    def _cell(self, voice: Voice, num_lines: int | None) -> Text:
        thought = f"{without_control(voice.reasoning)}\n" if voice.reasoning else ""
        text = Text.assemble((thought, "dim"), without_control(voice.text))
        if num_lines is None:
            return text
        width = self._console.width // len(self._voices) - 2
        return Text("\n").join(list(text.wrap(self._console, max(width, 1)))[-num_lines:])
