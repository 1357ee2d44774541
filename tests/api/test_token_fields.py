"""The fields that choose tokens, as clients send them to both endpoints: each changes what it says and nothing else."""

import json
from typing import Any

import pytest

from server.api.schemas import MAX_BIAS, MAX_INT, MAX_REPETITION, MAX_STOP_IDS, MIN_REPETITION
from tests.api.conftest import Live, event_data
from tests.models import EOS_ID, MAX_CONTEXT, byte_tokenizer

TOKENIZER = byte_tokenizer()
PROMPT = "Once upon a time"
BOTH = pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"], ids=["completions", "chat"])
Choice = dict[str, Any]


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    what = {"messages": [{"role": "user", "content": PROMPT}]} if "chat" in path else {"prompt": PROMPT}
    return {**what, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **fields}


def answer(live: Live, path: str, **fields: Any) -> Choice:
    """The only choice of an answer, its text under "text" at both endpoints."""
    sent = live.post(path, **body_of(path, **fields))
    assert sent.status_code == 200, sent.text
    (choice,) = sent.json()["choices"]
    return {"text": choice["message"]["content"] if "chat" in path else choice["text"], **choice}


def refusal(live: Live, path: str, **fields: Any) -> dict[str, Any]:
    sent = live.post(path, **body_of(path, **fields))
    assert sent.status_code == 400, sent.text
    error: dict[str, Any] = sent.json()["error"]
    return error


def id_of(char: str) -> int:
    (token_id,) = TOKENIZER.encode(char)
    return int(token_id)


# Which tokens may come


@BOTH
def test_only_allowed_tokens_come(live: Live, path: str) -> None:
    allowed = [id_of(char) for char in "xyz"]
    for temperature in (0, 1.5):
        choice = answer(live, path, allowed_token_ids=allowed, temperature=temperature, seed=1)
        assert set(choice["token_ids"]) <= set(allowed)
        assert set(choice["text"]) <= set("xyz")


@BOTH
def test_a_bias_bans_or_brings_a_token(live: Live, path: str) -> None:
    first = answer(live, path)["token_ids"][0]
    assert answer(live, path, logit_bias={str(first): -100})["token_ids"].count(first) == 0
    assert answer(live, path, logit_bias={str(id_of("q")): 100})["text"] == "q" * 12


@BOTH
def test_min_p_one_leaves_the_most_likely_token(live: Live, path: str) -> None:
    assert answer(live, path, temperature=2, seed=3, min_p=1)["token_ids"] == answer(live, path)["token_ids"]
    assert answer(live, path, temperature=2, seed=3, min_p=0)["token_ids"] != answer(live, path)["token_ids"]


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty"])
def test_penalties_count_the_output_and_not_the_prompt(live: Live, field: str) -> None:
    """A token of the prompt is brought to lead another by 1: a penalty of 2 turns that round once it has come."""
    known, other = id_of("O"), id_of("#")
    scored = live.post("/v1/completions", prompt=[PROMPT + "O", PROMPT + "#"], max_tokens=0, echo=True, logprobs=0)
    ahead, behind = (choice["logprobs"]["token_logprobs"][-1] for choice in scored.json()["choices"])
    fields: dict[str, Any] = {"allowed_token_ids": [known, other], "logit_bias": {str(known): 1 - (ahead - behind)}}
    assert answer(live, "/v1/completions", **fields, max_tokens=1, **{field: 2})["token_ids"] == [known]
    brought = {**fields, "logit_bias": {str(known): 60, str(other): 59}}
    twenty = answer(live, "/v1/completions", **brought, max_tokens=20, **{field: 2})["token_ids"]
    assert {known, other} == set(twenty)


@BOTH
def test_a_frequency_penalty_spreads_what_would_repeat(live: Live, path: str) -> None:
    allowed = [id_of(char) for char in "ab"]
    pushed = {str(allowed[0]): 3.0}
    assert answer(live, path, allowed_token_ids=allowed, logit_bias={str(allowed[0]): 50})["text"] == "a" * 12
    spread = answer(live, path, allowed_token_ids=allowed, logit_bias=pushed, frequency_penalty=2)
    assert {"a", "b"} == set(spread["text"])


@BOTH
def test_a_repetition_penalty_counts_the_prompt_too(live: Live, path: str) -> None:
    """Allowed are one token of the prompt and one that is not; the largest penalty decides for the other."""
    fields: dict[str, Any] = {"allowed_token_ids": [id_of("O"), id_of("#")], "max_tokens": 1}
    biases = {str(id_of("O")): 70, str(id_of("#")): 45}  # both logits surely positive, and far enough apart
    assert answer(live, path, **fields, logit_bias=biases)["text"] == "O"
    assert answer(live, path, **fields, logit_bias=biases, repetition_penalty=4)["text"] == "#"


