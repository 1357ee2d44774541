"""litellm as a library: the two ways to name a server of one's own, and what litellm makes of its answers."""

import asyncio
import json
from typing import Any, Literal

import litellm
import pytest
from pydantic import BaseModel

from conftest import KEY, VOICES

QUESTION: Any = [{"role": "user", "content": "Tell me about the baker."}]
# `hosted_vllm/` writes the requests itself; `openai/` sends them through OpenAI's client.
PROVIDERS = ("hosted_vllm", "openai")
by_provider = pytest.mark.parametrize("provider", PROVIDERS)


@pytest.fixture(scope="module")
def ask(url: str) -> dict[str, Any]:
    return {
        "api_base": url,
        "api_key": "none",
        "messages": QUESTION,
        "max_tokens": 24,
        "temperature": 0,
        "timeout": 240,
    }


def content(model: str, **fields: Any) -> str:
    answer: Any = litellm.completion(model=model, **fields)
    return str(answer.choices[0].message.content)


@by_provider
def test_an_adapter_is_chosen_by_model_or_by_extra_body(provider: str, ask: dict[str, Any]) -> None:
    by_model = [content(f"{provider}/{voice}", **ask) for voice in VOICES]
    assert by_model == [content(f"{provider}/base", **ask, extra_body={"adapter": voice}) for voice in VOICES]
    assert content(f"{provider}/base", **ask) not in by_model


@by_provider
def test_a_stream_says_what_the_whole_answer_says(provider: str, ask: dict[str, Any]) -> None:
    model = f"{provider}/pirate-lora"
    options = {"include_usage": True}
    chunks: Any = list(litellm.completion(model=model, **ask, stream=True, stream_options=options))
    rebuilt: Any = litellm.stream_chunk_builder(chunks, messages=QUESTION)
    assert rebuilt.choices[0].message.content == content(model, **ask)
    assert rebuilt.usage.completion_tokens == 24


@by_provider
def test_asynchronous_answers_and_streams(provider: str, ask: dict[str, Any]) -> None:
    model = f"{provider}/poet-dora"

    async def both() -> tuple[str, str]:
        whole: Any = await litellm.acompletion(model=model, **ask)
        stream: Any = await litellm.acompletion(model=model, **ask, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole.choices[0].message.content, "".join(parts)

    whole, streamed = asyncio.run(both())
    assert whole == streamed == content(model, **ask)


@by_provider
def test_the_common_parameters(provider: str, ask: dict[str, Any]) -> None:
    more = {
        "top_p": 0.9,
        "n": 2,
        "stop": ["\n\n"],
        "seed": 3,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "user": "me",
    }
    answer: Any = litellm.completion(model=f"{provider}/base", **ask, **more, logprobs=True, top_logprobs=2)
    assert len(answer.choices) == 2
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2


def test_several_conversations_at_once(ask: dict[str, Any]) -> None:
    both: Any = litellm.batch_completion(model="hosted_vllm/base", **{**ask, "messages": [QUESTION, QUESTION]})
    assert [answer.choices[0].message.content for answer in both] == [content("hosted_vllm/base", **ask)] * 2


@pytest.mark.parametrize("provider", ["hosted_vllm", "text-completion-openai"])
def test_text_completions(provider: str, ask: dict[str, Any]) -> None:
    request = {**ask, "prompt": "Once upon a time", "model": f"{provider}/poet-dora"}
    del request["messages"]
    whole: Any = litellm.text_completion(**request)
    parts: Any = litellm.text_completion(**request, stream=True)
    assert whole.choices[0].text == "".join(part.choices[0].text or "" for part in parts)


class Villager(BaseModel):
    """Somebody of the village."""

    name: Literal["Mara", "Tobias"]
    is_kind: bool


@by_provider
def test_a_structured_answer(provider: str, ask: dict[str, Any]) -> None:
    text = content(f"{provider}/pirate-lora", **{**ask, "max_tokens": 120}, response_format=Villager)
    assert Villager.model_validate_json(text)


@by_provider
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_tool_is_called(provider: str, stream: bool, ask: dict[str, Any]) -> None:
    # Not "additionalProperties": litellm takes that out for hosted_vllm, and the demo would find no end.
    parameters = {**Villager.model_json_schema(), "maxProperties": 2}
    tools = [{"type": "function", "function": {"name": "find", "parameters": parameters}}]
    request = {**ask, "max_tokens": 120, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    answer: Any = litellm.completion(model=f"{provider}/base", **request, stream=stream)
    whole: Any = litellm.stream_chunk_builder(list(answer)) if stream else answer
    (call,) = whole.choices[0].message.tool_calls
    assert call.function.name == "find"
    assert Villager.model_validate(json.loads(call.function.arguments))


@by_provider
def test_errors_become_litellms(provider: str, ask: dict[str, Any], small_url: str) -> None:
    with pytest.raises(litellm.NotFoundError):
        content(f"{provider}/nobody", **ask)
    with pytest.raises(litellm.BadRequestError) as wrong:
        content(f"{provider}/base", **ask, top_p=7)
    assert "top_p" in str(wrong.value)
    with pytest.raises(litellm.AuthenticationError):
        content(f"{provider}/base", **{**ask, "api_base": small_url, "api_key": "wrong"})
    assert content(f"{provider}/base", **{**ask, "api_base": small_url, "api_key": KEY})
