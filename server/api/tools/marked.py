"""Calls behind a mark in the text of an answer: what the styles of models have in common.

Owns the way between prose and calls. Text that turns out to be no call is content, with its mark: nothing is lost.
Knows nothing about any one style.
"""

from collections.abc import Callable
from typing import Protocol

from server.api.tools.pieces import CallBegun, CallEnded, Content, Piece, joined
from server.api.tools.prose import MarkFinder, Prose

_EMPTY = " \t\r\n,;]"  # what may be left of a list of calls and says nothing


class CallReader(Protocol):
    """Reads calls, character by character, until `is_ended`, or until it `is_broken`: the text is no call."""

    is_ended: bool
    is_broken: bool

    def take(self, character: str) -> list[Piece]: ...


class MarkedCalls:
    """Prose, in which `mark` begins a call (or several) that `read` reads; `end_mark` may follow it."""

    def __init__(self, mark: str, read: Callable[[int], CallReader], end_mark: str = "") -> None:
        """`read` is given the number of the next call."""
        self._mark = mark
        self._read = read
        self._end_mark = end_mark
        self._finder = MarkFinder(mark)
        self._prose = Prose()
        self._reader: CallReader | None = None
        self._raw = ""  # read and not said, as it was written
        self._is_in_call = False
        self._ending: str | None = None  # what has come where the end mark is expected
        self._num_calls = 0

    def push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            if self._reader is not None:
                text = self._read_call(self._reader, text, pieces)
            elif self._ending is not None:
                text = self._read_end(self._ending + text)
            else:
                text = self._read_prose(text, pieces)
        return joined(pieces)

    def finish(self) -> list[Piece]:
        pieces = self._prose.push(self._finder.flush()) + self._given_back()
        return joined([*pieces, *self._prose.finish()])

    def _read_prose(self, text: str, pieces: list[Piece]) -> str:
        before, after = self._finder.push(text)
        pieces += self._prose.push(before)
        if after is None:
            return ""
        self._open(self._read, self._mark)
        return after

    def _open(self, read: Callable[[int], CallReader], raw: str) -> None:
        self._reader, self._raw = read(self._num_calls), raw

    def _read_call(self, reader: CallReader, text: str, pieces: list[Piece]) -> str:
        for at, character in enumerate(text, 1):
            if not self._is_in_call:
                self._raw += character
            for piece in reader.take(character):
                self._note(piece)
                pieces.append(piece)
            if reader.is_ended or reader.is_broken:
                self._reader = None
                self._ending = "" if self._end_mark and reader.is_ended else None
                pieces += self._given_back()
                return text[at:]
        return ""

    def _note(self, piece: Piece) -> None:
        if isinstance(piece, CallBegun):
            self._prose.end_at_call()
            self._num_calls += 1
            self._is_in_call = True
        elif isinstance(piece, CallEnded):
            self._is_in_call = False
        self._raw = ""

    def _given_back(self) -> list[Piece]:
        """As content, what was read as a call and is none."""
        raw, self._raw = self._raw, ""
        return self._prose.push(raw) if raw.strip(_EMPTY) else []

    def _read_end(self, text: str) -> str:
        """White space and the end mark are dropped; of anything else nothing is."""
        found = text.lstrip()
        self._ending = None
        if found.startswith(self._end_mark):
            return found[len(self._end_mark) :]
        if self._end_mark.startswith(found):
            self._ending = found
            return ""
        return text


class NoCalls:
    """All text is content: there are no tools, or they are not to be called."""

    def push(self, text: str) -> list[Piece]:
        return [Content(text)] if text else []

    def finish(self) -> list[Piece]:
        return []
