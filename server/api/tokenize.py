"""Text to tokens and back over HTTP: POST /tokenize, POST /detokenize, GET /tokenizer_info, as vLLM has them.

For clients that count tokens or score texts without a copy of the tokenizer (lm-eval). Adapters change no tokens.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from server.api.answers import check_token_ids, truncated
from server.api.json_body import Body, Text
from server.api.json_route import JsonRoute
from server.api.prompting import Planner
from server.api.schemas import ChatBody
from server.api.selection import chosen_parts, unknown_model
from server.api.services import Services
from server.engine.entry import Part
from server.ground.errors import AdapterNotFound

MAX_TOKENS = 1 << 20  # of one text


class TokenizePromptBody(Body):
    model: Text | None = None
    prompt: Text
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatBody(ChatBody):
    """A chat's whole body, as it would be sent to be answered: the tokens are those of its prompt."""

    return_token_strs: bool = False


def _form(value: object) -> str:
    has_messages = isinstance(value, TokenizeChatBody) or (isinstance(value, dict) and "messages" in value)
    return "a conversation" if has_messages else "a prompt"


TokenizeBody = Annotated[
    Annotated[TokenizePromptBody, Tag("a prompt")] | Annotated[TokenizeChatBody, Tag("a conversation")],
    Discriminator(_form),
]


class DetokenizeBody(Body):
    model: Text | None = None
    tokens: Annotated[list[int], Field(max_length=MAX_TOKENS, fail_fast=True)]


def router(services: Services) -> APIRouter:
    routes, planner = APIRouter(tags=["tokens"], route_class=JsonRoute), Planner(services)

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> JSONResponse:
        """The tokens of a prompt, or of the prompt that the chat template makes of messages."""
        if isinstance(body, TokenizeChatBody):
            ids = (await planner.plan(body, is_bound=False)).prompt_ids
            check_token_ids(services, ids, "messages")
            ids = truncated(body, ids, services.base.max_context, body.asked_tokens or 1)
            parts = chosen_parts(services, body.model, body.adapters)
            await _check_are_there(services, parts, is_model=body.adapter is None)
        else:
            await _check_is_served(services, body.model)
            ids = await run_in_threadpool(services.tokenizer.encode, body.prompt, body.add_special_tokens)
        return JSONResponse(_shown(services, ids, body.return_token_strs))

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> JSONResponse:
        """The text of tokens, special ones shown; bytes that are no whole character come out as U+FFFD."""
        await _check_is_served(services, body.model)
        check_token_ids(services, body.tokens, "tokens")
        text = await run_in_threadpool(services.tokenizer.decode, body.tokens, skip_special_tokens=False)
        return JSONResponse({"prompt": text})

    @routes.get("/tokenizer_info")
    def tokenizer_info() -> JSONResponse:
        """The tokenizer's class, special tokens and chat template, named as in its tokenizer_config.json."""
        return JSONResponse({**services.tokenizer.facts(), "model_max_length": services.base.max_context})

    return routes


async def _check_is_served(services: Services, model: str | None) -> None:
    """Raises NotFound for a model that is neither a name of the base nor an adapter."""
    await _check_are_there(services, chosen_parts(services, model, None), is_model=True)


async def _check_are_there(services: Services, parts: Sequence[Part], *, is_model: bool) -> None:
    """Raises NotFound for the first adapter that is unknown, as a lease on it would; nothing is leased or loaded."""
    for spec, _ in parts:
        try:
            await run_in_threadpool(services.registry.describe, spec)  # which may ask a store that servers share
        except AdapterNotFound as error:
            if is_model:
                raise await run_in_threadpool(unknown_model, services, spec) from error
            raise


def _shown(services: Services, ids: Sequence[int], with_strs: bool) -> dict[str, Any]:
    return {
        "count": len(ids),
        "max_model_len": services.base.max_context,
        "tokens": list(ids),
        "token_strs": services.tokenizer.names(ids) if with_strs else None,
    }