def test_logprobs_are_of_the_model_and_not_of_what_was_made_of_it(live: Live) -> None:
    """Before temperature, cuts, biases, penalties and bans: the same numbers as without all of them."""
    plain = answer(live, "/v1/completions", logprobs=5, max_tokens=1)["logprobs"]
    made: dict[str, Any] = {"temperature": 0.1, "seed": 1, "top_p": 0.1, "repetition_penalty": 3, "min_p": 0.5}
    banned = {str(answer(live, "/v1/completions", max_tokens=1)["token_ids"][0]): -100}
    changed = answer(live, "/v1/completions", logprobs=5, max_tokens=1, logit_bias=banned, **made)["logprobs"]
    top = changed["top_logprobs"][0]
    assert changed["tokens"] != plain["tokens"]
    for token, logprob in plain["top_logprobs"][0].items():
        assert top[token] == pytest.approx(logprob, abs=1e-4)


# Ends


@BOTH
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_token_ends_the_answer_and_is_not_in_its_text(live: Live, path: str, stream: bool) -> None:
    fields: dict[str, Any] = {"logit_bias": {str(id_of("q")): 100}, "stop_token_ids": [id_of("q")]}
    if stream:
        parts = chunks(live, path, **fields)
        ids = [token for part in parts for token in part.get("token_ids", [])]
        assert (ids, parts[-1]["finish_reason"]) == ([id_of("q")], "stop")
        assert not any(part.get("text") or part.get("delta", {}).get("content") for part in parts)
        return
    choice = answer(live, path, **fields)
    assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == ("", [id_of("q")], "stop")
    kept = answer(live, path, **fields, include_stop_str_in_output=True)
    assert (kept["text"], kept["finish_reason"]) == ("q", "stop")


@BOTH
def test_a_stop_string_may_stay_in_the_text(live: Live, path: str) -> None:
    fields: dict[str, Any] = {"logit_bias": {str(id_of("q")): 100}, "stop": "qqq"}
    assert answer(live, path, **fields)["text"] == ""
    assert answer(live, path, **fields, include_stop_str_in_output=True)["text"] == "qqq"


@BOTH
@pytest.mark.parametrize("end", ["eos", "stop id", "stop string"])
def test_no_end_comes_before_min_tokens(live: Live, path: str, end: str) -> None:
    token = EOS_ID if end == "eos" else id_of("q")
    ends = {"eos": {"ignore_eos": False}, "stop id": {"stop_token_ids": [token]}, "stop string": {"stop": "q"}}[end]
    fields: dict[str, Any] = {"logit_bias": {str(token): 100}, **ends}
    soon, late = answer(live, path, **fields), answer(live, path, **fields, min_tokens=5)
    assert [len(choice["token_ids"]) for choice in (soon, late)] == [1, 6]
    assert {choice["finish_reason"] for choice in (soon, late)} == {"stop"}
    if end == "stop string":
        assert late["text"] == "q" * 5
    else:
        assert late["token_ids"].count(token) == 1


@BOTH
def test_min_tokens_may_equal_max_tokens_and_not_be_more(live: Live, path: str) -> None:
    fields: dict[str, Any] = {"ignore_eos": False, "logit_bias": {str(EOS_ID): 100}}
    full = answer(live, path, **fields, min_tokens=12)
    assert (len(full["token_ids"]), full["finish_reason"]) == (12, "length")
    error = refusal(live, path, min_tokens=13)
    assert error["param"] == "min_tokens"
    assert "12" in error["message"]


# What the answer shows


@BOTH
def test_special_tokens_are_shown_where_they_are_asked_for(live: Live, path: str) -> None:
    user = TOKENIZER.convert_tokens_to_ids("<|user|>")
    fields: dict[str, Any] = {"logit_bias": {str(user): 100}, "max_tokens": 2}
    assert answer(live, path, **fields)["text"] == ""
    assert answer(live, path, **fields, skip_special_tokens=False)["text"] == "<|user|><|user|>"


def test_the_models_own_end_is_shown_only_where_both_are_asked_for(live: Live) -> None:
    fields: dict[str, Any] = {"logit_bias": {str(EOS_ID): 100}, "ignore_eos": False, "skip_special_tokens": False}
    assert answer(live, "/v1/completions", **fields)["text"] == ""
    assert answer(live, "/v1/completions", **fields, include_stop_str_in_output=True)["text"] == "<|end|>"


def test_offsets_follow_the_special_tokens_that_are_shown(live: Live) -> None:
    user = TOKENIZER.convert_tokens_to_ids("<|user|>")
    fields: dict[str, Any] = {"logit_bias": {str(user): 100}, "max_tokens": 2, "logprobs": 0}
    hidden, shown = (
        answer(live, "/v1/completions", **fields, skip_special_tokens=skip)["logprobs"]["text_offset"]
        for skip in (True, False)
    )
    assert (hidden, shown) == ([0, 0], [0, len("<|user|>")])


