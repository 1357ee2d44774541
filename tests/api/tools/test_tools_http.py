"""Tools over HTTP: what the model is shown, what comes out of what it writes, and what is refused."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from server.ground.config import Settings
from tests.api.conftest import Live
from tests.api.tools.chat_bases import (
    CLOCK,
    HERMES,
    LLAMA,
    MISTRAL,
    PLAIN,
    WEATHER,
    Pen,
    ask,
    save_base,
    tokenizer,
    written,
)

Written = tuple[Live, Pen]
TOOLS = [WEATHER, CLOCK]
ARGUMENTS = '{"city": "Rome", "days": 1}'
CALL_OF_HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
MARKS = {
    "llama": ("<|python_tag|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "hermes": save_base(folder / "hermes", HERMES, added=("<tool_call>", "</tool_call>", "<think>", "</think>")),
        "llama": save_base(folder / "llama", LLAMA, special=MARKS["llama"]),
        "mistral": save_base(folder / "mistral", MISTRAL, special=MARKS["mistral"]),
        "plain": save_base(folder / "plain", PLAIN),
    }


@pytest.fixture(scope="module")
def server_of(settings: Callable[..., Settings], bases: dict[str, Path]) -> Iterator[Callable[[str], Written]]:
    """The server of a style, started when a test first needs it."""
    with ExitStack() as servers:
        yield cache(lambda style: servers.enter_context(written(settings, bases[style])))


@pytest.fixture(scope="module")
def hermes(server_of: Callable[[str], Written]) -> Written:
    return server_of("hermes")


@pytest.fixture(scope="module")
def plain(server_of: Callable[[str], Written]) -> Written:
    return server_of("plain")


def message_of(answer: dict[str, Any], index: int = 0) -> dict[str, Any]:
    message: dict[str, Any] = answer["choices"][index]["message"]
    return message


def called(answer: dict[str, Any], index: int = 0) -> list[tuple[str, str]]:
    calls = message_of(answer, index).get("tool_calls", [])
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def refusal(live: Live, **fields: Any) -> dict[str, Any]:
    answer = live.post("/v1/chat/completions", **{"messages": [{"role": "user", "content": "Hi"}], **fields})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


# Answers


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("hermes", f'Let me see.\n{CALL_OF_HERMES}\n<tool_call>{{"name": "clock"}}</tool_call>'),
        (
            "mistral",
            f'Let me see. [TOOL_CALLS][{{"name": "weather", "arguments": {ARGUMENTS}}}, '
            '{"name": "clock", "arguments": {}}]',
        ),
        pytest.param(
            "mistral",
            f"Let me see.[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]clock[ARGS]{{}}",
            marks=pytest.mark.slow,
        ),
        (
            "llama",
            f'Let me see.<|python_tag|>{{"name": "weather", "parameters": {ARGUMENTS}}}; '
            '{"name": "clock", "parameters": {}}',
        ),
    ],
)
def test_each_style_is_known_by_its_template_and_its_calls_come_out(
    server_of: Callable[[str], Written], style: str, text: str
) -> None:
    live, pen = server_of(style)
    pen.write(text)
    answer = ask(live, tools=TOOLS)
    assert message_of(answer)["content"] == "Let me see."
    assert called(answer) == [("weather", ARGUMENTS), ("clock", "{}")]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    ids = [call["id"] for call in message_of(answer)["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(len(i) == 9 if style == "mistral" else i.startswith("call_") for i in ids)


def test_without_text_beside_the_calls_content_is_null(hermes: Written) -> None:
    live, pen = hermes
    pen.write(CALL_OF_HERMES)
    assert message_of(ask(live, tools=TOOLS))["content"] is None


def test_an_answer_without_calls_is_an_answer(hermes: Written) -> None:
    live, pen = hermes
    pen.write(" It is noon. ")
    answer = ask(live, tools=TOOLS)
    assert message_of(answer) == {"role": "assistant", "content": " It is noon. ", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_choices_call_each_for_itself(hermes: Written) -> None:
    live, pen = hermes
    pen.write(CALL_OF_HERMES, "No need.", '<tool_call>{"name": "clock"}</tool_call>')
    answer = ask(live, tools=TOOLS, n=3)
    assert [called(answer, index) for index in range(3)] == [[("weather", ARGUMENTS)], [], [("clock", "{}")]]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["tool_calls", "stop", "tool_calls"]


def test_without_parallel_calls_an_answer_ends_with_its_first(hermes: Written) -> None:
    live, pen = hermes
    pen.write(f"{CALL_OF_HERMES}{CALL_OF_HERMES} and so on", "a longer answer than the call is, so that it ends later")
    answer = ask(live, tools=TOOLS, n=2, parallel_tool_calls=False, max_tokens=200)
    assert called(answer) == [("weather", ARGUMENTS)]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert message_of(answer, 1)["content"].endswith("ends later")
    tokens = [live.server.tokenizer.encode(text) for text in (CALL_OF_HERMES, message_of(answer, 1)["content"])]
    assert answer["usage"]["completion_tokens"] < sum(map(len, tokens)), "the first ended before its last tokens"


def test_a_call_that_is_cut_off_says_so(hermes: Written) -> None:
    live, pen = hermes
    pen.write(CALL_OF_HERMES)
    answer = ask(live, tools=TOOLS, max_tokens=8)
    assert answer["choices"][0]["finish_reason"] == "length"
    ((name, arguments),) = called(answer)
    assert name == "weather"
    assert ARGUMENTS.startswith(arguments)
    assert arguments != ARGUMENTS


def test_without_calling_allowed_the_model_sees_no_tools_and_its_text_is_left_alone(hermes: Written) -> None:
    live, pen = hermes
    pen.write(CALL_OF_HERMES)
    answers = [ask(live, return_token_ids=True), ask(live, return_token_ids=True, tools=TOOLS, tool_choice="none")]
    assert [message_of(answer)["content"] for answer in answers] == [CALL_OF_HERMES] * 2
    assert answers[0]["prompt_token_ids"] == answers[1]["prompt_token_ids"]


def test_logprobs_and_ids_come_beside_calls(hermes: Written) -> None:
    live, pen = hermes
    pen.write(CALL_OF_HERMES)
    answer = ask(live, tools=TOOLS, logprobs=True, return_token_ids=True)
    ids = live.server.tokenizer.encode(CALL_OF_HERMES, add_special_tokens=False)
    assert answer["choices"][0]["token_ids"][: len(ids)] == ids
    assert len(answer["choices"][0]["logprobs"]["content"]) == len(ids) + 1  # the end's, too


# Prompts

CONVERSATION = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
        ],
    },
    {"role": "tool", "tool_call_id": "abcdef123", "content": "Sunny."},
    {"role": "user", "content": "And now?"},
]


@pytest.mark.parametrize(
    ("style", "template"),
    [("hermes", HERMES), ("llama", LLAMA), ("mistral", MISTRAL)],
    ids=["hermes", "llama", "mistral"],
)
def test_the_model_is_shown_tools_calls_and_results_as_transformers_shows_them(
    server_of: Callable[[str], Written], style: str, template: str
) -> None:
    live, pen = server_of(style)
    pen.write("Yes.")
    answer = ask(live, messages=CONVERSATION, tools=[WEATHER], return_token_ids=True)
    shown = live.server.tokenizer.decode(answer["prompt_token_ids"], skip_special_tokens=False)
    arguments = ARGUMENTS if style == "mistral" else json.loads(ARGUMENTS)
    turns: list[Any] = [dict(turn) for turn in CONVERSATION]
    turns[1] |= {
        "content": "",
        "tool_calls": [
            {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        ],
    }
    turns[2] |= {"name": "weather"}
    raw = tokenizer(template, MARKS.get(style, ()))
    assert shown == raw.apply_chat_template(turns, tools=[WEATHER], tokenize=False, add_generation_prompt=True)
    assert "Sunny." in shown
    assert '"days": 1' in shown


def test_an_answer_with_calls_can_be_sent_back(hermes: Written) -> None:
    live, pen = hermes
    pen.write(CALL_OF_HERMES)
    first = live.openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}], tools=TOOLS)
    message = first.choices[0].message
    assert message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny."}
    pen.write("Sunny, then.")
    turns = [{"role": "user", "content": "Hi"}, message.model_dump(), result]
    assert message_of(ask(live, messages=turns, tools=TOOLS))["content"] == "Sunny, then."


# Forced calls


@pytest.fixture
def free(plain: Written, monkeypatch: pytest.MonkeyPatch) -> Live:
    """A model that writes what it likes, whose template knows nothing of tools."""
    live, pen = plain
    monkeypatch.setattr(live.server.runner, "run", pen.unled)
    return live


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_named_tool_is_called_as_it_wants_to_be(free: Live, temperature: float) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = ask(free, tools=TOOLS, tool_choice=choice, temperature=temperature, seed=1, n=2)
    for index in range(2):
        ((name, arguments),) = called(answer, index)
        assert name == "weather"
        jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])
        assert answer["choices"][index]["finish_reason"] == "tool_calls"
        assert message_of(answer, index)["content"] is None


def test_some_tool_is_called_where_one_must_be(free: Live) -> None:
    answer = ask(free, tools=[WEATHER], tool_choice="required", seed=3, parallel_tool_calls=False)
    ((name, arguments),) = called(answer)
    assert name == "weather"
    jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])


def test_calls_that_are_forced_have_ids_that_the_template_takes_back(server_of: Callable[[str], Written]) -> None:
    live, pen = server_of("mistral")
    for choice, text in (("required", '[{"name": "clock", "parameters": {}}]'), (function(name="clock"), "{}")):
        pen.write(text)
        answer = ask(live, tools=TOOLS, tool_choice=choice, temperature=0)
        (call,) = message_of(answer)["tool_calls"]
        assert len(call["id"]) == 9


def test_a_tool_that_takes_nothing_is_given_nothing(free: Live) -> None:
    answer = ask(free, tools=[CLOCK], tool_choice=function(name="clock"), temperature=1, seed=1)
    ((_, arguments),) = called(answer)
    assert json.loads(arguments) == {}


def test_a_model_without_a_place_for_tools_is_told_of_them(plain: Written) -> None:
    live, pen = plain
    pen.write('[{"name": "clock", "parameters": {}}]')
    answer = ask(live, tools=TOOLS, tool_choice="required", return_token_ids=True)
    assert called(answer) == [("clock", "{}")]
    shown = live.server.tokenizer.decode(answer["prompt_token_ids"])
    assert "Tells the weather." in shown
    assert shown.index("clock") < shown.index("user: Hi")


def test_a_strict_tool_is_called_as_it_wants_to_be_or_not_at_all(hermes: Written) -> None:
    """The pen would write a city that is too long and a day that there is not."""
    live, pen = hermes
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    pen.write('<tool_call>{"name": "weather", "arguments": {"city": "Constantinople", "days": 9}}</tool_call>')
    ((name, arguments),) = called(ask(live, tools=[strict, CLOCK], temperature=0))
    assert name == "weather"
    jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])
    pen.write("No call, then.")
    assert message_of(ask(live, tools=[strict, CLOCK], temperature=0))["content"] == "No call, then."


# Refusals


@pytest.mark.slow
def test_a_template_of_no_known_style_names_the_flag(
    plain: Written, settings: Callable[..., Settings], bases: dict[str, Path], tmp_path: Path
) -> None:
    error = refusal(plain[0], tools=TOOLS)
    assert error["param"] == "tools"
    assert "--chat-template" in error["message"]
    template = tmp_path / "own.jinja"
    template.write_text("{{ tools | tojson }}{{ messages[0].content }}")
    flags: dict[str, Any] = {"chat_template": template}
    with written(settings, bases["plain"], **flags) as (live, _):
        assert "--tool-call-parser" in refusal(live, tools=TOOLS)["message"]
    with written(settings, bases["plain"], **flags, tool_call_parser="hermes") as (live, pen):
        pen.write(CALL_OF_HERMES)
        assert called(ask(live, tools=TOOLS)) == [("weather", ARGUMENTS)]


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


LARGE = {"description": "x" * (64 << 10)}
DEEP: Any = {}
for _ in range(100):
    DEEP = {"properties": DEEP}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [function(name="two words")]}, "tools[0].function.name"),
        ({"tools": [function(), function()]}, "tools[1].function.name"),
        ({"tools": [function(parameters=5)]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters=DEEP)]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters={"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters={"x-guidance": {}})]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters={"a": "\ud800"})]}, "tools[0].function.parameters"),
        ({"tools": [function(colour="red")]}, "tools[0].function.colour"),
        ({"tools": [function(name=f"f{i}") for i in range(129)]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": [function()], "tool_choice": function(name="g")}, "tool_choice.function.name"),
        ({"tools": [function()], "response_format": {"type": "json_object"}}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        (
            {"tools": [function(parameters={"$ref": "#/nowhere"})], "tool_choice": "required"},
            "tools",
        ),
        ({"tools": [function(parameters=LARGE)], "tool_choice": "required"}, "tools"),
        ({"tools": [function(parameters=LARGE)], "tool_choice": function()}, "tools"),
        ({"tools": [function(parameters=LARGE, strict=True)]}, "tools"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_tools_that_cannot_be_are_refused_by_name(hermes: Written, fields: dict[str, Any], param: str) -> None:
    assert refusal(hermes[0], **fields)["param"] == param


def test_schemas_that_are_too_large_for_a_grammar_are_named(hermes: Written) -> None:
    live, pen = hermes
    pen.write("Fine.")
    tools = [function(parameters=LARGE)]
    assert "'f' have 65" in refusal(live, tools=tools, tool_choice="required")["message"]
    many = [function(name=f"f{i}", parameters={"description": "x" * (60 << 10)}) for i in range(5)]
    assert "With the tool 'f4'" in refusal(live, tools=many, tool_choice="required")["message"]
    assert message_of(ask(live, tools=tools, tool_choice="none"))["content"] == "Fine."


def test_the_older_fields_point_to_the_newer(hermes: Written) -> None:
    assert "'tools'" in refusal(hermes[0], functions=[{"name": "f"}])["message"]
    assert "'tool_choice'" in refusal(hermes[0], function_call={"name": "f"})["message"]


def turn(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", **fields}]


def a_call(**fields: Any) -> dict[str, Any]:
    return {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}", **fields}}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (turn(tool_calls=[a_call(arguments="{")]), "messages[1].tool_calls[0].function.arguments"),
        (turn(tool_calls=[a_call(arguments="[]")]), "messages[1].tool_calls[0].function.arguments"),
        ([{"role": "user", "content": "x", "tool_calls": [a_call()]}], "messages[0].tool_calls"),
        ([{"role": "tool", "content": "x", "tool_call_id": "a"}], "messages[0].tool_call_id"),
        ([*turn(tool_calls=[a_call()]), {"role": "tool", "content": "x"}], "messages[2].tool_call_id"),
        ([{"role": "user", "content": "x", "tool_call_id": "a"}], "messages[0].tool_call_id"),
        ([{"role": "user", "content": "x", "reasoning_content": "a"}], "messages[0].reasoning_content"),
        ([{"role": "user", "content": "x", "reasoning": "a"}], "messages[0].reasoning"),
        (turn(reasoning="a", reasoning_content="b"), "messages[1].reasoning"),
        ([{"role": "user", "content": "x", "name": "a" * 65}], "messages[0].name"),
        ([{"role": "user", "content": "x", "name": "\ud800"}], "messages[0].name"),
        (
            [*turn(tool_calls=[a_call()]), {"role": "tool", "content": "x", "tool_call_id": "a", "name": "two words"}],
            "messages[2].name",
        ),
        ([{"role": "user", "content": "x", "list_of": 1}], "messages[0].list_of"),
        ([{"role": "user", "content": "x", "str": 1}], "messages[0].str"),
        ([{"role": "user", "content": "x", "my-own": 1}], "messages[0].my-own"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0].text"),
    ],
)
def test_turns_that_do_not_fit_are_refused_by_name(hermes: Written, messages: list[Any], param: str) -> None:
    assert refusal(hermes[0], messages=messages)["param"] == param


def test_calls_that_a_template_would_leave_out_are_refused(plain: Written) -> None:
    error = refusal(plain[0], messages=turn(tool_calls=[a_call()]))
    assert error["param"] == "messages[1].tool_calls"
