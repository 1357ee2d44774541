"""langchain-openai: chat models and completions as chains use them."""

import asyncio
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from conftest import VOICES

QUESTION = "Tell me about the baker."


def chat(url: str, model: str = "base", **fields: Any) -> ChatOpenAI:
    settings: Any = {"temperature": 0, "max_tokens": 24, "timeout": 240, "max_retries": 0}
    return ChatOpenAI(base_url=url, api_key="none", model=model, **{**settings, **fields})


def test_an_adapter_is_chosen_by_model_or_by_extra_body(url: str) -> None:
    by_model = [chat(url, voice).invoke(QUESTION).content for voice in VOICES]
    assert by_model == [chat(url, extra_body={"adapter": voice}).invoke(QUESTION).content for voice in VOICES]
    assert chat(url).invoke(QUESTION).content not in by_model


def test_an_answer_has_usage_model_and_reason(url: str) -> None:
    answer = chat(url, "pirate-lora").invoke(QUESTION)
    assert answer.response_metadata["model_name"] == "pirate-lora"
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.usage_metadata
    assert answer.usage_metadata["output_tokens"] == 24


def test_a_stream_says_what_the_whole_answer_says(url: str) -> None:
    chunks = list(chat(url, stream_usage=True).stream(QUESTION))
    together = chunks[0]
    for chunk in chunks[1:]:
        together += chunk
    assert together.content == chat(url).invoke(QUESTION).content
    assert together.usage_metadata
    assert together.usage_metadata["output_tokens"] == 24


def test_an_asynchronous_stream(url: str) -> None:
    async def streamed() -> str:
        return "".join([str(chunk.content) async for chunk in chat(url).astream(QUESTION)])

    assert asyncio.run(streamed()) == chat(url).invoke(QUESTION).content


def test_a_chain_of_a_template_and_a_batch(url: str) -> None:
    chain = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "Tell me about {who}.")]) | chat(url)
    answers = chain.batch([{"who": "the baker"}, {"who": "the smith"}])
    assert [answer.content for answer in answers] == [
        chain.invoke({"who": w}).content for w in ("the baker", "the smith")
    ]


def test_a_conversation_goes_on(url: str) -> None:
    turns = [SystemMessage("Be brief."), HumanMessage(QUESTION), AIMessage("She bakes."), HumanMessage("Why?")]
    assert chat(url).invoke(turns).content
    assert chat(url).invoke([HumanMessage([{"type": "text", "text": QUESTION}])]).content


def test_log_probabilities(url: str) -> None:
    answer = chat(url).bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    entries = answer.response_metadata["logprobs"]["content"]
    assert len(entries) == 24
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)


def test_completions_whole_streamed_and_in_a_batch(url: str) -> None:
    story = OpenAI(base_url=url, api_key="none", model="poet-dora", max_tokens=12, temperature=0)
    whole = story.invoke("Once upon a time")
    assert whole == "".join(story.stream("Once upon a time"))
    assert whole == story.batch(["Once upon a time", "The baker"])[0]


# Structured answers and tools


class Villager(BaseModel):
    """Somebody of the village."""

    name: Literal["Mara", "Tobias"]
    trade: Literal["baker", "fisherman"]
    is_kind: bool


@tool
def find(trade: Literal["baker", "fisherman"]) -> str:
    """Finds a villager by trade."""
    return {"baker": "Mara", "fisherman": "Tobias"}[trade]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_a_structured_answer(url: str, method: Any) -> None:
    for model in ("base", "pirate-lora"):
        asked = chat(url, model, max_tokens=120).with_structured_output(Villager, method=method, strict=True)
        assert isinstance(asked.invoke(QUESTION), Villager)


def test_a_structured_answer_with_what_it_was_read_from(url: str) -> None:
    asked = chat(url, max_tokens=120).with_structured_output(Villager, include_raw=True)
    answer: Any = asked.invoke(QUESTION)
    assert isinstance(answer["parsed"], Villager)
    assert answer["raw"].usage_metadata["output_tokens"] > 0


def test_a_tool_is_called_and_its_result_goes_back(url: str) -> None:
    model = chat(url, max_tokens=120)
    caller = model.bind_tools([find], tool_choice="any", strict=True, parallel_tool_calls=False)
    made = caller.invoke(QUESTION)
    (call,) = made.tool_calls
    assert call["name"] == "find"
    result = find.invoke(call)
    assert isinstance(result, ToolMessage)
    assert model.bind_tools([find]).invoke([HumanMessage(QUESTION), made, result]).content


def test_a_streamed_call_is_the_whole_call(url: str) -> None:
    caller = chat(url, max_tokens=120).bind_tools([find], tool_choice="find", strict=True, parallel_tool_calls=False)
    chunks: Any = list(caller.stream(QUESTION))
    together = chunks[0]
    for chunk in chunks[1:]:
        together += chunk
    assert [call["args"] for call in together.tool_calls] == [
        call["args"] for call in caller.invoke(QUESTION).tool_calls
    ]


def test_an_unknown_model_is_openais_error(url: str) -> None:
    with pytest.raises(openai.NotFoundError):
        chat(url, "nobody").invoke(QUESTION)
