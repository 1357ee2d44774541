"""Server-sent events as OpenAI's clients read them: `data: {...}` per chunk, `data: [DONE]` at a good end.

Knows nothing about what the chunks say.
"""

import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.disconnect import ClientGone, until_gone
from server.api.errors import error_object, error_response, internal_error
from server.ground.errors import GraftError

_LOG = logging.getLogger(__name__)
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # no proxy may hold chunks back
_DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends `chunks` as they come and calls `close` at the end, whatever the end is.

    The status is sent with the first chunk, so a failure before it is an ordinary error answer. A failure after it is
    an error event in the place of [DONE]: clients take a stream that just ends for a complete one.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[Mapping[str, Any]], close: Callable[[], None]) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._chunks = chunks
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._answer(scope, receive, send))
        except ClientGone:
            pass  # nobody is left to be told
        finally:
            self._close()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            first = await anext(self._chunks)
        except GraftError as error:
            await error_response(error)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._send_events(first, send, scope.get("request_id"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, first: Mapping[str, Any], send: Send, request_id: str | None) -> None:
        last = _DONE
        await _send_part(_event(first), send)
        try:
            async for chunk in self._chunks:
                await _send_part(_event(chunk), send)
        except GraftError as error:
            last = _event(error_object(error))
        except Exception:  # a defect: the status is out, so that this event is the only way left to tell the client
            _LOG.exception("the stream of request %s failed", request_id)
            last = _event(error_object(internal_error()))
        await _send_part(last, send)


async def _send_part(part: bytes, send: Send) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})


def _event(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