@BOTH
def test_token_ids_come_in_vllms_places(live: Live, path: str) -> None:
    is_chat = "chat" in path
    whole = live.post(path, **body_of(path)).json()
    place = whole if is_chat else whole["choices"][0]
    assert len(place["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]
    assert len(whole["choices"][0]["token_ids"]) == whole["usage"]["completion_tokens"] == 12
    plain = live.post(path, **body_of(path, return_token_ids=False)).json()
    assert "token_ids" not in json.dumps(plain)
    sent = raw_chunks(live, path)
    places = [chunk if is_chat else chunk["choices"][0] for chunk in sent]
    assert [place.get("prompt_token_ids") for place in places] == [
        places[0]["prompt_token_ids"],
        *[None] * (len(places) - 1),
    ]
    assert places[0]["prompt_token_ids"] == place["prompt_token_ids"]
    streamed = [token for chunk in sent for token in chunk["choices"][0].get("token_ids", [])]
    assert streamed == whole["choices"][0]["token_ids"]


def test_the_ids_of_several_prompts_and_choices_stay_apart(live: Live) -> None:
    sent = live.post("/v1/completions", **body_of("", prompt=["One", "Two more"], n=2)).json()
    assert [len(choice["prompt_token_ids"]) for choice in sent["choices"]] == [3, 3, 8, 8]


# The prompt


def test_the_end_of_a_long_prompt_is_kept(live: Live) -> None:
    for prompt in (PROMPT, TOKENIZER.encode(PROMPT)):
        kept = answer(live, "/v1/completions", prompt=prompt, truncate_prompt_tokens=4, echo=True, logprobs=0)
        assert kept["prompt_token_ids"] == TOKENIZER.encode(PROMPT)[-4:]
        assert kept["text"].startswith("time")
        assert len(kept["logprobs"]["tokens"]) == 4 + 12
        assert kept["logprobs"]["text_offset"][:5] == [0, 1, 2, 3, 4]
    longer = answer(live, "/v1/completions", truncate_prompt_tokens=1000)
    assert longer["prompt_token_ids"] == TOKENIZER.encode(PROMPT)


@BOTH
def test_minus_one_keeps_what_the_context_allows(live: Live, path: str) -> None:
    much = "x" * 1000
    long = {"messages": [{"role": "user", "content": much}]} if "chat" in path else {"prompt": much}
    assert refusal(live, path, **long)["code"] == "context_length_exceeded"
    sent = live.post(path, **body_of(path, **long, truncate_prompt_tokens=-1)).json()
    assert sent["usage"]["prompt_tokens"] == MAX_CONTEXT - 12
    assert sent["usage"]["completion_tokens"] == 12


def test_cut_prompts_score_as_if_they_had_been_sent_so(live: Live) -> None:
    fields: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 1}
    cut = answer(live, "/v1/completions", truncate_prompt_tokens=6, **fields)
    sent = answer(live, "/v1/completions", prompt=PROMPT[-6:], **fields)
    assert cut["logprobs"]["token_logprobs"][1:] == pytest.approx(sent["logprobs"]["token_logprobs"][1:], abs=1e-4)


# What is refused


@BOTH
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", "1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", MIN_REPETITION / 2),
        ("repetition_penalty", MAX_REPETITION * 2),
        ("logit_bias", []),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"05": 1}),
        ("logit_bias", {" 5": 1}),
        ("logit_bias", {"٥": 1}),
        ("logit_bias", {"1_0": 1}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {"5": MAX_BIAS + 1}),
        ("logit_bias", {"5": "1"}),
        ("logit_bias", {"5": True}),
        ("logit_bias", {"5": None}),
        ("logit_bias", {"5": 10**400}),
        ("logit_bias", {"260": 1}),
        ("logit_bias", {"9999999999": 1}),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [260]),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", 5),
        ("stop_token_ids", [260]),
        ("stop_token_ids", [10**100]),
        ("stop_token_ids", [1] * (MAX_STOP_IDS + 1)),
        ("min_tokens", -1),
        ("min_tokens", 1.5),
        ("min_tokens", MAX_INT),
        ("include_stop_str_in_output", 1),
        ("skip_special_tokens", "no"),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("truncate_prompt_tokens", MAX_INT + 1),
        ("return_token_ids", "yes"),
        ("priority", 1.5),
        ("priority", MAX_INT + 1),
        ("spaces_between_special_tokens", False),
        ("bad_words", ["no"]),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(live: Live, path: str, field: str, value: object) -> None:
    error = refusal(live, path, **{field: value})
    assert error["param"] is not None
    assert error["param"].split("[")[0].split(".")[0] == field
    assert len(error["message"]) < 400


def test_only_ends_allowed_and_forbidden_at_once_is_refused(live: Live) -> None:
    fields: dict[str, Any] = {"allowed_token_ids": [EOS_ID], "ignore_eos": False, "min_tokens": 1}
    assert refusal(live, "/v1/completions", **fields)["param"] == "allowed_token_ids"
    assert answer(live, "/v1/completions", **{**fields, "min_tokens": 0})["finish_reason"] == "stop"


# Streams


def raw_chunks(live: Live, path: str, **fields: Any) -> list[dict[str, Any]]:
    with live.http.stream("POST", path, json={**body_of(path, **fields), "stream": True}) as sent:
        sent.raise_for_status()
        lines = list(event_data(sent))
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def chunks(live: Live, path: str, **fields: Any) -> list[Choice]:
    return [choice for chunk in raw_chunks(live, path, **fields) for choice in chunk["choices"]]
