"""A conversation as clients send it: turns, the tools that may be called, calls and what came of them.

Owns their types and limits, the checks of turns against one another, and the plain form in which chat templates read
them. Knows nothing about any one template or about how models write calls.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from server.api.errors import echo
from server.api.json_body import Body, Text, encodable, levels
from server.api.structured import check_sets_no_options
from server.ground.errors import BadRequest

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_CALLS = 128  # in one turn
MAX_DEPTH = 64  # of a schema, of arguments, of a value for a template
# OpenAI's newer name for the same turn; chat templates know the older one.
_TEMPLATE_ROLES = {"developer": "system"}
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_NO_PARAMETERS = {"type": "object", "properties": {}}


def plain_json(value: Any) -> Any:
    """Refuse what no template can be given: half characters, infinities, and nesting without end."""
    for depth, level in enumerate(levels(value)):
        if depth == MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        for item in level:
            _check_plain(item)
    return value


def _check_plain(item: Any) -> None:
    if isinstance(item, str):
        encodable(item)
    elif isinstance(item, float) and not math.isfinite(item):
        raise ValueError("it has a number that JSON does not have")


PlainObject = Annotated[dict[str, Any], AfterValidator(plain_json)]
Name = Annotated[str, Field(pattern=f"^{_TOOL_NAME.pattern}$")]  # of a tool
Speaker = Annotated[Text, Field(min_length=1, max_length=64)]  # of a turn
CallId = Annotated[Text, Field(min_length=1, max_length=256)]


def _describes_object(schema: dict[str, Any]) -> dict[str, Any]:
    """Arguments are an object."""
    if schema.get("type", "object") != "object":
        raise ValueError("must be the schema of an object: 'type' must be 'object'")
    check_sets_no_options(schema)
    return schema


class Function(Body):
    """A tool. Without `parameters` it takes none. `strict`: the model is held to them."""

    name: Name
    description: Text = ""
    parameters: Annotated[PlainObject, AfterValidator(_describes_object)] = _NO_PARAMETERS
    strict: bool = False


class Tool(Body):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As templates read it; what it is held to is not the model's business."""
        return {"type": "function", "function": self.function.model_dump(exclude={"strict"})}


class NamedFunction(Body):
    name: Name


class NamedChoice(Body):
    type: Literal["function"]
    function: NamedFunction


def _choice_form(value: object) -> str:
    return "an object" if isinstance(value, dict | NamedChoice) else "a word"


_CHOICES = "must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}"
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a word")] | Annotated[NamedChoice, Tag("an object")],
    Discriminator(_choice_form, custom_error_type="tool_choice_form", custom_error_message=_CHOICES),
]


