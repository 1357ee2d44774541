"""Reasoning between <think> and </think> before the answer: told apart from it, without the white space between them.

Owns where reasoning begins and ends. Knows nothing about what reads the rest of the answer.
"""

from server.api.tools.pieces import Content, Piece, PieceParser, Reasoning, joined
from server.api.tools.prose import MarkFinder, Prose

BEGIN, END = "<think>", "</think>"


def is_open(text: str) -> bool:
    """Whether `text`, which the answer goes on from, leaves the model in the middle of its reasoning."""
    return text.rstrip().endswith(BEGIN)


def is_left_open(text: str) -> bool:
    """The same of an assistant's turn that is to be continued: its reasoning has begun and not ended."""
    return text.rfind(BEGIN) > text.rfind(END)


class ThinkParser:
    """Reasoning first, if there is any: from the start if `is_inside`, else where the answer begins with <think>.

    What follows goes to `rest`.
    """

    def __init__(self, rest: PieceParser, *, is_inside: bool) -> None:
        self._rest = rest
        self._lead = ""  # where <think> may come
        self._finder: MarkFinder | None = None  # of the end, while inside
        self._reasoning = Prose()
        self._is_past = False
        if is_inside:
            self._enter()

    def push(self, text: str) -> list[Piece]:
        if self._is_past:
            return self._rest.push(text)
        if self._finder is not None:
            return joined(self._read_inside(self._finder, text))
        text, self._lead = self._lead + text, ""
        begin = text.lstrip()
        if begin.startswith(BEGIN):
            self._enter()
            return self.push(begin[len(BEGIN) :])
        if BEGIN.startswith(begin):
            self._lead = text
            return []
        self._is_past = True
        return self._rest.push(text)

    def finish(self) -> list[Piece]:
        if self._finder is not None:
            return _as_reasoning(self._reasoning.push(self._finder.flush())) + self._rest.finish()
        return self._rest.push(self._lead) + self._rest.finish()

    def _enter(self) -> None:
        self._finder = MarkFinder(END)
        self._reasoning.end_at_call()  # so that it begins with no white space

    def _read_inside(self, finder: MarkFinder, text: str) -> list[Piece]:
        before, after = finder.push(text)
        pieces = _as_reasoning(self._reasoning.push(before))
        if after is None:
            return pieces
        self._finder = None
        self._is_past = True
        self._rest = _Trimmed(self._rest)
        return pieces + self._rest.push(after)


class _Trimmed:
    """Without white space at the beginning."""

    def __init__(self, rest: PieceParser) -> None:
        self._rest = rest
        self._has_begun = False

    def push(self, text: str) -> list[Piece]:
        text = text if self._has_begun else text.lstrip()
        self._has_begun = self._has_begun or bool(text)
        return self._rest.push(text) if text else []

    def finish(self) -> list[Piece]:
        return self._rest.finish()


def _as_reasoning(pieces: list[Piece]) -> list[Piece]:
    return [Reasoning(piece.text) if isinstance(piece, Content) else piece for piece in pieces]
