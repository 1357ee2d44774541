"""Reasoning, what requests may set in a template, continued messages, and adapters' own templates, over HTTP."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.ground.config import Settings
from server.ground.errors import StartupRefused
from tests.api.adapter_files import lora_files
from tests.api.conftest import Live
from tests.api.tools.chat_bases import HERMES, PLAIN, WEATHER, Pen, ask, save_base, written

Written = tuple[Live, Pen]
HI = {"role": "user", "content": "Hi"}
TEMPLATE = HERMES + "{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    marks = ("<tool_call>", "</tool_call>")
    return save_base(tmp_path_factory.mktemp("base"), TEMPLATE, special=("<think>", "</think>"), added=marks)


@pytest.fixture(scope="module")
def thinker(settings: Callable[..., Settings], base: Path) -> Iterator[Written]:
    with written(settings, base) as server:
        yield server


def message_of(answer: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = answer["choices"][0]["message"]
    return message


def prompt_of(live: Live, **fields: Any) -> str:
    answer = live.post(
        "/v1/chat/completions", **{"messages": [HI], "max_tokens": 1, "return_token_ids": True, **fields}
    )
    assert answer.status_code == 200, answer.text
    return live.server.tokenizer.decode(answer.json()["prompt_token_ids"], skip_special_tokens=False)


def refusal(live: Live, **fields: Any) -> dict[str, Any]:
    answer = live.post("/v1/chat/completions", **{"messages": [HI], "max_tokens": 1, **fields})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


# Reasoning


def test_reasoning_is_told_apart_from_the_answer(thinker: Written) -> None:
    live, pen = thinker
    pen.write("<think>\nA greeting.\n</think>\n\nHello.")
    message = message_of(ask(live))
    assert (message["reasoning_content"], message["content"]) == ("A greeting.", "Hello.")


def test_reasoning_that_the_prompt_has_begun_is_reasoning_from_the_start(thinker: Written) -> None:
    live, pen = thinker
    pen.write("A greeting.</think>Hello.")
    message = message_of(ask(live, chat_template_kwargs={"thinking": True}))
    assert (message["reasoning_content"], message["content"]) == ("A greeting.", "Hello.")


def test_an_answer_without_reasoning_has_none(thinker: Written) -> None:
    live, pen = thinker
    pen.write("Hello, <b>.")
    message = message_of(ask(live, messages=[{"role": "user", "content": "Say <think>"}]))
    assert message == {"role": "assistant", "content": "Hello, <b>.", "refusal": None}


def test_calls_come_after_reasoning(thinker: Written) -> None:
    live, pen = thinker
    pen.write('<think>Ask.</think><tool_call>{"name": "weather", "arguments": {}}</tool_call>')
    message = message_of(ask(live, tools=[WEATHER]))
    assert message["reasoning_content"] == "Ask."
    assert message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": "{}"}


def test_a_strict_tool_leaves_the_reasoning_free(thinker: Written) -> None:
    live, pen = thinker
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Rome", "days": 1}}</tool_call>'
    pen.write(f"<think>Ask.</think>{call}")
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    message = message_of(ask(live, tools=[strict], temperature=0))
    assert message["reasoning_content"] == "Ask."
    assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome", "days": 1}'


def test_a_forced_call_comes_after_the_reasoning_that_the_prompt_has_begun(thinker: Written) -> None:
    live, pen = thinker
    pen.write('Ask.</think>{"city": "Rome","days": 1}')
    choice = {"type": "function", "function": {"name": "weather"}}
    fields = {"tools": [WEATHER], "tool_choice": choice, "temperature": 0}
    message = message_of(ask(live, **fields, chat_template_kwargs={"thinking": True}))
    assert message["reasoning_content"] == "Ask."
    assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome","days": 1}'


def test_reasoning_sent_back_is_shown_to_the_template(thinker: Written) -> None:
    live, pen = thinker
    pen.write("")
    for names in (["reasoning_content"], ["reasoning"], ["reasoning", "reasoning_content"]):
        turns = [HI, {"role": "assistant", "content": "Hello.", **dict.fromkeys(names, "Hm.")}, HI]
        assert "<think>Hm.</think>Hello." in prompt_of(live, messages=turns)


# What requests set


def test_what_is_allowed_reaches_the_template(thinker: Written) -> None:
    live, pen = thinker
    pen.write("")
    assert prompt_of(live, chat_template_kwargs={"enable_thinking": False}).endswith("<think>\n\n</think>\n")
    assert prompt_of(live, reasoning_effort="low").endswith("low")
    assert prompt_of(live, chat_template_kwargs={}) == prompt_of(live)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", "--chat-template-kwargs"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template", "enable_thinking"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs", ""),
        ({"chat_template_kwargs": {"thinking": "\ud800"}}, "chat_template_kwargs", "surrogate"),
        ({"chat_template": "{{ x }}"}, "chat_template", "--chat-template FILE"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort", ""),
        ({"continue_final_message": True}, "continue_final_message", "assistant"),
        (
            {"continue_final_message": True, "add_generation_prompt": True, "messages": [HI, {"role": "assistant"}]},
            "add_generation_prompt",
            "one of the two",
        ),
    ],
)
def test_what_may_not_be_set_is_refused_by_name(
    thinker: Written, fields: dict[str, Any], param: str, words: str
) -> None:
    error = refusal(thinker[0], **fields)
    assert error["param"] == param
    assert words in error["message"]


def test_a_message_is_continued_and_a_turn_left_closed(thinker: Written) -> None:
    live, pen = thinker
    pen.write(" upon a time.")
    turns = [HI, {"role": "assistant", "content": "Once"}]
    answer = ask(live, messages=turns, continue_final_message=True, add_generation_prompt=False)
    assert message_of(answer)["content"] == " upon a time."
    assert prompt_of(live, messages=turns, continue_final_message=True).endswith("<s>assistant\nOnce")
    assert prompt_of(live, add_generation_prompt=False).endswith("Hi</s>\n")


def test_reasoning_in_a_continued_message_goes_on(thinker: Written) -> None:
    live, pen = thinker
    pen.write(" more.</think>So.")
    turns = [HI, {"role": "assistant", "content": "<think>Once"}]
    message = message_of(ask(live, messages=turns, continue_final_message=True))
    assert (message["reasoning_content"], message["content"]) == ("more.", "So.")


# The operator's word


def test_a_template_of_the_operators_takes_the_place_of_the_models(
    settings: Callable[..., Settings], base: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(PLAIN + "{% if style %}[{{ style }}]{% endif %}")
    flags = {"chat_template": own, "chat_template_kwargs": ("style",), "reasoning_parser": "none"}
    with written(settings, base, **flags) as (live, pen):
        pen.write("<think>a</think>b")
        assert prompt_of(live, chat_template_kwargs={"style": "terse"}) == "user: Hi\nassistant:[terse]"
        assert "means nothing" in refusal(live, reasoning_effort="low")["message"]
        assert refusal(live, chat_template_kwargs={"enable_thinking": False})["code"] == "unsupported"
        assert message_of(ask(live))["content"] == "ab"  # its marks are special tokens, and nobody looks for them


@pytest.mark.parametrize("text", ["{% if %}", "{{ 1 "])
def test_a_template_that_is_none_stops_the_start(
    settings: Callable[..., Settings], base: Path, tmp_path: Path, text: str
) -> None:
    broken = tmp_path / "broken.jinja"
    broken.write_text(text)
    with (
        pytest.raises(StartupRefused, match=r"--chat-template .*broken.jinja.*line 1"),
        written(settings, base, chat_template=broken),
    ):
        pass


# Adapters


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """`with-file` and `with-config` bring a template along, `without` does not, `large` one that is too large."""
    for seed, name in enumerate(("with-file", "with-config", "without", "large")):
        files = lora_files(seed)
        folder = tmp_path / "adapters" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_bytes(files.config)
        (folder / "adapter_model.safetensors").write_bytes(files.weights)
    root = tmp_path / "adapters"
    (root / "with-file" / "chat_template.jinja").write_text("[{{ messages[0].content }}]")
    (root / "with-config" / "tokenizer_config.json").write_text('{"chat_template": "({{ messages[0].content }})"}')
    (root / "without" / "tokenizer_config.json").write_text("{}")
    (root / "large" / "chat_template.jinja").write_text("x" * 300_000)
    return root


@pytest.mark.parametrize("trusts", [True, False])
def test_an_adapters_template_counts_where_it_is_trusted(
    settings: Callable[..., Settings], adapters: Path, trusts: bool
) -> None:
    with written(settings, Path(settings().model), adapters=adapters, trust_adapter_templates=trusts) as (live, pen):
        pen.write("")
        shown = {name: prompt_of(live, model=name) for name in ("tiny", "with-file", "with-config", "without")}
        uses = {
            name: live.http.get(f"/v1/adapters/{name}").json()["chat_template"]
            for name in ("with-file", "with-config", "without")
        }
        own = "<|begin|><|user|>Hi<|assistant|>"
        if trusts:
            assert shown == {"tiny": own, "with-file": "[Hi]", "with-config": "(Hi)", "without": own}
            assert uses == {"with-file": "used", "with-config": "used", "without": None}
            (adapters / "with-file" / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
            assert "with-file's chat template refuses" in refusal(live, model="with-file")["message"]
            assert "more than" in refusal(live, model="large")["message"]
            assert prompt_of(live, adapter=["with-file", "with-config"]) == own
            assert live.post("/v1/chat/completions", messages=[HI], model="nobody").status_code == 404
        else:
            assert set(shown.values()) == {own}
            assert uses == {"with-file": "ignored", "with-config": "ignored", "without": None}
