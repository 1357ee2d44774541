"""POST /v1/completions: text goes on from a prompt; also scores a prompt (echo and logprobs, max_tokens 0 too)."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from server.api import logprobs
from server.api.answers import Begun, Chunks, begin, check_token_ids, sampling, truncated
from server.api.disconnect import until_gone
from server.api.json_route import JsonRoute
from server.api.schemas import CompletionBody
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
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/completions", tags=["generation"])
    async def complete(request: Request, body: CompletionBody) -> Response:
        prompts = await run_in_threadpool(_encoded, services, body)
        params = [_params(body, prompt, services.base.max_context) for prompt in prompts]
        begun = await begin(services, body, [prompt.ids for prompt in prompts], params, "cmpl")
        repeated = [prompt for prompt in prompts for _ in range(body.n)]
        choices = [_Choice(index, prompt, body, services.tokenizer) for index, prompt in enumerate(repeated)]
        if body.stream:
            return EventStream(_chunks(body, begun, choices), begun.generation.abort, services.http.keep_alive_s)
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
        self._wants_ids = body.return_token_ids
        self._unsent_prompt = prompt.text if body.echo else ""
        self._unsent_ids = list(prompt.ids)
        shown = frozenset[int]() if body.skip_special_tokens else tokenizer.all_special_ids
        self._prompt_offsets = logprobs.TextOffsets(tokenizer.decoder((), shown=shown), 0)
        offset = len(self._unsent_prompt)
        self._output_offsets = logprobs.TextOffsets(tokenizer.decoder(prompt.ids, shown=shown), offset)

    def part(self, delta: Delta) -> dict[str, Any]:
        text = self._unsent_prompt + delta.text
        self._unsent_prompt = ""
        listed = self._logprobs(delta) if self._wants_logprobs else None
        part = {"index": self.index, "text": text, "logprobs": listed, "finish_reason": delta.finish_reason}
        return part | self._ids(delta) if self._wants_ids else part

    def _ids(self, delta: Delta) -> dict[str, list[int]]:
        """vLLM's fields: the prompt's ids are in the first part only."""
        of_prompt, self._unsent_ids = self._unsent_ids, []
        ids = {"token_ids": list(delta.token_ids)}
        return {"prompt_token_ids": of_prompt, **ids} if of_prompt else ids

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
    """A step may add a token whose character is not whole yet: nothing to say, unless more than its text was asked."""
    has_more = part.get("token_ids") or (part["logprobs"] is not None and part["logprobs"]["tokens"])
    return not part["text"] and not has_more and part["finish_reason"] is None


async def _whole(begun: Begun, choices: Sequence[_Choice]) -> dict[str, Any]:
    """All parts put together: what the stream would have said, in one answer."""
    parts: list[list[dict[str, Any]]] = [[] for _ in choices]
    async for index, delta in begun.generation.deltas():
        begun.usage.count(index, delta)
        parts[index].append(choices[index].part(delta))
    joined = [_joined(of_choice) for of_choice in parts]
    return {**begun.envelope.around(_KIND, joined), "usage": begun.usage.shown()}


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    whole = {**parts[0], **parts[-1], "text": "".join(part["text"] for part in parts)}
    if "token_ids" in whole:
        whole["token_ids"] = [token for part in parts for token in part["token_ids"]]
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
    return [_encode(services, prompt, body) for prompt in body.prompts]


def _encode(services: Services, prompt: str | list[int], body: CompletionBody) -> Prompt:
    ids = services.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if not ids:
        raise BadRequest("The prompt is empty; send at least one token.", param="prompt")
    check_token_ids(services, ids, "prompt")
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    kept = truncated(body, ids, services.base.max_context, max_tokens)
    if isinstance(prompt, str) and len(kept) == len(ids):
        return Prompt(tuple(ids), prompt)
    return Prompt(tuple(kept), services.tokenizer.decode(kept, body.skip_special_tokens) if body.echo else "")
