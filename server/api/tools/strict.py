"""Calls that the model makes of its own accord, held to the schemas of tools that are strict.

Owns the grammar's parts that all styles share: text that is free until a mark, and the calls behind it. Knows nothing
about any one style, or how a grammar is compiled or followed.
"""

from collections.abc import Mapping, Sequence

from server.api.messages import Function, Tool
from server.api.tools import think
from server.api.tools.forced import call_expression
from server.model.grammar import literal

_ANY_TEXT, _ANY_SPACE = r"/(.|\n)*/", r"/[ \n\t]{0,8}/"
TEXT_RULE, SPACE_RULE = f"TEXT: {_ANY_TEXT}", f"SPACE: {_ANY_SPACE}"


class Marks:
    """How a grammar spells marks: a model that has one as a token of its own may write it by that, or letter by letter.

    The text of a grammar has no tokens of the first kind in it, so that these are named by their ids.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids

    def exactly(self, mark: str) -> str:
        """The expression for the mark."""
        return f"({' | '.join(self._spellings(mark))})"

    def after_text(self, rule: str, mark: str, text: str = "TEXT") -> str:
        """Rules, of which `rule` is any text up to the mark, and the mark; `text` is the name of that for any text."""
        whole, *by_id = self._spellings(mark)
        return "\n".join(
            (
                f"{rule}: {rule}_text{''.join(f' | {text} {token}' for token in by_id)}",
                f"{rule}_text[lazy]: {text} {whole}",  # the first one ends the text, which else could go on over it
            )
        )

    def _spellings(self, mark: str) -> list[str]:
        return [literal(mark), f"<[{self._ids[mark]}]>"] if mark in self._ids else [literal(mark)]


def any_call(tools: Sequence[Tool], arguments: str) -> str:
    """The expression for an object that is a call of one of `tools`; what is not strict may be given anything."""
    return f"({' | '.join(call_expression(as_held(tool), arguments) for tool in tools)})"


def as_held(tool: Tool) -> Tool:
    """The tool as far as a free answer is held to it."""
    function = tool.function
    if function.strict:
        return tool
    return Tool(type="function", function=Function(name=function.name, parameters={"type": "object"}))


def after_reasoning(text: str, marks: Marks, *, is_inside: bool) -> str:
    """The expression `text`, with its rules, behind the reasoning: the rest of it if `is_inside`, else all, if any."""
    rules = (
        "thought GAP answer" if is_inside else f"({marks.exactly(think.BEGIN)} thought GAP)? answer",
        f"answer: {text}",
        marks.after_text("thought", think.END, "THOUGHT"),
        f"THOUGHT: {_ANY_TEXT}",
        f"GAP: {_ANY_SPACE}",
    )
    return "\n".join(rules)
