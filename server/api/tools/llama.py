"""Calls as Llama 3.1 and later write them: {"name": ..., "parameters": {...}} instead of an answer, several of them
divided by ";", and perhaps <|python_tag|> before the first.

An answer may be a JSON object, too. So an object that nothing marks is a call only if its name is that of a tool and
it has parameters and no key that calls do not have. Knows nothing about other styles.
"""

from collections.abc import Collection, Sequence
from functools import partial

from server.api.messages import Tool
from server.api.tools.call_json import CallObject
from server.api.tools.marked import MarkedCalls
from server.api.tools.pieces import CallEnded, Piece, PieceParser
from server.api.tools.strict import SPACE_RULE, Marks, any_call
from server.api.tools.style import ToolStyle
from server.model.chat_template import ChatTemplate
from server.model.grammar import literal

_MARK = "<|python_tag|>"
_HEADER = "<|start_header_id|>"
_BETWEEN = " \t\r\n;"


class _LlamaCalls(MarkedCalls):
    """A call may also begin without its mark: where the answer does, and behind another call."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(_MARK, CallObject)
        self._read_bare = partial(CallObject, names=names)
        self._lead: str | None = ""  # what has come where a call may begin; None elsewhere

    def _read_prose(self, text: str, pieces: list[Piece]) -> str:
        if self._lead is None:
            return super()._read_prose(text, pieces)
        text, self._lead = self._lead + text, None
        begin = text.lstrip(_BETWEEN)
        if not begin:
            self._lead = text
            return ""
        if begin[0] != "{":
            return super()._read_prose(text, pieces)
        self._open(self._read_bare, text[: len(text) - len(begin)])
        return begin

    def _note(self, piece: Piece) -> None:
        super()._note(piece)
        if isinstance(piece, CallEnded):
            self._lead = ""

    def finish(self) -> list[Piece]:
        said = self._prose.push(self._lead) if self._lead and not self._num_calls else []
        return [*said, *super().finish()]


def _parser(names: Collection[str]) -> PieceParser:
    return _LlamaCalls(names)


def _expression(tools: Sequence[Tool], marks: Marks) -> str:
    rules = (
        f"OTHER | {marks.exactly(_MARK)}? SPACE call (SPACE {literal(';')} SPACE call)*",
        f"call: {any_call(tools, 'parameters')}",
        r"OTHER: /\s*([^\s{](.|\n)*)?/",  # what does not begin as a call
        SPACE_RULE,
    )
    return "\n".join(rules)


def _is_taught_by(template: ChatTemplate) -> bool:
    return template.mentions(_MARK) or (template.mentions(_HEADER) and template.mentions('"parameters"'))


LLAMA = ToolStyle("llama", _parser, _expression, (_MARK,), _is_taught_by)
