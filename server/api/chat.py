"""POST /v1/chat/completions: the model's chat template makes a prompt of the messages, and the answer is a message."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from server.api.answers import Begun, Chunks, begin, check_token_ids, sampling, truncated
from server.api.chat_choice import ChatChoice
from server.api.disconnect import until_gone
from server.api.json_route import JsonRoute
from server.api.prompting import ChatPlan, Planner
from server.api.schemas import ChatBody
from server.api.services import Services
from server.api.stream import EventStream
from server.api.structured import asked_of
from server.engine.sequence import Delta, SamplingParams

_KIND = "chat.completion"


def router(services: Services) -> APIRouter:
    routes, planner = APIRouter(route_class=JsonRoute), Planner(services)

    @routes.post("/v1/chat/completions", tags=["generation"])
    async def chat(request: Request, body: ChatBody) -> Response:
        plan = await planner.plan(body, is_bound=asked_of(body) is not None)
        check_token_ids(services, plan.prompt_ids, "messages")
        kept = truncated(body, plan.prompt_ids, services.base.max_context, body.asked_tokens or 1)
        plan = replace(plan, prompt_ids=kept)
        params = _params(body, plan, services.base.max_context)
        begun = await begin(services, body, [kept], [params], "chatcmpl", plan.reading.grammar)
        if body.stream:
            chunks = _chunks(services, body, plan, begun)
            return EventStream(chunks, begun.generation.abort, services.http.keep_alive_s)
        try:
            return JSONResponse(await until_gone(request.receive, _whole(services, body, plan, begun)))
        finally:
            begun.generation.abort()

    return routes


async def _chunks(services: Services, body: ChatBody, plan: ChatPlan, begun: Begun) -> AsyncIterator[dict[str, Any]]:
    chunks = Chunks(begun.envelope, begun.usage, body, f"{_KIND}.chunk")
    choices = _choices(services, body, plan)
    of_prompt = _of_prompt(body, plan)
    async for index, delta in _wanted(begun, choices):
        for part in choices[index].read(delta):
            yield chunks.chunk(part) | of_prompt
            of_prompt = {}
    if chunks.wants_usage:
        yield chunks.last()


async def _whole(services: Services, body: ChatBody, plan: ChatPlan, begun: Begun) -> dict[str, Any]:
    choices = _choices(services, body, plan)
    async for index, delta in _wanted(begun, choices):
        choices[index].read(delta)
    answer = begun.envelope.around(_KIND, [choice.whole() for choice in choices])
    return {**answer, **_of_prompt(body, plan), "usage": begun.usage.shown()}


async def _wanted(begun: Begun, choices: Sequence[ChatChoice]) -> AsyncIterator[tuple[int, Delta]]:
    """The deltas, counted, until the generation ends, or each choice has what it wants."""
    async for index, delta in begun.generation.deltas():
        begun.usage.count(index, delta)
        yield index, delta
        if choices[index].is_ended:
            begun.generation.end(index, delta)


def _choices(services: Services, body: ChatBody, plan: ChatPlan) -> list[ChatChoice]:
    return [ChatChoice(index, body, plan.reading, services.tokenizer) for index in range(body.n)]


def _of_prompt(body: ChatBody, plan: ChatPlan) -> dict[str, list[int]]:
    """As vLLM has it: beside the choices and, in a stream, in the first chunk only."""
    return {"prompt_token_ids": plan.prompt_ids} if body.return_token_ids else {}


def _params(body: ChatBody, plan: ChatPlan, max_context: int) -> SamplingParams:
    """Without a limit, what the context leaves; a prompt that leaves nothing is refused at submission."""
    max_tokens = body.asked_tokens or max(max_context - len(plan.prompt_ids), 1)
    params = sampling(body, max_tokens, body.top_logprobs if body.logprobs else None)
    return replace(params, shown_tokens=plan.reading.shown_tokens)
