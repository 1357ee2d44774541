"""How a family of models writes its calls of tools: what the style of each file here says of itself.

Knows nothing about any one of them.
"""

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from server.api.messages import Tool
from server.api.tools.pieces import PieceParser
from server.api.tools.strict import Marks
from server.model.chat_template import ChatTemplate


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """One style.

    `parser` makes a reader of answers that may call the tools of these names, `expression` the grammar of such answers,
    in which calls of strict tools are as these want them. `marks`: the texts that may be special tokens, and must be
    seen all the same. `is_taught_by`: whether models of this template were trained on this style.
    """

    name: str
    parser: Callable[[Collection[str]], PieceParser]
    expression: Callable[[Sequence[Tool], Marks], str]
    marks: tuple[str, ...]
    is_taught_by: Callable[[ChatTemplate], bool]
    new_id: Callable[[], str] = call_id
