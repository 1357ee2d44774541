"""A chat template: the program that makes one text of a conversation, as the model was trained to read it.

Owns what a template is given, which of it the template reads, and how a last message is left open to be continued.
Knows nothing about requests, tokens or tools beyond their names. Templates are written for transformers'
`apply_chat_template`, whose arguments and rules these are.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from server.ground.errors import BadRequest
from server.model.template_processes import TemplateFailed, TemplateProcesses

Message = Mapping[str, Any]
# What a template is always given: no request may set these.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
MAX_TEMPLATE_CHARS = 1 << 20
REFUSAL = "TemplateError"  # `TemplateFailed.kind` of what a template says by raise_exception
# Stands at the end of the message to be continued. What a template trims is the space behind it, and that shows.
_OPEN_END = "OPEN-END-OF-THE-LAST-MESSAGE "


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a prompt is made of: plain JSON, as templates read it.

    `messages`: roles, contents and what else templates know (tool_calls with arguments as objects, tool_call_id,
    reasoning_content). `is_open`: the last message is to be continued, else the assistant's turn is opened, unless
    `opens_turn` is false. `variables`: for this template alone.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    opens_turn: bool = True
    is_open: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


class ChatTemplate:
    """One template, with the special tokens that it may name. Safe for many threads; blocks while it renders."""

    def __init__(
        self,
        text: str,
        processes: TemplateProcesses,
        special_tokens: Mapping[str, Any],
        *,
        tool_text: str | None = None,
        owner: str = "the base's",
    ) -> None:
        """`tool_text`: the template for conversations with tools, where a model has one of its own for these.

        `special_tokens` as transformers names them (bos_token, ...). `owner` begins sentences: whose template it is.
        """
        self.text = text
        self.owner = owner
        self._tool_text = tool_text or text
        self._processes = processes
        self._special_tokens = dict(special_tokens)

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads and does not set. Raises BadRequest for one that is no template."""
        try:
            return frozenset().union(*(self._processes.variables(text) for text in {self.text, self._tool_text}))
        except TemplateFailed as error:
            raise self.failure(error.message, error.kind) from error

    def mentions(self, marker: str) -> bool:
        """Whether the template's own text has `marker`."""
        return marker in self.text or marker in self._tool_text

    def render(self, conversation: Conversation) -> str:
        """The prompt. Raises BadRequest naming `messages`, with the template's words where it has any."""
        messages = [_with_aliases(message) for message in conversation.messages]
        if conversation.is_open:
            messages[-1] = {**messages[-1], "content": messages[-1]["content"] + _OPEN_END}
        variables = {
            **self._special_tokens,
            **conversation.variables,
            "messages": messages,
            "tools": None if conversation.tools is None else [dict(tool) for tool in conversation.tools],
            "documents": None,
            "add_generation_prompt": conversation.opens_turn and not conversation.is_open,
        }
        text = self._render(self.text if conversation.tools is None else self._tool_text, variables)
        return self._cut_open(text) if conversation.is_open else text

    def _render(self, text: str, variables: Mapping[str, Any]) -> str:
        try:
            return self._processes.render(text, variables)
        except TemplateFailed as error:
            first = error
        # Some templates put the arguments of calls together as text, and stumble over objects.
        if first.kind == "TypeError" and any("tool_calls" in message for message in variables["messages"]):
            as_texts = [_with_text_arguments(message) for message in variables["messages"]]
            try:
                return self._processes.render(text, {**variables, "messages": as_texts})
            except TemplateFailed as error:
                raise self.failure(error.message, error.kind) from error
        raise self.failure(first.message, first.kind) from first

    def _cut_open(self, text: str) -> str:
        at = text.rfind(_OPEN_END.strip())
        if at < 0:
            raise BadRequest(
                f"{self.owner} chat template does not show the last message, so that it cannot be continued; leave "
                "'continue_final_message' out.",
                param="continue_final_message",
            )
        is_as_it_was = text[at : at + len(_OPEN_END)] == _OPEN_END
        return text[:at] if is_as_it_was else text[:at].rstrip()

    def failure(self, words: str, kind: str) -> TemplateFailed:
        failed = TemplateFailed(f"{self.owner} chat template refuses these messages: {words}", kind)
        failed.param = "messages"
        return failed


def _with_aliases(message: Message) -> dict[str, Any]:
    """With its reasoning under the other name that templates read, as transformers has it."""
    reasoning = message.get("reasoning_content")
    return {**message} if reasoning is None else {"thinking": reasoning, **message}


def _with_text_arguments(message: Message) -> dict[str, Any]:
    if "tool_calls" not in message:
        return {**message}
    calls = [{**call, "function": _text_function(call["function"])} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _text_function(function: Mapping[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
