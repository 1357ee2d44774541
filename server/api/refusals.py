"""Refusals of changes in the audit log: whatever stands in the way of one leaves a line, wherever it is refused.

Owns which routes change something, and what the audit log calls that. What the registry refuses it has noted itself;
this sees the rest: scopes, limits, bodies, names that are not free. Knows nothing about how a change is made.
"""

from collections.abc import Mapping, Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.adapters.audit import Trail, begin_trail, note
from server.api import notes
from server.api.errors import REASON, echo

# (method, path) -> the verb in the audit log. A route that changes an adapter, or where it is, must be here.
CHANGES: Mapping[tuple[str, str], str] = {
    ("POST", "/v1/adapters"): "register",
    ("PUT", "/v1/adapters/{name}"): "register",
    ("POST", "/v1/load_lora_adapter"): "register",
    ("DELETE", "/v1/adapters/{name}"): "delete",
    ("POST", "/v1/unload_lora_adapter"): "delete",
    ("DELETE", "/v1/adapters/{name}/fetch"): "cancel fetch",
    ("POST", "/v1/adapters/merge"): "merge",
    ("POST", "/v1/adapters/{name}/rollback"): "roll back",
    ("POST", "/v1/adapters/{name}/load"): "load",
    ("POST", "/v1/adapters/{name}/unload"): "unload",
    ("POST", "/v1/adapters/{name}/pin"): "pin",
    ("POST", "/v1/adapters/{name}/unpin"): "unpin",
    ("POST", "/v1/adapters/{name}/lift_quarantine"): "lift quarantine",
}
_METHODS = frozenset(method for method, _ in CHANGES)


class RefusalAudit:
    """ASGI middleware, inside of the key and outside of all that may refuse a request of it."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in _METHODS:
            return await self._app(scope, receive, send)
        trail = begin_trail()

        async def send_noted(message: Message) -> None:
            # Before the answer: who has read it finds the line.
            if message["type"] == "http.response.start" and REASON in scope and not trail.is_told:
                self._note(scope, trail)
            await send(message)

        return await self._app(scope, receive, send_noted)

    def _note(self, scope: Scope, trail: Trail) -> None:
        path, name = self._route_of(scope)
        verb = CHANGES.get((scope["method"], path))
        if verb is not None:
            adapter = trail.adapter or name
            note(trail.verb or verb, adapter=None if adapter is None else echo(adapter), result=notes.current().error)

    def _route_of(self, scope: Scope) -> tuple[str, str | None]:
        """The template of the route that a request is for, whether it came so far or not, and the name in its path."""
        asked = {**scope, "path": scope["path"].removesuffix("/")}
        for route in self._routes:
            match, found = route.matches(asked)
            if match is Match.FULL:
                return getattr(route, "path", ""), found.get("path_params", {}).get("name")
        return "", None
