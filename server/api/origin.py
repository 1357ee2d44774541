"""The web page behind a request: without an API key, none but the server's own pages may change or start anything.

A server on loopback without a key trusts its machine. A browser on that machine sends there whatever any web page asks
it to: a form with files needs no permission. Browsers say whose page it was, in headers that no page can set.
"""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import echo, error_response
from server.ground.errors import Forbidden

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_FOREIGN_SITES = frozenset({"cross-site", "same-site"})  # of Sec-Fetch-Site; same-site is another port of this machine
_DEFAULT_PORTS = {"http": 80, "https": 443}


class OriginCheck:
    """ASGI middleware that refuses what a browser sends for a page of another origin, reading apart.

    Programs send neither header, and pass. A page of the server's own must have come from a loopback address: under
    another name it may be a stranger's, who has pointed that name at this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str] = ()) -> None:
        """`allowed`: the origins that the operator trusts beside the server's own."""
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in _SAFE_METHODS:
            page = _foreign_page(Headers(scope=scope))
            if page is not None and page not in self._allowed:
                await error_response(_refusal(page))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _foreign_page(headers: Headers) -> str | None:
    """The origin of the page behind a request if it is not the server's own; None too where no page is."""
    origin = headers.get("origin")
    if origin is not None:
        return None if _is_own(origin, headers.get("host", "")) else origin
    return "another site" if headers.get("sec-fetch-site", "").lower() in _FOREIGN_SITES else None


def _is_own(origin: str, host: str) -> bool:
    """Whether an Origin is a loopback address, and the very one that the request was sent to."""
    try:
        page = urlsplit(origin)
        own = urlsplit(f"{page.scheme}://{host}")
        ports = [parts.port or _DEFAULT_PORTS.get(parts.scheme) for parts in (page, own)]
    except ValueError:
        return False
    return page.hostname == own.hostname and ports[0] == ports[1] and _is_loopback(page.hostname)


def _is_loopback(hostname: str | None) -> bool:
    if hostname is None:
        return False
    try:
        return ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return hostname == "localhost"


def _refusal(page: str) -> Forbidden:
    return Forbidden(
        f"This request comes from a web page of {echo(page)}, and this server has no API key to tell its users by. "
        f"Start it with GRAFT_API_KEY and send the key, or with --allowed-origins and that page's origin, or ask from "
        f"a program or from a page of the server itself."
    )
