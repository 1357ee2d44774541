"""Which request fields are understood, which pass because they change nothing, and which are refused by name."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.api.fields import BOOKKEEPING, CHAT_NEUTRAL, COMPLETION_NEUTRAL
from server.api.schemas import (
    MAX_CHOICES,
    MAX_INT,
    MAX_LOGPROBS,
    MAX_PROMPTS,
    MAX_SEQUENCES,
    MAX_STOP_CHARS,
    MAX_STOPS,
    CompletionBody,
)
from server.ground.config import Settings
from tests.api.conftest import Live, serving
from tests.models import byte_tokenizer

COMPLETION = ("/v1/completions", {"prompt": "Hi", "max_tokens": 1})
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1})
BOTH = pytest.mark.parametrize("kind", [COMPLETION, CHAT], ids=["completions", "chat"])
Kind = tuple[str, dict[str, Any]]


def refusal(live: Live, kind: Kind, **fields: Any) -> dict[str, Any]:
    path, body = kind
    answer = live.post(path, **{**body, **fields})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


@BOTH
def test_bookkeeping_passes(live: Live, kind: Kind) -> None:
    path, body = kind
    assert live.post(path, **body, **dict.fromkeys(BOOKKEEPING, "anything")).status_code == 200


@pytest.mark.parametrize(
    ("kind", "neutral"), [(COMPLETION, COMPLETION_NEUTRAL), (CHAT, CHAT_NEUTRAL)], ids=["completions", "chat"]
)
def test_features_that_are_switched_off_pass(live: Live, kind: Kind, neutral: dict[str, tuple[Any, ...]]) -> None:
    path, body = kind
    for off in (0, -1):
        answer = live.post(path, **body, **{name: values[off] for name, values in neutral.items()})
        assert answer.status_code == 200, answer.text


@BOTH
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guided_json", {"type": "object"}),
        ("bad_words", ["no"]),
        ("prompt_logprobs", 1),
        ("use_beam_search", True),
        ("suffix", "end"),
        ("adapter_id", "first"),
        ("lora_path", "first"),
        ("max_token", 5),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(live: Live, kind: Kind, field: str, value: object) -> None:
    error = refusal(live, kind, **{field: value})
    assert error["param"] == field
    assert error["code"] == "unsupported"
    assert field in error["message"]


@BOTH
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "0.5"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", MAX_INT + 1),
        ("top_k", 10**400),
        ("max_tokens", 10**400),
        ("seed", 10**400),
        ("n", 10**400),
        ("temperature", 10**400),
        ("max_tokens", -1),
        ("max_tokens", 2.0),
        ("max_tokens", True),
        ("n", 0),
        ("n", MAX_CHOICES + 1),
        ("seed", 2**63),
        ("seed", "x"),
        ("stop", ["x"] * (MAX_STOPS + 1)),
        ("stop", 5),
        ("stream", "true"),
        ("ignore_eos", 1),
        ("model", 5),
        ("adapter", 5),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_values_out_of_range_or_of_another_kind_are_refused(live: Live, kind: Kind, field: str, value: object) -> None:
    assert refusal(live, kind, **{field: value})["param"] == field


@BOTH
def test_a_number_that_is_too_large_is_told_the_limit(live: Live, kind: Kind) -> None:
    assert str(MAX_INT) in refusal(live, kind, top_k=10**400)["message"]
    assert str(2**63 - 1) in refusal(live, kind, seed=10**400)["message"]
    path, body = kind
    assert live.post(path, **{**body, "top_k": MAX_INT, "seed": 2**63 - 1}).status_code == 200


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        (COMPLETION, {"prompt": "\ud800"}, "prompt"),
        (COMPLETION, {"prompt": ["fine", "\ud800"]}, "prompt"),
        (COMPLETION, {"model": "\ud800"}, "model"),
        (COMPLETION, {"adapter": "\ud800"}, "adapter"),
        (COMPLETION, {"stop": ["\ud800"]}, "stop[0]"),
        (COMPLETION, {"\ud800": 1}, None),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
            "messages[0].content[0].text",
        ),
        (CHAT, {"messages": [{"role": "\ud800", "content": "x"}]}, "messages[0].role"),
    ],
    ids=ascii,
)
def test_half_of_a_surrogate_pair_is_refused_by_name(live: Live, kind: Kind, fields: Any, param: str | None) -> None:
    error = refusal(live, kind, **fields)
    assert error["param"] == param
    assert "surrogate" in error["message"]


@BOTH
def test_stop_strings_are_neither_empty_nor_endless(live: Live, kind: Kind) -> None:
    for stop in ("", "x" * (MAX_STOP_CHARS + 1)):
        assert refusal(live, kind, stop=["fine", stop])["param"] == "stop[1]"


@BOTH
def test_stream_options_need_a_stream(live: Live, kind: Kind) -> None:
    assert refusal(live, kind, stream_options={"include_usage": True})["param"] == "stream_options"
    unknown = refusal(live, kind, stream=True, stream_options={"verbose": True})
    assert unknown["param"] == "stream_options.verbose"


@BOTH
def test_usage_in_every_chunk_needs_usage(live: Live, kind: Kind) -> None:
    error = refusal(live, kind, stream=True, stream_options={"continuous_usage_stats": True})
    assert error["param"] == "stream_options.continuous_usage_stats"
    assert "'include_usage'" in error["message"]


def test_a_prompt_of_many_ids_is_looked_at_and_not_copied() -> None:
    ids = list(range(1000))
    assert CompletionBody(prompt=ids).prompt is ids


@pytest.mark.parametrize(
    "prompt",
    [None, 5, {}, [], [[]], [1, "a"], ["a", [1]], [1.5], [True], [[1, "a"]], "", [[1], []], ["x"] * (MAX_PROMPTS + 1)],
    ids=repr,
)
def test_prompts_are_texts_or_token_ids_and_never_empty(live: Live, prompt: object) -> None:
    assert refusal(live, COMPLETION, prompt=prompt)["param"] == "prompt"


@pytest.mark.parametrize("token_id", [-1, 260, 10**100])
def test_token_ids_must_be_the_models(live: Live, token_id: int) -> None:
    for prompt in ([65, token_id], [[65], [65, token_id]]):
        error = refusal(live, COMPLETION, prompt=prompt)
        assert error["param"] == "prompt"
        assert str(token_id) in error["message"]
        assert "0 to 259" in error["message"]


def test_tokens_that_the_embedding_lacks_are_refused_however_they_come(
    settings: Callable[..., Settings], tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(folder)
    with serving(settings(model=str(folder))) as live:
        errors = [refusal(live, COMPLETION, prompt=prompt) for prompt in ("a<|new|>", [65, 260])]
        errors.append(refusal(live, CHAT, messages=[{"role": "user", "content": "a<|new|>"}]))
    assert [error["param"] for error in errors] == ["prompt", "prompt", "messages"]
    assert all("260" in error["message"] and "0 to 259" in error["message"] for error in errors)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": MAX_LOGPROBS + 1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"prompt": ["x"] * 9, "n": MAX_CHOICES}, "n"),
        ({"prompt": ["x"] * 257}, "prompt"),  # more than the queue of 256 could ever take
        ({"prompt": ["x"] * 3, "n": MAX_CHOICES}, "n"),
        ({"messages": []}, "messages"),
    ],
)
def test_fields_of_completions_have_their_limits(live: Live, fields: dict[str, Any], param: str) -> None:
    assert MAX_CHOICES * 9 > MAX_SEQUENCES
    assert refusal(live, COMPLETION, **fields)["param"] == param


def test_best_of_as_many_as_are_answered_is_no_choice(live: Live) -> None:
    assert live.post("/v1/completions", prompt="Hi", max_tokens=1, n=2, best_of=2).status_code == 200


def test_what_is_required_is_asked_for_by_name(live: Live) -> None:
    for path, param in (("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")):
        error = live.post(path, model="tiny").json()["error"]
        assert error["param"] == param
        assert error["code"] == "missing_field"
