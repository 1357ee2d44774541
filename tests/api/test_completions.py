"""POST /v1/completions, with OpenAI's own client wherever it can say what is meant."""

import json
from itertools import pairwise
from typing import Any

import pytest

from tests.api.conftest import Live, event_data
from tests.models import byte_tokenizer

PROMPT = "Once upon a time"


def test_an_answer_has_openais_shape(live: Live) -> None:
    answer = live.openai.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.model == "tiny"
    assert [choice.index for choice in answer.choices] == [0]
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT)  # one token per byte
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_sixteen_tokens_are_the_default(live: Live) -> None:
    answer = live.post("/v1/completions", prompt=PROMPT, ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_the_default_shrinks_to_what_the_context_leaves(live: Live) -> None:
    answer = live.post("/v1/completions", prompt=[65] * 250, ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == 6


def test_a_request_beyond_the_context_is_refused(live: Live) -> None:
    for body in ({"prompt": [65] * 250, "max_tokens": 7}, {"prompt": [65] * 256}):
        refused = live.post("/v1/completions", **body)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_model_may_be_left_out_and_is_then_the_base(live: Live) -> None:
    answer = live.post("/v1/completions", prompt=PROMPT, max_tokens=1).json()
    assert answer["model"] == "tiny"
    assert answer["adapter"] is None


def test_null_means_the_default(live: Live) -> None:
    fields = ("adapter", "temperature", "top_p", "stop", "seed", "n", "logprobs", "echo", "suffix", "stream", "user")
    answer = live.post("/v1/completions", prompt=PROMPT, max_tokens=None, ignore_eos=True, **dict.fromkeys(fields))
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 16


# Prompts


def test_text_and_its_token_ids_are_the_same_prompt(live: Live) -> None:
    texts = [
        live.post("/v1/completions", prompt=prompt, max_tokens=6, temperature=0, echo=True).json()["choices"][0]["text"]
        for prompt in (PROMPT, byte_tokenizer().encode(PROMPT))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("prompts", [["One", "Two more"], [[33, 34], [35, 36, 37]]], ids=["texts", "token ids"])
def test_choices_of_several_prompts_come_prompt_by_prompt(live: Live, prompts: list[str]) -> None:
    alone = [
        live.post("/v1/completions", prompt=prompt, max_tokens=5, seed=7, n=2).json()["choices"] for prompt in prompts
    ]
    together = live.post("/v1/completions", prompt=prompts, max_tokens=5, seed=7, n=2).json()
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in together["choices"]] == [c["text"] for choices in alone for c in choices]
    assert together["usage"]["prompt_tokens"] == sum(len(prompt) for prompt in prompts)


def test_seeded_choices_differ_and_come_again(live: Live) -> None:
    bodies = [live.post("/v1/completions", prompt=PROMPT, max_tokens=12, seed=3, n=3).json() for _ in range(2)]
    first, again = ([choice["text"] for choice in body["choices"]] for body in bodies)
    assert first == again
    assert len(set(first)) == 3


# Stop strings


def test_text_ends_before_a_stop_string(live: Live) -> None:
    whole = live.post("/v1/completions", prompt=PROMPT, max_tokens=40, temperature=0, ignore_eos=True).json()
    text = whole["choices"][0]["text"]
    stop = next(char for char in text if char.isascii())
    stopped = live.post("/v1/completions", prompt=PROMPT, max_tokens=40, temperature=0, ignore_eos=True, stop=stop)
    choice = stopped.json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


# Log-probabilities


def test_logprobs_list_the_chosen_token_and_its_rivals(live: Live) -> None:
    answer = live.openai.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=3)
    listed = answer.choices[0].logprobs
    assert listed is not None
    assert listed.tokens is not None
    assert listed.token_logprobs is not None
    assert listed.top_logprobs is not None
    assert len(listed.tokens) == len(listed.token_logprobs) == len(listed.top_logprobs) == 4
    for logprob, top in zip(listed.token_logprobs, listed.top_logprobs, strict=True):
        assert len(top) == 3
        assert logprob == max(top.values())  # greedy, and the very same float


def test_a_sampled_token_is_listed_even_if_it_is_unlikely(live: Live) -> None:
    body = live.post("/v1/completions", prompt=PROMPT, max_tokens=12, seed=1, temperature=2, logprobs=1).json()
    listed = body["choices"][0]["logprobs"]
    assert {len(top) for top in listed["top_logprobs"]} == {1, 2}
    for logprob, top in zip(listed["token_logprobs"], listed["top_logprobs"], strict=True):
        assert logprob in top.values()


def test_echo_puts_the_prompt_before_the_text(live: Live) -> None:
    plain, echoed = (
        live.post("/v1/completions", prompt=PROMPT, max_tokens=5, temperature=0, echo=echo).json()["choices"][0]
        for echo in (False, True)
    )
    assert echoed["text"] == PROMPT + plain["text"]
    assert echoed["logprobs"] is None


def test_scoring_reads_the_prompt_and_generates_nothing(live: Live) -> None:
    body = live.post("/v1/completions", prompt=PROMPT, max_tokens=0, echo=True, logprobs=2).json()
    choice = body["choices"][0]
    assert choice["text"] == PROMPT
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == list(PROMPT)
    assert choice["logprobs"]["text_offset"] == list(range(len(PROMPT)))
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert all(logprob < 0 for logprob in choice["logprobs"]["token_logprobs"][1:])
    assert body["usage"]["completion_tokens"] == 0


def test_offsets_are_of_the_text_that_is_sent(live: Live) -> None:
    for stream in (False, True):
        body = {"prompt": [256, *byte_tokenizer().encode("café")], "max_tokens": 1, "echo": True, "logprobs": 0}
        parts = chunks(live, **body) if stream else [live.post("/v1/completions", **body).json()]
        offsets = [at for part in parts for at in part["choices"][0]["logprobs"]["text_offset"]]
        assert offsets[:7] == [0, 0, 1, 2, 3, 3, 4]


def test_scores_are_what_lm_eval_reads(live: Live) -> None:
    """Its request, and its reading: token ids in a batch, one entry per prompt token, one generated one at the end."""
    rows = [[72, 101, 108, 108, 111], [65, 66, 67]]
    request = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    body = live.post("/v1/completions", prompt=rows, **request).json()
    for row, choice in zip(rows, sorted(body["choices"], key=lambda choice: choice["index"]), strict=True):
        listed = choice["logprobs"]
        assert len(listed["tokens"]) == len(listed["token_logprobs"]) == len(listed["top_logprobs"]) == len(row) + 1
        assert None not in listed["token_logprobs"][1:]
        for logprob, top in zip(listed["token_logprobs"][1:], listed["top_logprobs"][1:], strict=True):
            assert logprob <= max(top.values())


def test_a_token_scores_the_same_in_a_prompt_as_it_did_when_it_was_proposed(live: Live) -> None:
    proposed = live.post("/v1/completions", prompt=PROMPT, max_tokens=1, logprobs=20, temperature=0).json()
    rivals = proposed["choices"][0]["logprobs"]["top_logprobs"][0]
    char, logprob = next((token, value) for token, value in rivals.items() if len(token) == 1 and token.isascii())
    scored = live.post("/v1/completions", prompt=PROMPT + char, max_tokens=1, logprobs=0, echo=True).json()
    assert scored["choices"][0]["logprobs"]["token_logprobs"][len(PROMPT)] == pytest.approx(logprob, abs=1e-4)


# Adapters


def test_the_adapter_field_chooses_the_voice(live: Live) -> None:
    def text(**choice: str) -> str:
        body = live.post("/v1/completions", prompt=PROMPT, max_tokens=24, temperature=0, ignore_eos=True, **choice)
        return str(body.json()["choices"][0]["text"])

    voices = {text(), text(adapter="first"), text(adapter="second")}
    assert len(voices) == 3
    assert text(model="first") == text(adapter="first") == text(model="org/tiny", adapter="first")


def test_the_answer_names_the_adapter_and_its_version(live: Live) -> None:
    version = live.http.get("/v1/adapters/first").json()["version"]
    for choice in ({"adapter": "first"}, {"model": "first"}, {"adapter": f"first@{version[:8]}"}):
        body = live.post("/v1/completions", prompt=PROMPT, max_tokens=1, **choice).json()
        assert body["adapter"] == {"name": "first", "version": version}


def test_openais_client_reaches_the_adapter_field(live: Live) -> None:
    answer = live.openai.completions.create(model="tiny", prompt=PROMPT, max_tokens=1, extra_body={"adapter": "second"})
    assert answer.model_extra is not None
    assert answer.model_extra["adapter"]["name"] == "second"


# Streams


def chunks(live: Live, **body: object) -> list[dict[str, Any]]:
    with live.http.stream("POST", "/v1/completions", json={"stream": True, **body}) as answer:
        answer.raise_for_status()
        lines = list(event_data(answer))
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("options", [{}, {"echo": True}, {"logprobs": 2}, {"echo": True, "logprobs": 1}, {"n": 3}])
def test_a_stream_says_what_the_whole_answer_says(live: Live, options: dict[str, object]) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "seed": 5, "ignore_eos": True, **options}
    whole = live.post("/v1/completions", **body).json()
    for expected in whole["choices"]:
        parts = [c for chunk in chunks(live, **body) for c in chunk["choices"] if c["index"] == expected["index"]]
        assert "".join(part["text"] for part in parts) == expected["text"]
        assert parts[-1]["finish_reason"] == expected["finish_reason"]
        assert all(part["finish_reason"] is None for part in parts[:-1])
        if expected["logprobs"] is not None:
            listed = {key: [item for part in parts for item in part["logprobs"][key]] for key in expected["logprobs"]}
            assert listed["tokens"] == expected["logprobs"]["tokens"]
            assert listed["text_offset"] == expected["logprobs"]["text_offset"]
            assert listed["token_logprobs"] == pytest.approx(expected["logprobs"]["token_logprobs"], abs=1e-4)


def test_all_chunks_are_of_one_answer(live: Live) -> None:
    sent = chunks(live, prompt=PROMPT, max_tokens=6, adapter="first")
    keys = ("id", "created", "model", "object", "adapter")
    assert all([a[key] for key in keys] == [b[key] for key in keys] for a, b in pairwise(sent))
    assert all("usage" not in chunk for chunk in sent)
