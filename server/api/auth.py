"""Who may talk to the server, about what and how much: the key of a request, its limits, the scope of its route.

Every path asks for a key but those that probes need. Deny by default: a route that someone adds tomorrow is closed
until `keys.scopes` names it. Knows nothing about where keys come from.
"""

from collections.abc import Collection, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.adapters.asker import Asker, ask_as
from server.api.errors import error_response
from server.api.keys.budget import Budgets, spend_from
from server.api.keys.key import Key
from server.api.keys.keyring import SINGLE, Keyring
from server.api.keys.scopes import SCOPES
from server.ground.errors import Forbidden, RateLimited, Unauthorized

_KEY = "graft.key"  # of the ASGI scope: the request's key; none where no keys are asked for


class KeyCheck:
    """ASGI middleware that lets a request through only with `Authorization: Bearer <key>`, and says whose it is."""

    def __init__(self, app: ASGIApp, keyring: Keyring | None, open_paths: Collection[str]) -> None:
        """`keyring`: None where everybody is the operator."""
        self._app = app
        self._keyring = keyring
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        key = self._key_of(scope)
        # scope["path"] is what routing uses; a URL put together from headers can be made to disagree with it.
        if self._keyring is None or key is not None or scope["path"] in self._open_paths:
            scope[_KEY] = key
            ask_as(_asker(key, scope.get("request_id")))
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        return await error_response(_REFUSAL)(scope, receive, send)

    def _key_of(self, scope: Scope) -> Key | None:
        if self._keyring is None:
            return None
        scheme, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
        key = self._keyring.find(secret.strip())
        return key if scheme.lower() == "bearer" else None


class BudgetCheck:
    """ASGI middleware that holds a key to its limits, and tells it what is left of them. Every request counts."""

    def __init__(self, app: ASGIApp, budgets: Budgets) -> None:
        self._app = app
        self._budgets = budgets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = key_of(scope)
        if key is None:
            return await self._app(scope, receive, send)
        budget = self._budgets.of(key)

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(budget.headers())
            await send(message)

        try:
            share = budget.begin()
        except RateLimited as error:
            return await error_response(error)(scope, receive, send_with_limits)

        async def send_and_end(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                share.end()  # before the last byte: who has read the answer may ask again at once
            await send_with_limits(message)

        spend_from(share)
        try:
            await self._app(scope, receive, send_and_end)
        finally:
            share.end()


class ScopeCheck:
    """ASGI middleware that stands before the routes, and lets a key through to those that its scopes allow.

    What no route takes passes: it is answered with a 404 or a 405.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], open_paths: Collection[str]) -> None:
        self._app = app
        self._routes = routes
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is not None:
            return await error_response(refusal)(scope, receive, send)
        return await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Forbidden | None:
        key: Key | None = scope[_KEY]
        route = next((route for route in self._routes if route.matches(scope)[0] is Match.FULL), None)
        path = getattr(route, "path", None)
        if route is None or path in self._open_paths:
            return None
        needed = SCOPES.get((scope["method"], path), frozenset()) if path is not None else frozenset()
        if key is not None and key.scopes & needed:
            return None
        wanted = " or ".join(sorted(needed)) or "that no key has"
        return Forbidden(f"This route needs a key with the scope {wanted}.", code="missing_scope")


def key_of(scope: Scope) -> Key | None:
    """The key of a request; None where none is asked for."""
    key: Key | None = scope.get(_KEY)
    return key


def _asker(key: Key | None, request_id: str | None) -> Asker:
    """In whose name the request looks at adapters."""
    if key is None or key.name == SINGLE:
        return Asker(who="anybody" if key is None else key.name, request_id=request_id)
    return Asker(
        who=key.name,
        owner=None if key.is_operator else key.owner,
        names=key.adapters,
        max_bytes=key.limits.storage_bytes,
        max_adapters=key.limits.adapters,
        request_id=request_id,
    )


_REFUSAL = Unauthorized("The API key is missing or wrong. Send it as the header Authorization: Bearer <key>.")
