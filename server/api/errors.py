"""Errors as clients meet them: OpenAI's `{"error": {message, type, param, code}}`, for every failure there is.

Owns the mapping from exceptions to that object, its status and its headers. Knows nothing about what failed.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from server.api import notes
from server.api.disconnect import ClientGone
from server.ground.errors import BadRequest, Conflict, GraftError, Overloaded, RateLimited, RequestTimedOut, StorageFull

MAX_ECHO_CHARS = 200  # of anything that the client sent and an error repeats
_LONGEST_RETRY_S = 60  # that a client should sit out by itself
_RESTART_S = 10  # what a client should wait for a server that cannot go on
STATUS_CLIENT_GONE = 499  # nobody reads it; it is what metrics show
REASON = "graft.reason"  # the key in a request's scope of why it was answered with an error
BROKEN = "graft.broken"  # and of why its answer failed when its status was out

_LOG = logging.getLogger(__name__)
_HTTP_CODES = {401: "unauthorized", 404: "route_not_found", 405: "method_not_allowed", 413: "too_large"}
_METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
_ALTERNATIVES = ("int", "str")  # as pydantic calls them; its other words for them are no identifiers


def error_object(error: GraftError) -> dict[str, Any]:
    notes.current().error = error.code
    param = None if error.param is None else _encodable(error.param)
    body = {"message": _encodable(error.message), "type": error.type, "param": param, "code": error.code}
    return {"error": body}


class ErrorResponse(JSONResponse):
    """An answer that says in the request's scope why it is an error: `traffic` counts it."""

    def __init__(
        self,
        error: GraftError,
        status: int,
        headers: Mapping[str, str] | None,
        content: Mapping[str, Any] | None = None,
    ) -> None:
        """`content` in the place of OpenAI's error object."""
        notes.current().error = error.code
        super().__init__(content or error_object(error), status, headers=headers)
        self._reason = error.reason

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[REASON] = self._reason
        await super().__call__(scope, receive, send)


def error_response(error: GraftError) -> ErrorResponse:
    return ErrorResponse(error, error.status, _headers(error))


def internal_error() -> GraftError:
    """What a client learns of a bug: nothing but that it happened (the log has the rest)."""
    return GraftError("The server failed while it answered this request. Its log has the details, by x-request-id.")


def echo(text: object) -> str:
    """Something the client sent, short enough to repeat."""
    shown = str(text)
    return shown if len(shown) <= MAX_ECHO_CHARS else f"{shown[:MAX_ECHO_CHARS]}..."


def _encodable(text: str) -> str:
    """JSON can escape half of a surrogate pair, which no answer in UTF-8 can repeat."""
    return text.encode(errors="replace").decode()


def install(app: FastAPI) -> None:
    """Have `app` answer each kind of failure with the error object."""
    app.add_exception_handler(GraftError, _answer_graft)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(ClientGone, _answer_gone)


def log_failure(error: GraftError, request_id: object) -> None:
    """Note an answer that is the server's own failure, under the id that its client has. A full server is none."""
    if error.status >= 500 and not isinstance(error, Overloaded):
        said = " ".join(error.message.split())
        _LOG.warning("request %s was answered with %d %s: %s", request_id, error.status, error.code, said)


def _headers(error: GraftError) -> dict[str, str]:
    if error.status == 503:
        wait_s = error.retry_after_s if isinstance(error, Overloaded) else _RESTART_S
        # OpenAI's clients read the first two before the third, which is all that others know.
        return {"x-should-retry": "true", "retry-after-ms": str(1000 * wait_s), "retry-after": str(wait_s)}
    if isinstance(error, RateLimited):
        wait_s = error.retry_after_s
        is_soon = "true" if wait_s <= _LONGEST_RETRY_S else "false"
        return {"x-should-retry": is_soon, "retry-after-ms": str(1000 * wait_s), "retry-after": str(wait_s)}
    if isinstance(error, Conflict | RequestTimedOut | StorageFull):
        # OpenAI's clients send a 409, a 504 and a 507 again by themselves; these will not go away by waiting.
        return {"x-should-retry": "false"}
    return {"www-authenticate": "Bearer"} if error.status == 401 else {}


async def _answer_graft(request: Request, error: Exception) -> Response:
    assert isinstance(error, GraftError)
    log_failure(error, request.scope.get("request_id"))
    return error_response(error)


async def _answer_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=STATUS_CLIENT_GONE)


async def _answer_http(request: Request, error: Exception) -> Response:
    """The framework's own refusals: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    said, headers = echo(error.detail), error.headers
    if error.status_code == 404 and _methods_of(request, f"/v1{request.scope['path']}"):
        said += "; the routes of OpenAI's API begin with /v1"
    elif error.status_code == 405:
        headers = {"allow": ", ".join(_methods_of(request, request.scope["path"]))}
        said += f"; this path takes {headers['allow']}"
    where = f"{request.method} {echo(request.scope['path'])}"
    shown = BadRequest(f"{where}: {said}.", code=_HTTP_CODES.get(error.status_code, "http_error"))
    return ErrorResponse(shown, error.status_code, headers)


def _methods_of(request: Request, path: str) -> list[str]:
    """What may be done with a path. (Of several routes with one path, the framework's own answer names the first's.)"""
    scopes = {method: {**request.scope, "path": path, "method": method} for method in _METHODS}
    routes = request.app.routes
    found = [m for m, scope in scopes.items() if any(route.matches(scope)[0] is Match.FULL for route in routes)]
    return sorted([*found, "HEAD"]) if "GET" in found else found


async def _answer_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Of the alternatives of a union the deepest problem belongs to the one that was meant.
    return error_response(_from_validation(max(error.errors(), key=lambda problem: len(problem["loc"]))))


def _from_validation(problem: Mapping[str, Any]) -> BadRequest:
    """A problem that pydantic found, in words; the value itself is not repeated (it may be megabytes)."""
    if problem["type"] == "json_invalid":
        return BadRequest(f"The body is not valid JSON: {echo(problem['ctx']['error'])} (byte {problem['loc'][-1]}).")
    param = _field_path(problem["loc"], ends_in_key=problem["type"] == "extra_forbidden")
    if problem["type"] == "string_unicode":
        where = "The name of a field" if param is None else f"'{param}'"
        return BadRequest(f"{where} has half of a surrogate pair; send whole characters.", param=param)
    if param is None:
        return BadRequest("Send the body as a JSON object, with the header Content-Type: application/json.")
    if problem["type"] == "missing":
        return BadRequest(f"'{param}' is required.", param=param, code="missing_field")
    if problem["type"] == "extra_forbidden":
        return BadRequest(f"'{param}' is not supported by this server; remove it.", param=param, code="unsupported")
    text = echo(problem["msg"].removeprefix("Value error, "))
    return BadRequest(f"'{param}': {text}.", param=param)


def _field_path(location: Sequence[str | int], *, ends_in_key: bool) -> str | None:
    """("body", "messages", 0, "content", "str") -> "messages[0].content"; None for the body as a whole.

    What pydantic calls the alternatives of a union is left out. `ends_in_key`: the last part is the client's own word.
    """
    path = ""
    for left, part in zip(range(len(location) - 2, -1, -1), location[1:], strict=True):
        if isinstance(part, int):
            path += f"[{part}]"
        elif (ends_in_key and not left) or (part.isidentifier() and part not in _ALTERNATIVES):
            path += f".{part}" if path else part
    return echo(path) or None
