"""The API key: who may talk to the server.

Every path asks for the key but those that probes need. Deny by default: a route that someone adds tomorrow is
closed until it is named here.
"""

import hashlib
import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import error_response
from server.ground.errors import Unauthorized

OPEN_PATHS = frozenset({"/health", "/ping", "/ready", "/v2/health/live", "/v2/health/ready", "/version"})


class KeyCheck:
    """ASGI middleware that lets a request through only with `Authorization: Bearer <key>`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._digest = _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # scope["path"] is what routing uses; a URL put together from headers can be made to disagree with it.
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._is_authorized(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await error_response(_REFUSAL)(scope, receive, send)

    def _is_authorized(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        # Digests have one length, so that the comparison's time says nothing about the key.
        return secrets.compare_digest(_digest(key.strip()), self._digest) and scheme.lower() == "bearer"


_REFUSAL = Unauthorized("The API key is missing or wrong. Send it as the header Authorization: Bearer <key>.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
