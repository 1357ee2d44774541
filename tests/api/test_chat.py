"""POST /v1/chat/completions, with OpenAI's own client wherever it can say what is meant."""

from typing import Any

import pytest
from openai.types.chat.chat_completion_chunk import Choice

from server.api.schemas import MAX_LOGPROBS
from tests.api.conftest import Live

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]


def test_an_answer_has_openais_shape(live: Live) -> None:
    answer = live.openai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=6, temperature=0)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert isinstance(choice.message.content, str)
    assert choice.message.refusal is None
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 6
    assert answer.model_extra == {"adapter": None}


def test_a_stream_says_what_the_whole_answer_says(live: Live) -> None:
    request: dict[str, Any] = {"model": "first", "messages": MESSAGES, "max_tokens": 16, "seed": 1}
    whole = live.openai.chat.completions.create(**request)
    sent = list(live.openai.chat.completions.create(**request, stream=True))
    deltas = [chunk.choices[0].delta for chunk in sent]
    assert deltas[0].role == "assistant"
    assert all(delta.role is None for delta in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in sent if chunk.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert sent[-1].choices[0].finish_reason is not None
    assert {chunk.id for chunk in sent} == {sent[0].id}
    assert {chunk.object for chunk in sent} == {"chat.completion.chunk"}
    assert all(chunk.model_extra["adapter"]["name"] == "first" for chunk in sent if chunk.model_extra)


def test_every_choice_of_a_stream_begins_with_its_role_and_ends_with_its_reason(live: Live) -> None:
    sent = live.openai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5, n=3, stream=True)
    by_choice: dict[int, list[Choice]] = {0: [], 1: [], 2: []}
    for chunk in sent:
        by_choice[chunk.choices[0].index].append(chunk.choices[0])
    for choices in by_choice.values():
        assert [choice.delta.role for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
        assert [choice.finish_reason is None for choice in choices] == [True] * (len(choices) - 1) + [False]


def test_without_a_limit_the_answer_may_fill_the_context(live: Live) -> None:
    body = live.post("/v1/chat/completions", messages=MESSAGES, ignore_eos=True).json()
    assert body["usage"]["total_tokens"] == 256
    assert body["choices"][0]["finish_reason"] == "length"


def test_max_completion_tokens_wins_over_the_older_name(live: Live) -> None:
    limits = {"max_tokens": 9, "max_completion_tokens": 3}
    body = live.post("/v1/chat/completions", messages=MESSAGES, ignore_eos=True, **limits).json()
    assert body["usage"]["completion_tokens"] == 3


def test_text_parts_are_the_same_message_as_their_text(live: Live) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    plain = [{"role": "user", "content": "a\nb"}]
    bodies = [
        live.post("/v1/chat/completions", messages=messages, max_tokens=4, temperature=0).json()
        for messages in (parts, plain)
    ]
    assert bodies[0]["usage"] == bodies[1]["usage"]
    assert bodies[0]["choices"] == bodies[1]["choices"]


def test_an_answer_can_be_sent_back_as_a_turn(live: Live) -> None:
    first = live.openai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=3)
    turns = [*MESSAGES, first.choices[0].message.model_dump(), {"role": "user", "content": "And then?"}]
    assert live.post("/v1/chat/completions", messages=turns, max_tokens=1).status_code == 200


def test_developer_is_another_word_for_system(live: Live) -> None:
    bodies = [
        live.post(
            "/v1/chat/completions", messages=[{"role": role, "content": "x"}, MESSAGES[1]], max_tokens=4, temperature=0
        ).json()
        for role in ("system", "developer")
    ]
    assert bodies[0]["choices"] == bodies[1]["choices"]


# Log-probabilities


def test_logprobs_list_tokens_with_their_bytes_and_rivals(live: Live) -> None:
    answer = live.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    listed = answer.choices[0].logprobs
    assert listed is not None
    assert listed.content is not None
    assert answer.usage is not None
    assert len(listed.content) == answer.usage.completion_tokens
    for entry in listed.content:
        assert entry.bytes is not None
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
        assert [top.logprob for top in entry.top_logprobs] == sorted(t.logprob for t in entry.top_logprobs)[::-1]
        assert entry.top_logprobs[0].logprob == entry.logprob


def test_logprobs_without_rivals(live: Live) -> None:
    body = live.post("/v1/chat/completions", messages=MESSAGES, max_tokens=3, logprobs=True, ignore_eos=True).json()
    assert [entry["top_logprobs"] for entry in body["choices"][0]["logprobs"]["content"]] == [[], [], []]


def test_streamed_logprobs_come_with_their_tokens(live: Live) -> None:
    request: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 6, "logprobs": True, "top_logprobs": 1, "seed": 1}
    whole = live.post("/v1/chat/completions", **request).json()
    sent = live.openai.chat.completions.create(model="tiny", stream=True, **request)
    listed = [chunk.choices[0].logprobs for chunk in sent]
    tokens = [entry.token for logprobs in listed if logprobs is not None for entry in logprobs.content or []]
    assert tokens == [entry["token"] for entry in whole["choices"][0]["logprobs"]["content"]]


# Refusals


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("Hello", "messages"),
        (["Hello"], "messages[0]"),
        ([{"content": "no role"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": 5}], "messages[1].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": "x", "name": ["Ada"]}], "messages[0].name"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls[0].function"),
    ],
)
def test_messages_that_mean_more_are_refused_by_name(live: Live, messages: object, param: str) -> None:
    refused = live.post("/v1/chat/completions", messages=messages)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": MAX_LOGPROBS + 1}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"echo": True}, "echo"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_fields_of_chat_have_their_limits(live: Live, fields: dict[str, object], param: str) -> None:
    refused = live.post("/v1/chat/completions", messages=MESSAGES, **fields)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
