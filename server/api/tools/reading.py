"""How the answer of one request is read, and what it is held to: by its tools, its template and the operator's word.

Owns the choice among the parsers of this folder. Knows nothing about prompts or the shape of answers.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from server.api.messages import NamedChoice, Tool
from server.api.schemas import ChatBody
from server.api.services import Services
from server.api.structured import MAX_SCHEMA_BYTES, Asked
from server.api.tools import forced, strict, think
from server.api.tools.marked import NoCalls
from server.api.tools.pieces import PieceParser
from server.api.tools.style import call_id
from server.api.tools.styles import AUTO, STYLES, style_of
from server.ground.errors import BadRequest
from server.model.chat_template import ChatTemplate
from server.model.grammar import expression

_MAX_SCHEMAS_BYTES = 4 * MAX_SCHEMA_BYTES  # of all tools of one grammar, which is compiled as a whole


@dataclass(frozen=True, slots=True)
class Reading:
    """Each choice of the answer has a `parser` of its own."""

    parser: Callable[[], PieceParser] = NoCalls
    new_call_id: Callable[[], str] = call_id
    grammar: Asked | None = None  # that the answer is held to, for the sake of its calls
    shown_tokens: frozenset[int] = frozenset()  # special tokens that the parser has to see
    has_calls: bool = False  # whether it may have any
    is_single: bool = False  # whether it ends with the first of them


def reading_of(
    services: Services, template: ChatTemplate, body: ChatBody, *, is_thinking: bool, is_bound: bool
) -> Reading:
    """`is_thinking`: the prompt leaves the model in its reasoning. `is_bound`: the request has a grammar of its own.

    Raises BadRequest where tools may be called and nobody knows how this model writes that.
    """
    tools = body.callable_tools
    if tools and is_bound:
        raise BadRequest(
            "An answer cannot be held to a format of its own and call 'tools': leave one of the two out, or send "
            "'tool_choice': 'none'.",
            param="tools",
        )
    thinks = _thinks(template, services.chat.reasoning_parser) and not is_bound
    if tools and body.is_call_forced:
        thinks = thinks and is_thinking  # else its first word is a call
        reading = _forced(services, template, body, tools, is_inside=True if thinks else None)
    elif tools:
        reading = _free(services, template, tools, is_inside=is_thinking if thinks else None)
    else:
        reading = Reading()
    reading = replace(reading, is_single=bool(tools) and not body.parallel_tool_calls)
    return _with_reasoning(services, reading, is_inside=is_thinking) if thinks else reading


def _thinks(template: ChatTemplate, chosen: str) -> bool:
    return template.mentions(think.END) or template.mentions(think.BEGIN) if chosen == AUTO else chosen == "think"


def _with_reasoning(services: Services, reading: Reading, *, is_inside: bool) -> Reading:
    shown = frozenset(services.tokenizer.added_ids((think.BEGIN, think.END)).values())
    return replace(
        reading,
        parser=lambda: think.ThinkParser(reading.parser(), is_inside=is_inside),
        shown_tokens=reading.shown_tokens | shown,
    )


def _forced(
    services: Services, template: ChatTemplate, body: ChatBody, tools: Sequence[Tool], *, is_inside: bool | None
) -> Reading:
    if body.continue_final_message:
        raise BadRequest(
            "'continue_final_message' goes on with a text, and 'tool_choice' asks for a call: leave one of them out.",
            param="tool_choice",
        )
    name = body.tool_choice.function.name if isinstance(body.tool_choice, NamedChoice) else None
    if name is None:
        _check_sizes(tools)
        calls = forced.required_expression(tools, is_single=not body.parallel_tool_calls)
    else:
        named = next(tool for tool in tools if tool.function.name == name)
        _check_sizes([named])
        calls = forced.named_expression(named)
    style = style_of(template, services.chat.tool_call_parser)  # whose template is to take the calls back
    return Reading(
        parser=lambda: forced.ForcedCalls.of(name),
        new_call_id=call_id if style is None else style.new_id,
        grammar=_asked(services, calls, is_inside=is_inside),
        has_calls=True,
    )


def _free(services: Services, template: ChatTemplate, tools: Sequence[Tool], *, is_inside: bool | None) -> Reading:
    style = style_of(template, services.chat.tool_call_parser)
    if style is None:
        raise _unreadable(template)
    names = frozenset(tool.function.name for tool in tools)
    mark_ids = services.tokenizer.added_ids(style.marks)
    held = None
    if any(tool.function.strict for tool in tools):
        _check_sizes([tool for tool in tools if tool.function.strict])
        held = _asked(services, style.expression(tools, strict.Marks(mark_ids)), is_inside=is_inside)
    return Reading(
        parser=lambda: style.parser(names),
        new_call_id=style.new_id,
        grammar=held,
        shown_tokens=frozenset(mark_ids.values()),
        has_calls=True,
    )


def _check_sizes(tools: Sequence[Tool]) -> None:
    """Raises BadRequest, naming the tool, where the schemas that go into one grammar are too large."""
    left = _MAX_SCHEMAS_BYTES
    for tool in tools:
        num_bytes = len(json.dumps(forced.arguments_schema(tool), ensure_ascii=False).encode())
        name, left = tool.function.name, left - num_bytes
        if num_bytes > MAX_SCHEMA_BYTES:
            raise BadRequest(
                f"The 'parameters' of the tool {name!r} have {num_bytes} bytes; calls can be held to at most "
                f"{MAX_SCHEMA_BYTES}: send a smaller schema.",
                param="tools",
            )
        if left < 0:
            raise BadRequest(
                f"With the tool {name!r} the 'parameters' of all tools that calls are held to have more than "
                f"{_MAX_SCHEMAS_BYTES} bytes; send fewer of them, or smaller ones.",
                param="tools",
            )


def _asked(services: Services, text: str, *, is_inside: bool | None) -> Asked:
    """`is_inside`: whether the answer begins in the model's reasoning; None if the model does not reason."""
    if is_inside is not None:
        marks = strict.Marks(services.tokenizer.added_ids((think.BEGIN, think.END)))
        text = strict.after_reasoning(text, marks, is_inside=is_inside)
    return Asked("tools", expression(text))


def _unreadable(template: ChatTemplate) -> BadRequest:
    if "tools" not in template.variables:
        return BadRequest(
            f"{template.owner} chat template shows the model no tools. Send 'tool_choice': 'required' or the name of "
            "one, which works with any template, or have the operator set one with --chat-template.",
            param="tools",
            code="unsupported",
        )
    styles = "|".join(sorted(STYLES))
    return BadRequest(
        f"How this model writes calls of tools is not known from {template.owner} chat template. The operator says it "
        f"with --tool-call-parser {styles}; or send 'tool_choice': 'required' or the name of one.",
        param="tools",
        code="unsupported",
    )
