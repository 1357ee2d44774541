"""Where other servers fail with fields: the cases of Triton's OpenAI tests, and vLLM's known defects."""

import json
from typing import Any

import pytest

from tests.api.conftest import Live

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
BODIES: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "Hi", "max_tokens": 3},
    "chat": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
}
BOTH = pytest.mark.parametrize("endpoint", PATHS)


def send(live: Live, endpoint: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    answer = live.post(PATHS[endpoint], **{**BODIES[endpoint], **fields})
    return answer.status_code, answer.json()


# Triton: test_completions.py and test_chat_completions.py


@BOTH
def test_every_sampling_field_takes_its_usual_values(live: Live, endpoint: str) -> None:
    usual: list[dict[str, Any]] = [
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"frequency_penalty": 0.5},
        {"presence_penalty": 0.2},
        {"frequency_penalty": -2, "presence_penalty": 2},
        {"n": 1},
        {"stop": "."},
        {"stop": []},
        {"stop": [".", ","]},
        {"logit_bias": {"0": 0}},
        {"logit_bias": {}},
        {"seed": 5},
        {"user": "somebody"},
        {"ignore_eos": True},
        {"min_tokens": 1},
        {"top_k": 4, "min_p": 0.1},
    ]
    for fields in usual:
        status, answer = send(live, endpoint, **fields)
        assert status == 200, (fields, answer)


@BOTH
@pytest.mark.parametrize(
    "field",
    ["temperature", "top_p", "frequency_penalty", "presence_penalty", "n", "seed", "max_tokens", "min_tokens"],
)
def test_a_text_in_the_place_of_a_number_is_refused(live: Live, endpoint: str, field: str) -> None:
    status, answer = send(live, endpoint, **{field: "hi"})
    assert (status, answer["error"]["param"]) == (400, field)


@BOTH
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("frequency_penalty", 3),
        ("frequency_penalty", -3),
        ("presence_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("max_tokens", -1),
    ],
)
def test_a_number_out_of_range_is_refused(live: Live, endpoint: str, field: str, value: float) -> None:
    status, answer = send(live, endpoint, **{field: value})
    assert (status, answer["error"]["param"]) == (400, field)


def test_an_empty_body_and_an_empty_prompt_are_refused_by_name(live: Live) -> None:
    for path, param in (("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")):
        assert live.post(path).json()["error"]["param"] == param
    for prompt in ("", [], [[]]):
        status, answer = send(live, "completions", prompt=prompt)
        assert (status, answer["error"]["param"]) == (400, "prompt")


@BOTH
def test_a_seed_repeats_and_its_absence_does_not(live: Live, endpoint: str) -> None:
    """At temperature 2 over 260 tokens, three answers of 12 tokens that are equal by chance are not to be feared."""

    def text(**fields: Any) -> str:
        _, answer = send(live, endpoint, max_tokens=12, temperature=2, ignore_eos=True, **fields)
        (choice,) = answer["choices"]
        return json.dumps(choice.get("text", choice.get("message")))

    assert len({text(seed=7) for _ in range(3)}) == 1
    assert len({text() for _ in range(3)}) > 1


# vLLM


@BOTH
def test_several_greedy_choices_are_no_error(live: Live, endpoint: str) -> None:
    status, answer = send(live, endpoint, n=2, temperature=0)
    first, second = answer["choices"]
    assert status == 200
    assert {**first, "index": 1} == second


@BOTH
@pytest.mark.parametrize("field", ["guided_json", "guided_regex", "guided_choice", "guided_grammar"])
def test_a_field_of_the_past_is_not_ignored(live: Live, endpoint: str, field: str) -> None:
    """vLLM answers 200 with text that follows nothing (its issue 53975)."""
    status, answer = send(live, endpoint, **{field: "yes"})
    assert (status, answer["error"]["param"]) == (400, field)
    assert "structured_outputs" in answer["error"]["message"]


@BOTH
def test_a_bias_beyond_the_range_is_refused_and_not_clamped(live: Live, endpoint: str) -> None:
    status, answer = send(live, endpoint, logit_bias={"5": 101})
    assert (status, answer["error"]["param"]) == (400, "logit_bias")
    assert "100" in answer["error"]["message"]


@BOTH
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {f"x{number}": number for number in range(50_000)}),
        ("allowed_token_ids", ["x"] * 50_000),
        ("stop_token_ids", ["x"] * 50_000),
        ("stop", [["x"] * 50_000]),
        ("x" * 100_000, 1),
    ],
    ids=["logit_bias", "allowed_token_ids", "stop_token_ids", "stop", "a name"],
)
def test_an_error_is_short_however_much_was_wrong(live: Live, endpoint: str, field: str, value: object) -> None:
    """A body of 4 KB once made an error of 23 MB."""
    status, answer = send(live, endpoint, **{field: value})
    assert status == 400
    assert len(json.dumps(answer)) < 1000


def test_null_top_logprobs_mean_none(live: Live) -> None:
    _, answer = send(live, "chat", logprobs=True, top_logprobs=None)
    assert all(entry["top_logprobs"] == [] for entry in answer["choices"][0]["logprobs"]["content"])


@BOTH
def test_null_is_the_default_of_every_field(live: Live, endpoint: str) -> None:
    from tests.api.fields_page import all_fields

    fields = dict.fromkeys(set(all_fields()) - BODIES[endpoint].keys() - {"prompt", "messages"})
    status, answer = send(live, endpoint, **fields)
    assert status == 200, answer


def test_minimum_tokens_hold_with_a_stop_token_of_the_request(live: Live) -> None:
    """Everything stops but one token: the others may come only after the minimum."""
    stops = list(range(200))
    _, answer = send(live, "completions", max_tokens=8, min_tokens=4, stop_token_ids=stops, return_token_ids=True)
    ids = answer["choices"][0]["token_ids"]
    assert not set(ids[:4]) & set(stops)
