"""Request bodies: read whole under a limit before any route sees them, but for the uploads, which read their own."""

from collections.abc import AsyncIterator, Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.disconnect import ClientGone
from server.api.errors import error_response
from server.ground.errors import TooLarge

_MAX_DISCARDED_BYTES = 4 * 1024**2
_MAX_OPEN_BYTES = 4096  # where strangers are answered; no such route wants a body


class BodyLimit:
    """ASGI middleware: 413 for a body above `max_bytes`; requests that are `exempt` by method and path pass unread.

    The `open_paths` answer those who have no key: they take 4 KiB at most.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, exempt: Callable[[str, str], bool], open_paths: Collection[str] = ()
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._open_paths = open_paths
        self._is_exempt = exempt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_exempt(scope["method"], scope["path"]):
            return await self._app(scope, receive, send)
        try:
            body = await self._read(scope, receive)
        except TooLarge as error:
            return await error_response(error)(scope, receive, send)
        except ClientGone:
            return None
        return await self._app(scope, _replayed(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        chunks = body_chunks(receive)
        body = bytearray()
        max_bytes = min(self._max_bytes, _MAX_OPEN_BYTES) if scope["path"] in self._open_paths else self._max_bytes
        is_too_large = declared_bytes(scope) > max_bytes
        async for chunk in chunks:
            body += chunk
            is_too_large = is_too_large or len(body) > max_bytes
            if is_too_large:
                await discard(chunks)
                raise TooLarge(f"The body is larger than {max_bytes} bytes; send less in one request.")
        return bytes(body)


def declared_bytes(scope: Scope) -> int:
    """The request's Content-Length; 0 where there is none."""
    declared = Headers(scope=scope).get("content-length", "")
    return int(declared) if declared.isdecimal() else 0


async def body_chunks(receive: Receive) -> AsyncIterator[bytes]:
    """A body as it arrives. Raises ClientGone if the client leaves before its end."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        more = message.get("more_body", False)
        yield message.get("body", b"")


async def discard(chunks: AsyncIterator[bytes]) -> None:
    """Read on for a while and drop it: a client that is still sending would miss an answer given at once."""
    num_bytes = 0
    async for chunk in chunks:
        num_bytes += len(chunk)
        if num_bytes > _MAX_DISCARDED_BYTES:
            return


def _replayed(body: bytes, receive: Receive) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
