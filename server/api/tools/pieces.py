"""What the text of an answer turns out to be, piece by piece: prose, reasoning, calls of tools.

Owns these values and the protocol of what reads them out of text. Pieces are never taken back, and it makes none but a
difference of size in which portions the text came: joined, they are the same. Knows nothing about HTTP or tokens.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The model calls this tool. The calls of one answer are counted from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    index: int


Piece = Content | Reasoning | CallBegun | CallArguments | CallEnded


class PieceParser(Protocol):
    """Reads one answer. For one use by one thread."""

    def push(self, text: str) -> list[Piece]:
        """What is certain now that `text` has been added."""

    def finish(self) -> list[Piece]:
        """What was held back, at the end of the text."""


def joined(pieces: list[Piece]) -> list[Piece]:
    """The same pieces, neighbours of one kind made one."""
    whole: list[Piece] = []
    for piece in pieces:
        match whole, piece:
            case [*_, Content(before)], Content(text):
                whole[-1] = Content(before + text)
            case [*_, Reasoning(before)], Reasoning(text):
                whole[-1] = Reasoning(before + text)
            case [*_, CallArguments(_, before)], CallArguments(index, text):
                whole[-1] = CallArguments(index, before + text)
            case _:
                whole.append(piece)
    return whole
