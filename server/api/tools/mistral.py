"""Calls as Mistral's models write them: [TOOL_CALLS] and a list [{"name": ..., "arguments": {...}}], or, since 2025,
[TOOL_CALLS]name{...} for each, perhaps with [CALL_ID] and an id, and [ARGS] before the arguments.

Knows nothing about other styles.
"""

import re
import secrets
import string
from collections.abc import Collection, Sequence

from server.api.messages import Tool
from server.api.tools.call_json import CallArgumentsOnly, CallList, CallObject
from server.api.tools.forced import named_expression
from server.api.tools.marked import CallReader, MarkedCalls
from server.api.tools.pieces import Piece, PieceParser
from server.api.tools.strict import SPACE_RULE, TEXT_RULE, Marks, any_call, as_held
from server.api.tools.style import ToolStyle
from server.model.chat_template import ChatTemplate
from server.model.grammar import literal

_MARK, _ID_MARK, _ARGUMENTS_MARK = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_HEAD = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*[\w-]*\s*)?(?:\[ARGS\]\s*)?")
_MAX_HEAD_CHARS = 256
_ID_CHARS = string.ascii_letters + string.digits  # and nine of them: the templates insist


class _NamedCall:
    """name{...}: what stands before the arguments is read whole."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._head = ""
        self._arguments: CallArgumentsOnly | None = None
        self.is_ended = False
        self.is_broken = False

    def take(self, character: str) -> list[Piece]:
        if self._arguments is None:
            return self._take_head(character)
        pieces = self._arguments.take(character)
        self.is_ended = self._arguments.is_ended
        return pieces

    def _take_head(self, character: str) -> list[Piece]:
        if character != "{":
            self._head += character
            self.is_broken = len(self._head) > _MAX_HEAD_CHARS
            return []
        head = _HEAD.fullmatch(self._head)
        if head is None:
            self.is_broken = True
            return []
        self._arguments = CallArgumentsOnly(self._index, head[1])
        return self.take(character)


class _MistralCalls:
    """Whichever form begins here."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._reader: CallReader | None = None
        self.is_ended = False
        self.is_broken = False

    def take(self, character: str) -> list[Piece]:
        if self._reader is None:
            if character.isspace():
                return []
            forms = {"[": CallList, "{": CallObject}
            self._reader = forms.get(character, _NamedCall)(self._index)
        pieces = self._reader.take(character)
        self.is_ended, self.is_broken = self._reader.is_ended, self._reader.is_broken
        return pieces


def _parser(names: Collection[str]) -> PieceParser:
    return MarkedCalls(_MARK, _MistralCalls)


def _expression(tools: Sequence[Tool], marks: Marks) -> str:
    named = " | ".join(
        f"{literal(tool.function.name)} {marks.exactly(_ARGUMENTS_MARK)}? {named_expression(as_held(tool))}"
        for tool in tools
    )
    rules = (
        "marked* TEXT",
        "marked: open SPACE (listed | named)",
        f"listed: {literal('[')} call ({literal(', ')} call)* {literal(']')}",
        f"call: {any_call(tools, 'arguments')}",
        f"named: {named}",
        marks.after_text("open", _MARK),
        TEXT_RULE,
        SPACE_RULE,
    )
    return "\n".join(rules)


def _is_taught_by(template: ChatTemplate) -> bool:
    return template.mentions(_MARK)


def _new_id() -> str:
    return "".join(secrets.choice(_ID_CHARS) for _ in range(9))


MISTRAL = ToolStyle("mistral", _parser, _expression, (_MARK, _ID_MARK, _ARGUMENTS_MARK), _is_taught_by, _new_id)
