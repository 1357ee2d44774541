"""POST /v1/chat/completions: the model's chat template makes a prompt of the messages, and the answer is a message."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from server.api import logprobs
from server.api.answers import Begun, Chunks, begin, check_token_ids, sampling
from server.api.disconnect import until_gone
from server.api.schemas import ChatBody
from server.api.selection import chosen_parts, look_elsewhere
from server.api.services import Services
from server.api.stream import EventStream
from server.engine.sequence import Delta, SamplingParams
from server.model.tokenizer import Tokenizer

_KIND = "chat.completion"
# OpenAI's newer name for the same turn; chat templates know the older one.
_TEMPLATE_ROLES = {"developer": "system"}


def router(services: Services) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", tags=["generation"])
    async def chat(request: Request, body: ChatBody) -> Response:
        prompt = await run_in_threadpool(services.tokenizer.chat, _turns(body))
        check_token_ids(services, prompt, "messages")
        params = _params(body, len(prompt), services.base.max_context)
        await look_elsewhere(services, (spec for spec, _ in chosen_parts(services, body.model, body.adapters)))
        begun = begin(services, body, [prompt], [params], "chatcmpl")
        choices = _Choices(body, services.tokenizer)
        if body.stream:
            return EventStream(_chunks(body, begun, choices), begun.generation.abort)
        try:
            return JSONResponse(await until_gone(request.receive, _whole(begun, choices, body.n)))
        finally:
            begun.generation.abort()

    return routes


class _Choices:
    """Turns deltas into parts of OpenAI's choices."""

    def __init__(self, body: ChatBody, tokenizer: Tokenizer) -> None:
        self._wants_logprobs = body.logprobs
        self._tokenizer = tokenizer

    def logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        return logprobs.chat([entry for delta in deltas for entry in delta.logprobs], self._tokenizer)

    def message(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """A whole choice."""
        message = {"role": "assistant", "content": "".join(delta.text for delta in deltas), "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self.logprobs(deltas),
            "finish_reason": deltas[-1].finish_reason,
        }

    def parts(self, index: int, delta: Delta, *, is_first: bool) -> list[dict[str, Any]]:
        """A delta in a stream: the role before the first content, the finish reason by itself after the last."""
        parts = [_part(index, {"role": "assistant", "content": "", "refusal": None})] if is_first else []
        if delta.text or (self._wants_logprobs and delta.logprobs):
            parts.append({**_part(index, {"content": delta.text}), "logprobs": self.logprobs([delta])})
        if delta.finish_reason is not None:
            parts.append({**_part(index, {}), "finish_reason": delta.finish_reason})
        return parts


def _part(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


async def _chunks(body: ChatBody, begun: Begun, choices: _Choices) -> AsyncIterator[dict[str, Any]]:
    chunks = Chunks(begun.envelope, begun.usage, body, f"{_KIND}.chunk")
    heard: set[int] = set()
    async for index, delta in begun.generation.deltas():
        begun.usage.count(index, delta)
        for part in choices.parts(index, delta, is_first=index not in heard):
            yield chunks.chunk(part)
        heard.add(index)
    if chunks.wants_usage:
        yield chunks.last()


async def _whole(begun: Begun, choices: _Choices, num_choices: int) -> dict[str, Any]:
    deltas: list[list[Delta]] = [[] for _ in range(num_choices)]
    async for index, delta in begun.generation.deltas():
        begun.usage.count(index, delta)
        deltas[index].append(delta)
    messages = [choices.message(index, of_choice) for index, of_choice in enumerate(deltas)]
    return {**begun.envelope.around(_KIND, messages), "usage": begun.usage.shown()}


def _turns(body: ChatBody) -> list[dict[str, str]]:
    return [
        {"role": _TEMPLATE_ROLES.get(message.role, message.role), "content": message.text} for message in body.messages
    ]


def _params(body: ChatBody, num_prompt_tokens: int, max_context: int) -> SamplingParams:
    """Without a limit, what the context leaves; a prompt that leaves nothing is refused at submission."""
    asked = body.max_completion_tokens or body.max_tokens
    max_tokens = asked or max(max_context - num_prompt_tokens, 1)
    return sampling(body, max_tokens, body.top_logprobs if body.logprobs else None)
