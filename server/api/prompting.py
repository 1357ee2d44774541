"""From a chat's body to its prompt: which template, what it is given, and what may not be asked of it.

Owns the sentences for what a template has no place for. Knows nothing about sequences, or how answers are read beyond
asking for it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from anyio import CapacityLimiter, to_thread
from starlette.concurrency import run_in_threadpool

from server.api.adapter_templates import AdapterTemplates
from server.api.errors import echo
from server.api.messages import ConversationBody, Tool, turns_for_template
from server.api.schemas import ChatBody
from server.api.selection import chosen_parts, look_elsewhere
from server.api.services import Services
from server.api.tools import think
from server.api.tools.reading import Reading, reading_of
from server.ground.errors import BadRequest
from server.model.chat_template import REFUSAL, ChatTemplate, Conversation, Message
from server.model.template_processes import TemplateFailed

_MAX_AT_ONCE = 4  # fewer templates are rendered at once; what waits for one must not take the threads of all else


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A chat's prompt, and how its answer is read."""

    prompt_ids: list[int]
    reading: Reading


class Planner:
    """Makes plans. Templates and tokenizing are off the event loop."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._templates = AdapterTemplates(services)
        self._threads = CapacityLimiter(_MAX_AT_ONCE)
        self._threads_of_adapters = CapacityLimiter(_MAX_AT_ONCE)

    async def plan(self, body: ChatBody, *, is_bound: bool) -> ChatPlan:
        """`is_bound`: a grammar of the request's own holds the answer. Raises BadRequest naming the field."""
        own = await self._own_template(body)
        threads = self._threads if own is None else self._threads_of_adapters
        return await to_thread.run_sync(self._plan, body, own, is_bound, limiter=threads)

    async def _own_template(self, body: ChatBody) -> ChatTemplate | None:
        """That of the adapter, where the operator trusts them: of a request for one adapter alone."""
        if not self._services.chat.trusts_adapter_templates:
            return None
        parts = chosen_parts(self._services, body.model, body.adapters)
        await look_elsewhere(self._services, (spec for spec, _ in parts))
        return await run_in_threadpool(self._templates.find, parts[0][0]) if len(parts) == 1 else None

    def _plan(self, body: ChatBody, own: ChatTemplate | None, is_bound: bool) -> ChatPlan:
        services = self._services
        template = own or services.tokenizer.chat_template
        if template is None:
            raise BadRequest("this base has no chat template; use /v1/completions", param="messages")
        text = rendered(template, body, services.chat.template_variables)
        reading = reading_of(services, template, body, is_thinking=_is_thinking(body, text), is_bound=is_bound)
        return ChatPlan(services.tokenizer.encode(text, add_special_tokens=False), reading)


def _is_thinking(body: ConversationBody, text: str) -> bool:
    """Whether the prompt leaves the model in the middle of its reasoning."""
    is_left_open = body.continue_final_message and think.is_left_open(body.messages[-1].text)
    return is_left_open or think.is_open(text)


def rendered(template: ChatTemplate, body: ChatBody, allowed: frozenset[str]) -> str:
    """The prompt. A template without a place for tools is shown them in a system message, or in the first question."""
    conversation = _conversation(template, body, allowed)
    if not body.callable_tools or "tools" in template.variables:
        return template.render(conversation)
    said = _description(body.callable_tools)
    turns = conversation.messages
    try:
        return template.render(replace(conversation, messages=_with_system(turns, said)))
    except TemplateFailed as error:
        question = next((at for at, turn in enumerate(turns) if turn["role"] == "user"), None)
        if error.kind != REFUSAL or turns[0]["role"] == "system" or question is None:
            raise
    return template.render(replace(conversation, messages=_with_question(turns, question, said)))


def _conversation(template: ChatTemplate, body: ChatBody, allowed: frozenset[str]) -> Conversation:
    variables = dict(_variables(template, body.chat_template_kwargs, allowed))
    if body.reasoning_effort is not None:
        _check_known(template, "reasoning_effort", "reasoning_effort")
        variables["reasoning_effort"] = body.reasoning_effort
    _check_calls(template, body)
    return Conversation(
        turns_for_template(body.messages),
        [tool.for_template() for tool in body.callable_tools] or None,
        opens_turn=body.add_generation_prompt is not False,
        is_open=body.continue_final_message,
        variables=variables,
    )


def _variables(template: ChatTemplate, asked: dict[str, Any], allowed: frozenset[str]) -> dict[str, Any]:
    """What a request sets in the template. Switching off what a template does not have changes nothing, and passes."""
    for name, value in asked.items():
        field = f"chat_template_kwargs.{echo(name)}"
        if name not in allowed:
            listed = ", ".join(sorted(allowed)) or "none"
            raise BadRequest(
                f"'{field}' cannot be set by requests; those that can are: {listed}. The operator adds to them with "
                "--chat-template-kwargs.",
                param=field,
                code="unsupported",
            )
        if value is not False and value is not None:
            _check_known(template, name, field)
    return asked


def _check_known(template: ChatTemplate, name: str, field: str) -> None:
    if name not in template.variables:
        raise BadRequest(
            f"'{field}' means nothing to {template.owner} chat template; leave it out.", param=field, code="unsupported"
        )


def _check_calls(template: ChatTemplate, body: ConversationBody) -> None:
    """A template that does not read the calls of earlier turns would leave them out in silence."""
    if template.mentions("tool_calls"):
        return
    for index, message in enumerate(body.messages):
        if message.tool_calls:
            raise BadRequest(
                f"{template.owner} chat template has no place for 'tool_calls'; say in 'content' what was called, or "
                "have the operator set another template with --chat-template.",
                param=f"messages[{index}].tool_calls",
                code="unsupported",
            )


def _description(tools: Sequence[Tool]) -> str:
    """The tools, for a template that has no place for them."""
    listed = "\n".join(json.dumps(tool.for_template()["function"], ensure_ascii=False) for tool in tools)
    return f"You can call these functions. Answer with nothing but the JSON of the call.\n{listed}"


def _with_system(turns: Sequence[Message], said: str) -> list[Message]:
    if turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{said}"}, *turns[1:]]
    return [{"role": "system", "content": said}, *turns]


def _with_question(turns: Sequence[Message], at: int, said: str) -> list[Message]:
    asked = {**turns[at], "content": f"{said}\n\n{turns[at]['content']}"}
    return [*turns[:at], asked, *turns[at + 1 :]]
