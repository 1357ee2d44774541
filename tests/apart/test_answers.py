"""A server in two processes answers as the same server in one does: token for token, and error for error."""

import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from server.apart.steps import MAX_SCORES
from tests.api.conftest import Live, event_data, eventually
from tests.demo_files import ADAPTERS

TEXT: dict[str, Any] = {"prompt": "The old boat", "max_tokens": 12, "temperature": 0}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 12, "temperature": 0}
MIX = [{"name": "pirate-lora", "weight": 0.5}, {"name": "poet-dora", "weight": 0.5}]
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
ASKED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "the base": ("/v1/completions", TEXT),
    **{name: ("/v1/completions", {**TEXT, "adapter": name}) for name in ADAPTERS},
    "a mix": ("/v1/completions", {**TEXT, "adapter": MIX}),
    "as a model": ("/v1/completions", {**TEXT, "model": "pirate-lora"}),
    "several choices": ("/v1/completions", {**TEXT, "n": 3, "temperature": 1, "seed": 7, "adapter": "robot-ia3"}),
    "several prompts": ("/v1/completions", {**TEXT, "prompt": ["One", "The other"], "n": 2, "seed": 1}),
    "log-probabilities": ("/v1/completions", {**TEXT, "logprobs": 3, "echo": True}),
    "scores of a prompt": ("/v1/completions", {**TEXT, "max_tokens": 0, "logprobs": 1, "echo": True}),
    "scores of a prompt that cross in parts": (
        "/v1/completions",
        {**TEXT, "prompt": [*range(60, 90)] * 10, "logprobs": 20, "echo": True},
    ),
    "token ids": ("/v1/completions", {**TEXT, "return_token_ids": True}),
    "a stop string": ("/v1/completions", {**TEXT, "max_tokens": 40, "stop": [","], "min_tokens": 2}),
    "some tokens alone": ("/v1/completions", {**TEXT, "allowed_token_ids": [70, 71, 72], "logit_bias": {"71": 5}}),
    "a regular expression": ("/v1/completions", {**TEXT, "structured_outputs": {"regex": "[ab]{4}"}}),
    "a conversation": ("/v1/chat/completions", {**CHAT, "adapter": "shout-rslora"}),
    "JSON": (
        "/v1/chat/completions",
        {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    ),
    "scored tokens of a conversation": ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}),
}
REFUSED: Mapping[str, tuple[str, str, dict[str, Any] | None]] = {
    "an unknown adapter": ("POST", "/v1/completions", {**TEXT, "adapter": "pirate-lore"}),
    "an unknown model": ("POST", "/v1/completions", {**TEXT, "model": "gpt-4"}),
    "an unknown version": ("POST", "/v1/completions", {**TEXT, "adapter": "pirate-lora@abcdef0"}),
    "one content twice": (
        "POST",
        "/v1/completions",
        {**TEXT, "adapter": [{"name": "pirate-lora"}, {"name": "pirate-lora"}]},
    ),
    "too long a context": ("POST", "/v1/completions", {**TEXT, "max_tokens": 10**6}),
    "more sequences than may wait": ("POST", "/v1/completions", {**TEXT, "n": 100, "prompt": ["a"] * 100}),
    "a grammar that is none": ("POST", "/v1/completions", {**TEXT, "structured_outputs": {"regex": "("}}),
    "nothing to tokenize for": ("POST", "/tokenize", {"model": "nobody", "prompt": "Hi"}),
    "nothing to look at": ("GET", "/v1/adapters/nobody", None),
    "nothing to delete": ("DELETE", "/v1/adapters/nobody", None),
    "nothing to pin": ("POST", "/v1/adapters/nobody/pin", None),
    "no fetch": ("DELETE", "/v1/adapters/nobody/fetch", None),
    "a source that is not allowed": ("POST", "/v1/adapters", {"name": "new", "source": "hf://someone/something"}),
    "a merge of nothing": ("POST", "/v1/adapters/merge", {"name": "new", "adapters": [{"name": "nobody"}]}),
    "a merge that cannot be": (
        "POST",
        "/v1/adapters/merge",
        {"name": "new", "adapters": [{"name": "pirate-lora"}], "strategy": "ties", "density": 7},
    ),
    "a folder that may not be read": ("POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "/etc"}),
    "nothing to unload": ("POST", "/v1/unload_lora_adapter", {"lora_name": "nobody"}),
}


def plain(answer: httpx.Response) -> Any:
    return told(answer.json())


def told(value: Any) -> Any:
    """Without what differs from one answer to the next; how much of a prompt was cached depends on who came first."""
    if value.get("usage"):
        value["usage"].pop("prompt_tokens_details")
    return {key: part for key, part in value.items() if key not in ("id", "created")}


def streamed(live: Live, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
    with live.http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        yield from (data if data == "[DONE]" else told(json.loads(data)) for data in event_data(answer))


@pytest.mark.parametrize("what", ASKED)
def test_an_answer_is_the_same(one: Live, two: Live, what: str) -> None:
    path, body = ASKED[what]
    expected, found = (plain(live.post(path, **body)) for live in (one, two))
    assert "choices" in expected
    assert found == expected


def test_a_stream_of_a_prompt_whose_scores_cross_in_parts_says_what_the_whole_answer_says(two: Live) -> None:
    path, body = ASKED["scores of a prompt that cross in parts"]
    (expected,) = plain(two.post(path, **body))["choices"]
    chunks = list(streamed(two, path, body))
    assert chunks.pop() == "[DONE]"
    scores = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert sum(len(one["tokens"]) > 1 for one in scores) > 300 * 21 // MAX_SCORES, "the prompt's came in several chunks"
    assert {key: [item for one in scores for item in one[key]] for key in expected["logprobs"]} == expected["logprobs"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected["text"]


@pytest.mark.parametrize("what", ["the base", "poet-dora", "several choices", "a conversation", "log-probabilities"])
def test_a_stream_says_the_same(one: Live, two: Live, what: str) -> None:
    """By choice: which of a step's deltas comes first is nobody's concern."""
    path, body = ASKED[what]

    def by_choice(live: Live) -> dict[int, list[Any]]:
        chunks = list(streamed(live, path, body))
        assert chunks.pop() == "[DONE]"
        return {
            index: [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
            for index in range(body.get("n", 1))
        }

    assert by_choice(two) == by_choice(one)


def test_many_at_once_are_each_answered_as_alone(two: Live) -> None:
    bodies = [{**TEXT, "adapter": name} for name in ADAPTERS] + [TEXT]
    alone = [two.post("/v1/completions", **body).json()["choices"] for body in bodies]
    with ThreadPoolExecutor(24) as clients:
        together = list(clients.map(lambda body: two.post("/v1/completions", **body).json()["choices"], bodies * 4))
    assert together == alone * 4


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_is_the_same(one: Live, two: Live, what: str) -> None:
    method, path, body = REFUSED[what]
    expected, found = (live.http.request(method, path, json=body) for live in (one, two))
    assert expected.status_code >= 400
    assert (found.status_code, found.text) == (expected.status_code, expected.text)
    differing = {"date", "x-request-id", "content-length"}
    assert {n: v for n, v in found.headers.items() if n not in differing} == {
        n: v for n, v in expected.headers.items() if n not in differing
    }


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_who_leaves_frees_what_was_held_in_the_other_process(two: Live, stream: bool) -> None:
    before = two.metric("graft_sequences_finished_total", finish_reason="abort")
    body = {"prompt": "The old boat", "max_tokens": 900, "ignore_eos": True, "adapter": "pirate-lora"}
    connection = two.send("/v1/completions", **body, n=3, stream=stream)
    eventually(lambda: two.metric("graft_adapter_sequences_running", adapter="pirate-lora") == 3)
    connection.close()
    held = ("graft_sequences_running", "graft_sequences_waiting", "graft_adapter_leases", "graft_kv_blocks_used")
    eventually(lambda: not any(two.metric(name) for name in held))
    assert two.metric("graft_sequences_finished_total", finish_reason="abort") - before == 3


def test_the_load_is_told(two: Live) -> None:
    assert two.http.get("/load").json() == {"server_load": 0}
    with two.send("/v1/completions", prompt="The old boat", max_tokens=900, ignore_eos=True, stream=True):
        eventually(lambda: two.http.get("/load").json() == {"server_load": 1})
    report = two.http.get("/v1/models", headers={"endpoint-load-metrics-format": "TEXT"}).headers
    assert re.search(r"kv_cache_usage_perc=\d", report["endpoint-load-metrics"])
