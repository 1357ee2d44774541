"""POST /v1/completions: text goes on from a prompt; also scores a prompt (echo and logprobs, max_tokens 0 too)."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from server.api import logprobs
from server.api.answers import Begun, Chunks, begin, check_token_ids, sampling
from server.api.disconnect import until_gone
from server.api.schemas import CompletionBody
from server.api.selection import chosen_parts, look_elsewhere
from server.api.services import Services
from server.api.stream import EventStream
from server.engine.sequence import Delta, SamplingParams
from server.ground.errors import BadRequest
from server.model.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's
_KIND = "text_completion"


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: tuple[int, ...]
    text: str  # as it is echoed


def router(services: Services) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions", tags=["generation"])
    async def complete(request: Request, body: CompletionBody) -> Response:
        prompts = await run_in_threadpool(_encoded, services, body)
        params = [_params(body, prompt, services.base.max_context) for prompt in prompts]
        await look_elsewhere(services, (spec for spec, _ in chosen_parts(services, body.model, body.adapters)))
        begun = begin(services, body, [prompt.ids for prompt in prompts], params, "cmpl")
        repeated = [prompt for prompt in prompts for _ in range(body.n)]
        choices = [_Choice(index, prompt, body, services.tokenizer) for index, prompt in enumerate(repeated)]
        if body.stream:
            return EventStream(_chunks(body, begun, choices), begun.generation.abort)
        try:
            return JSONResponse(await until_gone(request.receive, _whole(begun, choices)))
        finally:
            begun.generation.abort()

    return routes


class _Choice:
    """Turns the deltas of one sequence into parts of OpenAI's choice, in order. With echo the prompt comes first."""

    def __init__(self, index: int, prompt: Prompt, body: CompletionBody, tokenizer: Tokenizer) -> None:
        self.index = index
        self._tokenizer = tokenizer
        self._wants_logprobs = body.logprobs is not None
        self._unsent_prompt = prompt.text if body.echo else ""
        self._prompt_offsets = logprobs.TextOffsets(tokenizer.decoder(()), 0)
        self._output_offsets = logprobs.TextOffsets(tokenizer.decoder(prompt.ids), len(self._unsent_prompt))

    def part(self, delta: Delta) -> dict[str, Any]:
        text = self._unsent_prompt + delta.text
        self._unsent_prompt = ""
        listed = self._logprobs(delta) if self._wants_logprobs else None
        return {"index": self.index, "text": text, "logprobs": listed, "finish_reason": delta.finish_reason}

    def _logprobs(self, delta: Delta) -> dict[str, list[Any]]:
        of_prompt = delta.prompt_logprobs or ()
        offsets = [*self._prompt_offsets.following(of_prompt), *self._output_offsets.following(delta.logprobs)]
        return logprobs.legacy([*of_prompt, *delta.logprobs], self._tokenizer, offsets)


async def _chunks(body: CompletionBody, begun: Begun, choices: Sequence[_Choice]) -> AsyncIterator[dict[str, Any]]:
    chunks = Chunks(begun.envelope, begun.usage, body, _KIND)
    async for index, delta in begun.generation.deltas():
        begun.usage.count(index, delta)
        part = choices[index].part(delta)
        if not _is_empty(part):
            yield chunks.chunk(part)
    if chunks.wants_usage:
        yield chunks.last()


def _is_empty(part: dict[str, Any]) -> bool:
    """A step may add a token whose character is not whole yet: nothing to say, unless its log-probability was asked."""
    has_logprobs = part["logprobs"] is not None and part["logprobs"]["tokens"]
    return not part["text"] and not has_logprobs and part["finish_reason"] is None


async def _whole(begun: Begun, choices: Sequence[_Choice]) -> dict[str, Any]:
    """All parts put together: what the stream would have said, in one answer."""
    parts: list[list[dict[str, Any]]] = [[] for _ in choices]
    async for index, delta in begun.generation.deltas():
        begun.usage.count(index, delta)
        parts[index].append(choices[index].part(delta))
    joined = [_joined(of_choice) for of_choice in parts]
    return {**begun.envelope.around(_KIND, joined), "usage": begun.usage.shown()}


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    whole = {**parts[-1], "text": "".join(part["text"] for part in parts)}
    if whole["logprobs"] is not None:
        keys = whole["logprobs"].keys()
        whole["logprobs"] = {key: [item for part in parts for item in part["logprobs"][key]] for key in keys}
    return whole


def _params(body: CompletionBody, prompt: Prompt, max_context: int) -> SamplingParams:
    """Without max_tokens, 16 or what the context leaves; a prompt that leaves nothing is refused at submission."""
    room = max(max_context - len(prompt.ids), 1)
    max_tokens = min(DEFAULT_MAX_TOKENS, room) if body.max_tokens is None else body.max_tokens
    return sampling(body, max_tokens, body.logprobs, body.logprobs if body.echo else None)


def _encoded(services: Services, body: CompletionBody) -> list[Prompt]:
    return [_encode(services, prompt, body.echo) for prompt in body.prompts]


def _encode(services: Services, prompt: str | list[int], echo: bool) -> Prompt:
    ids = services.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if not ids:
        raise BadRequest("The prompt is empty; send at least one token.", param="prompt")
    check_token_ids(services, ids, "prompt")
    if isinstance(prompt, str):
        return Prompt(tuple(ids), prompt)
    return Prompt(tuple(ids), services.tokenizer.decode(ids) if echo else "")
