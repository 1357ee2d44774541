"""Fields that no route knows, where the operator lets them pass (--unknown-fields warn): the answer names them.

Owns the header and the list behind it, one per request. Which fields are unknown is judged where bodies are validated.
"""

from contextvars import ContextVar
from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-ignored-fields"
_MAX_NAMED = 32
_MAX_NAME_CHARS = 64
_TOKEN_CHARS = "!#$&'*+.^_`|~-[]"  # beside letters and digits; the rest is percent-encoded, the comma above all

_ignored: ContextVar[dict[str, None] | None] = ContextVar("ignored_fields", default=None)


def may_ignore(name: str) -> bool:
    """Whether this request's unknown fields pass; if so, the answer's header will name this one."""
    names = _ignored.get()
    if names is None:
        return False
    names[name] = None
    return True


class IgnoredFields:
    """ASGI middleware under which unknown fields pass, each named in a header of the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names: dict[str, None] = {}  # in the order of their first use

        async def send_with_names(message: Message) -> None:
            if message["type"] == "http.response.start" and names:
                MutableHeaders(scope=message)[HEADER] = _shown(list(names))
            await send(message)

        token = _ignored.set(names)
        try:
            await self._app(scope, receive, send_with_names)
        finally:
            _ignored.reset(token)


def _shown(names: list[str]) -> str:
    """The names as a header's list; "+3" stands for three more."""
    shown = [_encoded(name) for name in names[:_MAX_NAMED]]
    more = len(names) - len(shown)
    return ", ".join(shown + ([f"+{more}"] if more > 0 else []))


def _encoded(name: str) -> str:
    return quote(name.encode(errors="replace"), safe=_TOKEN_CHARS)[:_MAX_NAME_CHARS] or '""'
