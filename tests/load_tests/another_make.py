"""A small server of another make: vLLM's dialect, and every way in which an answer can go wrong, over real sockets.

The name in `model` chooses the answer, so that one run can meet them all.
"""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aiohttp import web

BASE = "another-base"
TOKENS = (" sea", " and", " sky")
TOKENS_PER_WORD, OVERHEAD = 2, 1
WAIT_S = 120  # for a server that hangs, not for one that is slow

Answer = Callable[["AnotherMake", web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


class AnotherMake:
    """Remembers what it was asked. `models` is the status and the text of its list, if it is to be an odd one.

    `num_together` requests for `together` are answered once all of them are there.
    """

    def __init__(
        self, adapters: Sequence[str] = (), models: tuple[int, str] | None = None, num_together: int = 0
    ) -> None:
        self.adapters = adapters
        self.models = models
        self.num_together = num_together
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.on_request: Callable[[], None] = lambda: None
        self.released = asyncio.Event()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Its URL, on the running loop."""
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
            await site.start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            self.released.set()
            await runner.cleanup()

    @contextmanager
    def in_a_thread(self) -> Iterator[str]:
        """Its URL, for a client that has a loop of its own."""
        found: list[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = []
        is_ready = threading.Event()

        async def listen() -> None:
            stop = asyncio.Event()
            async with self.listening() as url:
                found.append((url, asyncio.get_running_loop(), stop))
                is_ready.set()
                await stop.wait()

        thread = threading.Thread(target=asyncio.run, args=[listen()])
        thread.start()
        assert is_ready.wait(WAIT_S), "the stub did not start"
        url, loop, stop = found[0]
        try:
            yield url
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()

    async def _models(self, request: web.Request) -> web.Response:
        self.keys.append(request.headers.get("authorization"))
        if self.models is not None:
            status, text = self.models
            return web.Response(status=status, text=text, content_type="application/json")
        cards = [{"id": BASE, "object": "model", "owned_by": "vllm", "root": "/models/base", "parent": None}]
        cards += [{"id": name, "object": "model", "root": f"/loras/{name}", "parent": BASE} for name in self.adapters]
        return web.json_response({"object": "list", "data": cards})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        self.keys.append(request.headers.get("authorization"))
        self.on_request()
        return await ANSWERS.get(body["model"], whole)(self, request, body)


@contextmanager
def nobody_listening() -> Iterator[str]:
    """A URL at which connections are refused: the port is taken and not listened on, so no other process gets it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def vllm_error(status: int, kind: str, message: str) -> web.Response:
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return web.json_response(body, status=status)


def chunk(body: dict[str, Any], text: str, finish_reason: str | None = None) -> dict[str, Any]:
    said = {"delta": {"content": text}} if "messages" in body else {"text": text}
    choice = {"index": 0, "logprobs": None, "finish_reason": finish_reason, "stop_reason": None} | said
    return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice], "usage": None}


async def stream(request: web.Request, *events: dict[str, Any] | str) -> web.StreamResponse:
    """An answer that has begun with `events`; it is open."""
    answer = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
    await answer.prepare(request)
    for event in events:
        await answer.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
    return answer


def tokens(body: dict[str, Any]) -> list[dict[str, Any]]:
    """As many as were asked for, three at most; the last says why it ends."""
    shown = TOKENS[: body["max_tokens"]]
    return [chunk(body, text, "length" if text is shown[-1] else None) for text in shown]


def usage(body: dict[str, Any]) -> dict[str, Any]:
    text = body["messages"][0]["content"] if "messages" in body else body["prompt"]
    num_prompt_tokens = TOKENS_PER_WORD * len(text.split()) + OVERHEAD
    counts = {"prompt_tokens": num_prompt_tokens, "completion_tokens": len(tokens(body))}
    return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [], "usage": counts}


async def whole(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    counted = [usage(body)] if "stream_options" in body else []
    return await stream(request, *tokens(body), *counted, "[DONE]")


async def together(make: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    if len(make.asked) == make.num_together:
        make.released.set()
    await make.released.wait()
    return await whole(make, request, body)


async def uncounted(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return await stream(request, *tokens(body), "[DONE]")


async def without_done(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return await stream(request, *tokens(body))


async def silent(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """The model ends its answer at once."""
    return await stream(request, chunk(body, "", "stop"), "[DONE]")


async def empty(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return await stream(request, "[DONE]")


async def missing(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return vllm_error(404, "NotFoundError", f"The model `{body['model']}` does not exist.")


async def broken(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return vllm_error(500, "InternalServerError", "EngineCore encountered an issue.")


async def broken_proxy(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.Response(status=502, text="<h1>Bad Gateway</h1>" + 200_000 * "x", content_type="text/html")


async def broken_off(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """An error whose own words are cut."""
    answer = web.StreamResponse(status=503)
    await answer.prepare(request)
    await answer.write(b"no room for")
    assert request.transport is not None
    request.transport.close()
    return answer


async def moved(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.Response(status=307, headers={"location": "/v1/completions"}, text="elsewhere")


async def unstreamed(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.json_response(chunk(body, " sea", "length"))


async def garbled(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return await stream(request, tokens(body)[0], "{not json")


async def failing(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """As vLLM does after the headers are gone: an error for an event, then the usual end."""
    error = {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}
    return await stream(request, chunk(body, TOKENS[0]), error, "[DONE]")


async def ending_early(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return await stream(request, chunk(body, TOKENS[0]))


async def cut(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    answer = await stream(request, chunk(body, TOKENS[0]))
    assert request.transport is not None
    request.transport.close()
    return answer


async def hung_up(_: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def held(make: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """One token, then nothing until the server is closed."""
    answer = await stream(request, chunk(body, TOKENS[0]))
    await make.released.wait()
    return answer


async def held_after_done(make: AnotherMake, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    answer = await stream(request, *tokens(body), usage(body), "[DONE]")
    await make.released.wait()
    return answer


ANSWERS: dict[str, Answer] = {
    answer.__name__: answer
    for answer in (
        whole,
        together,
        uncounted,
        without_done,
        silent,
        empty,
        missing,
        broken,
        broken_proxy,
        broken_off,
        moved,
        unstreamed,
        garbled,
        failing,
        ending_early,
        cut,
        hung_up,
        held,
        held_after_done,
    )
}
