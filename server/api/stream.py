"""Server-sent events as OpenAI's clients read them: `data: {...}` per chunk, `data: [DONE]` at a good end.

Knows nothing about what the chunks say.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.api import notes
from server.api.disconnect import ClientGone, until_gone
from server.api.errors import BROKEN, error_object, error_response, internal_error, log_failure
from server.ground.errors import GraftError

_LOG = logging.getLogger(__name__)
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # no proxy may hold chunks back
_DONE = b"data: [DONE]\n\n"
# Where clients that read lines as Python's `splitlines` does (httpx and what stands on it) would cut an event in two.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
_COMMENT = b": keep-alive\n\n"


class EventStream(Response):
    """Sends `chunks` as they come and calls `close` at the end, whatever the end is.

    The status is sent with the first chunk, so a failure before it is an ordinary error answer. A failure after it is
    an error event in the place of [DONE]: clients take a stream that just ends for a complete one. Where nothing has
    been sent for `keep_alive_s` (0: however long) a comment is, for proxies that end silent connections; as the first
    part it takes the status along.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncIterator[Mapping[str, Any]], close: Callable[[], None], keep_alive_s: float = 0.0
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._chunks = chunks
        self._close = close
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._answer(scope, receive, send))
        except ClientGone:
            notes.current().error = "client_gone"  # nobody is left to be told
        finally:
            self._close()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire = _Wire(send, {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        request_id = scope.get("request_id")
        last = _DONE
        try:
            async with wire.kept_alive(self._keep_alive_s):
                async for chunk in self._chunks:
                    await wire.write(_event(chunk))
        except GraftError as error:
            log_failure(error, request_id)
            if not wire.is_open:
                await error_response(error)(scope, receive, send)
                return
            last = _broken_off(scope, error)
        except Exception:  # a defect: once the status is out, an event is the only way left to tell the client
            if not wire.is_open:
                raise
            _LOG.exception("the stream of request %s failed", request_id)
            last = _broken_off(scope, internal_error())
        await wire.write(last)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Wire:
    """The way to the client: the status goes out with the first part, whatever that is."""

    def __init__(self, send: Send, start: Message) -> None:
        self._send = send
        self._start = start
        self._turn = asyncio.Lock()
        self._wrote_s = time.monotonic()
        self.is_open = False

    async def write(self, part: bytes) -> None:
        async with self._turn:
            if not self.is_open:
                await self._send(self._start)
                self.is_open = True
            await self._send({"type": "http.response.body", "body": part, "more_body": True})
            self._wrote_s = time.monotonic()

    @asynccontextmanager
    async def kept_alive(self, idle_s: float) -> AsyncIterator[None]:
        """Whenever nothing has been written for `idle_s`, a comment is; never for 0."""
        task = asyncio.create_task(self._beat(idle_s)) if idle_s else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _beat(self, idle_s: float) -> None:
        while True:
            rest_s = self._wrote_s + idle_s - time.monotonic()
            if rest_s > 0:
                await asyncio.sleep(rest_s)
            else:
                await self.write(_COMMENT)


def _broken_off(scope: Scope, error: GraftError) -> bytes:
    """The last event of a stream that fails: its status says that all is well, so its scope says why it is not."""
    scope[BROKEN] = error.reason
    return _event(error_object(error))


def _event(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text.translate(_LINE_ENDS)}\n\n".encode()
