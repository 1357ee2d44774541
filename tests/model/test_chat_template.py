"""A conversation becomes the text that transformers makes of it."""

from typing import Any

import pytest

from server.ground.errors import BadRequest
from server.model.chat_template import Conversation
from server.model.tokenizer import Tokenizer
from tests.api.tools.chat_bases import HERMES, LLAMA, PLAIN, WEATHER, tokenizer

CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rom\u0113", "days": 1}}}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "Hi <é> & \u2028"},
    {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [CALL]},
    {"role": "tool", "content": "Sunny", "tool_call_id": "a", "name": "weather"},
]
HABITS = """\
{#- a comment #}
{%- macro line(m) -%}{{ m.role }}: {{ m.content | trim }}{%- endmacro -%}
{% set ns = namespace(last=none) %}
{% for m in messages %}
    {% if m.role == 'tool' %}{% continue %}{% endif %}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {{ line(m) }}
    {% generation %}<{{ m.role }}>{% endgeneration %}
    {% set ns.last = m %}
{% endfor %}
{{ ns.last.role }} {{ dict(a=1) | tojson }} {{ messages[0] | tojson(indent=2) }} {{ bos_token }} {{ tools is none }}
"""


@pytest.mark.parametrize("text", [HERMES, LLAMA, PLAIN, HABITS], ids=["hermes", "llama", "plain", "habits"])
@pytest.mark.parametrize("opens_turn", [True, False])
@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["no-tools", "tools"])
def test_the_prompt_is_that_of_transformers(text: str, opens_turn: bool, tools: list[Any] | None) -> None:
    raw = tokenizer(text)
    template = RENDERER.template(text, "the base's")
    wanted = raw.apply_chat_template(TURNS, tools=tools, tokenize=False, add_generation_prompt=opens_turn)
    assert template.render(Conversation(TURNS, tools, opens_turn)) == wanted


@pytest.mark.parametrize("content", ["Once", "Once ", " a\n\n", "", "</s>"])
@pytest.mark.parametrize("text", [HERMES, HABITS.replace("loop.index > 2", "false")], ids=["plain", "trimmed"])
def test_a_message_is_continued_as_transformers_does_it(text: str, content: str) -> None:
    turns = [*TURNS[:2], {"role": "assistant", "content": content}]
    raw = tokenizer(text)
    wanted = raw.apply_chat_template(turns, tokenize=False, continue_final_message=True)
    assert RENDERER.template(text, "the base's").render(Conversation(turns, is_open=True)) == wanted


def test_a_template_that_hides_the_last_message_cannot_continue_it() -> None:
    template = RENDERER.template("{{ messages[0].content }}", "the base's")
    with pytest.raises(BadRequest, match="cannot be continued") as refused:
        template.render(Conversation(TURNS[:2], is_open=True))
    assert refused.value.param == "continue_final_message"


def test_arguments_are_text_for_a_template_that_wants_text() -> None:
    wants_text = RENDERER.template("{{ messages[2].tool_calls[0].function.arguments + '!' }}", "the base's")
    assert wants_text.render(Conversation(TURNS)) == '{"city": "Rom\u0113", "days": 1}!'


def test_a_model_may_have_a_template_of_its_own_for_tools() -> None:
    raw = tokenizer(PLAIN)
    raw.chat_template = {"default": "default", "tool_use": "{{ tools | length }} tools"}
    own = Tokenizer(raw, frozenset())
    assert own.chat_template is not None
    assert own.chat_template.render(Conversation(TURNS)) == "default"
    assert own.chat_template.render(Conversation(TURNS, [WEATHER])) == "1 tools"
    assert own.chat_template.variables == {"tools"}


def test_a_refusal_has_the_templates_words_and_its_owner() -> None:
    template = RENDERER.template("{{ raise_exception('roles must alternate') }}", "the adapter legal's")
    with pytest.raises(
        BadRequest, match="the adapter legal's chat template refuses .*: roles must alternate"
    ) as refused:
        template.render(Conversation(TURNS))
    assert refused.value.param == "messages"


RENDERER = Tokenizer(tokenizer(PLAIN), frozenset())