def _arguments(text: str) -> str:
    """JSON text of an object; nothing stands for one that is empty."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise ValueError("must be the JSON text of an object; it is no JSON") from None
    if not isinstance(value, dict):
        raise ValueError("must be the JSON text of an object")
    plain_json(value)
    return text


class CalledFunction(Body):
    name: Name
    arguments: Annotated[Text, AfterValidator(_arguments)]

    def for_template(self) -> dict[str, Any]:
        return {"name": self.name, "arguments": json.loads(self.arguments or "{}")}


class ToolCall(Body):
    """A call in an assistant's turn, as an answer had it. `index` is what joined parts of a stream may carry along."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def for_template(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": self.function.for_template()}


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    """One turn. What OpenAI's own answers carry beside it may be sent back, as long as it is empty.

    Only an assistant's turn may be without content.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)]
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] = []
    reasoning_content: Text | None = None
    tool_call_id: CallId | None = None
    name: Speaker | None = None  # who speaks; in the turn that tells what came of a call, its tool

    @model_validator(mode="before")
    @classmethod
    def _empties_are_absent(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        turn = {name: value for name, value in body.items() if value or (name == "content" and value is not None)}
        return {"content": "", **_with_one_reasoning(turn)} if turn.get("role") == "assistant" else turn

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)

    def for_template(self, called: str | None) -> dict[str, Any]:
        """As templates read it. `called`: the name of the tool whose call this turn answers."""
        turn: dict[str, Any] = {"role": _TEMPLATE_ROLES.get(self.role, self.role), "content": self.text}
        if self.name:
            turn["name"] = self.name
        if self.reasoning_content:
            turn["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            turn["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.role == "tool":
            turn |= {"tool_call_id": self.tool_call_id, "name": self.name or called}
        return turn


def _with_one_reasoning(turn: dict[str, Any]) -> dict[str, Any]:
    """`reasoning` is another name of `reasoning_content`; some servers answer with both."""
    same = turn.get("reasoning_content", turn.get("reasoning"))
    if "reasoning" not in turn or turn["reasoning"] != same:
        return turn  # two different ones: the second name is refused
    return {**{name: value for name, value in turn.items() if name != "reasoning"}, "reasoning_content": same}


_ROLE_OF = {"tool_calls": "assistant", "reasoning_content": "assistant", "tool_call_id": "tool"}


def check_turns(messages: Sequence[Message]) -> None:
    """Raises BadRequest, naming the field, where turns have what others must have, or answer a call that none made."""
    known: set[str] = set()
    for index, message in enumerate(messages):
        known.update(call.id for call in message.tool_calls)
        for field, words in _problems(message, known):
            raise BadRequest(f"'messages[{index}].{field}' {words}", param=f"messages[{index}].{field}")


def _problems(message: Message, known: set[str]) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it)."""
    for field, role in _ROLE_OF.items():
        if getattr(message, field) and message.role != role:
            yield field, f"belongs into a turn of the role '{role}', and this one's is '{message.role}'."
    if message.role != "tool":
        return
    if message.name is not None and not _TOOL_NAME.fullmatch(message.name):
        yield "name", "must be a tool's name in a turn of the role 'tool': 1 to 64 letters, digits, '_', '.' and '-'."
    if message.tool_call_id is None:
        yield "tool_call_id", "is required in a turn of the role 'tool'."
    elif message.tool_call_id not in known:
        yield "tool_call_id", f"is {echo(message.tool_call_id)!r}, and no turn before it has a call of this id."


def turns_for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation as chat templates read it."""
    names = {call.id: call.function.name for message in messages for call in message.tool_calls}
    return [message.for_template(names.get(message.tool_call_id or "")) for message in messages]


def check_tools(tools: Sequence[Tool]) -> None:
    """Raises BadRequest where two tools share a name."""
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.function.name in seen:
            raise BadRequest(
                f"'tools[{index}].function.name' is {tool.function.name!r}, as another tool's is; give each its own.",
                param=f"tools[{index}].function.name",
            )
        seen.add(tool.function.name)


class ConversationBody(Body):
    """What a chat's prompt is made of."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] = []
    add_generation_prompt: bool | None = None  # whether the assistant's turn is opened; None: unless one is continued
    continue_final_message: bool = False  # the answer goes on from the last message
    chat_template_kwargs: PlainObject = {}

    @model_validator(mode="after")
    def _turns_fit(self) -> Self:
        check_turns(self.messages)
        check_tools(self.tools)
        if self.continue_final_message:
            self._check_continued()
        return self

    def _check_continued(self) -> None:
        last = self.messages[-1]
        if self.add_generation_prompt:
            raise BadRequest(
                "'continue_final_message' goes on from the last message, and 'add_generation_prompt' begins another: "
                "send one of the two.",
                param="add_generation_prompt",
            )
        if last.role != "assistant" or last.tool_calls:
            raise BadRequest(
                "'continue_final_message' needs an assistant's message without tool calls as the last one.",
                param="continue_final_message",
            )


def check_choice(choice: str | NamedChoice | None, tools: Sequence[Tool]) -> None:
    """Raises BadRequest where a call is asked for that no tool can answer."""
    if choice == "required" and not tools:
        raise BadRequest("'tool_choice' is 'required', and there are no 'tools'; send some.", param="tool_choice")
    if isinstance(choice, NamedChoice) and choice.function.name not in {tool.function.name for tool in tools}:
        raise BadRequest(
            f"'tool_choice' names {choice.function.name!r}, which is none of the 'tools'.",
            param="tool_choice.function.name",
        )


def refuse_template(extra: Mapping[str, Any]) -> None:
    """Raises BadRequest for a template in a request: it is a program, and the operator's to choose."""
    if extra.get("chat_template") is not None:
        raise BadRequest(
            "'chat_template' is not taken from requests. The operator sets it: graft serve --chat-template FILE.",
            param="chat_template",
            code="unsupported",
        )
