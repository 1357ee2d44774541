"""OpenAI's own Python client, as a program of a user would use it. Runs under each of its major versions."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from conftest import KEY, VOICES, eventually, metric

QUESTION: Any = [{"role": "user", "content": "Tell me about the baker."}]
ASK: Any = {"messages": QUESTION, "max_tokens": 24, "temperature": 0}
STORY: Any = {"model": "base", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=240) as client:
        yield client


@pytest.fixture(scope="module")
def small(small_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=small_url, api_key=KEY, max_retries=0, timeout=240) as client:
        yield client


def content(client: OpenAI, **fields: Any) -> str:
    text = client.chat.completions.create(**ASK, **fields).choices[0].message.content
    assert text
    return text


# Models and adapters


def test_models_are_the_base_and_the_adapters(client: OpenAI) -> None:
    listed = [model.id for model in client.models.list()]
    assert {"base", *VOICES} <= set(listed)
    assert [client.models.retrieve(name).id for name in listed] == listed
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_an_adapter_is_chosen_by_model_or_by_extra_body(client: OpenAI) -> None:
    by_model = [content(client, model=voice) for voice in VOICES]
    assert by_model == [content(client, model="base", extra_body={"adapter": voice}) for voice in VOICES]
    assert len({content(client, model="base"), *by_model}) == 1 + len(VOICES)


def test_what_the_server_adds_to_an_answer_can_be_read(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="pirate-lora", **ASK)
    assert answer.model_extra
    assert answer.model_extra["adapter"]["name"] == "pirate-lora"


def test_concurrent_requests_of_all_voices_get_what_each_gets_alone(client: OpenAI, url: str) -> None:
    async def together() -> list[str | None]:
        async with AsyncOpenAI(base_url=url, api_key="none", timeout=240) as each:
            asked = [each.chat.completions.create(model=voice, **ASK) for voice in VOICES]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    assert asyncio.run(together()) == [content(client, model=voice) for voice in VOICES]


# Chat


def test_a_whole_answer(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="base", **ASK)
    assert (answer.object, answer.choices[0].message.role) == ("chat.completion", "assistant")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage
    assert answer.usage.completion_tokens == 24


def test_a_stream_says_what_the_whole_answer_says(client: OpenAI) -> None:
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="base", **ASK, stream=True, stream_options=options))
    assert {(chunk.id, chunk.object) for chunk in chunks} == {(chunks[0].id, "chat.completion.chunk")}
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == content(client, model="base")
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 24


def test_an_asynchronous_stream(client: OpenAI, url: str) -> None:
    async def streamed() -> str:
        async with AsyncOpenAI(base_url=url, api_key="none", timeout=240) as each:
            stream = await each.chat.completions.create(model="poet-dora", **ASK, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(streamed()) == content(client, model="poet-dora")


def test_the_stream_helper_puts_the_answer_together(client: OpenAI) -> None:
    # A sentence, because of an answer that ends by length the helper raises an error.
    request: Any = {**ASK, "model": "base", "stop": ["."]}
    with client.chat.completions.stream(**request, logprobs=True, n=2) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    whole = client.chat.completions.create(**request).choices[0].message.content
    assert [choice.message.content for choice in final.choices] == [whole] * 2
    logprobs = final.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert "".join(entry.token for entry in logprobs.content).startswith(final.choices[0].message.content or "?")


def test_log_probabilities_of_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="base", **ASK, logprobs=True, top_logprobs=3)
    assert answer.choices[0].logprobs
    entries = answer.choices[0].logprobs.content
    assert entries
    for entry in entries:
        assert entry.bytes == list(entry.token.encode())
        assert [other.logprob for other in entry.top_logprobs] == sorted(o.logprob for o in entry.top_logprobs)[::-1]
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy


def test_a_conversation_goes_on_with_what_the_client_was_given(client: OpenAI) -> None:
    first = client.chat.completions.create(model="base", **ASK).choices[0].message
    turns: Any = [{"role": "system", "content": "Be brief."}, *QUESTION, first, {"role": "user", "content": "Why?"}]
    again = client.chat.completions.create(model="base", messages=turns, max_tokens=4)
    assert again.choices[0].message.content
    as_parts: Any = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    assert (
        content(client, model="base")
        == client.chat.completions.create(model="base", **{**ASK, "messages": as_parts}).choices[0].message.content
    )


def test_the_same_seed_gives_the_same_choices_again(client: OpenAI) -> None:
    request: Any = {**ASK, "model": "base", "temperature": 1.5, "n": 3, "seed": 11}
    first, second = ([c.message.content for c in client.chat.completions.create(**request).choices] for _ in range(2))
    assert first == second
    assert len(set(first)) == 3


def test_labels_and_neutral_values_pass(client: OpenAI) -> None:
    neutral: Any = {"user": "me", "metadata": {"team": "blue"}, "store": False, "service_tier": "auto"}
    off: Any = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}}
    assert content(client, model="base", **neutral, **off, stop=None, seed=None) == content(client, model="base")


# Completions


def test_a_completion_whole_and_streamed(client: OpenAI) -> None:
    whole = client.completions.create(**STORY).choices[0].text
    assert whole == "".join(chunk.choices[0].text for chunk in client.completions.create(**STORY, stream=True))


def test_several_prompts_with_several_choices_each(client: OpenAI) -> None:
    request: Any = {**STORY, "prompt": ["Once upon a time", "The baker"], "n": 2}
    texts = [choice.text for choice in client.completions.create(**request).choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert texts[0] == client.completions.create(**STORY).choices[0].text


def test_a_stop_string_ends_the_text_and_is_not_in_it(client: OpenAI) -> None:
    whole = client.completions.create(**STORY).choices[0].text
    word = whole.split()[3]
    stopped = client.completions.create(**STORY, stop=[word, "\n\n"]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(word)], "stop")


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_a_prompt(client: OpenAI, max_tokens: int) -> None:
    answer = client.completions.create(**{**STORY, "max_tokens": max_tokens}, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert answer.usage
    assert choice.text.startswith(STORY["prompt"])
    assert choice.logprobs
    assert choice.logprobs.token_logprobs
    assert len(choice.logprobs.token_logprobs) == answer.usage.prompt_tokens + max_tokens
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs[1:])


# Structured answers


class Villager(BaseModel):
    """Somebody of the village."""

    name: Literal["Mara", "Tobias"]
    trade: Literal["baker", "fisherman"]
    is_kind: bool


def test_an_answer_is_parsed_into_a_class(client: OpenAI) -> None:
    for model in ("base", "pirate-lora", "robot-ia3"):
        answer = client.chat.completions.parse(**{**ASK, "max_tokens": 80}, model=model, response_format=Villager)
        assert isinstance(answer.choices[0].message.parsed, Villager)


def test_a_streamed_answer_is_parsed_into_a_class(client: OpenAI) -> None:
    request: Any = {**ASK, "max_tokens": 80, "model": "poet-dora", "response_format": Villager}
    with client.chat.completions.stream(**request) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Villager)


def test_a_schema_of_ones_own_and_a_list_of_answers(client: OpenAI) -> None:
    shop: Any = {"properties": {"open": {"type": "boolean"}}, "required": ["open"], "additionalProperties": False}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "shop", "schema": {"type": "object", **shop}}}
    assert isinstance(json.loads(content(client, model="base", response_format=wanted))["open"], bool)
    choice = {"structured_outputs": {"choice": ["yes", "no"]}}
    assert content(client, model="news-vera", extra_body=choice) in ("yes", "no")
    with pytest.raises(openai.BadRequestError) as wrong:
        content(client, model="base", response_format={"type": "json_schema"})
    assert wrong.value.param


# Tools

FIND: Any = openai.pydantic_function_tool(Villager, name="find", description="Finds a villager.")
CALL: Any = {**ASK, "max_tokens": 120, "tools": [FIND], "parallel_tool_calls": False}
NAMED: Any = {"type": "function", "function": {"name": "find"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_that_is_asked_for_is_made(client: OpenAI, choice: Any) -> None:
    message = client.chat.completions.create(**CALL, model="pirate-lora", tool_choice=choice).choices[0].message
    assert message.tool_calls
    (call,) = message.tool_calls
    assert call.type == "function"
    assert call.function.name == "find"
    assert Villager.model_validate_json(call.function.arguments)


def test_arguments_are_parsed_into_a_class(client: OpenAI) -> None:
    message = client.chat.completions.parse(**CALL, model="base", tool_choice="required").choices[0].message
    assert message.tool_calls
    assert isinstance(message.tool_calls[0].function.parsed_arguments, Villager)


def test_a_streamed_call_is_the_whole_call(client: OpenAI) -> None:
    request: Any = {**CALL, "model": "base", "tool_choice": "required"}
    whole = client.chat.completions.create(**request).choices[0]
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**request, stream=True)]
    parts = [call for delta in deltas for call in delta.tool_calls or []]
    assert (parts[0].index, parts[0].type, bool(parts[0].id)) == (0, "function", True)
    assert whole.message.tool_calls
    assert whole.finish_reason == "tool_calls"
    function = whole.message.tool_calls[0].function
    assert "".join(p.function.name or "" for p in parts if p.function) == function.name
    assert "".join(p.function.arguments or "" for p in parts if p.function) == function.arguments


def test_a_call_and_its_result_are_part_of_the_conversation(client: OpenAI) -> None:
    made = client.chat.completions.create(**CALL, model="base", tool_choice="required").choices[0].message
    assert made.tool_calls
    result: Any = {"role": "tool", "tool_call_id": made.tool_calls[0].id, "content": "She is in the bakery."}
    answer = client.chat.completions.create(
        **{**CALL, "messages": [*QUESTION, made, result]}, model="base", tool_choice="none"
    )
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


def test_with_a_free_choice_the_demo_answers_in_words(client: OpenAI) -> None:
    assert content(client, model="base", tools=[FIND])


# The wire


def test_a_raw_answer_has_its_headers(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="base", **ASK, extra_headers={"x-request-id": "the-one"}
    )
    assert raw.headers["x-request-id"] == raw.parse()._request_id == "the-one"
    assert client.chat.completions.create(model="base", **ASK)._request_id  # made up here if the client sends none


def test_a_raw_stream_can_be_read_line_by_line(client: OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(model="base", **ASK, stream=True) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in raw.iter_lines() if line and not line.startswith(":")]  # a comment may come any time
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_leaving_a_stream_ends_it_on_the_server(client: OpenAI, url: str) -> None:
    stream = client.completions.create(**{**STORY, "max_tokens": 900}, stream=True, extra_body={"ignore_eos": True})
    assert next(iter(stream)).choices[0].text
    stream.close()
    eventually(lambda: metric(url, "graft_sequences_running") == 0)


# Errors


def test_errors_have_the_clients_classes_and_name_the_field(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        content(client, model="nobody")
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
    assert unknown.value.request_id
    with pytest.raises(openai.BadRequestError) as wrong:
        content(client, model="base", top_p=7)
    assert (wrong.value.param, wrong.value.status_code) == ("top_p", 400)
    with pytest.raises(openai.BadRequestError) as strange:
        content(client, model="base", extra_body={"guided_json": {}})
    assert strange.value.param == "guided_json"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(**{**STORY, "max_tokens": 100_000})
    assert long.value.code == "context_length_exceeded"


def test_a_wrong_key_is_an_authentication_error(small: OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        content(small.with_options(api_key="wrong"), model="base")


# The small server


def _is_empty(url: str, line: str) -> bool:
    return metric(url, f"graft_sequences_{line}") == 0


@contextmanager
def crowd(client: OpenAI, num_sequences: int) -> Iterator[None]:
    """So many sequences that each take long, until the block ends: one runs, the others wait."""
    long: Any = {**STORY, "max_tokens": 900, "n": num_sequences, "extra_body": {"ignore_eos": True}}
    with client.completions.create(**long, stream=True) as stream:
        next(iter(stream))
        yield
    url = str(client.base_url).removesuffix("/")
    for line in ("running", "waiting"):  # the server learns in its own time that they are not wanted any more
        eventually(partial(_is_empty, url, line))


def test_a_full_server_says_when_to_come_back(small: OpenAI) -> None:
    with crowd(small, 64), pytest.raises(openai.InternalServerError) as full:
        content(small, model="base", n=2)
    assert (full.value.status_code, full.value.code) == (503, "overloaded")
    assert int(full.value.response.headers["retry-after"]) >= 1


def test_the_client_comes_back_by_itself_until_there_is_room(small: OpenAI, small_url: str) -> None:
    refused: Any = {"name": "graft_requests_total", "route": "/v1/chat/completions", "status": "503"}
    before = metric(small_url, **refused)
    with ThreadPoolExecutor() as threads:
        with crowd(small, 64):
            asked = threads.submit(content, small.with_options(max_retries=100), model="base", n=2)
            eventually(lambda: metric(small_url, **refused) > before)
        assert asked.result(timeout=240)


def test_a_request_that_timed_out_at_the_client_is_gone_from_the_server(small: OpenAI, small_url: str) -> None:
    with crowd(small, 32):
        waiting = metric(small_url, "graft_sequences_waiting")
        with pytest.raises(openai.APITimeoutError):
            content(small.with_options(timeout=0.5), model="base")
        eventually(lambda: metric(small_url, "graft_sequences_waiting") <= waiting)
    eventually(lambda: metric(small_url, "graft_sequences_running") == 0)
