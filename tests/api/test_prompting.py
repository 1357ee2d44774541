"""How a chat's body becomes its prompt, where the template has no place for what it says."""

from collections.abc import Iterator
from typing import Any

import pytest

from server.api.prompting import rendered
from server.api.schemas import ChatBody
from server.model.chat_template import ChatTemplate
from server.model.template_processes import TemplateFailed, TemplateProcesses

SHOWN = "{% for m in messages %}{{ '[' + m.role + (' ' + m.name if m.name else '') + ']' + m.content }}{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}" + SHOWN
)
TOOLS = [{"type": "function", "function": {"name": "clock"}}]
HI = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def processes() -> Iterator[TemplateProcesses]:
    found = TemplateProcesses()
    yield found
    found.close()


def prompt(processes: TemplateProcesses, text: str, messages: list[dict[str, Any]], **fields: Any) -> str:
    body = ChatBody.model_validate({"messages": messages, "tools": TOOLS, **fields})
    return rendered(ChatTemplate(text, processes, {}), body, frozenset())


def test_where_system_messages_are_refused_tools_stand_before_the_first_question(processes: TemplateProcesses) -> None:
    shown = prompt(processes, NO_SYSTEM, [HI, {"role": "assistant", "content": "Yes?"}, HI])
    assert shown.startswith("[user]You can call")
    assert shown.endswith('\n{"name": "clock", "description": "", "parameters": {"type": "object", "properties": {}}}'
                          "\n\nHi[assistant]Yes?[user]Hi")  # fmt: skip
    assert prompt(processes, SHOWN, [HI]).startswith("[system]You can call")


def test_what_the_client_itself_has_sent_is_refused_in_the_templates_words(processes: TemplateProcesses) -> None:
    with pytest.raises(TemplateFailed, match="System role not supported"):
        prompt(processes, NO_SYSTEM, [{"role": "system", "content": "Be brief."}, HI])
    with pytest.raises(TemplateFailed, match="not this"):
        prompt(processes, NO_SYSTEM, [{"role": "assistant", "content": "no"}, HI], tool_choice="none")


def test_a_turn_of_any_role_may_say_who_speaks(processes: TemplateProcesses) -> None:
    turns = [{"role": role, "content": "x", "name": f"a {role}"} for role in ("system", "user", "assistant")]
    turns.append({"role": "developer", "content": "x", "name": "ü" * 64})
    shown = prompt(processes, SHOWN, turns, tool_choice="none")
    assert shown == f"[system a system]x[user a user]x[assistant a assistant]x[system {'ü' * 64}]x"
