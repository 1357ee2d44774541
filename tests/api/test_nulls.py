"""Null means the default: for every field there is, taken from the models themselves."""

from typing import Any

import pytest
from pydantic import BaseModel

from server.api.fields import BOOKKEEPING, CHAT_NEUTRAL, COMPLETION_NEUTRAL
from server.api.json_body import Body
from server.api.messages import Function, Message, Tool
from server.api.schemas import AdapterPart, ChatBody, CompletionBody, StreamOptions
from server.api.tokenize import DetokenizeBody, TokenizeChatBody, TokenizePromptBody
from tests.api.conftest import Live

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
TEXT: dict[str, Any] = {"prompt": "Hi", "max_tokens": 2}
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 2}


def optional(model: type[BaseModel]) -> list[str]:
    return [name for name, field in model.model_fields.items() if not field.is_required()]


def nulls(model: type[BaseModel]) -> dict[str, None]:
    return dict.fromkeys(optional(model))


def answered(live: Live, path: str, body: dict[str, Any]) -> list[Any]:
    """What the choices say; seeded, so that the same request says the same."""
    answer = live.post(path, seed=5, **body)
    assert answer.status_code == 200, answer.text
    return [choice.get("text", choice.get("message")) for choice in answer.json()["choices"]]


@pytest.mark.parametrize(
    ("path", "body", "model", "neutral"),
    [
        ("/v1/completions", TEXT, CompletionBody, COMPLETION_NEUTRAL),
        ("/v1/chat/completions", CHAT, ChatBody, CHAT_NEUTRAL),
    ],
    ids=["completions", "chat"],
)
def test_each_field_alone_and_all_at_once(
    live: Live, path: str, body: dict[str, Any], model: type[Body], neutral: dict[str, Any]
) -> None:
    plain = answered(live, path, body)
    names = {*optional(model), *neutral, *BOOKKEEPING, "unheard_of"} - {"seed", *body}
    assert len(names) > 30
    for name in names:
        assert answered(live, path, {**body, name: None}) == plain, name
    assert answered(live, path, {**body, **dict.fromkeys(names)}) == plain


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", {**TEXT, "max_tokens": None}), ("/v1/chat/completions", {**CHAT, "seed": None})],
)
def test_the_fields_that_the_others_were_compared_with(live: Live, path: str, body: dict[str, Any]) -> None:
    assert live.post(path, **body).status_code == 200


@pytest.mark.parametrize(
    "part",
    [
        {"adapter": {"name": "first", **nulls(AdapterPart)}},
        {"adapter": [{"name": "first", **nulls(AdapterPart)}]},
        {"messages": [{**MESSAGES[0], **nulls(Message)}]},
        {"tools": [{**TOOL, **nulls(Tool), "function": {"name": "f", **nulls(Function)}}], "tool_choice": "none"},
    ],
    ids=lambda part: next(iter(part)),
)
def test_the_fields_of_what_is_within(live: Live, part: dict[str, Any]) -> None:
    bare = _without_nulls(part)
    assert bare != part or "tools" in part
    path = "/v1/chat/completions"
    assert answered(live, path, {**CHAT, **part}) == answered(live, path, {**CHAT, **bare})


def test_the_options_of_a_stream(live: Live) -> None:
    for name in optional(StreamOptions):
        answer = live.post("/v1/completions", **TEXT, stream=True, stream_options={name: None})
        assert answer.status_code == 200
        assert '"usage"' not in answer.text


def test_the_bodies_of_the_tokenizers_routes(live: Live) -> None:
    assert live.post("/tokenize", prompt="Hi", **nulls(TokenizePromptBody)).status_code == 200
    assert live.post("/tokenize", **nulls(TokenizeChatBody), messages=MESSAGES).status_code == 200
    assert live.post("/detokenize", tokens=[65], **nulls(DetokenizeBody)).status_code == 200


@pytest.mark.parametrize(("path", "name"), [("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")])
def test_what_has_no_default_is_missing_when_it_is_null(live: Live, path: str, name: str) -> None:
    error = live.post(path, **{name: None}).json()["error"]
    assert (error["code"], error["param"]) == ("missing_field", name)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
