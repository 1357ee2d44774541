"""Calls that the model is made to write: in a form of our own, to which a grammar holds it, whatever its template.

One named tool: the JSON of its arguments. Any tool: a list [{"name": ..., "parameters": ...}] of at least one call.
Owns the form and what reads it. Knows nothing about how a grammar is compiled or followed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from server.api.messages import MAX_CALLS, Tool
from server.api.tools.call_json import CallArgumentsOnly, CallList
from server.api.tools.marked import CallReader
from server.api.tools.pieces import Content, Piece, joined
from server.model.grammar import json_value, literal


def arguments_schema(tool: Tool) -> Mapping[str, Any]:
    """What the arguments of a call must be: an object, as the tool describes it; an empty one, where it does not."""
    if "parameters" not in tool.function.model_fields_set:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **tool.function.parameters}


def call_expression(tool: Tool, arguments: str) -> str:
    """A call as one object; its schema stands by itself, so that what it refers to within itself is found."""
    head = literal(f'{{"name": "{tool.function.name}", "{arguments}": ')
    return f"{head} {json_value(arguments_schema(tool))} {literal('}')}"


def named_expression(tool: Tool) -> str:
    return json_value(arguments_schema(tool))


def required_expression(tools: Sequence[Tool], *, is_single: bool) -> str:
    more = "" if is_single else f"({literal(', ')} call){{0,{MAX_CALLS - 1}}}"
    calls = " | ".join(call_expression(tool, "parameters") for tool in tools)
    return f"{literal('[')} call {more} {literal(']')}\ncall: {calls}"


class ForcedCalls:
    """Reads an answer that is nothing but calls. One that was cut off before its first call has begun is content."""

    def __init__(self, reader: CallReader) -> None:
        self._reader = reader
        self._raw = ""  # before the first call
        self._has_begun = False

    @classmethod
    def of(cls, name: str | None) -> "ForcedCalls":
        """Of the tool `name`; of any, if None."""
        return cls(CallList(0) if name is None else CallArgumentsOnly(0, name))

    def push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        for character in text:
            if self._reader.is_ended:
                break
            said = self._reader.take(character)
            self._has_begun = self._has_begun or bool(said)
            if not self._has_begun:
                self._raw += character
            pieces += said
        return joined(pieces)

    def finish(self) -> list[Piece]:
        return [] if self._has_begun or not self._raw.strip() else [Content(self._raw)]
