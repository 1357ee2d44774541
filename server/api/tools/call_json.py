"""Calls written as JSON, read as they come: one object with a name and arguments, or a list of such objects.

The arguments are given on as the model wrote them, while it writes them; they are told apart by brackets and quotes
alone, and whether they are what the tool wants is for the client to check. Knows nothing about what marks a call.
"""

import json
from collections.abc import Collection
from enum import Enum, auto

from server.api.tools.pieces import CallArguments, CallBegun, CallEnded, Piece

_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")  # models differ in how they were taught to say it
_OTHERS = ("type", "id")


class JsonValue:
    """One JSON value: takes its characters and tells when it has ended."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_text = False
        self._is_escaped = False
        self._is_scalar = False
        self._has_begun = False
        self.is_ended = False

    def take(self, character: str) -> bool:
        """Whether `character` belongs to the value: the one behind a number, true, false or null does not."""
        if self._is_in_text:
            self._take_in_text(character)
        elif self._is_scalar:
            self.is_ended = character in _SPACE or character in ",]}:"
            return not self.is_ended
        elif character == '"':
            self._is_in_text = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.is_ended = self._depth <= 0
        elif not self._has_begun:
            self._is_scalar = True
        self._has_begun = True
        return True

    def _take_in_text(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._is_in_text = False
            self.is_ended = self._depth == 0


class _At(Enum):
    START = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    NEXT = auto()


class CallObject:
    """One object {"name": ..., "arguments": {...}}, its keys in any order.

    A call begins when its name and the beginning of its arguments are known. `is_broken`: the text is no call, and no
    piece has come of it. `names`: what may be called; any name if None. Only a call of one of them, with arguments and
    without keys that no call has, tells itself from an object that is the answer: that is what `names` is for.
    """

    def __init__(self, index: int, names: Collection[str] | None = None) -> None:
        self._index = index
        self._names = names
        self._at = _At.START
        self._value = JsonValue()
        self._text = ""  # of the key or the value that is being read
        self._key = ""
        self._name: str | None = None
        self._arguments: str | None = None  # read before the name was known
        self._is_streaming = False
        self.has_begun = False
        self.is_ended = False
        self.is_broken = False

    def take(self, character: str) -> list[Piece]:
        """The pieces that this character completes; not to be called once `is_ended` or `is_broken`."""
        if self._at is _At.VALUE or (self._at is _At.KEY and self._text):
            return self._take_inside(character)
        if character in _SPACE:
            return []
        return self._take_between(character)

    def _take_between(self, character: str) -> list[Piece]:
        match self._at, character:
            case _At.START, "{":
                self._at = _At.KEY
            case _At.KEY, '"':
                self._value, self._text = JsonValue(), character
                self._value.take(character)
            case _At.COLON, ":":
                self._at, self._value, self._text = _At.VALUE, JsonValue(), ""
            case _At.NEXT, ",":
                self._at = _At.KEY
            case ((_At.NEXT | _At.KEY), "}"):
                return self._end()
            case _:
                return self._give_up()
        return []

    def _take_inside(self, character: str) -> list[Piece]:
        if self._at is _At.VALUE and not self._text and character in _SPACE:
            return []
        if not self._value.take(character):  # the end of a number or the like, and the next thing
            return [*self._end_value(), *(self._take_again(character))]
        if not self._is_streaming:  # else nobody reads it again, and it may be long
            self._text += character
        if self._at is _At.KEY:
            return self._end_key() if self._value.is_ended else []
        pieces = self._stream(character)
        return [*pieces, *self._end_value()] if self._value.is_ended else pieces

    def _take_again(self, character: str) -> list[Piece]:
        return [] if self.is_broken else self.take(character)

    def _end_key(self) -> list[Piece]:
        key = _text_of(self._text)
        self._key, self._text, self._at = key or "", "", _At.COLON
        is_foreign = self._names is not None and key not in ("name", *_ARGUMENTS, *_OTHERS)
        is_second = key in _ARGUMENTS and (self.has_begun or self._arguments is not None)
        if key is None or is_foreign or is_second:
            return self._give_up()
        return []

    def _stream(self, character: str) -> list[Piece]:
        """Arguments that are an object are said as they come, as soon as the name is known."""
        if self._key not in _ARGUMENTS or self._name is None or self._text[0] != "{":
            return []
        begun: list[Piece] = [] if self._is_streaming else self._begin()
        self._is_streaming = True
        return [*begun, CallArguments(self._index, character)]

    def _begin(self) -> list[Piece]:
        assert self._name is not None
        self.has_begun = True
        return [CallBegun(self._index, self._name)]

    def _end_value(self) -> list[Piece]:
        text, self._text, self._at = self._text, "", _At.NEXT
        if self._is_streaming:
            self._is_streaming = False
            return []
        if self._key == "name":
            return self._end_name(text)
        if self._key in _ARGUMENTS:
            self._arguments = _as_arguments(text)
            if self._arguments is None:
                return self._give_up()
            if self._name is not None:
                return self._say_arguments()
        return []

    def _end_name(self, text: str) -> list[Piece]:
        self._name = None if self._name is not None else _text_of(text)
        if not self._name or (self._names is not None and self._name not in self._names):
            return self._give_up()
        return [] if self._arguments is None else self._say_arguments()

    def _say_arguments(self) -> list[Piece]:
        begun: list[Piece] = [] if self.has_begun else self._begin()
        return [*begun, CallArguments(self._index, self._arguments or "")]

    def _end(self) -> list[Piece]:
        if not self.has_begun:
            if self._name is None or self._names is not None:
                return self._give_up()
            self._arguments = "{}"  # a call of a tool that takes none
            said = self._say_arguments()
        else:
            said = []
        self.is_ended = True
        return [*said, CallEnded(self._index)]

    def _give_up(self) -> list[Piece]:
        """What has been said stays said: then the call ends here, and what follows is no part of it."""
        if self.has_begun:
            self.is_ended = True
            return [CallEnded(self._index)]
        self.is_broken = True
        return []


class CallArgumentsOnly:
    """A call of the tool `name`, of which only the arguments are written."""

    def __init__(self, index: int, name: str) -> None:
        self._index = index
        self._name = name
        self._value: JsonValue | None = None
        self.is_ended = False
        self.is_broken = False

    def take(self, character: str) -> list[Piece]:
        said: list[Piece] = []
        if self._value is None:
            if character in _SPACE:
                return []
            self._value = JsonValue()
            said.append(CallBegun(self._index, self._name))
        self._value.take(character)
        said.append(CallArguments(self._index, character))
        if self._value.is_ended:
            self.is_ended = True
            said.append(CallEnded(self._index))
        return said


class CallList:
    """A list [{...}, {...}] of calls, from its bracket on. What is no call in it ends it: `is_broken`."""

    def __init__(self, index: int) -> None:
        self._index = index  # of the next call
        self._call: CallObject | None = None
        self._has_opened = False
        self.is_ended = False
        self.is_broken = False

    def take(self, character: str) -> list[Piece]:
        if self._call is not None:
            pieces = self._call.take(character)
            self.is_broken = self._call.is_broken
            if self._call.is_ended:
                self._call = None
                self._index += 1
            return pieces
        self._take_between(character)
        return []

    def _take_between(self, character: str) -> None:
        match character, self._has_opened:
            case "[", False:
                self._has_opened = True
            case "]", True:
                self.is_ended = True
            case "{", True:
                self._call = CallObject(self._index)
                self._call.take(character)
            case _:
                self.is_broken = character not in _SPACE and (character != "," or not self._has_opened)


def _text_of(text: str) -> str | None:
    """What a JSON text says; None for another value, and for a text that is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _as_arguments(text: str) -> str | None:
    """The JSON text of arguments that came whole; of an object in a text, that object. None for anything else."""
    if text == "null":
        return "{}"
    return text if text.startswith("{") else _text_of(text)
