"""The heads of requests and of answers: how large the ones may be, and what the others tell browsers.

Knows nothing about routes or bodies.
"""

from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response
from server.ground.errors import HeadTooLarge

MAX_HEADERS = 100
MAX_HEADERS_BYTES = 32 * 1024
MAX_TARGET_BYTES = 8 * 1024  # path and query

# Answers are data: no browser is to guess another type, run something in them, frame them or keep them. A route that
# answers with a page says so itself.
SAFE_HEADERS: Mapping[str, str] = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Heads:
    """ASGI middleware: 431 for a head over the limits; the answers have SAFE_HEADERS, where they say nothing else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = _refusal(scope)
        if refusal is not None:
            return await error_response(refusal)(scope, receive, send_safely)
        return await self._app(scope, receive, send_safely)


def _refusal(scope: Scope) -> HeadTooLarge | None:
    headers = scope["headers"]
    if len(headers) > MAX_HEADERS:
        return HeadTooLarge(f"The request has {len(headers)} headers; at most {MAX_HEADERS} are taken.")
    if sum(len(name) + len(value) for name, value in headers) > MAX_HEADERS_BYTES:
        return HeadTooLarge(f"The request's headers are larger than {MAX_HEADERS_BYTES} bytes; send less.")
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_TARGET_BYTES:
        return HeadTooLarge(f"The request's path and query are larger than {MAX_TARGET_BYTES} bytes; send less.")
    return None
