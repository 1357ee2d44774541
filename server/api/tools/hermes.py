"""Calls as Hermes, Qwen 2.5 and Qwen 3 write them: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, one each.

Knows nothing about other styles. Some models put XML or a bare name between these tags: that is another style, which a
template gives away by the tags that it teaches.
"""

from collections.abc import Collection, Sequence

from server.api.messages import Tool
from server.api.tools.call_json import CallObject
from server.api.tools.marked import MarkedCalls
from server.api.tools.pieces import PieceParser
from server.api.tools.strict import SPACE_RULE, TEXT_RULE, Marks, any_call
from server.api.tools.style import ToolStyle
from server.model.chat_template import ChatTemplate

_BEGIN, _END = "<tool_call>", "</tool_call>"
_OF_OTHERS = ("<function=", "<arg_key>")


def _parser(names: Collection[str]) -> PieceParser:
    return MarkedCalls(_BEGIN, CallObject, _END)


def _expression(tools: Sequence[Tool], marks: Marks) -> str:
    rules = (
        "tagged* TEXT",
        f"tagged: open SPACE {any_call(tools, 'arguments')} SPACE {marks.exactly(_END)}",
        marks.after_text("open", _BEGIN),
        TEXT_RULE,
        SPACE_RULE,
    )
    return "\n".join(rules)


def _is_taught_by(template: ChatTemplate) -> bool:
    return template.mentions(_BEGIN) and not any(template.mentions(tag) for tag in _OF_OTHERS)


HERMES = ToolStyle("hermes", _parser, _expression, (_BEGIN, _END), _is_taught_by)
